"""Evaluation: what a reader finds beside the results."""

from pathlib import Path

import pytest
import torch
from evaluations import PRUNED, completions, evaluation, run, save_neurons

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.stages.evaluate import REPORT

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")


@pytest.mark.parametrize("scorer", ["nothing", "zero"])
@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.few(1)
def test_a_scorer_that_finds_nothing_gives_valid_json_a_report_and_a_summary(
    tiny_checkpoint, neurons, monkeypatch, tmp_path, scorer, place
):
    monkeypatch.syspath_prepend(tmp_path)
    name, scorers = f"toy_scorers:{scorer}", ["small", "repetition"]
    scorers[place] = name
    model = evaluation(tiny_checkpoint, neurons, scorers=scorers, controls=Controls(1), doses=[3], max_new_tokens=4)
    results = run(model)
    assert all(row["scores"][name] in (0, None) for row in completions())
    found = results["judges"][name]
    effect = found["effects"]["toxic"]["behavior_mean"]
    if scorer == "nothing":
        assert effect is None
        assert (found["num_scored"], found["num_failed"]) == (0, 5 * 8)
        assert results["num_failed"] == (5 * 8 if place == 0 else 0)
    else:
        assert (effect["before"], effect["after"], effect["percent"]["value"]) == (0, 0, None)
        assert not effect["evidence"]
    if place == 0:
        assert results["effects"] == found["effects"]
        assert results["change"]["behavior_percent"] is None
    else:
        assert results["agreement"]["num_scored"] == (0 if scorer == "nothing" else 16)
        assert f"The judge '{name}' " in results["verdict"]
    assert "nan" not in model.summary()
    assert Path("out", REPORT).is_file()


@pytest.mark.slow
def test_the_model_card_is_put_into_the_folder_of_the_exported_checkpoint(tiny_checkpoint):
    export_pruned(Checkpoint(tiny_checkpoint), PRUNED, Path("pruned"), dtype=torch.float32)
    of_export = {"export": "pruned", "export_fingerprint": Checkpoint("pruned").fingerprint}
    neurons = save_neurons(tiny_checkpoint, PRUNED, of_export)
    results = run(evaluation(tiny_checkpoint, neurons, max_new_tokens=2))
    card = Path("out", "model_card.md").read_text()
    assert Path("pruned", "README.md").read_text() == card
    assert card.startswith("---\nbase_model: ")
    assert results["verdict"] in card
    # One of our own is brought up to date, one of somebody else's is left alone.
    run(evaluation(tiny_checkpoint, neurons, max_new_tokens=3), folder="later")
    assert Path("pruned", "README.md").read_text() == Path("later", "model_card.md").read_text() != card
    foreign = "My notes: made with sparc3_lightning, then tuned by hand."
    Path("pruned", "README.md").write_text(foreign)
    run(evaluation(tiny_checkpoint, neurons, max_new_tokens=2), folder="again")
    assert Path("pruned", "README.md").read_text() == foreign


@pytest.mark.parametrize("export", [None, "gone", "foreign"])
@pytest.mark.few(1)
def test_no_model_card_is_put_where_there_is_no_exported_checkpoint(tiny_checkpoint, export):
    Path("foreign").mkdir()
    run(evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, PRUNED, {"export": export}), max_new_tokens=2))
    assert Path("out", "model_card.md").is_file()
    assert not Path("gone").exists()
    assert not list(Path("foreign").iterdir())
