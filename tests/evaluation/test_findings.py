"""What is found in rows and windows that were written by hand, against answers known in advance."""

import json
import math
import random
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import PRICES, Continuations, findings, front, measure
from sparc3_lightning.evaluation.intervals import (
    Difference,
    Interval,
    paired_difference,
    perplexity_change,
    perplexity_interval,
)
from sparc3_lightning.evaluation.metrics import Perplexity
from sparc3_lightning.evaluation.results import MEASURES, Dose, Effects, Findings, Front
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.neuron_list import NeuronList

# Per model and prompt the toxicity of each continuation; None where it could not be scored.
Table = dict[str, dict[str, list[float | None]]]
TOXICITY: Table = {
    "baseline": {
        "t1": [0.8, 0.6, 0.1],
        "t2": [0.5, 0.3, None],
        "t3": [0.9, 0.9, 0.0],
        "t4": [None, None, None],
        "t5": [0.4, 0.6, 0.8],
        "n1": [0.1, 0.2, 0.3],
        "n2": [0.0, 0.6, 0.0],
    },
    "pruned": {
        "t1": [0.2, 0.1, 0.3],
        "t2": [0.4, 0.2, 0.3],
        "t3": [0.3, 0.6, 0.0],
        "t4": [0.9, 0.9, 0.9],
        "t5": [None, None, None],
        "n1": [0.1, 0.2, 0.3],
        "n2": [0.0, 0.9, 0.3],
    },
}
PROMPTS = {"t1": 0.9, "t2": 0.5, "t3": 0.7, "t4": 0.8, "t5": 0.6, "n1": 0.4999, "n2": None}
NEURONS = NeuronList(
    neurons=[Component("model.layers.0.mlp.up_proj", i, -1.0) for i in range(2)],
    next=[Component("model.layers.0.mlp.up_proj", 2, -0.5)],
)


def rows_of(scores: Table, second: Any = None) -> list[dict[str, Any]]:
    """Write the rows of completions.jsonl; ``second`` gives the second scorer's value of a row."""
    rows = []
    for model, of_prompts in scores.items():
        for prompt, values in of_prompts.items():
            for j, value in enumerate(values):
                row = {
                    "model": model,
                    "prompt_id": prompt,
                    "continuation_index": j,
                    "prompt": "a prompt",
                    "prompt_toxicity": PROMPTS.get(prompt, 0.9),
                    "continuation": f"word{j} word{j} of {prompt}",
                    "num_tokens": 4,
                    "num_unique_tokens": 3,
                    "toxicity": value,
                }
                rows.append(row if second is None else {**row, "second_toxicity": second(model, prompt, j)})
    return rows


def measured(nll: list[float], tokens: list[int], divergence: float = 0.0) -> dict[str, Tensor]:
    """Return what Perplexity.compute does."""
    return {
        "perplexity": torch.tensor(math.exp(sum(nll) / sum(tokens)), dtype=torch.float64),
        "divergence": torch.tensor(divergence, dtype=torch.float64),
        "num_tokens": torch.tensor(sum(tokens)),
        "nll": torch.tensor(nll, dtype=torch.float64),
        "tokens": torch.tensor(tokens),
    }


TOKENS = [10, 4, 30, 9, 25, 10]
BASELINE_NLL = [20.0, 9.0, 55.0, 20.0, 49.0, 25.0]


def windows_of(*names: str, second_convention: bool = True) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Make up windows: each model is one nat a window worse than the one before it in the list."""
    found = {}
    for i, name in enumerate(names):
        found[name] = {"sliding": measured([nll + i for nll in BASELINE_NLL], TOKENS, 0.125 * i)}
        if second_convention and name in ("baseline", "pruned"):
            found[name]["disjoint"] = measured([3.0 + i, 5.0], [2, 2], 99.0)
    return found


def small(**options: Any) -> Findings:
    """Return what is found in the table above."""
    variants = list_variants({"": NEURONS}, 3)
    return findings(rows_of(TOXICITY), windows_of("baseline", "pruned"), variants, ["some"], **options)


def means(values: dict[str, list[float | None]], prompts: list[str], first: int | None = None) -> list[float]:
    """Mean over the scored continuations of each prompt, slow and obvious."""
    kept = [[v for v in values[prompt][:first] if v is not None] for prompt in prompts]
    return [sum(found) / len(found) for found in kept]


def difference(before: list[float], after: list[float]) -> Difference:
    return paired_difference(torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64))


def test_prompts_are_toxic_from_a_half_and_those_without_a_toxicity_are_not():
    found = Continuations(rows_of(TOXICITY))
    assert found.groups == {"toxic": ["t1", "t2", "t3", "t4", "t5"], "nontoxic": ["n1", "n2"]}
    assert found.headline == "toxic"
    mild = {model: {p: v for p, v in of.items() if p.startswith("n")} for model, of in TOXICITY.items()}
    assert Continuations(rows_of(mild)).groups == {"nontoxic": ["n1", "n2"]}
    results = findings(rows_of(mild), windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 3), ["some"])
    assert results.headline == "nontoxic"
    assert list(results.baseline.groups) == list(results.effects) == ["nontoxic"]
    assert results.baseline.groups["nontoxic"].behavior_mean == pytest.approx(0.2)


def test_measures_of_a_group_are_means_over_its_prompts():
    results = small()
    baseline = results.baseline.groups["toxic"]
    assert baseline.behavior_mean == pytest.approx((0.5 + 0.4 + 0.6 + 0.6) / 4), "t4 was never scored"
    assert baseline.expected_maximum_behavior == pytest.approx((0.8 + 0.5 + 0.9 + 0.8) / 4)
    assert baseline.behavior_probability == 1.0
    assert (baseline.num_prompts, baseline.num_continuations, baseline.num_failed) == (5, 15, 4)
    pruned = results.pruned.groups["toxic"]
    assert pruned.behavior_mean == pytest.approx((0.2 + 0.3 + 0.3 + 0.9) / 4)
    assert pruned.behavior_probability == pytest.approx(2 / 4)
    assert pruned.num_failed == 3
    mild = {name: model.groups["nontoxic"] for name, model in results.models.items()}
    assert mild["baseline"].behavior_mean == pytest.approx((0.2 + 0.2) / 2)
    assert mild["pruned"].expected_maximum_behavior == pytest.approx((0.3 + 0.9) / 2)
    assert results.num_failed == 7


def test_each_model_has_a_perplexity_and_a_number_of_tokens_by_convention():
    results = small()
    assert results.baseline.perplexity["sliding"].value == pytest.approx(math.exp(178 / 88))
    assert results.pruned.perplexity["sliding"].value == pytest.approx(math.exp(184 / 88))
    assert results.baseline.num_tokens["sliding"] == 88
    assert results.baseline.perplexity["disjoint"].value == pytest.approx(math.exp(2))
    assert results.pruned.perplexity["disjoint"].value == pytest.approx(math.exp(9 / 4))
    assert results.pruned.num_tokens["disjoint"] == 4
    assert results.pruned.kl == 0.125
    assert results.baseline.kl is None


def test_a_logger_gets_the_measures_of_the_headline_beside_perplexity():
    results = small()
    for name, model in results.models.items():
        numbers = model.numbers("toxic")
        names = ["perplexity", "perplexity_disjoint", *(["kl"] if name == "pruned" else []), *MEASURES]
        assert list(numbers)[: len(names)] == names
        assert numbers["perplexity"] == model.perplexity["sliding"].value
        assert numbers["behavior_mean"] == model.groups["toxic"].behavior_mean
        assert "num_prompts" not in numbers


def test_empty_continuations_length_and_variety_are_measured():
    rows = rows_of({"baseline": {"t1": [0.1, 0.2], "t2": [0.3, None]}})
    texts = {("t1", 0): "a b a", ("t1", 1): "a b", ("t2", 0): " \n", ("t2", 1): ""}
    for row in rows:
        row["continuation"] = texts[row["prompt_id"], row["continuation_index"]]
        row["num_tokens"] = len(row["continuation"])
    found = measure(Continuations(rows), "baseline", "toxic")
    assert (found.num_empty, found.share_empty) == (2, 0.5)
    assert found.mean_length == pytest.approx((5 + 3 + 2 + 0) / 4)
    assert found.distinct_1 == pytest.approx(2 / 5), "t2 has no word"
    assert found.distinct_2 == pytest.approx(2 / 3)
    for row in rows:
        row["continuation"] = {"t1": "a b c d", "t2": "a b a b"}[row["prompt_id"]]
    # Within a prompt, then the mean over prompts: the words of different prompts are not thrown together.
    found = measure(Continuations(rows), "baseline", "toxic")
    assert found.distinct_1 == pytest.approx((4 / 8 + 2 / 8) / 2)
    assert found.distinct_2 == pytest.approx((3 / 6 + 2 / 6) / 2)


def test_an_effect_is_the_paired_difference_over_the_prompts_that_both_models_have_a_score_for():
    results = small()
    both = ["t1", "t2", "t3"]  # t4 failed before, t5 after
    before, after = (means(TOXICITY[model], both) for model in ("baseline", "pruned"))
    assert results.effects["toxic"].behavior_mean == difference(before, after)
    effect = results.effects["toxic"].behavior_mean
    assert effect.before == pytest.approx(0.5)
    assert effect.after == pytest.approx(0.8 / 3)
    assert (effect.num_better, effect.num_worse) == (3, 0)
    assert results.change.behavior_percent == effect.percent.value == pytest.approx(100 * (0.8 / 1.5 - 1))
    assert results.effects["toxic"].expected_maximum_behavior == difference([0.8, 0.5, 0.9], [0.3, 0.4, 0.6])
    assert results.effects["toxic"].behavior_probability == difference([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])
    before, after = (means(TOXICITY[model], ["n1", "n2"]) for model in ("baseline", "pruned"))
    assert results.effects["nontoxic"].behavior_mean == difference(before, after)


def test_evidence_is_said_where_the_interval_leaves_zero_out():
    base = {f"t{i:02}": [0.5 + 0.01 * i] for i in range(20)}
    for shift, evidence in [(-0.2, True), (0.2, True), (0.0, False)]:
        after = {p: [v + shift + (0.1 if i % 2 else -0.1)] for i, (p, (v,)) in enumerate(base.items())}
        rows = rows_of({"baseline": base, "pruned": after})
        effect = findings(rows, windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 1), ["some"]).effects[
            "toxic"
        ]
        assert effect.behavior_mean.evidence is evidence


def test_where_nothing_was_scored_there_is_no_effect():
    scores = {"baseline": {"t1": [None, None], "n1": [0.1, 0.2]}, "pruned": {"t1": [None, 0.3], "n1": [0.1, 0.1]}}
    results = findings(rows_of(scores), windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 2), ["some"])
    assert results.effects["toxic"] == Effects(None, None, None)
    assert math.isnan(results.baseline.groups["toxic"].behavior_mean)
    assert math.isnan(results.change.behavior_percent)
    assert results.effects["nontoxic"].behavior_mean.difference.value == pytest.approx(-0.05)


def test_the_original_model_alone_has_no_effect_and_no_divergence():
    results = findings(
        rows_of({"baseline": TOXICITY["baseline"]}), windows_of("baseline"), list_variants({}, 3), ["some"]
    )
    assert (results.pruned, results.change, results.main_effect, results.second_scorer) == (None,) * 4
    for found in (results.effects, results.perplexity_change, results.controls, results.doses, results.fronts):
        assert len(found) == 0
    assert list(results.models) == ["baseline"]


def test_by_how_much_common_noise_cuts_the_variance_is_measured_over_the_headline():
    results = small()
    # Prompts with two pairs at least: t1, t2 (two of three), t3; not t4 and t5, and none that is not toxic.
    pairs = {"t1": 3, "t2": 2, "t3": 3}
    total = {"apart": 0.0, "paired": 0.0}
    for prompt, n in pairs.items():
        before, after = (torch.tensor(TOXICITY[m][prompt][:n], dtype=torch.float64) for m in ("baseline", "pruned"))
        total["apart"] += before.var() + after.var()
        total["paired"] += (after - before).var()
    expected = (total["apart"] / total["paired"]).item()
    assert results.common_random_numbers_variance_factor == pytest.approx(expected)


# Per model six prompts and three continuations. The third of the original is such that a control, which draws but
# two, would look like an effect if it were compared with all three.
CONTROLLED: Table = {
    "baseline": {f"t{i}": [0.4 + 0.01 * i, 0.6, 0.0] for i in range(6)},
    "pruned": {f"t{i}": [0.1, 0.2 + 0.02 * i, 0.0] for i in range(6)},
    "random_0": {f"t{i}": [0.4, 0.6 + (0.03 if i % 2 else -0.03)] for i in range(6)},
    "random_1": {f"t{i}": [0.5, 0.7 + 0.01 * i] for i in range(6)},
    "largest_weights_0": {f"t{i}": [0.1, 0.1] for i in range(6)},
    "largest_weights_1": {f"t{i}": [0.0, 0.2] for i in range(6)},
}


def controlled() -> Findings:
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    return findings(rows_of(CONTROLLED), windows_of(*(v.name for v in variants)), variants, ["some"])


@pytest.mark.parametrize(
    ("held", "zeroed"),
    [((), ()), (("pruned",), ("random", "largest_weights")), (("pruned", "random"), ("largest_weights",))],
)
def test_a_control_is_said_to_be_zeroed_only_where_the_pruned_neurons_are_held_at_a_constant(held, zeroed):
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    variants = [replace(variant, mean_ablated=variant.kind in held) for variant in variants]
    found = findings(rows_of(CONTROLLED), windows_of(*(v.name for v in variants)), variants, ["some"])
    assert {kind for kind, control in found.controls.items() if control.zero_ablated} == set(zeroed)


def test_controls_are_compared_with_the_first_continuations_of_the_original_only():
    found = controlled().controls
    prompts = [f"t{i}" for i in range(6)]
    before = means(CONTROLLED["baseline"], prompts, 2)
    assert before[0] == pytest.approx(0.5)
    assert list(found) == ["random", "largest_weights"], "the list does not say which are the least relevant"
    for kind, control in found.items():
        assert control.outcome.num_continuations == 2
        assert [point.name for point in control.draws] == [f"{kind}_0", f"{kind}_1"]
        for point in control.draws:
            after = means(CONTROLLED[point.name], prompts)
            assert point.effect == difference(before, after)
            assert point.behavior_mean == pytest.approx(sum(after) / 6)
            assert point.behavior_percent == point.effect.percent
            assert point.num_neurons == 2


def test_the_effect_of_a_control_is_the_mean_over_its_draws():
    control = controlled().controls["random"]
    outcome = control.outcome
    prompts = [f"t{i}" for i in range(6)]
    before = means(CONTROLLED["baseline"], prompts, 2)
    pruned = means(CONTROLLED["pruned"], prompts, 2)
    draws = [means(CONTROLLED[f"random_{i}"], prompts) for i in range(2)]
    own = sum(sum(a - b for a, b in zip(draw, before, strict=True)) / 6 for draw in draws) / 2
    against = sum(sum(p - a for a, p in zip(draw, pruned, strict=True)) / 6 for draw in draws) / 2
    assert outcome.effect.value == pytest.approx(own)
    assert outcome.effect_percent.value == pytest.approx(100 * own / (sum(before) / 6))
    assert outcome.pruned_less_control.value == pytest.approx(against)
    assert against < -0.3, "below 0: the pruned model fell further"
    assert outcome.pruned_less_control.high < 0
    # The draws differ by 0.1 or so, which alone makes the interval wide.
    assert outcome.effect.low < 0.02 < 0.09 < outcome.effect.high
    for percent, value in zip(astuple(outcome.effect_percent), astuple(outcome.effect), strict=True):
        assert percent == pytest.approx(100 * value / (sum(before) / 6))
    assert [point.effect.evidence for point in control.draws] == [False, True]
    assert outcome.num_draws_with_evidence == 1
    assert outcome.perplexity_percent == pytest.approx(100 * (math.exp(12 / 88) + math.exp(18 / 88) - 2) / 2)


def test_a_control_that_does_as_much_as_the_pruned_neurons_is_seen():
    outcome = controlled().controls["largest_weights"].outcome
    assert outcome.num_draws_with_evidence == 2
    assert outcome.pruned_less_control.value > 0


def test_prompts_that_failed_in_one_draw_of_a_control_are_left_out_of_all():
    scores = json.loads(json.dumps(CONTROLLED))
    scores["random_1"]["t3"] = [None, None]
    scores["random_0"]["t2"] = [None, 0.6]
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    control = findings(rows_of(scores), windows_of(*(v.name for v in variants)), variants, ["some"]).controls["random"]
    prompts = ["t0", "t1", "t2", "t4", "t5"]
    before = means(scores["baseline"], prompts, 2)
    draws = [means(scores[f"random_{i}"], prompts) for i in range(2)]
    own = sum(sum(a - b for a, b in zip(draw, before, strict=True)) / 5 for draw in draws) / 2
    assert control.outcome.effect.value == pytest.approx(own)
    assert control.outcome.effect_percent.value == pytest.approx(100 * own / (sum(before) / 5), rel=1e-9)


def test_a_control_of_which_nothing_was_scored_has_its_draws_only():
    scores = json.loads(json.dumps(CONTROLLED))
    for prompt in scores["random_1"]:
        scores["random_1"][prompt] = [None, None]
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    control = findings(rows_of(scores), windows_of(*(v.name for v in variants)), variants, ["some"]).controls["random"]
    assert control.outcome is None
    assert control.draws[1].effect is None
    assert control.draws[1].behavior_percent is None
    assert math.isnan(control.draws[1].behavior_mean)
    assert control.draws[0].effect.num_better == 4


def test_each_dose_is_a_point_of_toxicity_and_perplexity():
    variants = list_variants({"": NEURONS}, 3, doses=[1, 2, 3], dampings=[1.0, 0.5])
    names = [v.name for v in variants]
    scores = {
        name: {f"t{p}": [0.5 - 0.05 * i + 0.01 * p * i, 0.4, 0.3] for p in range(4)} for i, name in enumerate(names)
    }
    results = findings(rows_of(scores), windows_of(*names), variants, ["some"])
    points = results.doses
    assert [(p.name, p.num_neurons, p.damping) for p in points] == [
        ("pruned", 2, 1.0),
        ("top_1_1", 1, 1.0),
        ("top_3_1", 3, 1.0),
        ("top_1_0.5", 1, 0.5),
        ("top_2_0.5", 2, 0.5),
        ("top_3_0.5", 3, 0.5),
    ]
    prompts = [f"t{p}" for p in range(4)]
    for i, point in enumerate(points, 1):
        assert point.perplexity == pytest.approx(math.exp((178 + 6 * i) / 88))
        assert point.perplexity_percent.value == pytest.approx(100 * (math.exp(6 * i / 88) - 1))
        assert point.kl == 0.125 * i
        assert point.effect == difference(means(scores["baseline"], prompts), means(scores[point.name], prompts))
    assert results.controls == {}
    assert points[0].effect == results.effects["toxic"].behavior_mean


def priced(name: str, perplexity: float, behavior: float | None) -> Dose:
    """Return a dose of which a front reads the changes in percent."""
    zero, percent = Interval(0.0, 0.0, 0.0), Interval(perplexity, math.nan, math.nan)
    effect = behavior and Difference(1.0, 1.0, zero, Interval(behavior, math.nan, math.nan), 0, 0, 0, 1.0, 1.0)
    return Dose(name, "", 1, 1.0, 1.0, percent, 0.0, effect, [], None)


def slow_area(points: list[Dose]) -> float:
    """Average the fall of toxicity that is reached at a price over many prices, the original model being a point."""
    found = []
    for i in range(1000):
        price = (i + 0.5) * PRICES[-1] / 1000
        within = [p for p in points if p.effect and p.perplexity_percent.value <= price]
        found.append(max([0.0, *(-p.effect.percent.value for p in within)]))
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_area_of_a_front_is_the_mean_over_prices_of_the_fall_of_toxicity_reached_at_each(seed):
    draw = random.Random(seed)
    points = [priced(f"p{i}", draw.randint(-20, 150) / 10, draw.uniform(-60, 20)) for i in range(draw.randint(1, 9))]
    points += [priced("not scored", 0.5, None), priced("broken", math.inf, -100.0)]
    found = front(points)
    assert found.area == pytest.approx(slow_area(points))
    for price in PRICES:
        rows = [p for p in points if p.effect and p.perplexity_percent.value <= price]
        lowest = min(rows, key=lambda p: p.behavior_percent.value, default=None)
        helps = lowest is not None and lowest.behavior_percent.value < 0
        assert found.best[f"{price:g}"] == (lowest.name if helps else None)


def test_a_selection_that_only_harms_has_no_front():
    harmful = [priced("worse", 0.5, 3.0), priced("dear", 11.0, -90.0)]
    assert front(harmful) == Front(0.0, {"1": None, "5": None, "10": None})


def test_the_mean_toxicity_by_seed_is_that_of_the_continuations_that_the_seed_drew():
    found = {name: model.behavior_by_seed for name, model in small(per_seed=1).models.items()}
    toxic = [prompt for prompt in TOXICITY["baseline"] if prompt.startswith("t")]
    for model, of_prompts in TOXICITY.items():
        columns = [[of_prompts[prompt][j] for prompt in toxic] for j in range(3)]
        known = [[value for value in column if value is not None] for column in columns]
        assert found[model] == pytest.approx([sum(values) / len(values) for values in known])
    assert [len(model.behavior_by_seed) for model in small().models.values()] == [1, 1]


def second_toxicity(model: str, prompt: str, j: int) -> float | None:
    """Half the first scorer's value before, and unlike the first after; one could not be scored."""
    first = TOXICITY[model][prompt][j]
    if (model, prompt, j) == ("baseline", "n1", 0):
        return None
    if first is None:
        return 0.77
    return first / 2 if model == "baseline" else first / 2 + 0.3


def test_the_second_scorer_has_effects_of_its_own():
    rows = rows_of(TOXICITY, second_toxicity)
    results = findings(rows, windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 3), ["some", "other"])
    second = results.second_scorer
    assert second.name == "other"
    prompts = ["t1", "t2", "t3", "t4", "t5"]  # where the first failed, the second did not
    table = {
        model: {p: [second_toxicity(model, p, j) for j in range(3)] for p in TOXICITY[model]} for model in TOXICITY
    }
    expected = difference(means(table["baseline"], prompts), means(table["pruned"], prompts))
    assert second.effects["toxic"].behavior_mean == expected
    assert second.effects["toxic"].behavior_mean.difference.value > 0
    assert results.effects["toxic"].behavior_mean.difference.value < 0
    before, after = (means(table[model], ["n1", "n2"]) for model in ("baseline", "pruned"))
    assert second.effects["nontoxic"].behavior_mean == difference(before, after)
    assert results.effects == small().effects, "the first scorer's do not depend on it"
    pairs = [(row["toxicity"], row["second_toxicity"]) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    assert second.num_scored == len(pairs) == 42 - 7 - 1
    first, other = torch.tensor(pairs, dtype=torch.float64).T
    assert second.pearson == pytest.approx(torch.corrcoef(torch.stack([first, other]))[0, 1].item())
    assert second.spearman != pytest.approx(second.pearson, abs=1e-3)
    curved = rows_of({"baseline": TOXICITY["baseline"]}, lambda m, p, j: (TOXICITY[m][p][j] or 0.0) ** 4)
    found = findings(curved, windows_of("baseline"), list_variants({}, 3), ["some", "other"]).second_scorer
    assert found.spearman == pytest.approx(1)
    assert found.pearson < 0.97
    assert found.effects == {}


def test_controls_do_not_enter_the_correlation_of_the_scorers():
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    rows = rows_of(
        CONTROLLED, lambda model, p, j: (1 if model in ("baseline", "pruned") else -1) * CONTROLLED[model][p][j]
    )
    found = findings(rows, windows_of(*(v.name for v in variants)), variants, ["some", "other"]).second_scorer
    assert found.num_scored == 36
    assert found.pearson == pytest.approx(1)


def test_a_second_scorer_that_scored_nothing_is_said_to():
    results = findings(
        rows_of(TOXICITY, lambda *_: None),
        windows_of("baseline", "pruned"),
        list_variants({"": NEURONS}, 3),
        ["some", "other"],
    )
    assert results.second_scorer.num_scored == 0
    assert results.second_scorer.effects["toxic"].behavior_mean is None
    assert math.isnan(results.second_scorer.pearson)


def test_the_order_of_the_rows_does_not_matter():
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    rows = rows_of(CONTROLLED, lambda model, p, j: CONTROLLED[model][p][j])
    windows = windows_of(*(v.name for v in variants))
    expected = findings(rows, windows, variants, ["some", "other"])
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert findings(shuffled, windows, variants, ["some", "other"]) == expected


def test_a_dose_that_does_nothing_has_an_effect_of_nothing():
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2), doses=[1])
    scores = {**CONTROLLED, "top_1_1": CONTROLLED["baseline"]}
    rows = rows_of(scores, lambda model, p, j: scores[model][p][j])
    results = findings(rows, windows_of(*(v.name for v in variants)), variants, ["some", "other"])
    same = results.doses[1]
    assert same.name == "top_1_1"
    assert not same.effect.evidence
    assert same.effect.difference == Interval(0.0, 0.0, 0.0)


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
