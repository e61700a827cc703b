"""The whole experiment on decoders of other kinds: mixtures of experts, capped logits, and a hybrid."""

import json
from pathlib import Path

import pytest
import torch
from experiments import run, write_experiment
from support import difference, logits_of, write_checkpoint
from transformers import AutoModelForCausalLM

from sparc3_lightning.models.components import mask
from sparc3_lightning.models.experts import is_expert
from sparc3_lightning.selection.neuron_list import NeuronList

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_if_from_python")]
HAVE_EXPERTS = {"mixtral": True, "qwen3_moe": True, "gemma2": False, "granitemoehybrid": True}


@pytest.mark.parametrize("model_type", HAVE_EXPERTS)
def test_one_command_finds_neurons_and_writes_a_checkpoint_that_is_the_masked_model(model_type, tmp_path):
    checkpoint = write_checkpoint(model_type, tmp_path / "tiny")
    write_experiment(tmp_path, checkpoint.name)
    results, folder = run("--prune.num_neurons", "30", "--prune.export", "pruned")
    assert results["num_neurons"] == 30
    assert results["num_failed"] == 0
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    chosen = NeuronList.load(Path(stages["neurons"], "neurons.json")).neurons
    model = checkpoint.load(torch.float32)
    assert any(is_expert(model.get_submodule(neuron.module)) for neuron in chosen) == HAVE_EXPERTS[model_type]
    with mask(model, chosen):
        masked = logits_of(model)
    exported = AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.float32).eval()
    assert difference(logits_of(exported), masked) < 1e-5
    assert difference(logits_of(model), masked) > 1e-4
