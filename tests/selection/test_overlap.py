"""Intersections, their probability by chance and the classes by sign, against counting and exact fractions."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from sparc3_lightning.selection.overlap import (
    correlation,
    exclusive_sizes,
    find_classes,
    inclusive_sizes,
    log_overlap,
    overlap,
    without_linear,
)


def exact(num: int, sizes: tuple[int, ...]) -> list[Fraction]:
    """Return the distribution of the overlap by fractions: each further set holds x of the j shared so far."""
    shared = {sizes[0]: Fraction(1)}
    for size in sizes[1:]:
        further: Counter = Counter()
        for j, p in shared.items():
            for x in range(min(j, size) + 1):
                further[x] += p * Fraction(math.comb(j, x) * math.comb(num - j, size - x), math.comb(num, size))
        shared = further
    return [shared.get(x, Fraction(0)) for x in range(min(sizes) + 1)]


def by_listing(num: int, sizes: tuple[int, ...]) -> list[Fraction]:
    """Return the same by going through every choice of every set."""
    choices = [list(map(set, itertools.combinations(range(num), size))) for size in sizes]
    counts = Counter(len(set.intersection(*drawn)) for drawn in itertools.product(*choices))
    return [Fraction(counts[x], math.prod(map(len, choices))) for x in range(min(sizes) + 1)]


def log10(value: Fraction) -> float:
    """Return the logarithm of a fraction that may be too small for a float."""
    return math.log10(value.numerator) - math.log10(value.denominator)


def random_sets(num_sets: int, num: int, seed: int) -> list[set[int]]:
    draw = random.Random(seed)
    return [set(draw.sample(range(num), draw.randint(0, num))) for _ in range(num_sets)]


def as_matrix(sets: list[set[int]], num: int) -> torch.Tensor:
    return torch.tensor([[i in members for i in range(num)] for members in sets])


@pytest.mark.parametrize("num_sets", [1, 2, 3, 5])
def test_sizes_of_all_combinations_equal_those_of_python_sets(num_sets):
    for seed in range(5):
        sets = random_sets(num_sets, 40, seed)
        exclusive = exclusive_sizes(as_matrix(sets, 40))
        inclusive = inclusive_sizes(exclusive)
        assert len(exclusive) == 2**num_sets
        assert sum(exclusive.values()) == 40
        for combination, size in exclusive.items():
            inside = [sets[row] for row in combination]
            outside = [members for row, members in enumerate(sets) if row not in combination]
            shared = set.intersection(set(range(40)), *inside)
            assert inclusive[combination] == len(shared)
            assert size == len(shared.difference(*outside))
        assert [len(combination) for combination in exclusive] == sorted(map(len, exclusive))


def test_the_published_overlap_of_100_and_100_of_458752_neurons_is_enriched_505_times():
    found = overlap(11, [(458_752, (100, 100))])
    assert found.expected == pytest.approx(0.0218, abs=5e-5)
    assert found.enrichment == pytest.approx(505, abs=0.5)
    tail = sum(exact(458_752, (100, 100))[11:])
    assert found.log10_p_value == pytest.approx(log10(tail), abs=1e-8)
    assert found.log10_p_value < -26


@pytest.mark.parametrize(("num", "sizes"), [(5, (2, 3)), (4, (4, 2)), (5, (3, 3, 2)), (4, (2, 2, 2, 3)), (3, (0, 2))])
def test_the_distribution_by_chance_is_that_of_all_choices_listed(num, sizes):
    listed = by_listing(num, sizes)
    assert exact(num, sizes) == listed
    assert log_overlap(num, sizes).exp().tolist() == pytest.approx(list(map(float, listed)), abs=1e-12)


@pytest.mark.parametrize(
    ("num", "sizes"),
    [(1000, (40, 25)), (500, (30, 60, 90)), (60, (50, 55)), (458_752, (20, 20, 20)), (200, (20, 30, 40, 50, 60))],
)
def test_every_tail_equals_exact_fractions_however_small(num, sizes):
    probabilities = exact(num, sizes)
    assert log_overlap(num, sizes).exp().sum().item() == pytest.approx(1, abs=1e-7)
    mean = sum(x * p for x, p in enumerate(probabilities))
    assert overlap(0, [(num, sizes)]).expected == pytest.approx(float(mean), rel=1e-12)
    for shared in range(min(sizes) + 1):
        tail = sum(probabilities[shared:])
        if tail:
            assert overlap(shared, [(num, sizes)]).log10_p_value == pytest.approx(log10(tail), abs=1e-7)


def test_the_order_of_the_sets_does_not_matter():
    for sizes in itertools.permutations((7, 12, 30)):
        assert log_overlap(90, sizes).tolist() == pytest.approx(log_overlap(90, (30, 12, 7)).tolist(), rel=1e-9)


def test_a_probability_that_no_float_holds_keeps_its_logarithm():
    found = overlap(100, [(458_752, (100, 100))])
    assert 10**found.log10_p_value == 0
    assert found.log10_p_value == pytest.approx(-log10(Fraction(math.comb(458_752, 100))), abs=1e-8)


def test_to_share_none_or_more_is_certain_and_what_cannot_be_shared_has_no_enrichment():
    assert overlap(0, [(100, (10, 20))]).log10_p_value == 0
    apart = overlap(0, [(50, (10, 0)), (50, (0, 20))])
    assert (apart.expected, apart.log10_p_value) == (0, 0)
    assert math.isnan(apart.enrichment)


def test_sets_within_layers_overlap_by_the_sum_of_what_they_do_in_each_layer():
    strata = [(6, (2, 3)), (5, (0, 4)), (4, (3, 2)), (5, (2, 1))]
    parts = [exact(num, sizes) for num, sizes in strata]
    probabilities: Counter = Counter()
    for each in itertools.product(*(range(len(part)) for part in parts)):
        probabilities[sum(each)] += math.prod(part[x] for part, x in zip(parts, each, strict=True))
    mean = sum(x * p for x, p in probabilities.items())
    for shared in range(6):
        found = overlap(shared, strata)
        tail = sum(p for x, p in probabilities.items() if x >= shared)
        assert found.log10_p_value == pytest.approx(log10(tail), abs=1e-10)
        assert found.expected == pytest.approx(float(mean), rel=1e-12)


def test_sets_that_lie_in_one_layer_are_less_surprising_within_layers():
    everywhere, within = overlap(5, [(1000, (20, 20))]), overlap(5, [(100, (20, 20)), (900, (0, 0))])
    assert within.expected == 4
    assert within.log10_p_value > -1 > everywhere.log10_p_value


def test_random_sets_share_as_often_as_their_probability_says():
    draw, counts = random.Random(0), Counter()
    for _ in range(4000):
        sets = [set(draw.sample(range(30), size)) for size in (12, 15, 20)]
        counts[len(set.intersection(*sets))] += 1
    log_p = log_overlap(30, (12, 15, 20))
    for shared in range(3, 8):
        expected = log_p[shared].exp().item()
        assert counts[shared] / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))


def test_sets_larger_than_what_they_are_drawn_from_are_refused():
    with pytest.raises(ValueError, match=r"Sets of \(3, 6\) neurons cannot be drawn from 5"):
        overlap(3, [(5, (3, 6))])


def test_large_sets_neither_overflow_nor_take_long():
    found = overlap(2500, [(458_752, (5000, 4000, 3000))])
    assert math.isfinite(found.log10_p_value)
    assert found.log10_p_value < -1000


def test_classes_by_sign_equal_a_loop_over_neurons():
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (3, 200), generator=draw).float()
    found = find_classes("012", values)
    numbers = {tuple(map(int, row.lists)): row.neurons for row in found.specific + found.shared}
    general = neutral = 0
    serving: Counter = Counter()
    for column in values.T.tolist():
        negative = tuple(row for row, value in enumerate(column) if value < 0)
        if negative:
            serving[negative] += 1
        elif all(value > 0 for value in column):
            general += 1
        else:
            neutral += 1
    assert (found.general, found.neutral) == (general, neutral)
    assert numbers == {combination: serving[combination] for combination in numbers}
    assert general + neutral + sum(numbers.values()) == 200
    assert min(general, neutral, *numbers.values()) > 0


def test_the_correlation_of_rests_is_the_partial_correlation():
    draw = torch.Generator().manual_seed(1)
    by = torch.rand(500, generator=draw).double()
    one, other = (3 * by + 0.5 * torch.randn(500, generator=draw).double() for _ in range(2))
    xy, xz, yz = correlation(one, other), correlation(one, by), correlation(other, by)
    formula = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert correlation(without_linear(one, by), without_linear(other, by)) == pytest.approx(formula, abs=1e-12)
    assert xy > 0.5 > abs(formula)
    assert torch.equal(without_linear(one, torch.ones(500)), one - one.mean())
