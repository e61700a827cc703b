"""A tiny random model of every decoder architecture of transformers, by its ``model_type``."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, LAYERS, HEADS, CONTEXT = 64, 32, 4, 4, 64
INNER, EXPERT = 44, 28  # no other size of a model is one of these, or twice one of these
# What the configs call these sizes. A config takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "dim_ff", "d_inner"), INNER),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp"), INNER),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "kv_channels", "v_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "global_head_dim", "query_pre_attn_scalar"), 8),
    "rotary_dim": 4,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size", "attention_window_size"), 16),
    # Mixtures of experts: four, of which a token sees two; the first layer is dense where that can be said.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), EXPERT),
    "moe_shared_expert_intermediate_size": EXPERT,
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), EXPERT),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    # State spaces, linear attention and gated convolutions.
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    # The sparse attention of DeepSeek.
    **{"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8},
    **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "unpadded_vocab_size": VOCABULARY},
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), HIDDEN),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
    **{"rel_extent": 16, "zero_expert_num": 2, "hc_lowrank": 8, "attention_head_size": 8},
    "is_decoder": True,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
# What else the config of an architecture has to say: hybrids have both kinds of layers.
EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING["layer_types"]},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), HEADS),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3_text": SLIDING,
    "gemma3n_text": {
        **SLIDING,
        **{"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    },
    "gemma4_text": {**SLIDING, "enable_moe_block": True, "global_head_dim": 16},
    "gemma4_unified_text": {**SLIDING, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": LINEAR,
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2},
        "n_layers_per_attn_res_block": 1,
    },
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": LINEAR,
    "lfm2": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTIONS,
    "lfm3": CONVOLUTIONS,
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
        **{"ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 4},
    },
    "reformer": {
        **{"attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2, "hash_seed": 0},
    },
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": HEADS},
    "zaya": {"num_experts_per_tok": 1},
}
# Which of the causal language models are not built, and why.
ENCODERS = ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart")
ENCODERS += ("prophetnet", "whisper")
WITH_TEXT = ("dots3_note", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe")
WITH_TEXT += ("qwen4_exp",)
MULTIMODAL = ("emu3", "fuyu", "gemma4_assistant", "gemma4_unified_assistant", "git", "got_ocr2", "mllama", "moshi")
MULTIMODAL += ("moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal")
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(ENCODERS, "an encoder and a decoder"),
    **dict.fromkeys(WITH_TEXT, "not text alone, but the decoder of text stands above, with `_text` in its name"),
    **dict.fromkeys(MULTIMODAL, "not text alone"),
    "blt": "patches of bytes, which models of its own make",
    "cpmant": "reads a text in both directions",
    "xlnet": "causal attention that transformers gives no padded batch",
}
# A well-known checkpoint.
EXAMPLES = {
    "afmoe": "arcee-ai/Trinity-Mini",
    "apertus": "swiss-ai/Apertus-8B-2509",
    "arcee": "arcee-ai/AFM-4.5B",
    "bamba": "ibm-ai-platform/Bamba-9B-v1",
    "biogpt": "microsoft/biogpt",
    "bloom": "bigscience/bloom-560m",
    "codegen": "Salesforce/codegen-350M-mono",
    "cohere": "CohereLabs/c4ai-command-r-v01",
    "cohere2": "CohereLabs/c4ai-command-r7b-12-2024",
    "ctrl": "Salesforce/ctrl",
    "cwm": "facebook/cwm",
    "dbrx": "databricks/dbrx-base",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek_v3": "deepseek-ai/DeepSeek-V3",
    "deepseek_v32": "deepseek-ai/DeepSeek-V3.2-Exp",
    "doge": "SmallDoge/Doge-20M",
    "dots1": "rednote-hilab/dots.llm1.base",
    "ernie4_5": "baidu/ERNIE-4.5-0.3B-PT",
    "ernie4_5_moe": "baidu/ERNIE-4.5-21B-A3B-PT",
    "exaone4": "LGAI-EXAONE/EXAONE-4.0-1.2B",
    "falcon": "tiiuae/falcon-7b",
    "falcon_h1": "tiiuae/Falcon-H1-0.5B-Base",
    "falcon_mamba": "tiiuae/falcon-mamba-7b",
    "flex_olmo": "allenai/FlexOlmo-7x7B-1T",
    "gemma": "google/gemma-2b",
    "gemma2": "google/gemma-2-2b",
    "gemma3_text": "google/gemma-3-1b-pt",
    "glm": "zai-org/glm-4-9b-hf",
    "glm4": "zai-org/GLM-4-9B-0414",
    "glm4_moe": "zai-org/GLM-4.5-Air",
    "gpt2": "openai-community/gpt2",
    "gpt_bigcode": "bigcode/starcoder",
    "gpt_neo": "EleutherAI/gpt-neo-125m",
    "gpt_neox": "EleutherAI/pythia-160m",
    "gpt_oss": "openai/gpt-oss-20b",
    "gptj": "EleutherAI/gpt-j-6b",
    "granite": "ibm-granite/granite-3.3-2b-base",
    "granitemoe": "ibm-granite/granite-3.1-1b-a400m-base",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-tiny",
    "helium": "kyutai/helium-1-2b",
    "hunyuan_v1_dense": "tencent/Hunyuan-0.5B-Instruct",
    "hunyuan_v1_moe": "tencent/Hunyuan-A13B-Instruct",
    "jamba": "ai21labs/Jamba-v0.1",
    "jetmoe": "jetmoe/jetmoe-8b",
    "kimi_linear": "moonshotai/Kimi-Linear-48B-A3B-Base",
    "lfm2": "LiquidAI/LFM2-350M",
    "lfm2_moe": "LiquidAI/LFM2-8B-A1B",
    "llama": "meta-llama/Meta-Llama-3-8B",
    "longcat_flash": "meituan-longcat/LongCat-Flash-Chat",
    "mamba": "state-spaces/mamba-130m-hf",
    "mamba2": "mistralai/Mamba-Codestral-7B-v0.1",
    "minimax": "MiniMaxAI/MiniMax-Text-01-hf",
    "minimax_m2": "MiniMaxAI/MiniMax-M2",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "modernbert-decoder": "jhu-clsp/ettin-decoder-150m",
    "mpt": "mosaicml/mpt-7b",
    "nemotron": "nvidia/Minitron-4B-Base",
    "nemotron_h": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "olmo": "allenai/OLMo-1B-hf",
    "olmo2": "allenai/OLMo-2-0425-1B",
    "olmo3": "allenai/Olmo-3-1025-7B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "openai-gpt": "openai-community/openai-gpt",
    "opt": "facebook/opt-125m",
    "persimmon": "adept/persimmon-8b-base",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "phimoe": "microsoft/Phi-3.5-MoE-instruct",
    "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "recurrent_gemma": "google/recurrentgemma-2b",
    "rwkv": "RWKV/rwkv-4-169m-pile",
    "seed_oss": "ByteDance-Seed/Seed-OSS-36B-Base",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "stablelm": "stabilityai/stablelm-2-1_6b",
    "starcoder2": "bigcode/starcoder2-3b",
    "vaultgemma": "google/vaultgemma-1b",
    "xglm": "facebook/xglm-564M",
    "xlstm": "NX-AI/xLSTM-7b",
    "zamba": "Zyphra/Zamba-7B-v1",
    "zamba2": "Zyphra/Zamba2-1.2B",
}


def architectures() -> list[str]:
    """Return the model types that transformers takes for causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(model_type: str, **changes: Any) -> Any:
    """Return the config of a tiny model.

    Args:
        model_type: Of the architecture.
        changes: What its config has in place of ``SIZES`` and ``EXTRA``, by the names of its fields.
    """
    of = CONFIG_MAPPING[model_type]
    aliases = of.attribute_map
    known = {name for name in SIZES if name in of.__dataclass_fields__}
    known |= {name for name, field in aliases.items() if name in SIZES and field not in known}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has keys and values of each head
        sizes["num_key_value_heads"] = HEADS
    return of(**{**sizes, **EXTRA.get(model_type, {}), **changes})


def build(
    model_type: str, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a tiny random model of an architecture, in evaluation mode, with frozen weights that all matter.

    Args:
        model_type: Of the architecture.
        dtype: Of the weights.
        attention: Implementation, ``eager`` or ``sdpa``; by default what transformers takes.
        seed: Of the weights.
        changes: See ``config_of``.
    """
    config = config_of(model_type, **changes)
    if attention is not None:
        config._attn_implementation = attention
    config._experts_implementation = "eager"  # another one has no float64
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.add_((0.2 if parameter.dim() > 1 else 0.05) * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)
