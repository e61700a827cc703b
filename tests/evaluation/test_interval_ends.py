"""Where intervals end, against a slow bootstrap; and where their ends cannot be said."""

import math
from dataclasses import replace

import pytest
import torch
from simulated import seeded, slow_ends, toxicities

from sparc3_lightning.evaluation.intervals import Resampled, paired_difference

T_39 = 2.0227  # the percentile 97.5 of Student's t with 39 degrees of freedom


def test_differences_equal_a_slow_bootstrap_over_prompts():
    before, after, _ = toxicities(40, seeded(2))
    found = paired_difference(before, after).difference
    low, high = slow_ends((after - before).tolist(), T_39)
    assert found.low == pytest.approx(low, abs=0.03 * (high - low))
    assert found.high == pytest.approx(high, abs=0.03 * (high - low))


@pytest.mark.parametrize("seed", range(3))
def test_an_interval_in_percent_ends_where_what_is_left_of_the_mean_before_could_just_be_that_of_the_mean_after(seed):
    before, after, _ = toxicities(40, seeded(30 + seed))
    before, after = before + 0.2, after + 0.2
    found = paired_difference(before, after).percent
    assert found.low < found.value < found.high
    for percent, side in ((found.low, 1), (found.high, 0)):
        left = (after - (1 + percent / 100) * before).tolist()
        ends = slow_ends(left, T_39)
        assert ends[1 - side] == pytest.approx(0, abs=0.04 * (ends[1] - ends[0]))


def test_an_interval_in_percent_holds_zero_exactly_where_that_of_the_difference_does():
    generator, held = seeded(31), []
    for _ in range(16):
        before = torch.rand(30, generator=generator)
        after = before + 0.15 * torch.randn(30, generator=generator) + 0.06
        found = paired_difference(before, after)
        assert found.percent.is_known
        assert found.percent.holds_zero is found.difference.holds_zero
        held.append(found.percent.holds_zero)
    assert 2 < sum(held) < 14


def test_a_ratio_is_that_of_sums_over_the_rows():
    tokens = torch.tensor([5.0, 2.0, 5.0, 20.0, 1.0, 7.0, 8.0, 4.0, 12.0, 9.0]).repeat(4)
    nats = 2 * tokens + torch.randn(40, generator=seeded(37))
    found = Resampled(nats, tokens).ratio()
    assert found.value == pytest.approx((nats.sum() / tokens.sum()).item())
    for ratio, side in ((found.low, 1), (found.high, 0)):
        ends = slow_ends((nats - ratio * tokens).tolist(), T_39)
        assert ends[1 - side] == pytest.approx(0, abs=0.04 * (ends[1] - ends[0]))
    same = Resampled(3 * tokens, tokens).ratio()
    assert (same.value, same.low, same.high) == pytest.approx((3.0, 3.0, 3.0), abs=1e-4)


@pytest.mark.parametrize("changed", [1, 2, 3])
@pytest.mark.parametrize("number", [6, 30, 200])
def test_a_few_prompts_alone_move_the_mean_but_nothing_can_be_said_of_how_far(changed, number):
    before = torch.full((number,), 0.5)
    after = before - 0.5 * (torch.arange(number) < changed)
    found = paired_difference(before, after)
    assert found.difference.value < 0
    if number > 6 or changed < 3:  # of six prompts a resample seldom has none of three
        assert not found.difference.is_known
        assert not found.percent.is_known
    assert not found.evidence


def test_a_fall_to_nothing_of_the_one_prompt_that_shows_it_is_not_said_to_be_exactly_100_percent():
    for number in (6, 30):
        before = torch.zeros(number)
        before[2] = 0.9
        found = paired_difference(before, torch.zeros(number))
        assert found.percent.value == -100
        assert not found.percent.is_known
        assert not found.evidence


def test_a_fall_of_every_prompt_by_the_same_share_is_known_from_six_prompts_on():
    for number in (1, 3, 5, 6, 40):
        before = torch.rand(number, generator=seeded(number), dtype=torch.float64) + 0.5
        found = paired_difference(before, before / 2).percent
        assert found.value == pytest.approx(-50)
        assert found.is_known is (number >= 6)
        if found.is_known:
            assert (found.low, found.high) == pytest.approx((-50, -50))


def test_what_is_never_below_zero_does_not_fall_by_more_than_100_percent():
    before, after = torch.rand(12, generator=seeded(32)) + 0.2, torch.zeros(12)
    after[:5] = torch.tensor([0.0, 0.3, 0.01, 0.02, 0.01])
    found = paired_difference(before, after).percent
    assert found.low == -100 < found.high
    margins = paired_difference(before - 0.1, after - 0.4).percent  # of log-likelihoods there is no such limit
    assert margins.low < -100


def test_a_mean_before_that_could_be_zero_leaves_the_interval_in_percent_open():
    before = torch.randn(40, generator=seeded(33))
    found = paired_difference(before, before - 1 + 0.1 * torch.randn(40, generator=seeded(34)))
    assert found.evidence
    assert math.isfinite(found.percent.value)
    assert not found.percent.is_known


def test_a_negative_mean_before_turns_the_signs_of_a_percentage_round():
    before, after, _ = toxicities(40, seeded(35))
    there, back = paired_difference(before + 0.2, after + 0.2), paired_difference(-before - 0.2, -after - 0.2)
    for end in ("value", "low", "high"):
        assert getattr(there.percent, end) == pytest.approx(getattr(back.percent, end), abs=1e-4)
    assert there.difference.low == pytest.approx(-back.difference.high)


def test_an_interval_alone_is_no_evidence_where_the_permutation_test_gives_more_than_5_percent():
    before = torch.full((50,), 0.5, dtype=torch.float64)
    change = torch.tensor([-0.10, -0.10, -0.10, -0.10, -0.10, -0.11], dtype=torch.float64)
    found = paired_difference(before, before + torch.cat([change, torch.zeros(44)]))
    assert found.evidence
    assert found.permutation_test_p == 2 / 64
    assert not found.is_evidence_among(2), "six changed prompts cannot bring it below 2.5 %"


def test_evidence_among_several_asks_for_a_smaller_p_value():
    before, after, _ = toxicities(14, seeded(36))
    found = paired_difference(before, after)
    assert found.evidence
    assert 1e-4 < found.permutation_test_p < 0.05
    most = math.ceil(0.05 / found.permutation_test_p) - 1
    assert found.is_evidence_among(1)
    assert found.is_evidence_among(most)
    assert not found.is_evidence_among(most + 1)
    nothing = paired_difference(before, before)
    assert not nothing.is_evidence_among(1)


def test_a_difference_of_scores_ends_at_1():
    before, after = torch.full((8,), 0.1), torch.tensor([0.1, 0.2, 0.11, 0.13, 0.12, 0.14, 0.1, 0.99])
    whole, of_scores = paired_difference(before, after), paired_difference(before, after, most=1.0)
    assert whole.difference.high > 1
    assert of_scores.difference == replace(whole.difference, high=1.0)
