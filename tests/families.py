"""Tiny random models of many decoder architectures, built by their configs."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    **{"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2},
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# What a config needs beside the sizes, or calls otherwise; None leaves a size out.
OPTIONS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bert": {"is_decoder": True},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "rotary_dim": 4, "n_positions": 64},
    "ctrl": {"n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "diffllama": {},
    "doge": {},
    "falcon": {"ffn_hidden_size": 24, "multi_query": True, "alibi": False},
    "gemma2": {"head_dim": 4},
    "gemma4_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 4, "global_head_dim": 4},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8},
        "vocab_size_per_layer_input": 60,
    },
    "glm": {"head_dim": 4, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 4, "partial_rotary_factor": 0.5},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 64},
    "gpt_neox": {},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "rotary_dim": 4, "n_positions": 64},
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
        **{"shared_intermediate_size": 24, "mamba_expand": 2, **MAMBA},
    },
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 3, "head_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 4},
    "mistral": {},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": 32},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nemotron": {"head_dim": 4},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "head_dim": 4, "n_groups": 1},
        **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 8},
    },
    "phi": {},
    "phi3": {"original_max_position_embeddings": 64},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, **LINEAR},
    "qwen3_next": {
        **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, **LINEAR, **EXPERTS},
        "shared_expert_intermediate_size": 24,
    },
    "recurrent_gemma": {"lru_width": 16, "head_dim": 8},
    "roberta-prelayernorm": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 16},
    "starcoder2": {},
    "zamba2": {
        **{"layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3, "num_key_value_heads": 4},
        **{"num_mem_blocks": 1, "attention_head_dim": 8, "adapter_rank": 4, "mamba_d_state": 8, "mamba_headdim": 8},
        **{"n_mamba_heads": 4, "mamba_expand": 2, "chunk_size": 8},
    },
}


def make(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Return a tiny random model of an architecture, in which every parameter matters."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **OPTIONS[family], **options})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)
