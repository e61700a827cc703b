"""Names, prompts and provenance that were written to do something: page, card, tables and pictures show them."""

import csv
import io
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pages
import pytest
import yaml
from helpers import replaced_at
from made_up import NEURONS, made_up, renamed
from pages import CARD, PAGE, words_of, write

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.models.components import Component
from sparc3_lightning.report.figures import change_rows
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.tables import doses_csv
from sparc3_lightning.selection.neuron_list import NeuronList

HOSTILE = {
    "html": "<script>alert(1)</script><img src=http://evil/x onerror=alert(1)>\"'&amp;",
    "markdown": "a | b ](http://evil) [x](javascript:alert(1)) `c` **d** <!-- e --> ![f](http://evil/g.png)",
    "lines": "one\n\n# two\n\n---\n- three\n\n    four\r\n| five |",
    "formula": '=HYPERLINK("http://evil","click")',
    "plus": "+cmd|' /C calc'!A0",
    "at": "@SUM(1+1)*cmd",
    "escape": "\x1b[31m\x1b]0;title\x07\x9b2J\x00\x08\r",
    "bidi": "\u202egpj.exe\u2066\u2029",
    "mathtext": "$\\frac{1}{0}$ 100 % $x_",
    "yaml": "'\": {a: [b, *c, &d e]} # f\n--- !!python/object:g",
    "template": "{{ 7*7 }} {% include 'x' %} {# y #} {0} {behavior} %s",
    "long": "x" * 3000,
    "rtl": "שלום עולם العربية",
    "other letters": "名前 🙂 Grüße ﷽",
    "surrogate": "half \ud800",
    "shell": "; rm -rf ~ `reboot` $(reboot)",
    "blank": "  ",
}
QUICK = ("html", "markdown", "escape", "template", "surrogate")
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def hostile(text: str) -> tuple[Any, list[dict[str, Any]], NeuronList]:
    """Return an evaluation in which everything that somebody names is called so."""
    results, rows = made_up()
    for place, value in {
        "checkpoint": f"somebody/{text}",
        "checkpoint_fingerprint": text,
        "behavior": text,
        "neurons": text,
        "verdict": f"{text}. {text}",
        "protocol/perplexity/text": text,
        "protocol/prompts/source": text,
        "protocol/prompts/nontoxic_source": text or None,
        "config": {"verb": "evaluate", text: text},
        "versions": {text: text},
    }.items():
        results = replaced_at(results, place, value)
    results, rows = renamed(results, rows, text, f"{text} 2")
    doses = [replace(dose, selection=text if i % 2 else f"{text} 2") for i, dose in enumerate(results.doses)]
    fronts = {f"{text}{end}": front for end, front in zip(("", " 2"), [*results.fronts.values()] * 2, strict=False)}
    results = replace(
        results, doses=doses, fronts=fronts, zero_shot={m: {text: {"accuracy": 0.5}} for m in results.models}
    )
    rows = [{**row, "prompt": f"p {text}", "continuation": f"c {text}"} for row in rows]
    provenance = {"criterion": text, "differential_strength_percent": text, "general": [{"path": text}], text: text}
    neurons = NeuronList([Component(f"model.layers.1.{text}", 1, -1.0), *NEURONS.neurons], provenance)
    return results, rows, neurons


@pytest.mark.parametrize(
    "kind",
    [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in HOSTILE if kind not in QUICK)],
)
@pytest.mark.usefixtures("pictures_take_no_time")
@pytest.mark.few(2)
def test_a_hostile_name_does_nothing_in_page_card_tables_and_terminal(kind):
    text = HOSTILE[kind]
    clean = write(*hostile("a name"))
    page = write(*hostile(text))
    table = ("tr", "td", "th")
    assert [tag for tag in page.tags if tag not in table] == [tag for tag in clean.tags if tag not in table]
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    html, card = PAGE.read_text(encoding="utf-8"), CARD.read_text(encoding="utf-8")
    assert not UNSEEN.search(html)

    _, head, body = card.split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"base_model", "library_name", "pipeline_tag", "tags", "model-index"}
    assert not UNSEEN.search(body)
    lines = body.splitlines()
    assert len(lines) == len(card_of("a name").splitlines()), "nothing begins a line of its own"
    plain = re.sub(r"\\.", "", "\n".join(line for line in lines if not line.startswith(("    sparc3", "<!-- Written"))))
    assert not set(plain) & set("<>`*[]~$&@_")
    assert "://" not in plain
    assert "{{" in body or kind != "template", "what a template would compute is text"
    for line in lines:
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (6, 8, 9, 10)

    results = hostile(text)[0]
    for row in csv.reader(io.StringIO(doses_csv(results.doses))):
        assert not row[0].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert all(re.fullmatch(r"(-?[\d.e+-]+)?|[a-z_]+", cell) for cell in row[1:])
    said = summary_table(results)
    assert not UNSEEN.search(said)
    assert len(said.splitlines()) == len(summary_table(hostile("a name")[0]).splitlines())
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in PAGE.parent.iterdir())


def card_of(text: str) -> str:
    write(*hostile(text))
    return CARD.read_text(encoding="utf-8").split("---\n", 2)[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_name_can_be_drawn(kind):
    write(*hostile(HOSTILE[kind]))
    assert len(list(PAGE.parent.glob("*.png"))) == 5


PATHS = (
    "/home/ann/secret/x",
    "/Users/ann/x y",
    "~/secret/x",
    "C:\\Users\\ann\\x",
    "\\\\host\\share\\x",
    "../../home/ann/x",
)


@pytest.mark.parametrize("place", PATHS)
@pytest.mark.usefixtures("pictures_take_no_time")
def test_the_card_names_no_folder_of_the_one_who_made_it(place):
    results, rows = made_up()
    for field in (
        "checkpoint",
        "protocol/perplexity/text",
        "protocol/prompts/source",
        "protocol/prompts/nontoxic_source",
    ):
        results = replaced_at(results, field, place)
    results, rows = renamed(results, rows, place, f"{place}#toxic")
    results = replaced_at(results, "verdict", f"Less. The judge '{place}#toxic' agrees.")
    provenance = {"general": [{"path": place}], "behavior": {"path": place}, "export": place}
    write(results, rows, NeuronList(NEURONS.neurons, provenance))
    card = CARD.read_text().replace("\\", "")
    for word in ("ann", "secret", "Users", "home", "share", "host", ".."):
        assert not re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", card), word
    assert "The judge 'x" in card
    assert "by x" in card


@pytest.mark.usefixtures("pictures_take_no_time")
def test_judges_of_one_public_name_are_told_apart_and_no_folder_behind_them_is_named():
    results, rows = renamed(*made_up(), "/home/ann/scorer", "/home/bob/scorer")
    said = "The judge '/home/ann/scorer' agrees. The judge '/home/bob/scorer' differs."
    results = replaced_at(results, "verdict", f"Less. {said}")
    judges = {"/home/ann/scorer": "a scorer: /home/ann/scorer", "/home/bob/scorer": "a guard: /home/eve/guards/mine"}
    results = replace(results, judges={n: replace(results.judges[n], source=of) for n, of in judges.items()})
    write(results, rows)
    card = CARD.read_text().replace("\\", "")
    assert "The judge 'scorer' agrees. The judge 'scorer (2)' differs." in card
    assert "| Mean toxicity, by scorer (2) |" in card
    assert "scorer and scorer (2) 1.00" in card
    assert "| scorer (2) | a guard: mine |" in card
    assert not re.search(r"\b(home|ann|bob|eve)\b", card)
    assert [row.label.split("\n")[0] for row in change_rows(results)[0][:2]] == ["2 chosen", "by scorer (2)"]


@pytest.mark.usefixtures("pictures_take_no_time")
def test_the_commands_of_the_page_have_the_paths_of_the_run_and_the_card_names_none(tmp_path, monkeypatch):
    folder = tmp_path / "my runs; <b> & 'quoted' {{ 7*7 }} \x1b[31m"
    folder.mkdir()
    monkeypatch.setattr(pages, "PAGE", folder / "report.html")
    write(replaced_at(made_up()[0], "neurons", f"{folder}/of mine.json"))
    html = (folder / "report.html").read_text()
    assert not UNSEEN.search(html)
    commands = [unescape(found) for found in re.findall("<pre>(sparc3 .*)</pre>", re.sub("</?span>", "", html))]
    seen = folder.relative_to(Path.cwd())
    assert list(map(words_of, commands)) == [
        ["sparc3", "export", "--model.neurons", f"{folder}/of mine.json", "--model.export", f"{seen}/pruned-model"],
        ["sparc3", "chat", "--model.neurons", f"{folder}/of mine.json"],
        ["sparc3", "reproduce", f"{seen}/results.json"],
        ["sparc3", "report", str(seen)],
    ]
    card = (folder / "model_card.md").read_text()
    assert "    sparc3 reproduce results.json\n" in card
    assert str(tmp_path) not in card


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0])
def test_a_measure_that_is_not_finite_or_far_too_large_can_be_drawn(value):
    results, rows = made_up()
    every = Interval(value, value, value)
    for model in results.models:
        results = replaced_at(results, f"{model}/perplexity/sliding", every)
        results = replaced_at(results, f"{model}/kl", value)
        for group in results.baseline.groups:
            for name in ("behavior_mean", "mean_length", "distinct_1"):
                results = replaced_at(results, f"{model}/groups/{group}/{name}", value)
    results = replaced_at(results, "perplexity_change/sliding", every)
    results = replaced_at(results, "effects/toxic/behavior_mean/percent", every)
    for i in range(len(results.doses)):
        for field, of in (
            ("perplexity", value),
            ("kl", value),
            ("perplexity_percent", every),
            ("effect/percent", every),
        ):
            results = replaced_at(results, f"doses/{i}/{field}", of)
    for kind in results.controls:
        for field in ("effect_percent", "pruned_less_control"):
            results = replaced_at(results, f"controls/{kind}/outcome/{field}", every)
        results = replaced_at(results, f"controls/{kind}/outcome/perplexity_percent", value)
    page = write(results, rows)
    for text in (page.shown, CARD.read_text(), summary_table(results), doses_csv(results.doses).replace(",", " ")):
        assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", text)
        assert max(map(len, text.split())) < 200


@pytest.mark.parametrize(
    "provenance", [{}, {"criterion": 3, "export": ["x"]}, {"criterion": None, "export": {}}, {"budget": 1}]
)
@pytest.mark.usefixtures("pictures_take_no_time")
def test_a_list_of_neurons_with_little_or_odd_provenance_has_a_report(provenance):
    assert "2 neurons of A-Model" in write(neurons=NeuronList(NEURONS.neurons, provenance)).words


@pytest.mark.usefixtures("pictures_take_no_time")
def test_a_convention_that_is_given_twice_is_said_once():
    results, rows = made_up()
    results = replaced_at(results, "protocol/perplexity/conventions", ["disjoint", "disjoint"])
    assert write(results, rows).words.count("disjoint windows of 2048 tokens") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 200])
@pytest.mark.parametrize("by", ["num_neurons", "damping"])
def test_one_dose_and_two_hundred_can_be_drawn(number, by):
    results, rows = made_up()
    first = results.doses[0]
    values = {"num_neurons": range(1, number + 1), "damping": [(1 + i) / number for i in range(number)]}[by]
    doses = [replace(first, name=f"d{i}", **{by: value}) for i, value in enumerate(values)]
    write(replace(results, doses=doses, fronts={"": next(iter(results.fronts.values()))}), rows)
    assert Path("out/doses.png").is_file() is (number > 1)
