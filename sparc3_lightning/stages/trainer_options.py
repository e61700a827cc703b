"""Options of Lightning's trainer: which are free, which results do not rest on, and why the others are refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins import FSDPPrecision, Precision

from sparc3_lightning.errors import OptionError

LIMIT = (
    "would measure a part of the data and report it as the whole: leave it out, and ask for less with the options of "
    "the data, such as --data.num_samples or --data.prompts.init_args.num_prompts."
)
TRAINING = "is about training, and nothing is trained here: leave it out."
PRECISION = (
    "would change what is measured, unsaid: leave it out, and choose the dtype of the weights with --model.dtype."
)


@dataclass(frozen=True)
class Fixed:
    """An option that is refused unless it has its default, or what amounts to it."""

    values: tuple[object, ...]
    reason: str


# Every option of the trainer, by name; None is one that may be chosen.
TRAINER_OPTIONS: dict[str, Fixed | None] = {
    "accelerator": None,
    "strategy": None,
    "devices": None,  # of its form see _check_devices
    "num_nodes": None,
    "precision": Fixed((None, "32-true", "32", 32), PRECISION),
    "logger": None,
    "callbacks": None,
    "fast_dev_run": Fixed((False, 0), LIMIT),
    "max_epochs": Fixed((None,), TRAINING),
    "min_epochs": Fixed((None,), TRAINING),
    "max_steps": Fixed((-1,), TRAINING),
    "min_steps": Fixed((None,), TRAINING),
    "max_time": Fixed(
        (None,), "ends training alone: leave it out, and stop the run with SIGTERM, which keeps its work."
    ),
    "limit_train_batches": Fixed((None, 1.0), TRAINING),
    "limit_val_batches": Fixed((None, 1.0), TRAINING),
    "limit_test_batches": Fixed((None, 1.0), LIMIT),
    "limit_predict_batches": Fixed((None, 1.0), LIMIT),
    "overfit_batches": Fixed((0.0, 0), LIMIT),
    "val_check_interval": Fixed((None,), TRAINING),
    "check_val_every_n_epoch": Fixed((1, None), TRAINING),
    "num_sanity_val_steps": Fixed((None, 0), TRAINING),
    "log_every_n_steps": None,
    "enable_checkpointing": Fixed((None, False), TRAINING),
    "enable_progress_bar": None,
    "enable_model_summary": None,
    "accumulate_grad_batches": Fixed((1,), TRAINING),
    "gradient_clip_val": Fixed((None,), TRAINING),
    "gradient_clip_algorithm": Fixed((None,), TRAINING),
    "deterministic": None,
    "benchmark": None,
    "inference_mode": Fixed((False,), "must be false: relevance needs gradients, and the other scores lose nothing."),
    "use_distributed_sampler": Fixed((True,), "must be true: every rank gets samples of its own, whatever it says."),
    "profiler": None,
    "detect_anomaly": Fixed((False,), TRAINING),
    "barebones": Fixed((False,), "would leave out the folder of the run: leave it out."),
    "plugins": None,  # of a precision see check_trainer
    "sync_batchnorm": Fixed((False,), TRAINING),
    "reload_dataloaders_every_n_epochs": Fixed((0,), TRAINING),
    "default_root_dir": None,
    "enable_autolog_hparams": None,
    "model_registry": Fixed((None,), "is about checkpoints that training writes: leave it out."),
}
# Those of the free ones that change where or how fast a run computes, or what it logs, not what comes out.
NOT_RESULTS = {
    "callbacks",
    "default_root_dir",
    "devices",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "num_nodes",
    "strategy",
}


def check_trainer_options(options: Mapping[str, object]) -> None:
    """Raise OptionError if an option would cut or change what is measured, have no effect, or can be no such option.

    Args:
        options: Of the trainer, by name.
    """
    for name, value in options.items():
        fixed = TRAINER_OPTIONS.get(name)
        # The type counts: 1.0 is all batches, and 1 is a single one.
        if fixed is not None and not any(type(value) is type(one) and value == one for one in fixed.values):
            raise OptionError(name, f"{value} {fixed.reason}", "trainer")
    _check_devices(options.get("devices", "auto"), options.get("accelerator", "auto"))
    if isinstance(nodes := options.get("num_nodes"), int) and nodes < 1:
        raise OptionError("num_nodes", f"must be at least 1, got {nodes}.", "trainer")


def _check_devices(devices: object, accelerator: object) -> None:
    """Raise OptionError unless Lightning can count the devices: its own errors are of other types, and riddles."""
    text = ",".join(map(str, [*devices, ""])) if isinstance(devices, list | tuple) else str(devices).strip()
    if accelerator == "cpu" or (accelerator == "auto" and not CUDAAccelerator.is_available()):
        valid, words = r"auto|[1-9]\d*", "a number of processes, at least 1, or auto: there is one CPU"
    else:
        valid = r"auto|-1|[1-9]\d*|\d+,|\d+(, *\d+)+,?"
        words = "a number of devices, at least 1, -1 for all, auto, or a list of different ones, such as [0, 1]"
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if not re.fullmatch(valid, text) or len(set(numbers)) < len(numbers):
        raise OptionError("devices", f"must be {words}, got {devices}.", "trainer")


def check_trainer(trainer: L.Trainer) -> None:
    """Raise OptionError if a trainer, however it was made, would cut or change what is measured."""
    cuts = ("fast_dev_run", "limit_test_batches", "limit_predict_batches", "overfit_batches")
    check_trainer_options({name: getattr(trainer, name) for name in cuts})
    plugin = trainer.precision_plugin
    # Other classes change modules or tensors, and not all say so in their attribute.
    if type(plugin) not in (Precision, FSDPPrecision) or plugin.precision != "32-true":
        raise OptionError("precision", f"{trainer.precision} {PRECISION}", "trainer")
