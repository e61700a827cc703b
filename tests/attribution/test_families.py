"""The plain MLPs of OPT and GPT-2, from the command line to a checkpoint that is reloaded, whole and sharded."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers import mlp_of, sentence
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparc3_lightning.attribution.activations import ACTIVATIONS, Activations
from sparc3_lightning.attribution.scores import INDEX, ScoreFile
from sparc3_lightning.cli import main
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.evaluation.controls import CONTROLS, Controls
from sparc3_lightning.evaluation.variants import list_variants, neurons_of
from sparc3_lightning.models.architectures import blocks_of, weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.sharding import load_sharded
from sparc3_lightning.selection.criteria import POOL
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import Attribution

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FAMILIES = {"gpt2": "c_fc", "opt": "fc1"}
PROMPTS = [sentence(100 + i, 3 + i % 7) for i in range(12)]
all_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def as_if_from_a_shell(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


@pytest.fixture(autouse=True)
def input_files(in_empty_folder) -> None:
    Path("general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(10)) + "\n")
    Path("text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(3)) + "\n")
    rows = [{"text": text, "toxicity": 0.9} for text in PROMPTS]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def run(verb: str, **options: Any) -> Path:
    """Run a verb with a config of these options, and return its folder."""
    Path(f"{verb}.yaml").write_text(yaml.safe_dump(options))
    return Path(main([verb, "--config", f"./{verb}.yaml", *QUIET]).trainer.log_dir)


def attribute(checkpoint: str, data: str, source: str, **options: Any) -> str:
    """Attribute on five samples, and return the score file."""
    init = {"source": source, "num_samples": 5, "batch_size": 3, **options}
    of = {"class_path": f"sparc3_lightning.data.{data}", "init_args": init}
    return str(run("attribute", model={"checkpoint": checkpoint, "activations": True}, data=of) / "scores.safetensors")


def evaluate(checkpoint: str, **model: Any) -> dict[str, Any]:
    """Evaluate, and return the results of each model."""
    data = {
        "text": {"source": "text.txt", "window": 32, "stride": 16},
        "prompts": {"source": "prompts.jsonl", "num_prompts": 4},
    }
    kinds = {"text": "WikiText2", "prompts": "RealToxicityPrompts"}
    of = {name: {"class_path": f"sparc3_lightning.data.{kinds[name]}", "init_args": data[name]} for name in data}
    small = {"scorers": ["small"], "sampling": {"max_new_tokens": 4, "num_continuations": 2}}
    folder = run("evaluate", model={"checkpoint": checkpoint, **small, **model}, data=of)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@all_families
def test_every_verb_works_and_the_exported_checkpoint_is_the_masked_model(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    general = attribute(checkpoint, "C4", "general.txt", seq_len=12)
    behavior = attribute(checkpoint, "ToxicPrompts", "prompts.jsonl")
    of = {
        "general": [general],
        "behavior": behavior,
        "num_neurons": 5,
        "min_differential_strength": -1000.0,
        "export": "pruned",
    }
    neurons = run("prune", model=of) / "neurons.json"
    chosen = NeuronList.load(neurons).neurons
    assert {neuron.module.rpartition(".")[2] for neuron in chosen} == {FAMILIES[family]}

    model, exported = load_model(checkpoint, torch.float32), AutoModelForCausalLM.from_pretrained("pruned").eval()
    input_ids = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
    with torch.no_grad(), mask(model, chosen):
        torch.testing.assert_close(exported(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-6)
    for neuron in chosen:
        layer = exported.get_submodule(neuron.module)
        assert not weight_of(layer)[neuron.index].any()
        assert layer.bias[neuron.index] == 0

    results = evaluate(checkpoint, neurons=str(neurons), controls={"num_draws": 1, "num_continuations": 1})
    perplexity = results["baseline"]["perplexity"]["sliding"]["value"]
    assert results["pruned"]["perplexity"]["sliding"]["value"] != pytest.approx(perplexity, rel=1e-3)
    reloaded = evaluate("pruned", controls={"num_draws": 0})["baseline"]["perplexity"]["sliding"]["value"]
    assert reloaded == pytest.approx(results["pruned"]["perplexity"]["sliding"]["value"], rel=1e-5)
    assert set(results["controls"]) == set(CONTROLS)


def scores_of(checkpoint: str, folder: str, batch_size: int, strategy: str = "auto", **options: Any) -> ScoreFile:
    """Score the neurons on prompts of different lengths under a stock Trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}
    data = ToxicPrompts("prompts.jsonl", num_samples=7, batch_size=batch_size)
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, default_root_dir=folder, **quiet)
    trainer.predict(Attribution(checkpoint, **options), datamodule=data, return_predictions=False)
    found = Path(folder) / "scores.safetensors"
    return ScoreFile.load(found if found.is_file() else Path(folder) / INDEX)


@all_families
def test_gradient_checkpointing_and_the_size_of_a_padded_batch_change_no_score(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    alone = scores_of(checkpoint, "alone", 1)
    assert alone.provenance.spec.layers == [FAMILIES[family]], "the names of the layers, not that it is the default"
    assert list(alone.scores) == [mlp_of(family, k)[0][0] for k in range(2)]
    for name, options in {"padded": {}, "checkpointed": {"gradient_checkpointing": True}}.items():
        for layer, score in scores_of(checkpoint, name, 4, **options).scores.items():
            torch.testing.assert_close(score, alone.scores[layer], rtol=1e-4, atol=1e-6)


@all_families
def test_the_mean_activation_of_each_sample_of_a_padded_batch_is_that_of_one_at_a_time(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    scores_of(checkpoint, "out", 4, activations=True)
    found = Activations.load(Path("out") / ACTIVATIONS)
    model, tokenizer = load_model(checkpoint, torch.float32), Checkpoint(checkpoint).tokenizer()
    act = {"gpt2": partial(torch.nn.functional.gelu, approximate="tanh"), "opt": torch.relu}[family]
    layers = {mlp_of(family, k)[0][0]: [] for k in range(2)}
    for name, means in layers.items():
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, means=means: means.append(act(output).reshape(-1, 24).mean(dim=0))
        )
    texts = {prompt_id(text): text for text in PROMPTS}
    for sample_id in found.sample_ids:
        model(torch.tensor([tokenizer(texts[sample_id])["input_ids"]]))
    for name, means in layers.items():
        torch.testing.assert_close(found.rows[name], torch.stack(means), rtol=1e-4, atol=1e-6)


def test_layers_of_another_family_are_refused_with_the_names_there_are(make_checkpoint):
    with pytest.raises(ValueError, match=r"--model\.layers: the model has no linear layer 'up_proj'.*'fc1', 'fc2'"):
        scores_of(make_checkpoint("opt"), "out", 4, layers=["up_proj"])


@pytest.mark.parametrize("granularity", ["neuron", "head", "weight"])
@all_families
@pytest.mark.few(2)
def test_a_sharded_model_has_the_same_scores(make_checkpoint, family, granularity):
    checkpoint = make_checkpoint(family)
    layers = None if granularity == "head" else ["all"]
    of = {"granularity": granularity, "layers": layers, "gradient_checkpointing": True}
    whole, sharded = (scores_of(checkpoint, strategy, 4, strategy, **of) for strategy in ("auto", "fsdp2"))
    assert list(whole.scores) == list(sharded.scores)
    for name, score in whole.scores.items():
        torch.testing.assert_close(sharded.scores[name], score, rtol=1e-4, atol=1e-6)


@all_families
def test_a_checkpoint_of_the_model_without_its_head_is_read_in_shards_too(make_checkpoint, family, tmp_path):
    """As the hub's GPT-2 is: the names of its weights have no prefix."""
    model = load_model(make_checkpoint(family), torch.float32)
    model.base_model.save_pretrained("headless")
    weights = load_file("headless/model.safetensors")
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in weights)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = load_sharded(Checkpoint("./headless"), torch.float32, mesh, torch.device("cpu"))
    input_ids = torch.tensor([[5, 17, 42, 8]])
    with torch.no_grad():
        torch.testing.assert_close(sharded(input_ids).logits, model(input_ids).logits)
    assert len(blocks_of(sharded)) == 2


def test_a_sharded_model_ends_at_the_tokens_of_its_generation_config(make_checkpoint, tmp_path):
    folder = Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "two_ends"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 5]}))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for model in (
        load_model(str(folder), torch.float32),
        load_sharded(Checkpoint(str(folder)), torch.float32, mesh, torch.device("cpu")),
    ):
        assert model.generation_config.eos_token_id == [2, 5]


@all_families
def test_controls_of_a_sharded_model_have_the_largest_weights(make_checkpoint, family):
    model = load_model(make_checkpoint(family), torch.float32)
    (layer, *_), _ = mlp_of(family, 0)
    weight = model.get_submodule(layer).weight.detach()
    norms = [row.norm() for row in (weight.T if family == "gpt2" else weight)]
    pruned = NeuronList([Component(layer, 0, -1.0)])
    norms[0] = torch.tensor(0.0)
    heaviest = sorted(range(24), key=lambda i: -norms[i])[:POOL]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = load_sharded(Checkpoint(make_checkpoint(family)), torch.float32, mesh, torch.device("cpu"))
    variants = list_variants({"": pruned}, 1, controls=Controls(10))
    for of in (model, sharded):
        off = neurons_of(variants, {"": pruned}, of, 0)
        assert {off[f"largest_weights_{i}"][0].index for i in range(10)} <= set(heaviest)
        assert len({off[f"random_{i}"][0].index for i in range(10)}) > 3
