"""The model card: its figures, what the hub reads of it, and in which folders it is put."""

import dataclasses
import math
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from made_up import NEURONS, made_up
from pages import CARD, PAGE, by_name, reported, write
from safetensors.torch import save_file

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import Effects, Results
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.report import page as report
from sparc3_lightning.report.card import MARK, Exported, model_card, unevaluated_card
from sparc3_lightning.report.escaping import for_markdown
from sparc3_lightning.selection.neuron_list import NeuronList

pytestmark = pytest.mark.usefixtures("pictures_take_no_time")


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
    on_page = [page.tables[number] for number in (0, 1, 2, 3, 5, 4)]
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
    said = yaml.safe_load(head)
    assert said.pop("model-index")[0]["name"] == "c: 'd' # e.gguf"
    assert said == {
        "base_model": results.checkpoint,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparc3_lightning", "pruning", "detoxification"],
    }
    assert re.fullmatch(re.escape(MARK).replace(r"\{\}", "[0-9a-f]{16}"), body.splitlines()[0])
    assert body.splitlines()[2].startswith("# c: 'd' # e.gguf with 2 neurons")
    assert "&" not in CARD.read_text(), "nothing is escaped as in HTML"
    assert "\n\n\n" not in CARD.read_text()


def test_the_hub_reads_the_figures_of_the_card():
    results, rows = made_up()
    write(results, rows)
    found = {(one.dataset_config, one.metric_type): one for one in ModelCard(CARD.read_text()).data.eval_results}
    assert len(found) == 3  # of two conventions of perplexity, one stays here
    effect = results.effects["toxic"].behavior_mean
    toxicity = found["toxic prompts", "toxicity"]
    assert toxicity.dataset_name == "allenai/real-toxicity-prompts"
    assert toxicity.metric_value == effect.after
    assert toxicity.metric_args == {
        "before": effect.before,
        "change_percent": effect.percent.value,
        "change_percent_low": effect.percent.low,
        "change_percent_high": effect.percent.high,
        "evidence": effect.evidence,
    }
    assert found[None, "perplexity"].metric_value == results.pruned.perplexity["disjoint"].value


def test_the_hub_is_told_no_figure_that_is_not_known():
    results, rows = made_up()
    unknown = Interval(math.nan, math.nan, math.nan)
    pruned = dataclasses.replace(results.pruned, perplexity=dict.fromkeys(results.pruned.perplexity, unknown))
    effects = dict.fromkeys(results.effects, Effects(None, None, None))
    write(dataclasses.replace(results, pruned=pruned, effects=effects), rows)
    assert "model-index" not in yaml.safe_load(CARD.read_text().split("---\n", 2)[1])


def test_the_card_says_how_the_neurons_were_found():
    write()
    assert "2 neurons with the most negative differential relevance" in CARD.read_text()
    write(neurons=NeuronList(NEURONS.neurons))
    assert "2 neurons of a list that was given had" in CARD.read_text()


@pytest.fixture
def export() -> Path:
    """The folder of an exported checkpoint."""
    return write_checkpoint(Path("export"))


def write_checkpoint(folder: Path, weight: float = 0.0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.full((2,), weight)}, folder / "model.safetensors")
    return folder


def exported(folder: Path, fingerprint: str | None = None) -> NeuronList:
    of_export = {"export": str(folder), "export_fingerprint": fingerprint or Checkpoint(f"./{folder}").fingerprint}
    return NeuronList(NEURONS.neurons, {**NEURONS.provenance, **of_export})


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings of a report."""
    found: list[str] = []
    monkeypatch.setattr(report, "rank_zero_warn", found.append)
    return found


def test_the_exported_checkpoint_gets_the_card_and_the_next_evaluation_a_new_one(export):
    results, rows = made_up()
    write(results, rows, exported(export))
    assert (export / "README.md").read_text() == CARD.read_text()
    write(dataclasses.replace(results, verdict="Another."), rows, exported(export))
    assert "Another." in (export / "README.md").read_text()
    assert {path.name for path in export.iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("content", ["mine", "# Made with sparc3_lightning, and edited\n", ""])
def test_a_readme_of_somebody_else_stays(export, content, warnings):
    (export / "README.md").write_text(content)
    write(neurons=exported(export))
    assert (export / "README.md").read_text() == content
    assert CARD.is_file()
    assert warnings == ["The model card was not put into export: it has a README that somebody wrote or changed."]


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: re.sub("<!-- Written.*-->", "", card),
        lambda card: f"{card}\n## Mine\n",
        lambda card: card.replace("tags:", "license: mit\ntags:", 1),
        lambda card: re.sub("[0-9a-f]{16} -->", "0123456789abcdef -->", card),
        lambda card: card.replace("fell", "rose"),
        lambda card: card + card,
    ],
    ids=["no mark", "a section", "the front matter", "the hash", "a word", "twice"],
)
@pytest.mark.few(2)
def test_a_card_that_somebody_has_changed_stays(export, edit):
    write(neurons=exported(export))
    edited = edit(written := (export / "README.md").read_text())
    assert edited != written
    (export / "README.md").write_text(edited)
    write(dataclasses.replace(made_up()[0], verdict="Another."), neurons=exported(export))
    assert (export / "README.md").read_text() == edited


def test_the_card_of_an_export_keeps_neurons_command_and_licence_when_it_is_evaluated(export):
    (export / "README.md").unlink(missing_ok=True)
    neurons = exported(export)
    results = reported(*made_up(), neurons)
    of = {"checkpoint": results.checkpoint, "checkpoint_fingerprint": results.checkpoint_fingerprint}
    inside = NeuronList(neurons.neurons, of)
    inside.save(export / "neurons.json")
    (export / "README.md").write_text(unevaluated_card(Exported(inside, results.checkpoint, "export", "mit")))
    write(results, neurons=neurons)
    card = ModelCard.load(export / "README.md")
    assert (card.data.license, card.data.model_name) == ("mit", "export")
    assert results.verdict in card.text
    for module in {neuron.module for neuron in inside.neurons}:
        assert f"\n- {for_markdown(module)}: " in card.text
    assert "    sparc3 export --model.neurons neurons.json --model.checkpoint somebody/A-Model" in card.text
    write(dataclasses.replace(results, verdict="Another."), neurons=neurons)
    assert "Another." in (export / "README.md").read_text()


def test_an_export_that_is_uploaded_stays_as_it_is_there(export, warnings):
    neurons = exported(export)
    (export / "README.md").write_text(before := model_card(reported(*made_up())))
    write(neurons=NeuronList(neurons.neurons, {**neurons.provenance, "push_to_hub": "ann/model"}))
    assert (export / "README.md").read_text() == before
    assert warnings == ["The model card was not put into export: it was exported to be uploaded to ann/model."]


def test_a_list_in_the_export_that_is_damaged_costs_no_page(export, warnings):
    (export / "neurons.json").write_text("{}")
    write(neurons=exported(export))
    assert not (export / "README.md").exists()
    assert PAGE.is_file()
    assert len(warnings) == 1


def test_a_folder_that_is_no_checkpoint_or_not_there_gets_no_card(warnings):
    Path("empty").mkdir()
    for folder in ("empty", "missing"):
        write(neurons=exported(Path(folder), "files:abc"))
    assert os.listdir("empty") == []  # noqa: PTH208
    assert not Path("missing").exists()
    assert len(warnings) == 2
    for said, reason in zip(warnings, ("it has no config.json", "does not exist"), strict=True):
        assert said.startswith("The model card was not put into")
        assert reason in said


def test_another_checkpoint_in_the_place_of_the_export_gets_no_card(export, warnings):
    neurons = exported(export)
    write_checkpoint(Path("other"), 1.0)
    for folder, fingerprint in (("other", neurons.provenance["export_fingerprint"]), ("export", "files:abc")):
        write(neurons=exported(Path(folder), fingerprint))
        assert not Path(folder, "README.md").exists()
        said = f"The model card was not put into {folder}: it does not hold the checkpoint that was exported with"
        assert warnings.pop().startswith(said)


def test_an_export_that_was_never_completed_gets_no_card(export, warnings):
    write(neurons=NeuronList(NEURONS.neurons, {**NEURONS.provenance, "export": str(export)}))
    assert not (export / "README.md").exists()
    assert len(warnings) == 1


def test_neurons_without_an_export_are_no_reason_to_warn(warnings):
    write(neurons=NeuronList(NEURONS.neurons, {**NEURONS.provenance, "export": None}))
    assert warnings == []


def test_a_card_that_cannot_be_put_there_does_not_cost_the_page(export, warnings):
    (export / "README.md").mkdir()
    PAGE.unlink(missing_ok=True)
    write(neurons=exported(export))
    assert len(warnings) == 1
    assert "was not put into export" in warnings[0]
