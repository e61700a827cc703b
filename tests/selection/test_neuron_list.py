"""neurons.json: what survives saving and loading, and which files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EDITED, NEURONS, write_sealed

from sparc3_lightning.errors import OptionError
from sparc3_lightning.files import sealed
from sparc3_lightning.models.checkpoints import Checkpoint
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
    assert list(content) == ["format", "neurons", "next", "least_relevant", "provenance", "sha256"]
    assert content["next"] == [{"module": n.module, "index": n.index, "score": n.score} for n in NEURONS[1:3]]


def test_saving_again_replaces_the_file(tmp_path: Path):
    path = tmp_path / "neurons.json"
    for neurons in (NEURONS, NEURONS[:1]):
        NeuronList(neurons).save(path)
        assert NeuronList.load(path).neurons == neurons


ROW = {"module": "a", "index": 1, "score": -1.0}
GOOD: dict[str, Any] = {"format": FORMAT, "neurons": [ROW], "next": [], "least_relevant": [], "provenance": {}}


def test_a_file_that_was_changed_by_hand_is_refused_and_a_copy_of_other_white_space_is_not(tmp_path: Path):
    path = tmp_path / "neurons.json"
    NeuronList([Component("a", 1, -1.0)], {"checkpoint": "b"}).save(path)
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text)))
    assert NeuronList.load(path) == NeuronList([Component("a", 1, -1.0)], {"checkpoint": "b"})
    for old, new in (("-1.0", "-1.1"), ('"index": 1', '"index": 2'), ('"checkpoint": "b"', '"checkpoint": "c"')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="its checksum does not match: it was changed or damaged after it was"):
            NeuronList.load(path)
    path.write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="it has no checksum: it was changed by hand, or written by an older version"):
        NeuronList.load(path)


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
        *({name: value for name, value in GOOD.items() if name != missing} for missing in GOOD),
        {**GOOD, "provenance": {"sample_ids": ["a", 3]}},
        {**GOOD, "provenance": {"sample_ids": {"a": 1}}},
        {**GOOD, "provenance": {"general": [{"path": 3}]}},
        {**GOOD, "provenance": {"general": {"path": "a"}}},
        {**GOOD, "provenance": {"behavior": []}},
        {**GOOD, "provenance": {"behavior": {"path": "a", "spec": 3}}},
        {**GOOD, "provenance": {"criterion": 1}},
        {**GOOD, "provenance": {"budget": {"max_perplexity_increase": "5 %"}}},
        {**GOOD, "provenance": {"checkpoint_fingerprint": ["files:abc"]}},
        {**GOOD, "provenance": {"differential_strength_percent": "high"}},
        {**GOOD, "provenance": None},
        {**GOOD, "neurons": None},
        {**GOOD, "neurons": 3},
        {**GOOD, "neurons": ["a"]},
        {**GOOD, "neurons": [["a", 1, -1.0]]},
        {**GOOD, "neurons": [{"module": "a", "index": 1}]},
        {**GOOD, "neurons": [{**ROW, "index": "first"}]},
        {**GOOD, "neurons": [{**ROW, "index": 1.5}]},
        {**GOOD, "neurons": [{**ROW, "index": None}]},
        {**GOOD, "neurons": [{**ROW, "index": True}]},
        {**GOOD, "neurons": [{**ROW, "index": -1}]},
        {**GOOD, "neurons": [{**ROW, "module": 3}]},
        {**GOOD, "neurons": [{**ROW, "score": 10**400}]},
        {**GOOD, "neurons": [{**ROW, "mean": None}]},
        {**GOOD, "neurons": [{**ROW, "mean": "0"}]},
        {**GOOD, "neurons": [{**ROW, "damping": -0.5}]},
        {**GOOD, "neurons": [{**ROW, "input": 1.5}]},
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
    data = json.dumps(sealed(content)) if isinstance(content, dict) else content
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=r"neurons\.json is not a neurons\.json of format"):
        NeuronList.load(path)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "holds no neurons"),
        ([ROW, {**ROW, "index": 2}, {**ROW, "score": 5.0}], "names a neuron more than once"),
        ([ROW, {**ROW, "index": 2, "score": float("nan")}], "neurons.1.score cannot be None"),
        ([{**ROW, "score": float("inf")}], "neurons.0.score cannot be None"),
        ([{**ROW, "mean": float("-inf")}], "neurons.0.mean cannot be None"),
    ],
)
def test_a_file_without_neurons_with_one_twice_or_with_a_score_that_is_not_finite_is_refused(
    tmp_path: Path, rows, complaint
):
    path = tmp_path / "neurons.json"
    write_sealed(path, {**GOOD, "neurons": rows})
    with pytest.raises(ValueError, match=rf"neurons\.json .*{complaint}"):
        NeuronList.load(path)


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        ({"next": [ROW]}, "names a neuron more than once"),
        ({"next": [{**ROW, "index": 2}, {**ROW, "index": 2}]}, "names a neuron more than once"),
        ({"next": [{**ROW, "index": 2, "score": float("nan")}]}, "next.0.score cannot be None"),
        ({"least_relevant": [{**ROW, "index": 2}, {**ROW, "index": 2}]}, "names a neuron more than once"),
        ({"least_relevant": [{**ROW, "score": float("inf")}]}, "least_relevant.0.score cannot be None"),
    ],
)
def test_the_other_lists_are_checked_as_the_neurons_are(tmp_path: Path, lists, complaint):
    path = tmp_path / "neurons.json"
    write_sealed(path, {**GOOD, **lists})
    with pytest.raises(ValueError, match=rf"neurons\.json .*{complaint}"):
        NeuronList.load(path)


def test_a_missing_file_is_an_error_that_says_what_writes_it(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--model.neurons: .*neurons\.json does not exist.*sparc3 prune"):
        NeuronList.load(tmp_path / "neurons.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        NeuronList.load(tmp_path)


def test_a_list_knows_its_checkpoint_wherever_that_lies_now():
    neurons = NeuronList(NEURONS, {"checkpoint": "org/model", "checkpoint_fingerprint": "commit:abc"})
    assert neurons.checkpoint(Path("n.json")) == Checkpoint("org/model", "abc")
    assert neurons.checkpoint(Path("n.json"), "./copy") == Checkpoint("./copy", "abc")


@pytest.mark.parametrize("missing", ["checkpoint", "checkpoint_fingerprint"])
def test_a_list_that_does_not_say_its_checkpoint_is_refused_where_that_is_needed(missing):
    origin: dict[str, str | None] = {"checkpoint": "org/model", "checkpoint_fingerprint": "commit:abc", missing: None}
    for of in (origin, {}):
        with pytest.raises(OptionError, match=r"^--model\.neurons: n\.json does not say which checkpoint it is for"):
            NeuronList(NEURONS, of).checkpoint(Path("n.json"))


def test_a_list_of_another_checkpoint_is_refused_by_the_names_of_both(tiny_checkpoint):
    ours = Checkpoint(tiny_checkpoint)
    NeuronList(NEURONS, {"checkpoint": "moved", "checkpoint_fingerprint": ours.fingerprint}).check_checkpoint(ours, "n")
    for origin, said in (
        ({"checkpoint": "org/model", "checkpoint_fingerprint": "commit:abc"}, r"'org/model' \(commit:abc\)"),
        ({}, r"None \(None\)"),
    ):
        both = rf"^n is for the checkpoint {said}, but --model\.checkpoint is '.*tiny.*' \(files:\w+\)\.$"
        with pytest.raises(OptionError, match=both):
            NeuronList(NEURONS, origin).check_checkpoint(ours, "n")


def test_what_is_done_to_a_neuron_survives_saving_and_loading_and_is_in_the_digest(tmp_path):
    saved = NeuronList(EDITED)
    saved.save(tmp_path / "neurons.json")
    assert NeuronList.load(tmp_path / "neurons.json") == saved
    plain = [Component(n.module, n.index, n.score) for n in EDITED]
    assert NeuronList(plain).digest() != saved.digest()


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        ({"damping": 0}, "holds a damping that is not above 0"),
        ({"damping": 1.5}, "neurons.0.damping must be at least 0 and at most 1"),
        ({"mean": float("nan")}, "neurons.0.mean cannot be None"),
    ],
)
def test_an_edit_out_of_range_is_refused(tmp_path, field, complaint):
    row = {"module": "model.layers.0.mlp.up_proj", "index": 0, "score": 0.0, **field}
    write_sealed(tmp_path / "neurons.json", {**GOOD, "neurons": [row]})
    with pytest.raises(ValueError, match=complaint):
        NeuronList.load(tmp_path / "neurons.json")
