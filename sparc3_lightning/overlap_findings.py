"""What a comparison of behaviours finds, as plain values: the content of compare.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparc3_lightning.intervals import correlation, ranks
from sparc3_lightning.models.architectures import layer_of
from sparc3_lightning.models.components import Key
from sparc3_lightning.overlap import Stratum, exclusive_sizes, inclusive_sizes, overlap, sign_classes, without_linear

# Ways to draw sets at random: from all neurons alike, or with the number of each in every layer kept.
RANDOM, WITHIN_LAYERS = "random", "random_within_layers"


def find_overlaps(
    names: Sequence[str], keys: Sequence[Key], member_SN: Tensor, sizes: Mapping[str, int], num_candidates: int
) -> list[dict[str, Any]]:
    """Return what each combination of lists holds, and from two lists on what it would hold by chance.

    Args:
        names: Of the lists.
        keys: Of the neurons that are in a list.
        member_SN: Whether a list holds a neuron, shape ``[lists, neurons]``.
        sizes: Neurons of each module; empty if they are not known, and then nothing is drawn within layers.
        num_candidates: Neurons that the lists were chosen from.
    """
    exclusive = exclusive_sizes(member_SN)
    inclusive = inclusive_sizes(exclusive)
    modules = [module for module, *_ in keys]
    held = {name: member_SN[:, [module == name for module in modules]].sum(dim=1).tolist() for name in sizes}
    found = []
    for combination in filter(None, exclusive):
        row: dict[str, Any] = {"lists": [names[i] for i in combination]}
        row |= {"inclusive": inclusive[combination], "exclusive": exclusive[combination]}
        if len(combination) > 1:
            strata: dict[str, list[Stratum]] = {
                RANDOM: [(num_candidates, tuple(inclusive[(i,)] for i in combination))],
                WITHIN_LAYERS: [(size, tuple(held[name][i] for i in combination)) for name, size in sizes.items()],
            }
            for kind in filter(strata.get, strata):
                chance = overlap(inclusive[combination], strata[kind])
                row[kind] = {"expected": chance.expected, "enrichment": chance.enrichment}
                row[kind] |= {"p_value": 10**chance.log10_p, "log10_p_value": chance.log10_p}
        found.append(row)
    return found


def find_profiles(
    names: Sequence[str], keys: Sequence[Key], member_SN: Tensor, sizes: Mapping[str, int]
) -> dict[str, dict[str, list[int]]]:
    """Count the neurons of each list in each layer, and those of them that another list holds too.

    Args:
        names: Of the lists.
        keys: Of the neurons that are in a list.
        member_SN: Whether a list holds a neuron, shape ``[lists, neurons]``.
        sizes: Neurons of each module, which tell the last layer; empty if they are not known.
    """
    layers = torch.tensor([layer_of(module) for module, *_ in keys])
    num_layers = 1 + max(int(layers.max()), *map(layer_of, sizes), 0)
    shared_SN = member_SN & (member_SN.sum(dim=0) > 1)
    return {
        kind: {name: layers[row].bincount(minlength=num_layers).tolist() for name, row in zip(names, of, strict=True)}
        for kind, of in (("pruned", member_SN), ("shared", shared_SN))
    }


def find_correlations(differential_SN: Tensor, general_SN: Tensor) -> dict[str, list[list[float]]]:
    """Correlate the differential relevance of each pair of behaviours over all neurons.

    ``partial`` is Pearson's given the general scores. These are in the differential relevance of both, and correlate it
    even where the behaviours have nothing in common.

    Args:
        differential_SN: Shape ``[behaviours, neurons]``.
        general_SN: What each was subtracted from, of the same shape.

    Returns:
        The matrices ``pearson``, ``spearman`` and ``partial``; NaN where one does not vary.
    """
    rests = [without_linear(values_N, general_SN.mean(dim=0)) for values_N in differential_SN]
    vectors = {"pearson": list(differential_SN), "spearman": list(map(ranks, differential_SN)), "partial": rests}
    return {name: [[correlation(x, y) for y in of] for x in of] for name, of in vectors.items()}


def find_classes(names: Sequence[str], differential_SN: Tensor) -> dict[str, Any]:
    """Count the neurons of each class by sign, with names in place of rows.

    Args:
        names: Of the behaviours.
        differential_SN: Shape ``[behaviours, neurons]``.
    """
    found = sign_classes(differential_SN)
    serving = [{"lists": [names[i] for i in rows], "neurons": number} for rows, number in found.serving.items()]
    return {
        "neurons": differential_SN.shape[1],
        "general": found.general,
        "neutral": found.neutral,
        "specific": serving[: len(names)],
        "shared": serving[len(names) :],
    }
