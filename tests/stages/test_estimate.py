"""What an experiment will take, said before any of it runs: a line a stage, and options with which it fits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from mixtures import save_mixture

from sparc3_lightning import cli
from sparc3_lightning.stages.estimate import EstimateOptions, Machine

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")
GPUS = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--estimate.tflops", "400"]


def estimated(caplog: pytest.LogCaptureFixture, *options: str) -> dict[str, str]:
    """Return the line of each stage by its name, of what an estimate says and writes nowhere."""
    before = sorted(Path.cwd().rglob("*"))
    caplog.clear()
    with caplog.at_level("INFO"):
        cli.main(["run", "--config", "experiment.yaml", "--estimate", *options])
    assert sorted(Path.cwd().rglob("*")) == before
    lines = caplog.records[-1].getMessage().splitlines()
    return {name: said for name, _, said in (line.partition(": ") for line in lines)}


def test_each_stage_has_a_line_and_nothing_is_written(caplog):
    found = estimated(caplog, "--estimate.tflops", "0.1")
    stages = [
        "attribute general_0",
        "attribute general_1",
        "attribute behavior",
        "prune neurons",
        "evaluate evaluation",
    ]
    assert [name for name in found if name in stages] == stages
    assert found["attribute general_0"] == found["attribute general_1"]
    assert "a sample" in found["attribute behavior"]
    assert found["prune neurons"].startswith("no pass through the model")
    assert found["All"].endswith("; fits")


def test_a_folder_with_a_config_alone_is_enough(caplog, tiny_checkpoint, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(Path(tiny_checkpoint, "config.json"), tmp_path / "bare")
    assert estimated(caplog, "--model.checkpoint", "./bare", "--estimate.tflops", "0.1")["All"].endswith("; fits")


def test_a_mixture_is_estimated_as_if_its_experts_got_equally_many_tokens(caplog, tmp_path):
    save_mixture("mixtral", tmp_path / "mixture")
    Path("mixture/model.safetensors").unlink()
    found = estimated(caplog, "--model.checkpoint", "./mixture", "--estimate.tflops", "0.1")
    assert "a sample" in found["attribute behavior"]
    assert found["All"].endswith("; fits")
    assert any("Experts are taken to get equally many tokens." in name for name in found)


def test_where_it_does_not_fit_an_option_is_named_with_which_it_does(caplog):
    long = [*GPUS, "--general.seq_len", "64", "--general.batch_size"]
    one, four = (estimated(caplog, *long, size, "--estimate.memory", "80")["attribute general_0"] for size in "14")
    smaller, larger = (float(said.partition(" kB a device")[0]) for said in (one, four))
    assert smaller < larger
    between = str((smaller + larger) / 2 / 1e6)
    said = estimated(caplog, *long, "4", "--estimate.memory", between)["attribute general_0"]
    assert "; does not fit: give --general.batch_size " in said
    size = said.partition("batch_size ")[2].partition(",")[0]
    assert estimated(caplog, *long, size, "--estimate.memory", between)["attribute general_0"].endswith("; fits")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--estimate.tflops", "0"], r"--estimate\.tflops must be a number above 0, got 0"),
        (["--trainer.strategy", "deepspeed"], r"--trainer\.strategy must be auto, ddp or fsdp2 .*, got deepspeed"),
        (["--model.checkpoint", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, said):
    with pytest.raises((ValueError, OSError), match=said):
        cli.main(["run", "--config", "experiment.yaml", "--estimate", *options])


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match="broken"):
        cli.main(["run", "--config", "experiment.yaml", "--estimate", "--model.checkpoint", "./broken"])


@pytest.mark.parametrize(
    ("trainer", "per_node", "num_ranks"), [({}, 1, 1), ({"devices": 4, "num_nodes": 2}, 4, 8), ({"devices": "2"}, 2, 2)]
)
def test_the_devices_are_those_of_the_trainer(trainer, per_node, num_ranks):
    options: dict[str, Any] = {"strategy": "ddp", "devices": "auto", "accelerator": "cpu", "num_nodes": 1, **trainer}
    machine = Machine.of(options, EstimateOptions(tflops=1, memory=80))
    assert (machine.per_node, machine.num_ranks, machine.memory) == (per_node, num_ranks, 80e9)
