"""Which scorer a name stands for: checked before anything is loaded, fetched, and loaded."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.scorers.classifiers import (
    ClassifierScorer,
    FunctionScorer,
    RepetitionScorer,
    check_function,
    fetch_classifier,
    is_function,
    split_label,
)
from sparc3_lightning.scorers.detoxify import DETOXIFY_MODELS, SHIPPED, SHIPPED_SHA256, DetoxifyScorer, checkpoint_of
from sparc3_lightning.sources import sha256_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


REPETITION = "repetition"


def load_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """Load the scorer of a name.

    Args:
        name: One of Detoxify's models; ``small``; ``repetition``; a folder with a Detoxify checkpoint; a folder or
            Hugging Face id of a text-classification checkpoint, if need be with ``#`` and the label that means toxic;
            or ``package.module:function``.
        device: Where to score.
    """
    check_scorer(name)
    return _kind(name)(name, device)


class Remembering:
    """A scorer that scores a text once.

    What a text is padded with, and so the last digits of its score, depends on the texts beside it: without this, two
    models that write the same would not be alike.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._known: dict[str, float] = {}

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, as the scorer does."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known |= zip(new, self._scorer.score(new), strict=True)
        return [self._known[text] for text in texts]

    def score_drawn(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each continuation, by its text, or by the tokens that were drawn if these are counted."""
        return self._scorer.score_tokens(tokens) if isinstance(self._scorer, RepetitionScorer) else self.score(texts)


def _kind(name: str) -> type[DetoxifyScorer] | type[ClassifierScorer] | type[FunctionScorer] | type[RepetitionScorer]:
    if name == REPETITION:
        return RepetitionScorer
    folder = Path(split_label(name)[0])
    if name == "small" or name in DETOXIFY_MODELS or any(folder.glob("*.ckpt")):
        return DetoxifyScorer
    return FunctionScorer if is_function(name) and not folder.exists() else ClassifierScorer


def check_scorer(name: str, option: str = "scorer") -> None:
    """Raise unless there is a scorer of this name; cheap, nothing is loaded.

    Raises:
        ValueError: If the name is unknown, a package is not installed, or the shipped checkpoint is not the one that
            was shipped.
        FileNotFoundError: If a folder lacks one of its files.
    """
    kind, folder = _kind(name), Path(split_label(name)[0])
    if kind is RepetitionScorer:
        return
    if name == "small":
        if sha256_of(SHIPPED / "toxicity.ckpt") != SHIPPED_SHA256:
            raise ValueError(f"{SHIPPED / 'toxicity.ckpt'} is not the file that was shipped (its sha256 differs).")
    elif kind is FunctionScorer:
        check_function(name, option)
    elif kind is DetoxifyScorer and "#" in name:
        raise OptionError(option, f": {name!r} names a label, which a Detoxify checkpoint does not take.")
    elif folder.is_dir():
        is_detoxify = len(list(folder.glob("*.ckpt"))) == 1
        is_classifier = any(folder.glob("*.safetensors"))
        if not (is_detoxify or is_classifier) or not (folder / "config.json").is_file():
            raise OptionFileNotFoundError(
                option,
                f": {folder} must hold a config.json, a tokenizer, and either one *.ckpt of Detoxify or the "
                "*.safetensors of a text-classification checkpoint.",
            )
    elif kind is ClassifierScorer and not _HUB_ID.fullmatch(str(folder)):
        raise OptionError(
            option,
            f": {name!r} is neither 'small', {', '.join(DETOXIFY_MODELS)}, {REPETITION}, nor a folder, nor a "
            "Hugging Face id (owner/name), nor package.module:function.",
        )


def fetch_scorer(name: str) -> list[Path]:
    """Fetch what a scorer needs, and return the files."""
    kind = _kind(name)
    if kind in (FunctionScorer, RepetitionScorer):
        return []
    if kind is ClassifierScorer:
        return fetch_classifier(name)
    checkpoint, config = checkpoint_of(name)
    return [checkpoint, *(path for path in Path(config).iterdir() if path.suffix == ".json")]
