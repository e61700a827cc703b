"""A mixture of experts from the command line: scored, pruned, evaluated; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import sentence
from mixtures import make_mixture, save_mixture

from sparc3_lightning.attribution.activations import ACTIVATIONS, Activations
from sparc3_lightning.attribution.scores import INDEX, ScoreFile, WeightScores, load_index
from sparc3_lightning.cli import main
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, prune_
from sparc3_lightning.models.experts import is_expert
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.compress import check_layers

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
LAYERS = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(2) for expert in range(4)]


@pytest.fixture(autouse=True)
def input_files(in_empty_folder, as_if_from_a_shell) -> None:
    Path("general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(10)) + "\n")
    Path("text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(3)) + "\n")
    rows = [{"text": sentence(100 + i, 3 + i % 7), "toxicity": 0.9} for i in range(12)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def start(verb: str, **options: Any) -> Any:
    """Run a verb with a config of these options."""
    Path(f"{verb}.yaml").write_text(yaml.safe_dump(options))
    return main([verb, "--config", f"./{verb}.yaml", *QUIET])


def run(verb: str, **options: Any) -> Path:
    """Run a verb with a config of these options, and return its folder."""
    return Path(start(verb, **options).trainer.log_dir)


def attribute(checkpoint: str, data: str = "ToxicPrompts", of_data: Any = None, **model: Any) -> tuple[Path, str]:
    """Attribute on five samples, and return the folder and what is said at the end."""
    init = {"source": "prompts.jsonl", "num_samples": 5, "batch_size": 3, **(of_data or {})}
    of = {"class_path": f"sparc3_lightning.data.{data}", "init_args": init}
    cli = start("attribute", model={"checkpoint": checkpoint, "method": "gradient", **model}, data=of)
    return Path(cli.trainer.log_dir), cli.model.summary()


@pytest.mark.slow
def test_neurons_of_experts_are_scored_pruned_and_evaluated(tmp_path):
    checkpoint = save_mixture("mixtral", tmp_path / "tiny")
    general, said = attribute(checkpoint, "C4", {"source": "general.txt", "seq_len": 12})
    assert said.startswith("Scored 100 % of the MLP neurons: ")
    assert " in 4 x 2 experts; left out: self_attn" in said
    assert "\nAn expert saw " in said
    behavior, _ = attribute(checkpoint, activations=True)
    scores = ScoreFile.load(behavior / "scores.safetensors")
    assert list(scores.scores) == LAYERS
    seen = scores.provenance.expert_tokens
    assert seen is not None
    assert seen.num_experts == 8
    assert seen.fewest <= seen.median <= seen.most
    assert list(Activations.load(behavior / ACTIVATIONS).rows) == LAYERS

    of = {"general": [str(general / "scores.safetensors")], "behavior": str(behavior / "scores.safetensors")}
    neurons = run("prune", model={**of, "num_neurons": 9, "min_differential_strength": -1000.0}) / "neurons.json"
    chosen = NeuronList.load(neurons).neurons
    assert len(chosen) == 9
    assert {neuron.module for neuron in chosen} <= set(LAYERS)

    data = {
        "text": {"source": "text.txt", "window": 32, "stride": 16},
        "prompts": {"source": "prompts.jsonl", "num_prompts": 4},
    }
    kinds = {"text": "WikiText2", "prompts": "RealToxicityPrompts"}
    of_data = {name: {"class_path": f"sparc3_lightning.data.{kinds[name]}", "init_args": data[name]} for name in data}
    small = {"scorers": ["small"], "sampling": {"max_new_tokens": 4, "num_continuations": 2}}
    controls = {"num_draws": 1, "num_continuations": 1}
    model = {"checkpoint": checkpoint, "neurons": str(neurons), "controls": controls, **small}
    results = json.loads((run("evaluate", model=model, data=of_data) / "results.json").read_text())
    perplexity = {name: results[name]["perplexity"]["sliding"]["value"] for name in ("baseline", "pruned")}
    assert perplexity["pruned"] != pytest.approx(perplexity["baseline"], rel=1e-4)


def test_a_loaded_mixture_is_open_and_computes_what_the_stock_one_does(tmp_path):
    model = load_model(save_mixture("mixtral", tmp_path / "tiny"), torch.float32)
    input_ids = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
    stock = make_mixture("mixtral", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, stock(input_ids).logits, rtol=1e-4, atol=1e-5)
    assert is_expert(model.get_submodule(LAYERS[0]))


@pytest.mark.slow
def test_weights_of_experts_are_among_all_layers_and_routers_are_not(tmp_path):
    checkpoint = save_mixture("llama4_text", tmp_path / "tiny")
    folder, _ = attribute(checkpoint, granularity="weight", layers=["all"], method="wanda")
    scores: WeightScores = load_index(folder / INDEX, "general")
    kinds = {name.rpartition(".")[2] for name in scores.shapes}
    assert {"gate_proj", "up_proj", "down_proj", "q_proj"} <= kinds
    assert not {"router", "lm_head"} & kinds
    assert any(".experts.3.up_proj" in name for name in scores.shapes)
    assert check_layers(scores, Checkpoint(checkpoint)) > 0


def test_experts_of_no_known_kind_are_refused_before_the_model_is_loaded(tmp_path):
    checkpoint = save_mixture("jetmoe", tmp_path / "tiny", kv_channels=4, num_local_experts=4)
    with pytest.raises(ValueError, match=r"JetMoeParallelExperts .* of --model.checkpoint are of no known"):
        attribute(checkpoint)


def test_mean_ablation_is_refused_where_experts_have_no_bias(tmp_path):
    model = load_model(save_mixture("mixtral", tmp_path / "tiny"), torch.float32)
    with pytest.raises(ValueError, match="has no bias in its MLPs"):
        prune_(model, [Component(LAYERS[0], 3, -1.0, mean=0.5)])
