"""Intervals and tests against slow and obvious second implementations, simulations, and answers known in advance."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sparc3_lightning.evaluation.intervals import (
    Interval,
    bootstrap,
    bootstrap_of_draws,
    bootstrap_ratio,
    interval,
    paired_difference,
    permutation_test,
    sign_test,
    variance_factor,
)
from sparc3_lightning.selection.overlap import correlation, ranks

NAN = math.nan


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toxicities(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Draw skewed values before and after, alike within a prompt, and return the true mean change as well."""
    level = torch.rand(number, generator=generator).square()  # mean 1/3
    noise = torch.rand(2, number, generator=generator) - 0.5
    return level + 0.2 * noise[0], 0.7 * level + 0.2 * noise[1], -0.1


def slow_bootstrap(rows: list, figure, num_resamples: int = 4000) -> tuple[float, float]:
    """Resample rows with Python's own generator, and cut 2.5 % off each end of the sorted figures."""
    draw = random.Random(0)
    found = sorted(figure(draw.choices(rows, k=len(rows))) for _ in range(num_resamples))
    return found[int(0.025 * num_resamples)], found[int(0.975 * num_resamples) - 1]


def slow_correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def slow_ranks(values: list[float]) -> list[float]:
    """Mean of the places that a value takes in the sorted list."""
    places = sorted(values)
    return [sum(i for i, v in enumerate(places) if v == value) / places.count(value) for value in values]


def test_the_interval_holds_the_true_difference_in_about_95_of_100_experiments():
    generator, held, width_used = seeded(0), 0, 0.0
    for _ in range(300):
        before, after, truth = toxicities(60, generator)
        found = paired_difference(before, after).difference
        held += found.low <= truth <= found.high
        width_used += found.high - found.low
    # The binomial standard error of the share is 1.3 %, and percentiles of 60 values fall a little short.
    assert 0.92 <= held / 300 <= 0.98
    # An interval of the level 90 % would be 16 % narrower, and one of unpaired values twice as wide.
    wide = torch.stack(toxicities(100_000, generator)[:2])
    expected = 2 * 1.96 * (wide[1] - wide[0]).std().item() / math.sqrt(60)
    assert width_used / 300 == pytest.approx(expected, rel=0.04)


def test_differences_and_percentages_equal_a_slow_bootstrap_over_prompts():
    before, after, _ = toxicities(40, seeded(2))
    before, after = before + 0.2, after + 0.2
    found = paired_difference(before, after)
    rows = list(zip(before.tolist(), after.tolist(), strict=True))
    low, high = slow_bootstrap(rows, lambda drawn: sum(b - a for a, b in drawn) / len(drawn))
    width = high - low
    assert found.difference.low == pytest.approx(low, abs=0.05 * width)
    assert found.difference.high == pytest.approx(high, abs=0.05 * width)
    # In percent of the mean before of the same resample: the mean before is no constant.
    low, high = slow_bootstrap(rows, lambda drawn: 100 * (sum(b for _, b in drawn) / sum(a for a, _ in drawn) - 1))
    assert found.percent.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.percent.high == pytest.approx(high, abs=0.05 * (high - low))
    constant = width / before.mean().item() * 100
    assert constant > 1.3 * (found.percent.high - found.percent.low), "the data can tell the two apart"


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


def test_one_prompt_alone_moves_the_mean_but_is_no_evidence():
    before = torch.full((30,), 0.5)
    after = before.clone()
    after[7] = 0.0
    found = paired_difference(before, after)
    assert found.difference.value < 0
    assert found.difference.high == 0.0
    assert not found.evidence


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


def test_resamples_without_a_value_are_left_out_of_the_interval():
    figures = torch.tensor([NAN] * 50 + [float(i) for i in range(201)])
    found = interval(3.0, figures[torch.randperm(len(figures), generator=seeded(7))])
    assert found == Interval(3.0, 5.0, 195.0)
    nothing = interval(NAN, torch.full((5,), NAN))
    assert math.isnan(nothing.low)
    assert math.isnan(nothing.high)


def test_an_interval_is_the_middle_95_percent():
    values = torch.randperm(10_001, generator=seeded(8)).double()
    assert interval(1.5, values) == Interval(1.5, 250.0, 9750.0)


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


def test_no_resample_is_used_twice_and_all_that_are_asked_for_are_made():
    values = torch.rand(30, 1, generator=seeded(9))
    for number in (1, 499, 500, 501, 1234):
        means = bootstrap(values, num_resamples=number)
        assert means.shape == (number, 1)
        assert len(means.unique()) == number
    assert torch.equal(bootstrap(values, num_resamples=700)[:500], bootstrap(values, num_resamples=500))


def test_a_ratio_is_that_of_sums_over_the_resampled_rows():
    numerator = torch.tensor([[10.0, 4.0], [30.0, 4.0], [5.0, 4.0], [60.0, 4.0], [20.0, 4.0]])
    denominator = torch.tensor([5.0, 2.0, 5.0, 20.0, 1.0])
    found = bootstrap_ratio(numerator, denominator)
    assert found.shape == (10_000, 2)
    for column in range(2):
        rows = list(zip(numerator[:, column].tolist(), denominator.tolist(), strict=True))
        low, high = slow_bootstrap(rows, lambda drawn: sum(n for n, _ in drawn) / sum(d for _, d in drawn))
        edges = interval(0.0, found[:, column])
        assert edges.low == pytest.approx(low, rel=0.03)
        assert edges.high == pytest.approx(high, rel=0.03)
    assert torch.allclose(bootstrap_ratio(3 * denominator.unsqueeze(1), denominator), torch.tensor(3.0).double())
    assert torch.equal(bootstrap_ratio(numerator, denominator, 3), bootstrap_ratio(numerator, denominator, 3))


def test_draws_that_vary_widen_the_interval_by_their_own_scatter():
    prompts, draws = torch.randn(25, generator=seeded(10)), torch.randn(6, generator=seeded(11))
    found = bootstrap_of_draws(draws.unsqueeze(1) + prompts)
    assert found.shape == (10_000,)
    of_prompts, of_draws = prompts.var(correction=0).item() / 25, draws.var(correction=0).item() / 6
    assert found.mean().item() == pytest.approx((draws.mean() + prompts.mean()).item(), abs=0.02)
    assert found.var().item() == pytest.approx(of_prompts + of_draws, rel=0.05)
    assert bootstrap_of_draws(prompts.expand(6, -1)).var().item() == pytest.approx(of_prompts, rel=0.05)
    assert bootstrap_of_draws(draws.unsqueeze(1).expand(-1, 25)).var().item() == pytest.approx(of_draws, rel=0.05)


def test_draws_are_resampled_apart_from_prompts_even_where_there_are_as_many():
    values = torch.randn(12, generator=seeded(12))
    found = bootstrap_of_draws(values.unsqueeze(1) + values)
    # Together the variances of the two would be four times that of one.
    assert found.var().item() == pytest.approx(2 * values.var(correction=0).item() / 12, rel=0.05)


def test_one_draw_gives_the_interval_over_prompts():
    values = torch.rand(40, generator=seeded(13))
    alone, usual = (
        interval(0.0, r) for r in (bootstrap_of_draws(values.unsqueeze(0)), bootstrap(values.unsqueeze(1))[:, 0])
    )
    assert alone.low == pytest.approx(usual.low, abs=0.01)
    assert alone.high == pytest.approx(usual.high, abs=0.01)
    assert torch.equal(bootstrap_of_draws(values.unsqueeze(0)), bootstrap_of_draws(values.unsqueeze(0)))
    assert not torch.equal(bootstrap_of_draws(values.unsqueeze(0), 1), bootstrap_of_draws(values.unsqueeze(0)))


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
    # The standard error of 10,000 exchanges is 0.5 % at most. In units of 0.1, equal sums differ by rounding.
    found = permutation_test(unit * torch.tensor(change, dtype=torch.float64))
    assert found == pytest.approx(exact_permutation(change), abs=0.015)


def test_the_permutation_test_is_never_zero_and_can_be_told_how_many_exchanges_to_make():
    change = torch.rand(60, generator=seeded(14)) + 0.1
    assert permutation_test(change) == pytest.approx(1 / 10_001)
    assert permutation_test(change, num_permutations=99) == pytest.approx(1 / 100)
    assert permutation_test(-change, seed=5) == permutation_test(change, seed=5)


def test_p_values_are_below_5_percent_in_about_5_of_100_experiments_where_nothing_changes():
    generator = seeded(15)
    found = [permutation_test(torch.randn(25, generator=generator), num_permutations=999) for _ in range(400)]
    assert 0.03 <= sum(p < 0.05 for p in found) / 400 <= 0.075
    assert 0.43 <= sum(p < 0.5 for p in found) / 400 <= 0.57


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
