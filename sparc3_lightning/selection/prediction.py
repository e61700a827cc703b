"""What an edit will cost before it is measured: the rise of perplexity that the costs of its components predict."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import with_floor


class Prediction:
    """The rise of perplexity that the Fisher information of components predicts.

    Half the Fisher information of a component's gain is the KL divergence, in nats a token, of the model with the
    component off from the model as it is; with a damping it is as much times the damping squared. This is so to second
    order, on text as the model itself would write it. The sum over a list takes it that no component makes another one
    cheaper or dearer. Then perplexity rises by exp(KL) - 1. The costs have a floor, since those of a list that is
    chosen for its low costs are higher on other text.

    Args:
        costs: Fisher information per module, shape ``[components]``, in nats squared a token.
        floor: Of the costs, in units of their mean, see ``floor_of``.
    """

    def __init__(self, costs: Mapping[str, Tensor], floor: float) -> None:
        self.costs = with_floor(costs, floor)

    def rise(self, components: Sequence[Component]) -> float:
        """Return the rise of perplexity, a share, with components off or damped."""
        return self._nats(components).sum().expm1().item()

    def number_within(self, ranked: Sequence[Component], budget: float) -> int:
        """Return how many components of the head of a ranking stay within a rise of perplexity, at least 1."""
        return max(1, int((self._nats(ranked).cumsum(0) <= math.log1p(budget)).sum()))

    def _nats(self, components: Sequence[Component]) -> Tensor:
        """Return the KL divergence that each component adds, in nats a token, float64."""
        nats = [c.damping**2 / 2 * self.costs[c.module][c.index].item() for c in components]
        return torch.tensor(nats, dtype=torch.float64)
