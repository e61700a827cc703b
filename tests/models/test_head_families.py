"""Heads of other architectures than those with a test of their own: a pruned head is a masked one."""

import copy

import pytest
import torch
from decoders import build

from sparc3_lightning.models.architectures import find_layers, head_layers, mlps_of
from sparc3_lightning.models.components import Component, mask, prune_
from sparc3_lightning.models.heads import num_heads

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 9, 23, 51]])
LAYERS = {
    "gemma2": "o_proj",
    "gptj": "out_proj",
    "granitemoehybrid": "o_proj",
    "lfm2": "self_attn.out_proj",
    "mistral": "o_proj",
    "nemotron": "o_proj",
    "phi": "self_attn.dense",
    "qwen3_5_text": "o_proj",
    "zamba2": "o_proj",
    "starcoder2": "o_proj",
}


@pytest.mark.parametrize("family", LAYERS)
def test_a_pruned_head_is_a_masked_one(family: str) -> None:
    model = build(family, torch.float64)
    assert head_layers(model) == [LAYERS[family]]
    names = list(find_layers(model, head_layers(model)))
    with torch.no_grad():
        for off in ([1], [0, 1], [0, 1, 2]):
            pruned = copy.deepcopy(model)
            heads = [Component(name, index, 0.0) for name in names for index in off if index < num_heads(model, name)]
            with mask(model, heads):
                masked = model(INPUT_IDS, use_cache=False).logits
            prune_(pruned, heads)
            torch.testing.assert_close(pruned(INPUT_IDS, use_cache=False).logits, masked, rtol=1e-6, atol=1e-6)
            assert (masked - model(INPUT_IDS, use_cache=False).logits).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["bloom", "codegen", "falcon", "gpt_neox", "phi3"])
def test_heads_whose_values_lie_among_others_are_refused(family: str) -> None:
    model = build(family, torch.float64)
    assert mlps_of(model)
    with pytest.raises(ValueError, match="head: the model has no attention of a known kind"):
        head_layers(model)


def test_the_end_of_a_name_that_other_layers_have_too_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'out_proj' is no layer of attention heads .* \['self_attn\.out_proj'\]: leave"
    ):
        head_layers(build("lfm2"), ["out_proj"])
