"""Intervals over draws and prompts, against slow sums, answers known in advance, and a table of Student's t."""

import math
import statistics

import pytest
import torch
from simulated import seeded
from torch import Tensor

from sparc3_lightning.evaluation.draws import interval_of_draws
from sparc3_lightning.evaluation.student import t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (49, 2.0096), (999, 1.9623), (99_999, 1.9600)],
)
def test_quantiles_of_student_are_those_of_a_table(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=1e-4)
    assert t_quantile(0.025, degrees) == pytest.approx(-expected, abs=1e-4)
    assert t_quantile(0.5, degrees) == pytest.approx(0, abs=1e-6)


def test_quantiles_far_out_are_those_of_a_table():
    assert t_quantile(0.995, 1) == pytest.approx(63.6567, rel=1e-5)
    assert t_quantile(0.9995, 4) == pytest.approx(8.6103, rel=1e-5)


def drawn(draws: int, prompts: int, of_draws: float, of_prompts: float, rest: float, seed: int = 0) -> Tensor:
    """Draw values whose variance comes from draws, from prompts, and from both together."""
    generator, shapes = seeded(seed), ((draws, 1), (1, prompts), (draws, prompts))
    first, second, both = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return of_draws * first + of_prompts * second + rest * both


def slow_half_width(rows: list[list[float]], one_more: bool) -> float:
    """The formula written out: Student's t of the draws, and what the prompts have beyond what is in the draws."""
    draws, prompts = len(rows), len(rows[0])
    columns = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    means = [statistics.fmean(row) for row in rows]
    total = statistics.fmean(means)
    t = t_quantile(0.975, prompts - 1)
    if draws == 1:
        return t * math.sqrt(statistics.variance(columns) / prompts)
    rest = sum((rows[j][p] - means[j] - columns[p] + total) ** 2 for j in range(draws) for p in range(prompts))
    rest /= (draws - 1) * (prompts - 1)
    share = 1 / draws + one_more
    of_prompts = max(0.0, statistics.variance(columns) - share * rest)
    return math.sqrt(
        t_quantile(0.975, draws - 1) ** 2 * share * statistics.variance(means) + t**2 * of_prompts / prompts
    )


@pytest.mark.parametrize("scatter", [(1.0, 0.0, 0.2), (0.1, 1.0, 0.1), (0.3, 0.5, 1.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize(("draws", "one_more"), [(1, False), (2, False), (5, False), (2, True), (5, True)])
def test_an_interval_is_that_of_the_formula_written_out(scatter, draws, one_more):
    values = drawn(draws, 12, *scatter) + 0.5
    found = interval_of_draws(values, one_more=one_more)
    width = slow_half_width(values.tolist(), one_more)
    assert found.value == pytest.approx(values.mean().item())
    assert (found.low, found.high) == pytest.approx((found.value - width, found.value + width))


@pytest.mark.parametrize("draws", [1, 4])
def test_a_ratio_ends_where_what_is_left_of_the_mean_could_just_be_zero(draws):
    base = torch.rand(30, generator=seeded(1), dtype=torch.float64) + 0.2
    values = drawn(draws, 30, 0.05, 0.0, 0.02, seed=2) - 0.4 * base
    found = interval_of_draws(values, base)
    assert found.value == pytest.approx((values.mean() / base.mean()).item())
    assert found.low < found.value < found.high
    for end in (found.low, found.high):
        left = values - end * base
        assert abs(left.mean().item()) == pytest.approx(slow_half_width(left.tolist(), False), rel=0.02)


def test_a_control_that_takes_the_same_share_of_every_prompt_has_a_narrow_interval_in_percent_alone():
    base = torch.rand(60, generator=seeded(3), dtype=torch.float64)
    values = torch.stack([-0.5 * base, -0.5 * base, -0.5 * base])
    ratio, difference = interval_of_draws(values, base), interval_of_draws(values)
    assert (ratio.low, ratio.high) == pytest.approx((-0.5, -0.5), abs=1e-6)
    assert (difference.high - difference.low) / base.mean().item() > 0.1, "with the mean before held fixed"


def test_what_cannot_be_said_has_no_ends():
    values = drawn(3, 20, 1.0, 1.0, 1.0)
    assert not interval_of_draws(values[:1], one_more=True).is_known, "one draw does not tell of the next"
    assert interval_of_draws(values[:1]).is_known
    assert not interval_of_draws(values[:, :1]).is_known
    assert not interval_of_draws(values, torch.cat([torch.ones(1), torch.zeros(19)])).is_known
    nothing = interval_of_draws(values, torch.zeros(20))
    assert math.isnan(nothing.value)
    assert not nothing.is_known
    same = interval_of_draws(torch.zeros(3, 20), torch.rand(20, generator=seeded(4)))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
