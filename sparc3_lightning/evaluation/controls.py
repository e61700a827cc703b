"""Which neurons to switch off for comparison: those that a sceptic would say could have been switched off as well."""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import per_module, places_of


def random_like(pruned: Sequence[Component], num_neurons: Mapping[str, int], seed: int) -> list[Component]:
    """Draw as many random neurons as were pruned, spread over the layers as those are.

    Args:
        pruned: The pruned neurons; none of them is drawn.
        num_neurons: Number of neurons of each module.
        seed: Of the draw.
    """
    taken = {neuron.key for neuron in pruned}
    pool = [
        Component(module, index, 0.0)
        for module in per_module(pruned)
        for index in range(num_neurons[module])
        if (module, index) not in taken
    ]
    return draw_like(pruned, pool, seed)


def draw_like(pruned: Sequence[Component], pool: Iterable[Component], seed: int) -> list[Component]:
    """Draw from a pool, at random and without repetition, as many neurons of each module as were pruned there.

    Each is switched off as far as one of those. Where the pool has fewer of a module, all of them are taken.
    """
    by_module: dict[str, list[Component]] = {module: [] for module in per_module(pruned)}
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


def random_weights(pruned: Sequence[Component], shapes: Mapping[str, Sequence[int]], seed: int) -> list[Component]:
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
            drawn.append(Component(module, row, 0.0, next(strengths), input=column))
    return drawn


def _strengths(pruned: Iterable[Component], module: str) -> Iterator[float]:
    return (neuron.strength for neuron in pruned if neuron.module == module)


CONTROLS = ("random", "least_relevant", "largest_weights")
