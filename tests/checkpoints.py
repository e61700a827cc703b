"""What is asked of a checkpoint, and the neurons of the tiny one that are switched off."""

from typing import Any

import torch

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component

INPUT_IDS = torch.tensor([[5, 17, 33, 8, 21, 40]])
NEURONS = [
    Component("model.layers.0.mlp.up_proj", 3, -1.0),
    Component("model.layers.1.mlp.up_proj", 0, -2.0),
    Component("model.layers.1.mlp.up_proj", 23, -3.0),
]


def config(checkpoint: Checkpoint) -> Any:
    return checkpoint.config


def fingerprint(checkpoint: Checkpoint) -> str:
    return checkpoint.fingerprint


def load_float32(checkpoint: Checkpoint) -> Any:
    return checkpoint.load(torch.float32)


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and ". " not in message
