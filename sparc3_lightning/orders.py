"""Orders in which the components of a model are taken out, the least relevant first: neurons, heads or single weights.

Relevance is the magnitude of the score, whatever its sign: a component that works against the behaviour belongs to the
circuit as one that works for it does.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from sparc3_lightning.models.architectures import weight_of
from sparc3_lightning.models.components import Neuron, mask, select

Scores = Mapping[str, Tensor]


class Order(Protocol):
    """Components from the least to the most relevant."""

    def __len__(self) -> int:
        """Return the number of components."""

    def without(self, model: Any, number: int) -> AbstractContextManager[int]:
        """Take the first ``number`` components out of the model for a ``with`` block, and give how many are out."""


class ComponentOrder:
    """Neurons, or heads, from the least to the most relevant over all layers.

    Args:
        scores: Per module, shape ``[out_features]`` or ``[heads]``.
    """

    def __init__(self, scores: Scores) -> None:
        magnitudes = {name: score.abs() for name, score in scores.items()}
        self.components: list[Neuron] = select(magnitudes, sum(map(len, magnitudes.values())))

    def __len__(self) -> int:
        return len(self.components)

    @contextmanager
    def without(self, model: Any, number: int) -> Iterator[int]:
        """Mask the first components; see ``Order``."""
        with mask(model, self.components[:number]) if number else nullcontext():
            yield number


class WeightOrder:
    """Single weights from the least to the most relevant over all layers; those of equal relevance go together.

    Args:
        scores: Per module, shape ``[out_features, in_features]``.
    """

    def __init__(self, scores: Scores) -> None:
        self.magnitudes = {name: score.abs() for name, score in scores.items()}
        self.ordered = torch.cat([score.flatten() for score in self.magnitudes.values()]).sort().values

    def __len__(self) -> int:
        return len(self.ordered)

    @contextmanager
    def without(self, model: Any, number: int) -> Iterator[int]:
        """Set the first weights to zero, and back on leaving the block; see ``Order``."""
        if not number:
            yield 0
            return
        threshold, out, kept = self.ordered[number - 1], 0, {}
        try:
            for name, magnitude in self.magnitudes.items():
                weight = weight_of(model.get_submodule(name))
                kept[name] = weight.detach().clone()
                off = magnitude <= threshold
                out += int(off.sum())
                weight.data.masked_fill_(off.to(weight.device), 0)
            yield out
        finally:
            for name, weight in kept.items():
                weight_of(model.get_submodule(name)).data.copy_(weight)


def random_scores(like: Scores, seed: int) -> dict[str, Tensor]:
    """Return scores of the same shapes that rank at random."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(score.shape, generator=draw) for name, score in like.items()}
