"""What is found of controls, against answers known in advance."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hand_written import CONTROLLED, NEURONS, difference, judges, means, rows_of, windows_of

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.draws import interval_of_draws
from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.results import Findings
from sparc3_lightning.evaluation.variants import list_variants


def controlled() -> Findings:
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    return findings(rows_of(CONTROLLED), windows_of(*(v.name for v in variants)), variants, judges("some"))


@pytest.mark.parametrize(
    ("held", "zeroed"),
    [((), ()), (("pruned",), ("random", "largest_weights")), (("pruned", "random"), ("largest_weights",))],
)
@pytest.mark.few(1)
def test_a_control_is_said_to_be_zeroed_only_where_the_pruned_neurons_are_held_at_a_constant(held, zeroed):
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    variants = [replace(variant, mean_ablated=variant.kind in held) for variant in variants]
    found = findings(rows_of(CONTROLLED), windows_of(*(v.name for v in variants)), variants, judges("some"))
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
    tables = [torch.tensor(of, dtype=torch.float64) for of in (draws, before, pruned)]
    assert outcome.effect == interval_of_draws(tables[0] - tables[1])
    assert outcome.pruned_less_control == interval_of_draws(tables[2] - tables[0], one_more=True)
    # The two draws differ by 0.1 or so, which says little of what a third would do.
    assert outcome.effect.low < -0.5 < 0.5 < outcome.effect.high
    assert outcome.pruned_less_control.holds_zero
    # In percent of a mean before that was drawn as well.
    ratio = interval_of_draws(tables[0] - tables[1], tables[1])
    assert outcome.effect_percent.low == -100 > 100 * ratio.low
    assert outcome.effect_percent.high == pytest.approx(100 * ratio.high)
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
    control = findings(rows_of(scores), windows_of(*(v.name for v in variants)), variants, judges("some")).controls[
        "random"
    ]
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
    control = findings(rows_of(scores), windows_of(*(v.name for v in variants)), variants, judges("some")).controls[
        "random"
    ]
    assert control.outcome is None
    assert control.draws[1].effect is None
    assert control.draws[1].behavior_percent is None
    assert math.isnan(control.draws[1].behavior_mean)
    assert control.draws[0].effect.num_better == 4
