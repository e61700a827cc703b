"""Which neurons to switch off for comparison: those that a sceptic would say could have been switched off as well."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.components import KINDS, Component, Granularity, by_layer, plural
from sparc3_lightning.selection.criteria import lowest_of_modules
from sparc3_lightning.selection.neuron_list import NeuronList

Draw = Callable[[int], list[Component]]  # from a seed to the components to switch off
Layer = tuple[Granularity, str]  # the components of one kind in one layer


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


def random_like(pruned: Sequence[Component], shapes: Mapping[Layer, Sequence[int]], seed: int) -> list[Component]:
    """Draw as many random components of each kind as were pruned, spread over the layers as those are.

    Args:
        pruned: The pruned components; none of them is drawn.
        shapes: Of the scores of each kind and module, see ``Kind``.
        seed: Of the draw.
    """
    generator, of_weights = torch.Generator().manual_seed(seed), random.Random(seed)

    def sample(kind: Granularity, below: int, number: int) -> list[int]:
        """Draw some of the numbers below a limit, without repetition; all if too few."""
        if kind == "weight":  # a permutation would be as large as the layer
            return of_weights.sample(range(below), min(number, below))
        return torch.randperm(below, generator=generator)[:number].tolist()

    drawn = []
    for (kind, module), of_module in by_layer(pruned).items():
        shape, number = shapes[kind, module], len(of_module)
        taken = sorted({component.place(shape) for component in of_module})
        # The k-th taken place has taken[k] - k free ones before it, which says how many to skip.
        before = [place - k for k, place in enumerate(taken)]
        dampings = iter(component.damping for component in of_module)
        drawn += [
            Component.at(rank + bisect_right(before, rank), module, shape, kind, damping=next(dampings))
            for rank in sample(kind, math.prod(shape) - len(taken), number)
        ]
    return drawn


def draw_like(pruned: Sequence[Component], pool: Iterable[Component], seed: int) -> list[Component]:
    """Draw from a pool, at random, without repetition, as many components of each kind and module as were pruned.

    Each is switched off as far as one of those. Where the pool has fewer of a module, all of them are taken.
    """
    in_pool = by_layer(pool)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for layer, of_module in by_layer(pruned).items():
        candidates, dampings = in_pool.get(layer, []), iter(component.damping for component in of_module)
        order = torch.randperm(len(candidates), generator=generator)[: len(of_module)].tolist()
        drawn += [replace(candidates[i], damping=next(dampings)) for i in order]
    return drawn


def _random(pruned: NeuronList, model: nn.Module) -> Draw:
    shapes = {(kind, name): KINDS[kind].shape(model, name) for kind, name in by_layer(pruned.neurons)}
    return partial(random_like, pruned.neurons, shapes)


def _least_relevant(pruned: NeuronList, model: nn.Module) -> Draw:
    return partial(draw_like, pruned.neurons, pruned.least_relevant)


def _largest_weights(pruned: NeuronList, model: nn.Module) -> Draw:
    heaviest: list[Component] = []
    for (kind, name), of_layer in by_layer(pruned.neurons).items():
        heaviest += lowest_of_modules(of_layer, [(name, -KINDS[kind].norms(model, name))])
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
    "random": ControlKind(lambda granularity: f"random {plural(granularity)}", _random),
    # A neurons.json that was not written by 'sparc3 prune' may not say which neurons are the least relevant.
    "least_relevant": ControlKind(
        lambda granularity: f"least relevant {plural(granularity)}",
        _least_relevant,
        lambda pruned: bool(pruned.least_relevant),
    ),
    "largest_weights": ControlKind(
        lambda granularity: (
            "largest weights" if granularity == "weight" else f"{plural(granularity)} with the largest weights"
        ),
        _largest_weights,
    ),
}
