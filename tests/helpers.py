"""What tests of several rooms share: tiny models of every family by their configs, names of layers, and sentences."""

from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXT = (
    "the a of to and in is was it for on as with his he be at by had this that are they from not have or an which "
    "you one we were all her she there would their will when who him been has more if no out so said what up its "
    "about than into dog cat house tree river stone bird fish horse sun moon star rain wind snow fire good bad nice "
    "awful stupid idiot hate love like run walk eat sleep see hear speak write read think know make take give find "
    "leave call ask need feel become "
)
WORDS = TEXT.split()
# Of each family the classes, what its config calls otherwise than LLaMA's or lacks, and what it adds.
FAMILIES: dict[str, tuple[Any, Any, dict[str, str | None], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, {"head_dim": 4}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, {}, {"head_dim": 4, "sliding_window": 32}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"intermediate_size": "n_inner", "num_key_value_heads": None}, {}),
    "opt": (OPTConfig, OPTForCausalLM, {"intermediate_size": "ffn_dim", "num_key_value_heads": None}, {}),
}
# The MLP of a block, the layers that hold its neurons' rows, of which the first is scored, and the one of the columns.
MLPS = {
    "gpt2": ("transformer.h.{}.mlp", ["c_fc"], "c_proj"),
    "opt": ("model.decoder.layers.{}", ["fc1"], "fc2"),
}
GATED_MLP = ("model.layers.{}.mlp", ["up_proj", "gate_proj"], "down_proj")


def make_config(family: str, **changes: Any) -> Any:
    """Return the config of a tiny model of a family."""
    sizes = {
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
    config, _, names, extra = FAMILIES[family]
    options = {names.get(name, name): value for name, value in {**sizes, **extra, **changes}.items()}
    return config(**{name: value for name, value in options.items() if name is not None})


def mlp_of(family: str, block: int) -> tuple[list[str], str]:
    """Return the names of the layers with the rows of a block's neurons, the scored one first, and with the columns."""
    mlp, rows, column = MLPS.get(family, GATED_MLP)
    return [f"{mlp.format(block)}.{row}" for row in rows], f"{mlp.format(block)}.{column}"


def sentence(seed: int, num_words: int) -> str:
    """Return random words, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num_words,), generator=draw).tolist())


def fail_if_masked(model: Any, neurons: list[Any]) -> None:
    """Mask neurons that are not there, which must be refused before the block is entered."""
    from sparc3_lightning.models.components import mask

    with mask(model, neurons):
        pytest.fail("the block was entered")


def changed(value: Any, path: str, to: Any) -> Any:
    """Return a copy of dataclasses, dicts and lists in which something else lies at a path such as ``doses/0/kl``."""
    key, _, rest = path.partition("/")
    if is_dataclass(value):
        return replace(value, **{key: changed(getattr(value, key), rest, to) if rest else to})
    place: Any = int(key) if isinstance(value, list) else key
    copy = value.copy()
    copy[place] = changed(value[place], rest, to) if rest else to
    return copy
