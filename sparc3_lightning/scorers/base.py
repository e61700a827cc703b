"""What every scorer is: from texts to numbers in [0, 1]."""

import math
from collections.abc import Hashable, Sequence
from typing import Protocol


class Scorer(Protocol):
    """Scores texts."""

    name: str

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where a text could not be scored."""
        ...


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
