"""What is found of perplexity, against a slow bootstrap over windows."""

import math
import random

import pytest
import torch
from hand_written import BASELINE_NLL, TOKENS, measured, small, windows_of

from sparc3_lightning.evaluation.intervals import perplexity_change, perplexity_interval
from sparc3_lightning.evaluation.metrics import Perplexity


def slow_windows(measured_of, num_resamples: int = 4000) -> tuple[float, float]:
    """Resample windows with Python's own generator, and cut 2.5 % off each end."""
    draw = random.Random(1)
    found = sorted(measured_of(draw.choices(range(len(TOKENS)), k=len(TOKENS))) for _ in range(num_resamples))
    return found[int(0.025 * num_resamples)], found[int(0.975 * num_resamples) - 1]


def test_the_perplexity_and_its_change_have_the_intervals_of_a_slow_bootstrap_over_windows():
    after_nll = [nll + 0.1 * nll * (i % 3) for i, nll in enumerate(BASELINE_NLL)]
    before, after = measured(BASELINE_NLL, TOKENS), measured(after_nll, TOKENS)

    def perplexity(nll: list[float], drawn: list[int]) -> float:
        return math.exp(sum(nll[i] for i in drawn) / sum(TOKENS[i] for i in drawn))

    alone = perplexity_interval(before)
    low, high = slow_windows(lambda drawn: perplexity(BASELINE_NLL, drawn))
    assert alone.value == pytest.approx(math.exp(178 / 88))
    assert (alone.low, alone.high) == pytest.approx((low, high), rel=0.01)
    change = perplexity_change(before, after)
    low, high = slow_windows(lambda drawn: 100 * (perplexity(after_nll, drawn) / perplexity(BASELINE_NLL, drawn) - 1))
    assert change.value == pytest.approx(100 * (math.exp(sum(after_nll) / 88) / math.exp(178 / 88) - 1))
    assert (change.low, change.high) == pytest.approx((low, high), rel=0.04)
    worst = max(100 * (math.exp(0.2 * n / t) - 1) for n, t in zip(BASELINE_NLL, TOKENS, strict=True))
    assert change.high < worst, "windows of few tokens count for less"


def test_a_perplexity_that_does_not_change_has_no_interval_to_speak_of():
    same = perplexity_change(measured(BASELINE_NLL, TOKENS), measured(BASELINE_NLL, TOKENS))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = measured([nll + 0.01 * t for nll, t in zip(BASELINE_NLL, TOKENS, strict=True)], TOKENS)
    for side in ("value", "low", "high"):  # a hundredth of a nat a token, in every window
        assert getattr(perplexity_change(measured(BASELINE_NLL, TOKENS), worse), side) == pytest.approx(1.005, abs=1e-3)


def test_a_text_of_one_window_has_a_perplexity_too_but_no_interval():
    metric = Perplexity()
    metric.update(torch.tensor([0]), *torch.tensor([[20.0], [0.5]], dtype=torch.float64), torch.tensor([10]))
    windows = metric.compute()
    assert perplexity_interval(windows).value == pytest.approx(math.exp(2))
    assert perplexity_change(windows, windows).value == 0.0
    for found in (perplexity_interval(windows), perplexity_change(windows, windows)):
        assert math.isnan(found.low), "one window says nothing of how others would differ"
        assert math.isnan(found.high)


def test_perplexity_changes_and_intervals_are_given_for_each_convention():
    results = small()
    windows = windows_of("baseline", "pruned")
    assert list(results.perplexity_change) == ["sliding", "disjoint"]
    for convention in ("sliding", "disjoint"):
        pair = [windows[name][convention] for name in ("baseline", "pruned")]
        assert results.perplexity_change[convention] == perplexity_change(*pair)
        for model, windows_of_model in zip(results.models.values(), pair, strict=True):
            assert model.perplexity[convention] == perplexity_interval(windows_of_model)
    assert results.change.perplexity_percent == pytest.approx(100 * (math.exp(6 / 88) - 1))
