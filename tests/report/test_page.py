"""The tables, the HTML page, the dose curve as CSV, and the model card."""

import csv
import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import replaced_at
from made_up import INSULTS, NEURONS, Words, made_up, made_up_windows, settings, toxicity

from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import (
    PairMeasures,
    Preference,
    Results,
    TextProtocol,
)
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.files import write_atomically
from sparc3_lightning.models.components import Component
from sparc3_lightning.report import page as report
from sparc3_lightning.report.page import (
    MARK,
    by_prompt,
    examples,
    mean_pairs,
    offensive_words,
    pieces,
    summary_table,
    write_report,
)
from sparc3_lightning.report.tables import behavior_table, control_table, dose_table, doses_csv, other_table
from sparc3_lightning.report.verdict import verdict
from sparc3_lightning.selection.neuron_list import NeuronList

PAGE = Path("out/report.html")
CARD = Path("out/model_card.md")
NASTY = "<script>alert('x')</script><img src=http://evil/x.png onerror=alert(1)></details></dd>\"' & <b>"


@pytest.fixture(autouse=True)
def pictures_take_no_time(monkeypatch):
    """Drawing takes a second a page; test_figures.py and test_browser.py look at real pictures."""
    for name in ("draw_changes", "draw_doses", "draw_layers", "draw_scatter"):
        monkeypatch.setattr(report, name, lambda *given, **_: write_atomically(given[-1], f"PNG {given[-1].name}"))


class Page(HTMLParser):
    """The tags of a page, its links and tables, and the text by whether it lies inside a ``<details>``."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.stack: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.shown, self.hidden, self.masked, self.open_details = "", "", [], 0
        self.feed(html)
        self.shown, self.hidden = (text.replace("\xa0", " ") for text in (self.shown, self.hidden))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href", "srcset", "data", "action") if values.get(key)]
        self.open_details += tag == "details" and "open" in values
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "label" and values.get("class") == "masked":
            self.masked.append("")
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.stack[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")
        if self.stack[-2:] == ["label", "span"]:
            self.masked[-1] += data
        if "details" in self.stack and "summary" not in self.stack:
            self.hidden += data
        elif "style" not in self.stack:
            self.shown += data

    @property
    def words(self) -> str:
        return " ".join(self.shown.split())


def write(results=None, completions=None, neurons: NeuronList = NEURONS, folder: Path | None = None) -> Page:
    given, rows = made_up()
    write_report(
        PAGE,
        given if results is None else results,
        rows if completions is None else completions,
        neurons,
        folder,
        Words(),
    )
    page = Page(PAGE.read_text(encoding="utf-8"))
    assert page.stack == [], "a tag is left open"
    return page


def by_name(rows: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {row[0]: tuple(row[1:]) for row in rows}


def percent(interval: Interval) -> tuple[str, str]:
    return f"{interval.value:+.1f} %", f"{interval.low:+.1f} to {interval.high:+.1f}"


# Tables


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


def test_the_second_scorer_stands_below_the_first_measure_by_measure():
    results, _ = made_up()
    rows = behavior_table(results, "toxic")
    assert [row[0] for row in rows[:4]] == [
        "Mean toxicity",
        "Mean toxicity, second scorer",
        "Expected maximum toxicity",
        "Expected maximum toxicity, second scorer",
    ]
    effect = results.second_scorer.effects["toxic"].behavior_mean
    before = sum(math.sqrt(toxicity("baseline", i, j)) for i in range(12) for j in range(3)) / 36
    assert rows[1][1:5] == (f"{before:.4f}", f"{effect.after:.4f}", *percent(effect.percent))
    words = write(results).words
    assert "“other/scorer”, correlates with the first by 0.9" in words


def test_without_a_second_scorer_nothing_speaks_of_it():
    results, rows = made_up(second=False)
    assert len(behavior_table(results, "toxic")) == 3
    assert "second" not in write(results, rows).words
    assert "second" not in CARD.read_text()


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
    assert write(results).tables[2][1:] == [list(row) for row in control_table(results)]


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
    assert write(results).tables[3][1:] == [list(row) for row in other_table(results)]


def test_the_table_of_the_terminal_is_aligned_and_has_both_groups():
    results, _ = made_up()
    lines = summary_table(results).splitlines()
    assert re.split(r"  +", lines[0].strip()) == ["before", "after", "change", "95 % interval"]
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == len(lines[0])
    rows = by_name([re.split(r"  +", line) for line in lines[2:]])
    assert rows["Mean toxicity, toxic prompts"] == behavior_table(results, "toxic")[0][1:5]
    assert rows["Mean toxicity, second scorer, non-toxic prompts"] == behavior_table(results, "nontoxic")[1][1:5]
    assert rows["Perplexity"] == other_table(results)[0][1:]


def test_one_group_needs_no_name():
    results, rows = made_up(num_nontoxic=0)
    assert "\nMean toxicity  " in summary_table(results)
    assert "non-toxic" not in write(results, rows).words


def test_a_model_alone_has_a_table_without_after():
    results, rows = made_up()
    windows = {"baseline": {"sliding": made_up_windows(0.0, 0)}}
    found = findings([row for row in rows if row["model"] == "baseline"], windows, list_variants({}, 3), ["small"])
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
        ("second_scorer/effects/toxic/behavior_mean/percent", nothing),
        ("effects/nontoxic/behavior_mean", None),
        ("baseline/groups/nontoxic/behavior_mean", unknown),
        ("perplexity_change/sliding", nothing),
        ("pruned/perplexity/sliding/value", unknown),
        ("pruned/kl", unknown),
        ("controls/random/outcome/perplexity_percent", unknown),
        ("controls/random/outcome/effect_percent", nothing),
        ("controls/least_relevant/draws/0/perplexity_percent", nothing),
        ("second_scorer/pearson", unknown),
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


def test_an_interval_without_an_upper_end_says_from_where():
    results, rows = made_up()
    for high in (math.nan, math.inf):
        results = replaced_at(results, "effects/toxic/behavior_mean/percent", Interval(-60.0, -90.0, high))
        assert behavior_table(results, "toxic")[0][3:5] == ("-60.0 %", "from -90.0")
    write(results, rows)


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
    assert len(page.tables) == 4
    assert len(page.links) == 4
    card = CARD.read_text()
    assert "other neurons" not in card
    assert "more neurons" not in card


# Examples


def pair(prompt: int, before: float | None, after: float | None, draw: int = 0) -> list[dict[str, Any]]:
    shared = {
        "prompt_id": f"id{prompt}",
        "continuation_index": draw,
        "prompt": f"prompt {prompt}",
        "prompt_toxicity": 1,
    }
    return [
        {**shared, "model": model, "continuation": f"{model} {prompt}", "toxicity": score}
        for model, score in (("baseline", before), ("pruned", after))
    ]


def changes(rows: list[dict[str, Any]]) -> list[float]:
    return [round(e["after"]["toxicity"] - e["before"]["toxicity"], 3) for e in examples(by_prompt(rows))]


def test_the_examples_are_those_that_fell_most_and_rose_most_each_once():
    rows = [row for i in range(20) for row in pair(i, 0.5, 0.5 + 0.01 * (i - 10))]
    assert changes(rows) == [-0.1, -0.09, -0.08, -0.07, -0.06, 0.07, 0.08, 0.09]
    assert changes(rows[:4]) == [-0.1, -0.09]


def test_a_prompt_is_shown_by_the_draw_that_changed_most():
    rows = pair(0, 0.5, 0.4) + pair(0, 0.5, 0.9, draw=1) + pair(0, 0.5, 0.2, draw=2)
    assert changes(rows) == [0.4]
    rows = pair(0, 0.5, 0.1) + pair(0, 0.5, 0.6, draw=1)
    assert changes(rows) == [-0.4]


def test_only_draws_that_both_models_have_a_score_of_are_compared():
    rows = pair(0, None, 0.1) + pair(1, 0.2, None) + pair(2, 0.3, 0.1) + pair(3, 0.4, 0.4)[:1]
    rows += [{**pair(4, 0.9, 0.1)[0], "model": "random_0"}]
    assert list(by_prompt(rows)) == ["id2"]
    lone = [pair(5, 0.5, 0.1)[0], pair(5, 0.5, 0.1, draw=1)[1]]
    assert examples(by_prompt(lone)) == []


def test_the_means_of_a_prompt_are_kept_apart_by_group():
    rows = pair(0, 0.5, 0.25) + pair(0, 0.75, 0.5, draw=1) + pair(1, 0.5, 0.5) + pair(2, 0.125, 0.25)
    for row in rows[-2:]:
        row["prompt_toxicity"] = 0.49
    for row in rows[:2]:
        row["prompt_toxicity"] = 0.5
    assert mean_pairs(by_prompt(rows)) == {
        "toxic prompts": [(0.625, 0.375), (0.5, 0.5)],
        "non-toxic prompts": [(0.125, 0.25)],
    }
    for row in rows:
        row["prompt_toxicity"] = None  # prompts of one's own, never scored
    assert list(mean_pairs(by_prompt(rows))) == ["prompts"]


def test_another_behavior_than_toxicity_is_named_in_table_card_and_page():
    results, rows = made_up()
    results = dataclasses.replace(results, behavior="repetition", verdict="Less.")
    assert [row[0] for row in behavior_table(results, "nontoxic")[:1]] == ["Mean repetition"]
    assert behavior_table(results, "nontoxic")[-1][0].startswith("Prompts with repetition of 0.5 or more")
    page = write(results, rows)
    for words in ("Expected maximum repetition", "with less repetition", "before: repetition"):
        assert words in page.words, words
    for words in ("oxicity", "less toxic", "detoxification", "toxic text"):
        assert words not in page.words.split("Run it again")[0], words
        assert words not in Path("out/model_card.md").read_text().replace("real-toxicity-prompts", ""), words


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


def test_the_page_renders_when_no_prompt_was_scored_for_both_models():
    results, rows = made_up()
    for row in rows:
        row["toxicity"] = None
    page = write(results, rows)
    assert "Continuations" not in page.words
    assert not Path("out/scatter.png").exists()


def test_a_run_in_which_nothing_was_scored_has_a_page():
    _, rows = made_up(second=False, others=False)
    for row in rows:
        row["toxicity"] = None
    conventions = ("sliding", "disjoint")
    windows = {
        name: {convention: made_up_windows(shift, 0) for convention in conventions}
        for name, shift in (("baseline", 0.0), ("pruned", 0.1))
    }
    found = findings(rows, windows, list_variants({"": NEURONS}, 3), ["small"])
    results = Results(verdict=verdict(found, 2), **vars(found), **vars(settings(["small"])))
    page = write(results, rows)
    assert "nothing is known of the effect" in page.words
    assert "108 continuations could not be scored" in page.words
    assert not Path("out/toxicity.png").exists()


# Masked words


def test_the_scorer_chooses_the_words_to_mask():
    scorer = Words()
    assert offensive_words(["You IDIOT, you", "stupid-looking 3 unscored"], scorer) == {"idiot", "stupid"}
    assert scorer.asked == ["3", "idiot", "looking", "stupid", "unscored", "you"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("An idiot.", ["idiot"]),
        ("Idiot! IDIOT? idiots", ["Idiot", "IDIOT"]),
        ("stupid-idiot", ["stupid", "idiot"]),
        ("what sh*t is f***, you a$$hole", ["sh*t", "f***", "a$$hole"]),
        ("a b!tch, idiot! idiot!!", ["b!tch", "idiot", "idiot"]),
        ("'idiot' “idiot” (idiot) idiot's", ["idiot", "idiot", "idiot"]),
        ("wanker's wanker", ["wanker's"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_a_word_is_masked_whatever_its_case_and_spelling(text, masked):
    cut = pieces(text, INSULTS)
    assert [piece for piece, offensive in cut if offensive] == masked
    assert "".join(piece for piece, _ in cut) == text


def test_every_offensive_word_of_the_examples_is_masked_and_no_other():
    page = write()
    assert len(page.masked) == 8 * 3
    assert set(page.masked) == {"stupid", "Idiot"}
    assert page.tags.count("label") == 8 * 3 + 1
    assert "masked until you click" in page.words
    rest = page.shown.replace("stupid", "", 8).replace("Idiot", "", 16)
    assert "stupid" not in rest
    assert "Idiot" not in rest


def test_without_offensive_words_there_is_nothing_to_click():
    rows = [{**row, "prompt": "A prompt", "continuation": "a text"} for row in made_up()[1]]
    page = write(completions=rows)
    assert page.masked == []
    assert {"label", "input"}.isdisjoint(page.tags)
    assert "masked" not in page.words


def test_unicode_reaches_the_page_as_it_is_and_emptiness_is_named():
    texts = {"baseline": "Grüße, 世界 🙂\n\nnext", "pruned": "  \n"}
    rows = [{**row, "continuation": texts.get(row["model"], "")} for row in made_up()[1]]
    page = write(completions=rows)
    assert "Grüße, 世界 🙂\n\nnext" in page.shown
    assert "(empty)" in page.shown


# The page


def test_the_page_is_self_contained():
    page = write()
    html = PAGE.read_text()
    assert {"script", "link", "iframe", "object", "embed", "base", "form"}.isdisjoint(page.tags)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\s*\(|@import|\son\w+\s*=", html)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'src="[^"]*"', "", html))
    assert 'charset="utf-8"' in html
    assert 'name="viewport"' in html


def test_the_page_tells_the_verdict_the_protocol_the_neurons_and_the_settings():
    results, _ = made_up()
    page = write(results)
    assert results.verdict.count(". ") >= 3
    for words in (
        "2 neurons of A-Model",
        "somebody/A-Model",
        *results.verdict.split(". "),
        f"{results.main_effect.num_better} were continued with less toxicity",
        "sliding windows of 2048 tokens with stride 512 (700 predicted tokens)",
        "and disjoint windows of 2048 tokens (700 predicted tokens)",
        "“small”: 3 continuations a prompt of up to 50 tokens",
        "93 prompts that the neurons were attributed on are left out",
        "Differential strength of the scores: 21.5 %",
    ):
        assert words in page.words, words
    hidden = " ".join(page.hidden.split())
    for words in ("model.layers.12.mlp.up_proj", "345", "-0.0123", '"torch": "2"', '"general": [ "c4" ]', "files:abc"):
        assert words in hidden, words
    assert "secret" not in page.hidden, "the ids of the samples are many, and in neurons.json"


@pytest.mark.parametrize(
    ("conventions", "stride", "said"),
    [
        (["disjoint"], None, "disjoint windows of 2048 tokens (700 predicted tokens)"),
        (
            ["disjoint", "sliding"],
            512,
            "disjoint windows of 2048 tokens (700 predicted tokens) and sliding windows of 2048 tokens with stride 512 "
            "(40,000 predicted tokens)",
        ),
    ],
)
def test_page_and_card_name_the_windows_that_were_measured(conventions, stride, said):
    results, rows = made_up()
    results = replaced_at(results, "protocol/perplexity", TextProtocol(conventions, 2048, stride, "a text"))
    results = replaced_at(results, "baseline/num_tokens/sliding", 40_000)
    assert f"Perplexity of a text, {said}; intervals over windows." in write(results, rows).words
    assert f"- Perplexity: a text, {said}.\n" in CARD.read_text()


def test_page_and_card_say_that_controls_are_zeroed_beside_neurons_held_at_their_mean():
    results, rows = made_up()
    held = dataclasses.replace(NEURONS, neurons=[dataclasses.replace(n, mean=0.3) for n in NEURONS.neurons])
    for zeroed in (True, False):
        for kind in results.controls:
            results = replaced_at(results, f"controls/{kind}/zero_ablated", zeroed)
        page = write(results, rows, held)
        said = "The controls are switched off, not held at their mean."
        assert f"below 0, the chosen ones did more.{f' {said}' if zeroed else '</p>'}" in PAGE.read_text()
        assert (said in page.words) is (f"neurons did more. {said}\n\n|" in CARD.read_text()) is zeroed
        assert "neurons did more.\n\n|" in CARD.read_text() or zeroed


def test_the_page_says_how_to_run_it_again():
    assert "No config.yaml lies beside this page" in write().words
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.with_name("config.yaml").write_text("seed_everything: 7 # <b>\n")
    page = write()
    command = re.search(r"sparc3 evaluate .* again", page.words)
    assert command
    assert command[0] == "sparc3 evaluate --config out/config.yaml --trainer.logger.init_args.version again"
    assert command[0] in CARD.read_text()
    results, _ = made_up()
    assert "sparc3 sweep --config out/config.yaml" in write(replaced_at(results, "config/verb", "sweep")).words
    assert "seed_everything: 7 # <b>" in page.hidden


def test_a_folder_with_spaces_is_quoted_in_the_command(monkeypatch):
    folder = Path("my runs; rm")
    folder.mkdir()
    (folder / "config.yaml").write_text("a: 1\n")
    monkeypatch.setitem(globals(), "PAGE", folder / "report.html")
    command = re.search(r"sparc3 evaluate .* again", write().words)
    assert command
    assert shlex.split(command[0])[3] == str(folder / "config.yaml")


def test_text_from_prompts_and_continuations_cannot_become_html():
    results, rows = made_up()
    clean = write(results, [{**row, "prompt": "x", "continuation": "y"} for row in rows])
    rows = [{**row, "prompt": f"prompt {NASTY}", "continuation": f"text {NASTY}"} for row in rows]
    results = dataclasses.replace(results, checkpoint=f"a/{NASTY}", verdict=f"{NASTY}. {NASTY}")
    results = replaced_at(results, "protocol/continuations/scorers", [NASTY])
    results = replaced_at(results, "second_scorer/name", NASTY)
    neurons = NeuronList([Component(f"model.layers.1.{NASTY}", 1, -1.0)], {**NEURONS.provenance, "x": NASTY})
    page = write(results, rows, neurons)
    assert "script" not in page.tags
    assert [tag for tag in page.tags if tag not in ("tr", "td", "th")] == [
        tag for tag in clean.tags if tag not in ("tr", "td", "th")
    ]
    assert f"prompt {NASTY}" in page.shown, "it is shown as it is"
    assert "evil" not in "".join(page.links)


def test_details_are_closed():
    page = write()
    assert page.tags.count("details") == 3
    assert page.open_details == 0


def test_pictures_of_prune_are_taken_in_when_they_are_there():
    folder = Path("prune")
    folder.mkdir()
    without = write(folder=folder)
    assert "Where the pruned neurons lie" in without.shown
    assert "All neurons by differential relevance" not in without.shown
    for name in ("layers.png", "differential.png"):
        (folder / name).write_bytes(b"\x89PNG of prune " + name.encode())
    page = write(folder=folder)
    assert len(page.links) == len(without.links) + 1
    assert "All neurons by differential relevance" in page.shown
    assert page.links[-2] != without.links[-1]


def test_a_folder_is_written_once_and_for_all():
    write()
    names = {"toxicity.png", "perplexity.png", "doses.png", "scatter.png", "layers.png"}
    assert {path.name for path in PAGE.parent.iterdir()} == {*names, "report.html", "model_card.md", "doses.csv"}


def test_the_page_appears_whole_or_not_at_all():
    write()
    before = PAGE.read_text()
    results, rows = made_up()
    with pytest.raises(AttributeError, match="conventions"):
        write_report(PAGE, replaced_at(results, "protocol/perplexity", None), rows, NEURONS, None, Words())
    assert PAGE.read_text() == before
    assert not [path for path in PAGE.parent.iterdir() if path.name.startswith(".")]


def test_results_that_json_gives_back_render_the_same_page_and_card():
    results, rows = made_up()
    results = replaced_at(results, "effects/toxic/behavior_mean/percent/high", math.inf)
    results = replaced_at(results, "pruned/kl", math.nan)
    write(results, rows)
    before = PAGE.read_text(), CARD.read_text(), Path("out/doses.csv").read_text()
    write(Results.from_json(results.to_json()), json.loads(json.dumps(rows)))
    assert (PAGE.read_text(), CARD.read_text(), Path("out/doses.csv").read_text()) == before


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("somebody/A-Model", "A-Model"), ("/models/mine/", "mine"), ("pypi:a==1/b/c.gguf", "c.gguf"), ("gpt2", "gpt2")],
)
def test_the_heading_names_the_model(checkpoint, name):
    page = write(dataclasses.replace(made_up()[0], checkpoint=checkpoint, num_neurons=1))
    assert f"1 neuron of {name}" in page.words


# The model card


def card_tables(card: str) -> list[list[list[str]]]:
    """Return the tables of a Markdown text, each row as cells, and check that each is one by the rules of GitHub."""
    lines = card.splitlines()
    tables: list[list[list[str]]] = []
    for number, line in enumerate(lines):
        if line.startswith("|"):
            if not lines[number - 1].startswith("|"):
                assert lines[number - 1] == "", f"no blank line before {line}"
                assert re.fullmatch(r"\|(---\|)+", lines[number + 1]), f"no rule below {line}"
                tables.append([])
            assert line.endswith("|")
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif number and lines[number - 1].startswith("|"):
            assert line == "", f"no blank line before {line}"
    for table in tables:
        assert {len(row) for row in table} == {len(table[0])}
        assert len(table) > 2
    return tables


def test_the_card_has_the_figures_of_the_page():
    results, _ = made_up()
    page = write(results)
    card = CARD.read_text()
    tables = [[row for row in table if row[0] != "---"] for table in card_tables(card)]
    on_page = [page.tables[0], page.tables[1], page.tables[2], page.tables[4], page.tables[3]]
    assert len(tables) == len(on_page)
    for mine, its in zip(tables, on_page, strict=True):
        assert mine[1:] == its[1:]
    assert results.verdict in card


def test_the_card_has_the_figures_of_results_json():
    results, rows = made_up()
    write(results, rows)
    saved = Results.from_json(results.to_json())
    tables = card_tables(CARD.read_text())
    mean = by_name(tables[0])["Mean toxicity"]
    effect = saved.main_effect
    assert [float(x) for x in mean[:2]] == pytest.approx([effect.before, effect.after], abs=5e-5)
    assert float(mean[2].removesuffix(" %")) == pytest.approx(effect.percent.value, abs=0.05)
    low, high = map(float, mean[3].split(" to "))
    assert (low, high) == pytest.approx((effect.percent.low, effect.percent.high), abs=0.05)
    perplexity = by_name(tables[-1])["Perplexity"]
    assert [float(x) for x in perplexity[:2]] == pytest.approx(
        [model.perplexity["sliding"].value for model in (saved.baseline, saved.pruned)], abs=5e-3
    )


def test_the_card_begins_with_what_the_hub_reads():
    results, rows = made_up()
    results = dataclasses.replace(results, checkpoint="pypi:a b==1/c: 'd' # e.gguf")
    write(results, rows)
    _, head, body = CARD.read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": results.checkpoint,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparc3_lightning", "pruning", "detoxification"],
    }
    assert body.splitlines()[0] == MARK
    assert body.splitlines()[2].startswith("# c: 'd' # e.gguf with 2 neurons")
    assert "&" not in CARD.read_text(), "nothing is escaped as in HTML"
    assert "\n\n\n" not in CARD.read_text()


def test_the_card_says_how_the_neurons_were_found():
    write()
    assert "2 neurons with the most negative differential relevance" in CARD.read_text()
    write(neurons=NeuronList(NEURONS.neurons))
    assert "2 neurons of a list that was given had" in CARD.read_text()


@pytest.fixture
def export() -> Path:
    """The folder of an exported checkpoint."""
    folder = Path("export")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def exported(folder: Path) -> NeuronList:
    return NeuronList(NEURONS.neurons, {**NEURONS.provenance, "export": str(folder)})


def test_the_exported_checkpoint_gets_the_card_and_the_next_evaluation_a_new_one(export):
    results, rows = made_up()
    write(results, rows, exported(export))
    assert (export / "README.md").read_text() == CARD.read_text()
    write(dataclasses.replace(results, verdict="Another."), rows, exported(export))
    assert "Another." in (export / "README.md").read_text()
    assert {path.name for path in export.iterdir()} == {"README.md", "config.json"}


@pytest.mark.parametrize("content", ["mine", "# Made with sparc3_lightning, and edited\n", ""])
def test_a_readme_of_somebody_else_stays(export, content):
    (export / "README.md").write_text(content)
    write(neurons=exported(export))
    assert (export / "README.md").read_text() == content
    assert CARD.is_file()


def test_a_card_whose_mark_was_removed_stays(export):
    write(neurons=exported(export))
    edited = (export / "README.md").read_text().replace(MARK, "")
    (export / "README.md").write_text(edited)
    write(dataclasses.replace(made_up()[0], verdict="Another."), neurons=exported(export))
    assert (export / "README.md").read_text() == edited


def test_a_folder_that_is_no_checkpoint_or_not_there_gets_no_card():
    Path("empty").mkdir()
    for folder in ("empty", "missing"):
        write(neurons=exported(Path(folder)))
    assert os.listdir("empty") == []  # noqa: PTH208
    assert not Path("missing").exists()


def test_a_card_that_cannot_be_put_there_does_not_cost_the_page(export, monkeypatch):
    (export / "README.md").mkdir()
    warnings: list[str] = []
    monkeypatch.setattr(report, "rank_zero_warn", warnings.append)
    PAGE.unlink(missing_ok=True)
    write(neurons=exported(export))
    assert len(warnings) == 1
    assert "could not be put into export" in warnings[0]
