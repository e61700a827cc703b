"""The MLPs of many architectures: found by their structure, masked, pruned and scored, whatever their layers hold."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import HIDDEN, INNER, LAYERS, build
from helpers import provenance
from torch import Tensor, nn

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.activations import ActivationRecorder
from sparc3_lightning.attribution.scores import INDEX, ScoreFile, ShardWriter
from sparc3_lightning.attribution.static_scores import StaticScores
from sparc3_lightning.models.architectures import (
    Mlp,
    Rows,
    find_layers,
    linear_at,
    mlp_of,
    mlps_of,
    neuron_layers,
    twins_of,
    weight_of,
)
from sparc3_lightning.models.components import KINDS, Component, mask, prune_
from sparc3_lightning.models.neurons import check_are_neurons, columns_of, coverage, scored_rows

# What the configs of some have in place of what ``build`` gives them.
CHANGES: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": INNER},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 3},
}
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 9, 23, 51], [7, 3, 11, 5, 5, 31, 19]])
# Of each architecture the name of the scored layer, and what is left out of the blocks.
GATED = {
    "gemma2": ("up_proj", "self_attn"),
    "bitnet": ("up_proj", "self_attn"),
    "lfm2": ("w3", "conv, self_attn"),
    "mistral": ("up_proj", "self_attn"),
    "qwen3_5_text": ("up_proj", "linear_attn, self_attn"),
}
FUSED = {
    "glm": ("gate_up_proj", "self_attn"),
    "glm4": ("gate_up_proj", "self_attn"),
    "granitemoehybrid": ("input_linear", "mamba, self_attn"),
    "modernbert-decoder": ("Wi", "attn"),
    "phi3": ("gate_up_proj", "self_attn"),
}
PLAIN = {
    "apertus": ("up_proj", "self_attn"),
    "arcee": ("up_proj", "self_attn"),
    "bert": ("intermediate.dense", "attention"),
    "bloom": ("dense_h_to_4h", "self_attention"),
    "codegen": ("fc_in", "attn"),
    "ctrl": ("ffn.0", "multi_head_attention"),
    "falcon": ("dense_h_to_4h", "self_attention"),
    "gpt_bigcode": ("c_fc", "attn"),
    "gpt_neox": ("dense_h_to_4h", "attention"),
    "gptj": ("fc_in", "attn"),
    "mpt": ("up_proj", "attn"),
    "nemotron": ("up_proj", "self_attn"),
    "phi": ("fc1", "self_attn"),
    "roberta-prelayernorm": ("intermediate.dense", "attention"),
    "starcoder2": ("c_fc", "self_attn"),
}
ALL = {**GATED, **FUSED, **PLAIN}
every_family = pytest.mark.parametrize("family", sorted(ALL))
fused = pytest.mark.parametrize("family", sorted(FUSED))


def make(family: str) -> Any:
    return build(family, torch.float64, **CHANGES.get(family, {}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


def some_neurons(model: Any, **edit: float) -> list[Component]:
    """Return a few neurons of each MLP, the first and the last among them."""
    mlps = mlps_of(model)
    return [Component(mlp.rows[0].layer, i, 0.0, **edit) for mlp in mlps for i in (0, 3, mlp.num_neurons - 1)]


def inputs_of(model: Any, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return what some layers read, shape ``[samples, tokens, inputs]``."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, x, name=name: found.__setitem__(name, x[0].reshape(*INPUT_IDS.shape, -1))
        )
        for name, layer in layers.items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return found


@every_family
def test_each_block_has_one_mlp_whose_layers_have_known_names_and_fitting_shapes(family: str) -> None:
    model = make(family)
    name, left_out = ALL[family]
    mlps = mlps_of(model)
    assert len(mlps) == LAYERS
    assert neuron_layers(model) == [name]
    assert list(find_layers(model, [name])) == [mlp.rows[0].layer for mlp in mlps]
    for mlp in mlps:
        height = 2 * mlp.num_neurons if family in FUSED else mlp.num_neurons
        assert {len(weight_of(linear_at(model, rows.layer))) for rows in mlp.rows} == {height}
        assert weight_of(linear_at(model, mlp.column)).shape[1] == mlp.num_neurons
        assert len(mlp.rows) == (1 if family in PLAIN else 2)
        assert all(mlp_of(model, rows.layer) == mlp for rows in mlp.rows)
    number = sum(mlp.num_neurons for mlp in mlps)
    assert coverage(model, find_layers(model, [name])) == (
        f"Scored 100 % of the MLP neurons: {number:,}; left out: {left_out}"
    )


@every_family
@pytest.mark.few(8)
def test_pruning_is_masking_and_zeroes_the_neurons_rows_and_columns_alone(family: str) -> None:
    model = make(family)
    neurons, before = some_neurons(model), logits(model)
    with mask(model, neurons):
        masked = logits(model)
    assert (masked - before).abs().max() > 1e-5
    pruned = copy.deepcopy(model)
    prune_(pruned, neurons)
    torch.testing.assert_close(logits(pruned), masked, rtol=1e-6, atol=1e-6)
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for mlp in mlps_of(model):
        for index in (0, 3, mlp.num_neurons - 1):
            # BitNet has a norm of the activations, in which the rows of one neuron tell on all others.
            for rows in () if family == "bitnet" else mlp.rows:
                at = index + rows.part.start
                is_conv = linear_at(model, rows.layer).weight.shape[0] == HIDDEN
                weight = expected[f"{rows.layer}.weight"]
                (weight.T if is_conv else weight)[at] = 0
                if f"{rows.layer}.bias" in expected:
                    expected[f"{rows.layer}.bias"][at] = 0
            column = expected[f"{mlp.column}.weight"]
            (column if len(column) == mlp.num_neurons else column.T)[index] = 0
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@every_family
@pytest.mark.few(8)
def test_an_mlp_without_its_neurons_gives_its_bias(family: str) -> None:
    model = make(family)
    found: dict[str, Tensor] = {}
    mlps = mlps_of(model)
    for mlp in mlps:
        linear_at(model, mlp.column).register_forward_hook(
            lambda layer, _, output, name=mlp.column: found.__setitem__(name, output.clone())
        )
    with mask(model, [Component(mlp.rows[0].layer, i, 0.0) for mlp in mlps for i in range(mlp.num_neurons)]):
        logits(model)
    for name, output in found.items():
        bias = linear_at(model, name).bias
        assert torch.equal(output, (torch.zeros(HIDDEN).to(output) if bias is None else bias).expand_as(output))
    assert len(found) == LAYERS


@pytest.mark.parametrize("family", sorted({*GATED, *FUSED} - {"bitnet"}))
def test_the_scored_rows_of_a_gated_mlp_are_those_beside_the_gate(family: str) -> None:
    """What a neuron gives grows in proportion to them, and not so to the rows of the gate."""
    model = make(family)
    mlp = mlps_of(model)[0]
    column: dict[str, nn.Module] = {"it": linear_at(model, mlp.column)}
    before = inputs_of(model, column)["it"]
    for rows, is_proportional in zip(mlp.rows, (True, False), strict=True):
        twice = copy.deepcopy(model)
        layer = linear_at(twice, rows.layer)
        weight_of(layer)[rows.part] *= 2
        if layer.bias is not None:
            layer.bias[rows.part] *= 2
        after = inputs_of(twice, {"it": linear_at(twice, mlp.column)})["it"]
        assert torch.allclose(after, 2 * before, rtol=1e-9) == is_proportional


@pytest.mark.parametrize("family", ["arcee", "bloom", "gpt_neox", "nemotron", "phi"])
def test_a_neuron_can_be_held_at_a_constant_where_the_architecture_has_a_place_for_it(family: str) -> None:
    model = make(family)
    neurons = [*some_neurons(model, damping=0.5, mean=0.7)[:-1], *some_neurons(model, mean=-0.2)[-1:]]
    with mask(model, neurons):
        masked = logits(model)
    prune_(model, neurons)
    torch.testing.assert_close(logits(model), masked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["phi3", "glm4", "mistral", "lfm2"])
def test_a_constant_is_refused_where_there_is_no_place_for_it(family: str) -> None:
    model = make(family)
    before = logits(model)
    with pytest.raises(ValueError, match=rf"'{family}' has no bias in its MLPs.*--model\.ablation zero"):
        prune_(model, some_neurons(model, mean=0.5))
    assert torch.equal(logits(model), before)


def test_a_config_that_its_model_does_not_heed_gives_no_place_for_a_constant() -> None:
    model = make("mistral")
    model.config.mlp_bias = False
    with pytest.raises(ValueError, match=r"'mistral' has no bias in its MLPs"):
        prune_(model, some_neurons(model, mean=0.5))


class Separate(nn.Module):
    """A layer of gate and up rows, written as two."""

    def __init__(self, both: nn.Linear, number: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(both.in_features, number, both.bias is not None, dtype=both.weight.dtype) for _ in range(2)
        )
        for layer, part in ((self.gate_proj, slice(0, number)), (self.up_proj, slice(number, None))):
            layer.weight.data = both.weight[part].clone()
            if both.bias is not None:
                layer.bias.data = both.bias[part].clone()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)


def separated(model: Any) -> tuple[Any, dict[str, nn.Linear]]:
    """Return the same model with its fused layers written as two each, and the layers of the up rows."""
    model, layers = copy.deepcopy(model), {}
    for mlp in mlps_of(model):
        parent, _, name = mlp.rows[0].layer.rpartition(".")
        both = Separate(linear_at(model, mlp.rows[0].layer), mlp.num_neurons)
        setattr(model.get_submodule(parent), name, both)
        layers[mlp.rows[0].layer] = both.up_proj
    return model, layers


def scores_of(model: Any, layers: Any, score: Any, granularity: Any = "neuron", **options: Any) -> dict[str, Tensor]:
    """Score layers on two samples by the plain gradient of the largest logit at the last token."""
    accumulator = ScoreAccumulator(layers, score, granularity=granularity, **options)
    with accumulator.recording(None, ["a", "b"]):
        target = model(INPUT_IDS, use_cache=False).logits[:, -1].amax(dim=1).sum()
        if score not in ("wanda", "activation"):
            target.backward()
    return accumulator.compute()


@fused
@pytest.mark.parametrize("score", ["magnitude", "signed", "absolute", "squared", "wanda"])
@pytest.mark.few(8)
def test_a_fused_layer_has_the_scores_of_its_up_rows_written_as_a_layer_of_their_own(family: str, score: str) -> None:
    model = make(family)
    layers = find_layers(model, neuron_layers(model))
    found = scores_of(model, layers, score, parts=scored_rows(model, layers))
    apart, up = separated(model)
    expected = scores_of(apart, up, score)
    assert list(found) == list(expected)
    for name, values in found.items():
        assert values.shape == (mlp_of(model, name).num_neurons,)
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=0)


@fused
def test_activations_are_those_of_the_neurons(family: str) -> None:
    model = make(family)
    columns = columns_of(model, find_layers(model, neuron_layers(model)))
    expected = inputs_of(model, dict(columns))
    found = scores_of(model, columns, "activation")
    recorder = ActivationRecorder(columns)
    with torch.no_grad(), recorder.recording(None, [1, 1]):
        logits(model)
    for name, A_BTI in expected.items():
        torch.testing.assert_close(found[name], A_BTI.abs().mean(dim=(0, 1)).float(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(recorder.rows()[name], A_BTI.mean(dim=1).float(), rtol=1e-6, atol=1e-7)


def test_the_weights_of_a_fused_layer_all_have_scores_whose_sums_are_those_of_the_neurons(tmp_path: Path) -> None:
    model = make("phi3")
    layers = find_layers(model, ["gate_up_proj"])
    parts = scored_rows(model, layers)
    of_weights = scores_of(model, layers, "signed", "weight")
    of_neurons = scores_of(model, layers, "signed", parts=parts)
    with torch.enable_grad():
        weights = [layer.weight.requires_grad_() for layer in layers.values()]
        target = model(INPUT_IDS, use_cache=False).logits[:, -1].amax(dim=1).sum()
        grads = torch.autograd.grad(target, weights)
    for (name, score), weight, grad in zip(of_weights.items(), weights, grads, strict=True):
        torch.testing.assert_close(score, (weight.detach() * grad / 2).float(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(score[INNER:].sum(dim=1), of_neurons[name], rtol=1e-4, atol=1e-7)
    writer = ShardWriter(tmp_path, {name: score.shape for name, score in of_weights.items()}, parts)
    for name, score in of_weights.items():
        writer.add(name, score)
    writer.close(provenance())
    for name, score in ScoreFile.load(tmp_path / INDEX).scores.items():
        torch.testing.assert_close(score, of_neurons[name], rtol=1e-4, atol=1e-7)


def test_scores_and_norms_that_need_no_samples_are_of_the_up_rows() -> None:
    model = make("phi3")
    layers = find_layers(model, ["gate_up_proj"])
    parts = scored_rows(model, layers)
    found, random = (StaticScores(layers, score, parts=parts).compute() for score in ("magnitude", "random"))
    for name, layer in layers.items():
        up = layer.weight[INNER:]
        torch.testing.assert_close(found[name], up.abs().sum(dim=1).float())
        assert random[name].shape == (INNER,)
        kind = KINDS["neuron"]
        assert kind.shape(model, name) == (INNER,)
        torch.testing.assert_close(kind.norms(model, name), up.norm(dim=1).float())
        assert kind.layers(model, name) == [name, mlp_of(model, name).column]


@pytest.mark.parametrize(("family", "num_mlps"), [("zamba2", 1), ("hrm_text", 2)])
def test_a_weight_that_several_blocks_use_is_scored_for_all_its_uses_and_masked_in_all(
    family: str, num_mlps: int
) -> None:
    """Zamba 2 has several layers of one weight; HRM calls the same layers several times."""
    model = make(family)
    names = neuron_layers(model)
    layers = find_layers(model, names)
    assert list(layers) == [mlp.rows[0].layer for mlp in mlps_of(model)]
    assert len(layers) == num_mlps
    found = scores_of(model, layers, "signed", parts=scored_rows(model, layers), twins=twins_of(model))
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    target = model(INPUT_IDS, use_cache=False).logits[:, -1].amax(dim=1).sum()
    grads = torch.autograd.grad(target, weights)
    model.requires_grad_(False)
    for (name, score), weight, grad in zip(found.items(), weights, grads, strict=True):
        expected = (weight.detach() * grad / 2).sum(dim=1)[mlp_of(model, name).part_of(name)]
        torch.testing.assert_close(score, expected.float(), rtol=1e-5, atol=1e-8)
    for components in (some_neurons(model), some_neurons(model, damping=0.3)):
        pruned = copy.deepcopy(model)
        with mask(model, components):
            masked = logits(model)
        prune_(pruned, components)
        torch.testing.assert_close(logits(pruned), masked, rtol=1e-6, atol=1e-6)
        assert (masked - logits(model)).abs().max() > 1e-6


def test_the_mean_activation_of_a_neuron_is_over_all_uses_of_its_weight() -> None:
    model = make("zamba2")
    columns = columns_of(model, find_layers(model, neuron_layers(model)))
    twins = twins_of(model)
    recorder = ActivationRecorder(columns, twins)
    (column,) = columns.values()
    uses = {str(i): layer for i, layer in enumerate((column, *twins[column]))}
    assert len(uses) == 2
    expected = torch.stack([A_BTI.mean(dim=1) for A_BTI in inputs_of(model, uses).values()]).mean(dim=0)
    with torch.no_grad(), recorder.recording(None, [1, 1]):
        logits(model)
    (rows,) = recorder.rows().values()
    torch.testing.assert_close(rows, expected.float(), rtol=1e-5, atol=1e-7)


class Block(nn.Module):
    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (height, width) in shapes.items():
            setattr(self, name, nn.Linear(width, height, device="meta"))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mlp", {"up_proj": (24, 8), "gate_proj": (12, 8), "down_proj": (8, 24)}),
        ("mlp", {"up_proj": (24, 8), "gate_proj": (24, 8), "down_proj": (8, 20)}),
        ("mlp", {"up_proj": (24, 8), "gate_proj": (24, 8)}),
        ("mlp", {"fc1": (23, 8), "fc2": (8, 24)}),
        ("attn", {"c_attn": (24, 8), "c_proj": (8, 8)}),
        ("attn", {"k_proj": (24, 8), "out_proj": (8, 24)}),
        ("input_layernorm", {"fc1": (24, 8), "fc2": (8, 24)}),
        ("router_mlp", {"fc1": (8, 8), "fc2": (8, 8)}),
    ],
)
def test_a_name_alone_makes_no_mlp(name: str, shapes: dict[str, tuple[int, int]]) -> None:
    model = nn.ModuleDict({name: Block(**shapes)})
    assert mlps_of(model) == []
    with pytest.raises(ValueError, match="is not a layer of MLP neurons of this model"):
        mlp_of(model, f"{name}.{next(iter(shapes))}")


def test_all_mlps_of_a_block_are_found_however_deep_they_lie() -> None:
    gated = {"gate_proj": (24, 8), "up_proj": (24, 8), "down_proj": (8, 24)}
    experts = nn.ModuleList(Block(**gated) for _ in range(3))
    block = nn.ModuleDict({"shared": Block(up_proj=(12, 8), down_proj=(8, 12)), "experts": experts})
    model = nn.ModuleDict({"mlp": block})
    mlps = mlps_of(model)
    assert [mlp.name for mlp in mlps] == ["mlp.shared", *(f"mlp.experts.{e}" for e in range(3))]
    expert = "mlp.experts.1"
    assert mlps[2] == Mlp(
        expert,
        (Rows(f"{expert}.up_proj", slice(0, 24)), Rows(f"{expert}.gate_proj", slice(0, 24))),
        f"{expert}.down_proj",
    )
    assert neuron_layers(model) == ["up_proj"]
    layers = find_layers(model, ["up_proj"])
    assert coverage(model, layers) == "Scored 100 % of the MLP neurons: 84"
    assert coverage(model, ["mlp.shared.up_proj"]) == "Scored 14 % of the MLP neurons: 12 of 84"


def test_the_weights_of_a_block_that_nothing_scores_are_named() -> None:
    model = make("qwen3_next")
    assert coverage(model, find_layers(model, ["up_proj"])).endswith(
        "; left out: linear_attn, mlp.gate, mlp.experts, mlp.shared_expert_gate, self_attn"
    )


def test_a_model_without_mlps_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError,
        match=r"^MambaForCausalLM has no MLP whose neurons could be scored, and its linear layers are \['dt_proj', "
        r"'in_proj', .*: score their single weights, with --model\.granularity weight and --model\.layers '\[all\]'\.$",
    ):
        neuron_layers(make("mamba"))


@pytest.mark.parametrize(
    ("layers", "first"),
    [(("up_proj", "gate_proj"), "up_proj"), (("w1", "w3"), "w3"), (("proj_up_gate", "proj_up"), "proj_up")],
)
def test_neurons_that_are_scored_twice_are_refused(layers: tuple[str, str], first: str) -> None:
    with pytest.raises(ValueError, match=rf"The neurons of blocks\.3\.mlp are scored twice.*'\[{first}\]'"):
        check_are_neurons([f"blocks.3.mlp.{layer}" for layer in layers])
    check_are_neurons([f"blocks.{i}.mlp.{layer}" for i, layer in enumerate(layers)])
