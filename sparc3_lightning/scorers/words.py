"""Lists of words, and scorers that look for them: which continuations have one, and how many a token."""

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.files import at_home
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.sources import local_path, read_lines

PREFIX = "words:"
RATE = "#rate"
_PLAIN = str.maketrans({"\u2019": "'", "\u2010": "-", "\u2011": "-"})  # the last is a hyphen at which no line breaks


class WordsScorer(Scorer):
    """Whether a continuation has one of the words of a list: 1 or 0, so that the mean is the share of those with one.

    A word is found as a whole, whatever the case of its letters: no letter, digit or ``_`` stands beside it. A phrase
    may have any white space between its words; a curly apostrophe is a straight one, and a hyphen is any hyphen. Where
    one word of the list begins another, such as ``testament`` and ``testament to``, the longer one is found.

    Args:
        name: ``words:<file>``, of a text file with a word or phrase a line, see ``read_words``. With ``#rate`` behind
            it a score is how many occurrences come to a token that was drawn, at most 1.
        device: Not used.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is no list of words.
    """

    form = "words:<file>"
    what = "a list of words"

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        super().__init__(name)
        self.counts_tokens = name.endswith(RATE)
        self._count = counter_of(read_words(local_path(self.location(name))))

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a name begins with ``words:``, or is the name of a text file, as a lexicon may be."""
        if name.startswith(PREFIX) or name.endswith(".txt"):
            return True
        try:
            return at_home(name).is_file()
        except (OSError, ValueError):  # too long a name, or no such home folder
            return False

    @classmethod
    def location(cls, name: str) -> str:
        """Return the name of the file."""
        return name.removeprefix(PREFIX).removesuffix(RATE)

    @classmethod
    def check(cls, name: str, option: str) -> None:
        """Raise OptionError unless the file is a list of words."""
        try:
            path = local_path(cls.location(name))
        except ValueError as error:
            raise OptionError(option, f": {error}") from None
        if not path.is_file():
            raise OptionFileNotFoundError(
                option,
                f": {name!r} needs a text file of words, one a line, and {str(path)!r} is none (seen from "
                f"{Path.cwd()}); behind its name only {RATE} may stand.",
            )
        try:
            read_words(path)
        except ValueError as error:
            raise OptionError(option, f": {error}") from None

    @classmethod
    def fetch(cls, name: str) -> list[Path]:
        """Return the file."""
        return [local_path(cls.location(name))]

    @classmethod
    def fingerprint(cls, name: str) -> str:
        """Return what tells a list from another, see ``fingerprint_of_words``, whatever the file is called."""
        rate = " rate" if name.endswith(RATE) else ""
        return f"{fingerprint_of_words(read_words(local_path(cls.location(name))))}{rate}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return 1 for each text with one of the words, else 0; of a rate the occurrences a word of the text."""
        return self.score_drawn(texts, [range(len(text.split())) for text in texts])

    def score_drawn(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each continuation, in [0, 1]; a rate is NaN where no token was drawn."""
        counts = list(map(self._count, texts))
        if not self.counts_tokens:
            return [float(count > 0) for count in counts]
        pairs = zip(counts, tokens, strict=True)
        return [min(1.0, count / len(drawn)) if len(drawn) else math.nan for count, drawn in pairs]


def read_words(path: Path) -> list[str]:
    """Return the words of a text file in UTF-8: a word or phrase a line, each once.

    Empty lines count for nothing, nor does what follows a ``#`` that begins a line or has white space before it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8 or holds no word, or a line is none or holds one of before; the line is named.
    """
    lines = ((number, re.sub(r"(^|\s)#.*", "", line)) for number, line in enumerate(read_lines(path), start=1))
    return _checked(((f"{path}, line {number}", line) for number, line in lines if line.strip()), str(path))


def check_words(words: Sequence[str]) -> list[str]:
    """Return the words of a list of an option as ``read_words`` does those of a file.

    Raises:
        ValueError: If there is none, one is empty, or one comes twice.
    """
    return _checked(((f"Word {number} of the list", word) for number, word in enumerate(words, start=1)), "The list")


def _checked(words: Iterable[tuple[str, str]], place: str) -> list[str]:
    """Return words in one form, after their places were named where they cannot be used."""
    found: dict[str, tuple[str, str]] = {}
    for where, given in words:
        word = " ".join(unicodedata.normalize("NFC", given).split())
        if not word or not word.isprintable():
            raise ValueError(f"{where} is no word: {given.strip()!r:.60}.")
        first, _ = found.setdefault(plain(word), (where, word))
        if first != where:
            raise ValueError(f"{where} holds {word!r:.60}, which is there already ({first}): remove one of them.")
    if not found:
        raise ValueError(f"{place} holds no words: give a word or phrase a line.")
    return [word for _, word in found.values()]


def digest_of(words: Iterable[str]) -> str:
    """Return what identifies a list of words, in whatever order they are."""
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:16]


def fingerprint_of_words(words: Sequence[str]) -> str:
    """Return what identifies the words that are found, whatever the case of their letters, and behind a blank those."""
    return f"{digest_of(map(plain, words))} {digest_of(words)}"


def plain(text: str) -> str:
    """Return a text as it is compared: without case, accents joined to their letters, apostrophes and hyphens plain."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).translate(_PLAIN)


def counter_of(words: Sequence[str]) -> Callable[[str], int]:
    """Return what counts the occurrences of words in a text, each as a whole; see ``WordsScorer``."""
    inside = _inside()
    parts = []
    for word in sorted(map(plain, words), key=len, reverse=True):  # of two that begin alike the longer one is found
        before = rf"(?<!{inside})" if re.match(inside, word) else ""
        after = rf"(?!{inside})" if re.match(inside, word[-1]) else ""
        parts.append(before + r"\s+".join(map(re.escape, word.split())) + after)
    pattern = re.compile("|".join(parts))
    return lambda text: sum(1 for _ in pattern.finditer(plain(text)))


@cache
def _inside() -> str:
    """Return the class of the characters that words are of: letters, digits, ``_`` and what is added to a letter."""
    marks = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
    return rf"[\w{marks}]"
