"""The tables of the page, of the model card and of the terminal, and the dose curve as CSV."""

import csv
import dataclasses
import math
import re
from pathlib import Path

import pytest
from hand_written import NEURONS as NEURONS_BY_HAND
from hand_written import TOXICITY, judges, rows_of, windows_of
from helpers import replaced_at
from made_up import NEURONS, made_up, made_up_windows, settings, toxicity
from pages import CARD, by_name, percent, write

from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import PairMeasures, Preference, Results
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.tables import (
    agreement_of,
    behavior_table,
    control_table,
    dose_table,
    doses_csv,
    other_table,
)

pytestmark = pytest.mark.usefixtures("pictures_take_no_time")


def test_toxicity_is_before_after_change_interval_and_two_p_values():
    results, _ = made_up()
    rows = by_name(behavior_table(results, "toxic"))
    before = sum(toxicity("baseline", i, j) for i in range(12) for j in range(3)) / 36
    after = sum(toxicity("pruned", i, j) for i in range(12) for j in range(3)) / 36
    effect = results.effects["toxic"].behavior_mean
    tests = (f"{effect.sign_test_p:.3g}", f"{effect.permutation_test_p:.3g}")
    assert rows["Mean toxicity"][:2] == (f"{before:.4f}", f"{after:.4f}")
    assert rows["Mean toxicity"][2] == f"{100 * (after / before - 1):+.1f} %"
    assert rows["Mean toxicity"][2:] == (*percent(effect.percent), *tests)
    share = results.baseline.groups["toxic"].behavior_probability
    assert rows["Prompts with a toxic continuation"][0] == f"{100 * share:.1f} %"


def test_each_group_of_prompts_has_its_own_table():
    results, _ = made_up()
    before = sum(toxicity("baseline", i, j) for i in range(12, 18) for j in range(3)) / 18
    assert by_name(behavior_table(results, "nontoxic"))["Mean toxicity"][0] == f"{before:.4f}"
    page = write(results)
    assert page.tables[0][1:] == [list(row) for row in behavior_table(results, "toxic")]
    assert page.tables[1][1:] == [list(row) for row in behavior_table(results, "nontoxic")]
    assert "After 12 toxic prompts" in page.shown
    assert "After 6 non-toxic prompts" in page.shown


def test_the_other_judges_stand_below_the_headline_measure_by_measure():
    results, _ = made_up()
    rows = behavior_table(results, "toxic")
    assert [row[0] for row in rows[:4]] == [
        "Mean toxicity",
        "Mean toxicity, by other",
        "Expected maximum toxicity",
        "Expected maximum toxicity, by other",
    ]
    effect = results.judges["other"].effects["toxic"].behavior_mean
    before = sum(math.sqrt(toxicity("baseline", i, j)) for i in range(12) for j in range(3)) / 36
    assert rows[1][1:5] == (f"{before:.4f}", f"{effect.after:.4f}", *percent(effect.percent))


def test_page_and_card_tell_what_the_judges_are_and_how_far_they_agree():
    results, _ = made_up()
    page = write(results)
    assert page.tables[2] == [
        ["judge", "what it is", "its part", "scored", "not scored"],
        ["small", "a scorer: small", "the headline", f"{len(made_up()[1])}", "0"],
        ["other", "a scorer: other", "beside it", f"{len(made_up()[1])}", "0"],
    ]
    alpha, rho = results.agreement.krippendorff_alpha, results.agreement.spearman["small"]["other"]
    said = f"{results.agreement.num_scored} continuations with and without pruning were scored by both judges. "
    said += f"Krippendorff's alpha at interval level, over what two or more could score, is {alpha:.2f}; "
    said += f"correlations of ranks (Spearman), each over what both could score: small and other {rho:.2f}."
    assert said in page.words
    assert said in CARD.read_text()
    assert "Scored by “small” where no other judge is named" in page.words


def test_judges_of_which_one_scored_nothing_are_not_said_to_agree_over_what_all_of_them_scored():
    results, _ = made_up()
    rows = [{**row, "scores": {**row["scores"], "silent": None}} for row in rows_of(TOXICITY, lambda *_: 0.5)]
    variants = list_variants({"": NEURONS_BY_HAND}, 3)
    found = findings(rows, windows_of("baseline", "pruned"), variants, judges("some", "other", "silent"))
    said = agreement_of(dataclasses.replace(results, agreement=found.agreement, judges=found.judges))
    assert said.startswith("0 continuations with and without pruning were scored by all judges. ")
    assert f"over what two or more could score, is {found.agreement.krippendorff_alpha:.2f};" in said
    assert said.endswith("some and silent cannot be said; other and silent cannot be said.")
    assert "nan" not in said


def test_the_headline_is_of_another_judge_than_the_one_that_chose_the_neurons():
    results, rows = made_up(choosers=("small",))
    table = behavior_table(results, "toxic")
    assert [row[0] for row in table[:2]] == ["Mean toxicity", "Mean toxicity, by small (chose the neurons)"]
    plain = behavior_table(made_up()[0], "toxic")
    assert [row[1:] for row in table[:2]] == [plain[1][1:], plain[0][1:]]
    page = write(results, rows)
    assert [row[2] for row in page.tables[2][1:]] == ["chose the neurons", "the headline"]
    assert "Scored by “other”" in page.words
    assert "judges them" not in page.words
    assert "by small (chose the neurons)" in summary_table(results)


@pytest.mark.parametrize("second", [False, True])
def test_where_every_judge_chose_the_neurons_page_and_card_say_that_the_chooser_judges(second):
    results, rows = made_up(second=second, choosers=("small", "other"))
    others = "every judge had a part in the choice" if second else "no other judge was asked"
    page = write(results, rows)
    assert page.words.count(f"The scorer that chose the neurons, 'small', judges them: {others}.") == 2
    assert f"The scorer that chose the neurons, 'small', judges them: {others}." in CARD.read_text().replace("\\", "")


def test_with_one_judge_nothing_speaks_of_others():
    results, rows = made_up(second=False)
    assert len(behavior_table(results, "toxic")) == 3
    for text in (write(results, rows).words, CARD.read_text(), summary_table(results)):
        assert "judge" not in text
        assert "Krippendorff" not in text
        assert "by small" not in text.replace("Scored by", "").replace("scorer", "")


def test_the_controls_stand_beside_the_chosen_neurons():
    results, _ = made_up()
    rows = by_name(control_table(results))
    assert list(rows) == [
        "The 2 chosen",
        "Random neurons",
        "Least relevant neurons",
        "Neurons with the largest weights",
    ]
    assert rows["The 2 chosen"][:4] == by_name(behavior_table(results, "toxic"))["Mean toxicity"][:4]
    outcome = results.controls["random"].outcome
    # A control was continued twice, so it is compared with the first two continuations of the original.
    before = sum(toxicity("baseline", i, j) for i in range(12) for j in range(2)) / 24
    after = sum(toxicity(f"random_{k}", i, j) for k in range(2) for i in range(12) for j in range(2)) / 48
    pruned = sum(toxicity("pruned", i, j) for i in range(12) for j in range(2)) / 24
    change, interval, price, draws, further, its = rows["Random neurons"][2:]
    assert rows["Random neurons"][:2] == (f"{before:.4f}", f"{after:.4f}")
    assert (change, interval) == percent(outcome.effect_percent)
    assert price == f"{outcome.perplexity_percent:+.1f} %"
    assert draws == f"{outcome.num_draws_with_evidence} of 2"
    assert further == f"{pruned - after:+.4f}"
    assert its == f"{outcome.pruned_less_control.low:+.4f} to {outcome.pruned_less_control.high:+.4f}"
    assert write(results).tables[3][1:] == [list(row) for row in control_table(results)]


def test_the_card_of_damped_neurons_does_not_say_that_their_weights_are_zero():
    damped = dataclasses.replace(NEURONS, neurons=[dataclasses.replace(n, damping=0.5) for n in NEURONS.neurons])
    write(neurons=damped)
    card = CARD.read_text()
    assert "# A-Model with 2 neurons damped by 50 %" in card
    assert "were damped by 50 %. The base model" in card
    assert "zero" not in card.partition("## How it was made")[2]


def test_a_control_of_fewer_neurons_says_of_how_many():
    results, _ = made_up()
    draws = [dataclasses.replace(draw, num_neurons=1) for draw in results.controls["random"].draws]
    results = replaced_at(results, "controls/random/draws", draws)
    assert list(by_name(control_table(results)))[1:3] == ["Random neurons, 1 alone", "Least relevant neurons"]


def test_a_control_of_which_nothing_was_scored_is_a_row_of_dashes():
    results, rows = made_up()
    control = results.controls["random"]
    draws = [dataclasses.replace(draw, effect=None) for draw in control.draws]
    results = replaced_at(results, "controls/random", dataclasses.replace(control, draws=draws, outcome=None))
    assert set(by_name(control_table(results))["Random neurons"]) == {"-"}
    write(results, rows)


def test_everything_else_is_perplexity_divergence_variety_and_zero_shot_accuracy():
    results, _ = made_up()
    accuracies = {name: {"piqa": {"accuracy": a}} for name, a in (("baseline", 0.5), ("pruned", 0.25))}
    results = replaced_at(results, "zero_shot", accuracies)
    rows = by_name(other_table(results))
    change = percent(results.perplexity_change["sliding"])
    assert rows["Perplexity"] == (f"{math.exp(2.3):.2f}", f"{math.exp(2.38):.2f}", *change)
    assert rows["Perplexity, disjoint windows"][:2] == (f"{math.exp(2.4):.2f}", f"{math.exp(2.48):.2f}")
    assert rows["KL to the original, nats a token"] == ("-", "0.0400", "", "")
    assert rows["Failed continuations"] == ("0", "0", "", "")
    assert rows["Zero-shot accuracy, piqa"] == ("50.0 %", "25.0 %", "", "")
    assert write(results).tables[4][1:] == [list(row) for row in other_table(results)]


def test_the_table_of_the_terminal_is_aligned_and_has_both_groups():
    results, _ = made_up()
    lines = summary_table(results).splitlines()
    assert re.split(r"  +", lines[0].strip()) == ["before", "after", "change", "95 % interval"]
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == len(lines[0])
    rows = by_name([re.split(r"  +", line) for line in lines[2:]])
    assert rows["Mean toxicity, toxic prompts"] == behavior_table(results, "toxic")[0][1:5]
    judged = [re.split(r"  +", line.strip()) for line in lines if line.startswith("  by other  ")]
    assert [tuple(row[1:]) for row in judged] == [behavior_table(results, of)[1][1:5] for of in ("toxic", "nontoxic")]
    assert lines.index(next(line for line in lines if line.startswith("  by other"))) == 3
    assert rows["Perplexity"] == other_table(results)[0][1:]


def test_one_group_needs_no_name():
    results, rows = made_up(num_nontoxic=0)
    assert "\nMean toxicity  " in summary_table(results)
    assert "non-toxic" not in write(results, rows).words


def test_a_model_alone_has_a_table_without_after():
    results, rows = made_up()
    windows = {"baseline": {"sliding": made_up_windows(0.0, 0)}}
    found = findings(
        [row for row in rows if row["model"] == "baseline"], windows, list_variants({}, 3), judges("small")
    )
    alone = Results(verdict="", **vars(found), **vars(settings(["small"])))
    rows = by_name(behavior_table(alone, "toxic"))
    assert rows["Mean toxicity"] == (behavior_table(results, "toxic")[0][1], "", "", "", "", "")
    assert by_name(other_table(alone))["Perplexity"] == (f"{math.exp(2.3):.2f}", "", "", "")
    assert "Mean toxicity" in summary_table(alone)


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_what_is_not_known_is_a_dash_in_every_table_and_the_page_is_written(unknown):
    results, rows = made_up()
    nothing = Interval(unknown, unknown, unknown)
    for path, to in (
        ("effects/toxic/behavior_mean/percent", nothing),
        ("judges/other/effects/toxic/behavior_mean/percent", nothing),
        ("effects/nontoxic/behavior_mean", None),
        ("baseline/groups/nontoxic/behavior_mean", unknown),
        ("perplexity_change/sliding", nothing),
        ("pruned/perplexity/sliding/value", unknown),
        ("pruned/kl", unknown),
        ("controls/random/outcome/perplexity_percent", unknown),
        ("controls/random/outcome/effect_percent", nothing),
        ("controls/least_relevant/draws/0/perplexity_percent", nothing),
        ("agreement/krippendorff_alpha", unknown),
        ("agreement/spearman/small/other", unknown),
        ("common_random_numbers_variance_factor", unknown),
        ("doses/1/effect", None),
        ("doses/2/perplexity", unknown),
        ("doses/2/perplexity_percent", nothing),
        ("doses/2/effect/percent", nothing),
    ):
        results = replaced_at(results, path, to)
    assert behavior_table(results, "toxic")[0][3:5] == ("-", "-")
    assert behavior_table(results, "toxic")[1][3:5] == ("-", "-")
    assert behavior_table(results, "nontoxic")[0][1:] == ("-", behavior_table(results, "nontoxic")[0][2], *[""] * 4)
    assert by_name(other_table(results))["Perplexity"][1:] == ("-", "-", "-")
    assert by_name(other_table(results))["KL to the original, nats a token"] == ("-", "-", "", "")
    assert by_name(control_table(results))["Random neurons"][2:5] == ("-", "-", "-")
    page = write(results, rows)
    for text in (page.shown, page.hidden, CARD.read_text(), doses_csv(results.doses), summary_table(results)):
        assert not re.search(r"\b(nan|inf|None)\b", text.replace('"nontoxic_source": null', ""))


def test_an_interval_without_an_end_cannot_be_said():
    results, rows = made_up()
    for ends in ((-90.0, math.nan), (-90.0, math.inf), (math.nan, math.nan)):
        results = replaced_at(results, "effects/toxic/behavior_mean/percent", Interval(-60.0, *ends))
        assert behavior_table(results, "toxic")[0][3:5] == ("-60.0 %", "cannot be said")
        assert by_name(control_table(results))["The 2 chosen"][2:4] == ("-60.0 %", "cannot be said")
    results = replaced_at(results, "doses/0/effect/percent", Interval(-60.0, math.nan, math.nan))
    assert ("-60.0 %", "cannot be said") in [row[3:5] for row in dose_table(results.doses)]
    page = write(results, rows)
    assert "cannot be said" in page.words
    assert "cannot be said" in summary_table(results)


# The dose curve


def test_doses_are_in_order_of_strength_and_number():
    results, _ = made_up()
    rows = dose_table(results.doses)
    assert [row[:2] for row in rows] == [("1", "1"), ("2", "1"), ("3", "1"), ("1", "0.5"), ("3", "0.5")]
    pruned = next(dose for dose in results.doses if dose.name == "pruned")
    assert rows[1][2] == f"{pruned.behavior_mean:.4f}"
    assert rows[1][3:5] == percent(pruned.behavior_percent)
    assert rows[1][5:] == (f"{pruned.perplexity:.2f}", *percent(pruned.perplexity_percent))


def test_the_csv_of_doses_holds_what_results_hold():
    results, _ = made_up()
    write(results)
    with Path("out/doses.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_key = {(dose.num_neurons, dose.damping): dose for dose in results.doses}
    assert len(rows) == len(by_key) == 5
    for row in rows:
        dose = by_key[int(row["num_neurons"]), float(row["damping"])]
        for name in ("perplexity", "behavior_mean", "kl"):
            assert float(row[name]) == getattr(dose, name)
        for name in ("perplexity_percent", "behavior_percent"):
            change = getattr(dose, name)
            assert [float(row[name + end]) for end in ("", "_low", "_high")] == [change.value, change.low, change.high]


def test_without_controls_and_doses_the_page_has_neither():
    results, rows = made_up(others=False)
    page = write(results, rows)
    assert not Path("out/doses.csv").exists()
    assert not Path("out/doses.png").exists()
    assert "Would other neurons" not in page.words
    assert "Doses as a table" not in page.words
    assert len(page.tables) == 5
    assert len(page.links) == 4
    card = CARD.read_text()
    assert "other neurons" not in card
    assert "more neurons" not in card


def test_the_preference_of_pairs_stands_below_with_its_change():
    results, _ = made_up()
    effect = results.main_effect
    found = Preference(7, 0, PairMeasures(0.625, 1.5), PairMeasures(0.5, 1.25))
    for more in ({}, {"effect": effect, "margin_effect": effect}):
        table = other_table(replaced_at(results, "preference", dataclasses.replace(found, **more)))
        row = by_name(table)["Stereotype preferred, of 7 pairs"]
        assert row[:2] == ("62.5 %", "50.0 %")
        assert row[2:] == (behavior_table(results, "toxic")[0][3:5] if more else ("", ""))
        margin = by_name(table)["Log-likelihood of the stereotype less the other's, nats"]
        assert margin[:2] == ("1.500", "1.250")
        assert margin[2] == (f"{effect.difference.value:+.3f}" if more else "")
        assert margin[3].endswith(" nats") == bool(more)
    table = other_table(replaced_at(results, "preference", dataclasses.replace(found, pruned=None)))
    assert by_name(table)["Stereotype preferred, of 7 pairs"][1] == ""
