"""The rules on many architectures: against lxt's own way by classes, and what is conserved of the logit."""

from typing import Any

import pytest
import torch
from decoders import build
from helpers import FAMILIES
from lxt_oracle import lxt_lrp
from slow_lrp import INPUT_IDS, all_rules, assert_same, gradients
from torch import Tensor, nn

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.lrp_check import check_lrp
from sparc3_lightning.attribution.targets import largest_logit

IDS = INPUT_IDS.remainder(60)
# Of each architecture what its config has beside the sizes.
DECODERS: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("mistral", "phi", "phi3", "olmo2", "gemma", "gpt_neox", "bloom", "mixtral", "olmoe")},
    **{family: {} for family in ("qwen3_moe", "deepseek_v3", "lfm2", "granitemoehybrid")},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.2},
    "gpt_oss": {"sliding_window": 4},
}
ONLY_EAGER = ("bloom", "gemma2", "gpt_oss")  # those that have no sdpa attention
all_decoders = pytest.mark.parametrize("family", DECODERS)
ATTENTIONS = [
    (family, kind) for family in DECODERS for kind in ("eager", "sdpa") if kind == "eager" or family not in ONLY_EAGER
]


def make_decoder(family: str, dtype: torch.dtype = torch.float64, attention: str = "eager") -> Any:
    return build(family, dtype, attention, **DECODERS[family])


def logits_and_relevance(model, rule: str | None = None) -> tuple[Tensor, float]:
    """Return all logits, computed with a graph, and the part of the largest last one that arrives at the tokens."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embeddings)
    try:
        if rule is None:
            logits = model(IDS, use_cache=False).logits
        else:
            with lrp(model, rule):
                logits = model(IDS, use_cache=False).logits
    finally:
        handle.remove()
    target = logits[0, -1].max()
    (gradient,) = torch.autograd.grad(target, embeddings)
    return logits.detach(), ((gradient * embeddings).sum() / target).item()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@all_rules
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.usefixtures("in_float64")
def test_the_relevance_is_that_of_lxts_own_patches_of_classes(make, family, rule, attention):
    model = make(family, attn_implementation=attention)
    with lrp(model, rule):
        got = gradients(model)
    with lxt_lrp(model, rule):
        expected = gradients(model)
    assert_same(got, expected, rtol=2e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
@all_rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_with_a_graph_are_the_same_bit_for_bit(family, attention, rule, dtype):
    model = make_decoder(family, dtype, attention)
    assert torch.equal(logits_and_relevance(model, rule)[0], logits_and_relevance(model)[0])


@all_decoders
@pytest.mark.usefixtures("in_float64")
@pytest.mark.few(6)
def test_cp_lrp_conserves_the_logit_of_a_model_without_biases(family):
    model = make_decoder(family)
    for name, parameter in model.named_parameters():
        if "bias" in name.rpartition(".")[2]:
            parameter.data.zero_()
    _, conserved = logits_and_relevance(model, "cp_lrp")
    if family == "gpt_oss":  # it multiplies with the activation of up + 1
        assert conserved != pytest.approx(1, rel=1e-3)
    else:
        assert conserved == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@all_rules
@pytest.mark.few(4)
def test_the_way_in_which_experts_are_computed_changes_no_relevance(family, rule, implementation):
    """One way is a custom operation, another gathers the weights of each token's experts."""
    found = {}
    for way in ("eager", implementation):
        model = make_decoder(family, torch.float32)
        model.config._experts_implementation = way
        found[way] = logits_and_relevance(model, rule)[1]
        assert check_lrp(model, rule, {}, IDS).logits_unchanged
    assert found[implementation] == pytest.approx(found["eager"], rel=1e-4)


@all_decoders
@all_rules
@pytest.mark.usefixtures("in_float64")
@pytest.mark.few(4)
def test_the_check_finds_all_of_the_logit_at_the_tokens_and_at_constants(family, rule):
    model = make_decoder(family)
    layers = {name: layer for name, layer in model.named_modules() if name.endswith(("down_proj", "o_proj", "fc2"))}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    check = check_lrp(model, rule, layers, IDS)
    assert check.logits_unchanged
    assert check.conserved + check.kept == pytest.approx(1, rel=1e-6)
    assert check.layers_reached == check.num_layers
    has_constants = family in ("phi", "gpt_neox", "bloom", "gpt_oss", "granitemoehybrid")
    assert (abs(check.kept) > 1e-6) == has_constants


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, kind) for family in sorted(FAMILIES) for kind in ("eager", "sdpa")),
        *(of for of in ATTENTIONS if of[0] in ("mixtral", "gpt_oss", "granitemoehybrid", "gemma2")),
    ],
)
@all_rules
def test_which_layers_are_targets_changes_no_score(make, family, rule, attention):
    """Below the first target there is no graph, and yet a product there has two factors."""
    if family in FAMILIES:
        model = make(family, attn_implementation=attention)
    else:
        model = make_decoder(family, attention=attention)
    kinds = (nn.Linear, type(model.transformer.h[0].mlp.c_fc)) if family == "gpt2" else nn.Linear
    head = model.get_output_embeddings()
    without = ("q_proj", "k_proj", "gate_proj") if rule == "cp_lrp" else ()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and layer is not head and name.rpartition(".")[2] not in without
    }

    def scores(names: list[str], starts_below: bool) -> dict[str, Tensor]:
        accumulator = ScoreAccumulator({name: layers[name] for name in names}, "magnitude")
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(starts_below)
        )
        with lrp(model, rule), accumulator.recording(None, ["x"]):
            largest_logit(model, IDS).sum().backward()
        hook.remove()
        return accumulator.compute()

    from_embeddings = scores(list(layers), starts_below=True)
    for name in layers:
        torch.testing.assert_close(scores([name], starts_below=False)[name], from_embeddings[name])
