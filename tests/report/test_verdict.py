"""The verdict says what the intervals allow, and no more."""

import math
from dataclasses import replace
from typing import Any

import pytest

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.intervals import Difference, Interval
from sparc3_lightning.evaluation.results import (
    Control,
    Dose,
    Effects,
    Findings,
    Judge,
    Model,
    Outcome,
    Preference,
)
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.models.components import Component
from sparc3_lightning.report.verdict import moved, verdict
from sparc3_lightning.selection.neuron_list import NeuronList

FELL = (-20.0, -30.0, -10.0)
ROSE = (15.0, 5.0, 25.0)
UNCLEAR = (-4.0, -12.0, 4.0)


def effect(value: float, low: float, high: float, changed: int = 40, of: int = 60, p: float = 0.01) -> Difference:
    """Return an effect given in percent of a mean of 0.4 before; few changes cannot have a small p."""
    return Difference(
        before=0.4,
        after=0.4 + 0.004 * value,
        difference=Interval(0.004 * value, 0.004 * low, 0.004 * high),
        percent=Interval(value, low, high),
        num_better=changed - changed // 3,
        num_worse=changed // 3,
        num_equal=of - changed,
        sign_test_p=1.0,
        permutation_test_p=max(p, 2 / 2**changed),
    )


def found(
    behavior: Any = FELL,
    second: Any = None,
    controls: Any = None,
    perplexity: Any = (3.0, 2.0, 4.0),
    choosers: tuple[str, ...] = (),
) -> Findings:
    """Return what the verdict reads of the findings. The other group and convention would change every word of it."""
    other = Effects(effect(77.0, 66.0, 88.0), None, None)
    model = Model({}, {}, None, {}, [])
    of_second = {"nontoxic": other, "toxic": Effects(effect(*second) if second else None, None, None)}
    judges = {"some": Judge("some" in choosers, "", None, "")}
    if second is not None:
        judges["other"] = Judge("other" in choosers, "", None, "", effects=of_second)
    return Findings(
        headline="toxic",
        headline_judge="some",
        judges=judges,
        num_failed=0,
        baseline=model,
        pruned=model,
        effects={
            "nontoxic": other,
            "toxic": Effects(effect(*behavior) if behavior else None, None, effect(99.0, 88.0, 111.0)),
        },
        perplexity_change={"sliding": Interval(*perplexity), "disjoint": Interval(55.0, 54.0, 56.0)},
        controls=controls or {},
    )


def control(percent: Any, further: Any, draws: int = 3, number: int = 30, zero_ablated: bool = False) -> Control:
    draw = Dose("draw", "", number, {"neuron": number}, 1.0, 1.0, Interval(0.0, 0.0, 0.0), 0.0, None, [], {})
    outcome = Outcome(1, Interval(*percent), Interval(*percent), Interval(*further), 0.0, 0)
    return Control([draw] * draws, zero_ablated, outcome)


def test_an_effect_is_told_with_its_interval_and_its_price():
    assert verdict(found(), {"neuron": 30}) == (
        "With 30 neurons switched off, mean toxicity fell by 20.0 % (95 % interval -30.0 to -10.0 %), and perplexity "
        "rose by 3.0 % (95 % interval +2.0 to +4.0 %)."
    )


def test_toxicity_that_rises_and_perplexity_that_falls_are_called_so():
    assert verdict(found(ROSE, perplexity=(-1.26, -2.0, -0.5)), {"neuron": 1}) == (
        "With 1 neuron switched off, mean toxicity rose by 15.0 % (95 % interval +5.0 to +25.0 %), and perplexity "
        "fell by 1.3 % (95 % interval -2.0 to -0.5 %)."
    )


def test_an_interval_that_holds_zero_is_called_no_evidence():
    assert verdict(found(UNCLEAR), {"neuron": 30}) == (
        "No evidence that switching 30 neurons off changes toxicity: its mean fell by 4.0 % (95 % interval -12.0 to "
        "+4.0 %), and that interval holds 0; perplexity rose by 3.0 % (95 % interval +2.0 to +4.0 %)."
    )
    assert "No evidence that switching 1 neuron off" in verdict(found(UNCLEAR), {"neuron": 1})


@pytest.mark.parametrize(("changed", "words"), [(1, "only 1 prompt changed"), (5, "only 5 prompts changed")])
def test_too_few_prompts_that_changed_are_no_evidence_whatever_the_interval(changed, words):
    said = verdict(found((*FELL, changed)), {"neuron": 2})
    assert said == (
        "No evidence that switching 2 neurons off changes toxicity: its mean fell by 20.0 % (95 % interval -30.0 to "
        f"-10.0 %), and {words}; perplexity rose by 3.0 % (95 % interval +2.0 to +4.0 %)."
    )


@pytest.mark.parametrize(
    ("interval", "evidence"),
    [
        ((-20.0, -30.0, -10.0), True),
        ((-0.2, -0.3, -0.1), True),
        ((0.2, 0.1, 0.3), True),
        ((-20.0, -50.0, 0.0), False),
        ((20.0, 0.0, 50.0), False),
        ((-20.0, -50.0, 0.1), False),
        ((0.0, 0.0, 0.0), False),
    ],
)
def test_the_words_no_evidence_stand_exactly_where_the_interval_holds_zero(interval, evidence):
    said = verdict(found(interval), {"neuron": 5})
    assert said.startswith("With 5 neurons") is evidence
    assert said.startswith("No evidence") is not evidence
    assert ("holds 0" in said) is not evidence


@pytest.mark.parametrize("number", [0, 2, 100])
def test_any_number_of_neurons_but_one_is_plural(number):
    assert f"With {number} neurons switched off" in verdict(found(), {"neuron": number})


def test_controls_are_named_with_their_number_of_draws():
    controls = {
        "random": control((1.0, -2.0, 4.0), (-0.1, -0.2, -0.05)),
        "least_relevant": control((-0.5, -1.0, 0.2), (-0.1, -0.2, -0.05), draws=1),
        "largest_weights": control((-5.0, -8.0, -2.0), (-0.1, -0.2, -0.05)),
    }
    said = verdict(found(controls=controls), {"neuron": 30})
    more = "; the chosen neurons do more than one more draw would."
    assert said.endswith(
        f" As many random neurons (3 draws): +1.0 % (-2.0 to +4.0 %){more}"
        " As many least relevant neurons (1 draw): -0.5 % (-1.0 to +0.2 %); a single draw cannot show whether the "
        "chosen neurons do more."
        f" As many neurons with the largest weights (3 draws): -5.0 % (-8.0 to -2.0 %){more}"
    )
    assert "do more" not in verdict(found(UNCLEAR, controls=controls), {"neuron": 30})


@pytest.mark.parametrize(
    ("further", "does_more"),
    [((-0.1, -0.2, -0.05), True), ((-0.1, -0.2, 0.0), False), ((-0.1, -0.2, 0.05), False), ((0.0, 0.0, 0.1), False)],
)
def test_a_control_that_is_as_far_takes_the_claim_back_but_only_where_there_is_one(further, does_more):
    controls = {"random": control((-18.0, -25.0, -11.0), further)}
    caveat = ", which is no evidence that the chosen neurons do more than one more draw would."
    assert verdict(found(controls=controls), {"neuron": 30}).endswith(caveat) is not does_more
    assert caveat not in verdict(found(UNCLEAR, controls=controls), {"neuron": 30})


@pytest.mark.parametrize(("toxicity", "further"), [(FELL, (0.1, 0.05, 0.2)), (ROSE, (-0.1, -0.2, -0.05))])
def test_a_control_that_goes_further_than_the_pruned_neurons_takes_the_claim_back_too(toxicity, further):
    said = verdict(found(toxicity, controls={"random": control((2 * toxicity[0], 0.0, 0.0), further)}), {"neuron": 30})
    assert "no evidence that the chosen neurons do more" in said


def test_a_control_that_was_not_measured_or_scored_is_not_mentioned():
    unscored = replace(control(FELL, FELL), outcome=None)
    assert verdict(found(controls={"random": unscored}), {"neuron": 30}) == verdict(found(), {"neuron": 30})


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (FELL, (-8.0, -12.0, -4.0), "The judge 'other' agrees: -8.0 % (-12.0 to -4.0 %)."),
        (ROSE, (8.0, 4.0, 12.0), "The judge 'other' agrees: +8.0 % (+4.0 to +12.0 %)."),
        (FELL, (8.0, 4.0, 12.0), "The judge 'other' differs: +8.0 % (+4.0 to +12.0 %)."),
        (ROSE, (-8.0, -12.0, -4.0), "The judge 'other' differs: -8.0 % (-12.0 to -4.0 %)."),
        (UNCLEAR, (-8.0, -12.0, -4.0), "The judge 'other' differs: -8.0 % (-12.0 to -4.0 %)."),
        (FELL, (-8.0, -17.0, 1.0), "The judge 'other' gives no evidence: -8.0 % (-17.0 to +1.0 %)."),
        (UNCLEAR, (8.0, -1.0, 17.0), "The judge 'other' gives no evidence: +8.0 % (-1.0 to +17.0 %)."),
        (FELL, False, "The judge 'other' scored nothing."),
    ],
)
def test_another_judge_agrees_only_if_both_have_evidence_of_the_same_direction(first, second, said):
    assert verdict(found(first, second), {"neuron": 3}).endswith(f". This is by the judge 'some'. {said}")


def test_the_judge_that_the_neurons_were_chosen_with_is_said_to_be():
    said = verdict(found(FELL, (-8.0, -12.0, -4.0), choosers=("other",)), {"neuron": 3})
    assert said.endswith(
        "This is by the judge 'some'. The judge 'other', which the neurons were chosen with, agrees: -8.0 % (-12.0 to "
        "-4.0 %)."
    )
    said = verdict(found(FELL, (-8.0, -12.0, -4.0), choosers=("other",)), {"head": 3})
    assert "The judge 'other', which the heads were chosen with, agrees" in said


def test_it_is_said_in_plain_words_if_the_scorer_that_chose_the_neurons_judges_them():
    alone = verdict(found(choosers=("some",)), {"neuron": 3})
    assert alone.endswith("The scorer that chose the neurons, 'some', judges them: no other judge was asked.")
    several = verdict(found(FELL, (-8.0, -12.0, -4.0), choosers=("some", "other")), {"neuron": 3})
    assert (
        "The scorer that chose the neurons, 'some', judges them: every judge had a part in the choice. The ju"
        in several
    )
    assert several.endswith("The judge 'other', which the neurons were chosen with, agrees: -8.0 % (-12.0 to -4.0 %).")
    assert "This is by" not in several


def test_no_judge_is_mentioned_where_there_is_one_that_chose_nothing():
    assert "judge" not in verdict(found(), {"neuron": 3})


def test_nothing_is_claimed_where_nothing_was_pruned_or_scored():
    assert "no neurons were given" in verdict(replace(found(), pruned=None), {})
    said = verdict(found(False), {"neuron": 3})
    assert said == "No continuation of both models could be scored, so nothing is known of the effect."


def test_a_judge_of_the_headline_that_scored_nothing_does_not_hide_what_the_others_find():
    nothing = "The judge of the headline, 'some', scored no prompt of both models."
    for second, finds in {
        FELL: "gives evidence of a change: -20.0 % (-30.0 to -10.0 %)",
        UNCLEAR: "gives no evidence: -4.0 % (-12.0 to +4.0 %)",
        (): "scored nothing",
    }.items():
        assert verdict(found(False, second), {"neuron": 3}) == f"{nothing} The judge 'other' {finds}."


def test_a_judge_is_said_to_have_scored_nothing_only_if_so():
    one = found(FELL, ())
    one = replace(one, judges={**one.judges, "other": replace(one.judges["other"], num_scored=7)})
    assert verdict(one, {"neuron": 3}).endswith(" The judge 'other' scored no prompt of both models.")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_change_that_has_no_percentage_is_not_given_one(value):
    assert moved(Interval(value, value, value)) == "changed by a percentage that cannot be said"


def test_a_change_in_words_has_its_sign_in_the_verb():
    assert moved(Interval(-12.34, -20.0, -1.04)) == "fell by 12.3 % (95 % interval -20.0 to -1.0 %)"
    assert moved(Interval(0.0, 0.0, 0.0)) == "did not change (95 % interval +0.0 to +0.0 %)"
    assert moved(Interval(12.36, -1.0, 20.06)) == "rose by 12.4 % (95 % interval -1.0 to +20.1 %)"


@pytest.mark.parametrize("ends", [(math.nan, math.nan), (-1.0, math.inf), (-math.inf, 1.0)])
def test_an_interval_without_an_end_is_said_to_be_none(ends):
    assert moved(Interval(12.36, *ends)) == "rose by 12.4 % (95 % interval cannot be said)"
    assert moved(Interval(0.0, *ends)) == "did not change (95 % interval cannot be said)"
    said = verdict(found(perplexity=(3.0, *ends)), {"neuron": 30})
    assert said.endswith(
        "(95 % interval -30.0 to -10.0 %), and perplexity rose by 3.0 % (95 % interval cannot be said)."
    )
    said = verdict(found(FELL, (-8.0, *ends), {"random": control((1.0, *ends), (-0.1, *ends))}), {"neuron": 30})
    assert "As many random neurons (3 draws): +1.0 % (cannot be said), which is no evidence" in said
    assert said.endswith("The judge 'other' gives no evidence: -8.0 % (cannot be said).")
    assert "inf" not in said


def test_a_change_of_what_was_hardly_there_is_told_in_its_own_unit():
    change = replace(effect(*FELL), percent=Interval(-20.0, math.nan, math.nan))
    findings = found()
    findings.effects["toxic"] = Effects(change, None, None)
    assert verdict(findings, {"neuron": 3}).startswith(
        "With 3 neurons switched off, mean toxicity fell by 0.0800 (95 % interval -0.1200 to -0.0400; in percent it "
        "cannot be said), and perplexity"
    )
    nothing = replace(change, difference=Interval(0.0, 0.0, 0.0), percent=Interval(math.nan, math.nan, math.nan))
    findings.effects["toxic"] = Effects(nothing, None, None)
    assert "its mean did not change (95 % interval +0.0000 to +0.0000; in percent it cannot be said)" in verdict(
        findings, {"neuron": 3}
    )


def test_an_interval_that_leaves_zero_out_is_no_evidence_where_the_permutation_test_gives_none():
    assert verdict(found((*FELL, 40, 60, 0.0721)), {"neuron": 2}).startswith(
        "No evidence that switching 2 neurons off changes toxicity: its mean fell by 20.0 % (95 % interval -30.0 to "
        "-10.0 %), and a permutation test gives p = 0.072; perplexity"
    )


def test_few_prompts_and_windows_are_said_beside_their_intervals():
    said = verdict(found((*FELL, 20, 49)), {"neuron": 2})
    assert "fell by 20.0 % (95 % interval -30.0 to -10.0 %, maybe too narrow: only 49 prompts), and perplexity" in said
    assert "too narrow" not in verdict(found((*FELL, 20, 50)), {"neuron": 2})
    for number, words in ((1, ", maybe too narrow: only 1 window)"), (49, "only 49 windows)"), (50, "+4.0 %)")):
        few = replace(found(), baseline=Model({}, {}, None, {}, [], {"sliding": number, "disjoint": 3}))
        assert verdict(few, {"neuron": 2}).endswith(f"{words}.")


@pytest.mark.parametrize(("evidence", "words"), [((1, 1, 0), "2 give"), ((0, 1, 0), "1 gives"), ((0, 0, 0), "0 give")])
def test_several_doses_are_judged_together(evidence, words):
    effects = [effect(*FELL, p=0.016 if is_one else 0.017) for is_one in evidence]
    doses = [Dose("", "", 1, {"neuron": 1}, 1.0, 1.0, Interval(0.0, 0.0, 0.0), 0.0, of, [], None) for of in effects]
    assert verdict(replace(found(), doses=doses), {"neuron": 3}).endswith(
        f" Of the 3 sets of neurons that were measured, {words} evidence of a change that holds for all of "
        "them together."
    )
    assert "together" not in verdict(replace(found(), doses=doses[:1]), {"neuron": 3})


def test_a_control_of_fewer_neurons_is_not_said_to_be_of_as_many():
    words = verdict(
        found(controls={"random": control((1.0, -2.0, 4.0), (-0.1, -0.2, -0.05), number=12)}), {"neuron": 30}
    )
    assert "Only 12 random neurons, all there are to draw from, (3 draws): +1.0 % (-2.0 to +4.0 %);" in words
    assert "As many" not in words


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([(1.0, 0.0)] * 2, "switched off"),
        ([(0.5, 0.0)] * 2, "damped by 50 %"),
        ([(0.5, 0.0), (0.25, 0.0)], "damped"),
        ([(1.0, 0.0), (0.25, 0.0)], "switched off or damped"),
        ([(1.0, 0.3), (1.0, 0.0)], "held at their mean activation"),
        ([(0.5, 0.3)] * 2, "damped by 50 % towards their mean activation"),
    ],
)
def test_neurons_that_are_damped_or_held_at_their_mean_are_not_said_to_be_off(edits, words):
    up = "model.layers.0.mlp.up_proj"
    edit = NeuronList([Component(up, i, -1.0, *of) for i, of in enumerate(edits)]).ablation
    assert edit == words
    assert verdict(found(), {"neuron": 2}, ablation=edit).startswith(f"With 2 neurons {words}, mean toxicity fell")
    off = words == "switched off"
    what = "switching 2 neurons off" if off else f"having 2 neurons {words}"
    assert verdict(found(UNCLEAR), {"neuron": 2}, ablation=edit).startswith(
        f"No evidence that {what} changes toxicity: its"
    )


@pytest.mark.parametrize(
    ("edit", "zeroed", "said"),
    [
        (
            "held at their mean activation",
            ["random", "largest_weights"],
            "The random heads and the heads with the largest weights are switched off, not held at their mean.",
        ),
        (
            "held at their mean activation",
            ["random", "least_relevant", "largest_weights"],
            "The controls are switched off, not held at their mean.",
        ),
        (
            "damped by 50 % towards their mean activation",
            ["random", "least_relevant", "largest_weights"],
            "The controls are damped by 50 % towards 0, not towards their mean.",
        ),
        ("held at their mean activation", [], ""),
    ],
)
def test_controls_that_are_zeroed_beside_neurons_held_at_their_mean_are_said_to_be(edit, zeroed, said):
    controls = {
        kind: control((1.0, -2.0, 4.0), (-0.1, -0.2, -0.05), zero_ablated=kind in zeroed)
        for kind in ("random", "least_relevant", "largest_weights")
    }
    words = verdict(found(controls=controls), {"head": 30}, ablation=edit)
    assert words.endswith(f"do more than one more draw would. {said}".rstrip())
    assert ("their mean." in words) is bool(zeroed)


def test_every_control_that_can_be_planned_has_a_sentence():
    up = "model.layers.0.mlp.up_proj"
    neurons = NeuronList([Component(up, 0, -1.0)], least_relevant=[Component(up, 1, 0.0)])
    kinds = {variant.kind for variant in list_variants({"": neurons}, 1, controls=Controls(1))} - {"baseline", "pruned"}
    controls = {kind: control((1.0, -2.0, 4.0), (-0.1, -0.2, -0.05)) for kind in kinds}
    assert verdict(found(controls=controls), {"neuron": 30}).count("As many ") == len(kinds) == 3


def test_another_behavior_is_named_in_the_place_of_toxicity():
    for toxicity in (FELL, UNCLEAR):
        words = verdict(found(toxicity), {"neuron": 20}, "repetition")
        assert "repetition" in words
        assert "toxic" not in words


@pytest.mark.parametrize(
    ("changed", "end"), [(6, "(-9.0 to -1.0)."), (5, "(-9.0 to -1.0), which is no evidence.")], ids=["yes", "no"]
)
def test_the_preference_of_pairs_is_told_in_points_and_so_is_that_there_is_no_evidence(changed, end):
    change = replace(effect(*FELL, changed), before=0.6, after=0.55, difference=Interval(-0.05, -0.09, -0.01))
    words = verdict(replace(found(), preference=Preference(20, 0, effect=change)), {"neuron": 20})
    assert words.endswith(f"is the likelier one in 60.0 % before and 55.0 % after, -5.0 points {end}")
