"""Experts that are opened: the model computes and holds what it did, and a neuron of an expert is like any other."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from mixtures import MIXTURES, make_mixture
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from sparc3_lightning.models.architectures import find_layers, weight_of
from sparc3_lightning.models.components import Component, mask, prune_
from sparc3_lightning.models.experts import (
    ExpertLinear,
    check_are_open,
    count_in_words,
    expert_counts,
    is_expert,
    open_experts_,
)

all_kinds = pytest.mark.parametrize("kind", MIXTURES)
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61], [7, 3, 11, 80, 64, 21, 9]])
# The stock experts of Nemotron-H add up in the float32 of their router.
TOLERANCE = {"nemotron_h": 1e-4}


def opened(kind: str, **changes):
    model = make_mixture(kind, **changes)
    open_experts_(model)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


@all_kinds
def test_an_opened_model_computes_what_the_stock_one_does_and_has_the_same_parameters(kind):
    stock, model = make_mixture(kind), opened(kind)
    check_are_open(model)
    exact = TOLERANCE.get(kind, 1e-12)
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=exact, atol=exact)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert sum(expert_counts(model).values()) > 0
    open_experts_(model)
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=exact, atol=exact)


@all_kinds
def test_gradients_of_an_opened_model_are_the_stock_ones(kind):
    stock, model = make_mixture(kind), opened(kind)
    found = []
    for one in (stock, model):
        one.requires_grad_(True)
        one(INPUT_IDS, use_cache=False).logits[:, -1].max(dim=-1).values.sum().backward()
        found.append({name: parameter.grad for name, parameter in one.named_parameters()})
    for name, grad in found[0].items():
        if grad is not None:
            torch.testing.assert_close(
                found[1][name], grad, rtol=TOLERANCE.get(kind, 1e-9), atol=TOLERANCE.get(kind, 1e-11)
            )


@all_kinds
def test_copies_and_pickled_models_have_experts_of_their_own(kind):
    model = opened(kind)
    before = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = find_layers(other, ["down_proj"])
        with torch.no_grad():
            for layer in layers.values():
                weight_of(layer)[:] = 0
        assert not torch.equal(logits_of(other), before)
    assert torch.equal(logits_of(model), before)


@all_kinds
def test_layers_of_experts_are_linear_layers_that_are_called_and_written_to(kind):
    model = opened(kind)
    layers = {name: layer for name, layer in find_layers(model, ["all"]).items() if is_expert(layer)}
    called = set()
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        assert isinstance(layer, ExpertLinear)
        assert weight_of(layer).shape == (layer.out_features, layer.in_features)
        assert f"in_features={layer.in_features}" in repr(layer)
        assert not list(layer.parameters())
        fused = model.get_parameter(layer.parameters_held["weight"])
        with torch.no_grad():
            layer_weight = weight_of(layer)
            layer_weight[1] = 7.0
            layer_weight *= 2
        assert (fused == 14).any(), name
        with torch.no_grad():
            layer_weight[1] = 0.1
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    logits_of(model)
    assert called


@all_kinds
def test_a_neuron_of_an_expert_that_is_masked_is_one_that_is_pruned(kind):
    model = opened(kind)
    before = logits_of(model)
    ups = [name for name, layer in find_layers(model, ["up_proj"]).items() if is_expert(layer)]
    chosen = [Component(name, index, -1.0, damping) for name in ups for index, damping in ((0, 1.0), (3, 0.5))]
    with mask(model, chosen):
        masked = logits_of(model)
    assert not torch.allclose(masked, before)
    assert torch.equal(logits_of(model), before)
    prune_(model, chosen)
    torch.testing.assert_close(logits_of(model), masked, rtol=1e-10, atol=1e-12)
    stock = make_mixture(kind)
    stock.load_state_dict(model.state_dict())
    exact = TOLERANCE.get(kind, 1e-10)
    torch.testing.assert_close(logits_of(stock), masked, rtol=exact, atol=exact)


@all_kinds
def test_an_expert_without_neurons_adds_nothing(kind):
    model = opened(kind)
    experts = next(iter(expert_counts(model)))
    layer = model.get_submodule(f"{experts}.0.up_proj")
    chosen = [Component(f"{experts}.0.up_proj", i, -1.0) for i in range(layer.out_features)]
    with mask(model, chosen):
        masked = logits_of(model)
    down = model.get_submodule(f"{experts}.0.down_proj")
    if down.bias is not None:
        masked_bias = down.bias.clone()
        assert masked_bias.any()
    with torch.no_grad():
        down.weight[:] = 0
    torch.testing.assert_close(logits_of(model), masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind != "nemotron_h"])
def test_a_pruned_mixture_is_saved_as_the_stock_one_and_gives_the_same_logits(kind, tmp_path):
    model = opened(kind)
    ups = [name for name, layer in find_layers(model, ["up_proj"]).items() if is_expert(layer)]
    prune_(model, [Component(name, 2, -1.0) for name in ups])
    model.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float64).eval()
    open_experts_(reloaded)
    torch.testing.assert_close(logits_of(reloaded), logits_of(model), rtol=1e-10, atol=1e-12)


def test_neurons_are_counted_in_words():
    model = opened("deepseek_v3")
    layers = find_layers(model, ["up_proj"])
    neurons = {name: layer.out_features for name, layer in layers.items()}
    assert count_in_words(model, neurons) == "72 dense, 224 in 8 x 1 experts"
    dense = {name: number for name, number in neurons.items() if not is_expert(layers[name])}
    assert count_in_words(model, dense) == "72"


def test_a_dense_model_is_left_as_it_is(make_model):
    model = make_model("llama")
    before = list(model.named_modules())
    open_experts_(model)
    check_are_open(model)
    assert list(model.named_modules()) == before
    assert expert_counts(model) == {}
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_of_no_known_kind_are_refused_by_the_name_of_their_class():
    class OtherExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 3, 2))

    model = nn.Sequential(OtherExperts())
    open_experts_(model)
    with pytest.raises(ValueError, match=r"class OtherExperts \(0\) of --model.checkpoint are of no known"):
        check_are_open(model)


@all_kinds
def test_all_layers_have_each_layer_of_experts_once_and_no_router(kind):
    model = opened(kind)
    layers = find_layers(model, ["all"])
    assert len(set(map(id, layers.values()))) == len(layers)
    number = sum(expert_counts(model).values())
    assert sum(map(is_expert, layers.values())) == number * (2 if kind == "nemotron_h" else 3)
    assert not any("router" in name or name.endswith(".gate") or name == "lm_head" for name in layers)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_model_in_bfloat16_stays_near_the_stock_one(kind):
    stock, model = make_mixture(kind, torch.bfloat16), opened(kind).to(torch.bfloat16)
    model.load_state_dict(stock.state_dict())
    found, expected = logits_of(model).float(), logits_of(stock).float()
    assert (found - expected).norm() < 0.05 * expected.norm()


def of_dbrx() -> nn.Module:
    config = SimpleNamespace(hidden_size=6, ffn_hidden_size=5, moe_num_experts=4, ffn_act_fn={"name": "silu"})
    return DbrxExperts(config)


def of_longcat() -> nn.Module:
    """Four experts, and two numbers that stand for the token itself."""
    sizes = {"expert_ffn_hidden_size": 5, "hidden_size": 6, "n_routed_experts": 4, "zero_expert_num": 2}
    return LongcatFlashExperts(SimpleNamespace(hidden_act="silu", **sizes))


def of_step() -> nn.Module:
    sizes = {"num_local_experts": 4, "hidden_size": 6, "moe_intermediate_size": 5}
    return Step3p7Experts(SimpleNamespace(hidden_act="silu", **sizes), swiglu_limit=0.5)


@pytest.mark.parametrize("make", [of_dbrx, of_longcat, of_step])
def test_experts_that_transformers_does_not_decorate_are_opened_too(make):
    torch.manual_seed(0)
    stock = make().double().requires_grad_(False)
    for parameter in stock.parameters():
        parameter.normal_()
    model = nn.Sequential(copy.deepcopy(stock))
    open_experts_(model)
    check_are_open(model)
    number = 6 if make is of_longcat else 4
    shape = (2, 9, 6) if make is of_dbrx else (18, 6)
    chosen = torch.stack([torch.randperm(number)[:2] for _ in range(18)])
    inputs = torch.randn(shape).double(), chosen, torch.rand(18, 2).double()
    torch.testing.assert_close(model[0](*inputs), stock(*inputs), rtol=1e-12, atol=1e-12)
    assert expert_counts(model) == {"0": 4}


def test_a_mean_takes_the_place_of_a_neuron_where_experts_have_biases():
    model = opened("gpt_oss")
    name = "model.layers.0.mlp.experts.1.up_proj"
    chosen = [Component(name, 0, -1.0, mean=0.7), Component(name, 3, -1.0, damping=0.5, mean=-0.2)]
    with mask(model, chosen):
        masked = logits_of(model)
    prune_(model, chosen)
    torch.testing.assert_close(logits_of(model), masked, rtol=1e-10, atol=1e-12)
