"""Heads and channels of other architectures than those with a test of their own: a pruned one is a masked one."""

import copy

import pytest
import torch
from decoders import HIDDEN, build
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.models.architectures import find_layers, head_layers
from sparc3_lightning.models.components import Component, mask, prune_
from sparc3_lightning.models.heads import heads_left_out, num_heads

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 9, 23, 51]])
LAYERS = {
    "bloom": "self_attention.dense",
    "codegen": "out_proj",
    "dbrx": "out_proj",
    "deepseek_v3": "o_proj",
    "diffllama": "o_proj",
    "doge": "o_proj",
    "falcon": "self_attention.dense",
    "gemma2": "o_proj",
    "gpt_bigcode": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "gptj": "out_proj",
    "granitemoehybrid": "o_proj",
    "lfm2": "self_attn.out_proj",
    "mistral": "o_proj",
    "modernbert-decoder": "attn.Wo",
    "mpt": "out_proj",
    "nemotron": "o_proj",
    "persimmon": "self_attn.dense",
    "phi": "self_attn.dense",
    "phi3": "o_proj",
    "qwen3_5_text": "o_proj",
    "starcoder2": "o_proj",
    "zamba2": "o_proj",
}


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.few(4)
def test_a_pruned_head_or_channel_is_a_masked_one(family: str) -> None:
    model = build(family)
    assert head_layers(model) == [LAYERS[family]]
    names = list(find_layers(model, head_layers(model)))
    assert (heads_left_out(model) is None) == (family not in ("granitemoehybrid", "lfm2", "qwen3_5_text", "zamba2"))
    chosen = [
        [
            Component(name, index, 0.0, granularity="head")
            for name in names
            for index in off
            if index < num_heads(model, name)
        ]
        for off in ([1], [0, 1], [0, 1, 3], [2, 3])
    ]
    chosen.append([Component(name, index, 0.0, granularity="channel") for name in names for index in (0, 7)])
    with torch.no_grad():
        for components in chosen:
            pruned = copy.deepcopy(model)
            with mask(model, components):
                masked = model(INPUT_IDS, use_cache=False).logits
            prune_(pruned, components)
            torch.testing.assert_close(pruned(INPUT_IDS, use_cache=False).logits, masked, rtol=1e-6, atol=1e-6)
            assert (masked - model(INPUT_IDS, use_cache=False).logits).abs().max() > 1e-5


def values_of_head(family: str, model: PreTrainedModel, layer: nn.Linear, head: int) -> Tensor:
    """Return the rows of a layer that make the values of one head, as the source of each family splits them."""
    size, heads = HIDDEN // model.config.num_attention_heads, model.config.num_attention_heads
    if family == "phi3":
        group = heads // model.config.num_key_value_heads
        return layer.weight[-size * model.config.num_key_value_heads :].unflatten(0, (-1, size))[head // group]
    if family == "deepseek_v3":
        return layer.weight.unflatten(0, (heads, -1))[head, model.config.qk_nope_head_dim :]
    return layer.weight.unflatten(0, (heads, 3, -1))[head, 2]  # bloom and gpt_neox


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("bloom", "query_key_value"),
        ("gpt_neox", "query_key_value"),
        ("phi3", "qkv_proj"),
        ("deepseek_v3", "kv_b_proj"),
    ],
)
def test_the_head_of_a_number_is_the_one_whose_values_lie_among_others(family: str, values: str) -> None:
    model = build(family, **({"num_key_value_heads": 4} if family == "phi3" else {}))
    name = list(find_layers(model, head_layers(model)))[1]
    attention = model.get_submodule(name.rpartition(".")[0])
    layer = attention.get_submodule(values)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        for head in range(num_heads(model, name)):
            with mask(model, [Component(name, head, 0.0, granularity="head")]):
                masked = model(INPUT_IDS, use_cache=False).logits
            rows = values_of_head(family, model, layer, head)
            kept = rows.clone()
            rows.zero_()
            torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, masked, rtol=1e-5, atol=1e-5)
            rows.copy_(kept)
            assert (masked - model(INPUT_IDS, use_cache=False).logits).abs().max() > 1e-4


def test_the_end_of_a_name_that_other_layers_have_too_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'out_proj' is no layer of attention heads .* \['self_attn\.out_proj'\]: leave"
    ):
        head_layers(build("lfm2"), ["out_proj"])


def test_values_that_another_block_reads_too_are_kept() -> None:
    """Of Gemma 4 the last blocks have no values of their own."""
    model = build("gemma4_text", num_kv_shared_layers=2)
    names = [f"model.layers.{block}.self_attn.o_proj" for block in range(2)]
    assert head_layers(model) == names
    assert heads_left_out(model) == "Left out: 2 layers without known heads, such as model.layers.2.self_attn.o_proj"
    heads = [Component(name, index, 0.0, granularity="head") for name in names for index in (0, 1)]
    with torch.no_grad():
        with mask(model, heads):
            masked = model(INPUT_IDS, use_cache=False).logits
        prune_(model, heads)
        torch.testing.assert_close(model(INPUT_IDS, use_cache=False).logits, masked, rtol=1e-6, atol=1e-6)
