"""Which neurons to switch off for comparison: those that a sceptic would say could have been switched off as well."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparc3_lightning.neurons import Neuron

POOL = 5  # candidates per neuron and layer, of which each draw takes one


def random_like(pruned: Sequence[Neuron], num_neurons: Mapping[str, int], seed: int) -> list[Neuron]:
    """Draw as many random neurons as were pruned, spread over the layers as those are.

    Args:
        pruned: The pruned neurons; none of them is drawn.
        num_neurons: Number of neurons of each module.
        seed: Of the draw.
    """
    taken = {(neuron.module, neuron.index) for neuron in pruned}
    pool = [
        Neuron(module, index, 0.0)
        for module in _per_module(pruned)
        for index in range(num_neurons[module])
        if (module, index) not in taken
    ]
    return draw_like(pruned, pool, seed)


def draw_like(pruned: Sequence[Neuron], pool: Iterable[Neuron], seed: int) -> list[Neuron]:
    """Draw from a pool, at random and without repetition, as many neurons of each module as were pruned there.

    Where the pool has fewer of a module, all of them are taken.
    """
    by_module: dict[str, list[Neuron]] = {module: [] for module in _per_module(pruned)}
    for neuron in pool:
        if neuron.module in by_module:
            by_module[neuron.module].append(neuron)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for module, number in _per_module(pruned).items():
        candidates = by_module[module]
        order = torch.randperm(len(candidates), generator=generator)[:number].tolist()
        drawn += [candidates[i] for i in order]
    return drawn


def lowest(pruned: Sequence[Neuron], scores: Mapping[str, Tensor]) -> list[Neuron]:
    """Return, per module, the neurons with the lowest scores, ``POOL`` times as many as were pruned there.

    Args:
        pruned: The pruned neurons.
        scores: Per module, shape ``[out_features]``; the magnitude of the relevance, or the negative norm of weights.
    """
    taken = {(neuron.module, neuron.index) for neuron in pruned}
    pool = []
    for module, number in _per_module(pruned).items():
        order = scores[module].argsort(stable=True).tolist()
        free = [index for index in order if (module, index) not in taken]
        pool += [Neuron(module, index, scores[module][index].item()) for index in free[: POOL * number]]
    return pool


def _per_module(pruned: Iterable[Neuron]) -> Counter[str]:
    return Counter(neuron.module for neuron in pruned)
