"""GGUF files of tiny models, written in the conventions of llama.cpp's converter."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from helpers import FAMILIES, WORDS, make_config
from tokenizers import ByteLevelBPETokenizer
from transformers import Phi3Config, Phi3ForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}  # where llama.cpp has another name than transformers
OTHERS = {"phi3": (Phi3Config, Phi3ForCausalLM), "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM)}
INPUT_IDS = torch.tensor([[5, 17, 33, 8, 21, 40, 9, 77, 120, 64, 3, 250]])


@cache
def byte_pairs() -> tuple[Any, list[str], list[str]]:
    """Return a tokenizer, its tokens, and its merges."""
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]
    return tokenizer, sorted(state["vocab"], key=state["vocab"].get), merges


def tiny(family: str = "llama", **changes: Any) -> Any:
    """Return a random model of a family, with the vocabulary of ``byte_pairs``."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": len(byte_pairs()[1])} | changes
    torch.manual_seed(0)
    if family in OTHERS:
        kind, model_class = OTHERS[family]
        named = make_config("llama", **sizes).to_dict() | changes
        config = kind(**{key: value for key, value in named.items() if key not in ("model_type", "hidden_act")})
    else:
        config, model_class = make_config(family, **sizes), FAMILIES[family][1]
    model = model_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def metadata_of(model: Any) -> dict[str, Any]:
    """Return what llama.cpp's converter writes of a model and the tokenizer of ``byte_pairs``."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    _, tokens, merges = byte_pairs()
    metadata = {
        "general.type": "model",
        "general.name": "Tiny",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    if arch == "gpt2":
        return metadata | {"gpt2.feed_forward_length": config.n_inner, "gpt2.attention.layer_norm_epsilon": 1e-5}
    head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    parameters = config.rope_parameters.get("full_attention", config.rope_parameters)
    metadata |= {
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.rope.freq_base": float(parameters["rope_theta"]),
    }
    if arch == "starcoder2":
        metadata["starcoder2.attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        metadata[f"{arch}.attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if arch == "llama":
        metadata |= {"llama.vocab_size": config.vocab_size, "llama.rope.dimension_count": head}
    if arch == "qwen3moe":
        metadata |= {
            "qwen3moe.expert_count": config.num_experts,
            "qwen3moe.expert_used_count": config.num_experts_per_tok,
            "qwen3moe.expert_feed_forward_length": config.moe_intermediate_size,
        }
    if arch in ("qwen3", "qwen3moe", "gemma3"):
        metadata |= {f"{arch}.attention.key_length": head, f"{arch}.attention.value_length": head}
    if arch == "gemma3":
        metadata["gemma3.attention.sliding_window"] = config.sliding_window
    return metadata


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Return the weights of a model as llama.cpp's converter names, turns and permutes them."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        weight = parameter.numpy()
        if stem.endswith(".experts"):  # a tensor for each matrix of all experts
            parts = dict(zip(("gate", "up"), np.split(weight, 2, axis=1), strict=True))
            for part, of_all in (parts if suffix == "gate_up_proj" else {"down": weight}).items():
                tensors[f"blk.{stem.split('.')[2]}.ffn_{part}_exps.weight"] = np.ascontiguousarray(of_all)
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
        if arch == "llama" and (count := heads.get(stem.split(".")[-1])):
            # llama.cpp pairs neighbours for the rotation, transformers the halves of a head.
            weight = weight.reshape(count, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if arch == "gemma3" and "norm" in stem:
            weight = weight + 1
        if arch == "gpt2" and stem.split(".")[-1] in ("c_attn", "c_proj", "c_fc"):
            weight = weight.T
        tensors[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(weight)
    return tensors


def write(
    path: Path,
    model: Any,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: Of the file.
        model: A tiny one.
        metadata: What is written otherwise than ``metadata_of`` says; None leaves a key out.
        tensors: What is written otherwise than ``tensors_of`` says; None leaves a tensor out.
        kind: How matrices are quantized; None keeps them as they are.
    """
    arch = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata_of(model) | (metadata or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in (tensors_of(model) | (tensors or {})).items():
        if weight is not None and kind is not None and weight.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        elif weight is not None:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
