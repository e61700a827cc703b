"""Which weights of the lowest scores are pruned: row by row, layer by layer, over all layers at once, or n:m.

What a compression pruned so, and by which scores, is in sparsity.json.

Shape letters: I inputs and O outputs of one linear layer; G groups whose weights are compared with each other, K
weights of a group. Every mask is exact to the count; of equal scores the first ones in the order of rows are pruned.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.errors import OptionError
from sparc3_lightning.files import Count, JsonFile, Share, read_as
from sparc3_lightning.models.checkpoints import Dtype
from sparc3_lightning.selection.lowest import below_threshold, lowest

SPARSITY = "sparsity.json"
PATTERNS = ("row", "layer", "global")
_BINS = 1 << 16


class RankedBy(TypedDict):
    """What is read of a file of scores that weights were ranked by; what else is said of it is for people.

    ``digest`` is of its scores, see ``WeightScores``, and ``spec`` the options that they were computed with.
    """

    path: str
    digest: str
    spec: ScoreSpec


@dataclass(frozen=True)
class SparsityResults(JsonFile):
    """The content of sparsity.json: which weights are zero, and what makes the same masks again.

    ``general`` holds the files of scores, see ``RankedBy``; ``layers`` the sparsity of each layer; ``masks`` is a hash
    of where the zeros are.
    """

    FORMAT = "sparc3_lightning sparsity 1"
    pattern: str
    sparsity: Share
    num_pruned: Count
    num_weights: Count
    masks: str
    layers: dict[str, Share]
    share_of_all_parameters: Share
    export: str
    export_dtype: Dtype
    checkpoint: str
    checkpoint_fingerprint: str
    general: list[dict[str, object]]
    versions: dict[str, str]
    git_hash: str | None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        if not self.ranked_by:
            raise ValueError("it names no scores")

    @property
    def ranked_by(self) -> list[RankedBy]:
        """The files of scores, of which each weighs the same."""
        return cast("list[RankedBy]", read_as(list[RankedBy], self.general, "general"))


def check_sparsity(sparsity: float, pattern: str) -> None:
    """Raise ValueError unless a pattern is known, and can have such a sparsity.

    Args:
        sparsity: Share of weights that are pruned, in [0, 1].
        pattern: ``row``, ``layer``, ``global``, or ``n:m`` with numbers in place of the letters.
    """
    if not 0 <= sparsity <= 1:
        raise OptionError("sparsity", f"must be in [0, 1], got {sparsity}.")
    if pattern in PATTERNS:
        return
    n, m = n_of_m(pattern)
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise OptionError(
            "pattern", f"{pattern} keeps {n} of {m} weights, so --.sparsity must be {1 - n / m:g}, got {sparsity:g}."
        )


def n_of_m(pattern: str) -> tuple[int, int]:
    """Return the two numbers of a pattern such as ``2:4``: at most n of m weights are kept."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (1, 0)
    if n > m or m == 0:
        raise OptionError(
            "pattern",
            f"must be one of {', '.join(PATTERNS)}, or n:m with n of m weights kept, such as 2:4; got {pattern!r}.",
        )
    return n, m


def num_pruned(sparsity: float, num_weights: int) -> int:
    """Return how many of a number of weights are pruned: the nearest whole number."""
    return round(sparsity * num_weights)


def prune_mask(S_OI: Tensor, sparsity: float, pattern: str = "row") -> Tensor:
    """Mark the weights of one layer that are pruned.

    Row-wise, weights compete within the incoming weights of one neuron, as Sun et al. 2023, arXiv:2306.11695, section
    3, and Hatefi et al. 2025, arXiv:2506.13727, compare them; with ``layer`` within the matrix, as magnitude pruning is
    usually done; with ``n:m`` within m weights side by side in a row, of which the n highest are kept (Mishra et al.
    2021, arXiv:2104.08378).

    Args:
        S_OI: Scores, shape ``[out_features, in_features]``, without NaN.
        sparsity: Share of weights to prune, in [0, 1]; a row, or the matrix, is pruned to the nearest whole number.
        pattern: ``row``, ``layer`` or ``n:m``.

    Returns:
        True where a weight is pruned, bool of shape ``[out_features, in_features]``.

    Raises:
        ValueError: If the pattern is none of a layer, or the rows of the layer are no multiple of m.
    """
    if pattern == "row":
        return lowest(S_OI, num_pruned(sparsity, S_OI.shape[1]))
    if pattern == "layer":
        return lowest(S_OI.reshape(1, -1), num_pruned(sparsity, S_OI.numel())).view_as(S_OI)
    n, m = n_of_m(pattern)
    if S_OI.shape[1] % m:
        raise OptionError("pattern", f"{pattern}: rows of {S_OI.shape[1]} weights are no multiple of {m}.")
    return lowest(S_OI.reshape(-1, m), m - n).view_as(S_OI)


class Threshold(NamedTuple):
    """All scores below ``value`` are pruned, and the first ``num_ties`` of those equal to it."""

    value: float
    num_ties: int


def global_threshold(scores: Iterable[tuple[str, Tensor]], sparsity: float) -> Threshold:
    """Find the score up to which weights are pruned over all layers, exactly, with one layer in memory at a time.

    The bits of floats that are not negative have the order of the floats. So a count of the upper 16 bits of all scores
    says which they are of the threshold, and a second one, of the lower 16 bits of the scores that share them, which
    score it is: two passes, two tables of 65,536 counts, and nothing is sorted.

    Args:
        scores: Name and scores of each layer, float32, not negative, of any shape. It is gone through twice.
        sparsity: Share of all weights to prune, in [0, 1].

    Raises:
        ValueError: If a score is negative or NaN.
    """
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for name, score in scores:
        if not (score >= 0).all():
            raise ValueError(f"Scores that are compared over all layers must not be negative, nor NaN: {name}.")
        upper += torch.bincount(_bits(score) >> 16, minlength=_BINS)
    left = num_pruned(sparsity, int(upper.sum()))
    if left == 0:
        return Threshold(0.0, 0)
    high, left = _find(upper, left)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for _, score in scores:
        bits = _bits(score)
        lower += torch.bincount(bits[bits >> 16 == high] & (_BINS - 1), minlength=_BINS)
    low, left = _find(lower, left)
    return Threshold(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item(), left)


def _bits(score: Tensor) -> Tensor:
    return (score.flatten() + 0.0).view(torch.int32)  # -0 becomes 0, since its bits are not the bits of a small number


def _find(counts: Tensor, number: int) -> tuple[int, int]:
    """Return the bin that holds the score of a rank, counted from 1, and the rank inside the bin."""
    reached = counts.cumsum(dim=0)
    found = int(torch.searchsorted(reached, number))
    return found, number - int(reached[found] - counts[found])


def global_masks(scores: Iterable[tuple[str, Tensor]], threshold: Threshold) -> Iterator[tuple[str, Tensor]]:
    """Mark the weights that are pruned over all layers, one layer at a time; of equal scores the earlier layer's.

    Args:
        scores: Name and scores of each layer, the same as for ``global_threshold``.
        threshold: What that found.

    Yields:
        Name, and True where a weight is pruned, bool of the shape of the scores.
    """
    value, left = torch.tensor(threshold.value), threshold.num_ties
    for name, score in scores:
        yield name, below_threshold(score.reshape(1, -1), value, torch.tensor(left)).view_as(score)
        left -= min(left, int((score == value).sum()))
