"""The whole experiment: models that a later stage would refuse are refused before any stage, and by the plan."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import ALL
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from sparc3_lightning.stages.attribute import Attribution

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")
SIZES = {
    **{"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
NOTHING = {f"nothing.{i}": torch.zeros(1) for i in range(9)}
WANDA = ("--attribute.method", "wanda")


def must_not_run(verb: str, config: Path) -> None:
    pytest.fail(f"{verb} was run")


def write_checkpoint(model_type: str, **options: Any) -> str:
    """Write the config of a model, and a file for its weights, which nobody comes to read."""
    Path("model").mkdir()
    config = CONFIG_MAPPING[model_type](**{**SIZES, **options})
    Path("model", "config.json").write_text(config.to_json_string())
    save_file(NOTHING, "model/model.safetensors", {"format": "pt"})
    return "model"


@pytest.mark.parametrize(
    ("model_type", "changes", "error"),
    [
        ("mamba", WANDA, r"MambaForCausalLM has no MLP .*\['dt_proj', 'in_proj'.*--attribute\.granularity weight and"),
        ("gpt_neox", (*WANDA, "--attribute.layers", "[dense_4h_to_h]"), "dense_4h_to_h are no neurons"),
        ("phi3", (*WANDA, "--attribute.layers", "[qkv_proj]"), "The rows of qkv_proj are no neurons"),
        ("phi3", (*WANDA, "--prune.num_neurons", "49"), r"must be between 1 and 48 \(all neurons"),
        ("llama", (*WANDA, "--attribute.layers", "[o_proj]"), "The rows of o_proj are no neurons"),
        ("llama", ("--attribute.layers", "[nothing]"), r"--attribute\.layers: the model has no linear layer 'nothing'"),
        ("llama", ("--model.behavior_attribute", "{layers: [down_proj]}"), "The rows of down_proj are no neurons"),
        ("llama", ("--prune.num_neurons", "49"), r"--prune\.num_neurons must be between 1 and 48 \(all neurons"),
        ("llama", ("--evaluate.doses", "[60]"), r"--evaluate\.doses asks for 60 neurons, and only 48 are scored: ask"),
        ("recurrent_gemma", (*WANDA,), "RecurrentGemmaForCausalLM hands on no cache"),
        (
            "qwen3",
            ("--prune.export", "out/new", "--prune.ablation", "mean"),
            r"has no bias in its MLPs.*--prune\.ablation zero",
        ),
        ("llama", ("--prune.export", "general.txt/new"), r"Cannot write to the output folder .*--prune\.export"),
        ("llama", ("--prune.export", "new"), r"'model' cannot be exported: its files hold no tensor .*--prune\.export"),
    ],
)
@pytest.mark.few(2)
def test_a_model_that_a_later_stage_would_refuse_is_refused_before_any_stage_and_by_the_plan(
    due: Any, plan: Any, model_type: str, changes: tuple[str, ...], error: str
) -> None:
    of_model = ("--model.checkpoint", write_checkpoint(model_type))
    with pytest.raises((ValueError, OSError), match=error):
        due(*of_model, *changes, run_stage=must_not_run)
    with pytest.raises((ValueError, OSError), match=error):
        plan(*of_model, *changes)
    assert not Path("plan.txt").exists()


MULTIMODAL = {
    "gemma3": {"text_config": SIZES, "vision_config": {"hidden_size": 16, "num_hidden_layers": 1}},
    "qwen3_5": {"text_config": SIZES},
    "llama4": {"text_config": {**SIZES, "num_local_experts": 1}},
}


@pytest.mark.parametrize("method", ["lrp", "wanda"])
@pytest.mark.parametrize("model_type", MULTIMODAL)
@pytest.mark.few(2)
def test_a_multimodal_checkpoint_is_refused_at_once_by_the_experiment_and_by_each_verb(
    due: Any, model_type: str, method: str
) -> None:
    config = CONFIG_MAPPING[model_type](**MULTIMODAL[model_type])
    Path("model").mkdir()
    Path("model", "config.json").write_text(config.to_json_string())
    save_file(NOTHING, "model/model.safetensors", {"format": "pt"})
    message = (
        rf"'model' \({model_type}\) is multimodal \(it has .*text_config.*\), and its decoder of text cannot be taken"
    )
    with pytest.raises(ValueError, match=message) as raised:
        due("--model.checkpoint", "model", "--attribute.method", method, run_stage=must_not_run)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=message):
        Attribution("model", method=method).checkpoint.skeleton()  # type: ignore[arg-type]


def test_swapped_sides_are_refused(due: Any) -> None:
    toxic = "{class_path: sparc3_lightning.data.ToxicPrompts, init_args: {source: prompts.jsonl, min_toxicity: 0.9}}"
    of_c4 = "{class_path: sparc3_lightning.data.C4, init_args: {source: null}}"
    with pytest.raises(ValueError, match="--general is of toxic prompts and --behavior is of others: exchange the two"):
        due("--general", toxic, "--behavior", of_c4, "--model.general_seeds", "[0]", run_stage=must_not_run)


def test_a_model_is_not_checked_once_all_stages_are_done(due: Any, tiny_checkpoint: str) -> None:
    assert due() == ALL
    shutil.rmtree("out")
    assert due() == []


def test_an_encoder_and_a_decoder_are_refused(due: Any) -> None:
    config = json.loads(CONFIG_MAPPING["bart"](d_model=16).to_json_string())
    Path("model").mkdir()
    Path("model", "config.json").write_text(json.dumps(config))
    save_file(NOTHING, "model/model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"'model' \(bart\) is an encoder and a decoder, and its decoder of text cannot"
    ):
        due("--model.checkpoint", "model", run_stage=must_not_run)
