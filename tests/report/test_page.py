"""The HTML page: what it tells, that it is self-contained, and that nothing in it can become HTML by accident."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hand_written import judges
from helpers import replaced_at
from made_up import NEURONS, SELECTION, SELECTION_OF_NEURONS, made_up, made_up_windows, renamed, settings
from pages import CARD, PAGE, reported, write

from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.results import Results, TextProtocol
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.models.components import Component
from sparc3_lightning.report.page import write_report
from sparc3_lightning.report.tables import behavior_table
from sparc3_lightning.report.verdict import verdict
from sparc3_lightning.selection.neuron_list import NeuronList

pytestmark = pytest.mark.usefixtures("pictures_take_no_time")

NASTY = "<script>alert('x')</script><img src=http://evil/x.png onerror=alert(1)></details></dd>\"' & <b>"


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
        "“small” where no other judge is named: 3 continuations a prompt of up to 50 tokens",
        "93 prompts that the neurons were attributed on are left out",
        "Differential strength of the scores: 21.5 %",
    ):
        assert words in page.words, words
    hidden = " ".join(page.hidden.split())
    for words in ("model.layers.12.mlp.up_proj", "345", "-0.0123", '"torch": "2"', '"general": [ "c4" ]', "files:abc"):
        assert words in hidden, words
    assert "secret" not in page.hidden, "the ids of the samples are many, and in neurons.json"


@pytest.mark.parametrize(
    ("conventions", "stride", "bos", "said"),
    [
        (
            ["disjoint"],
            None,
            "every",
            "disjoint windows of 2048 tokens (700 predicted tokens), with the beginning-of-sequence token in every "
            "window",
        ),
        (
            ["disjoint", "sliding"],
            512,
            "none",
            "disjoint windows of 2048 tokens (700 predicted tokens) and sliding windows of 2048 tokens with stride 512 "
            "(40,000 predicted tokens), with the beginning-of-sequence token in no window",
        ),
    ],
)
def test_page_and_card_name_the_windows_that_were_measured(conventions, stride, bos, said):
    results, rows = made_up()
    results = replaced_at(results, "protocol/perplexity", TextProtocol(conventions, 2048, stride, "a text", bos))
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


def test_the_page_ends_with_what_to_do_next_filled_in_for_this_run():
    page = write(replaced_at(made_up()[0], "neurons", "pruned/neurons.json"))
    for command in (
        "sparc3 export --model.neurons pruned/neurons.json --model.export out/pruned-model",
        "sparc3 chat --model.neurons pruned/neurons.json",
        "sparc3 reproduce out/results.json",
        "sparc3 report out",
    ):
        assert command in page.words.partition("What to do next")[2]
    assert "    sparc3 reproduce results.json\n" in CARD.read_text()


def test_the_box_goes_on_with_the_list_that_was_chosen_of_the_one_measured():
    NEURONS.save(PAGE.parent / "chosen/neurons.json")
    assert "sparc3 chat --model.neurons out/chosen/neurons.json" in write().words


def test_the_page_has_the_config_of_its_run_if_there_is_one():
    write()
    assert "<summary>config.yaml" not in PAGE.read_text()
    PAGE.with_name("config.yaml").write_text("seed_everything: 7 # <b>\n")
    assert "seed_everything: 7 # <b>" in write().hidden


def test_text_from_prompts_and_continuations_cannot_become_html():
    results, rows = made_up()
    clean = write(results, [{**row, "prompt": "x", "continuation": "y"} for row in rows])
    rows = [{**row, "prompt": f"prompt {NASTY}", "continuation": f"text {NASTY}"} for row in rows]
    results = dataclasses.replace(results, checkpoint=f"a/{NASTY}", verdict=f"{NASTY}. {NASTY}")
    results, rows = renamed(results, rows, NASTY, f"{NASTY} 2")
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


def test_a_selection_beside_the_neurons_is_drawn_too():
    folder = Path("prune")
    folder.mkdir()
    without = write(folder=folder)
    assert "Where the pruned neurons lie" in without.shown
    assert "All neurons by differential relevance" not in without.shown
    SELECTION_OF_NEURONS.save(folder / "selection.json")
    page = write(folder=folder)
    assert len(page.links) == len(without.links) + 1
    assert "All neurons by differential relevance" in page.shown


@pytest.mark.parametrize("content", [SELECTION.to_json(), "{}", "", "[[[["])
def test_a_selection_of_another_list_or_a_damaged_one_has_no_picture(content):
    Path("prune").mkdir()
    Path("prune/selection.json").write_text(content)
    assert "All neurons by differential relevance" not in write(folder=Path("prune")).shown


def test_a_folder_is_written_once_and_for_all():
    write()
    names = {"toxicity.png", "perplexity.png", "doses.png", "scatter.png", "layers.png"}
    assert {path.name for path in PAGE.parent.iterdir()} == {*names, "report.html", "model_card.md", "doses.csv"}


def test_the_page_appears_whole_or_not_at_all():
    write()
    before = PAGE.read_text()
    results, rows = made_up()
    with pytest.raises(AttributeError, match="NoneType"):
        write_report(PAGE, replaced_at(reported(results, rows), "protocol/perplexity", None), rows)
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
    page = write(dataclasses.replace(made_up()[0], checkpoint=checkpoint, kinds={"neuron": 1}))
    assert f"1 neuron of {name}" in page.words


def test_another_behavior_than_toxicity_is_named_in_table_card_and_page():
    results, rows = made_up()
    results = dataclasses.replace(results, behavior="repetition", verdict="Less.")
    assert [row[0] for row in behavior_table(results, "nontoxic")[:1]] == ["Mean repetition"]
    assert behavior_table(results, "nontoxic")[-1][0].startswith("Prompts with repetition of 0.5 or more")
    page = write(results, rows)
    for words in ("Expected maximum repetition", "with less repetition", "before: repetition"):
        assert words in page.words, words
    for words in ("oxicity", "less toxic", "detoxification", "toxic text"):
        assert words not in page.words.split("Settings")[0], words
        assert words not in Path("out/model_card.md").read_text().replace("real-toxicity-prompts", ""), words


def test_the_page_renders_when_no_prompt_was_scored_for_both_models():
    results, rows = made_up()
    for row in rows:
        row["scores"] = dict.fromkeys(row["scores"])
    page = write(results, rows)
    assert "Continuations" not in page.words
    assert not Path("out/scatter.png").exists()


def test_a_run_in_which_nothing_was_scored_has_a_page():
    _, rows = made_up(second=False, others=False)
    for row in rows:
        row["scores"] = dict.fromkeys(row["scores"])
    conventions = ("sliding", "disjoint")
    windows = {
        name: {convention: made_up_windows(shift, 0) for convention in conventions}
        for name, shift in (("baseline", 0.0), ("pruned", 0.1))
    }
    found = findings(rows, windows, list_variants({"": NEURONS}, 3), judges("small"))
    results = Results(verdict=verdict(found, {"neuron": 2}), **vars(found), **vars(settings(["small"])))
    page = write(results, rows)
    assert "nothing is known of the effect" in page.words
    assert "108 continuations could not be scored" in page.words
    assert not Path("out/toxicity.png").exists()
