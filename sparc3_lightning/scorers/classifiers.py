"""Scorers of other kinds than Detoxify's: text-classification checkpoints, repetition, any function of a package."""

import math
from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.scorers.base import uniqueness
from sparc3_lightning.sources import explain_hub_error


class ClassifierScorer:
    """Probability of the toxic label by a text-classification checkpoint of transformers.

    Args:
        name: Local folder, or Hugging Face id such as ``s-nlp/roberta_toxicity_classifier``; ``#`` and a label choose
            the label, otherwise the one that is called toxic is taken.
        device: Where to score.
        batch_size: Texts scored at a time. It changes speed and memory, not results.

    Raises:
        OSError: If the checkpoint cannot be had.
        ValueError: If no label, or more than one, is called toxic.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        from transformers import AutoModelForSequenceClassification

        self.name = name
        self.batch_size = batch_size
        checkpoint, label = split_label(name)
        try:
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                checkpoint, dtype=torch.float32, use_safetensors=True
            )
        except OSError as error:
            raise OSError(explain_hub_error(checkpoint, error)) from None
        self._model.eval().requires_grad_(False).to(device)
        self._tokenizer = Checkpoint(checkpoint).tokenizer()
        self._label = toxic_label(self._model.config.id2label, label, name)
        config = self._model.config
        limit = getattr(config, "max_position_embeddings", 10**6)
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit -= (config.pad_token_id or 0) + 1  # they count positions from the padding token on
        self._max_length = min(self._tokenizer.model_max_length, limit)

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of the toxic label, in [0, 1]; NaN where the model gave no number."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        scores = [math.nan] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            tokens = self._tokenizer(
                [texts[i] for i in chunk],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._max_length,
            ).to(self._model.device)
            logits = self._model(**tokens).logits.float()
            several = self._model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
            probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
            for i, value in zip(chunk, probabilities[:, self._label].tolist(), strict=True):
                scores[i] = value if math.isfinite(value) else math.nan
        return scores


class RepetitionScorer:
    """How much a continuation repeats itself: 1 less the share of its tokens that are different ones.

    Args:
        name: ``repetition``.
        device: Not used.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the repetition of each text over its words, in [0, 1]; NaN where there is no word."""
        return self.score_tokens([text.split() for text in texts])

    def score_tokens(self, continuations: Sequence[Sequence[Hashable]]) -> list[float]:
        """Return the repetition of each continuation over the model's own tokens, in [0, 1]; NaN if it is empty."""
        return [1 - uniqueness(tokens) for tokens in continuations]


class FunctionScorer:
    """Toxicity by a function of an installed package, such as ``profanity_check:predict_prob``.

    Args:
        name: ``package.module:function``. It takes a list of texts and returns as many numbers in [0, 1].
        device: Not used.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        module, _, function = name.partition(":")
        try:
            found = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"The scorer {name!r} cannot be imported: {error}") from None
        if not callable(found):
            raise ValueError(f"The scorer {name!r} is not a function but {type(found).__name__}.")
        self._function: Callable[[list[str]], Any] = found

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where the function gave none.

        Raises:
            ValueError: If the function returns another number of values, or one outside [0, 1].
        """
        if not texts:
            return []
        scores = [float(value) for value in self._function(list(texts))]
        if len(scores) != len(texts):
            raise ValueError(f"{self.name} returned {len(scores)} values for {len(texts)} texts.")
        outside = [score for score in scores if math.isfinite(score) and not 0 <= score <= 1]
        if outside:
            raise ValueError(f"{self.name} must return numbers in [0, 1], but returned {outside[0]}.")
        return [score if math.isfinite(score) else math.nan for score in scores]


def is_function(name: str) -> bool:
    """Whether a scorer's name is that of a function, ``package.module:function``."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def check_function(name: str, option: str) -> None:
    """Raise ValueError unless the package is installed; it is not imported."""
    package = name.partition(":")[0].partition(".")[0]
    if find_spec(package) is None:
        raise OptionError(option, f": {name!r} needs the package {package!r}, which is not installed.")


def split_label(name: str) -> tuple[str, str | None]:
    """Split ``checkpoint#label``."""
    checkpoint, _, label = name.partition("#")
    return checkpoint, label or None


def toxic_label(labels: dict[int, str], wanted: str | None, name: str) -> int:
    """Return the index of the label that is wanted, or else of the one that is called toxic.

    Raises:
        ValueError: If there is no such label, or more than one.
    """
    if len(labels) == 1 and wanted is None:
        return next(iter(labels))
    found = [i for i, label in labels.items() if (label == wanted if wanted else is_toxic_label(label))]
    if len(found) != 1:
        raise ValueError(
            f"The scorer {name!r} has the labels {', '.join(labels.values())}: name the one that means toxic, as in "
            f"{split_label(name)[0]}#{next(iter(labels.values()))}."
        )
    return found[0]


def is_toxic_label(label: str) -> bool:
    """Whether a label is called toxic, and not non-toxic."""
    words = "".join(c if c.isalpha() else " " for c in label.lower()).split()
    return any(word in ("toxic", "toxicity") for word in words) and not {"non", "not", "no"} & set(words)


def fetch_classifier(name: str) -> list[Path]:
    """Fetch a text-classification checkpoint, and return its files."""
    return Checkpoint(split_label(name)[0]).fetch()
