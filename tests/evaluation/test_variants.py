"""The models of an evaluation: their names, how many there are, and which neurons each is without."""

import copy
from dataclasses import replace

import pytest
import torch

from sparc3_lightning.evaluation.controls import CONTROLS, Controls
from sparc3_lightning.evaluation.variants import Variant, counted, describe, list_variants, neurons_of, of_kind
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import POOL
from sparc3_lightning.selection.neuron_list import NeuronList

UP, SECOND = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
NEURONS = NeuronList(
    neurons=[Component(SECOND, 4, -9.0), Component(UP, 7, -8.0), Component(SECOND, 20, -7.0)],
    next=[Component(UP, 1, -6.0), Component(SECOND, 0, -5.0), Component(UP, 23, -4.0)],
    least_relevant=[Component(UP, i, 0.1) for i in (2, 3, 11)] + [Component(SECOND, i, 0.2) for i in (1, 2, 9, 10, 12)],
)
WITHOUT_POOL = NeuronList(neurons=NEURONS.neurons)


def names(variants: list[Variant]) -> list[str]:
    return [variant.name for variant in variants]


def places(neurons: list[Component]) -> set[tuple[str, int]]:
    return {(neuron.module, neuron.index) for neuron in neurons}


def test_without_neurons_there_is_the_original_model_only():
    assert list_variants({}, 4, controls=Controls(5)) == [Variant("baseline", "baseline", 4)]


def test_the_pruned_model_and_each_draw_of_each_control_follow_the_original():
    variants = list_variants({"": NEURONS}, 6, controls=Controls(2))
    assert variants == [
        Variant("baseline", "baseline", 6),
        Variant("pruned", "pruned", 6, 3),
        Variant("random_0", "random", 6, 3, draw=0),
        Variant("random_1", "random", 6, 3, draw=1),
        Variant("least_relevant_0", "least_relevant", 6, 3, draw=0),
        Variant("least_relevant_1", "least_relevant", 6, 3, draw=1),
        Variant("largest_weights_0", "largest_weights", 6, 3, draw=0),
        Variant("largest_weights_1", "largest_weights", 6, 3, draw=1),
    ]
    assert all(variant.damping == 1 for variant in variants)
    assert {variant.kind for variant in variants[2:]} == set(CONTROLS)
    assert names(list_variants({"": NEURONS}, 6)) == ["baseline", "pruned"]


def test_controls_may_draw_fewer_continuations_but_no_other_model_does():
    variants = list_variants({"": NEURONS}, 6, controls=Controls(1, 2), doses=[1, 5])
    assert {v.name: v.num_continuations for v in variants} == {
        "baseline": 6,
        "pruned": 6,
        "top_1_1": 6,
        "top_5_1": 6,
        "random_0": 2,
        "least_relevant_0": 2,
        "largest_weights_0": 2,
    }


def test_a_list_that_does_not_say_which_neurons_are_least_relevant_has_no_such_control():
    assert names(list_variants({"": WITHOUT_POOL}, 1, controls=Controls(1))) == [
        "baseline",
        "pruned",
        "random_0",
        "largest_weights_0",
    ]


def test_every_dose_is_measured_at_every_strength_and_the_pruned_model_not_twice():
    variants = list_variants({"": NEURONS}, 2, doses=[1, 3, 6], dampings=[1.0, 0.5])
    doses = list(of_kind(variants, "dose"))
    assert doses == [
        Variant("top_1_1", "dose", 2, 1, 1.0),
        Variant("top_6_1", "dose", 2, 6, 1.0),
        Variant("top_1_0.5", "dose", 2, 1, 0.5),
        Variant("top_3_0.5", "dose", 2, 3, 0.5),
        Variant("top_6_0.5", "dose", 2, 6, 0.5),
    ]
    assert names(variants) == ["baseline", "pruned", *names(doses)]
    # A whole number, as YAML may give it, is the same damping.
    assert names(list_variants({"": NEURONS}, 2, doses=[3], dampings=[1])) == ["baseline", "pruned"]
    assert names(list_variants({"": NEURONS}, 2, doses=[3], dampings=[0.25])) == ["baseline", "pruned", "top_3_0.25"]


def test_further_lists_are_measured_as_they_stand_and_at_each_dose_and_controls_are_those_of_the_first():
    other = NeuronList(neurons=NEURONS.next[:2], next=NEURONS.neurons)
    lists = {"first": NEURONS, "second": other}
    variants = list_variants(lists, 2, controls=Controls(1), doses=[2], dampings=[1.0, 0.5])
    assert [(v.name, v.kind, v.selection, v.num_neurons, v.damping) for v in variants[1:-3]] == [
        ("pruned", "pruned", "first", 3, 1.0),
        ("first top_2_1", "dose", "first", 2, 1.0),
        ("first top_2_0.5", "dose", "first", 2, 0.5),
        ("second", "dose", "second", 2, 1.0),
        ("second top_2_0.5", "dose", "second", 2, 0.5),
    ]
    assert {(v.kind, v.num_neurons) for v in variants[-3:]} == {(kind, 3) for kind in CONTROLS}
    assert names(list_variants(lists, 2)) == ["baseline", "pruned", "second"]
    off = neurons_of(variants[:-3], lists, None, 0)
    assert off["baseline"] == []
    assert off["pruned"] == NEURONS.neurons
    assert off["first top_2_1"] == off["first top_2_0.5"] == NEURONS.neurons[:2]
    assert off["second"] == off["second top_2_0.5"] == other.neurons
    with pytest.raises(ValueError, match=r"--model\.names: another model is called 'random_0' too"):
        list_variants({"first": NEURONS, "random_0": other}, 2, controls=Controls(1))


def test_several_lists_of_one_selection_are_measured_as_they_stand_and_its_doses_once_by_the_longest():
    longer = NeuronList(neurons=NEURONS.neurons[:2], next=[*NEURONS.neurons[2:], *NEURONS.next])
    first = NeuronList(neurons=NEURONS.neurons)
    lists = {"a at 1 %": first, "b": NEURONS, "a at 2 %": longer}
    selections = {"a at 1 %": "a", "a at 2 %": "a"}
    variants = list_variants(lists, 2, doses=[2, 5], dampings=[1.0, 0.5], selections=selections)
    assert [(v.name, v.selection, v.listed, v.num_neurons, v.damping) for v in variants[1:]] == [
        ("pruned", "a", "a at 1 %", 3, 1.0),
        ("a at 2 %", "a", "a at 2 %", 2, 1.0),
        ("a top_5_1", "a", "a at 2 %", 5, 1.0),
        ("a top_2_0.5", "a", "a at 2 %", 2, 0.5),
        ("a top_5_0.5", "a", "a at 2 %", 5, 0.5),
        ("b", "b", "b", 3, 1.0),
        ("b top_2_1", "b", "b", 2, 1.0),
        ("b top_5_1", "b", "b", 5, 1.0),
        ("b top_2_0.5", "b", "b", 2, 0.5),
        ("b top_5_0.5", "b", "b", 5, 0.5),
    ]
    off = neurons_of(variants, lists, None, 0)
    assert off["a top_5_1"] == (NEURONS.neurons + NEURONS.next)[:5]
    assert [len(off[name]) for name in ("pruned", "a at 2 %", "b")] == [3, 2, 3]
    with pytest.raises(ValueError, match=r"--model.doses asks for 7 neurons, but --model.neurons \(a\) lists 6"):
        list_variants(lists, 2, doses=[7], selections=selections)


def test_no_two_models_have_the_same_name():
    found = names(
        list_variants({"": NEURONS}, 2, Controls(3), doses=[1, 2, 3, 4, 5, 6], dampings=[1.0, 0.5, 0.25, 0.125])
    )
    assert len(set(found)) == len(found) == 2 + 3 * 3 + 4 * 6 - 1


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"controls": Controls(-1)}, "--model.controls.num_draws must be at least 0, got -1"),
        ({"controls": Controls(1, 0)}, "--model.controls.num_continuations must be at least 1, got 0"),
        ({"controls": Controls(1, -5)}, "--model.controls.num_continuations must be at least 1, got -5"),
        ({"dampings": [0.0]}, r"--model.dampings must be above 0 and at most 1, got \[0.0\]"),
        ({"dampings": [0.5, 1.5]}, "--model.dampings must be above 0"),
        ({"dampings": [-0.5]}, "--model.dampings must be above 0"),
        ({"dampings": [float("nan")]}, "--model.dampings must be above 0"),
        ({"dampings": [], "doses": [1]}, "--model.dampings must be above 0"),
        ({"doses": [1, 1]}, "--model.doses must be different numbers above 0"),
        ({"doses": [0, 1]}, "--model.doses must be different numbers above 0"),
        ({"doses": [-2]}, "--model.doses must be different numbers above 0"),
        ({"doses": [1], "dampings": [0.5, 0.5]}, "--model.dampings must be different"),
        ({"dampings": [0.5]}, r"--model.dampings \[0.5\] has no effect without --model.doses.* 'sparc3 prune'"),
        ({"dampings": [1.0, 0.5]}, r"--model.dampings \[1.0, 0.5\] has no effect without --model.doses"),
        ({"doses": [1], "lists": {}}, "--model.doses needs --model.neurons"),
        ({"doses": [2, 7]}, "--model.doses asks for 7 neurons, but --model.neurons lists 6.* --model.num_ranked 7"),
        ({"doses": [4], "lists": {"": WITHOUT_POOL}}, "--model.doses asks for 4 neurons, but --model.neurons lists 3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) and "lists" not in value else "",
)
def test_numbers_that_make_no_sense_are_refused_by_the_name_of_their_option(arguments, option):
    with pytest.raises(ValueError, match=option):
        list_variants(**{"lists": {"": NEURONS}, "num_continuations": 4, **arguments})


@pytest.mark.parametrize(("asked", "drawn"), [(None, 4), (1, 1), (4, 4), (5, 4)])
def test_controls_draw_no_more_continuations_than_the_other_models(asked, drawn):
    variants = list_variants({"": NEURONS}, 4, controls=Controls(1, asked))
    assert [v.num_continuations for v in variants] == [4, 4, drawn, drawn, drawn]


def test_numbers_at_the_edge_of_sense_are_taken():
    list_variants({"": NEURONS}, 1, Controls(0, 1), doses=[6], dampings=[1e-3, 1.0])
    list_variants({"": NEURONS}, 4, Controls(1, 4), dampings=[])


def test_doses_are_taken_in_the_order_of_the_list_and_the_pruned_model_is_without_just_its_neurons(make_model):
    variants = list_variants({"": NEURONS}, 1, doses=[1, 2, 3, 5, 6], dampings=[1.0, 0.5])
    lists = neurons_of(variants, {"": NEURONS}, make_model(), 0)
    ranking = NEURONS.neurons + NEURONS.next
    assert lists["baseline"] == []
    assert lists["pruned"] == NEURONS.neurons
    for variant in of_kind(variants, "dose"):
        assert lists[variant.name] == ranking[: variant.num_neurons]
    assert list(lists) == names(variants)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_each_draw_of_a_control_has_as_many_neurons_per_layer_and_none_of_the_pruned(make_model, seed):
    variants = list_variants({"": NEURONS}, 1, controls=Controls(4))
    lists = neurons_of(variants, {"": NEURONS}, make_model(), seed)
    for variant in variants[2:]:
        off = lists[variant.name]
        assert [sum(n.module == module for n in off) for module in (UP, SECOND)] == [1, 2], variant.name
        assert len(places(off)) == 3
        assert not places(off) & places(NEURONS.neurons)
    random = {frozenset(places(lists[f"random_{i}"])) for i in range(4)}
    assert len(random) == 4, "draws differ"
    assert places(lists["random_0"]) != places(neurons_of(variants, {"": NEURONS}, make_model(), seed + 1)["random_0"])
    assert lists == neurons_of(variants, {"": NEURONS}, make_model(), seed)


def test_controls_of_damped_neurons_or_weights_are_damped_alike(make_model):
    dampings = [0.5, 0.25, 0.75]
    damped = [replace(n, damping=s) for n, s in zip(NEURONS.neurons, dampings, strict=True)]
    of_weights = [replace(n, granularity="weight", input=3) for n in damped]
    for neurons, pool in ((damped, NEURONS.least_relevant), (of_weights, [])):
        lists = {"": NeuronList(neurons, least_relevant=pool)}
        variants = list_variants(lists, 1, controls=Controls(2))
        for name, off in neurons_of(variants, lists, make_model(), 0).items():
            if name != "baseline":
                found = sorted((n.module, n.damping) for n in off)
                assert found == [(UP, 0.25), (SECOND, 0.5), (SECOND, 0.75)], name


def test_the_number_of_a_control_whose_layers_have_no_more_is_that_of_those_that_are_off(make_model):
    lists = {"": NeuronList([Component(UP, i, -1.0) for i in range(18)], least_relevant=[Component(UP, 20, 0.0)])}
    variants = list_variants(lists, 1, controls=Controls(1), doses=[4])
    off = neurons_of(variants, lists, make_model(), 0)
    found = {variant.kind: variant.num_neurons for variant in counted(variants, off)}
    expected = {"baseline": 0, "pruned": 18, "dose": 4, "random": 6, "least_relevant": 1, "largest_weights": 6}
    assert found == expected


def test_of_neurons_held_at_their_mean_it_is_known_which_controls_are_held_too(make_model):
    held, pool = ([replace(n, mean=0.5) for n in of] for of in (NEURONS.neurons, NEURONS.least_relevant))
    for least_relevant, expected in ((pool, {"pruned", "least_relevant"}), (NEURONS.least_relevant, {"pruned"})):
        lists = {"": NeuronList(held, least_relevant=least_relevant)}
        variants = list_variants(lists, 1, controls=Controls(1))
        off = neurons_of(variants, lists, make_model(), 0)
        assert {variant.kind for variant in counted(variants, off) if variant.mean_ablated} == expected


def test_random_neurons_come_from_the_whole_layer_and_the_least_relevant_from_their_list(make_model):
    variants = list_variants({"": NEURONS}, 1, controls=Controls(150))
    lists = neurons_of(variants, {"": NEURONS}, make_model(), 0)
    drawn = {kind: set().union(*(places(lists[v.name]) for v in of_kind(variants, kind))) for kind in CONTROLS}
    everywhere = {(module, i) for module in (UP, SECOND) for i in range(24)}
    assert drawn["random"] == everywhere - places(NEURONS.neurons)
    assert drawn["least_relevant"] == places(NEURONS.least_relevant)


def test_neurons_with_the_largest_weights_are_drawn_from_those_whose_rows_have_the_largest_norms(make_model):
    model = make_model()
    # The layers on other scales, and the pruned neurons the largest of all.
    model.get_submodule(SECOND).weight.data.mul_(0.01)
    for neuron in NEURONS.neurons:
        model.get_submodule(neuron.module).weight.data[neuron.index] *= 100
    variants = list_variants({"": NEURONS}, 1, controls=Controls(150))
    lists = neurons_of(variants, {"": NEURONS}, model, 0)
    drawn = set().union(*(places(lists[v.name]) for v in of_kind(variants, "largest_weights")))
    expected = set()
    for module, number in [(UP, 1), (SECOND, 2)]:
        rows = enumerate(model.get_submodule(module).weight.tolist())
        norms = {i: sum(w * w for w in row) for i, row in rows if (module, i) not in places(NEURONS.neurons)}
        expected |= {(module, i) for i in sorted(norms, key=norms.__getitem__, reverse=True)[: POOL * number]}
    assert drawn == expected
    assert len(drawn) == 3 * POOL


def test_controls_of_gate_neurons_come_from_the_gates(make_model):
    gate = "model.layers.0.mlp.gate_proj"
    neurons = NeuronList([Component(gate, 5, -1.0)])
    model = make_model()
    heavy = model.get_submodule(gate).weight.norm(dim=1).argsort(descending=True).tolist()
    lists = neurons_of(list_variants({"": neurons}, 1, controls=Controls(60)), {"": neurons}, model, 0)
    assert {n.module for off in lists.values() for n in off} == {gate}
    drawn = {lists[f"largest_weights_{i}"][0].index for i in range(60)}
    assert drawn == set([i for i in heavy if i != 5][:POOL])


@pytest.mark.parametrize("damping", [1.0, 0.5, 0.25])
def test_in_its_context_the_model_is_the_one_whose_columns_are_scaled_and_the_original_after_it(make_model, damping):
    model = make_model()
    input_ids = torch.tensor([[5, 17, 42, 8, 61]])
    damped = copy.deepcopy(model)
    for neuron in NEURONS.neurons:
        mlp = damped.model.layers[0 if neuron.module == UP else 1].mlp
        mlp.down_proj.weight.data[:, neuron.index] *= 1 - damping
    original, expected = model(input_ids).logits, damped(input_ids).logits
    with Variant("some", "dose", 1, 3, damping).as_context(model, NEURONS.neurons):
        found = model(input_ids).logits
    assert torch.allclose(found, expected, rtol=1e-9)
    assert not torch.allclose(found, original, atol=1e-3)
    assert torch.equal(model(input_ids).logits, original)
    with Variant("baseline", "baseline", 1).as_context(model, []):
        assert torch.equal(model(input_ids).logits, original)


def test_models_are_described_by_how_many_there_are_of_each_kind():
    assert describe(list_variants({"": NEURONS}, 1, Controls(2), doses=[1])) == (
        "1 baseline, 1 pruned, 1 dose, 2 random, 2 least relevant, 2 largest weights"
    )
