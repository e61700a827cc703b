"""Scores by other methods than LRP: activations, the magnitude of weights, and random ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import sentence
from torch import Tensor

from sparc3_lightning.attribution.scores import INDEX, ScoreFile, WeightScores
from sparc3_lightning.attribution.static_scores import StaticScores, random_scores
from sparc3_lightning.cli import main
from sparc3_lightning.data.base import NoSamples
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.selection.sparsity import SPARSITY
from sparc3_lightning.stages.attribute import SCORES, Attribution
from sparc3_lightning.stages.prune import NEURONS, Pruning


@pytest.fixture(autouse=True)
def seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def prompts() -> str:
    rows = [{"text": sentence(i, 3 + i), "toxicity": 0.95} for i in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "prompts.jsonl"


def attribute(checkpoint: str, data: Any, folder: str = "out", **options: Any) -> Attribution:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet)
    module = Attribution(checkpoint, **options)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return module


def activations_by_hand(checkpoint: str, module: Attribution) -> dict[str, Tensor]:
    """|act(gate) * up| of one sample at a time, its mean over the tokens, then over the samples."""
    model: Any = load_model(checkpoint, torch.float32)
    found: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(model.model.layers):

        def keep(mlp: Any, inputs: Any, output: Any, name: str = f"model.layers.{i}.mlp.up_proj") -> None:
            x = inputs[0][0]
            neurons = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
            found.setdefault(name, []).append(torch.stack([row.abs() for row in neurons]).mean(dim=0))

        layer.mlp.register_forward_hook(keep)
    with torch.no_grad():
        for sample in module.reference_samples.samples:
            model(torch.tensor([sample.input_ids]))
    return {name: torch.stack(rows).mean(dim=0) for name, rows in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_activation_is_the_mean_magnitude_of_each_neuron_whatever_the_padding(tiny_checkpoint, prompts, batch_size):
    module = attribute(
        tiny_checkpoint, ToxicPrompts(prompts, num_samples=5, batch_size=batch_size), method="activation"
    )
    file = ScoreFile.load(Path("out", SCORES))
    expected = activations_by_hand(tiny_checkpoint, module)
    assert list(file.scores) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(file.scores[name], score, rtol=1e-5, atol=1e-7)
    spec = file.provenance.spec
    assert (spec.method, spec.relevance, spec.target) == ("activation", None, None)
    assert file.provenance.num_samples == 5


def test_magnitude_of_neurons_is_the_sum_over_their_weights_and_of_weights_their_own(tiny_checkpoint):
    layers = find_layers(load_model(tiny_checkpoint, torch.float32), ["up_proj"])
    attribute(tiny_checkpoint, NoSamples(), "neurons", method="magnitude")
    attribute(tiny_checkpoint, NoSamples(), "weights", method="magnitude", granularity="weight")
    neurons, weights = ScoreFile.load(Path("neurons", SCORES)).scores, dict(WeightScores(Path("weights", INDEX)))
    for name, layer in layers.items():
        assert weights[name].tolist() == [[abs(w) for w in row] for row in layer.weight.tolist()]
        torch.testing.assert_close(neurons[name], torch.tensor([sum(map(abs, row)) for row in layer.weight.tolist()]))
    assert neurons.keys() == weights.keys() == layers.keys()
    provenance = ScoreFile.load(Path("neurons", SCORES)).provenance
    assert (provenance.spec.method, provenance.num_samples, provenance.num_tokens) == ("magnitude", 0, 0)
    assert provenance.data == {"class": "NoSamples"}


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_random_scores_are_of_the_seed_and_of_the_name_of_the_layer(make_model: Callable[..., Any], granularity):
    model = make_model("llama")
    found = {}
    for layers in ("all", "up_proj"):
        for seed in (0, 1):
            scored = StaticScores(find_layers(model, [layers]), "random", granularity, seed)
            found[layers, seed] = scored.compute()
    name, other = (f"model.layers.{i}.mlp.up_proj" for i in range(2))
    assert torch.equal(found["all", 0][name], found["up_proj", 0][name]), "whatever else is scored"
    assert not torch.equal(found["all", 0][name], found["all", 1][name])
    assert not torch.equal(found["all", 0][name], found["all", 0][other])
    assert found["all", 0][name].shape == ((24,) if granularity == "neuron" else (24, 16))


def test_random_scores_are_uniform():
    scores = random_scores("layer", (20_000,), 0)
    counts = torch.histc(scores, 10, 0, 1)
    assert ((counts - 2000).abs() < 5 * (2000 * 0.9) ** 0.5).all()


def test_prune_and_compress_take_the_scores_of_every_method(tiny_checkpoint, prompts, monkeypatch):
    for method in ("activation", "random"):
        modules = []
        for seed, number in enumerate((5, 4)):
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            data = ToxicPrompts(prompts, num_samples=number) if method == "activation" else NoSamples()
            modules.append(attribute(tiny_checkpoint, data, f"{method}-{seed}", method=method))
        general, behavior = modules
        Pruning([general.output], behavior.output, num_neurons=5, min_differential_strength=-1e9).prune(
            Path(f"pruned-{method}")
        )
        assert len(NeuronList.load(Path(f"pruned-{method}", NEURONS)).neurons) == 5
    cpu = ["--trainer.accelerator", "cpu"]
    options = ["--model.method", "magnitude", "--model.granularity", "weight", "--model.layers", "[all]"]
    main(["attribute", *cpu, "--model.checkpoint", tiny_checkpoint, *options, "--data", "NoSamples"])
    index = Path("lightning_logs/attribute/version_0", INDEX)
    main(["compress", *cpu, "--model.general", f"[{index}]", "--model.export", "sparse"])
    found = json.loads(Path("lightning_logs/compress/version_0", SPARSITY).read_text())
    assert found["num_pruned"] * 2 == found["num_weights"]
    main(["attribute", "--config", str(index.parent / "config.yaml")])
    again = dict(WeightScores(Path("lightning_logs/attribute/version_1", INDEX)))
    assert all(torch.equal(again[name], score) for name, score in WeightScores(index))


def test_samples_for_a_method_that_reads_none_and_none_for_one_that_does_are_refused(tiny_checkpoint, prompts):
    with pytest.raises(ValueError, match=r"--model\.method random reads no samples: give --data NoSamples"):
        attribute(tiny_checkpoint, ToxicPrompts(prompts, num_samples=5), method="random")
    with pytest.raises(ValueError, match=r"--model\.method lrp needs samples: give --data C4"):
        attribute(tiny_checkpoint, NoSamples())


def test_what_a_method_cannot_do_is_refused(tiny_checkpoint):
    with pytest.raises(
        ValueError, match=r"--model\.method activation is not defined for weights: .*--model\.granularity"
    ):
        Attribution(tiny_checkpoint, method="activation", granularity="weight")
    for method in ("activation", "magnitude", "random"):
        with pytest.raises(
            ValueError, match=rf"--model\.method {method} is not defined for heads: .*--model\.granularity"
        ):
            Attribution(tiny_checkpoint, method=method, granularity="head", layers=["o_proj"])
    for method in ("wanda", "activation", "magnitude", "random"):
        with pytest.raises(ValueError, match=rf"--model\.method {method} has no target"):
            Attribution(tiny_checkpoint, method=method, target="text")
