"""Score files: what is written is read back; what is damaged, foreign or does not belong together is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparc3_lightning.attribution.scores import FORMAT, Provenance, ScoreFile, average, load_matching
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.attribution.tensor_file import save_tensors
from sparc3_lightning.models.experts import TokensSeen

PROVENANCE = Provenance(
    checkpoint="org/name",
    checkpoint_fingerprint="commit:0123",
    spec=ScoreSpec("lrp", "attnlrp", "magnitude", "argmax", layers=["up_proj"], dtype="float32"),
    data={"class": "C4", "seq_len": 8, "source": None, "num_too_short": 3},
    data_fingerprint="89ab",
    num_samples=2,
    num_tokens=16,
    seq_len=8,
    seed=1,
    num_nonfinite=4,
    sample_ids=["document-1", "document-2"],
    versions={"torch": "2.0", "python": "3.11"},
    git_hash="0" * 40,
)
OTHER = {
    "checkpoint_fingerprint": "commit:4567",
    "method": "wanda",
    "rule": "cp_lrp",
    "relevance": None,
    "target": "lexicon",
    "lexicon": "small",
    "words": "0123",
    "layers": ["gate_proj", "up_proj"],
    "dtype": "bfloat16",
    "granularity": "head",
    "chunk": 32,
    "kept": "4567",
}


def layer(number: int) -> str:
    return f"model.layers.{number}.mlp.up_proj"


def make_scores(num_layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {layer(i): torch.randn(6, generator=draw) for i in range(num_layers)}


def write(path: Path, scores: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    ScoreFile(make_scores() if scores is None else scores, changed(PROVENANCE, **changes)).save(path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A score file."""
    return write(tmp_path / "scores.safetensors")


def test_a_score_file_is_read_back_with_its_provenance(path: Path) -> None:
    file = ScoreFile.load(path)
    assert file.provenance == PROVENANCE
    assert file.path == path
    expected = make_scores()
    assert file.scores.keys() == expected.keys()
    assert all(torch.equal(file.scores[name], expected[name]) for name in expected)


def test_a_score_file_is_plain_safetensors_with_float32_tensors_named_by_module(path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == {layer(0), layer(1)}
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values()} == {(torch.float32, (6,))}


def test_layers_come_in_their_natural_order_two_before_ten(tmp_path: Path) -> None:
    scores = make_scores(12)
    shuffled = {name: scores[name] for name in sorted(scores, reverse=True)}
    loaded = ScoreFile.load(write(tmp_path / "a", shuffled)).scores
    assert list(loaded) == [layer(i) for i in range(12)]
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)


def test_scores_that_are_views_of_a_larger_tensor_are_written_alone(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(6, 2)
    loaded = ScoreFile.load(write(tmp_path / "a", {layer(0): wide[:, 1]})).scores[layer(0)]
    assert loaded.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]


def test_a_header_with_a_field_of_a_later_version_is_read(tmp_path: Path) -> None:
    values = {**dataclasses.asdict(PROVENANCE), "from_the_future": 1}
    values["spec"]["from_the_future"] = 1
    save_tensors(tmp_path / "a", make_scores(), {"format": FORMAT, "provenance": json.dumps(values)})
    assert ScoreFile.load(tmp_path / "a").provenance == PROVENANCE


def test_the_summary_of_a_provenance_leaves_out_the_samples_only() -> None:
    summary = PROVENANCE.summary()
    assert set(dataclasses.asdict(PROVENANCE)) - set(summary) == {"sample_ids"}
    assert summary["data"] == PROVENANCE.data


def test_writing_over_a_score_file_leaves_one_file(path: Path) -> None:
    write(path, make_scores(seed=1))
    assert [file.name for file in path.parent.iterdir()] == ["scores.safetensors"]
    assert torch.equal(ScoreFile.load(path).scores[layer(0)], make_scores(seed=1)[layer(0)])


def test_a_missing_score_file_says_which_verb_writes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist; 'sparc3 attribute' writes it"):
        ScoreFile.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ScoreFile.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(kept: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"scores.safetensors is not a safetensors file, or is truncated"):
        ScoreFile.load(path)


def test_a_text_file_is_refused(path: Path) -> None:
    path.write_text("these are no scores, but the text is long enough for a header of some kind\n" * 10)
    with pytest.raises(ValueError, match="is not a safetensors file, or is truncated"):
        ScoreFile.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "sparc3_lightning scores 9"}])
def test_other_safetensors_files_are_refused(metadata: dict[str, str] | None, path: Path) -> None:
    save_file(make_scores(), path, metadata)
    with pytest.raises(ValueError, match="but not scores: its header does not say 'sparc3_lightning scores 3'"):
        ScoreFile.load(path)


def test_a_file_of_an_older_version_is_refused_by_its_format(path: Path) -> None:
    save_file(make_scores(), path, {"format": "sparc3_lightning scores 2"})
    with pytest.raises(ValueError, match=r"scores.safetensors was written by an older version in format 2; attribute"):
        ScoreFile.load(path)


@pytest.mark.parametrize("header", [None, "{", "[]", "3", '{"checkpoint": "org/name"}', '{"spec": {"method": "lrp"}}'])
def test_a_damaged_header_is_refused(header: str | None, path: Path) -> None:
    save_tensors(path, make_scores(), {"format": FORMAT, **({} if header is None else {"provenance": header})})
    with pytest.raises(ValueError, match=r"The header of .*scores.safetensors is damaged"):
        ScoreFile.load(path)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("checkpoint", 3, "checkpoint cannot be 3"),
        ("data", [], "data cannot be"),
        ("num_samples", -1, "num_samples must be at least 0, and is -1"),
        ("num_samples", "2", "num_samples cannot be '2'"),
        ("num_tokens", True, "num_tokens cannot be True"),
        ("sample_ids", [1], "sample_ids.0 cannot be 1"),
        ("versions", {"torch": 2}, "versions.torch cannot be 2"),
        ("spec", None, "spec cannot be None"),
        ("spec", {"method": "lrp"}, "spec has no rule"),
        ("method", "magic", "spec.method cannot be 'magic'"),
        ("granularity", "layer", "spec.granularity cannot be 'layer'"),
        ("layers", "up_proj", "spec.layers cannot be 'up_proj'"),
    ],
)
def test_a_field_of_another_type_is_named(field: str, value: Any, reason: str, path: Path) -> None:
    values = dataclasses.asdict(PROVENANCE)
    (values["spec"] if field in values["spec"] else values)[field] = value
    save_tensors(path, make_scores(), {"format": FORMAT, "provenance": json.dumps(values)})
    with pytest.raises(ValueError, match=f"The header of .*scores.safetensors is damaged: {reason}"):
        ScoreFile.load(path)


@pytest.mark.parametrize("place", [8, 40, 200, 400, 900, -1, -20, -48])
@pytest.mark.parametrize("bit", [1, 64])
def test_one_flipped_bit_anywhere_is_refused(place: int, bit: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scores\.safetensors"):
        ScoreFile.load(path)


def test_values_that_were_changed_after_they_were_written_are_refused(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    scores = make_scores()
    scores[layer(0)][0] += 1
    save_file(scores, path, metadata)
    with pytest.raises(ValueError, match=r"scores.safetensors cannot be used: its checksum does not match"):
        ScoreFile.load(path)
    save_file(make_scores(), path, {name: text for name, text in metadata.items() if name != "sha256"})
    with pytest.raises(ValueError, match=r"scores.safetensors cannot be used: it has no checksum"):
        ScoreFile.load(path)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.complex64], ids=str
)
def test_scores_of_another_dtype_are_refused_with_it(dtype: torch.dtype, tmp_path: Path) -> None:
    wrong = torch.ones(6).to(dtype)
    with pytest.raises(ValueError, match=rf"a: the scores of {layer(0)} are of {dtype}, expected torch.float32"):
        ScoreFile.load(write(tmp_path / "a", {**make_scores(), layer(0): wrong}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_name_of_the_module(value: float, tmp_path: Path) -> None:
    scores = make_scores()
    scores[layer(1)][5] = value
    with pytest.raises(ValueError, match=rf"a: the scores of {layer(1)} hold NaN or infinity"):
        ScoreFile.load(write(tmp_path / "a", scores))


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_scores_that_are_no_vectors_are_refused_with_their_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{layer(1)} has shape .*, expected \[out_features\]") as raised:
        ScoreFile.load(write(tmp_path / "a", {**make_scores(), layer(1): torch.zeros(shape)}))
    assert str(list(shape)) in str(raised.value)


def test_a_file_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no scores"):
        ScoreFile.load(write(tmp_path / "a", {}))


def test_files_of_other_data_and_seeds_belong_together(tmp_path: Path) -> None:
    changes = {
        "checkpoint": "a/copy",
        "data": {"class": "ToxicPrompts"},
        "data_fingerprint": "cdef",
        "num_samples": 93,
        "num_tokens": 1000,
        "seq_len": 20,
        "seed": 2,
        "num_nonfinite": 0,
        "sample_ids": [],
        "versions": {},
        "git_hash": None,
        "expert_tokens": TokensSeen(8, 0, 3, 12, 2),
        "lrp_check": "LRP: logits unchanged",
        "choosers": {"small": "files:0123"},
        "split_half": 0.8,
        "nonfinite": "zero",
        "activations": True,
    }
    fields = {*dataclasses.asdict(PROVENANCE), *dataclasses.asdict(PROVENANCE.spec)} - {"spec"}
    assert {*changes, *PROVENANCE.shared()} == fields, "a field that no test changes"
    paths = [write(tmp_path / "a"), write(tmp_path / "b", make_scores(seed=1), **changes), write(tmp_path / "c")]
    assert [file.path for file in load_matching(paths)] == paths


@pytest.mark.parametrize("name", PROVENANCE.shared())
def test_a_field_in_which_files_differ_is_named_with_both_values_and_both_files(name: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", **{name: OTHER[name]})]
    with pytest.raises(ValueError, match=f"do not belong together: {name} is ") as raised:
        load_matching(paths)
    for part in (repr(PROVENANCE.shared()[name]), repr(OTHER[name]), str(paths[0]), str(paths[2])):
        assert part in str(raised.value)


def test_files_of_other_shapes_are_refused_with_the_module_both_shapes_and_both_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a"), write(tmp_path / "b", {**make_scores(), layer(1): torch.zeros(7)})]
    with pytest.raises(
        ValueError, match=rf"do not belong together: {layer(1)} has shape \[6\] in .*a but \[7\] in .*b"
    ):
        load_matching(paths)


@pytest.mark.parametrize("swapped", [False, True])
def test_files_of_other_modules_are_refused_whichever_comes_first(swapped: bool, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a"), write(tmp_path / "b", make_scores(3))]
    with pytest.raises(ValueError, match=rf"do not belong together: {layer(2)} has shape") as raised:
        load_matching(paths[::-1] if swapped else paths)
    assert str(paths[0]) in str(raised.value)
    assert str(paths[1]) in str(raised.value)


def test_a_damaged_file_among_others_is_named(path: Path, tmp_path: Path) -> None:
    (tmp_path / "b").write_text("no scores")
    with pytest.raises(ValueError, match="b is not a safetensors file"):
        load_matching([path, tmp_path / "b"])


def test_the_average_weighs_every_file_the_same_whatever_its_number_of_samples(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", {layer(0): torch.tensor([1.0, -2.0])}, num_samples=1000),
        write(tmp_path / "b", {layer(0): torch.tensor([3.0, 0.0])}),
        write(tmp_path / "c", {layer(0): torch.tensor([5.0, 5.0])}),
    ]
    assert average(load_matching(paths))[layer(0)].tolist() == [3.0, 1.0]


def test_the_average_of_one_file_is_that_file(path: Path) -> None:
    averaged = average([ScoreFile.load(path)])
    assert all(torch.equal(averaged[name], score) for name, score in make_scores().items())
