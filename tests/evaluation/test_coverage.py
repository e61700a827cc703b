"""What intervals and tests promise, by simulation: how often they hold the truth, and how often luck is evidence."""

import math

import pytest
import torch
from torch import Tensor

from sparc3_lightning.evaluation.draws import interval_of_draws
from sparc3_lightning.evaluation.intervals import (
    Interval,
    Resampled,
    level_of_each,
    paired_difference,
    percent_change,
    permutation_test,
)

pytestmark = pytest.mark.slow


class Draw:
    """Values of prompts from populations of light and of heavy tails, all of them with the mean 0."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def t(self, degrees: int, *shape: int) -> Tensor:
        return self.normal(*shape) / self.normal(*shape, degrees).square().mean(dim=-1).sqrt()

    def t2(self, *shape: int) -> Tensor:
        return self.t(2, *shape)

    def t3(self, *shape: int) -> Tensor:
        return self.t(3, *shape)

    def exponential(self, *shape: int) -> Tensor:
        return -(1 - self.uniform(*shape)).log() - 1

    def laplace(self, *shape: int) -> Tensor:
        return (self.exponential(*shape) + 1) * torch.where(self.uniform(*shape) < 0.5, 1.0, -1.0)

    def half_zeros(self, *shape: int) -> Tensor:
        return self.t3(*shape) * (self.uniform(*shape) < 0.5)

    def skewed_zeros(self, *shape: int) -> Tensor:
        return (self.exponential(*shape) + 1) * (self.uniform(*shape) < 0.3) - 0.3

    def scores(self, *shape: int) -> Tensor:
        """Return the change of scores in [0, 1] that crowd near 0."""
        before, after = (self.uniform(*shape).pow(3) * (self.uniform(*shape) < 0.7) for _ in range(2))
        return after - before

    def thirds(self, *shape: int) -> Tensor:
        """Return whether a prompt gained the behaviour, lost it, or is as before."""
        return (3 * self.uniform(*shape)).floor() - 1


ALIKE = ("normal", "t2", "laplace", "half_zeros", "scores", "thirds")  # a change is as likely as its opposite
LOPSIDED = ("exponential", "skewed_zeros")


def error(share: float, number: int) -> float:
    """Return three standard errors of a share of a number of experiments."""
    return 3 * math.sqrt(share * (1 - share) / number)


def mean_interval(change: Tensor) -> Interval:
    return Resampled(change, torch.ones_like(change)).mean()


def is_evidence(change: Tensor) -> bool:
    """Return what ``Difference.evidence`` does, without the interval in percent, which takes most of the time."""
    return permutation_test(change) < 0.05 and not mean_interval(change).holds_zero


def test_evidence_is_what_these_simulations_take_it_for():
    draw = Draw(0)
    for number in (6, 30):
        changes = [draw.normal(number) + 0.3 for _ in range(20)]
        found = [paired_difference(torch.zeros_like(change), change).evidence for change in changes]
        assert found == [is_evidence(change) for change in changes]
        assert any(found) or number == 6


@pytest.mark.parametrize("number", [6, 9, 15, 40, 128])
def test_luck_is_called_evidence_in_at_most_5_percent_however_few_prompts_changed(number):
    draw, repeats, rates = Draw(number), 200, {}
    for kind in ALIKE:
        found = 0
        for _ in range(repeats):
            change = getattr(draw, kind)(4 * number)
            change = change[change != 0][:number]
            found += is_evidence(torch.cat([change, torch.zeros(number, dtype=torch.float64)]))
        rates[kind] = found / repeats
    print(f"{number} changed prompts, luck called evidence: {rates}")
    assert sum(rates.values()) / len(rates) <= 0.05 + error(0.05, repeats * len(ALIKE))
    assert max(rates.values()) <= 0.05 + error(0.05, repeats)


@pytest.mark.parametrize("number", [6, 15, 40, 128])
def test_lopsided_changes_of_the_mean_zero_are_called_evidence_hardly_more_often(number):
    draw, repeats = Draw(100 + number), 300
    rates = {kind: sum(is_evidence(getattr(draw, kind)(number)) for _ in range(repeats)) / repeats for kind in LOPSIDED}
    print(f"{number} prompts, lopsided changes called evidence: {rates}")
    assert max(rates.values()) <= 0.06 + error(0.06, repeats)


@pytest.mark.parametrize("number", [50, 100, 200])
def test_intervals_hold_the_true_change_in_93_to_96_percent_from_50_prompts_on(number):
    draw, repeats, rates = Draw(200 + number), 250, {}
    for kind in (*ALIKE, *LOPSIDED):
        intervals = [mean_interval(getattr(draw, kind)(number) + 0.3) for _ in range(repeats)]
        rates[kind] = sum(of.low <= 0.3 <= of.high for of in intervals) / repeats
    print(f"{number} prompts, intervals that hold the change: {rates}")
    assert 0.93 <= sum(rates.values()) / len(rates) <= 0.96
    assert all(0.93 - error(0.93, repeats) <= rate <= 0.96 + error(0.96, repeats) for rate in rates.values())


@pytest.mark.parametrize("kind", ["even", "skewed", "zeros"])
def test_intervals_in_percent_hold_the_true_change_in_93_to_96_percent(kind):
    draw, repeats, held = Draw(1), 150, 0
    for _ in range(repeats):
        before = draw.uniform(60).pow(1 if kind == "even" else 3)
        if kind == "zeros":
            before = before * (draw.uniform(60) < 0.6)
        after = before * (0.4 + 0.6 * draw.uniform(60))
        interval = paired_difference(before, after).percent
        held += interval.low <= -30 <= interval.high
    print(f"60 prompts, {kind}: intervals in percent that hold the change: {held / repeats}")
    assert 0.93 - error(0.93, repeats) <= held / repeats <= 0.96 + error(0.96, repeats)


def test_of_ten_doses_without_effect_luck_calls_any_evidence_in_at_most_5_percent():
    draw, repeats, together, apart = Draw(2), 400, 0, 0
    for _ in range(repeats):
        common = draw.normal(40)
        least = min(permutation_test(0.5 * common + draw.normal(40)) for _ in range(10))
        together, apart = together + (least < 0.05 / 10), apart + (least < 0.05)
    print(f"ten doses, any below the level by luck: {together / repeats} together, {apart / repeats} each by itself")
    assert together / repeats <= 0.05 + error(0.05, repeats)
    assert apart / repeats > 0.15


def test_the_intervals_of_five_doses_hold_every_true_change_together_in_some_95_percent():
    draw, repeats, together = Draw(3), 60, 0
    for _ in range(repeats):
        before = 1 + draw.uniform(60)
        afters = [before * (1 - 0.05 * dose) + 0.1 * draw.normal(60) for dose in range(5)]
        found = [percent_change(before, after, level_of_each(5)) for after in afters]
        together += all(of.low <= -5 * dose <= of.high for dose, of in enumerate(found))
    print(f"five doses, all intervals hold: {together / repeats}")
    assert together / repeats >= 0.95 - error(0.95, repeats)


SCATTERS = {  # deviation by sets of neurons, by prompts, and by both together
    "by sets": (0.05, 0.02, 0.1),
    "by prompts": (0.005, 0.1, 0.1),
    "by both": (0.0, 0.0, 0.1),
}


def sets_of(draw: Draw, number: int, scatter: tuple[float, float, float], kind: str) -> Tensor:
    """Draw by how much random sets of neurons change each prompt, shape ``[number, 80]``; the true mean is 0."""
    of_sets, of_prompts, both = scatter
    sets, prompts = getattr(draw, kind)(number, 1), draw.normal(1, 80)
    return of_sets * sets + of_prompts * prompts + both * draw.laplace(number, 80)


@pytest.mark.parametrize("kind", ["normal", "laplace", "exponential"])
@pytest.mark.parametrize("draws", [2, 5])
@pytest.mark.parametrize("scatter", SCATTERS)
def test_more_than_random_sets_is_claimed_of_one_more_random_set_in_at_most_5_percent(scatter, draws, kind):
    draw, repeats, more, less = Draw(3), 1500, 0, 0
    for _ in range(repeats):
        chosen, *others = sets_of(draw, draws + 1, SCATTERS[scatter], kind)
        found = interval_of_draws(chosen - torch.stack(others), one_more=True)
        more, less = more + (found.low > 0), less + (found.high < 0)
    print(f"{draws} draws, {kind}, {scatter}: claimed of one more draw: {more / repeats} up, {less / repeats} down")
    # The verdict claims it in the direction of the effect, so either share is that of a false claim.
    assert max(more, less) / repeats <= 0.05 + error(0.05, repeats)


@pytest.mark.parametrize("draws", [1, 2, 5])
@pytest.mark.parametrize("scatter", SCATTERS)
def test_intervals_of_a_control_hold_the_mean_of_all_random_sets(scatter, draws):
    of_sets = 0.0 if draws == 1 else SCATTERS[scatter][0]  # a single set does not tell of others
    draw, repeats, differences, ratios = Draw(4), 1000, 0, 0
    for _ in range(repeats):
        before = draw.uniform(80).pow(2) + 0.1
        change = sets_of(draw, draws, (of_sets, *SCATTERS[scatter][1:]), "normal")
        difference, ratio = interval_of_draws(change), interval_of_draws(change - 0.2 * before, before)
        differences += difference.holds_zero
        ratios += ratio.low <= -0.2 <= ratio.high
    print(f"{draws} draws, {scatter}: the mean is held in {differences / repeats}, in percent in {ratios / repeats}")
    for held in (differences, ratios):
        assert 0.93 - error(0.93, repeats) <= held / repeats <= 0.97 + error(0.97, repeats)
