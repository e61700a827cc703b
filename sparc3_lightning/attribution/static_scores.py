"""Scores that need no samples: the magnitude of the weights, and random ones, by the accumulator's protocol."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from sparc3_lightning.attribution.spec import Score
from sparc3_lightning.models.architectures import Linear, shape_of, whole_weights
from sparc3_lightning.models.components import Scored


def random_scores(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw scores from the uniform distribution on [0, 1), the same for a module's name whatever others there are.

    Args:
        name: Of the module.
        shape: Of the scores.
        seed: Of all modules.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")))


class StaticScores:
    """Scores linear layers by their weights alone, with the interface of ``ScoreAccumulator``.

    The magnitude of a weight is |W_oi|; the magnitude of a neuron is the sum over its incoming weights (Han et al.
    2015, arXiv:1506.02626, prune weights by it); random scores are uniform, a floor for every other method.

    Args:
        modules: The target layers by their fully qualified name.
        score: ``magnitude`` or ``random``.
        granularity: One score for each ``neuron``, or for each ``weight``.
        seed: Of the random scores.
        parts: Which rows of a module are those of its neurons; by default all.
    """

    num_samples = 0
    num_nonfinite = 0
    sums_weights = False

    def __init__(
        self,
        modules: Mapping[str, Linear],
        score: Score,
        granularity: Scored = "neuron",
        seed: int = 0,
        parts: Mapping[str, slice] | None = None,
    ) -> None:
        self.modules = dict(modules)
        self.score = score
        self.granularity = granularity
        self.seed = seed
        self.parts = parts or {}
        self.sums: dict[str, Tensor] = {}

    def recording(self, *_: object) -> nullcontext[None]:
        """Record nothing."""
        return nullcontext()

    def check(self) -> None:
        """No-op: nothing is summed up over samples."""

    def reduce_(self) -> None:
        """No-op: every rank has the same scores."""

    def compute(self) -> dict[str, Tensor]:
        """Return all scores, see ``each``."""
        return dict(self.each())

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each module and its scores, float32 on the CPU; all ranks must ask together.

        Yields:
            Name, and scores of shape ``[neurons]`` or, of weights, ``[out_features, in_features]``.
        """
        of_neurons = self.granularity == "neuron"
        if self.score == "random":
            for name, module in self.modules.items():
                rows, columns = shape_of(module)
                shape = (len(range(rows)[self._part(name)]),) if of_neurons else (rows, columns)
                yield name, random_scores(name, shape, self.seed)
        else:
            for name, weight in whole_weights(self.modules):
                magnitude = weight.float().abs()
                yield name, (magnitude[self._part(name)].sum(dim=1) if of_neurons else magnitude).cpu()

    def _part(self, name: str) -> slice:
        """Return which rows of a module are scored."""
        return self.parts.get(name, slice(None))
