"""The config of the model in a GGUF file: what transformers takes from the metadata, and what it passes over.

Whatever the file says about the model is in the config that comes out, or the file is refused.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from sparc3_lightning.models.gguf_header import Header, Value

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WAY_OUT = "use the original checkpoint, of safetensors files, in its place"
ROPE_FACTORS = "rope_freqs.weight"  # what the wavelength of each pair of dimensions is multiplied by
# What the configs of transformers call a number, by the key of the metadata behind the name of the architecture.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "use_parallel_residual": ("use_parallel_residual",),
    "vocab_size": ("vocab_size",),
}
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_NEEDED = (("block_count",), ("context_length",), ("embedding_length",), _EPSILONS)
_VALUES = "attention.value_length"
_WINDOWS = ("attention.sliding_window", "attention.sliding_window_pattern")
_ROPE = ("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa")
# What a key says where it changes nothing; any other value is refused.
_NO_CHANGE: dict[str, tuple[Value, ...]] = {
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),  # the order of rows in which every file of llama.cpp has them
}
_PLAIN_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}
_NO_SCALING: dict[str, tuple[Value, ...]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_SCALING = (
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",  # says how the model was trained, and changes nothing
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
# Gemma divides the scores of its attention by the root of the head's width, but for its largest model, which llama.cpp
# knows by its number of layers, by the root of the hidden size per head. No key says it.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
_LLAMA3_CONTEXT = 8192


class Refused(ValueError):
    """A file that would not come out as it is, in one sentence with the way out."""


def complete(config: "PretrainedConfig", header: Header) -> None:
    """Bring into a config what transformers did not take from the file's metadata.

    Args:
        config: That transformers made of the metadata. It is changed.
        header: Of the file.

    Raises:
        Refused: If the metadata says something about the model that a config of its kind cannot say, or that nobody
            here knows, or if it lacks what transformers would guess.
    """
    said = of_model(header)
    known = {*_NUMBERS, _VALUES, *_WINDOWS, *_ROPE, *_SCALING, *_NO_CHANGE, *_NO_SCALING}
    if unknown := sorted(said.keys() - known):
        raise refusal(header, f"says {_spoken(header, unknown[0])}, and what that means is not known here")
    for keys in _NEEDED:
        if not said.keys() & keys:
            raise refusal(header, f"lacks the key {header.architecture}.{keys[0]}")
    # Falcon's queries, keys and values are sorted by kind; with one head of keys transformers has them so too.
    falcon = ("jploski",) if said.get("attention.head_count_kv") == 1 else ()
    for key, neutral in (_NO_CHANGE | _NO_SCALING).items():
        if key in said and said[key] not in (*neutral, *falcon):
            raise refusal(header, f"says {_spoken(header, key)}, which a config of transformers cannot say")
    for key, names in _NUMBERS.items():
        if (value := said.get(key, None if key == "feed_forward_length" else _default(key, header))) is not None:
            _set_number(config, header, key, names, value)
    if said.get(_VALUES, width := _width(config)) != width:
        raise refusal(header, f"says {_spoken(header, _VALUES)}, and its keys are of width {width}")
    for which, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = header.metadata.get(f"tokenizer.ggml.{which}_token_id")
        if token is not None and getattr(config, f"{name}_token_id", None) != token:
            setattr(config, f"{name}_token_id", token)
    for flag, bias in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if bias in header.tensors and getattr(config, flag, None) is False:
            setattr(config, flag, True)
    _set_window(config, header, said)
    _set_rope(config, header, said)
    _check_gemma(config, header)


def of_model(header: Header) -> dict[str, Value]:
    """Return what the metadata says about the model, by the keys behind the name of the architecture."""
    start = f"{header.architecture}."
    return {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}


def refusal(header: Header, reason: str) -> Refused:
    """Return the error for a file, with the way out."""
    return Refused(f"{header.path} {reason}: {WAY_OUT}.")


def _spoken(header: Header, key: str) -> str:
    return f"{header.architecture}.{key} = {of_model(header)[key]!r:.80}"


def _number(header: Header, key: str, default: float = 0) -> int | float:
    value = of_model(header).get(key, default)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise refusal(header, f"says {_spoken(header, key)}, which is no number")
    return value


def _default(key: str, header: Header) -> int | None:
    """Return what a number is where no key says it, if anything is known."""
    heads, hidden = int(_number(header, "attention.head_count")), int(_number(header, "embedding_length"))
    if not heads:
        return None
    if key == "attention.head_count_kv":
        return heads
    if key == "attention.key_length":
        queries = header.tensors.get("blk.0.attn_q.weight")
        return (queries.shape[0] if queries else hidden) // heads
    return 4 * hidden if key == "feed_forward_length" else None


def _width(config: "PretrainedConfig") -> int:
    """Return the width of a head of the attention; 0 of a model without."""
    heads = getattr(config, "num_attention_heads", 0)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)


def _set_number(config: "PretrainedConfig", header: Header, key: str, names: Iterable[str], value: Value) -> None:
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    name = next((name for name in names if hasattr(config, name)), None)
    if name == "num_key_value_heads" and isinstance(value, list):
        # LFM2: no heads where a layer is a convolution.
        types = ["full_attention" if heads else "conv" for heads in value]
        if types == getattr(config, "layer_types", None) and {*value} == {0, config.num_key_value_heads}:
            return
    if isinstance(value, str | list) or not math.isfinite(value):
        raise refusal(header, f"says {_spoken(header, key)}, which a config of transformers cannot say")
    if name is None:
        if value and value != _default(key, header) and key != "context_length":
            raise refusal(header, f"says {_spoken(header, key)}, for which {config.model_type} has no place")
    elif (now := getattr(config, name)) is None or not math.isclose(now, value, rel_tol=1e-6):
        setattr(config, name, value)


def _set_window(config: "PretrainedConfig", header: Header, said: dict[str, Value]) -> None:
    """Set how far back the attention looks, and in which layers."""
    window, pattern = (said.get(key) or None for key in _WINDOWS)
    types: list[str] | None = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" in types:
        if window is None:
            raise refusal(header, f"has no {header.architecture}.{_WINDOWS[0]}, which {config.model_type} needs")
        config.sliding_window = window
        if isinstance(pattern, int):
            pattern = [(i + 1) % pattern != 0 for i in range(len(types))]
        if isinstance(pattern, list):
            config.layer_types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif types is None and hasattr(config, "sliding_window"):
        config.sliding_window = window
    elif isinstance(window, int) and window < config.max_position_embeddings:
        raise refusal(header, f"says {_spoken(header, _WINDOWS[0])}, for which {config.model_type} has no place")


def _set_rope(config: "PretrainedConfig", header: Header, said: dict[str, Value]) -> None:
    """Set the angles that positions are turned by."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        if turned := sorted(key for key in said if key.startswith("rope.") and said[key]):
            raise refusal(header, f"says {_spoken(header, turned[0])}, for which {config.model_type} has no place")
        return
    is_nested = any(isinstance(value, dict) for value in parameters.values())
    main = parameters["full_attention"] if is_nested else parameters
    head = _width(config)
    num_turned, theta = int(_number(header, "rope.dimension_count") or head), _number(header, "rope.freq_base", 10000.0)
    if other := sorted(main.keys() - _PLAIN_ROPE):
        raise refusal(header, f"does not say the {other[0]} of the positions, which {config.model_type} needs")
    new: dict[str, str | float] = {"rope_type": "default", "rope_theta": theta}
    if "partial_rotary_factor" in main:
        new["partial_rotary_factor"] = num_turned / head
    if int(head * float(new.get("partial_rotary_factor", 1.0))) != num_turned:
        raise refusal(
            header, f"turns {num_turned} of the {head} dimensions of a head, which {config.model_type} cannot"
        )
    new |= _scaling(config, header, said, theta, num_turned)
    if is_nested:
        local = {"rope_type": "default", "rope_theta": _number(header, "rope.freq_base_swa", 10000.0)}
        config.rope_parameters = {"full_attention": new, "sliding_attention": local}
    elif "rope.freq_base_swa" in said:
        raise refusal(
            header, f"says {_spoken(header, 'rope.freq_base_swa')}, for which {config.model_type} has no place"
        )
    else:
        config.rope_parameters = new
    try:
        read_again = type(config).from_dict(config.to_dict()).rope_parameters
    except (KeyError, TypeError, ValueError):
        read_again = None
    if read_again != config.rope_parameters:
        raise refusal(header, f"scales its positions by {new['rope_type']!r}, which {config.model_type} cannot")


def _scaling(
    config: "PretrainedConfig", header: Header, said: dict[str, Value], theta: float, num_turned: int
) -> dict[str, str | float]:
    """Return the rope parameters of a model that was stretched to longer contexts, or none."""
    if other := sorted(name for name in header.tensors if name.startswith("rope_factors")):
        raise refusal(header, f"holds the tensor {other[0]}, factors for long contexts that transformers does not read")
    kind = said.get("rope.scaling.type", "linear")
    factor = _number(header, "rope.scaling.factor") or _number(header, "rope.scale_linear") or 1.0
    found: dict[str, str | float] = {}
    if kind not in ("none", "linear", "yarn"):
        raise refusal(header, f"says {_spoken(header, 'rope.scaling.type')}, which is not carried over")
    if kind != "none" and factor != 1.0:
        found = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            context = _number(header, "rope.scaling.original_context_length") or config.max_position_embeddings
            found["original_max_position_embeddings"] = int(context)
            for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
                found[key] = _number(header, f"rope.scaling.yarn_{key}", usual)
    if ROPE_FACTORS not in header.tensors:
        return found
    factors = header.floats(ROPE_FACTORS)
    if factors is None or factors.shape != (num_turned // 2,):
        raise refusal(header, f"holds a tensor {ROPE_FACTORS} of another shape or kind than {num_turned // 2} float32")
    if np.all(factors == 1.0):
        return found
    contexts = [_LLAMA3_CONTEXT, config.max_position_embeddings, *(2**i for i in range(4, 21))]
    by_tensor = _llama3(factors.astype(np.float64), theta, num_turned, contexts)
    if by_tensor is None or found:
        raise refusal(header, f"holds factors in {ROPE_FACTORS} that are not those of LLaMA 3.1")
    return by_tensor


def _llama3(
    factors: np.ndarray, theta: float, num_turned: int, contexts: Iterable[int]
) -> dict[str, str | float] | None:
    """Return the rope parameters, in the way of LLaMA 3.1, of which factors were made.

    Args:
        factors: What the wavelength of each pair of dimensions is multiplied by, shape ``[num_turned / 2]``.
        theta: Base of the wavelengths.
        num_turned: Dimensions of a head that are turned.
        contexts: Lengths that the model may have been trained with before it was stretched.

    Returns:
        The parameters, or None if there are none that give these factors to 1 in 100,000.
    """
    if not np.all(factors > 0.0):
        return None
    wavelengths = 2 * math.pi * theta ** (np.arange(0, num_turned, 2) / num_turned)
    for context in contexts:
        # 1 where a wave is short and stays as it is, 0 where it is long and stretched by the whole factor.
        kept = np.clip((context / wavelengths - 1.0) / 3.0, 0.0, 1.0)
        longest = int(np.argmin(kept))
        rest = 1.0 / factors[longest] - kept[longest]
        if kept[longest] == 1.0 or rest <= 0.0:
            continue
        exact = (1.0 - kept[longest]) / rest
        for factor in (round(exact), exact):
            if np.allclose(1.0 / ((1.0 - kept) / factor + kept), factors, rtol=1e-5, atol=0.0):
                return {
                    "rope_type": "llama3",
                    "factor": float(factor),
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": context,
                }
    return None


def _check_gemma(config: "PretrainedConfig", header: Header) -> None:
    if config.model_type not in _LARGEST_GEMMA:
        return
    if config.num_hidden_layers == _LARGEST_GEMMA[config.model_type]:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    elif config.query_pre_attn_scalar != config.head_dim:
        raise refusal(
            header,
            f"has heads of width {config.head_dim}, and transformers would divide the scores of its attention by "
            f"the root of {config.query_pre_attn_scalar}",
        )
