"""Which scorer a name stands for: checked before anything is loaded, fetched, and loaded."""

from pathlib import Path

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.scorers.classifiers import ClassifierScorer
from sparc3_lightning.scorers.detoxify import DetoxifyScorer
from sparc3_lightning.scorers.functions import FunctionScorer
from sparc3_lightning.scorers.guards import GuardScorer
from sparc3_lightning.scorers.repetition import RepetitionScorer
from sparc3_lightning.scorers.words import WordsScorer

# A name is of the first kind that has it for a word of its own, else of the first kind that takes it.
KINDS: list[type[Scorer]] = [
    DetoxifyScorer,
    RepetitionScorer,
    GuardScorer,
    WordsScorer,
    ClassifierScorer,
    FunctionScorer,
]


def kind_of(name: str, option: str = "scorer") -> type[Scorer]:
    """Return the kind of scorer that a name stands for.

    Raises:
        OptionError: If the name is of no kind; it is about ``option``.
    """
    kinds = [kind for kind in KINDS if name in kind.words] or [kind for kind in KINDS if kind.takes(name)]
    if kinds:
        return kinds[0]
    small, *words = (word for kind in KINDS for word in kind.words)
    forms = "".join(f", nor {kind.form}" for kind in KINDS if kind.form)
    raise OptionError(option, f": {name!r} is neither {small!r}, {', '.join(words)}{forms}.")


def location_of(name: str) -> str:
    """Return what a scorer's name says is read, a path or an id of the hub; the name itself if it is of no kind."""
    return next((kind.location(name) for kind in KINDS if kind.takes(name)), name)


def check_scorer(name: str, option: str = "scorer") -> None:
    """Raise unless there is a scorer of this name; cheap, nothing is loaded.

    Raises:
        ValueError: If the name is unknown, a package is not installed, or the shipped checkpoint is not the one that
            was shipped.
        FileNotFoundError: If a folder lacks one of its files.
    """
    kind_of(name, option).check(name, option)


def fetch_scorer(name: str) -> list[Path]:
    """Fetch what a scorer needs, and return the files."""
    return kind_of(name).fetch(name)


def fingerprint_of(name: str) -> str:
    """Return what tells a scorer from every other; what it needs is fetched first."""
    return kind_of(name).fingerprint(name)


def load_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """Load the scorer of a name.

    Args:
        name: One of Detoxify's models; ``small``; ``repetition``; a folder with a Detoxify checkpoint; a folder or
            Hugging Face id of a text-classification checkpoint, if need be with ``#`` and the label that means toxic;
            ``guard:`` and the name of a guard or the path of its YAML; ``words:<file>``, if need be with ``#rate``; or
            ``package.module:function``.
        device: Where to score.
    """
    return kind_of(name)(name, device)
