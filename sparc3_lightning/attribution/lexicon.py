"""The tokens of a lexicon: those that a scorer finds toxic by themselves, or those that spell the words of a list."""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# Spellings are tried behind these texts: as the next word of a sentence, and as the first one of a line.
NEXT, FIRST = ("a", " "), ("a\n", "")


class Spelling(NamedTuple):
    """Tokens that spell a word; one that ``begins`` spells it only where the token before is not inside a word."""

    ids: tuple[int, ...]
    begins: bool


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Spellings of the words of a lexicon, see ``spell``.

    Args:
        tokens: Ids of the tokens that are a word wherever they stand, shape ``[tokens]``.
        firsts: Ids of those that are one only where the token before is not inside a word, shape ``[firsts]``.
        split: Spellings of several tokens.
        is_inside: Whether a token of the vocabulary ends in a letter, a digit or a part of one, so that what follows
            may be the rest of a word, shape ``[vocabulary]``; empty if there are no spellings that begin.
    """

    tokens: Tensor
    firsts: Tensor = field(default_factory=lambda: torch.tensor([], dtype=torch.long))
    split: tuple[Spelling, ...] = ()
    is_inside: Tensor = field(default_factory=lambda: torch.tensor([], dtype=torch.bool))

    @classmethod
    def of_tokens(cls, tokens: Sequence[int] = ()) -> "Lexicon":
        """Return the lexicon of tokens that are words by themselves."""
        return cls(torch.tensor(tokens, dtype=torch.long))

    def to(self, device: torch.device) -> "Lexicon":
        """Return the same lexicon on a device."""
        return Lexicon(self.tokens.to(device), self.firsts.to(device), self.split, self.is_inside.to(device))

    def digest(self) -> str:
        """Return what identifies the spellings."""
        return hashlib.sha256(str([self.tokens.tolist(), self.firsts.tolist(), self.split]).encode()).hexdigest()[:16]

    @cached_property
    def _whole(self) -> tuple[set[int], set[int]]:
        return set(self.tokens.tolist()), set(self.firsts.tolist())

    @cached_property
    def _by_last_but_one(self) -> dict[int, list[Spelling]]:
        found = defaultdict(list)
        for spelling in self.split:
            found[spelling.ids[-2]].append(spelling)
        return dict(found)

    @cached_property
    def _inside(self) -> list[bool]:
        return self.is_inside.tolist()

    def places(self, input_ids: Sequence[int], start: int = 0) -> Iterator[tuple[int, Spelling]]:
        """Yield where a text has all tokens of a split spelling but the last: the position of the last but one.

        Args:
            input_ids: Of the text.
            start: The first of them that counts; a word begins there or behind.
        """
        for position in range(start, len(input_ids)):
            for spelling in self._by_last_but_one.get(input_ids[position], ()):
                first = position - len(spelling.ids) + 2
                if first < start or tuple(input_ids[first : position + 1]) != spelling.ids[:-1]:
                    continue
                if not spelling.begins or self._may_begin(input_ids, first):
                    yield position, spelling

    def _may_begin(self, input_ids: Sequence[int], position: int) -> bool:
        """Tell whether a word may begin at a position: no other one is going on there."""
        return position == 0 or not self._inside[input_ids[position - 1]]

    def count(self, input_ids: Sequence[int], start: int = 0) -> int:
        """Return how many words a text has, as the target ``lexicon_probability`` expects them.

        Args:
            input_ids: Of the text.
            start: The first of them that counts.
        """
        anywhere, firsts = self._whole
        found = sum(token in anywhere for token in input_ids[start:])
        for position in range(start, len(input_ids) if firsts else 0):
            found += input_ids[position] in firsts and self._may_begin(input_ids, position)
        ends = ((input_ids[position + 1], spelling) for position, spelling in self.places(input_ids[:-1], start))
        return found + sum(token == spelling.ids[-1] for token, spelling in ends)


class Kept(NamedTuple):
    """Words whose probability is subtracted from the probability of others, and what it is multiplied with before."""

    words: Lexicon
    weight: float


def spell(
    words: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    decode: Callable[[list[list[int]]], list[str]],
    num_tokens: int,
    vocab_size: int = 0,
    wherever: bool = False,
) -> tuple[Lexicon, list[str]]:
    """Return the spellings of words, and the words that the tokenizer splits in every one of them.

    A word is spelled as it is, in lower case and capitalized, with straight and with curly apostrophes, each as the
    tokenizer does behind a word and a blank, and at the beginning of a line. Tokens that spell it behind a blank are
    the word wherever they stand. Any others, such as ``art`` without a blank, are so only where no word is going on:
    they may be the end of ``start``. What follows is not looked at: `` art`` is counted, too, where the model goes on
    to write ``artisan``.

    Args:
        words: Words or phrases.
        encode: Gives the token ids of texts, with nothing before and behind them.
        decode: Gives the texts of token ids.
        num_tokens: Tokens of the tokenizer.
        vocab_size: Tokens that the model has embeddings of: what is beyond those of the tokenizer is no text.
        wherever: Whether a word is split, too, if a single token spells it only where no word is going on.

    Raises:
        ValueError: If no tokens spell a word; all such words are named.
    """
    tokens: set[int] = set()
    firsts: set[int] = set()
    split: dict[tuple[int, ...], bool] = {}
    unknown, whole_in_none = [], []
    for word in words:
        capital = word[:1].upper()
        cases = dict.fromkeys((word, word.lower(), capital + word[1:], capital + word[1:].lower()))
        straight = [form.replace("\u2019", "'") for form in cases]
        forms = list(dict.fromkeys((*cases, *straight, *(form.replace("'", "\u2019") for form in straight))))
        anywhere = _ids_behind(*NEXT, forms, encode, decode)
        found = dict.fromkeys(anywhere, False)
        found |= {ids: word[0].isalnum() for ids in _ids_behind(*FIRST, forms, encode, decode) - anywhere}
        # Where the blank is a token of its own, the tokens behind it are found by themselves, and would count twice.
        found = {ids: begins for ids, begins in found.items() if not any(ids[k:] in found for k in range(1, len(ids)))}
        if not found:
            unknown.append(word)
        elif all(len(ids) > 1 or (wherever and begins) for ids, begins in found.items()):
            whole_in_none.append(word)
        for ids, begins in found.items():
            if len(ids) > 1:
                split[ids] = split.get(ids, True) and begins
            else:
                (firsts if begins else tokens).add(ids[0])
    if unknown:
        raise ValueError(f"The tokenizer has no tokens that spell {', '.join(map(repr, unknown))}: remove them.")
    spellings = tuple(Spelling(ids, begins) for ids, begins in sorted(split.items()))
    firsts -= tokens
    is_inside = []
    if firsts or any(spelling.begins for spelling in spellings):
        is_inside = [_goes_on(text) for text in decode([[i] for i in range(num_tokens)])]
        is_inside += [False] * (vocab_size - num_tokens)
    return Lexicon(
        torch.tensor(sorted(tokens), dtype=torch.long),
        torch.tensor(sorted(firsts), dtype=torch.long),
        spellings,
        torch.tensor(is_inside, dtype=torch.bool),
    ), whole_in_none


def _ids_behind(
    before: str,
    between: str,
    forms: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    decode: Callable[[list[list[int]]], list[str]],
) -> set[tuple[int, ...]]:
    """Return the tokens of each form behind a text, of those forms that the tokenizer can write."""
    head, *found = encode([before, *(f"{before}{between}{form}" for form in forms)])
    tails = [ids[len(head) :] if ids[: len(head)] == head else [] for ids in found]
    texts = decode(tails)
    # Tokens for what is unknown, or nothing at all in its place, do not say the word.
    return {tuple(ids) for ids, text, form in zip(tails, texts, forms, strict=True) if _bare(text) == _bare(form)}


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _goes_on(text: str) -> bool:
    """Tell whether what follows a token's text may be the rest of a word: also behind half of a character."""
    return text[-1:].isalnum() or text[-1:] in ("_", "\ufffd") or unicodedata.category(text[-1:] or " ")[0] == "M"
