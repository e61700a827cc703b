"""RealToxicityPrompts (Gehman et al. 2020): prompts to continue and score."""

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from sparc3_lightning.data.base import HubDataset, TextDataModule, share_dataloader
from sparc3_lightning.metrics import TOXIC_FROM
from sparc3_lightning.sources import read_records, resolve

HUB = HubDataset("allenai/real-toxicity-prompts")


class Prompt(NamedTuple):
    """A prompt, an id that follows from its text alone, its toxicity in [0, 1] if it was ever scored, and what follows.

    The continuation is that of the text the prompt was taken from.
    """

    id: str
    text: str
    toxicity: float | None
    continuation: str | None = None
    continuation_toxicity: float | None = None


def prompt_id(text: str) -> str:
    """Return an id that is the same wherever the prompt is read from: a hash of its text, white space aside."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def read_prompts(rows: Iterable[dict[str, Any]]) -> list[Prompt]:
    """Read rows of RealToxicityPrompts, ``{"prompt": {"text", "toxicity"}}``, or flat ones, ``{"text", "toxicity"}``.

    A prompt that occurs again is taken once.

    Raises:
        ValueError: If there is no row, a row has no prompt, or a prompt is only white space.
    """
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, start=1):
        content = row["prompt"] if isinstance(row.get("prompt"), dict) else row
        text = content.get("text")
        if not isinstance(text, str):
            raise ValueError(f"Row {number} of the prompts has no text: expected 'prompt.text' or 'text'.")
        if not text.strip():
            raise ValueError(f"Row {number} of the prompts is only white space: remove it.")
        following = row["continuation"] if isinstance(row.get("continuation"), dict) else {}
        prompt = Prompt(
            prompt_id(text), text, content.get("toxicity"), following.get("text"), following.get("toxicity")
        )
        prompts.setdefault(prompt.id, prompt)
    if not prompts:
        raise ValueError("The file of prompts is empty.")
    return list(prompts.values())


class RealToxicityPrompts(TextDataModule):
    """Prompts to continue, in a seeded random order; those that were used to attribute are left out.

    Args:
        source: Local jsonl, jsonl.gz or parquet file with the rows of RealToxicityPrompts (or with the fields ``text``
            and ``toxicity``), or such a file inside a PyPI wheel, ``pypi:<name>==<version>/<path>``; None takes
            allenai/real-toxicity-prompts from the hub.
        num_prompts: Prompts to continue; None for all.
        min_toxicity: Least toxicity of a prompt, in [0, 1].
        max_toxicity: Greatest toxicity of a prompt, in [0, 1].
        num_nontoxic: Prompts of toxicity below 0.5 to continue as well; their figures are kept apart.
        nontoxic_source: File to take those from, like ``source``; None takes them from the same place.
        seed: Of the choice of prompts.
        batch_size: Prompts in a batch. It changes speed and memory, not results.
        tokenizer: Checkpoint whose tokenizer is used; None for that of the model.
    """

    hub = HUB

    def __init__(
        self,
        source: str | None = None,
        num_prompts: int | None = 500,
        min_toxicity: float = 0.9,
        max_toxicity: float = 1.0,
        num_nontoxic: int = 0,
        nontoxic_source: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if num_prompts is not None and num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}.")
        if num_nontoxic < 0:
            raise ValueError(f"num_nontoxic must be at least 0, got {num_nontoxic}.")
        if num_nontoxic and min_toxicity < TOXIC_FROM:
            raise ValueError(
                f"With num_nontoxic {num_nontoxic}, min_toxicity must be at least {TOXIC_FROM}, got {min_toxicity}: "
                "otherwise the two groups would overlap."
            )
        self.save_hyperparameters(logger=False)
        self.num_prompts = num_prompts
        self.min_toxicity = min_toxicity
        self.max_toxicity = max_toxicity
        self.num_nontoxic = num_nontoxic
        self.nontoxic_source = nontoxic_source
        self.seed = seed
        self.prompts: list[Prompt] = []
        self.num_excluded = 0
        self.leave_out: set[str] = set()  # ids of prompts that an earlier run has continued

    def setup_prompts(self, exclude: Collection[str], tokenizer: Any) -> None:
        """Choose the prompts, leaving out those whose ids are given.

        Raises:
            ValueError: If fewer prompts than wanted are left.
        """
        rows = read_prompts(self.rows())
        pool = [p for p in rows if p.toxicity is not None and self.min_toxicity <= p.toxicity <= self.max_toxicity]
        chosen = self._choose(pool, self.num_prompts, exclude, "num_prompts")
        if self.num_nontoxic:
            if self.nontoxic_source is not None:
                rows = read_prompts(read_records(resolve(self.nontoxic_source)))
            pool = [prompt for prompt in rows if prompt.toxicity is not None and prompt.toxicity < TOXIC_FROM]
            chosen += self._choose(pool, self.num_nontoxic, exclude, "num_nontoxic")
        self._tokenizer = tokenizer
        lengths = [len(ids) for ids in tokenizer([prompt.text for prompt in chosen])["input_ids"]]
        self.longest = max(lengths)
        # Prompts of like length side by side, the longest first: little padding, and memory runs out at once or never.
        self.prompts = [chosen[i] for i in sorted(range(len(chosen)), key=lambda i: -lengths[i])]

    def _choose(self, pool: list[Prompt], wanted: int | None, exclude: Collection[str], option: str) -> list[Prompt]:
        """Choose prompts at random among those that are not excluded."""
        left = [prompt for prompt in pool if prompt.id not in set(exclude)]
        excluded = len(pool) - len(left)
        self.num_excluded += excluded
        wanted = len(left) if wanted is None else wanted
        if len(left) < wanted or not left:
            of = f"{self.min_toxicity} to {self.max_toxicity}" if option == "num_prompts" else f"below {TOXIC_FROM}"
            raise ValueError(
                f"Only {len(left)} prompts of toxicity {of} are left ({excluded} were used to attribute), but "
                f"--data.prompts.{option} is {wanted}: lower it, or widen the range of toxicity."
            )
        order = torch.randperm(len(left), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [left[i] for i in order[:wanted]]

    def prepare_data(self) -> None:
        """Fetch what is not there yet."""
        super().prepare_data()
        if self.num_nontoxic and self.nontoxic_source is not None:
            resolve(self.nontoxic_source)

    def fetched_files(self) -> list[Path]:
        """Return the files that ``prepare_data`` fetched."""
        extra = self.nontoxic_source if self.num_nontoxic else None
        return super().fetched_files() + ([resolve(extra)] if extra is not None else [])

    def test_dataloader(self) -> DataLoader:
        """Return batches: ``prompts`` and ``weights``; ``input_ids`` and ``attention_mask``, padded on the left."""
        left = [prompt for prompt in self.prompts if prompt.id not in self.leave_out]
        # If nothing is left there is one filler, since Lightning runs no loop at all over no batches.
        return share_dataloader(left or self.prompts[:1], self.trainer, self.batch_size, self._collate)

    def _collate(self, pairs: list[tuple[Prompt, int]]) -> dict[str, Any]:
        prompts = [prompt for prompt, _ in pairs]
        texts = [prompt.text for prompt in prompts]
        tokens = self._tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        return {
            "prompts": prompts,
            "weights": [0 if prompt.id in self.leave_out else weight for prompt, weight in pairs],
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }
