"""Which neurons to switch off for comparison: those that a sceptic would say could have been switched off as well."""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.components import Neuron
from sparc3_lightning.selection.criteria import per_module, places_of


@dataclass(frozen=True)
class Controls:
    """Models to compare with: with as many random neurons off, the least relevant ones, those of the largest weights.

    Args:
        num_draws: How many draws of each control to measure, each spread over the layers as the pruned neurons are; 0
            for none.
        num_continuations: Continuations drawn per prompt by each control, at most as many as by the other models; None
            for as many.
    """

    num_draws: int = 5
    num_continuations: int | None = None

    def check(self) -> None:
        """Raise ValueError if a number is out of range."""
        if self.num_draws < 0:
            raise OptionError("controls.num_draws", f"must be at least 0, got {self.num_draws}.")
        if self.num_continuations is not None and self.num_continuations < 1:
            raise OptionError("controls.num_continuations", f"must be at least 1, got {self.num_continuations}.")


def random_like(pruned: Sequence[Neuron], num_neurons: Mapping[str, int], seed: int) -> list[Neuron]:
    """Draw as many random neurons as were pruned, spread over the layers as those are.

    Args:
        pruned: The pruned neurons; none of them is drawn.
        num_neurons: Number of neurons of each module.
        seed: Of the draw.
    """
    taken = {neuron.key for neuron in pruned}
    pool = [
        Neuron(module, index, 0.0)
        for module in per_module(pruned)
        for index in range(num_neurons[module])
        if (module, index) not in taken
    ]
    return draw_like(pruned, pool, seed)


def draw_like(pruned: Sequence[Neuron], pool: Iterable[Neuron], seed: int) -> list[Neuron]:
    """Draw from a pool, at random and without repetition, as many neurons of each module as were pruned there.

    Each is switched off as far as one of those. Where the pool has fewer of a module, all of them are taken.
    """
    by_module: dict[str, list[Neuron]] = {module: [] for module in per_module(pruned)}
    for neuron in pool:
        if neuron.module in by_module:
            by_module[neuron.module].append(neuron)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for module, number in per_module(pruned).items():
        candidates = by_module[module]
        order = torch.randperm(len(candidates), generator=generator)[:number].tolist()
        strengths = _strengths(pruned, module)
        drawn += [replace(candidates[i], strength=next(strengths)) for i in order]
    return drawn


def random_weights(pruned: Sequence[Neuron], shapes: Mapping[str, Sequence[int]], seed: int) -> list[Neuron]:
    """Draw as many random weights as were pruned, spread over the layers as those are, see ``random_like``.

    Args:
        pruned: The pruned weights; none of them is drawn.
        shapes: Of the weight of each module, ``[out_features, in_features]``.
        seed: Of the draw.
    """
    draw = random.Random(seed)
    drawn = []
    for module, number in per_module(pruned).items():
        rows, columns = shapes[module]
        taken = sorted(places_of(pruned, module, columns))
        free = rows * columns - len(taken)
        # The k-th taken place has taken[k] - k free ones before it, which says how many to skip.
        before = [place - k for k, place in enumerate(taken)]
        strengths = _strengths(pruned, module)
        for rank in draw.sample(range(free), min(number, free)):
            row, column = divmod(rank + bisect_right(before, rank), columns)
            drawn.append(Neuron(module, row, 0.0, next(strengths), input=column))
    return drawn


def _strengths(pruned: Iterable[Neuron], module: str) -> Iterator[float]:
    return (neuron.strength for neuron in pruned if neuron.module == module)


CONTROLS = ("random", "least_relevant", "largest_weights")
