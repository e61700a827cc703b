"""What is found of perplexity, against a slow bootstrap over windows."""

import math

import pytest
import torch
from hand_written import BASELINE_NLL, TOKENS, measured, small, windows_of
from simulated import slow_ends

from sparc3_lightning.evaluation.intervals import perplexity_change, perplexity_interval
from sparc3_lightning.evaluation.metrics import Perplexity

T_11 = 2.2010  # the percentile 97.5 of Student's t with 11 degrees of freedom


def test_the_perplexity_and_its_change_have_the_intervals_of_a_slow_bootstrap_over_windows():
    tokens, before_nll = TOKENS * 2, [*BASELINE_NLL, *(0.9 * nll + 1 for nll in BASELINE_NLL)]
    after_nll = [nll + 0.1 * nll * (i % 3) for i, nll in enumerate(before_nll)]
    before, after = measured(before_nll, tokens), measured(after_nll, tokens)
    alone, change = perplexity_interval(before), perplexity_change(before, after)
    assert alone.value == pytest.approx(math.exp(sum(before_nll) / sum(tokens)))
    assert change.value == pytest.approx(100 * (math.exp((sum(after_nll) - sum(before_nll)) / sum(tokens)) - 1))
    # Each end is where the nats that are left of each window, beyond so many a token, could just be 0 on average.
    rises = [a - b for a, b in zip(after_nll, before_nll, strict=True)]
    for nll, ends in ((before_nll, (alone.low, alone.high)), (rises, (1 + change.low / 100, 1 + change.high / 100))):
        assert ends[0] < ends[1]
        for end, side in zip(ends, (1, 0), strict=True):
            left = [n - math.log(end) * t for n, t in zip(nll, tokens, strict=True)]
            found = slow_ends(left, T_11)
            assert found[1 - side] == pytest.approx(0, abs=0.05 * (found[1] - found[0]))


def test_a_perplexity_that_is_infinite_has_no_interval():
    broken = measured([*BASELINE_NLL[:-1], math.inf], TOKENS)
    for found in (perplexity_interval(broken), perplexity_change(measured(BASELINE_NLL, TOKENS), broken)):
        assert found.value == math.inf
        assert not found.is_known


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
