"""The trainer's options: each is decided on, and those that would cut or change what is measured are refused."""

import inspect
from pathlib import Path

import lightning as L
import pytest
from experiments import write_experiment
from helpers import sentence, trainer, write_jsonl
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from sparc3_lightning.cli import main
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.errors import OptionError
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.trainer_options import NOT_RESULTS, TRAINER_OPTIONS, check_trainer_options

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")
ATTRIBUTE = ["attribute", "--model.checkpoint", "nowhere", "--data", "C4", "--data.source", "nowhere.txt"]


def test_every_option_of_lightnings_trainer_is_decided_on():
    parameters = inspect.signature(L.Trainer.__init__).parameters.values()
    assert {one.name for one in parameters} - {"self"} == set(TRAINER_OPTIONS)
    defaults = {one.name: one.default for one in parameters if one.name not in ("self", "inference_mode")}
    check_trainer_options(defaults)  # none of which is refused
    assert {name for name in NOT_RESULTS if TRAINER_OPTIONS[name] is not None} == set()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("limit_predict_batches", "2", "--data.num_samples"),
        ("limit_predict_batches", "1", "--data.num_samples"),
        ("limit_predict_batches", "0.5", "--data.num_samples"),
        ("limit_predict_batches", "0", "--data.num_samples"),
        ("limit_test_batches", "3", "--data.prompts.init_args.num_prompts"),
        ("fast_dev_run", "true", "the options of the data"),
        ("fast_dev_run", "2", "the options of the data"),
        ("overfit_batches", "1", "the options of the data"),
        ("precision", "bf16-mixed", "--model.dtype"),
        ("precision", "16-true", "--model.dtype"),
        ("precision", "64", "--model.dtype"),
        ("max_epochs", "3", "nothing is trained"),
        ("max_steps", "10", "nothing is trained"),
        ("max_time", "00:01:00:00", "SIGTERM"),
        ("val_check_interval", "0.5", "nothing is trained"),
        ("gradient_clip_val", "1.0", "nothing is trained"),
        ("accumulate_grad_batches", "4", "nothing is trained"),
        ("inference_mode", "true", "must be false"),
        ("use_distributed_sampler", "false", "must be true"),
        ("barebones", "true", "folder of the run"),
    ],
)
def test_an_option_that_would_cut_or_change_what_is_measured_is_refused_by_name(option, value, words):
    with pytest.raises(OptionError, match=rf"^--trainer\.{option} ") as refused:
        main([*ATTRIBUTE, f"--trainer.{option}", value])
    assert words in str(refused.value)
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    "value",
    ["x", "[x]", "[]", "[0]", "[0, 0]", "[1.5]", "[[1]]", "0", "-1", "-2", "gpu", "1.5", "0,1", "true", ""],
)
def test_devices_that_a_cpu_does_not_have_are_refused_in_a_sentence(value):
    with pytest.raises(OptionError, match=r"^--trainer\.devices must be a number of processes, at least 1, or auto"):
        main([*ATTRIBUTE, "--trainer.devices", value, "--trainer.accelerator", "cpu"])
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("value", ["x", ["x"], [], [0, 0], "0,0", [-1], [True], [1.5], "[0]", 0, -2, True, "gpu", ""])
def test_devices_that_gpus_cannot_be_are_refused_in_a_sentence(value):
    with pytest.raises(OptionError, match=r"^--trainer\.devices must be a number of devices, at least 1, -1 for all"):
        check_trainer_options({"devices": value, "accelerator": "gpu"})


@pytest.mark.parametrize("value", [1, "1", 4, "auto", -1, "-1", [0], [1, 0], "0,1", "0, 1", "3,"])
def test_devices_in_every_form_of_lightning_are_no_obstacle(value):
    check_trainer_options({"devices": value, "accelerator": "gpu"})


@pytest.mark.parametrize("value", [1, "2", " 1", "auto"])
def test_a_number_of_processes_on_the_cpu_is_no_obstacle(value):
    check_trainer_options({"devices": value, "accelerator": "cpu"})


@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_number_of_nodes_below_one_is_refused(value):
    with pytest.raises(OptionError, match=rf"^--trainer\.num_nodes must be at least 1, got {value}"):
        main([*ATTRIBUTE, "--trainer.num_nodes", value])


@pytest.mark.parametrize("verb", ["run", "prepare"])
def test_an_experiment_refuses_it_before_its_first_stage(verb, tmp_path):
    config = write_experiment(tmp_path, "nowhere")
    with pytest.raises(OptionError, match=r"^--trainer\.limit_test_batches 2 would measure a part"):
        main([verb, "--config", str(config), "--trainer.limit_test_batches", "2"])


def test_values_that_ask_for_nothing_are_no_obstacle():
    check_trainer_options({"limit_predict_batches": 1.0, "precision": "32-true", "fast_dev_run": False, "logger": None})
    check_trainer_options({"precision": 32, "overfit_batches": 0, "deterministic": True, "profiler": "simple"})


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"limit_predict_batches": 2}, "limit_predict_batches"),
        ({"fast_dev_run": True}, "fast_dev_run"),
        ({"precision": "bf16-true"}, "precision"),
        ({"plugins": [HalfPrecision("bf16-true")]}, "precision"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}, "precision"),
    ],
)
def test_a_stock_trainer_with_such_an_option_is_refused_too(tiny_checkpoint, tmp_path, options, option):
    prompts = write_jsonl(tmp_path / "rows.jsonl", [{"text": sentence(i, 6), "toxicity": 0.9} for i in range(4)])
    data = ToxicPrompts(source=prompts, num_samples=4)
    with pytest.raises(OptionError, match=rf"^--trainer\.{option} "):
        trainer("out", **options).predict(Attribution(tiny_checkpoint), datamodule=data)
    assert not list(Path("out").glob("*.safetensors"))
