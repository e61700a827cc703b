"""The rules: gradients against models written out with detached factors, and where the relevance goes."""

from typing import Any

import pytest
import torch
from helpers import FAMILIES, MLPS, mlp_of
from slow_lrp import INPUT_IDS, all_families, all_rules, assert_same, gradients, linear_weights, positions_of, slow
from torch import Tensor

from sparc3_lightning.attribution.lrp import lrp

# OPT as its model of 350 million has it: norms after the sum, and narrow embeddings.
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 8}


def input_relevance(parts: dict[str, Tensor]) -> float:
    """Sum gradient times input over the embeddings, of the tokens and of the positions."""
    positions = parts["positions"].sum().item() if "positions" in parts else 0
    return (parts["embeddings"] * parts["d embeddings"]).sum().item() + positions


def zero_biases_(model: Any) -> None:
    """Set every bias to zero: a bias keeps the relevance that falls on it."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()


@all_families
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_gradients_under_the_rules_are_those_of_a_model_written_out_with_detached_factors(make, family, rule):
    model = make(family)
    with lrp(model, rule):
        got = gradients(model)
    assert_same(*slow(got, model, rule, rule), rtol=1e-8)


@all_rules
@pytest.mark.usefixtures("in_float64")
def test_gradients_under_the_rules_are_right_with_norms_after_the_sum_and_narrow_embeddings(make, rule):
    model = make("opt", **OPT_350M)
    with lrp(model, rule):
        got = gradients(model)
    assert_same(*slow(got, model, rule, rule), rtol=1e-8)


@pytest.mark.usefixtures("in_float64")
def test_gradients_under_the_rules_are_right_with_biases_everywhere(make):
    model = make("llama", attention_bias=True, mlp_bias=True)
    with lrp(model):
        got = gradients(model)
    assert_same(*slow(got, model, "attnlrp", "attnlrp"), rtol=1e-8)


@all_families
@all_rules
def test_the_rules_change_the_gradient(make, family, rule):
    model = make(family)
    before = gradients(model)
    with lrp(model, rule):
        inside = gradients(model)
    for name in linear_weights(model):
        assert (inside[name] - before[name]).norm() > 0.01 * before[name].norm(), name


@all_families
@pytest.mark.usefixtures("in_float64")
def test_cp_lrp_puts_nothing_on_what_decides_where_to_look_and_what_to_let_through(make, family):
    model = make(family)
    with lrp(model, "cp_lrp"):
        parts = gradients(model)
    for name in linear_weights(model):
        if name.endswith("c_attn.weight"):  # queries, keys and values in one
            assert not parts[name][:, : 2 * 16].any()
            assert parts[name][:, 2 * 16 :].any()
            continue
        is_bypassed = name.split(".")[-2] in ("q_proj", "k_proj", "gate_proj")
        assert (parts[name].abs().sum().item() == 0) == is_bypassed, name


@all_families
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("in_float64")
def test_cp_lrp_conserves_the_target_logit(make, family, seed):
    model = make(family, seed=seed)
    zero_biases_(model)
    with lrp(model, "cp_lrp"):
        parts = gradients(model)
    assert input_relevance(parts) == pytest.approx(parts["logit"].item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "llama", "attention_bias": True, "mlp_bias": True},
        {"family": "gpt2"},
        {"family": "opt"},
        {"family": "opt", **OPT_350M},
    ],
)
@pytest.mark.usefixtures("in_float64")
def test_biases_and_positions_keep_the_relevance_that_the_input_lacks(make, options):
    model = make(**options)
    biases = [parameter.requires_grad_() for name, parameter in model.named_parameters() if name.endswith(".bias")]
    if positions_of(model) is not None:
        biases.append(positions_of(model).weight.requires_grad_())
    embeddings = model.get_input_embeddings()(INPUT_IDS).detach().requires_grad_()
    with lrp(model, "cp_lrp"):
        target = model(inputs_embeds=embeddings).logits[0, -1].max()
        target.backward()
    on_input = (embeddings * embeddings.grad).sum().item()
    on_biases = sum((bias * bias.grad).sum().item() for bias in biases if bias.grad is not None)
    assert abs(on_biases) > 1e-3 * abs(target.item())
    assert on_input + on_biases == pytest.approx(target.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_attnlrp_keeps_a_part_of_the_target_logit(make, seed):
    model = make(seed=seed)
    with lrp(model, "attnlrp"):
        parts = gradients(model)
    assert 0.3 < input_relevance(parts) / parts["logit"].item() < 0.95


def _relevance_at(model: Any, rule: str, parts: list[str]) -> dict[str, Tensor]:
    """Return gradient times value at outputs ('up_proj') and inputs ('>down_proj') of layers, for every block."""
    kept: dict[str, Tensor] = {}

    def keep(key: str, value: Tensor) -> None:
        value.retain_grad()
        kept[key] = value

    handles = []
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in parts:
            handles.append(module.register_forward_hook(lambda m, i, out, key=name: keep(key, out)))
        if f">{kind}" in parts:
            key = f"{name.removesuffix(kind)}>{kind}"
            handles.append(module.register_forward_pre_hook(lambda m, inputs, key=key: keep(key, inputs[0])))
    embeddings = model.get_input_embeddings()(INPUT_IDS).detach().requires_grad_()
    with lrp(model, rule):
        model(inputs_embeds=embeddings).logits[0, -1].max().backward()
    for handle in handles:
        handle.remove()
    return {key: (value * value.grad).detach() for key, value in kept.items() if value.grad is not None}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MLPS.keys()))
@pytest.mark.usefixtures("in_float64")
def test_a_gated_mlp_gives_half_of_each_neurons_relevance_to_up_proj_and_half_to_gate_proj(make, family):
    model = make(family)
    relevance = _relevance_at(model, "attnlrp", ["up_proj", "gate_proj", ">down_proj"])
    assert len(relevance) == 3 * model.config.num_hidden_layers
    for k in range(model.config.num_hidden_layers):
        up, gate, down = (relevance[f"model.layers.{k}.mlp.{part}"] for part in ("up_proj", "gate_proj", ">down_proj"))
        assert down.abs().max() > 0
        torch.testing.assert_close(up, down / 2, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gate, down / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_a_plain_mlp_gives_all_of_each_neurons_relevance_to_its_row(make, family, rule):
    model = make(family)
    ((row, *_), column) = mlp_of(family, 0)
    relevance = _relevance_at(model, rule, [row.rpartition(".")[2], f">{column.rpartition('.')[2]}"])
    for k in range(model.config.num_hidden_layers):
        (row,), column = mlp_of(family, k)
        parent, _, name = column.rpartition(".")
        after = relevance[f"{parent}.>{name}"].reshape(relevance[row].shape)
        assert after.abs().max() > 0
        torch.testing.assert_close(relevance[row], after, rtol=1e-6, atol=1e-12)


@all_families
@pytest.mark.parametrize(("rule", "share"), [("attnlrp", 0.5), ("cp_lrp", 1.0)])
@pytest.mark.usefixtures("in_float64")
def test_attention_gives_its_share_of_the_relevance_to_the_values(make, family, rule, share):
    model = make(family)
    inputs, outputs = {"gpt2": ("c_attn", "c_proj"), "opt": ("v_proj", "out_proj")}.get(family, ("v_proj", "o_proj"))
    relevance = _relevance_at(model, rule, [inputs, f">{outputs}"])
    attentions = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    assert len(attentions) == model.config.num_hidden_layers
    for name in attentions:
        values = relevance[f"{name}.{inputs}"]
        if family == "gpt2":  # queries, keys and values in one
            values = values[..., 2 * 16 :]
        assert values.sum().item() == pytest.approx(share * relevance[f"{name}.>{outputs}"].sum().item(), rel=1e-9)


@all_families
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_eager_and_sdpa_attention_give_the_same_relevance(make, family, rule):
    parts = {}
    for implementation in ("eager", "sdpa"):
        model = make(family, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        with lrp(model, rule):
            parts[implementation] = gradients(model)
    assert_same(parts["eager"], parts["sdpa"], rtol=1e-10)


@all_families
@all_rules
def test_relevance_in_bfloat16_is_close_to_that_in_float32(make, family, rule):
    parts = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make(family, dtype=torch.float32).to(dtype)  # random numbers of bfloat16 would be others
        with lrp(model, rule):
            parts[dtype] = gradients(model)
    wide, narrow = (parts[dtype]["d embeddings"].float().flatten() for dtype in (torch.float32, torch.bfloat16))
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=0) > 0.98
