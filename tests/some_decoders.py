"""Tiny random models of many decoder architectures, by the model_type of transformers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# What the config of each has beside the sizes.
DECODERS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 4, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "gpt_neox": {},
    "cohere": {"logit_scale": 0.2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "n_shared_experts": 1,
    },
    "lfm2": {"block_ff_dim": 24, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 12,
        "layer_types": ["attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
    },
}
ONLY_EAGER = ("bloom", "gemma2", "gpt_oss")  # those that have no sdpa attention


def make_decoder(
    family: str, dtype: torch.dtype = torch.float64, attention: str = "eager", seed: int = 0, **changes: Any
) -> Any:
    """Return a tiny random model, frozen and in evaluation mode; its biases too are random."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **DECODERS.get(family, {}), **changes})
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # transformers starts with norms of 1 and tiny weights: make every parameter matter.
        parameter.data.add_((0.1 if "norm" in name else 0.3) * torch.randn_like(parameter))
    return model
