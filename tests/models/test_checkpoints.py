"""Checkpoints in folders: found, loaded and fingerprinted; every way of not having one is one clear sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config, is_one_sentence, load_float32
from helpers import WORDS, make_config
from safetensors.torch import load_file, save_file

from sparc3_lightning.models.checkpoints import Checkpoint, load_model, resolve_dtype

CPU = torch.device("cpu")


def test_a_folder_is_found_by_its_path(copied: Path) -> None:
    assert Checkpoint(str(copied)).location == str(copied)
    assert Checkpoint("copied").location == "copied"
    assert Checkpoint("./copied").location == "copied"


@pytest.mark.parametrize("checkpoint", ["meta-llama/Meta-Llama-3-8B", "gpt2"])
def test_the_id_of_a_hub_repository_passes_through(checkpoint: str) -> None:
    assert Checkpoint(checkpoint).location == checkpoint


def test_a_folder_without_config_json_is_not_a_checkpoint(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copied is not a checkpoint: it has no config.json"):
        _ = Checkpoint(str(copied)).location


def test_a_folder_with_pickled_weights_only_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no \*.safetensors file.*never loaded.*save_pretrained"):
        load_model(str(copied), torch.float32)


@pytest.mark.parametrize("checkpoint", ["missing.gguf", "./missing", "/missing/folder", "~/missing", "a/b/c"])
def test_a_local_path_that_does_not_exist_is_not_taken_for_a_hub_id(checkpoint: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        _ = Checkpoint(checkpoint).location


def test_a_file_that_is_no_gguf_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a GGUF file"):
        _ = Checkpoint(str(tmp_path / "model.safetensors")).location


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_is_loaded_in_the_dtype_asked_for_frozen_and_in_evaluation_mode(
    dtype: torch.dtype, tiny_checkpoint: str
) -> None:
    model = load_model(tiny_checkpoint, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert {parameter.device for parameter in model.parameters()} == {CPU}


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_an_accelerator() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("mps")) == torch.bfloat16


@pytest.mark.parametrize("has_it", [True, False])
def test_fast_is_bfloat16_on_a_cpu_too_if_that_multiplies_its_matrices(has_it, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_it})
    assert resolve_dtype("fast", CPU) == (torch.bfloat16 if has_it else torch.float32)
    assert resolve_dtype("fast", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_named_dtype_holds_on_any_device(device: str) -> None:
    names: list[Any] = ["float32", "bfloat16", "float64"]
    assert [resolve_dtype(name, torch.device(device)) for name in names] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]


def test_the_tokenizer_of_the_checkpoint_is_loaded(tiny_checkpoint: str) -> None:
    tokenizer = Checkpoint(tiny_checkpoint).tokenizer()
    assert tokenizer(f"{WORDS[0]} {WORDS[7]} unknownword")["input_ids"] == [4, 11, 3]
    assert tokenizer.pad_token == "<pad>"


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_of_sequence(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    (copied / "special_tokens_map.json").unlink(missing_ok=True)
    assert Checkpoint(str(copied)).tokenizer().pad_token == "</s>"


def test_the_files_of_a_local_checkpoint_are_listed(tiny_checkpoint: str) -> None:
    names = {path.name for path in Checkpoint(tiny_checkpoint).fetch()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_an_unknown_architecture_is_one_sentence_with_the_way_out(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": "nonsense"}')
    for load in (config, load_float32):
        with pytest.raises(ValueError, match="does not know the architecture") as raised:
            load(Checkpoint(str(copied)))
        message = str(raised.value)
        assert is_one_sentence(message), message
        assert "nonsense" in message
        assert str(copied) in message
        assert "upgrade" in message


def test_a_config_without_a_model_type_is_a_clear_error(copied: Path) -> None:
    (copied / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not know the architecture.*model_type"):
        _ = Checkpoint(str(copied)).config


def test_a_config_that_is_not_json_is_a_clear_error(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": ')
    with pytest.raises(OSError, match=r"copied.*not a valid JSON file"):
        _ = Checkpoint(str(copied)).config


@pytest.mark.parametrize("architecture", ["vit", "t5"])
def test_a_model_that_is_no_causal_language_model_is_refused(architecture: str, copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": architecture}))
    with pytest.raises(ValueError, match=rf"\({architecture}\) is not a causal language model"):
        load_model(str(copied), torch.float32)


def test_truncated_weights_are_one_sentence_that_names_the_checkpoint(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"A weight file of '.*copied' is damaged: fetch or copy it again") as raised:
        load_model(str(copied), torch.float32)
    assert is_one_sentence(str(raised.value))


def test_the_fingerprint_of_a_folder_does_not_depend_on_its_name(tiny_checkpoint: str, copied: Path) -> None:
    assert Checkpoint(str(copied)).fingerprint == Checkpoint(tiny_checkpoint).fingerprint
    assert Checkpoint("copied").fingerprint.startswith("files:")


def test_the_fingerprint_changes_with_any_weight_of_a_small_checkpoint(copied: Path) -> None:
    path = copied / "model.safetensors"
    weights = load_file(path)
    seen = {Checkpoint(str(copied)).fingerprint}
    for name, weight in weights.items():
        changed = weight.clone()
        changed.view(-1)[len(changed.view(-1)) // 2] += 1
        save_file({**weights, name: changed}, path, {"format": "pt"})
        seen.add(Checkpoint(str(copied)).fingerprint)
    assert len(seen) == 1 + len(weights)


def test_the_fingerprint_changes_with_the_config(copied: Path) -> None:
    before = Checkpoint(str(copied)).fingerprint
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert Checkpoint(str(copied)).fingerprint != before


def test_the_fingerprint_of_a_pruned_checkpoint_is_another_also_where_files_are_large(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(make_config("llama", hidden_size=128, intermediate_size=2048, num_hidden_layers=5))
    whole, pruned = tmp_path / "whole", tmp_path / "pruned"
    model.save_pretrained(whole)
    assert (whole / "model.safetensors").stat().st_size > 14 << 20
    model.model.layers[2].mlp.down_proj.weight.data[:, 1000] = 0
    model.save_pretrained(pruned)
    assert (whole / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    assert Checkpoint(str(whole)).fingerprint != Checkpoint(str(pruned)).fingerprint
