"""MLPs of other kinds than LLaMA's, from attribution to a checkpoint that is reloaded: fused, of hybrids, and plain."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from decoders import build
from helpers import WORDS, sentence, tokenizer_of
from transformers import AutoModelForCausalLM

from sparc3_lightning.attribution.scores import INDEX, ScoreFile
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.models.components import KINDS, Component, mask
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import SCORES, Attribution
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.prune import NEURONS, Pruning

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
LINES = {
    "gpt_neox": "Scored 100 % of the MLP neurons: 48; left out: attention",
    "granitemoehybrid": "Scored 100 % of the MLP neurons: 48; left out: mamba, self_attn",
    "phi3": "Scored 100 % of the MLP neurons: 48; left out: self_attn",
    "zamba2": (
        "Scored 100 % of the MLP neurons: 24; left out: linear, mamba_decoder, "
        "shared_transformer.self_attn, shared_transformer.feed_forward.gate_up_proj_adapter_list, mamba"
    ),
}
CHANGES: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0},
        "shared_intermediate_size": 24,
    },
    "zamba2": {"layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3, "num_mem_blocks": 1},
}
every_kind = pytest.mark.parametrize("family", LINES)


@pytest.fixture(autouse=True)
def prompts(in_empty_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    rows = [{"text": sentence(i, 3 + i % 5), "toxicity": 0.9} for i in range(12)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("general.txt").write_text("\n".join(sentence(100 + i, 20 + i) for i in range(10)) + "\n")


def checkpoint_of(family: str) -> str:
    sizes = {"vocab_size": len(WORDS) + 4, "num_hidden_layers": 2, "intermediate_size": 24, **CHANGES.get(family, {})}
    build(family, **sizes).save_pretrained("tiny")
    tokenizer_of(WORDS).save_pretrained("tiny")
    return "./tiny"


def attribute(
    checkpoint: str, folder: str, data: Any = None, strategy: str = "auto", method: Any = "gradient", **options: Any
) -> Attribution:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, default_root_dir=folder, **quiet)
    data = data or ToxicPrompts("prompts.jsonl", num_samples=5, batch_size=3)
    module = Attribution(checkpoint, method=method, **options)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return module


@every_kind
@pytest.mark.few(2)
def test_an_attribution_says_which_neurons_it_scored_and_a_pruned_export_is_the_masked_model(family: str) -> None:
    checkpoint = checkpoint_of(family)
    attribute(checkpoint, "general", C4("general.txt", num_samples=5, batch_size=3, seq_len=12))
    assert attribute(checkpoint, "behavior").summary().splitlines()[0] == LINES[family]
    files = Path("general", SCORES), Path("behavior", SCORES)
    Pruning(files[:1], files[1], num_neurons=7, min_differential_strength=-1000, export=Path("pruned")).prune(
        Path("out")
    )
    chosen = NeuronList.load(Path("out", NEURONS)).neurons
    model, exported = load_model(checkpoint, torch.float32), AutoModelForCausalLM.from_pretrained("pruned").eval()
    with torch.no_grad():
        before = model(INPUT_IDS, use_cache=False).logits
        with mask(model, chosen):
            masked = model(INPUT_IDS, use_cache=False).logits
        torch.testing.assert_close(exported(INPUT_IDS, use_cache=False).logits, masked, rtol=1e-5, atol=1e-5)
    assert (masked - before).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["gradient", "wanda", "activation"])
@pytest.mark.parametrize("family", ["phi3", "granitemoehybrid"])
@pytest.mark.few(2)
def test_a_sharded_model_has_the_same_scores(family: str, method: str) -> None:
    checkpoint = checkpoint_of(family)
    whole, sharded = (
        ScoreFile.load(attribute(checkpoint, strategy, None, strategy, method).output) for strategy in ("auto", "fsdp2")
    )
    for name, score in whole.scores.items():
        assert score.shape == (24,)
        torch.testing.assert_close(sharded.scores[name], score, rtol=1e-4, atol=1e-6)


def test_scores_of_weights_are_those_of_neurons_in_sum_and_all_weights_can_be_compressed() -> None:
    checkpoint = checkpoint_of("phi3")
    attribute(checkpoint, "neurons", relevance="signed")
    attribute(checkpoint, "weights", relevance="signed", granularity="weight", layers=["all"])
    of_neurons, of_weights = ScoreFile.load(Path("neurons", SCORES)), ScoreFile.load(Path("weights", INDEX))
    assert len(of_weights.scores) == 8
    for name, score in of_neurons.scores.items():
        torch.testing.assert_close(of_weights.scores[name], score, rtol=1e-4, atol=1e-6)
    Compression((Path("weights", INDEX),), Path("sparse"), 0.5).compress(Path("out"))
    sparse = AutoModelForCausalLM.from_pretrained("sparse")
    for name in of_weights.scores:
        weight = sparse.get_submodule(name).weight
        assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()


def test_a_share_of_the_neurons_is_said_to_be_one() -> None:
    checkpoint = checkpoint_of("phi3")
    layer = "model.layers.1.mlp.gate_up_proj"
    found = attribute(checkpoint, "out", layers=[layer]).summary()
    assert found.startswith("Scored 50 % of the MLP neurons: 24 of 48; left out: self_attn\nScores of 1 layers: ")
    assert list(ScoreFile.load(Path("out", SCORES)).scores) == [layer]
    model = load_model(checkpoint, torch.float32)
    with pytest.raises(ValueError, match=r"Neuron 24 of .*gate_up_proj does not exist: the layer has 24 neurons"):
        KINDS["neuron"].check(model, {layer: {24: Component(layer, 24, 0.0)}})


def test_of_a_model_without_mlps_the_weights_can_be_scored_and_compressed() -> None:
    checkpoint = checkpoint_of("mamba")
    with pytest.raises(ValueError, match=r"MambaForCausalLM has no MLP .* --model\.granularity weight .*'\[all\]'"):
        attribute(checkpoint, "neurons", method="wanda")
    # The projection of the time step is no layer that the model calls: it multiplies by its weight.
    with pytest.raises(ValueError, match=r"mixer\.dt_proj, .*: give --model\.layers '\[in_proj, out_proj, x_proj\]'"):
        attribute(checkpoint, "all", method="wanda", granularity="weight", layers=["all"])
    layers = ["in_proj", "out_proj", "x_proj"]
    attribute(checkpoint, "weights", method="wanda", granularity="weight", layers=layers)
    Compression((Path("weights", INDEX),), Path("sparse"), 0.25).compress(Path("out"))
    sparse = AutoModelForCausalLM.from_pretrained("sparse")
    weight = sparse.get_submodule("backbone.layers.0.mixer.in_proj").weight
    assert ((weight == 0).sum(dim=1) == weight.shape[1] // 4).all()
