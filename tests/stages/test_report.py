"""What a stage measured is there before it is drawn, whatever fails in drawing; and `sparc3 report` draws it again."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluations import EVERY_SECOND, completions, data, evaluation, read_strictly, run, save_neurons
from experiments import pretend
from helpers import random_scores, save_scores

from sparc3_lightning.cli import main
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.files import sha256_of
from sparc3_lightning.report import drawing, page
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.compare import Comparison
from sparc3_lightning.stages.evaluate import REPORT
from sparc3_lightning.stages.prune import Pruning

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")
OUT = Path("out")


def written(folder: Path) -> set[str]:
    """Return the names of the files of a run, without the lock that says whose its folder is."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def nothing_can_be_drawn(monkeypatch):
    with monkeypatch.context() as patch:
        forbid_drawing(patch)
        yield


def forbid_drawing(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no picture today")

    patch.setattr(page, "write_report", fail)
    for name in ("draw_layers", "draw_differential", "draw_overlap", "draw_circuit"):
        patch.setattr(drawing, name, fail)


@pytest.mark.slow
def test_an_evaluation_is_drawn_again_bit_for_bit(tiny_checkpoint, neurons, monkeypatch):
    run(evaluation(tiny_checkpoint, neurons, controls=Controls(1), doses=[3], max_new_tokens=4))
    first = {path.name: sha256_of(path) for path in OUT.iterdir()}
    drawn = set(first) - {"results.json", "completions.jsonl"}
    assert {REPORT, "model_card.md", "doses.csv", "scatter.png", "layers.png"} <= drawn
    for name in drawn:
        (OUT / name).unlink()
    neurons.unlink()
    monkeypatch.setattr("sys.argv", ["sparc3"])
    main(["report", str(OUT.absolute())])
    assert {path.name: sha256_of(path) for path in OUT.iterdir()} == first


@pytest.mark.usefixtures("nothing_can_be_drawn")
def test_an_evaluation_that_cannot_be_drawn_is_complete(tiny_checkpoint, neurons):
    model = evaluation(tiny_checkpoint, neurons, max_new_tokens=2)
    with pytest.warns(
        UserWarning, match=r"not drawn \(RuntimeError: no picture today\). 'sparc3 report out' draws them"
    ):
        results = run(model)
    assert written(OUT) == {"results.json", "completions.jsonl"}
    assert len(completions()) == 2 * 8
    assert results["report"]["ablation"] == "switched off"
    assert "Report:" not in model.summary()
    assert "Results: out/results.json" in model.summary()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("provenance", "options"),
    [
        ({"criterion": "$x_1$ | <b> \x1b[31m", "differential_strength_percent": None}, {"behavior": "$\\frac"}),
        ({"criterion": "", "versions": {}}, {"behavior": "toxicity & _more_ 100 %"}),
    ],
)
def test_names_that_mean_something_elsewhere_are_drawn(tiny_checkpoint, provenance, options):
    neurons = save_neurons(tiny_checkpoint, EVERY_SECOND, provenance)
    of = data(conventions=["disjoint", "disjoint"])
    results = run(evaluation(tiny_checkpoint, neurons, max_new_tokens=2, doses=[3], **options), of)
    assert (OUT / REPORT).is_file()
    assert list(results["baseline"]["perplexity"]) == ["disjoint"]


def test_a_pruning_and_a_comparison_that_cannot_be_drawn_are_complete(monkeypatch):
    files = [save_scores("general.safetensors", random_scores(0))], save_scores("b.safetensors", random_scores(9, 0.5))
    lists = [Path("one/neurons.json"), Path("two/neurons.json")]
    with monkeypatch.context() as patch:
        forbid_drawing(patch)
        for path in lists:
            with pytest.warns(UserWarning, match=f"'sparc3 report {path.parent}' draws them"):
                Pruning(*files, num_neurons=3, min_differential_strength=-1000.0).prune(path.parent)
            assert written(path.parent) == {"neurons.json", "selection.json"}
        with pytest.warns(UserWarning, match="'sparc3 report out' draws them"):
            Comparison(lists).compare(OUT)
    assert written(OUT) == {"compare.json", "neurons.csv", "overlap.csv"}
    monkeypatch.setattr("sys.argv", ["sparc3"])
    for folder in ("one", "out"):
        main(["report", folder])
    assert {"layers.png", "differential.png"} <= {path.name for path in Path("one").iterdir()}
    assert {"overlap.png", "layers.png", "correlation.png"} <= {path.name for path in OUT.iterdir()}


def test_names_of_a_comparison_that_mean_something_elsewhere_are_in_its_files():
    for name in ("one", "two"):
        NeuronList(EVERY_SECOND[:3], {}).save(Path(name, "neurons.json"))
    names = ["=cmd|$x_", "\x1b[31mred\u202e | <b>"]
    lists = [Path("one/neurons.json"), Path("two/neurons.json")]
    said = Comparison(lists, names=names, num_candidates=48).compare(OUT)
    assert "\x1b" not in said
    assert r"\x1b[31mred\u202e" in said
    assert "'=cmd|$x_ & " in (OUT / "overlap.csv").read_text()
    assert written(OUT) == {
        "compare.json", "neurons.csv", "overlap.csv", "overlap.png", "layers.png",
    }  # fmt: skip


def test_an_experiment_whose_page_is_missing_draws_it_and_without_one_is_complete(due, monkeypatch):
    drawn: list[Path] = []

    def write(verb: str, config: Path) -> None:
        pretend(verb, config)
        for path in Path("lightning_logs").rglob(REPORT):
            path.unlink()

    monkeypatch.setattr(
        "sparc3_lightning.stages.experiment.draw_or_warn", lambda folder: bool(drawn.append(folder)) or False
    )
    due(run_stage=write)
    assert [path.parent.name for path in drawn] == ["evaluate"]
    assert (OUT / "results.json").is_file()
    assert not (OUT / REPORT).exists()
    assert json.loads((OUT / "experiment.json").read_text())["stages"]
    assert read_strictly(OUT / "results.json")["verdict"]
