"""Which neurons to switch off for comparison: those that a sceptic would say could have been switched off as well."""

import math
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.components import KINDS, Component, Granularity
from sparc3_lightning.selection.criteria import lowest_of_modules, per_module
from sparc3_lightning.selection.neuron_list import NeuronList

Draw = Callable[[int], list[Component]]  # from a seed to the components to switch off


@dataclass(frozen=True)
class Controls:
    """Models to compare with: as many neurons are off, but random ones, the least relevant ones or the largest ones.

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


def random_like(pruned: Sequence[Component], shapes: Mapping[str, Sequence[int]], seed: int) -> list[Component]:
    """Draw as many random components as were pruned, spread over the layers as those are.

    Args:
        pruned: The pruned components; none of them is drawn.
        shapes: Of the scores of each module, see ``Kind``.
        seed: Of the draw.
    """
    sample = _sampler(pruned[0].granularity, seed)
    drawn = []
    for module, of_module in _by_module(pruned).items():
        shape, kind, number = shapes[module], of_module[0].granularity, len(of_module)
        taken = sorted({component.place(shape) for component in of_module})
        # The k-th taken place has taken[k] - k free ones before it, which says how many to skip.
        before = [place - k for k, place in enumerate(taken)]
        dampings = iter(component.damping for component in of_module)
        drawn += [
            Component.at(rank + bisect_right(before, rank), module, shape, kind, damping=next(dampings))
            for rank in sample(math.prod(shape) - len(taken), number)
        ]
    return drawn


def draw_like(pruned: Sequence[Component], pool: Iterable[Component], seed: int) -> list[Component]:
    """Draw from a pool, at random and without repetition, as many components of each module as were pruned there.

    Each is switched off as far as one of those. Where the pool has fewer of a module, all of them are taken.
    """
    by_module: dict[str, list[Component]] = {module: [] for module in per_module(pruned)}
    for component in pool:
        if component.module in by_module:
            by_module[component.module].append(component)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for module, of_module in _by_module(pruned).items():
        candidates, dampings = by_module[module], iter(component.damping for component in of_module)
        order = torch.randperm(len(candidates), generator=generator)[: len(of_module)].tolist()
        drawn += [replace(candidates[i], damping=next(dampings)) for i in order]
    return drawn


def _random(pruned: NeuronList, model: nn.Module) -> Draw:
    kinds = {c.module: KINDS[c.granularity] for c in pruned.neurons}
    shapes = {name: kind.shape(model, name) for name, kind in kinds.items()}
    return partial(random_like, pruned.neurons, shapes)


def _least_relevant(pruned: NeuronList, model: nn.Module) -> Draw:
    return partial(draw_like, pruned.neurons, pruned.least_relevant)


def _largest_weights(pruned: NeuronList, model: nn.Module) -> Draw:
    kinds = {c.module: KINDS[c.granularity] for c in pruned.neurons}
    heaviest = lowest_of_modules(pruned.neurons, ((name, -kind.norms(model, name)) for name, kind in kinds.items()))
    return partial(draw_like, pruned.neurons, heaviest)


@dataclass(frozen=True)
class ControlKind:
    """One kind of control.

    Args:
        name: What its components are called where a person reads it, by granularity of the pruned ones.
        start: Prepares, from the pruned components and the model, what all draws share, and returns what draws; all
            ranks ask together if the model is sharded.
        is_known: Whether a list of pruned components says enough to draw.
    """

    name: Callable[[str], str]
    start: Callable[[NeuronList, nn.Module], Draw]
    is_known: Callable[[NeuronList], bool] = lambda pruned: True


CONTROLS = {
    "random": ControlKind(lambda granularity: f"random {granularity}s", _random),
    # A neurons.json that was not written by 'sparc3 prune' may not say which neurons are the least relevant.
    "least_relevant": ControlKind(
        lambda granularity: f"least relevant {granularity}s",
        _least_relevant,
        lambda pruned: bool(pruned.least_relevant),
    ),
    "largest_weights": ControlKind(
        lambda granularity: (
            "largest weights" if granularity == "weight" else f"{granularity}s with the largest weights"
        ),
        _largest_weights,
    ),
}


def _by_module(components: Iterable[Component]) -> dict[str, list[Component]]:
    by_module: dict[str, list[Component]] = defaultdict(list)
    for component in components:
        by_module[component.module].append(component)
    return by_module


def _sampler(granularity: Granularity, seed: int) -> Callable[[int, int], list[int]]:
    """Return a function that draws some of the numbers below a limit, at random without repetition; all if too few."""
    if granularity == "weight":  # a permutation would be as large as the layer
        draw = random.Random(seed)
        return lambda below, number: draw.sample(range(below), min(number, below))
    generator = torch.Generator().manual_seed(seed)
    return lambda below, number: torch.randperm(below, generator=generator)[:number].tolist()
