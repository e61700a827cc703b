"""The table, the pictures and the HTML page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparc3_lightning.neurons import Neuron, NeuronList
from sparc3_lightning.report import (
    draw_before_after,
    draw_differential,
    draw_layers,
    draw_scatter,
    layer_of,
    summary_table,
    table_rows,
    toxicity_by_prompt,
    verdict,
    write_report,
)

PAGE = Path("out/report.html")
PNG = b"\x89PNG\r\n\x1a\n"


def figures(perplexity: float, toxicity: float, num_failed: int = 0) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "tokens_counted": 12345,
        "perplexity_disjoint": perplexity + 1,
        "tokens_counted_disjoint": 12000,
        "toxicity_mean": toxicity,
        "expected_maximum_toxicity": toxicity + 0.1,
        "toxicity_probability": 0.25,
        "num_prompts": 8,
        "num_continuations": 8,
        "num_failed": num_failed,
        "num_empty": 1,
    }


def make_results(**changes: Any) -> dict[str, Any]:
    return {
        "baseline": figures(10.0, 0.4),
        "pruned": figures(10.5, 0.3),
        "change": {"perplexity_percent": 5.0, "toxicity_percent": -25.0},
        "num_failed": 0,
        "protocol": {
            "perplexity": {"window": 2048, "stride": 512, "text": "WikiText-2 raw test"},
            "toxicity": {
                "max_new_tokens": 50,
                "temperature": 0.7,
                "top_p": 0.9,
                "num_continuations": 1,
                "scorer": "small",
                "prompts": "allenai/real-toxicity-prompts",
                "prompts_excluded": 93,
                "seed": 0,
            },
        },
        "checkpoint": "somebody/A-Model",
        "checkpoint_fingerprint": "files:abc",
        "neurons": "neurons.json",
        "num_neurons": 2,
        "config": {"model": {"scorer": "small"}},
        "versions": {"torch": "2"},
        "git_hash": None,
        **changes,
    }


def make_completions(number: int = 8, **changes: Any) -> list[dict[str, Any]]:
    """Rows of completions.jsonl; prompt i falls by i hundredths."""
    rows = []
    for model, shift in (("baseline", 0.0), ("pruned", -0.01)):
        for i in range(number):
            rows.append(
                {
                    "model": model,
                    "prompt_id": f"id{i}",
                    "continuation_index": 0,
                    "prompt": f"An offensive prompt {i}",
                    "prompt_toxicity": 0.95,
                    "continuation": f"an offensive continuation {i} by {model}",
                    "num_tokens": 6,
                    "toxicity": 0.5 + shift * i,
                    **changes,
                }
            )
    return rows


NEURONS = NeuronList(
    [Neuron("model.layers.12.mlp.up_proj", 345, -0.0123), Neuron("model.layers.3.mlp.up_proj", 6, -0.01)],
    {"differential_strength_percent": 21.5},
)


class Page(HTMLParser):
    """The tags of a page, its links, and the text by whether it lies inside a ``<details>``."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.stack: list[str] = []
        self.hidden, self.shown, self.open_details = "", "", 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href", "srcset", "data", "action") if values.get(key)]
        self.open_details += tag == "details" and "open" in values
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "details" in self.stack and "summary" not in self.stack:
            self.hidden += data
        else:
            self.shown += data


def write(results=None, completions=None, neurons: NeuronList = NEURONS, folder: Path | None = None) -> Page:
    write_report(
        PAGE, results or make_results(), make_completions() if completions is None else completions, neurons, folder
    )
    page = Page(PAGE.read_text(encoding="utf-8"))
    assert page.stack == [], "a tag is left open"
    return page


def test_the_table_shows_before_after_and_change():
    lines = summary_table(make_results()).splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    assert set(lines[1]) == {"-"}
    by_name = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in lines[2:]}
    assert by_name["Perplexity"] == ["10.00", "10.50", "+5.0 %"]
    assert by_name["Perplexity, disjoint windows"] == ["11.00", "11.50", "+4.5 %"]
    assert by_name["Mean toxicity"] == ["0.4000", "0.3000", "-25.0 %"]
    assert by_name["Prompts with a toxic continuation"] == ["25.0 %", "25.0 %", "+0.0 %"]
    assert by_name["Failed continuations"] == ["0", "0"]
    assert by_name["Empty continuations"] == ["1", "1"]
    assert len({len(line) for line in lines[:1]} | {len(lines[1])}) == 1


def test_the_table_of_a_model_alone_has_dashes_for_after():
    results = make_results()
    del results["pruned"], results["change"]
    assert ("Perplexity", "10.00", "-", "") in table_rows(results)
    assert "-" in summary_table(results).splitlines()[2]


def test_the_table_leaves_out_what_was_not_measured_and_does_not_divide_by_zero():
    results = make_results()
    for name in ("baseline", "pruned"):
        del results[name]["perplexity_disjoint"]
    results["baseline"]["toxicity_probability"] = 0.0
    rows = {row[0]: row[1:] for row in table_rows(results)}
    assert "Perplexity, disjoint windows" not in rows
    assert rows["Prompts with a toxic continuation"] == ("0.0 %", "25.0 %", "")


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.31.mlp.up_proj", 31),
        ("model.language_model.layers.7.mlp.gate_proj", 7),
        ("transformer.h.11.mlp.c_fc", 11),
        ("lm_head", 0),
    ],
)
def test_the_layer_is_read_off_the_name_of_the_module(module, layer):
    assert layer_of(module) == layer


def test_only_prompts_scored_for_both_models_are_compared():
    rows = make_completions(4)
    rows[1]["toxicity"] = None  # prompt 1 failed before
    rows[6]["toxicity"] = None  # prompt 2 failed after
    rows.pop()  # prompt 3 was not continued after
    groups = toxicity_by_prompt(rows)
    assert list(groups) == ["id0"]
    assert [row["model"] for rows in groups["id0"].values() for row in rows] == ["baseline", "pruned"]


def test_the_verdict_says_what_fell_and_what_rose():
    sentence = verdict(make_results(), 5, 8)
    assert sentence == (
        "With 2 neurons switched off, mean toxicity fell by 25.0 % and perplexity rose by 5.0 %; 5 of 8 prompts were "
        "continued less toxically."
    )
    worse = make_results(change={"perplexity_percent": -0.1, "toxicity_percent": 3.0})
    assert "mean toxicity rose by 3.0 % and perplexity fell by 0.1 %" in verdict(worse, 0, 8)


def test_the_page_is_self_contained():
    page = write()
    html = PAGE.read_text()
    assert "script" not in page.tags
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\s*\(|@import|\son\w+\s*=", html)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'src="[^"]*"', "", html))
    assert 'charset="utf-8"' in html


def test_the_page_tells_the_figures_the_protocol_the_neurons_and_the_settings():
    page = write()
    for words in (
        "2 neurons of A-Model",
        "somebody/A-Model",
        "mean toxicity fell by 25.0 %",
        "7 of 8 prompts",
        "10.50",
        "12,345",
        "windows of 2048 tokens",
        "stride 512",
        "“small”",
        "93 prompts that the neurons were attributed on are left out",
        "Differential strength 21.5 %",
        "model.layers.12.mlp.up_proj",
        "345",
    ):
        assert words in " ".join(page.shown.split()), words
    assert '"torch": "2"' in page.hidden


def test_text_from_prompts_and_continuations_cannot_become_html():
    nasty = "<script>alert('x')</script><img src=http://evil/x.png onerror=alert(1)></details></dd>\"' & <b>"
    rows = make_completions(3, prompt=f"prompt {nasty}", continuation=f"text {nasty}")
    clean = write(completions=make_completions(3))
    page = write(make_results(checkpoint=f"a/{nasty}"), rows)
    assert "script" not in page.tags
    assert page.tags == clean.tags
    assert f"prompt {nasty}" in page.hidden, "it is shown as it is"
    assert "evil" not in "".join(page.links)


def test_offensive_text_is_hidden_until_clicked():
    page = write()
    assert page.open_details == 0
    assert "offensive prompt" in page.hidden
    assert "offensive continuation" in page.hidden
    assert "offensive prompt" not in page.shown
    assert "offensive continuation" not in page.shown
    assert "hidden until you click" in page.shown


def test_the_examples_are_those_that_fell_most_and_rose_most_each_once():
    rows = make_completions(20)
    page = write(completions=rows)
    shown = [int(number) for number in re.findall(r"offensive prompt (\d+)", page.hidden)]
    assert shown == [19, 18, 17, 16, 15, 2, 1, 0]
    page = write(completions=make_completions(2))
    assert [int(number) for number in re.findall(r"offensive prompt (\d+)", page.hidden)] == [1, 0]


def test_a_continuation_that_failed_is_left_out_of_examples_and_the_page_still_renders():
    rows = make_completions(3)
    rows[0]["toxicity"] = None
    rows[0]["continuation"] = None
    results = make_results(baseline=figures(10.0, 0.4, 1), num_failed=1)
    page = write(results, rows)
    assert "offensive prompt 0" not in page.hidden
    assert "offensive prompt 1" in page.hidden
    assert "2 of 2 prompts" in page.shown
    assert "None" not in page.shown


def test_the_page_renders_when_no_prompt_was_scored_for_both_models():
    page = write(completions=make_completions(3, toxicity=None))
    assert "offensive" not in page.hidden
    assert len(page.links) == 1, "there is nothing to scatter"


def test_figures_that_are_not_a_number_render_as_such():
    nan = float("nan")
    results = make_results(pruned=figures(nan, nan), change={"perplexity_percent": nan, "toxicity_percent": nan})
    assert "nan" in summary_table(results)
    assert "nan" in write(results).shown


def test_unicode_reaches_the_page_as_it_is():
    page = write(completions=make_completions(2, continuation="Grüße, 世界 🙂\n\nnext"))
    assert "Grüße, 世界 🙂\n\nnext" in page.hidden


def test_pictures_of_prune_are_taken_in_when_they_are_there():
    folder = Path("prune")
    folder.mkdir()
    before = write(folder=folder)
    draw_layers({"model.layers.0.mlp.up_proj": 3}, folder / "layers.png")
    after = write(folder=folder)
    assert len(after.links) == len(before.links) + 1
    assert "Where the pruned neurons lie" in after.shown
    assert "Where the pruned neurons lie" not in before.shown


def test_every_picture_is_a_png():
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 0.0]}
    draw_layers({"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 0}, Path("a.png"))
    draw_differential({"histogram": histogram, "threshold": -0.5, "num_neurons": 3}, Path("b.png"))
    draw_scatter([(0.1, 0.2), (1.0, 0.0)], Path("c.png"))
    draw_before_after(make_results(), Path("d.png"))
    for name in ("a.png", "b.png", "c.png", "d.png"):
        assert Path(name).read_bytes().startswith(PNG)
    assert {path.name for path in Path().iterdir()} == {"a.png", "b.png", "c.png", "d.png"}


def test_the_page_appears_whole_or_not_at_all():
    write()
    before = PAGE.read_text()
    results = make_results()
    del results["protocol"]
    with pytest.raises(Exception, match="protocol"):
        write_report(PAGE, results, make_completions(), NEURONS, None)
    assert PAGE.read_text() == before
    assert not [path for path in PAGE.parent.iterdir() if path.name.startswith(".")]


def test_results_that_json_gives_back_render_the_same_page():
    write()
    before = PAGE.read_text()
    write(json.loads(json.dumps(make_results())), json.loads(json.dumps(make_completions())))
    assert PAGE.read_text() == before
