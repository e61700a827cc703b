"""What is found of doses, and the area of their front, against answers known in advance."""

import math
import random

import pytest
import torch
from hand_written import CONTROLLED, NEURONS, difference, judges, means, rows_of, windows_of

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import BUDGETS, findings, front
from sparc3_lightning.evaluation.intervals import Difference, Interval, percent_change
from sparc3_lightning.evaluation.results import Dose, Front
from sparc3_lightning.evaluation.variants import list_variants


def test_each_dose_is_a_point_of_toxicity_and_perplexity():
    variants = list_variants({"": NEURONS}, 3, doses=[1, 2, 3], dampings=[1.0, 0.5])
    names = [v.name for v in variants]
    scores = {
        name: {f"t{p}": [0.5 - 0.05 * i + 0.002 * p * i, 0.4, 0.3] for p in range(12)} for i, name in enumerate(names)
    }
    results = findings(rows_of(scores), windows_of(*names), variants, judges("some"))
    points = results.doses
    assert [(p.name, p.num_neurons, p.damping) for p in points] == [
        ("pruned", 2, 1.0),
        ("top_1_1", 1, 1.0),
        ("top_3_1", 3, 1.0),
        ("top_1_0.5", 1, 0.5),
        ("top_2_0.5", 2, 0.5),
        ("top_3_0.5", 3, 0.5),
    ]
    prompts = sorted(f"t{p}" for p in range(12))
    for i, point in enumerate(points, 1):
        assert point.perplexity == pytest.approx(math.exp((178 + 6 * i) / 88))
        assert point.perplexity_percent.value == pytest.approx(100 * (math.exp(6 * i / 88) - 1))
        assert point.kl == 0.125 * i
        assert point.effect == difference(means(scores["baseline"], prompts), means(scores[point.name], prompts))
        level = 1 - 0.05 / 6
        pair = [means(scores[name], prompts) for name in ("baseline", point.name)]
        before, after = torch.tensor(pair, dtype=torch.float64)
        assert point.together.behavior_percent == percent_change(before, after, level)
        assert point.together.behavior_percent.low < point.effect.percent.low
        assert point.together.perplexity_percent.value == point.perplexity_percent.value
    assert results.controls == {}
    assert points[0].effect == results.effects["toxic"].behavior_mean


def priced(name: str, perplexity: float, behavior: float | None) -> Dose:
    """Return a dose of which a front reads the changes in percent."""
    zero, percent = Interval(0.0, 0.0, 0.0), Interval(perplexity, math.nan, math.nan)
    effect = behavior and Difference(1.0, 1.0, zero, Interval(behavior, math.nan, math.nan), 0, 0, 0, 1.0, 1.0)
    return Dose(name, "", 1, {"neuron": 1}, 1.0, 1.0, percent, 0.0, effect, [], {})


def slow_area(points: list[Dose]) -> float:
    """Average the fall of toxicity reached within a budget over many budgets; the original model is a point."""
    found = []
    for i in range(1000):
        budget = (i + 0.5) * BUDGETS[-1] / 1000
        within = [p for p in points if p.effect and p.perplexity_percent.value <= budget]
        found.append(max([0.0, *(-p.effect.percent.value for p in within)]))
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_area_of_a_front_is_the_mean_over_prices_of_the_fall_of_toxicity_reached_at_each(seed):
    draw = random.Random(seed)
    points = [priced(f"p{i}", draw.randint(-20, 150) / 10, draw.uniform(-60, 20)) for i in range(draw.randint(1, 9))]
    points += [priced("not scored", 0.5, None), priced("broken", math.inf, -100.0)]
    found = front(points)
    assert found.area == pytest.approx(slow_area(points))
    for budget in BUDGETS:
        rows = [p for p in points if p.effect and p.perplexity_percent.value <= budget]
        lowest = min(rows, key=lambda p: p.behavior_percent.value, default=None)
        helps = lowest is not None and lowest.behavior_percent.value < 0
        assert found.best[f"{budget:g}"] == (lowest.name if helps else None)


def test_a_selection_that_only_harms_has_no_front():
    harmful = [priced("worse", 0.5, 3.0), priced("dear", 11.0, -90.0)]
    assert front(harmful) == Front(0.0, {"1": None, "5": None, "10": None})


def test_a_dose_that_does_nothing_has_an_effect_of_nothing():
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2), doses=[1])
    scores = {**CONTROLLED, "top_1_1": CONTROLLED["baseline"]}
    rows = rows_of(scores, lambda model, p, j: scores[model][p][j])
    results = findings(rows, windows_of(*(v.name for v in variants)), variants, judges("some", "other"))
    same = results.doses[1]
    assert same.name == "top_1_1"
    assert not same.effect.evidence
    assert same.effect.difference == Interval(0.0, 0.0, 0.0)
