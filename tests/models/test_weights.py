"""Single weights: masked and pruned, alone and beside neurons and heads; and which are refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fail_if_masked
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from weights import both_families, chosen_of, logits

from sparc3_lightning.models.components import Component, check, mask, prune_
from sparc3_lightning.models.weights import mask_weights, prune_weights_


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def by_hand(model: Any, weights: list[Component], damping: float = 1.0) -> Any:
    """Return a copy in which each entry is smaller, by the layer's own parameter: Conv1D keeps [inputs, outputs]."""
    other = copy.deepcopy(model)
    for n in weights:
        layer = other.get_submodule(n.module)
        at = (n.input, n.index) if isinstance(layer, Conv1D) else (n.index, n.input)
        layer.weight[at] *= 1 - damping * n.damping
    return other


@both_families
@pytest.mark.parametrize("damping", [0.25, 1.0])
def test_a_mask_makes_single_entries_smaller_and_puts_them_back_bit_for_bit(make_model, family, damping):
    model = make_model(family)
    weights, before, whole = chosen_of(model, dampings=(1.0, 0.5)), parameters(model), logits(model)
    with mask(model, weights, damping):
        found = logits(model)
    torch.testing.assert_close(found, logits(by_hand(model, weights, damping)), rtol=1e-9, atol=1e-9)
    assert (found - whole).abs().max() > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@both_families
def test_pruned_weights_are_masked_weights_and_no_other_entry_changes(make_model, family):
    model = make_model(family)
    weights = chosen_of(model)
    with mask(model, weights):
        masked = logits(model)
    expected = parameters(by_hand(model, weights))
    prune_(model, weights)
    assert torch.equal(logits(model), masked)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(model).items())


def test_weights_come_back_after_an_exception_and_masks_can_be_nested(make_model):
    model = make_model()
    weights, before = chosen_of(model), parameters(model)
    with pytest.raises(KeyError), mask(model, weights), mask(model, weights[::2], 0.5):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_a_weight_that_is_off_is_zero_even_where_it_is_infinite(make_model):
    model, name = make_model(dtype=torch.bfloat16), "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    layer.weight[2, 3] = torch.inf
    with mask_weights(model, {name: {(2, 3): 1.0}}):
        assert layer.weight[2, 3] == 0
    assert layer.weight[2, 3] == torch.inf
    prune_weights_(model, {name: {(2, 3): 1.0}})
    assert layer.weight[2, 3] == 0


def test_weights_neurons_heads_and_channels_can_be_off_together(make_model):
    model = make_model()
    weights = chosen_of(model)
    output = "model.layers.1.self_attn.o_proj"
    others = [
        Component("model.layers.0.mlp.up_proj", 3, 0.0),
        Component(output, 1, 0.0, granularity="head"),
        Component(output, 1, 0.0, granularity="channel"),
    ]
    with mask(model, [*weights, *others]):
        found = logits(model)
    expected = by_hand(model, weights)
    with mask(expected, others):
        torch.testing.assert_close(found, logits(expected), rtol=1e-9, atol=1e-9)
    prune_(model, [*weights, *others])
    torch.testing.assert_close(logits(model), found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use", [fail_if_masked, prune_, check])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (
            Component("model.layers.0.mlp.up_proj", 24, 0.0, granularity="weight", input=0),
            r"Weight \[24, 0\] of .* has 24 x 16 weights",
        ),
        (Component("model.layers.0.mlp.up_proj", 0, 0.0, granularity="weight", input=16), r"Weight \[0, 16\] of "),
        (Component("model.layers.0.mlp.up_proj", 0, 0.0, granularity="weight", input=-1), r"Weight \[0, -1\] of "),
        (Component("model.layers.0.mlp.up_proj", -1, 0.0, granularity="weight", input=0), r"Weight \[-1, 0\] of "),
        (
            Component("model.layers.7.mlp.up_proj", 0, 0.0, granularity="weight", input=0),
            "'model.layers.7.mlp.up_proj' is not a layer whose",
        ),
        (
            Component("model.norm", 0, 0.0, granularity="weight", input=0),
            "'model.norm' is not a layer whose single weights",
        ),
        (
            Component("lm_head", 0, 0.0, granularity="weight", input=0),
            "'lm_head' is not a layer .* other than its head",
        ),
        (
            Component("model.layers.0.mlp.up_proj", 1, 0.0, mean=0.5, granularity="weight", input=0),
            "A weight of neuron 1 of .* a constant",
        ),
    ],
)
def test_a_weight_that_is_not_there_is_refused_and_nothing_is_changed(make_model, use: Callable, bad, complaint):
    model = make_model()
    weights, before = chosen_of(model), parameters(model)
    with pytest.raises(ValueError, match=complaint):
        use(model, [*weights, bad])
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())
