"""The overlap of sets of neurons, compared with sets drawn at random, and classes of neurons by sign.

Sets are the rows of a matrix, shape ``[sets, neurons]``; a combination of sets is a tuple of their rows, in order.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef

from sparc3_lightning.files import LEFT_OUT
from sparc3_lightning.models.architectures import layer_of
from sparc3_lightning.models.components import Key

Combination = tuple[int, ...]
# Where sets are drawn from, and how many each takes there: (neurons, sizes).
Stratum = tuple[int, tuple[int, ...]]
Matrix = list[list[float]]


@dataclass(frozen=True)
class Chance:
    """How many neurons lists would share by chance, how many times as many they do, and how probable that is.

    ``enrichment`` is NaN if none can be shared. The p-value is the probability to share at least as many, which a float
    may be too small for, and so there is its logarithm too.
    """

    expected: float
    enrichment: float
    p_value: float
    log10_p_value: float


@dataclass(frozen=True)
class Overlap:
    """How many neurons all lists of a combination hold, and how many no other list does; by chance, if it is known."""

    lists: list[str]
    inclusive: int
    exclusive: int
    random: Chance | None = field(default=None, metadata=LEFT_OUT)
    random_within_layers: Chance | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Class:
    """Behaviours, and the number of neurons that serve just those."""

    lists: list[str]
    neurons: int


@dataclass(frozen=True)
class Classes:
    """Numbers of neurons by the signs of their differential relevance for several behaviours.

    ``general`` ones are positive for all: more relevant for general text than for any behaviour. ``neutral`` ones are
    negative for none, and 0 for one or more. The others serve one behaviour or several: they are negative for these.
    """

    neurons: int
    general: int
    neutral: int
    specific: list[Class]
    shared: list[Class]


def exclusive_sizes(member_SN: Tensor) -> dict[Combination, int]:
    """Count the neurons that are in all sets of a combination and in no other, for every combination.

    Args:
        member_SN: Whether a set holds a neuron, shape ``[sets, neurons]``.

    Returns:
        Sizes that sum to the number of neurons: of those in no set, then in one set, in two, and so on.

    Example:
        >>> exclusive_sizes(torch.tensor([[True, True, False, False], [False, True, False, False]]))
        {(): 2, (0,): 1, (1,): 0, (0, 1): 1}
    """
    num_sets = len(member_SN)
    bits = 2 ** torch.arange(num_sets).unsqueeze(1)
    counts = (member_SN * bits).sum(dim=0).bincount(minlength=2**num_sets).tolist()
    combinations = itertools.chain(*(itertools.combinations(range(num_sets), k) for k in range(num_sets + 1)))
    return {combination: counts[sum(2**row for row in combination)] for combination in combinations}


def inclusive_sizes(exclusive: Mapping[Combination, int]) -> dict[Combination, int]:
    """Count the neurons that are in all sets of a combination, whatever other sets hold them too.

    Args:
        exclusive: As from :func:`exclusive_sizes`.
    """
    return {
        combination: sum(size for other, size in exclusive.items() if set(combination) <= set(other))
        for combination in exclusive
    }


@lru_cache(maxsize=4096)
def log_overlap(num_neurons: int, sizes: tuple[int, ...]) -> Tensor:
    """Return how probable each number of shared neurons is if every set is drawn at random, all neurons alike.

    The sets are drawn one after the other. Of the j neurons that those before share, a set of n holds x with the
    hypergeometric probability C(n, x) C(N - n, j - x) / C(N, j), and the sum over j is exact for any number of sets.

    Source: Wang, Zhao and Zhang 2015, Scientific Reports 5:16923, there by another recursion.

    Args:
        num_neurons: N, the neurons that each set is drawn from.
        sizes: Size of each set.

    Returns:
        Logarithm of the probability of 0, 1, ... shared neurons, shape ``[least size + 1]``, float64.

    Raises:
        ValueError: If a set is larger than what it is drawn from.
    """
    least, *others = sorted(sizes)
    if least < 0 or max(sizes) > num_neurons:
        raise ValueError(f"Sets of {sizes} neurons cannot be drawn from {num_neurons:,}.")
    shared = torch.arange(least + 1, dtype=torch.float64)
    log_p = torch.where(shared == least, 0.0, -torch.inf).double()
    for size in others:
        found = torch.full_like(log_p, -torch.inf)
        # One j at a time: all together would need the square of a size in memory.
        for j in log_p.isfinite().nonzero().flatten().tolist():
            ways = _log_choose(size, shared) + _log_choose(num_neurons - size, j - shared)
            total = _log_choose(num_neurons, torch.tensor(float(j), dtype=torch.float64))
            found = torch.logaddexp(found, log_p[j] + ways - total)
        log_p = found
    return log_p


def overlap(shared: int, strata: Sequence[Stratum]) -> Chance:
    """Compare the number of shared neurons with its distribution for sets drawn at random.

    Args:
        shared: Neurons that all sets hold.
        strata: One stratum, of all neurons, for sets drawn from all alike. With a stratum per layer each set keeps its
            number of neurons in every layer, and is drawn at random within it: a harder comparison, since sets that
            lie in the same layers share more by chance.

    Example:
        >>> found = overlap(11, [(458_752, (100, 100))])
        >>> round(found.expected, 4), round(found.enrichment)
        (0.0218, 505)
    """
    expected = math.fsum(math.prod(sizes) / num ** (len(sizes) - 1) for num, sizes in strata if num)
    log_p = torch.zeros(1, dtype=torch.float64)
    for num_neurons, sizes in strata if shared else ():
        if min(sizes) > 0:
            log_p = _log_of_sum(log_p, log_overlap(num_neurons, tuple(sorted(sizes))))
    at_least = torch.logsumexp(log_p[shared:], dim=0).item()
    log10_p = min(at_least, 0.0) / math.log(10)
    return Chance(expected, shared / expected if expected else math.nan, 10**log10_p, log10_p)


def without_linear(values_N: Tensor, by_N: Tensor) -> Tensor:
    """Return the residuals of values after a least-squares line in ``by``.

    The correlation of two such rests is their partial correlation given ``by``.

    Args:
        values_N: Shape ``[neurons]``.
        by_N: Shape ``[neurons]``.

    Returns:
        Shape ``[neurons]``, float64, with a mean of 0.
    """
    values_N, by_N = (vector.double() - vector.double().mean() for vector in (values_N, by_N))
    square = by_N @ by_N
    return values_N - by_N * (values_N @ by_N / square) if square else values_N


def _log_choose(n: int, k: Tensor) -> Tensor:
    """Return the logarithm of the binomial coefficient, -inf where it is 0."""
    inside = (k >= 0) & (k <= n)
    k = k.clamp(0, n)
    found = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.where(inside, found, -torch.inf)


def _log_of_sum(one: Tensor, other: Tensor) -> Tensor:
    """Return the log-probabilities of the sum of two independent numbers."""
    total = one.new_full((len(one) + len(other) - 1,), -torch.inf)
    for k, log_p in enumerate(other):
        part = total[k : k + len(one)]
        part.copy_(torch.logaddexp(part, one + log_p))
    return total


def find_overlaps(
    names: Sequence[str], keys: Sequence[Key], member_SN: Tensor, sizes: Mapping[str, int], num_candidates: int
) -> list[Overlap]:
    """Return the overlap of each combination of lists, and from two lists on the overlap expected by chance.

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
        shared = inclusive[combination]
        row = Overlap([names[i] for i in combination], shared, exclusive[combination])
        if len(combination) > 1:
            row = replace(row, random=overlap(shared, [(num_candidates, tuple(inclusive[(i,)] for i in combination))]))
            if sizes:
                strata = [(size, tuple(held[name][i] for i in combination)) for name, size in sizes.items()]
                row = replace(row, random_within_layers=overlap(shared, strata))
        found.append(row)
    return found


def find_profiles(
    names: Sequence[str], keys: Sequence[Key], member_SN: Tensor, sizes: Mapping[str, int]
) -> dict[str, dict[str, list[int]]]:
    """Count the neurons of each list in each layer, and how many of them another list holds too.

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
        kind: {
            name: layers[row].bincount(minlength=num_layers).tolist()
            for name, row in zip(names, members_SN, strict=True)
        }
        for kind, members_SN in (("pruned", member_SN), ("shared", shared_SN))
    }


def find_correlations(differential_SN: Tensor, general_SN: Tensor) -> dict[str, Matrix]:
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
    return {name: [[correlation(x, y) for y in columns] for x in columns] for name, columns in vectors.items()}


def find_classes(names: Sequence[str], differential_SN: Tensor) -> Classes:
    """Class neurons by the signs of their differential relevance, R_general - R_behavior, for several behaviours.

    Args:
        names: Of the behaviours.
        differential_SN: Shape ``[behaviours, neurons]``; negative serves the behaviour.
    """
    serving = exclusive_sizes(differential_SN < 0)
    general = int((differential_SN > 0).all(dim=0).sum())
    neutral = serving.pop(()) - general
    found = [Class([names[i] for i in rows], number) for rows, number in serving.items()]
    return Classes(differential_SN.shape[1], general, neutral, found[: len(names)], found[len(names) :])


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value from 0, ties sharing their mean rank, float64.

    In torchmetrics' own ranks the sum over many ties overflows, and they are float32.
    """
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[group]


def correlation(x: Tensor, y: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> float:
    """Return Pearson's correlation, or with ``ranks`` as transform Spearman's; NaN if either does not vary."""
    if transform is not None:
        x, y = transform(x), transform(y)
    if not all((values != values[:1]).any() for values in (x, y)):  # their variance may be off 0 by rounding
        return math.nan
    return pearson_corrcoef(x.double(), y.double()).item()
