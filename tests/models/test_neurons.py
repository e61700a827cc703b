"""Neurons: masked, pruned, damped and held at a constant, in models of every family; and which are refused."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import EDITED, FAMILIES, NEURONS, fail_if_masked, mlp_of
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.models.architectures import neuron_layers
from sparc3_lightning.models.components import Component, check, mask, prune_
from sparc3_lightning.models.neurons import columns_of

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
UNKNOWN_MODULES = [
    "model.layers.0.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.2.mlp.up_proj",
    "layers.0.mlp.up_proj",
    "up_proj",
    "",
]

# Every family, a LLaMA whose MLPs have biases, and an OPT without any.
MODELS: list[dict[str, Any]] = [{"family": family} for family in sorted(FAMILIES)]
MODELS += [{"family": "llama", "mlp_bias": True}, {"family": "opt", "enable_bias": False}]
all_models = pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(map(str, options.values())))


def in_family(neurons: list[Component], family: str) -> list[Component]:
    """Return the same neurons of a model of another family."""
    blocks = [int(neuron.module.split(".")[2]) for neuron in neurons]
    return [replace(n, module=mlp_of(family, k)[0][0]) for n, k in zip(neurons, blocks, strict=True)]


def logits(model: Any) -> Tensor:
    """Return all logits, without a graph."""
    with torch.no_grad():
        return model(INPUT_IDS).logits


def weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that no parameter has changed."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def without(model: Any, neurons: list[Component]) -> Any:
    """Return a copy of a model whose MLPs are narrower: the rows and columns of the neurons are not there."""
    narrow = copy.deepcopy(model)
    for k in range(2):
        rows, column = mlp_of(model.config.model_type, k)
        gone = {neuron.index for neuron in neurons if neuron.module in rows}
        kept = [i for i in range(24) if i not in gone]
        for name in (*rows, column):
            layer = narrow.get_submodule(name)
            axis = 1 if name == column else 0
            if isinstance(layer, Conv1D):  # its weight is [in, out]
                axis = 1 - axis
                layer.nf = layer.nf if name == column else len(kept)
            layer.weight.data = layer.weight.data.index_select(axis, torch.tensor(kept))
            if layer.bias is not None and name != column:
                layer.bias.data = layer.bias.data[kept]
    return narrow


@all_models
def test_masking_is_taking_the_rows_and_columns_out_of_the_model(make_model, options):
    model, neurons = make_model(**options), in_family(NEURONS, options["family"])
    before = logits(model)
    with mask(model, neurons):
        masked = logits(model)
    expected = logits(without(model, neurons))
    torch.testing.assert_close(masked, expected, rtol=1e-6, atol=1e-6)
    assert (masked - before).abs().max() > 1e-3


@all_models
def test_pruning_is_masking(make_model, options):
    model, neurons = make_model(**options), in_family(NEURONS, options["family"])
    with mask(model, neurons):
        masked = logits(model)
    prune_(model, neurons)
    assert torch.equal(logits(model), masked)


@all_models
def test_pruning_zeroes_the_rows_and_columns_and_nothing_else(make_model, options):
    model, neurons = make_model(**options), in_family(NEURONS, options["family"])
    before = weights(model)
    prune_(model, neurons)
    after = weights(model)
    for neuron, k in zip(neurons, [0, 1, 0, 0], strict=True):
        rows, column = mlp_of(options["family"], k)
        for name in rows:
            layer = model.get_submodule(name)
            row = before[f"{name}.weight"].T if isinstance(layer, Conv1D) else before[f"{name}.weight"]
            assert row[neuron.index].abs().max() > 0
            row[neuron.index] = 0
            if layer.bias is not None:
                before[f"{name}.bias"][neuron.index] = 0
        weight = before[f"{column}.weight"]
        (weight if isinstance(model.get_submodule(column), Conv1D) else weight.T)[neuron.index] = 0
    assert_same_bits(after, before)


@all_models
def test_greedy_continuations_of_a_masked_model_are_those_of_the_pruned_one(make_model, options):
    model = make_model(**options)
    pruned = copy.deepcopy(model)
    layers = [mlp_of(options["family"], k)[0][0] for k in range(2)]
    neurons = [Component(layer, i, 0.0) for layer in layers for i in range(0, 24, 2)]
    prune_(pruned, neurons)

    def continuation(model: Any) -> list[int]:
        ones = torch.ones_like(INPUT_IDS)
        return model.generate(INPUT_IDS, attention_mask=ones, max_new_tokens=8, min_new_tokens=8, do_sample=False)[
            0
        ].tolist()

    with mask(model, neurons):
        assert continuation(model) == continuation(pruned)


def _fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_the_mask_restores_the_model_bit_for_bit_also_after_an_exception(make_model, fails):
    model = make_model()
    before, weights_before = logits(model), weights(model)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), mask(model, NEURONS):
        assert not torch.equal(logits(model), before)
        assert_same_bits(weights(model), weights_before)
        if fails:
            _fail()
    assert torch.equal(logits(model), before)
    assert_same_bits(weights(model), weights_before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_nest(make_model):
    model = make_model()
    with mask(model, NEURONS):
        both = logits(model)
    with mask(model, NEURONS[:1]):
        first = logits(model)
        with mask(model, NEURONS[1:]):
            assert torch.equal(logits(model), both)
        assert torch.equal(logits(model), first)


def test_a_neuron_may_be_named_by_its_row_of_up_proj_or_of_gate_proj(make_model):
    model = make_model()
    by_gate = [Component(n.module.replace("up_proj", "gate_proj"), n.index, n.score) for n in NEURONS]
    with mask(model, NEURONS):
        expected = logits(model)
    with mask(model, by_gate):
        assert torch.equal(logits(model), expected)
    with mask(model, [*NEURONS, *by_gate]):
        assert torch.equal(logits(model), expected)
    prune_(model, by_gate)
    assert torch.equal(logits(model), expected)


def test_a_mask_without_neurons_changes_nothing(make_model):
    model = make_model()
    before = logits(model)
    with mask(model, []):
        assert torch.equal(logits(model), before)


def damped(model: Any, neurons: list[Component], damping: float) -> Any:
    """Return a copy of a model in which the columns of the neurons are smaller."""
    small = copy.deepcopy(model)
    for neuron in neurons:
        layers = [mlp_of(model.config.model_type, k) for k in range(2)]
        column = small.get_submodule(next(column for rows, column in layers if neuron.module in rows))
        (column.weight if isinstance(column, Conv1D) else column.weight.T)[neuron.index] *= 1 - damping
    return small


@all_models
@pytest.mark.parametrize("damping", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.few(8)
def test_a_mask_of_some_strength_makes_the_neurons_columns_smaller_by_that_much(make_model, options, damping):
    model, neurons = make_model(**options), in_family(NEURONS, options["family"])
    before, weights_before = logits(model), weights(model)
    with mask(model, neurons, damping):
        masked = logits(model)
    torch.testing.assert_close(masked, logits(damped(model, neurons, damping)), rtol=1e-9, atol=1e-9)
    assert (masked - before).abs().max() > 1e-4
    assert torch.equal(logits(model), before)
    assert_same_bits(weights(model), weights_before)


def test_the_full_strength_is_the_default_and_none_changes_nothing(make_model):
    model = make_model()
    before = logits(model)
    with mask(model, NEURONS):
        off = logits(model)
    with mask(model, NEURONS, 1.0):
        assert torch.equal(logits(model), off)
    with mask(model, NEURONS, 0.0):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_neuron_that_is_off_is_zero_even_where_its_activation_is_no_number(make_model, value):
    model = make_model()
    column = model.model.layers[0].mlp.down_proj
    activations = torch.randn(2, 24, dtype=torch.float64)
    activations[:, 7] = value
    with mask(model, NEURONS):
        off = column(activations)
    activations[:, [3, 7, 23]] = 0
    assert torch.equal(off, column(activations))


def test_a_damped_model_keeps_its_dtype(make_model):
    model = make_model(dtype=torch.bfloat16)
    with mask(model, NEURONS, 0.5):
        assert logits(model).dtype == torch.bfloat16
        assert torch.isfinite(logits(model)).all()


def test_neurons_may_come_from_a_generator(make_model):
    model = make_model()
    with mask(model, NEURONS):
        expected = logits(model)
    prune_(model, (neuron for neuron in NEURONS))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("use", [fail_if_masked, prune_, check])
@pytest.mark.parametrize("module", UNKNOWN_MODULES)
def test_a_neuron_of_no_such_layer_is_refused_and_nothing_is_changed(make_model, use: Callable, module):
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=rf"'{module}' is not a layer of MLP neurons.*up_proj"):
        use(model, [*NEURONS, Component(module, 0, 0.0)])
    assert_same_bits(weights(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("use", [fail_if_masked, prune_, check])
@pytest.mark.parametrize("index", [-1, 24, 1000])
def test_a_neuron_of_no_such_index_is_refused_and_nothing_is_changed(make_model, use: Callable, index):
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=rf"Neuron {index} of model\.layers\.1\.mlp\.up_proj.*24 neurons"):
        use(model, [*NEURONS, Component("model.layers.1.mlp.up_proj", index, 0.0)])
    assert_same_bits(weights(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_neurons_are_checked_against_a_model_without_weights(make_model):
    model = make_model().to("meta")
    check(model, NEURONS)
    with pytest.raises(ValueError, match="24 neurons"):
        check(model, [Component("model.layers.0.mlp.up_proj", 24, 0.0)])


def by_hand(model: Any, neurons: list[Component]) -> Tensor:
    """The logits if each activation becomes (1 - damping) of itself plus damping times the constant."""

    def edit(rows: list[str]):
        def hook(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            activations = inputs[0].clone()
            for n in neurons:
                if n.module in rows:
                    activations[..., n.index] = (1 - n.damping) * activations[..., n.index] + n.damping * n.mean
            return (activations,)

        return hook

    layers = [mlp_of(model.config.model_type, k) for k in range(2)]
    handles = [model.get_submodule(column).register_forward_pre_hook(edit(rows)) for rows, column in layers]
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@all_models
def test_each_neuron_is_damped_by_its_own_strength_and_replaced_by_its_own_constant(make_model, options):
    model, edited = make_model(**options), in_family(EDITED, options["family"])
    expected = by_hand(model, edited)
    with mask(model, edited):
        torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, logits(model))


with_biases = pytest.mark.parametrize(
    "options", [{}, {"mlp_bias": True}, {"family": "gpt2"}, {"family": "opt"}], ids=lambda options: str(options)
)


@with_biases
def test_an_edit_is_written_into_plain_weights(make_model, options):
    model, edited = make_model(**options), in_family(EDITED, options.get("family", "llama"))
    names, expected = set(weights(model)), by_hand(model, edited)
    prune_(model, edited)
    if "family" in options:
        assert set(weights(model)) == names, "the architecture has biases, and none is added"
    else:
        assert model.config.mlp_bias
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


@with_biases
def test_an_edited_model_is_the_same_once_saved_and_loaded(make_model, tmp_path, options):
    model, edited = make_model(**options), in_family(EDITED, options.get("family", "llama"))
    expected = by_hand(model, edited)
    prune_(model, edited)
    model.save_pretrained(tmp_path / "edited")
    again = type(model).from_pretrained(tmp_path / "edited", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"family": "qwen2"}, {"family": "qwen3"}, {"family": "gemma3_text"}, {"family": "opt", "enable_bias": False}],
)
def test_a_constant_is_refused_where_a_checkpoint_has_no_place_for_it(make_model, options):
    model, edited = make_model(**options), in_family(EDITED, options["family"])
    before = weights(model)
    with pytest.raises(ValueError, match=rf"'{options['family']}' has no bias .* --model\.ablation zero"):
        prune_(model, edited)
    assert_same_bits(weights(model), before)


@all_models
def test_the_scored_layer_and_the_layer_that_reads_the_activations_are_known_by_family(make_model, options):
    model = make_model(**options)
    layers = [mlp_of(options["family"], k) for k in range(2)]
    (name,) = neuron_layers(model)
    assert all(rows[0].endswith(f".{name}") for rows, _ in layers)
    columns = columns_of(model, [rows[0] for rows, _ in layers])
    assert columns == {rows[0]: model.get_submodule(column) for rows, column in layers}


def test_a_model_without_an_mlp_of_a_known_kind_has_no_default_layer(make_model):
    with pytest.raises(ValueError, match=r"no MLP whose .*\['k_proj', 'o_proj'.*granularity weight .*--model\.layers"):
        neuron_layers(make_model().model.layers[0].self_attn)
