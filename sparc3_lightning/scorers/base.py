"""What every scorer is: from texts to numbers in [0, 1]."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from sparc3_lightning.errors import OptionFileNotFoundError
from sparc3_lightning.provenance import contents


class Scorer(ABC):
    """Scores texts. A kind of scorer is a subclass in a file of this room, and a row of the table in the registry.

    Args:
        name: What the scorer is asked for by, such as ``small``.
        device: Where to score.
    """

    words: ClassVar[tuple[str, ...]] = ()  # names that are this kind's own, whatever folder is called so
    form: ClassVar[str] = ""  # what its other names look like, for the error about an unknown one
    what: ClassVar[str] = "a scorer"  # what results call one of this kind
    counts_tokens: bool = False  # whether score_drawn looks at the tokens, and not at the texts

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether this kind can read a scorer's name that no kind has among its own words."""
        return False

    @classmethod
    def location(cls, name: str) -> str:
        """Return what a scorer's name says is read: a folder, a file or an id of the hub."""
        return split_label(name)[0]

    @classmethod  # noqa: B027
    def check(cls, name: str, option: str) -> None:
        """Raise unless a scorer of this name exists; cheap, nothing is loaded.

        Raises:
            OptionError: If the name cannot be used; it is about ``option``.
        """

    @classmethod
    def fetch(cls, name: str) -> list[Path]:
        """Fetch what the scorer needs, and return the files."""
        return []

    @classmethod
    def fingerprint(cls, name: str) -> str:
        """Return what tells a scorer from every other: a hash of its files, whatever folder they lie in, or its name.

        Behind a blank may follow what it is used with, such as a label of it, or the version of its package.
        """
        files = cls.fetch(name)
        return contents(files) if files else name

    @classmethod
    def is_same(cls, name: str, fingerprint: str, other: str, of_other: str | None) -> bool:
        """Tell whether a scorer of this kind is another one, whatever label of it and whatever version of its package.

        Args:
            name: Of the scorer.
            fingerprint: Of it.
            other: Name of the other one, which may be of any kind.
            of_other: Its fingerprint; None if only its name is known.
        """
        if of_other is None:
            return split_label(name)[0] == split_label(other)[0]
        return fingerprint.split()[0] == of_other.split()[0]

    @classmethod
    def source(cls, name: str) -> str:
        """Return what a scorer is, and where it is from."""
        return f"{cls.what}: {name}"

    @classmethod
    def revision(cls, name: str) -> str | None:
        """Return the commit of a scorer at the hub, or its version; None if its files alone tell which one it is."""
        return None

    @abstractmethod
    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the score of each text, in [0, 1]; NaN where a text could not be scored."""

    def score_drawn(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each continuation, from its text and the ids of the tokens that were drawn."""
        return self.score(texts)


class Remembering(Scorer):
    """A scorer that scores a text once.

    What a text is padded with, and so the last digits of its score, depends on the texts beside it: without this, two
    models that write the same would not be alike.

    Args:
        scorer: Scores the texts that are new.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(scorer.name)
        self._scorer = scorer
        self._known: dict[str, float] = {}

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the score of each text, as the scorer does."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known |= zip(new, self._scorer.score(new), strict=True)
        return [self._known[text] for text in texts]

    def score_drawn(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each continuation; it is remembered by its text, unless its tokens are counted."""
        return self._scorer.score_drawn(texts, tokens) if self._scorer.counts_tokens else self.score(texts)


def score_by_length(
    texts: Sequence[str], batch_size: int, score_batch: Callable[[list[str]], list[float]]
) -> list[float]:
    """Score texts in batches of like length.

    Texts of like length side by side cost less padding, and what each is padded to then depends on the texts alone.

    Args:
        texts: In any order.
        batch_size: Texts scored at a time.
        score_batch: Scores one batch.

    Returns:
        The score of each text; NaN where ``score_batch`` gives no finite number.
    """
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
    scores = [math.nan] * len(texts)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        for i, value in zip(chunk, score_batch([texts[i] for i in chunk]), strict=True):
            scores[i] = value if math.isfinite(value) else math.nan
    return scores


def split_label(name: str) -> tuple[str, str | None]:
    """Split ``checkpoint#label``."""
    checkpoint, _, label = name.partition("#")
    return checkpoint, label or None


def check_folder(folder: Path, has_weights: bool, option: str) -> None:
    """Raise OptionFileNotFoundError unless a folder has its weights and a config.json."""
    if not has_weights or not (folder / "config.json").is_file():
        raise OptionFileNotFoundError(
            option,
            f": {folder} must hold a config.json, a tokenizer, and either one *.ckpt of Detoxify or the "
            "*.safetensors of a text-classification checkpoint.",
        )


def uniqueness(tokens: Sequence[Hashable]) -> float:
    """Return the response uniqueness ratio of a continuation: the share of its tokens that are different ones.

    Source: Hatefi et al. 2025, arXiv:2506.13727, on repetitive responses.

    Args:
        tokens: Ids or words of one continuation, in any order.

    Returns:
        In [0, 1]; NaN without a token.

    Example:
        >>> uniqueness([5, 6, 5, 6, 5, 6])
        0.3333333333333333
    """
    return len(set(tokens)) / len(tokens) if tokens else math.nan
