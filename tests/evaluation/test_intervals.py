"""Intervals and tests against slow and obvious second implementations, simulations, and answers known in advance."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from simulated import seeded, toxicities
from torch import Tensor

from sparc3_lightning.evaluation.intervals import (
    Interval,
    bootstrap,
    paired_difference,
    permutation_test,
    sign_test,
    variance_factor,
)
from sparc3_lightning.selection.overlap import correlation, ranks

NAN = math.nan


def slow_correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def slow_ranks(values: list[float]) -> list[float]:
    """Mean of the places that a value takes in the sorted list."""
    places = sorted(values)
    return [sum(i for i, v in enumerate(places) if v == value) / places.count(value) for value in values]


def test_figures_of_a_difference_are_those_of_the_values_given():
    before = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.125])
    after = torch.tensor([0.25, 0.5, 0.25, 0.5, 0.0])
    found = paired_difference(before, after)
    assert found.before == pytest.approx(2.125 / 5)
    assert found.after == pytest.approx(1.5 / 5)
    assert found.difference.value == pytest.approx(-0.625 / 5)
    assert found.percent.value == pytest.approx(100 * -0.625 / 2.125)
    assert (found.num_better, found.num_worse, found.num_equal) == (3, 1, 1)
    assert found.sign_test_p == sign_test(3, 1) == 0.625
    assert found.difference.low <= found.difference.value <= found.difference.high
    assert found.percent.low <= found.percent.value <= found.percent.high


def test_the_pairing_of_prompts_is_used():
    before = torch.rand(50, generator=seeded(3), dtype=torch.float64)
    paired = paired_difference(before, before - 0.0625)
    assert paired.evidence
    assert paired.difference.low == pytest.approx(-0.0625)
    assert paired.difference.high == pytest.approx(-0.0625)
    assert paired.permutation_test_p < 0.001
    other = paired_difference(before, (before - 0.0625)[torch.randperm(50, generator=seeded(4))])
    assert other.difference.value == pytest.approx(paired.difference.value)
    assert not other.evidence
    assert other.difference.high - other.difference.low > 0.1
    assert other.permutation_test_p > 0.05


def test_values_that_are_all_alike_before_and_after_are_no_evidence():
    for number in (1, 2, 7, 60, 501):
        values = torch.rand(number, generator=seeded(number))
        found = paired_difference(values, values)
        assert not found.evidence
        assert (found.difference.low, found.difference.high) == (0.0, 0.0)
        assert (found.num_better, found.num_worse, found.num_equal) == (0, 0, number)
        assert found.sign_test_p == found.permutation_test_p == 1.0


def test_what_a_scorer_rounds_differently_from_batch_to_batch_is_no_change():
    # The shipped scorer gives the same text values up to 1.2e-7 apart, depending on what else is in the batch.
    before = torch.rand(60, generator=seeded(27))
    found = paired_difference(before, before + 1e-7 * (torch.arange(60) % 5 == 0))
    assert found.num_equal == 60
    assert found.sign_test_p == found.permutation_test_p == 1.0
    assert not found.evidence
    small = paired_difference(before, before - 1e-5)
    assert small.num_better == 60
    assert small.evidence


def test_evidence_needs_as_many_prompts_that_changed_as_a_sign_test_does():
    assert sign_test(6, 0) < 0.05 < sign_test(5, 0)
    for changed in (5, 6):
        before = torch.full((10,), 0.5)
        after = before - 0.25 * (torch.arange(10) < changed)
        found = paired_difference(before, after)
        assert found.difference.high < 0
        assert found.evidence is (changed == 6)


def test_a_change_and_its_opposite_are_mirrored():
    before, after, _ = toxicities(45, seeded(5))
    there, back = paired_difference(before, after), paired_difference(after, before)
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high, abs=1e-3)
    assert there.difference.high == pytest.approx(-back.difference.low, abs=1e-3)
    assert there.permutation_test_p == back.permutation_test_p
    assert there.evidence
    assert back.evidence
    assert there.num_better == back.num_worse


def test_the_same_seed_gives_the_same_and_another_seed_nearly_the_same():
    before, after, _ = toxicities(40, seeded(6))
    torch.manual_seed(1)
    first = paired_difference(before, after)
    state = torch.get_rng_state()
    assert paired_difference(before, after) == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    other = paired_difference(before, after, seed=1)
    assert other.difference != first.difference
    assert other.difference.low == pytest.approx(first.difference.low, abs=0.01)
    assert other.permutation_test_p == pytest.approx(first.permutation_test_p, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.ones(3), torch.ones(4)),
        (torch.ones(1), torch.ones(4)),
        (torch.ones(0), torch.ones(0)),
        (torch.ones(2, 2), torch.ones(2, 2)),
        (torch.tensor(1.0), torch.tensor(1.0)),
        (torch.tensor([1.0, NAN]), torch.ones(2)),
        (torch.ones(2), torch.tensor([1.0, NAN])),
        (torch.ones(2), torch.tensor([1.0, math.inf])),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf])),
    ],
    ids=str,
)
def test_values_that_cannot_be_compared_are_refused(before, after):
    with pytest.raises(ValueError, match=r"Expected as many values|not finite"):
        paired_difference(before, after)


def test_a_mean_of_zero_before_leaves_the_percentage_undefined_but_not_the_difference():
    found = paired_difference(torch.zeros(8), torch.arange(8) / 8)
    assert math.isnan(found.percent.value)
    assert found.difference.low > 0
    assert found.evidence
    nothing = paired_difference(torch.zeros(8), torch.zeros(8))
    assert math.isnan(nothing.percent.value)
    assert math.isnan(nothing.percent.low)
    assert nothing.percent.holds_zero
    assert not nothing.evidence


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [
        (-1.0, 1.0, True),
        (0.0, 1.0, True),
        (-1.0, 0.0, True),
        (0.0, 0.0, True),
        (1e-12, 1.0, False),
        (-1.0, -1e-12, False),
        (NAN, NAN, True),
        (math.inf, math.inf, False),
    ],
)
def test_zero_on_an_edge_lies_in_the_interval(low, high, holds):
    assert Interval(0.5, low, high).holds_zero is holds


def test_means_of_resamples_scatter_as_those_of_draws_with_replacement():
    values = torch.stack([torch.arange(20.0), torch.arange(20.0) ** 2, -torch.arange(20.0)], dim=1)
    means = bootstrap(values)
    assert means.shape == (10_000, 3)
    assert means.dtype == torch.float64
    assert torch.allclose(means.mean(dim=0), values.double().mean(dim=0), rtol=0.01)
    expected = values.double().var(dim=0, correction=0) / 20
    assert torch.allclose(means.var(dim=0), expected, rtol=0.05)
    assert torch.allclose(means[:, 0], -means[:, 2]), "the columns of a row stay together"


def test_resamples_are_the_same_for_the_same_number_of_rows_however_many_there_are():
    values = torch.rand(30, 2, generator=seeded(9))
    means = bootstrap(values)
    assert torch.equal(bootstrap(values), means)
    assert torch.equal(bootstrap(values[:, :1])[:, 0], means[:, 0])
    assert len(means[:, 0].unique()) == len(means), "no resample is used twice"
    assert not torch.equal(bootstrap(values, seed=1), means)
    many = torch.rand(1500, 1, generator=seeded(9))  # more than are kept
    assert bootstrap(many).std().item() == pytest.approx(many.std().item() / math.sqrt(1500), rel=0.05)


def slow_sign_test(num_better: int, num_worse: int) -> float:
    """Share of all splits of as many coins that are at least as far from even."""
    number = num_better + num_worse
    far = abs(num_better - num_worse)
    count = sum(math.comb(number, k) for k in range(number + 1) if abs(2 * k - number) >= far)
    return float(Fraction(count, 2**number))


def test_the_sign_test_equals_a_slow_sum_over_all_splits():
    for better, worse in itertools.product(range(13), repeat=2):
        assert sign_test(better, worse) == pytest.approx(slow_sign_test(better, worse)), (better, worse)
    for better, worse in [(51, 42), (42, 51), (300, 250), (1000, 900), (0, 60)]:
        assert sign_test(better, worse) == pytest.approx(slow_sign_test(better, worse), rel=1e-9)


def test_the_sign_test_has_the_values_that_were_published():
    assert round(sign_test(51, 42), 2) == 0.41
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0
    assert sign_test(5, 0) == pytest.approx(0.0625)
    assert sign_test(6, 0) == pytest.approx(0.03125)
    assert sign_test(1, 8) == pytest.approx(0.0390625)


def exact_permutation(change: list[int]) -> float:
    """Go through every exchange of before and after, in whole numbers."""
    sums = [abs(sum(s * c for s, c in zip(signs, change, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(change))]  # fmt: skip
    return sum(total >= abs(sum(change)) for total in sums) / len(sums)


@pytest.mark.parametrize(
    "change",
    [
        [1, 1, 1, 1, 1, 1],
        [-1, -1, -1, -1, -1, -1],
        [3, 1, 2, 5, 4, -1, 2],
        [-3, -1, -2, -5, 4, -1, 2, -7, 2],
        [10, 1, -1, 2, -2],
        [1, 2, -3, 4, -4],
        [0, 0, 2, 3, 4],
        [7],
        [0],
    ],
    ids=str,
)
@pytest.mark.parametrize("unit", [1.0, 0.1, 0.07])
def test_the_permutation_test_equals_an_exact_enumeration(change, unit):
    # In units of 0.1, equal sums differ by rounding.
    found = permutation_test(unit * torch.tensor(change, dtype=torch.float64))
    assert found == pytest.approx(exact_permutation(change))


def test_random_exchanges_give_nearly_what_all_of_them_do():
    change = torch.randn(14, generator=seeded(38), dtype=torch.float64) + 0.4  # one more than are gone through
    assert permutation_test(change) == pytest.approx(exact_permutation(change.tolist()), abs=0.01)
    zeros = torch.zeros(100, dtype=torch.float64)
    assert permutation_test(torch.cat([zeros, change[:8]])) == exact_permutation(change[:8].tolist())


def test_the_permutation_test_is_never_zero():
    change = torch.rand(60, generator=seeded(14)) + 0.1
    assert permutation_test(change) == pytest.approx(1 / 10_001)
    assert permutation_test(-change, seed=5) == permutation_test(change, seed=5)
    assert permutation_test(torch.rand(1500, generator=seeded(14)) + 0.1) == pytest.approx(1 / 10_001)


def test_p_values_are_as_small_as_they_say_where_nothing_changes():
    found = [permutation_test(torch.randn(25, generator=seeded(100 + i))) for i in range(300)]
    for level in (0.05, 0.5):
        error = math.sqrt(level * (1 - level) / 300)
        assert sum(p < level for p in found) / 300 == pytest.approx(level, abs=3 * error)


def correlated(prompts: int, continuations: int, shared: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw scores of two models whose noise is in part common; prompts differ widely, and so do their effects."""
    common, first, second = torch.randn(3, prompts, continuations, generator=generator, dtype=torch.float64)
    level, effect = 10 * torch.randn(2, prompts, 1, generator=generator, dtype=torch.float64)
    weights = math.sqrt(shared), math.sqrt(1 - shared)
    return level + weights[0] * common + weights[1] * first, effect + weights[0] * common + weights[1] * second


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.75, 0.9])
def test_the_variance_factor_is_that_of_the_correlation_of_the_noise(shared):
    assert variance_factor(*correlated(4000, 4, shared, seeded(16))) == pytest.approx(1 / (1 - shared), rel=0.05)


def test_the_variance_factor_is_by_how_much_independent_draws_scatter_more():
    generator = seeded(17)
    before, after = correlated(30, 20_000, 0.75, generator)
    common, independent = [], []
    for i in range(2000):  # each an evaluation with 5 continuations a prompt, and one whose draws are not shared
        k, other = slice(5 * i, 5 * i + 5), slice(10_000 + 5 * i, 10_000 + 5 * i + 5)
        common.append((after[:, k] - before[:, k]).mean())
        independent.append((after[:, other] - before[:, k]).mean())
    scatter = (torch.stack(independent).var() / torch.stack(common).var()).item()
    assert scatter == pytest.approx(4, rel=0.15)
    assert variance_factor(before[:, :400], after[:, :400]) == pytest.approx(scatter, rel=0.15)


def slow_variance_factor(before: list[list[float]], after: list[list[float]]) -> float:
    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / (len(values) - 1)

    sums = [0.0, 0.0]
    for row, other in zip(before, after, strict=True):
        pairs = [(b, a) for b, a in zip(row, other, strict=True) if not math.isnan(b) and not math.isnan(a)]
        if len(pairs) >= 2:
            sums[0] += variance([b for b, _ in pairs]) + variance([a for _, a in pairs])
            sums[1] += variance([a - b for b, a in pairs])
    return sums[0] / sums[1]


def test_the_variance_factor_leaves_out_pairs_of_which_one_was_not_scored():
    before, after = correlated(6, 5, 0.5, seeded(18))
    before[0, 1] = after[1, 4] = before[1, 2] = after[2, 0] = NAN
    before[3, :] = NAN
    after[4, :4] = NAN  # one pair is left, and tells nothing of the scatter
    expected = slow_variance_factor(before.tolist(), after.tolist())
    assert variance_factor(before, after) == pytest.approx(expected)
    before[0, 1], after[0, 1] = 1000.0, NAN
    assert variance_factor(before, after) == pytest.approx(expected), "the partner of a failed one counts nowhere"


def test_the_variance_factor_is_nan_without_two_pairs_and_infinite_where_both_models_draw_alike():
    assert math.isnan(variance_factor(torch.rand(5, 1), torch.rand(5, 1)))
    assert math.isnan(variance_factor(torch.tensor([[1.0, NAN]]), torch.tensor([[2.0, 3.0]])))
    same = torch.rand(5, 3, generator=seeded(19))
    assert variance_factor(same, same) == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_correlations_equal_slow_ones_also_with_ties(seed):
    generator = seeded(20 + seed)
    x = torch.randint(8, (25,), generator=generator).double() / 8
    y = x.square() + torch.randint(4, (25,), generator=generator).double() / 4
    assert ranks(x).tolist() == slow_ranks(x.tolist())
    assert correlation(x, y) == pytest.approx(slow_correlation(x.tolist(), y.tolist()))
    assert correlation(x, y, ranks) == pytest.approx(slow_correlation(slow_ranks(x.tolist()), slow_ranks(y.tolist())))
    assert correlation(x, -y, ranks) == pytest.approx(-correlation(x, y, ranks))


def test_ranks_of_ties_share_their_mean_and_a_curve_that_rises_has_a_rank_correlation_of_one():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, -2.0, 3.0])).tolist() == [3.0, 1.0, 3.0, 0.0, 3.0]
    x = torch.linspace(-3, 3, 20)
    assert correlation(x, x.exp(), ranks) == pytest.approx(1)
    assert correlation(x, x.exp()) < 0.9
    assert correlation(x, 5 - 2 * x) == pytest.approx(-1)


def test_a_correlation_with_what_does_not_vary_is_nan():
    x = torch.rand(39, generator=seeded(26), dtype=torch.float64)
    for value in [
        0.0,
        0.1,
        *(i / 37 for i in range(1, 37)),
    ]:  # the mean of equal values may differ from them by rounding
        flat = torch.full((39,), value, dtype=torch.float64)
        for pair in [(x, flat), (flat, x), (flat, 3 * flat)]:
            assert math.isnan(correlation(*pair)), value
            assert math.isnan(correlation(*pair, ranks)), value
    assert math.isnan(correlation(torch.ones(1), torch.ones(1)))
