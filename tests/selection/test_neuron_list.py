"""neurons.json: what survives saving and loading, and which files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EDITED, NEURONS

from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import select_neurons
from sparc3_lightning.selection.neuron_list import FORMAT, NeuronList


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
