"""Single weights in neurons.json, and those of the lowest scores found layer by layer."""

import dataclasses
import hashlib
import json

import pytest
import torch
from helpers import write_sealed
from weights import in_memory

from sparc3_lightning.files import sealed
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.lowest import Lowest, lowest_first
from sparc3_lightning.selection.neuron_list import FORMAT, NeuronList


def test_a_list_of_weights_survives_saving_and_loading_and_its_columns_count(tmp_path):
    weights = [
        Component("a", 1, -2.0, granularity="weight", input=0),
        Component("a", 1, -1.0, 0.5, granularity="weight", input=3),
    ]
    saved = NeuronList(
        weights,
        {"note": 1},
        [Component("b", 1, 0.0, granularity="weight", input=3)],
        [Component("b", 1, 0.0, granularity="weight", input=4)],
    )
    saved.save(tmp_path / "neurons.json")
    found = NeuronList.load(tmp_path / "neurons.json")
    assert found == saved
    assert found.granularity == "weight"
    assert len({n.key for n in found.all()}) == 4
    swapped = dataclasses.replace(weights[0], input=1)
    assert NeuronList([swapped, weights[1]]).digest() != NeuronList(weights).digest()
    rows = json.loads((tmp_path / "neurons.json").read_text())["neurons"]
    assert rows == [
        {"module": "a", "index": 1, "score": -2.0, "input": 0},
        {"module": "a", "index": 1, "score": -1.0, "damping": 0.5, "input": 3},
    ]


def test_a_list_without_weights_keeps_its_bytes_and_its_digest(tmp_path):
    neurons = [Component("a", 1, -2.0), Component("b", 3, -1.0, 0.5, 0.25)]
    saved = NeuronList(neurons, {"checkpoint": "tiny"}, least_relevant=[Component("a", 0, 0.5)])
    saved.save(tmp_path / "neurons.json")
    rows = [
        {"module": "a", "index": 1, "score": -2.0},
        {"module": "b", "index": 3, "score": -1.0, "damping": 0.5, "mean": 0.25},
    ]
    content = {
        "format": "sparc3_lightning neurons 4",
        "neurons": rows,
        "next": [],
        "least_relevant": [{"module": "a", "index": 0, "score": 0.5}],
        "provenance": {"checkpoint": "tiny"},
    }
    assert (tmp_path / "neurons.json").read_text() == json.dumps(sealed(content), indent=1) + "\n"
    places = [[("a", 1, 1.0, 0.0), ("b", 3, 0.5, 0.25)], [], [("a", 0, 1.0, 0.0)]]
    assert saved.digest() == hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]
    assert (saved.granularity, NeuronList([Component("x.o_proj", 1, 0.0, granularity="head")]).granularity) == (
        "neuron",
        "head",
    )


def test_a_list_may_mix_kinds_and_tells_a_channel_from_a_head_of_the_same_number(tmp_path):
    mixed = [
        Component("x.o_proj", 1, -3.0, granularity="channel"),
        Component("x.up_proj", 1, -2.5),
        Component("x.o_proj", 1, -2.0, granularity="head"),
        Component("x.o_proj", 1, -1.0, granularity="weight", input=0),
    ]
    saved = NeuronList(mixed, next=[Component("x.o_proj", 2, 0.0, granularity="channel")])
    saved.save(tmp_path / "neurons.json")
    found = NeuronList.load(tmp_path / "neurons.json")
    assert found == saved
    assert found.granularity == "neuron+head+channel+weight"
    assert len({n.key for n in found.all()}) == 5
    rows = json.loads((tmp_path / "neurons.json").read_text())["neurons"]
    assert [row.get("granularity") for row in rows] == ["channel", None, "head", None]
    assert NeuronList(mixed[:1]).digest() != NeuronList(mixed[2:3]).digest()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"input": 2}, {"input": 2, "score": 5.0}], "names a neuron more than once"),
        ([{"input": 2, "granularity": "head"}], "Head 1 of a cannot have the input 2"),
        ([{"granularity": "weight"}], "Weight 1 of a cannot have the input None"),
        ([{"granularity": "block"}], "granularity cannot be 'block'"),
        ([{"granularity": "channel"}, {"granularity": "channel"}], "names a neuron more than once"),
        ([{"input": 1.5}], r"is not a neurons\.json of format"),
        ([{"input": "first"}], r"is not a neurons\.json of format"),
    ],
)
def test_a_list_that_names_a_component_twice_or_is_not_clear_about_its_kind_is_refused(tmp_path, rows, complaint):
    row = {"module": "a", "index": 1, "score": -1.0}
    lists = {"neurons": [row | more for more in rows], "next": [], "least_relevant": []}
    write_sealed(tmp_path / "neurons.json", {"format": FORMAT, **lists, "provenance": {}})
    with pytest.raises(ValueError, match=complaint):
        NeuronList.load(tmp_path / "neurons.json")


# The selection, layer by layer.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [1, 7, 60, 200, 264])
def test_the_lowest_layer_by_layer_are_those_of_a_selection_over_all_with_the_same_order_of_ties(seed, number):
    draw = torch.Generator().manual_seed(seed)
    # Whole numbers, so that many are equal, within a layer and between layers.
    scores = {
        f"layers.{i}.up_proj": torch.randint(-4, 5, shape, generator=draw).float()
        for i, shape in enumerate([(8, 5), (3, 40), (20, 5), (1, 4)])
    }
    found = Lowest(number, "weight")
    for name, score in scores.items():
        found.add(name, score)
    assert found.components == in_memory(scores, number)


def test_the_places_of_the_lowest_are_those_of_a_stable_sort():
    for seed in range(20):
        scores = torch.randint(-3, 4, (6, 7), generator=torch.Generator().manual_seed(seed)).float()
        for number in (0, 1, 13, 42, 50):
            assert torch.equal(lowest_first(scores, number), scores.flatten().argsort(stable=True)[:number])
