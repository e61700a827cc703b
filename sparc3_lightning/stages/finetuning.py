"""A short fine-tuning on ordinary text, by a Lightning fit: what a model that was pruned goes through next."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from sparc3_lightning.data.base import Batch, Sample, pad_right
from sparc3_lightning.errors import OptionError

Weights = Mapping[str, Tensor]  # of a model, by the names of its parameters
ACCELERATORS = {"cuda": "gpu"}  # what Lightning calls a type of device of torch


@dataclass(frozen=True)
class FineTuning:
    """How the models are trained on neutral text: all weights, in float32, by AdamW at a constant learning rate.

    Args:
        steps: Steps, each on the next batch of ``--data.neutral``; 0 trains nothing.
        learning_rate: Of AdamW, whose other options are those of torch: a weight decay of 0.01 is one.
        keep_rows: Leave the incoming weights of pruned neurons as they are, so that the outgoing ones, which are zero,
            can grow back. In an exported checkpoint both are zero; no gradient reaches such a neuron.
    """

    steps: int = 100
    learning_rate: float = 2e-5
    keep_rows: bool = False

    def check(self) -> None:
        """Raise OptionError if a value is out of range."""
        if self.steps < 0:
            raise OptionError("finetune.steps", f"must be at least 0, got {self.steps}.")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError("finetune.learning_rate", f"must be above 0, got {self.learning_rate}.")


class Training(L.LightningModule):
    """A model that learns to predict the next token of each text.

    Args:
        model: A causal language model; it is trained in place.
        learning_rate: Of AdamW.
        on_step: Called after each step.
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float, on_step: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self._on_step = on_step

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean loss a token, in nats."""
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        loss: Tensor = self.model(**inputs, labels=labels, use_cache=False).loss
        if not torch.isfinite(loss):
            raise OptionError(
                "finetune.learning_rate",
                f"{self.learning_rate} is too large: after {self.global_step} steps the loss is not finite. Lower it.",
            )
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Count the step."""
        self._on_step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def check_enough(samples: Sequence[Sample], batch_size: int | str, steps: int) -> None:
    """Raise OptionError unless there are a batch for each step, and no batch is to be found by trying."""
    if isinstance(batch_size, str):
        raise OptionError(
            "batch_size", f"must be a number, got {batch_size}: a training depends on it.", "data.neutral"
        )
    if len(samples) < steps * batch_size:
        raise OptionError(
            "finetune.steps",
            f"asks for {steps} batches of {batch_size}, which are {steps * batch_size} samples, but --data.neutral has "
            f"{len(samples)}: lower it, or raise --data.neutral.num_samples.",
        )
    if min(len(sample.input_ids) for sample in samples[: steps * batch_size]) < 2:
        raise OptionError("neutral", "has a sample of fewer than 2 tokens, which predicts nothing.", "data")


def trained(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    batch_size: int,
    options: FineTuning,
    device: torch.device,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Weights:
    """Return the weights that a model has after a training; the model stays as it is.

    A copy in float32 is trained, for which there are three more of its size: gradients, and the two moments of AdamW.

    Args:
        model: A causal language model.
        samples: Taken in their order.
        batch_size: Samples of a step.
        options: How it is trained.
        device: Where.
        seed: Of the dropout, if the model has any.
        on_step: Called after each step.

    Returns:
        All weights, on the CPU, in the dtypes that the model has them in.
    """
    copied = copy.deepcopy(model).float().train().requires_grad_(True)
    starts = range(0, options.steps * batch_size, batch_size)
    batches: list[Batch] = [pad_right(list(samples[start : start + batch_size])) for start in starts]
    trainer = L.Trainer(
        accelerator=ACCELERATORS.get(device.type, device.type),
        devices=1 if device.index is None else [device.index],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[LightningEnvironment()],  # no part of a Slurm job, where Lightning would write checkpoints
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trainer.fit(Training(copied, options.learning_rate, on_step), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    return {name: weight.detach().to("cpu", dtypes[name]) for name, weight in copied.named_parameters()}
