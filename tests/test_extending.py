"""What the README says of additions: a toy one of each kind, by a function or a class and a row of a table."""

import re
from dataclasses import make_dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers import random_scores, save_scores, sentence
from made_up import evaluation, made_up
from pages import reported

from sparc3_lightning import (
    Component,
    Evaluation,
    NeuronList,
    Pruning,
    Results,
    ScoreFile,
    cli,
    data,
    load_scorer,
    lrp,
    select_neurons,
)
from sparc3_lightning.attribution.rules import OPERATIONS
from sparc3_lightning.data.base import ReferenceSamples, Sample
from sparc3_lightning.evaluation import findings
from sparc3_lightning.evaluation.controls import CONTROLS, ControlKind, Controls
from sparc3_lightning.evaluation.metrics import CONTINUATION_METRICS, ContinuationMetric
from sparc3_lightning.evaluation.results import Measures, Model
from sparc3_lightning.evaluation.variants import list_variants, neurons_of
from sparc3_lightning.report.page import FIGURES, Figure, summary_table, write_report
from sparc3_lightning.report.tables import control_table
from sparc3_lightning.scorers import registry
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.scorers.registry import check_scorer, fetch_scorer
from sparc3_lightning.selection.neuron_selection import CRITERIA, Criterion, CriterionName
from sparc3_lightning.stages.base import Stage

QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def as_if_from_a_shell(monkeypatch):
    """Restore the seed that a run sets, and keep pytest's own arguments out of LightningCLI's sight."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


class Shouting(Scorer):
    """The share of capital letters."""

    words = ("shouting",)

    def score(self, texts):
        return [sum(c.isupper() for c in text) / max(len(text), 1) for text in texts]


class Greetings(ReferenceSamples):
    """Sentences of one length.

    Args:
        num_samples: How many.
    """

    def __init__(self, num_samples: int = 4) -> None:
        super().__init__(None, None, 2)
        self.save_hyperparameters(logger=False)
        self.num_samples = num_samples

    def prepare_data(self) -> None:
        pass

    def read_samples(self, tokenizer):
        return [Sample(str(i), tokenizer(sentence(i, 5))["input_ids"]) for i in range(self.num_samples)]


class Counting(Stage):
    """Counts.

    Args:
        number: How far.
    """

    verb = "count"
    OUTPUTS = ("count.txt",)

    def __init__(self, number: int = 3) -> None:
        super().__init__()
        self.number = number

    def count(self, folder: Path) -> None:
        self.begin(folder)
        self.output.write_text(str(self.number))


def test_an_operation_gets_an_lrp_rule_by_a_row_of_the_table(monkeypatch, make_model):
    def relevance() -> torch.Tensor:
        with lrp(model):
            logits = model(inputs_embeds=embeddings).logits
        return torch.autograd.grad(logits[0, -1].max(), embeddings)[0]

    model = make_model()
    embeddings = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    expected = relevance()
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (torch.cumprod(inputs[0][None], dim=0)[0],))
    with pytest.raises(ValueError, match=r"no LRP rule for the operation cumprod.*--model\.method gradient"):
        relevance()
    monkeypatch.setitem(OPERATIONS, torch.cumprod, lambda rules, func, args, kwargs: func(*args, **kwargs))
    torch.testing.assert_close(relevance(), expected)


def test_a_criterion_is_a_function_and_a_row_of_the_table(monkeypatch):
    def behavior_alone(behavior):
        return {name: -score for name, score in behavior.items()}

    assert get_args(CriterionName) == tuple(CRITERIA), "the names that the command line knows are those of the table"
    monkeypatch.setitem(CRITERIA, "behavior_alone", Criterion(lambda sides: behavior_alone(sides.behavior)))
    general, behavior = random_scores(0), random_scores(9, 0.5)
    files = [save_scores("general.safetensors", general)], save_scores("behavior.safetensors", behavior)
    found = Pruning(*files, criterion="behavior_alone", num_neurons=3).prune(Path("out"))
    assert found.neurons == select_neurons(behavior_alone(behavior), 3)


def test_a_control_is_a_function_and_a_row_of_the_table(monkeypatch, make_model):
    def first_ones(pruned, model):
        return lambda seed: [Component(component.module, seed, 0.0) for component in pruned.neurons]

    monkeypatch.setitem(CONTROLS, "first_ones", ControlKind(lambda granularity: f"first {granularity}s", first_ones))
    lists = {"": NeuronList([Component("model.layers.1.mlp.up_proj", 9, -1.0)])}
    off = neurons_of(list_variants(lists, 1, Controls(2)), lists, make_model(), seed=0)
    assert [off[f"first_ones_{i}"][0].index for i in range(2)] == [0, 1]

    results, _ = evaluation.__wrapped__()  # one that is not kept for other tests
    assert len(results.controls["first_ones"].draws) == 2
    assert control_table(results)[-1][0] == "First neurons"
    assert "As many first neurons (2 draws): " in results.verdict


def test_a_figure_is_a_function_and_a_row_of_the_table(monkeypatch):
    def draw_number(shown, path):
        path.write_text(f"PNG of {len(shown.neurons.neurons)}")

    for name in list(FIGURES):
        monkeypatch.delitem(FIGURES, name)
    monkeypatch.setitem(FIGURES, "number.png", Figure("The {components} by number", draw_number))
    monkeypatch.setitem(FIGURES, "nothing.png", Figure("Nothing", draw_number, is_known=lambda shown: False))
    results, rows = made_up()
    write_report(Path("out/report.html"), reported(results, rows), rows)
    assert Path("out/number.png").read_text() == "PNG of 2"
    page = Path("out/report.html").read_text()
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["The neurons by number"]


def test_a_metric_is_a_function_with_its_row_and_a_field_of_the_results(monkeypatch):
    def questions(prompts):
        return sum("?" in row["continuation"] for rows in prompts for row in rows) + 0.25

    monkeypatch.setitem(CONTINUATION_METRICS, "questions", ContinuationMetric("Questions", "", 2, questions))
    longer = make_dataclass("Measures", [("questions", float)], bases=(Measures,), frozen=True)
    monkeypatch.setattr(findings, "Measures", longer)
    monkeypatch.setitem(Model.__annotations__, "groups", dict[str, longer])
    results, _ = evaluation.__wrapped__()  # one that is not kept for other tests
    assert re.search(r"^Questions +0.25 +0.25$", summary_table(results), re.MULTILINE)
    assert Results.from_json(results.to_json()).baseline.groups["toxic"].questions == 0.25


def test_a_scorer_is_a_class_and_a_row_of_the_table(monkeypatch):
    with pytest.raises(ValueError, match=r"--model.scorer: 'shouting' is neither 'small'"):
        check_scorer("shouting")
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS, Shouting])
    assert fetch_scorer("shouting") == []
    assert load_scorer("shouting").score(["ABab", "ab", ""]) == [0.5, 0.0, 0.0]
    Evaluation("x", scorers=["shouting"])
    with pytest.raises(ValueError, match=r"'whispering' is neither 'small', .*, shouting, nor "):
        check_scorer("whispering")


def test_a_data_set_is_a_class_and_a_line_of_the_room(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(data, "Greetings", Greetings, raising=False)
    options = ["--model.checkpoint", tiny_checkpoint, "--data", "Greetings", "--data.num_samples", "3"]
    folder = Path(cli.main(["attribute", *QUIET, *options]).trainer.log_dir)
    assert ScoreFile.load(folder / "scores.safetensors").provenance.num_samples == 3


def test_a_verb_is_a_module_a_line_of_the_list_and_a_row_of_the_command_line_with_its_method(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "count", "Count.")
    monkeypatch.setitem(cli.STAGES, "count", cli.Verb(Counting))
    monkeypatch.setattr(cli.SparC3Trainer, "count", lambda self, model: model.count(Path()), raising=False)
    cli.main(["count", *QUIET, "--model.number", "5"])
    assert Path("count.txt").read_text() == "5"


def test_the_last_section_of_the_readme_names_modules_that_are_there():
    section = README.partition("## Where to add what\n")[2]
    modules = re.findall(r"`(?!tests/)(\w+/\w+\.py)`", section)
    assert len(modules) > 8
    assert [name for name in modules if not (ROOT / "sparc3_lightning" / name).is_file()] == []
    assert "\n## " not in section, "it is not the last section"
