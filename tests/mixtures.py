"""Tiny random mixtures of experts, one of each way to keep the weights of experts."""

from pathlib import Path
from typing import Any

import torch
from helpers import WORDS, tokenizer_of
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
_DEEPSEEK = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}
# By model_type what is added to the sizes.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "sliding_window": 8},
    "llama4_text": {"intermediate_size_mlp": 20, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 4},
    "deepseek_v3": _DEEPSEEK,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "moe"],
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 4,
    },
}


def make_mixture(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a tiny random mixture of experts as transformers has it, with frozen weights that all matter."""
    torch.manual_seed(0)
    options = {**SIZES, **MIXTURES.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    for name, parameter in model.requires_grad_(False).named_parameters():
        scale = 0.3 if "norm" in name else 0.4
        parameter.data.add_(scale * torch.randn_like(parameter))
    return model


def save_mixture(kind: str, folder: Path, **changes: Any) -> str:
    """Write a tiny random mixture in float32 and a tokenizer, and return the folder."""
    make_mixture(kind, torch.float32, **changes).save_pretrained(folder)
    tokenizer_of(WORDS).save_pretrained(folder)
    return str(folder)
