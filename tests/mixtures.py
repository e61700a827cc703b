"""Tiny random mixtures of experts, one of each way to keep the weights of experts, in memory and in files."""

from pathlib import Path
from typing import Any

import torch
from decoders import build
from helpers import WORDS, tokenizer_of
from torch import nn

from sparc3_lightning.models.architectures import linear_at, weight_of
from sparc3_lightning.models.experts import open_experts_

# By model_type what their configs have in place of what ``build`` gives them.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": 8},
    "olmoe": {"num_experts": 8},
    "gpt_oss": {"sliding_window": 8},
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2},
    "granitemoe": {},
    "nemotron_h": {"layers_block_type": ["full_attention", "moe"]},
}
# Those whose files hold other tensors than the model has, and the last two without experts, whose layers are fused in
# both; and what their configs have besides.
SAVED: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("mixtral", "olmoe", "deepseek_v3", "nemotron_h", "granitemoe")},
    "gpt_oss": {"num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 8},
    "gemma2": {},
    "phi3": {},
}
# Their files hold a tensor for each expert and matrix.
SPLIT = ("mixtral", "olmoe", "deepseek_v3", "nemotron_h", "qwen3_moe")


def make_mixture(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a tiny random mixture of experts of two blocks as transformers has it, for the tokenizer of ``WORDS``."""
    sizes = {"vocab_size": len(WORDS) + 4, "num_hidden_layers": 2}
    return build(kind, dtype, **{**sizes, **MIXTURES.get(kind, {}), **changes})


def save_mixture(kind: str, folder: Path, **changes: Any) -> str:
    """Write a tiny random mixture in float32 and a tokenizer, and return the folder."""
    make_mixture(kind, torch.float32, **changes).save_pretrained(folder)
    tokenizer_of(WORDS).save_pretrained(folder)
    return str(folder)


def save_in_files(kind: str, folder: Path, max_shard_size: str = "10KB", dtype: torch.dtype = torch.float32) -> Any:
    """Write one of ``SAVED`` into several files, and return it."""
    model = make_mixture(kind, dtype, **SAVED[kind])
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
