"""Circuits from score files: accuracy by pruning for good and one sentence at a time; what is written, and refused."""

import csv
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed, make_config, provenance, trainer, words_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.scores import INDEX, ScoreFile, ShardWriter
from sparc3_lightning.attribution.targets import logit_difference
from sparc3_lightning.cli import main
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.ioi import IOI
from sparc3_lightning.models import batching
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import mask, prune_
from sparc3_lightning.report.circuits import CircuitResults, Step
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.selection.orders import ComponentOrder, group_scores
from sparc3_lightning.stages import circuit
from sparc3_lightning.stages.attribute import SCORES, Attribution
from sparc3_lightning.stages.circuit import CIRCUIT, RANDOM, Circuit, curve_of

UP_PROJ = {f"model.layers.{i}.mlp.up_proj": (24,) for i in range(2)}
O_PROJ = {f"model.layers.{i}.self_attn.o_proj": (4,) for i in range(2)}
WEIGHTS = dict.fromkeys(UP_PROJ, (24, 16))
SPARSITIES = [0.25, 0.5, 1.0]
NUM_SAMPLES = 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model, with the words of the sentences."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint") / "tiny-llama", words_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config("llama", vocab_size=len(tokenizer)))
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def normal(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def save(checkpoint):
    """Return a function that writes a score file of the checkpoint."""

    def write(name: str, shapes: dict[str, tuple[int, ...]], draw: int, **changes: Any) -> Path:
        kind = "weight" if shapes is WEIGHTS else "head" if shapes is O_PROJ else "neuron"
        of = dataclasses.replace(
            provenance(checkpoint, Checkpoint(checkpoint).fingerprint), sample_ids=[], data_fingerprint=name
        )
        of = changed(of, granularity=kind, **changes)
        if kind != "weight":
            ScoreFile(normal(shapes, draw), of).save(Path(name) / "scores.safetensors")
            return Path(name) / "scores.safetensors"
        Path(name).mkdir()
        writer = ShardWriter(Path(name), shapes)
        for module, score in normal(shapes, draw).items():
            writer.add(module, score)
        writer.close(of)
        return Path(name) / INDEX

    return write


def find(checkpoint: str, scores: list[Path], data: Any = None, **options: Any) -> dict[str, Any]:
    data = data or IOI(num_samples=NUM_SAMPLES, seed=5, batch_size=4)
    module = Circuit(checkpoint, scores, **{"sparsities": SPARSITIES, "num_random": 0, **options})
    trainer().predict(module, datamodule=data, return_predictions=False)
    return json.loads((Path("out") / CIRCUIT).read_text())


def differences(model: Any, samples: list[Any]) -> list[float]:
    """One sentence at a time, all logits."""
    found = []
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1]
        found.append((logits[sample.contrast[0]] - logits[sample.contrast[1]]).item())
    return found


def sentences(seed: int = 5, number: int = NUM_SAMPLES) -> list[Any]:
    return IOI(num_samples=number, seed=seed).read_samples(words_tokenizer())


def accuracy(values: list[float]) -> float:
    return sum(value > 0 for value in values) / len(values)


def without_by_hand(checkpoint: str, scores: dict[str, Tensor], number: int) -> Any:
    """The model after its least relevant components, sorted by hand, are zero for good."""
    model = load_model(checkpoint, torch.float32)
    if next(iter(scores.values())).dim() == 1:
        granularity = "head" if next(iter(scores)).endswith("o_proj") else "neuron"
        prune_(model, ComponentOrder(scores, granularity).components[:number])
        return model
    rows = [(abs(R_OI[o, i].item()), name, o, i) for name, R_OI in scores.items() for o in range(24) for i in range(16)]
    for _, name, o, i in sorted(rows)[:number]:
        model.get_submodule(name).weight.data[o, i] = 0
    return model


@pytest.mark.parametrize("shapes", [UP_PROJ, O_PROJ, WEIGHTS], ids=["neuron", "head", "weight"])
@pytest.mark.few(1)
def test_the_accuracy_is_that_of_the_model_pruned_for_good_one_sentence_at_a_time(checkpoint, save, shapes):
    results = find(checkpoint, [save(f"seed-{i}", shapes, i) for i in range(2)])
    samples = sentences()
    whole = differences(load_model(checkpoint, torch.float32), samples)
    assert results["whole_model"]["accuracy"] == accuracy(whole)
    assert results["whole_model"]["logit_difference"] == pytest.approx(statistics.fmean(whole), abs=1e-5)
    (curve,) = results["curves"]
    assert (curve["method"], curve["num_seeds"]) == ("lrp", 2)
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert curve["num_components"] == size
    assert [step["sparsity"] for step in curve["steps"]] == SPARSITIES
    for step in curve["steps"]:
        number = round(step["sparsity"] * size)
        assert step["num_removed"] == [number, number]
        each = [differences(without_by_hand(checkpoint, normal(shapes, i), number), samples) for i in range(2)]
        assert step["accuracy"] == [accuracy(values) for values in each]
        assert step["accuracy_mean"] == pytest.approx(statistics.fmean(step["accuracy"]))
        assert step["accuracy_sd"] == pytest.approx(statistics.stdev(step["accuracy"]))
        means = [statistics.fmean(values) for values in each]
        assert step["logit_difference"] == pytest.approx(means, abs=1e-4)
        assert step["logit_difference_sd"] == pytest.approx(statistics.stdev(means), abs=1e-4)


@pytest.mark.parametrize(("shapes", "kind"), [(UP_PROJ, "neuron"), (O_PROJ, "head")])
def test_the_circuit_is_the_sparsest_by_the_mean_scores_that_keeps_the_threshold(checkpoint, save, shapes, kind):
    results = find(checkpoint, [save(f"seed-{i}", shapes, i) for i in range(3)], threshold=0.5)
    mean = {name: sum(normal(shapes, i)[name] for i in range(3)) / 3 for name in shapes}
    size, samples = sum(n for (n,) in shapes.values()), sentences()
    found = {s: accuracy(differences(without_by_hand(checkpoint, mean, round(s * size)), samples)) for s in SPARSITIES}
    sparsest = max(s for s in SPARSITIES if found[s] >= 0.5 * results["whole_model"]["accuracy"])
    circuit = results["curves"][0]["circuit"]
    assert (circuit["sparsity"], circuit["accuracy"]) == (sparsest, found[sparsest])
    assert (circuit["num_removed"], circuit["num_kept"]) == (round(sparsest * size), size - round(sparsest * size))
    assert circuit["file"] == f"circuit-{kind}-lrp.json"
    # 'sparc3 evaluate' loads the list, and masks what it names.
    removed = NeuronList.load(Path("out") / circuit["file"])
    assert removed.provenance["checkpoint_fingerprint"] == Checkpoint(checkpoint).fingerprint
    model = load_model(checkpoint, torch.float32)
    with mask(model, removed.neurons):
        assert accuracy(differences(model, samples)) == circuit["accuracy"]


def test_no_circuit_is_written_where_none_keeps_the_threshold(checkpoint, save, monkeypatch):
    path = save("seed", UP_PROJ, 0)
    right = iter((100, 89, 50, 20))  # sentences of 100, by the whole model and at each sparsity
    monkeypatch.setattr(circuit, "logit_difference", lambda *_: torch.where(torch.arange(100) < next(right), 1.0, -1.0))
    results = find(checkpoint, [path], IOI(num_samples=100, seed=5, batch_size=100), threshold=0.9)
    assert results["whole_model"]["accuracy"] == 1
    assert [step["accuracy_mean"] for step in results["curves"][0]["steps"]] == [0.89, 0.5, 0.2]
    assert results["curves"][0]["circuit"] is None
    assert not list(Path("out").glob("circuit-*.json"))


def test_sentences_that_were_used_to_attribute_are_left_out(checkpoint, save):
    samples = sentences()
    used = [sample.id for sample in samples[:4]]
    results = find(checkpoint, [save("seed", UP_PROJ, 0, sample_ids=[*used, "document-1"])])
    assert (results["num_samples"], results["num_left_out"]) == (NUM_SAMPLES - 4, 4)
    model = load_model(checkpoint, torch.float32)
    assert results["whole_model"]["accuracy"] == accuracy(differences(model, samples[4:]))


def test_all_sentences_used_to_attribute_are_too_many(checkpoint, save):
    path = save("seed", UP_PROJ, 0, sample_ids=[sample.id for sample in sentences()])
    with pytest.raises(ValueError, match=r"Every sample was used .* --data\.init_args\.seed"):
        find(checkpoint, [path])


def test_methods_and_granularities_have_curves_of_their_own_beside_random_ones(checkpoint, save):
    paths = [
        save("lrp-0", UP_PROJ, 0),
        save("wanda", UP_PROJ, 1, method="wanda", rule=None, relevance=None, target=None),
        save("lrp-1", UP_PROJ, 2),
        save("signed", UP_PROJ, 3, relevance="signed"),
        save("heads", O_PROJ, 4, layers=["o_proj"]),
        save("weights", WEIGHTS, 5),
    ]
    results = find(checkpoint, paths, num_random=2)
    found = [(curve["granularity"], curve["method"], curve["num_seeds"]) for curve in results["curves"]]
    assert found == [
        ("neuron", "lrp magnitude", 2),
        ("neuron", "wanda", 1),
        ("neuron", "lrp signed", 1),
        ("head", "lrp", 1),
        ("weight", "lrp", 1),
        ("neuron", RANDOM, 2),
        ("head", RANDOM, 2),
        ("weight", RANDOM, 2),
    ]
    assert all(step["accuracy_sd"] is None for step in results["curves"][1]["steps"])
    assert results["curves"][4]["circuit"] is None or results["curves"][4]["circuit"]["file"] is None
    rows = list(csv.DictReader((Path("out") / "circuit.csv").open()))
    assert len(rows) == len(found) * len(SPARSITIES)
    assert rows[0]["method"] == "lrp magnitude"
    assert float(rows[0]["accuracy_sd"]) == pytest.approx(results["curves"][0]["steps"][0]["accuracy_sd"])
    assert rows[3]["accuracy_sd"] == ""
    assert (Path("out") / "circuit.png").read_bytes()[:4] == b"\x89PNG"


def test_a_circuit_that_is_the_whole_model_has_no_list(checkpoint, save):
    results = find(checkpoint, [save("seed", O_PROJ, 0)], sparsities=[0.01])
    assert results["curves"][0]["circuit"]["num_removed"] == 0
    assert results["curves"][0]["circuit"]["file"] is None


def test_a_name_with_slashes_is_a_name_of_a_file(checkpoint, save):
    lexicons = [save(f"seed-{i}", UP_PROJ, i, target="lexicon", lexicon=f"folder/{i}") for i in range(2)]
    results = find(checkpoint, lexicons, threshold=0.01)
    for i, curve in enumerate(results["curves"]):
        assert curve["method"] == f"lrp folder/{i}"
        assert curve["circuit"]["file"] == f"circuit-neuron-lrp-folder-{i}.json"
        assert (Path("out") / curve["circuit"]["file"]).is_file()


def test_attribution_explains_the_difference_of_two_logits(checkpoint):
    samples, module = sentences(number=5), Attribution(checkpoint, relevance="signed", target="logit_difference")
    data = IOI(num_samples=5, seed=5, batch_size=2)
    trainer().predict(module, datamodule=data, return_predictions=False)
    found = ScoreFile.load(Path("out") / SCORES)
    assert (found.provenance.spec.target, found.provenance.spec.granularity) == ("logit_difference", "neuron")
    sums = {name: torch.zeros(24) for name in UP_PROJ}
    for sample in samples:
        model = load_model(checkpoint, torch.float32)
        for name in UP_PROJ:
            model.get_submodule(name).weight.requires_grad_()
        with lrp(model):
            logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, -1]
            (logits[sample.contrast[0]] - logits[sample.contrast[1]]).backward()
        for name in UP_PROJ:
            weight = model.get_submodule(name).weight
            sums[name] += (weight * weight.grad).detach().sum(dim=1)
    for name, total in sums.items():
        torch.testing.assert_close(found.scores[name], total / 5, rtol=1e-3, atol=1e-5)


# From the command line, of scores that attribute wrote.


def test_the_commands_from_sentences_to_a_circuit_that_can_be_loaded(checkpoint, caplog):
    common = ["--model.checkpoint", checkpoint, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar=false"]
    ioi = ["--data", "sparc3_lightning.data.IOI", "--data.init_args.num_samples", "6"]
    heads = ["--model.granularity", "head"]
    target = ["--model.target", "logit_difference"]
    main(["attribute", *common, *ioi, *target])
    main(["attribute", *common, *ioi, *target, *heads])
    paths = sorted(map(str, Path("lightning_logs/attribute").glob("*/scores.safetensors")))
    assert len(paths) == 2
    options = ["--model.scores", f"[{','.join(paths)}]", "--model.threshold", "0.1", "--model.num_random", "1"]
    main(["circuit", *common, *ioi, "--data.init_args.seed", "7", "--model.sparsities", "[0.1, 0.5]", *options])
    folder = Path("lightning_logs/circuit/version_0")
    results = json.loads((folder / CIRCUIT).read_text())
    assert len(CircuitResults.load(folder / CIRCUIT).curves) == 4
    assert [curve["num_seeds"] for curve in results["curves"]] == [1, 1, 1, 1]
    assert {ScoreFile.load(Path(path)).provenance.spec.target for path in paths} == {"logit_difference"}
    for curve in results["curves"][:2]:
        assert NeuronList.load(folder / curve["circuit"]["file"]).neurons
    assert "The whole model is right on" in caplog.text
    with pytest.raises(FileExistsError, match=r"circuit\.json exists already"):
        main(["circuit", *common, *ioi, *options, "--trainer.logger.init_args.version", "version_0"])


# What is refused.


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scores": []}, r"--model\.scores must name at least one"),
        ({"sparsities": []}, r"--model\.sparsities must be above 0"),
        ({"sparsities": [0.5, 1.5]}, r"--model\.sparsities must be above 0 and at most 1, got \[0\.5, 1\.5\]"),
        ({"sparsities": [0.0]}, r"--model\.sparsities"),
        ({"threshold": 0.0}, r"--model\.threshold must be above 0 and at most 1, got 0\.0"),
        ({"num_random": -1}, r"--model\.num_random must be at least 0, got -1"),
    ],
)
def test_options_out_of_bounds_are_refused_at_once(checkpoint, save, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Circuit(checkpoint, **{"scores": [save("seed", UP_PROJ, 0)], **options})


def test_the_same_samples_twice_are_no_two_seeds(save):
    paths = [save("a", UP_PROJ, 0), save("b", UP_PROJ, 1, data_fingerprint="a")]
    with pytest.raises(ValueError, match=r"--model\.scores: b.* and a.* are not two seeds"):
        group_scores(paths)
    again = save("c", UP_PROJ, 0, data_fingerprint="a", seed=1)  # the seed of the run chooses no samples
    with pytest.raises(ValueError, match=r"--model\.scores: c.* and a.* are not two seeds"):
        group_scores([paths[0], again])
    orders = [save(f"random-{i}", UP_PROJ, i, data_fingerprint="none", method="random", seed=i) for i in range(2)]
    assert len(group_scores(orders)) == 1


def test_a_seed_whose_logits_are_not_finite_gives_a_deviation_that_is_not_known():
    of_seeds = [[Step(0.5, 1, a, d)] for a, d in NOT_FINITE]
    (step,) = curve_of("lrp", "neuron", 2, of_seeds).steps
    assert step.accuracy_sd == pytest.approx(statistics.stdev([0.5, 0.0]))
    assert math.isnan(step.logit_difference_sd)


NOT_FINITE = [(0.5, 1.0), (0.0, math.nan)]


def test_an_automatic_batch_size_is_recorded_as_the_smallest_of_all_ranks(checkpoint, save, monkeypatch):
    monkeypatch.setattr(batching, "gather", lambda rows: [*rows, 3])
    data = IOI(num_samples=NUM_SAMPLES, seed=5, batch_size="auto")
    assert find(checkpoint, [save("a", UP_PROJ, 0)], data)["data"]["auto_batch_size"] == 3


def test_scores_of_another_checkpoint_or_of_components_it_has_not_are_refused(checkpoint, save):
    with pytest.raises(ValueError, match=r"is for the checkpoint .* but --model\.checkpoint is"):
        find(checkpoint, [save("other", UP_PROJ, 0, checkpoint_fingerprint="files:other")])
    with pytest.raises(ValueError, match="The rows of down_proj are no neurons"):
        find(checkpoint, [save("down", {"model.layers.0.mlp.down_proj": (16,)}, 0)])
    with pytest.raises(ValueError, match=r"Neuron 98 of model.layers.0.mlp.up_proj does not exist"):
        find(checkpoint, [save("long", {"model.layers.0.mlp.up_proj": (99,)}, 0)])
    with pytest.raises(ValueError, match=r"The rows of o_proj are no neurons"):
        find(checkpoint, [save("rows", {"model.layers.0.self_attn.o_proj": (16,)}, 0)])


def test_data_without_two_tokens_to_compare_are_refused(checkpoint, save, tmp_path):
    (tmp_path / "documents.txt").write_text("the book at the station\n")
    data = C4(str(tmp_path / "documents.txt"), num_samples=1, seq_len=3)
    with pytest.raises(ValueError, match="C4 does not give a right and a wrong next token"):
        find(checkpoint, [save("seed", UP_PROJ, 0)], data)


def test_a_folder_that_holds_a_circuit_is_left_alone(checkpoint, save):
    path = save("seed", UP_PROJ, 0)
    find(checkpoint, [path])
    with pytest.raises(FileExistsError, match=r"circuit\.json exists already"):
        find(checkpoint, [path])


def test_a_circuit_stops_at_a_signal_without_a_result_and_is_not_put_into_the_queue_again(
    checkpoint, save, monkeypatch, caplog
):
    for name, value in {"NTASKS": "1", "JOB_ID": "42", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(subprocess, "run", lambda *command, **_: pytest.fail(f"{command} was called"))

    def signalled(*of: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGUSR1)
        return logit_difference(*of)

    monkeypatch.setattr(circuit, "logit_difference", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as left:
        find(checkpoint, [save("a", O_PROJ, 1)])
    assert left.value.code == 128 + signal.SIGUSR1
    assert "nothing new is kept. The job is not put into the queue again" in caplog.text
    assert not (Path("out") / CIRCUIT).exists()
    assert not list(Path().rglob("hpc_ckpt*"))
    assert signal.getsignal(signal.SIGUSR1) == before
