"""Tiny random models whose files hold other tensors than the model does, or whose layers are fused; and views of these.

A view is a layer without parameters of its own, as the layers of an expert are.
"""

from pathlib import Path
from typing import Any

import torch
from helpers import WORDS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# By model_type what is added to the sizes.
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 12, "num_experts": 12, "num_experts_per_tok": 8, "head_dim": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 8},
    "deepseek_v3": {
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "sliding_window": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 4, "sliding_window": 8},
    "phi3": {},
}
SPLIT = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")  # whose files hold a tensor for each expert and matrix


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind]})).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(kind: str, folder: Path, max_shard_size: str = "10KB", dtype: torch.dtype = torch.float32) -> Any:
    """Write a model into several files, and return it."""
    model = make_model(kind).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


class View(nn.Linear):
    """What one expert has of a fused parameter."""

    def __init__(self, experts: nn.Module, name: str, key: str, expert: int) -> None:
        nn.Module.__init__(self)
        self.__dict__["experts"] = experts
        self.key, self.expert = key, expert
        self.parameters_held = {"weight": f"{name}.{key}"}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return getattr(self.experts, self.key)[self.expert]


def open_(model: nn.Module) -> list[str]:
    """Put views of an expert of the last block into a model, and return their names; or those of the layers of an MLP.

    Without experts, the layers are those of its MLP.
    """
    *_, name = (name for name, _ in model.named_modules() if name.endswith((".experts", ".mlp")))
    module = model.get_submodule(name)
    if name.endswith(".mlp"):
        return [f"{name}.{key}" for key, layer in module.named_children() if isinstance(layer, nn.Linear)]
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() == 3:
            module.add_module(f"of_{key}", View(module, name, key, 2))
    return [f"{name}.{key}" for key, _ in module.named_children() if key.startswith("of_")]


def zero_rows_(model: nn.Module, layers: list[str]) -> None:
    """Set the second row of layers to zero."""
    with torch.no_grad():
        for layer in layers:
            model.get_submodule(layer).weight[1] = 0  # type: ignore[index, operator]
