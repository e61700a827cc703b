"""The lowest of many scores, exactly as many as asked for: of equal ones the first."""

from operator import attrgetter

import torch
from torch import Tensor

from sparc3_lightning.models.components import Component, Scored, kind_of


def lowest(S_GK: Tensor, number: int) -> Tensor:
    """Mark the lowest scores of each group, exactly as many as asked for; of equal ones the first.

    Args:
        S_GK: Scores, shape ``[groups, weights]``, without NaN.
        number: How many of each group.

    Returns:
        True where a score is among the lowest, bool of shape ``[groups, weights]``.

    Example:
        >>> lowest(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    if number == 0:
        return torch.zeros_like(S_GK, dtype=torch.bool)
    threshold = S_GK.kthvalue(number, dim=1, keepdim=True).values
    return below_threshold(S_GK, threshold, number - S_GK.lt(threshold).sum(dim=1, keepdim=True))


def below_threshold(S_GK: Tensor, threshold: Tensor, num_ties: Tensor) -> Tensor:
    """Mark scores below the threshold of their group, and so many of the first ones that are equal to it."""
    ties = S_GK.eq(threshold)
    if (ties.sum(dim=1, keepdim=True) > num_ties).any():  # seldom, and the cumulated sum costs more than all the rest
        ties &= ties.cumsum(dim=1) <= num_ties
    return S_GK.lt(threshold) | ties


def lowest_first(scores: Tensor, number: int) -> Tensor:
    """Return the places of the lowest of all scores, from the lowest up; of equal ones the first is first.

    Args:
        scores: Without NaN, of any shape.
        number: How many places; all if there are fewer.

    Returns:
        Places in the flattened scores, int64 of shape ``[number]``, as a stable sort of all of them would give.

    Example:
        >>> lowest_first(torch.tensor([3.0, 1.0, 2.0, 1.0]), 3).tolist()
        [1, 3, 2]
    """
    flat = scores.flatten()
    found = lowest(flat.unsqueeze(0), min(number, len(flat)))[0].nonzero().squeeze(1)
    return found[flat[found].argsort(stable=True)]


class Lowest:
    """The components of the lowest scores over all layers, taken in layer by layer.

    They and their order are what a stable sort of all scores at once would give. Of equal scores the earlier layer's
    are lower, and within a layer the first; weights are counted row by row.

    Args:
        number: How many to keep.
        granularity: What was scored.

    Attributes:
        components: The lowest so far, from the lowest up.
    """

    def __init__(self, number: int, granularity: Scored = "neuron") -> None:
        self.number = number
        self.granularity = granularity
        self.components: list[Component] = []

    def add(self, name: str, scores: Tensor) -> None:
        """Take in the scores of the next layer, of the shape that ``Kind`` says."""
        places = lowest_first(scores, self.number)
        values, kind = scores.flatten()[places].tolist(), kind_of(self.granularity, name)
        found = [
            Component.at(place, name, scores.shape, kind, value)
            for place, value in zip(places.tolist(), values, strict=True)
        ]
        self.components = sorted([*self.components, *found], key=attrgetter("score"))[: self.number]
