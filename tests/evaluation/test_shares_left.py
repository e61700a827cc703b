"""What is left of an effect: a ratio of means over the same prompts, with the interval of such a ratio."""

import math
from typing import Any

import pytest
import torch

from sparc3_lightning.evaluation.findings import Continuations
from sparc3_lightning.evaluation.stress import shares_left

NUMBER = 80


def continuations(
    effects: torch.Tensor, missing: tuple[int, ...] = (), first: int = 0, **other: float
) -> Continuations:
    """Return one continuation of each prompt by both models, of which pruning changes the score as given."""
    rows: list[Any] = []
    for i, effect in enumerate(effects.tolist(), start=first):
        for model, score in (("baseline", 0.5), ("pruned", 0.5 + effect)):
            scores = {"some": None if i in missing and model == "pruned" else score}
            scores |= {name: share * score for name, share in other.items()}
            row = {"model": model, "prompt_id": f"p{i:03}", "continuation_index": 0, "prompt_toxicity": 0.9}
            rows.append({**row, "scores": scores})
    return Continuations(rows, "some")


def drawn(seed: int, mean: float) -> torch.Tensor:
    return mean + 0.1 * torch.randn(NUMBER, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_share_is_the_ratio_of_the_mean_effects_with_an_interval_around_it():
    before, after = drawn(0, -0.3), drawn(1, -0.15)
    left = shares_left(continuations(before), continuations(after), ["some"])["some"]
    assert math.isclose(left.value, (after.mean() / before.mean()).item())
    assert left.low < 0.5 < left.high
    # By the delta method, of a ratio of two means.
    spread = (after - left.value * before).std().item() / NUMBER**0.5 / abs(before.mean().item())
    assert (left.high - left.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)


def test_all_is_left_where_nothing_changed_and_nothing_where_the_effect_is_gone():
    before = drawn(0, -0.3)
    whole, gone = (
        shares_left(continuations(before), continuations(after), ["some"])["some"]
        for after in (before, torch.zeros(NUMBER))
    )
    assert (whole.value, whole.low, whole.high) == pytest.approx((1, 1, 1), abs=1e-5)
    assert (gone.value, gone.low, gone.high) == (0, 0, 0)


def test_each_judge_has_a_share_of_its_own():
    before, after = continuations(drawn(0, -0.3), other=0.5), continuations(drawn(1, -0.15), other=0.25)
    found = shares_left(before, after, ["some", "other"])
    assert found["other"].value == pytest.approx(found["some"].value / 2)


def test_prompts_without_a_score_are_left_out_of_both():
    before, after = drawn(0, -0.3), drawn(1, -0.15)
    left = shares_left(continuations(before, missing=(3,)), continuations(after, missing=(5,)), ["some"])["some"]
    kept = [i for i in range(NUMBER) if i not in (3, 5)]
    assert left.value == pytest.approx((after[kept].mean() / before[kept].mean()).item())
    every = tuple(range(NUMBER))
    assert shares_left(continuations(before, missing=every), continuations(after), ["some"]) == {"some": None}


def test_an_effect_that_could_be_nothing_gives_no_interval_and_other_prompts_no_share():
    nothing = shares_left(continuations(drawn(0, 0.0)), continuations(drawn(1, -0.1)), ["some"])["some"]
    assert not nothing.is_known
    assert shares_left(continuations(drawn(0, -0.3)), continuations(drawn(1, -0.3), first=1), ["some"]) == {}
