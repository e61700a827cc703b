"""A sparsity.json becomes the sparse checkpoint of the compression again, with a model card; and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from sparc3_lightning.attribution.scores import INDEX, Provenance, WeightScores
from sparc3_lightning.cli import main
from sparc3_lightning.files import sealed
from sparc3_lightning.models.tensors import TensorFile
from sparc3_lightning.selection.sparsity import SPARSITY, SparsityResults
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.export import Export

OUT, EXPORT, AGAIN = Path("out"), Path("sparse"), Path("again")
MakeScores = Callable[..., Path]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("pattern", "sparsity", "num_seeds", "dtype"),
    [
        ("row", 0.5, 1, "auto"),
        ("row", 1 / 3, 2, "auto"),
        ("layer", 0.7, 1, "bfloat16"),
        ("global", 0.3, 3, "auto"),
        ("global", 0.0, 1, "auto"),
        ("2:4", 0.5, 2, "float32"),
    ],
)
@pytest.mark.few(2)
def test_the_export_is_the_checkpoint_of_the_compression_byte_for_byte_after_that_is_gone(
    make_scores: MakeScores, pattern: str, sparsity: float, num_seeds: int, dtype: Any
) -> None:
    paths = [make_scores(seed) for seed in range(num_seeds)]
    Compression(paths, EXPORT, sparsity, pattern, dtype).compress(OUT)
    made = SparsityResults.load(OUT / SPARSITY)
    assert made.export_dtype == dtype
    before = {path.name: path.read_bytes() for path in EXPORT.iterdir()}
    shutil.rmtree(EXPORT)
    shutil.move(OUT / SPARSITY, "mine.json")
    shutil.rmtree(OUT)
    said = Export(Path("mine.json"), AGAIN).write(Path("exported"))
    after = {path.name: path.read_bytes() for path in AGAIN.iterdir()}
    assert f"{made.num_pruned:,} of {made.num_weights:,} weights zero, as mine.json says: again" in said
    del after["README.md"]
    assert after == before
    assert SparsityResults.load(Path("exported", SPARSITY)) == replace(made, export="again")


def test_the_sparsity_json_of_an_export_makes_it_again_too_from_a_copy_of_the_checkpoint(
    tiny_checkpoint: str, make_scores: MakeScores
) -> None:
    Compression([make_scores(0)], EXPORT).compress(OUT)
    shutil.copytree(tiny_checkpoint, "copy")
    Export(OUT / SPARSITY, AGAIN, checkpoint="./copy").write(Path("exported"))
    assert SparsityResults.load(Path("exported", SPARSITY)).checkpoint == "./copy"
    Export(Path("exported", SPARSITY), Path("third")).write(Path("exported-3"))
    assert weights(EXPORT) == weights(AGAIN) == weights(Path("third"))


def test_another_dtype_can_be_chosen(make_scores: MakeScores) -> None:
    Compression([make_scores(0)], EXPORT).compress(OUT)
    Export(OUT / SPARSITY, AGAIN, export_dtype="bfloat16").write(Path("exported"))
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (EXPORT, AGAIN))
    assert all(torch.equal(after[name], weight.bfloat16()) for name, weight in before.items())
    assert SparsityResults.load(Path("exported", SPARSITY)).export_dtype == "bfloat16"


def test_scores_that_were_written_once_more_with_the_same_values_are_the_same(make_scores: MakeScores) -> None:
    path = make_scores(0)
    Compression([path], EXPORT).compress(OUT)
    before = path.read_bytes()
    make_scores(0, {"versions": {"torch": "99"}, "git_hash": "other"})
    assert path.read_bytes() != before
    Export(OUT / SPARSITY, AGAIN).write(Path("exported"))
    assert weights(EXPORT) == weights(AGAIN)


@pytest.mark.usefixtures("as_if_from_python")
def test_the_command_line_exports_a_compression(make_scores: MakeScores) -> None:
    Compression([make_scores(0)], EXPORT).compress(OUT)
    options = ["--model.neurons", str(OUT / SPARSITY), "--model.export", str(AGAIN)]
    folder = Path(main(["export", "--trainer.accelerator", "cpu", *options]).trainer.log_dir)
    assert {path.name for path in folder.iterdir()} == {SPARSITY, "config.yaml"}
    assert weights(EXPORT) == weights(AGAIN)
    assert AutoModelForCausalLM.from_pretrained(AGAIN)


def test_the_model_card_says_what_is_zero_by_which_scores_and_how_to_repeat_it(
    tiny_checkpoint: str, make_scores: MakeScores
) -> None:
    shutil.copytree(tiny_checkpoint, "licensed")
    Path("licensed/README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    Compression([make_scores(0), make_scores(1)], EXPORT, 0.25, "global").compress(OUT)
    Export(OUT / SPARSITY, AGAIN, checkpoint="licensed").write(Path("exported"))
    card, made = ModelCard.load(AGAIN / "README.md"), SparsityResults.load(OUT / SPARSITY)
    assert (card.data.base_model, card.data.license, card.data.eval_results) == ("licensed", "apache-2.0", None)
    assert f"# licensed with {100 * made.share_of_all_parameters:.1f} % of its parameters set to zero\n" in card.text
    assert f"{made.num_pruned:,} of {made.num_weights:,} weights of 14 linear layers" in card.text
    assert f"The masks have the hash {made.masks}." in card.text
    share = made.layers["model.layers.1.mlp.up_proj"]
    assert f"\n- model.layers.1.mlp.up\\_proj: {100 * share:.1f} %\n" in card.text
    command = "sparc3 compress --model.general '<scores>' --model.sparsity 0.25 --model.pattern global --model.export"
    assert f"    {command} again\n" in card.text
    assert "method lrp" in card.text
    assert "\n\n\n" not in card.text
    assert "seed-0" not in card.text


def test_a_card_tells_no_path_of_this_machine(tiny_checkpoint: str, make_scores: MakeScores) -> None:
    Compression([make_scores(0).absolute()], EXPORT).compress(OUT)
    Export(OUT / SPARSITY, AGAIN, checkpoint=str(Path(tiny_checkpoint).absolute())).write(Path("exported"))
    text = (AGAIN / "README.md").read_text()
    assert str(Path.cwd()) not in text
    assert str(Path(tiny_checkpoint).parent) not in text


# What is refused, before a weight is read.


@pytest.fixture
def compressed(make_scores: MakeScores) -> Path:
    """The sparsity.json of a compression by two seeds."""
    Compression([make_scores(0), make_scores(1)], EXPORT).compress(OUT)
    return OUT / SPARSITY


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read", "write"):
        monkeypatch.setattr(TensorFile, name, lambda *_: pytest.fail("a weight was read or written"))


def refused(message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error, match=message):
        Export(OUT / SPARSITY, AGAIN, **options).write(Path("exported"))
    assert not AGAIN.exists()
    assert not Path("exported", SPARSITY).exists()
    assert not list(Path().glob(".again*"))


@pytest.mark.usefixtures("compressed", "no_weight_is_read")
def test_scores_that_are_gone_or_others_are_refused(make_scores: MakeScores) -> None:
    index = Path("seed-1", INDEX)
    begins = rf"^--model\.neurons: {OUT / SPARSITY} was made by the scores {index}, which"
    shutil.move("seed-1", "elsewhere")
    refused(rf"{begins} do not exist: put them back, or run 'sparc3 compress' again\.$")
    make_scores(2)
    shutil.move("seed-2", "seed-1")
    refused(rf"{begins} have changed: put them back")
    shutil.rmtree("seed-1")
    more = {"model.layers.0.mlp.up_proj": torch.zeros(24, 16)}
    make_scores(1, **more)
    refused(rf"{begins} have changed: put them back")
    index.write_text("{}")
    refused(rf"^{index} is not an index of scores, or is damaged")
    shutil.rmtree("seed-1")
    shutil.move("elsewhere", "seed-1")
    for shard in Path("seed-1").glob("*.safetensors"):
        shard.unlink()
    refused(rf"which {INDEX} names, is missing or damaged")


@pytest.mark.usefixtures("compressed")
def test_a_shard_of_scores_that_was_changed_leaves_nothing(make_scores: MakeScores) -> None:
    kept = Path("seed-1", INDEX).read_bytes()
    make_scores(1, **{"model.layers.1.mlp.up_proj": torch.zeros(24, 16)})
    Path("seed-1", INDEX).write_bytes(kept)
    refused(r"cannot be used: of model\.layers\.1\.mlp\.up_proj its checksum does not match")


def test_masks_of_another_hash_leave_nothing_and_are_said(compressed: Path) -> None:
    made = SparsityResults.load(compressed)
    replace(made, masks="0123456789abcdef").save(compressed)
    refused(
        rf"^--model\.neurons: the masks made of {compressed} have the hash {made.masks}, not 0123456789abcdef, so "
        r"nothing was written: .* or run 'sparc3 compress' again\.$"
    )
    replace(made, sparsity=0.4).save(compressed)
    refused(r"the masks made of .* so nothing was written")


@pytest.mark.usefixtures("compressed", "no_weight_is_read")
def test_another_checkpoint_is_refused(make_checkpoint: Callable[[str], str]) -> None:
    refused(
        rf"^{OUT / SPARSITY} is for the checkpoint .*, but --model\.checkpoint is '.*' \(",
        checkpoint=make_checkpoint("qwen2"),
    )
    refused(r"missing", OSError, checkpoint="./missing")


@pytest.mark.slow
def test_an_original_that_has_changed_or_is_gone_is_refused(tiny_checkpoint: str, make_scores: MakeScores) -> None:
    shutil.copytree(tiny_checkpoint, "mine")
    Compression([make_scores(0, {"checkpoint": "mine"})], EXPORT).compress(OUT)
    path = Path("mine/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    refused(rf"^{OUT / SPARSITY} is for the checkpoint 'mine' \(.*\), but --model\.checkpoint is 'mine' \(")
    shutil.rmtree("mine")
    refused("mine", OSError)


@pytest.mark.usefixtures("compressed", "no_weight_is_read")
def test_results_are_for_lists_of_neurons() -> None:
    refused(
        rf"^--model\.results is for a list of neurons, and {OUT / SPARSITY} is of a compression: leave it out\.$",
        results=Path("results.json"),
    )


@pytest.mark.usefixtures("compressed", "no_weight_is_read")
def test_nothing_is_overwritten() -> None:
    with pytest.raises(FileExistsError, match=r"--model\.export: sparse exists already"):
        Export(OUT / SPARSITY, EXPORT)
    with pytest.raises(FileExistsError, match=r"sparsity\.json exists already"):
        Export(OUT / SPARSITY, AGAIN).write(OUT)
    assert not AGAIN.exists()


def changed_row(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first, *others = content["general"]
    row = {name: value for name, value in {**first, **changes}.items() if value is not None}
    return {**content, "general": [row, *others]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: {**content, "sparsity": 1.5}, "sparsity must be at least 0 and at most 1"),
        (lambda content: {**content, "sparsity": None}, "sparsity must be in"),
        (lambda content: {**content, "pattern": "column"}, "pattern must be one of"),
        (lambda content: {**content, "pattern": "1:4"}, "1:4 keeps 1 of 4 weights"),
        (lambda content: {**content, "general": []}, "it names no scores"),
        (lambda content: changed_row(content, digest=None), r"general\.0 has no digest"),
        (lambda content: changed_row(content, path=3), r"general\.0\.path cannot be 3"),
        (lambda content: {**content, "export_dtype": "int3"}, "export_dtype cannot be 'int3'"),
    ],
)
@pytest.mark.few(3)
def test_a_file_with_a_checksum_whose_values_are_wrong_is_refused(
    compressed: Path, change: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    content = json.loads(compressed.read_text())
    compressed.write_text(json.dumps(sealed(change(content))))
    refused(rf"^--model\.neurons: {compressed} is not a sparsity\.json of format .*{reason}.*\. Run 'sparc3 compress'")


def test_a_file_of_an_older_version_one_that_was_changed_and_half_of_one_are_refused(compressed: Path) -> None:
    text = compressed.read_text()
    old = {name: value for name, value in json.loads(text).items() if name not in ("format", "sha256")}
    compressed.write_text(json.dumps(old))
    refused(r"is not a sparsity\.json of format .*: its format is None\. Run 'sparc3 compress' again\.$")
    compressed.write_text(text.replace('"sparsity": 0.5', '"sparsity": 0.6'))
    refused(r"its checksum does not match: it was changed .*\. Run 'sparc3 compress' again\.$")
    compressed.write_text(text[: len(text) // 2])
    refused(rf"^{compressed} is not a ")


def test_what_scores_say_of_themselves_is_kept(compressed: Path) -> None:
    found = SparsityResults.load(compressed).general
    scores = WeightScores(Path("seed-1", INDEX))
    assert found[1]["digest"] == scores.digest != found[0]["digest"]
    assert scores.provenance.summary().keys() < found[1].keys()
    assert Provenance.from_json(json.dumps({**found[1], "sample_ids": []})) == scores.provenance
