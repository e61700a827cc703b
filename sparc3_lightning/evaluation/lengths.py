"""Longer continuations in pieces: the behaviour within their first tokens, and later on, of the same draws."""

import math
from collections.abc import Callable, Sequence
from itertools import count, pairwise, takewhile
from typing import NamedTuple

import torch

from sparc3_lightning.evaluation.completions import Completion
from sparc3_lightning.evaluation.findings import Continuations
from sparc3_lightning.evaluation.intervals import Difference, paired_difference
from sparc3_lightning.evaluation.results import Lengths
from sparc3_lightning.scorers.base import Scorer

COMPARED = ("baseline", "pruned")  # the models whose continuations are scored in pieces


class Piece(NamedTuple):
    """Tokens of a continuation, from ``start`` to before ``end``, counted from 0; its name counts from 1."""

    start: int
    end: int

    @property
    def name(self) -> str:
        """What results and rows call it, such as ``21-50``: the first token and the last."""
        return f"{self.start + 1}-{self.end}"

    def is_reached(self, num_tokens: int) -> bool:
        """Tell whether a continuation of so many tokens has this piece.

        What begins with the first token is there even if nothing was drawn: it is the whole of a shorter text.
        """
        return self.start == 0 or num_tokens > self.start


def lengths_of(max_new_tokens: int) -> list[int]:
    """Return the lengths up to which continuations are looked at, in tokens: the usual ones below the most, and it.

    Example:
        >>> lengths_of(100), lengths_of(256), lengths_of(20)
        ([20, 50, 100], [20, 50, 100, 200, 256], [20])
    """
    usual = (digit * 10**power for power in count(1) for digit in (2, 5, 10))
    return [*takewhile(lambda length: length < max_new_tokens, usual), max_new_tokens]


def prefixes(max_new_tokens: int) -> list[Piece]:
    """Return the pieces from the first token to each length; the last one is the whole continuation."""
    return [Piece(0, length) for length in lengths_of(max_new_tokens)]


def positions(max_new_tokens: int) -> list[Piece]:
    """Return the pieces between the lengths; the first of them is the first prefix."""
    return [Piece(start, end) for start, end in pairwise([0, *lengths_of(max_new_tokens)])]


def pieces_of(max_new_tokens: int) -> list[Piece]:
    """Return every piece that is not the whole continuation; none if there is one length only."""
    return [*prefixes(max_new_tokens)[:-1], *positions(max_new_tokens)[1:]]


def score_pieces(
    pieces: Sequence[Piece],
    tokens: Sequence[Sequence[int]],
    decode: Callable[[Sequence[Sequence[int]]], list[str]],
    scorer: Scorer,
) -> dict[str, list[float]]:
    """Cut continuations into pieces by their tokens, and score each.

    Args:
        pieces: To cut.
        tokens: The ids of each continuation, without the token that ended it.
        decode: Gives token ids as text.
        scorer: Scores them.

    Returns:
        By the name of the piece, the score of each continuation; NaN where it ended before the piece begins, or could
        not be scored. One that ended inside the piece is scored by what there is.
    """
    found = {}
    for piece in pieces:
        reaching = [i for i, ids in enumerate(tokens) if piece.is_reached(len(ids))]
        cut = [tokens[i][piece.start : piece.end] for i in reaching]
        scores = [math.nan] * len(tokens)
        for i, score in zip(reaching, scorer.score_drawn(decode(cut), cut) if cut else [], strict=True):
            scores[i] = score
        found[piece.name] = scores
    return found


def by_length(rows: Sequence[Completion], judge: str, max_new_tokens: int) -> Lengths | None:
    """Return the effect of pruning within the first tokens, and later; None if there is one length only.

    Args:
        rows: Of completions.jsonl; those of the original and the pruned model have ``parts``.
        judge: Of the headline.
        max_new_tokens: Length of a continuation at most.
    """
    pieces = pieces_of(max_new_tokens)
    rows = [row for row in rows if row["model"] in COMPARED]
    if not pieces or not any(row["model"] == "pruned" for row in rows):
        return None
    whole = prefixes(max_new_tokens)[-1].name
    of = {piece.name: Continuations([{**row, "scores": row["parts"][piece.name]} for row in rows], judge)
          for piece in pieces} | {whole: Continuations(rows, judge)}  # fmt: skip
    effects = {name: found.compare(*COMPARED, found.headline, "behavior_mean") for name, found in of.items()}
    first, *later = (piece.name for piece in positions(max_new_tokens))
    return Lengths(
        within={piece.name: effects[piece.name] for piece in prefixes(max_new_tokens)},
        at={name: effects[name] for name in (first, *later)},
        last_less_first=_between(of[first], of[later[-1]]),
        reaching={piece.name: _reaching(of[whole], piece) for piece in positions(max_new_tokens)[1:]},
        num_failed=sum(
            piece.is_reached(row["num_tokens"]) and row["parts"][piece.name][judge] is None
            for row in rows
            for piece in pieces
        ),
    )


def _between(first: Continuations, last: Continuations) -> Difference | None:
    """Compare the change at two positions, over the prompts that have a score of both models at both."""
    before, after = (of.changes(*COMPARED, of.headline) for of in (first, last))
    valid = torch.isfinite(before + after)
    return paired_difference(before[valid], after[valid], most=2.0) if valid.any() else None


def _reaching(continuations: Continuations, piece: Piece) -> Difference:
    """Compare how many of each prompt's continuations reach a piece, as a share."""
    shares = [
        torch.tensor(
            [sum(piece.is_reached(row["num_tokens"]) for row in found) / len(found) for found in of_model],
            dtype=torch.float64,
        )
        for of_model in (continuations.of(model, continuations.headline) for model in COMPARED)
    ]
    return paired_difference(shares[0], shares[1], most=1.0)
