"""How much a continuation repeats itself."""

from collections.abc import Sequence

from sparc3_lightning.scorers.base import Scorer, uniqueness


class RepetitionScorer(Scorer):
    """How much a continuation repeats itself: 1 less the share of its tokens that are different ones.

    Args:
        name: ``repetition``.
        device: Not used.
    """

    words = ("repetition",)
    what = "the share of repeated tokens"
    counts_tokens = True

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the repetition of each text over its words, in [0, 1]; NaN where there is no word."""
        return [1 - uniqueness(text.split()) for text in texts]

    def score_drawn(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[float]:
        """Return the repetition of each continuation over the model's own tokens, in [0, 1]; NaN if it is empty."""
        return [1 - uniqueness(drawn) for drawn in tokens]
