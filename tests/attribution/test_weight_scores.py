"""Scores of weights: summed as they arrive, written in shards; their sums over rows are the scores of neurons."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import sentence, write_sealed
from safetensors.torch import load_file
from torch import Tensor, nn

from sparc3_lightning.attribution import relevance, scores
from sparc3_lightning.attribution.accumulator import NonfiniteRelevanceError, ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.progress import load_progress
from sparc3_lightning.attribution.scores import INDEX, Provenance, ScoreFile, ShardWriter, WeightScores
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.attribution.tensor_file import digest_of
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.prune import NEURONS, Pruning

SCORES: list[Any] = ["magnitude", "signed", "wanda"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
all_scores = pytest.mark.parametrize("score", SCORES)


def make_samples(num_samples: int = 5) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [Sample(f"s{i}", torch.randint(4, 100, (2 + 2 * i,), generator=draw).tolist()) for i in range(num_samples)]


def oracle(model: Any, samples: list[Sample], score: str) -> dict[str, Tensor]:
    """One sample at a time, with whole gradients of the weights, or all activations for Wanda."""
    modules = find_layers(model, ["all"])
    if score == "wanda":
        tokens: dict[str, list[Tensor]] = {name: [] for name in modules}
        for name, module in modules.items():
            module.register_forward_hook(lambda m, inputs, out, name=name: tokens[name].extend(inputs[0][0]))
        for sample in samples:
            model(torch.tensor([sample.input_ids]), use_cache=False)
        for module in modules.values():
            module._forward_hooks.clear()
        return {name: m.weight.abs() * torch.stack(tokens[name]).norm(dim=0) for name, m in modules.items()}
    total = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    for sample in samples:
        weights = [module.weight.requires_grad_() for module in modules.values()]
        with lrp(model):
            logit = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1].max()
            gradients = torch.autograd.grad(logit, weights)
        for (name, module), gradient in zip(modules.items(), gradients, strict=True):
            product = module.weight.requires_grad_(False) * gradient
            total[name] += product.abs() if score == "magnitude" else product
    return {name: value / len(samples) for name, value in total.items()}


def accumulate(model: Any, samples: list[Sample], score: Any, batch_size: int, **options: Any) -> ScoreAccumulator:
    accumulator = ScoreAccumulator(find_layers(model, ["all"]), score, **options)
    for start in range(0, len(samples), batch_size):
        batch = pad_right(samples[start : start + batch_size], 0)
        with lrp(model), accumulator.recording(batch["attention_mask"], batch["sample_ids"]):
            logit = largest_logit(model, batch["input_ids"], batch["attention_mask"]).sum()
            if score != "wanda":
                logit.backward()
    return accumulator


def assert_agree(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert (got[name].double() - value.double()).norm() < rtol * value.double().norm(), name


@all_scores
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_scores_of_weights_are_those_of_whole_gradients(make_model: Callable[..., Any], score, batch_size):
    model, samples = make_model("llama"), make_samples()
    found = accumulate(model, samples, score, batch_size, granularity="weight").compute()
    assert {name.rpartition(".")[2] for name in found} == set(LINEAR), "every linear layer but the head"
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    assert_agree(found, oracle(model, samples, score))


@all_scores
def test_sums_over_the_weights_of_a_neuron_are_the_scores_of_neurons(make_model, score):
    model, samples = make_model("llama"), make_samples()
    weights = accumulate(model, samples, score, 2, granularity="weight").compute()
    neurons = accumulate(model, samples, score, 2).compute()
    assert_agree({name: value.sum(dim=1) for name, value in weights.items()}, neurons, 1e-5)


@all_scores
def test_tiles_of_any_height_give_the_same(make_model, score, monkeypatch):
    model, samples = make_model("llama"), make_samples(3)
    for granularity in ("neuron", "weight"):
        whole = accumulate(model, samples, score, 3, granularity=granularity).compute()
        monkeypatch.setattr(relevance, "TILE", 5)
        assert_agree(accumulate(model, samples, score, 3, granularity=granularity).compute(), whole)
        monkeypatch.undo()


def play(accumulator: ScoreAccumulator, layer: nn.Linear, G_BO: list[list[float]], **options: Any) -> None:
    """Record samples of one token with the input 1, whose output has the gradient ``G_BO``."""
    inputs = torch.ones(len(G_BO), 1, 2, dtype=torch.float64, requires_grad=True)
    with accumulator.recording(None, [f"row {i}" for i in range(len(G_BO))], **options):
        layer(inputs).backward(torch.tensor(G_BO, dtype=torch.float64).unsqueeze(1))


def toy(score: Any, nonfinite: Any = "error") -> tuple[ScoreAccumulator, nn.Linear]:
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight[:] = torch.tensor([1.0, 2.0])
    return ScoreAccumulator({"layer": layer}, score, nonfinite, "weight"), layer


def test_the_magnitude_of_a_weight_is_taken_per_sample():
    for score, expected in (("magnitude", [[1.0, 2.0], [2.0, 4.0]]), ("signed", [[0.0, 0.0], [2.0, 4.0]])):
        accumulator, layer = toy(score)
        play(accumulator, layer, [[1.0, 3.0], [-1.0, 1.0]])
        assert accumulator.compute()["layer"].tolist() == expected


@pytest.mark.parametrize("score", ["magnitude", "signed"])
def test_a_weight_that_is_not_finite_names_module_and_sample_or_counts_as_zero(score):
    nan = float("nan")
    accumulator, layer = toy(score)
    with pytest.raises(NonfiniteRelevanceError, match=r"layer .*'row 1'"):
        play(accumulator, layer, [[1.0, 1.0], [1.0, nan]])
    accumulator, layer = toy(score, "zero")
    play(accumulator, layer, [[1.0, 1.0], [1.0, nan], [nan, nan]], weights=[1, 1, 0])
    assert accumulator.num_samples == 2
    assert accumulator.num_nonfinite == 2, "of the second neuron in the second sample; the third one is a filler"
    assert accumulator.compute()["layer"].tolist() == [[1.0, 2.0], [0.5, 1.0]]


# Files.


PROVENANCE = Provenance("a", "b", ScoreSpec("lrp", layers=["up_proj"], dtype="float32"), {}, "c", 1, 2, 3, 0)


def matrices() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"layers.{i}.up_proj": torch.rand(6, 4, generator=draw) for i in (0, 2, 10, 11)}


def write(folder: Path, of: dict[str, Tensor]) -> Path:
    writer = ShardWriter(folder, {name: score.shape for name, score in of.items()})
    for name, score in of.items():
        writer.add(name, score)
        assert not (folder / INDEX).exists()
    writer.close(PROVENANCE)
    return folder / INDEX


def test_scores_go_to_shards_and_come_back_one_module_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "SHARD_BYTES", 2 * 6 * 4 * 4)
    index = write(tmp_path, matrices())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "weight_scores-00001-of-00002.safetensors",
        "weight_scores-00002-of-00002.safetensors",
        "weight_scores.safetensors.index.json",
    ]
    assert list(load_file(tmp_path / "weight_scores-00002-of-00002.safetensors")) == [
        "layers.10.up_proj",
        "layers.11.up_proj",
    ]
    read = WeightScores(index)
    assert read.provenance == PROVENANCE
    assert_agree(dict(read), matrices())
    neurons = ScoreFile.load(index)
    assert_agree(neurons.scores, {name: score.sum(dim=1) for name, score in matrices().items()})
    assert neurons.provenance == PROVENANCE


def test_a_matrix_larger_than_a_shard_has_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "SHARD_BYTES", 10)
    assert_agree(dict(WeightScores(write(tmp_path, matrices()))), matrices())
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_damaged_files_are_refused_by_name(tmp_path):
    index = write(tmp_path, matrices())
    content = json.loads(index.read_text())
    shard = tmp_path / "weight_scores-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=f"{shard.name}.* is missing or damaged"):
        ScoreFile.load(index)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}.* is missing or damaged"):
        dict(WeightScores(index))
    for changes in (
        {"format": "other"},
        {"provenance": {}},
        {"weight_map": []},
        {"weight_map": {}, "checksums": {}},
        {"weight_map": dict.fromkeys(content["weight_map"], "../scores.safetensors")},
        {"weight_map": dict.fromkeys(content["weight_map"], 3)},
        {"weight_map": dict.fromkeys(content["weight_map"], "two\nlines.safetensors")},
        {name: {"two\nlines": next(iter(content[name].values()))} for name in ("weight_map", "checksums")},
        {"checksums": {}},
    ):
        write_sealed(index, {**content, **changes})
        with pytest.raises(ValueError, match="is not an index of scores, or is damaged"):
            WeightScores(index)
    older = {"metadata": {"format": "sparc3_lightning scores of weights 2"}, "weight_map": content["weight_map"]}
    for text in ("{", "[]", "{}", json.dumps(older), json.dumps({**content, "weight_map": {}})):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"not an index of scores, or is damaged.*Attribute again"):
            WeightScores(index)


@pytest.mark.parametrize("shared", [False, True], ids=["each shard alone", "all in one"])
def test_a_flipped_bit_of_a_weight_s_score_is_refused_with_the_shard(tmp_path, monkeypatch, shared):
    if not shared:
        monkeypatch.setattr(scores, "SHARD_BYTES", 10)
    index = write(tmp_path, matrices())
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    for read in (lambda: dict(WeightScores(index)), lambda: ScoreFile.load(index)):
        with pytest.raises(ValueError, match=f"{shard.name} cannot be used: of layers.* its checksum does not match"):
            read()


def test_shards_of_another_attribution_are_refused(tmp_path):
    index = write(tmp_path / "a", matrices())
    write(tmp_path / "b", {name: 2 * score for name, score in matrices().items()})
    (shard,) = (tmp_path / "b").glob("*.safetensors")
    shard.replace(tmp_path / "a" / shard.name)
    with pytest.raises(ValueError, match="its checksum does not match"):
        dict(WeightScores(index))


def test_the_scores_of_a_module_are_hashed_when_they_are_first_read_alone(tmp_path, monkeypatch):
    read = WeightScores(write(tmp_path, matrices()))
    hashed = []
    monkeypatch.setattr(scores, "digest_of", lambda tensors: hashed.extend(tensors) or digest_of(tensors))
    names = [name for name, _ in read]
    assert [name for name, _ in read] == names == hashed


def test_a_value_that_is_not_finite_in_a_file_is_refused(tmp_path):
    of = matrices()
    of["layers.2.up_proj"][1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.2\.up_proj .*NaN or infinity"):
        dict(WeightScores(write(tmp_path, of)))


# The predict loop.


@pytest.fixture
def prompts(tmp_path) -> str:
    rows = [{"text": sentence(i, 3 + i), "toxicity": 0.95} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def attribute(checkpoint: str, prompts: str, folder: str, num_samples: int = 8, **options: Any) -> Attribution:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet)
    module = Attribution(checkpoint, **{"granularity": "weight", "layers": ["all"], **options})
    trainer.predict(
        module, datamodule=ToxicPrompts(prompts, num_samples=num_samples, batch_size=3), return_predictions=False
    )
    return module


def test_attribute_writes_scores_of_every_linear_layer(tiny_checkpoint, prompts, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    module = attribute(tiny_checkpoint, prompts, "out")
    assert module.summary() == "Scores of 14 layers: out/weight_scores.safetensors.index.json"
    assert not list(Path("out").glob("state-*"))
    samples = module.reference_samples.samples
    expected = oracle(load_model(tiny_checkpoint, torch.float32), samples, "magnitude")
    assert_agree(dict(WeightScores(Path("out") / INDEX)), dict(sorted(expected.items())), 1e-5)
    with pytest.raises(FileExistsError, match="weight_scores"):
        attribute(tiny_checkpoint, prompts, "out")


def test_prune_takes_scores_of_weights_for_those_of_their_neurons(tiny_checkpoint, prompts, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    chosen = {}
    for granularity in ("weight", "neuron"):
        first, second = (
            attribute(
                tiny_checkpoint,
                prompts,
                f"{granularity}-{n}",
                granularity=granularity,
                num_samples=n,
                layers=["up_proj"],
            ).output
            for n in (8, 5)
        )
        Pruning([first], second, num_neurons=5).prune(Path(granularity))
        chosen[granularity] = [(n.module, n.index) for n in NeuronList.load(Path(granularity, NEURONS)).neurons]
    assert chosen["weight"] == chosen["neuron"]


def test_a_disk_without_room_is_refused_before_the_loop(tiny_checkpoint, prompts, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"needs 0\.0 GB.* free"):
        attribute(tiny_checkpoint, prompts, "out")


def test_sums_of_weights_of_one_process_are_saved_on_the_way(tiny_checkpoint, prompts):
    attribute(tiny_checkpoint, prompts, "whole")

    class Broken(Attribution):
        def on_predict_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            super().on_predict_batch_end(outputs, batch, batch_idx, dataloader_idx)
            if batch_idx == 1:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Attribution", Broken)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            attribute(tiny_checkpoint, prompts, "broken", save_every=2)
    assert len(load_progress(Path("broken")).sample_ids) == 6
    attribute(tiny_checkpoint, prompts, "broken", save_every=2)
    assert_agree(dict(WeightScores(Path("broken") / INDEX)), dict(WeightScores(Path("whole") / INDEX)))
