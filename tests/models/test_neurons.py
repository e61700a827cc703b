import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fail_if_masked, mlp_of
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.models.architectures import FAMILIES, neuron_layers
from sparc3_lightning.models.components import Component, check, mask, prune_
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.selection.criteria import select_neurons
from sparc3_lightning.selection.neuron_list import FORMAT, NeuronList

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
NEURONS = [
    Component("model.layers.0.mlp.up_proj", 3, -2.0),
    Component("model.layers.1.mlp.up_proj", 0, -1.5),
    Component("model.layers.0.mlp.up_proj", 23, -1.0),
    Component("model.layers.0.mlp.up_proj", 7, 0.5),
]
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


# Selection.


@pytest.mark.parametrize("num_neurons", [1, 7, 40, 60])
def test_selection_is_the_head_of_the_sorted_list_of_all_neurons(num_neurons):
    draw = torch.Generator().manual_seed(0)
    # Whole numbers, so that there are many ties.
    scores = {name: torch.randint(-3, 4, (20,), generator=draw).float() for name in ("b", "a", "c")}
    rows = [(score, place, i) for place, name in enumerate(scores) for i, score in enumerate(scores[name].tolist())]
    expected = [Component(list(scores)[place], i, score) for score, place, i in sorted(rows)[:num_neurons]]
    assert select_neurons(scores, num_neurons) == expected


def test_the_lowest_scores_over_modules_of_different_sizes_come_first():
    scores = {"a": torch.tensor([0.5, -3.0]), "b": torch.tensor([-1.0, 4.0, -5.0])}
    assert select_neurons(scores, 3) == [Component("b", 2, -5.0), Component("a", 1, -3.0), Component("b", 0, -1.0)]


def test_ties_go_to_the_first_module_and_the_first_index():
    scores = {"z": torch.zeros(3), "a": torch.zeros(2)}
    assert [(neuron.module, neuron.index) for neuron in select_neurons(scores, 4)] == [
        ("z", 0),
        ("z", 1),
        ("z", 2),
        ("a", 0),
    ]


@pytest.mark.parametrize("num_neurons", [0, -1, 4])
def test_a_number_of_neurons_out_of_bounds_is_refused(num_neurons):
    scores = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"--model.num_neurons must be between 1 and 3 .*got {num_neurons}\."):
        select_neurons(scores, num_neurons)


def test_scores_with_nan_cannot_be_ranked():
    with pytest.raises(ValueError, match="NaN"):
        select_neurons({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([float("nan")])}, 1)


# Masking and pruning.


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


# neurons.json.


def test_a_list_of_neurons_survives_saving_and_loading(tmp_path: Path):
    neurons = [
        Component("model.layers.0.mlp.up_proj", 3, -0.1 - 1e-16),
        Component("model.layers.1.mlp.up_proj", 0, 1e-300),
    ]
    saved = NeuronList(neurons, {"checkpoint": "tiny", "seeds": [0, 1, 2], "damping": 15.5, "note": "grüße"})
    saved.save(tmp_path / "folder" / "neurons.json")
    assert NeuronList.load(tmp_path / "folder" / "neurons.json") == saved
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["neurons.json"]


def test_selected_neurons_survive_saving_and_loading(tmp_path: Path):
    neurons = select_neurons({"a": torch.randn(9, generator=torch.Generator().manual_seed(0))}, 4)
    NeuronList(neurons).save(tmp_path / "neurons.json")
    assert NeuronList.load(tmp_path / "neurons.json") == NeuronList(neurons, {})


def test_the_neurons_that_follow_and_the_least_relevant_ones_survive_saving_and_loading(tmp_path: Path):
    saved = NeuronList(NEURONS[:1], {"a": 1}, next=NEURONS[1:3], least_relevant=[Component("b", 5, 0.0), *NEURONS[:1]])
    saved.save(tmp_path / "neurons.json")
    assert NeuronList.load(tmp_path / "neurons.json") == saved
    content = json.loads((tmp_path / "neurons.json").read_text())
    assert list(content) == ["format", "neurons", "next", "least_relevant", "provenance"]
    assert content["next"] == [{"module": n.module, "index": n.index, "score": n.score} for n in NEURONS[1:3]]


def test_saving_again_replaces_the_file(tmp_path: Path):
    path = tmp_path / "neurons.json"
    for neurons in (NEURONS, NEURONS[:1]):
        NeuronList(neurons).save(path)
        assert NeuronList.load(path).neurons == neurons


ROW = {"module": "a", "index": 1, "score": -1.0}
GOOD: dict[str, Any] = {"format": FORMAT, "neurons": [ROW], "provenance": {}}


def test_a_file_written_by_hand_or_before_there_were_other_lists_can_be_loaded(tmp_path: Path):
    (tmp_path / "neurons.json").write_text(json.dumps(GOOD))
    found = NeuronList.load(tmp_path / "neurons.json")
    assert found == NeuronList([Component("a", 1, -1.0)])
    assert found.next == found.least_relevant == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        json.dumps(GOOD)[:-10],
        "no json",
        b"\xff\xfe\x00",
        "null",
        "[]",
        "{}",
        json.dumps([ROW]),
        {**GOOD, "format": "another 1"},
        {**GOOD, "format": None},
        {"neurons": [ROW], "provenance": {}},
        {"format": FORMAT, "provenance": {}},
        {"format": FORMAT, "neurons": [ROW]},
        {**GOOD, "provenance": None},
        {**GOOD, "neurons": None},
        {**GOOD, "neurons": 3},
        {**GOOD, "neurons": ["a"]},
        {**GOOD, "neurons": [["a", 1, -1.0]]},
        {**GOOD, "neurons": [{"module": "a", "index": 1}]},
        {**GOOD, "neurons": [{**ROW, "index": "first"}]},
        {**GOOD, "neurons": [{**ROW, "index": 1.5}]},
        {**GOOD, "neurons": [{**ROW, "index": None}]},
        {**GOOD, "neurons": [{**ROW, "index": float("inf")}]},
        {**GOOD, "neurons": [{**ROW, "score": None}]},
        {**GOOD, "neurons": [{**ROW, "score": "low"}]},
        {**GOOD, "next": None},
        {**GOOD, "next": [{"module": "a"}]},
        {**GOOD, "least_relevant": 3},
        {**GOOD, "least_relevant": [{**ROW, "index": 1.5}]},
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path: Path, content):
    path = tmp_path / "neurons.json"
    data = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=r"neurons\.json is not a neurons\.json of format"):
        NeuronList.load(path)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "holds no neurons"),
        ([ROW, {**ROW, "index": 2}, {**ROW, "score": 5.0}], "names a neuron more than once"),
        ([ROW, {**ROW, "index": 2, "score": float("nan")}], "NaN or infinite"),
        ([{**ROW, "score": float("inf")}], "NaN or infinite"),
        ([{**ROW, "score": float("-inf")}], "NaN or infinite"),
    ],
)
def test_a_file_without_neurons_with_one_twice_or_with_a_score_that_is_not_finite_is_refused(
    tmp_path: Path, rows, complaint
):
    path = tmp_path / "neurons.json"
    path.write_text(json.dumps({**GOOD, "neurons": rows}))
    with pytest.raises(ValueError, match=rf"neurons\.json .*{complaint}"):
        NeuronList.load(path)


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        ({"next": [ROW]}, "names a neuron more than once"),
        ({"next": [{**ROW, "index": 2}, {**ROW, "index": 2}]}, "names a neuron more than once"),
        ({"next": [{**ROW, "index": 2, "score": float("nan")}]}, "NaN or infinite"),
        ({"least_relevant": [{**ROW, "index": 2}, {**ROW, "index": 2}]}, "names a neuron more than once"),
        ({"least_relevant": [{**ROW, "score": float("inf")}]}, "NaN or infinite"),
    ],
)
def test_the_other_lists_are_checked_as_the_neurons_are(tmp_path: Path, lists, complaint):
    path = tmp_path / "neurons.json"
    path.write_text(json.dumps({**GOOD, **lists}))
    with pytest.raises(ValueError, match=rf"neurons\.json .*{complaint}"):
        NeuronList.load(path)


def test_a_missing_file_is_an_error_that_says_what_writes_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--model.neurons: .*neurons\.json does not exist.*sparc3 prune"):
        NeuronList.load(tmp_path / "neurons.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        NeuronList.load(tmp_path)


EDITED = [
    Component("model.layers.0.mlp.up_proj", 3, -2.0, damping=0.5, mean=0.7),
    Component("model.layers.0.mlp.up_proj", 5, -1.5, mean=-0.2),
    Component("model.layers.1.mlp.up_proj", 0, -1.0, damping=0.25),
]


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
    with pytest.raises(ValueError, match=r"up_proj or gate_proj beside down_proj, fc1 .*--model\.layers"):
        neuron_layers(make_model().model.layers[0].self_attn)


def test_what_is_done_to_a_neuron_survives_saving_and_loading_and_is_in_the_digest(tmp_path):
    saved = NeuronList(EDITED)
    saved.save(tmp_path / "neurons.json")
    assert NeuronList.load(tmp_path / "neurons.json") == saved
    plain = [Component(n.module, n.index, n.score) for n in EDITED]
    assert NeuronList(plain).digest() != saved.digest()


@pytest.mark.parametrize("field", [{"damping": 0}, {"damping": 1.5}, {"mean": float("nan")}])
def test_an_edit_out_of_range_is_refused(tmp_path, field):
    row = {"module": "model.layers.0.mlp.up_proj", "index": 0, "score": 0.0, **field}
    content = {"format": "sparc3_lightning neurons 2", "neurons": [row], "provenance": {}}
    (tmp_path / "neurons.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="holds a"):
        NeuronList.load(tmp_path / "neurons.json")
