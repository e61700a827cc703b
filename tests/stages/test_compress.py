"""From scores of weights to a sparse checkpoint that stock transformers loads; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from mixtures import save_in_files
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.attribution.scores import INDEX, ScoreFile, WeightScores
from sparc3_lightning.cli import main
from sparc3_lightning.models.architectures import find_layers, weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.export import copied
from sparc3_lightning.models.tensors import TensorFile
from sparc3_lightning.selection.sparsity import SPARSITY, global_masks, global_threshold, prune_mask
from sparc3_lightning.stages.compress import Compression, Ranking, held, zero_

OUT, EXPORT = Path("out"), Path("sparse")


def ranking(*paths: Path) -> dict[str, Tensor]:
    """The absolute value of the mean, all in memory."""
    files = [dict(WeightScores(path)) for path in paths]
    return {name: (sum(file[name] for file in files) / len(files)).abs() for name in files[0]}


@pytest.mark.parametrize("pattern", ["row", "layer", "global", "2:4"])
def test_the_weights_of_the_lowest_scores_are_zero_and_no_other_changes(tiny_checkpoint, make_scores, pattern):
    paths = [make_scores(seed) for seed in range(3)]
    said = Compression(paths, EXPORT, 0.5, pattern).compress(OUT)
    scores = ranking(*paths)
    if pattern == "global":
        expected = dict(global_masks(scores.items(), global_threshold(scores.items(), 0.5)))
    else:
        expected = {name: prune_mask(score, 0.5, pattern) for name, score in scores.items()}
    before = load_model(tiny_checkpoint, torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(EXPORT).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        mask = expected.get(name.removesuffix(".weight"), torch.tensor(False))
        assert torch.equal(after[name], weight.masked_fill(mask, 0)), name
    found = json.loads((OUT / SPARSITY).read_text())
    number = sum(int(mask.sum()) for mask in expected.values())
    assert (found["num_pruned"], found["num_weights"]) == (number, sum(mask.numel() for mask in expected.values()))
    assert found["layers"] == {name: float(mask.double().mean()) for name, mask in expected.items()}
    assert len(found["layers"]) == 14
    assert f"{number:,} of" in said


def test_the_export_has_a_tokenizer_and_sparsity_json_says_where_it_comes_from(tiny_checkpoint, make_scores):
    paths = [make_scores(0), make_scores(1)]
    Compression(paths, EXPORT, 0.3).compress(OUT)
    text = "the dog and the cat"
    assert (
        AutoTokenizer.from_pretrained(EXPORT)(text)["input_ids"]
        == Checkpoint(tiny_checkpoint).tokenizer()(text)["input_ids"]
    )
    found = json.loads((OUT / SPARSITY).read_text())
    assert (found["sparsity"], found["pattern"], found["export"]) == (0.3, "row", "sparse")
    assert [file["path"] for file in found["general"]] == [str(path) for path in paths]
    assert found["general"][0]["spec"]["relevance"] == "signed"
    assert (
        found["checkpoint_fingerprint"] == Checkpoint(tiny_checkpoint).fingerprint != Checkpoint("sparse").fingerprint
    )
    assert "torch" in found["versions"]
    parameters = load_model(tiny_checkpoint, torch.float32).num_parameters()
    assert found["share_of_all_parameters"] == found["num_pruned"] / parameters


def test_the_hash_of_the_masks_tells_masks_apart(make_scores):
    hashes = {}
    for name, seeds, sparsity in (("a", [0], 0.5), ("again", [0], 0.5), ("other", [1], 0.5), ("more", [0], 0.6)):
        Compression([make_scores(seed) for seed in seeds], Path(name), sparsity).compress(Path(f"out-{name}"))
        hashes[name] = json.loads(Path(f"out-{name}", SPARSITY).read_text())["masks"]
    assert hashes["a"] == hashes["again"]
    assert len(set(hashes.values())) == 3


@pytest.mark.parametrize(("sparsity", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_none_and_all_of_the_weights_can_be_pruned_and_the_embeddings_stay(
    tiny_checkpoint, make_scores, sparsity, share
):
    Compression([make_scores(0)], EXPORT, sparsity, "global").compress(OUT)
    model = AutoModelForCausalLM.from_pretrained(EXPORT)
    layers = find_layers(model, ["all"])
    assert {float((layer.weight == 0).float().mean()) for layer in layers.values()} == {share}
    assert model.get_input_embeddings().weight.all()
    assert model.get_output_embeddings().weight.all()


def test_signed_scores_that_cancel_between_seeds_are_low(make_scores):
    first = make_scores(0)
    negated = {name: -score for name, score in WeightScores(first)}
    assert all(not score.any() for _, score in Ranking([WeightScores(first), WeightScores(make_scores(1, **negated))]))


def test_the_dtype_of_the_export_can_be_chosen(make_scores):
    Compression([make_scores(0)], EXPORT, export_dtype="bfloat16").compress(OUT)
    assert AutoModelForCausalLM.from_pretrained(EXPORT, dtype="auto").dtype == torch.bfloat16


# What is refused, before a checkpoint is loaded.


def test_scores_of_neurons_or_of_nothing_are_refused_with_the_way_to_those_of_weights(make_scores):
    index = make_scores(0)
    ScoreFile({"up_proj": torch.ones(3)}, WeightScores(index).provenance).save(Path("scores.safetensors"))
    with pytest.raises(ValueError, match=r"got scores\.safetensors: .*--model\.granularity weight"):
        Compression([Path("scores.safetensors")], EXPORT).compress(OUT)
    with pytest.raises(FileNotFoundError, match=r"--model\.general: nowhere .*'sparc3 attribute' writes it"):
        Compression([Path("nowhere")], EXPORT).compress(OUT)
    with pytest.raises(ValueError, match=r"--model\.general must name at least one"):
        Compression([], EXPORT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"relevance": "magnitude"}, "relevance is 'signed'"), ({"method": "wanda"}, "method is 'lrp'")],
)
def test_scores_that_do_not_belong_together_are_refused(make_scores, changes, message):
    with pytest.raises(ValueError, match=message):
        Compression([make_scores(0), make_scores(1, changes)], EXPORT).compress(OUT)


def test_the_same_samples_are_no_two_seeds(make_scores):
    first = make_scores(0)
    for other in (first, make_scores(1, {"data_fingerprint": "seed 0"})):
        with pytest.raises(ValueError, match=r"\(--model\.general\) are scores of one kind of the same samples"):
            Compression([first, other], EXPORT).compress(OUT)


def test_scores_of_other_layers_are_refused(make_scores):
    first = make_scores(0)
    with pytest.raises(ValueError, match=r"lm_head has shape None .* but \[2, 2\]"):
        Compression([first, make_scores(1, lm_head=torch.ones(2, 2))], EXPORT).compress(OUT)
    with pytest.raises(ValueError, match="lm_head is the head, which is never pruned"):
        Compression([Path("seed-1", INDEX)], EXPORT).compress(OUT)
    wrong = {"model.layers.0.mlp.up_proj": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"up_proj has shape \[2, 2\], but \[24, 16\] in the model"):
        Compression([make_scores(2, **wrong)], EXPORT).compress(OUT)
    assert not EXPORT.exists()


def test_another_checkpoint_than_the_one_attributed_is_refused(make_scores):
    path = make_scores(0, {"checkpoint_fingerprint": "files:other"})
    with pytest.raises(ValueError, match=r"no longer the one that was attributed \(files:other\)"):
        Compression([path], EXPORT).compress(OUT)


def test_nothing_is_overwritten(make_scores):
    path = make_scores(0)
    Compression([path], EXPORT).compress(OUT)
    with pytest.raises(FileExistsError, match=r"--model\.export: sparse exists already"):
        Compression([path], EXPORT)
    with pytest.raises(FileExistsError, match=r"sparsity\.json exists already"):
        Compression([path], Path("other")).compress(OUT)


def test_a_pattern_that_does_not_fit_leaves_nothing(make_scores):
    with pytest.raises(ValueError, match=r"rows of \d\d weights are no multiple of 5"):
        Compression([make_scores(0)], EXPORT, 0.8, "1:5").compress(OUT)
    assert not EXPORT.exists()
    assert not (OUT / SPARSITY).exists()
    assert not list(Path().glob(".sparse*"))


def test_the_verb_writes_to_its_folder_and_its_saved_config_repeats_it(make_scores):
    general = f"[{make_scores(0)}]"
    cpu = ["--trainer.accelerator", "cpu"]
    main(["compress", *cpu, "--model.general", general, "--model.export", "sparse", "--model.pattern", "global"])
    folder = Path("lightning_logs/compress/version_0")
    first = json.loads((folder / SPARSITY).read_text())
    main(["compress", "--config", str(folder / "config.yaml"), "--model.export", "again"])
    second = json.loads(Path("lightning_logs/compress/version_1", SPARSITY).read_text())
    assert {**first, "export": "again"} == {**second, "sha256": first["sha256"]}
    assert Checkpoint("sparse").fingerprint == Checkpoint("again").fingerprint


def test_a_weight_that_is_kept_transposed_as_in_gpt2_is_pruned_by_output_and_input():
    model = torch.nn.ModuleDict({"layer": Conv1D(2, 3)}).requires_grad_(False)
    whole = model["layer"].weight.clone()
    mask = torch.tensor([[True, False, False], [True, True, False]])
    found = zero_(model, iter([("layer", mask)]))
    assert torch.equal(model["layer"].weight, whole.masked_fill(mask.T, 0))
    assert (found.num_pruned, found.num_weights, found.layers) == (3, 6, {"layer": 0.5})


def test_masks_of_the_weights_of_experts_are_written_and_the_experts_of_a_block_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_in_files("mixtral", tmp_path / "original")
    expected = Checkpoint(str(tmp_path / "original")).load(torch.float32)
    layers = find_layers(expected, ["all"])
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(weight_of(layer).shape, generator=generator) < 0.5 for name, layer in layers.items()}
    written: list[str] = []
    write = TensorFile.write
    monkeypatch.setattr(TensorFile, "write", lambda file, name, of: (written.append(name), write(file, name, of)))
    with copied(Checkpoint(str(tmp_path / "original")), tmp_path / "export") as copy:
        zero_(copy.model, held(copy, iter(masks.items())))
    assert len(written) == len(set(written)) == len(masks)
    assert sum(".experts." in name for name in written) == 2 * 4 * 3
    zero_(expected, iter(masks.items()))
    found = load_model(str(tmp_path / "export"), torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
