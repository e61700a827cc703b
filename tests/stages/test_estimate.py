"""What an experiment will take, said before any of it runs: a line a stage, and options with which it fits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny, write
from mixtures import save_mixture

from sparc3_lightning import cli
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.stages.estimate import EstimateOptions, Estimator, Machine, config_of
from sparc3_lightning.stages.plan import StageRun

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


AUTO = ["--data.text.batch_size", "auto", "--data.prompts.batch_size", "auto", "--data.text.num_tokens", "999"]


def memory(said: str) -> float:
    """Return the memory of a device that a line says, in GB."""
    number, unit = said.partition(" a device")[0].split()
    return float(number) * {"kB": 1e-6, "MB": 1e-3, "GB": 1.0}[unit]


@pytest.mark.slow
def test_a_batch_size_that_is_halved_in_the_run_is_halved_in_the_estimate(caplog):
    large, small = (
        memory(estimated(caplog, *GPUS, *AUTO, "--estimate.memory", given)["evaluate evaluation"])
        for given in ("80", "0.00009")
    )
    assert small < large
    between = str((small * 1.1 + large) / 2)
    said = estimated(caplog, *GPUS, *AUTO, "--estimate.memory", between)["evaluate evaluation"]
    assert said.endswith("; fits")
    assert small <= memory(said) < large
    sharded = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2"]
    with pytest.raises(ValueError, match=r"--data\.text\.batch_size auto cannot be had with --trainer\.strategy fsdp2"):
        estimated(caplog, *GPUS, *sharded, *AUTO)


@pytest.mark.slow
def test_the_stage_of_a_screening_names_its_own_option(caplog):
    screen = ["--screen", "sparc3_lightning.data.RealToxicityPrompts", "--screen.source", "prompts.jsonl"]
    screen += ["--screen.num_prompts", "200", "--screen.batch_size", "64"]
    screen += ["--data.text.batch_size", "1", "--data.prompts.batch_size", "1"]
    most = memory(estimated(caplog, *GPUS, *screen, "--estimate.memory", "80")["evaluate screen"])
    said = estimated(caplog, *GPUS, *screen, "--estimate.memory", str(most))["evaluate screen"]
    assert "; does not fit: give --screen.batch_size " in said


def test_prompts_of_an_unknown_number_are_costed_by_a_batch_and_said_to_be_left_out(caplog):
    six, unknown = (
        estimated(caplog, *GPUS, "--estimate.memory", "80", "--data.prompts.num_prompts", number)
        for number in ("6", "null")
    )
    assert memory(unknown["evaluate evaluation"]) >= memory(six["evaluate evaluation"])
    (notes,) = (name for name in unknown if name.startswith("Time is that"))
    assert "How many prompts there are is not known of evaluation (num_prompts null)" in notes
    assert not any("num_prompts" in name for name in six)


def test_fewer_processes_of_one_machine_are_a_way_out(tiny_checkpoint):
    data = {"class_path": "C4", "init_args": {"num_samples": 8, "seq_len": 16, "batch_size": 1}}
    config = {"model": {"checkpoint": tiny_checkpoint, "gradient_checkpointing": True}, "data": data}
    stage = StageRun("general_0", "attribute", config, Path("logs"), "scores.safetensors")
    machine = Machine(torch.device("cpu"), 8, 1, False, memory=5e9, stated_rate=1e12, libraries=10**9)
    of_stages = Estimator(
        tiny_checkpoint, config_of(Checkpoint(tiny_checkpoint)), "bfloat16", machine, EstimateOptions()
    )
    found = of_stages.advised(stage, 5)
    assert str(found).endswith("; does not fit: give --trainer.devices 4, with which it fits")


def test_a_gguf_file_is_estimated_by_its_header_and_nothing_is_dequantized(caplog, tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", tiny())
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    checkpoint = Checkpoint("./m.gguf")
    assert estimated(caplog, "--model.checkpoint", "./m.gguf", "--estimate.tflops", "0.1")["All"].endswith("; fits")
    by_header = config_of(checkpoint)
    assert not (tmp_path / "cache").exists()
    for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        assert getattr(by_header, name) == getattr(checkpoint.config, name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--data.text.num_tokens", "20", "--data.text.conventions", "[disjoint]"],
            r"--data\.text\.num_tokens must be at least --data\.text\.window 32, got 20",
        ),
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
