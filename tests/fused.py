"""Tiny random models whose files hold other tensors than the model has, and some whose layers are fused in both."""

from pathlib import Path
from typing import Any

import torch
from mixtures import make_mixture
from torch import nn

from sparc3_lightning.models.architectures import linear_at, weight_of
from sparc3_lightning.models.experts import open_experts_

# By model_type what is added to ``mixtures.MIXTURES``. The last two have no experts.
MODELS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("mixtral", "olmoe", "deepseek_v3", "nemotron_h", "gpt_oss", "granitemoe")},
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 8},
    "gemma2": {"head_dim": 4, "sliding_window": 8},
    "phi3": {},
}
# Their files hold a tensor for each expert and matrix.
SPLIT = ("mixtral", "olmoe", "deepseek_v3", "nemotron_h", "qwen3_moe")


def save(kind: str, folder: Path, max_shard_size: str = "10KB", dtype: torch.dtype = torch.float32) -> Any:
    """Write a model, into several files, and return it."""
    model = make_mixture(kind, dtype, **MODELS[kind])
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def open_(model: nn.Module) -> list[str]:
    """Open the experts of a model, and return the layers of one in its last block; of its MLP, if it has none."""
    open_experts_(model)
    *_, name = (name for name, _ in model.named_modules() if name.endswith((".experts", ".mlp")))
    if name.endswith(".experts"):
        name += ".2"
    return [
        f"{name}.{key}" for key, layer in model.get_submodule(name).named_children() if isinstance(layer, nn.Linear)
    ]


def zero_rows_(model: nn.Module, layers: list[str]) -> None:
    """Set the second row of layers to zero."""
    with torch.no_grad():
        for layer in layers:
            weight_of(linear_at(model, layer))[1] = 0
