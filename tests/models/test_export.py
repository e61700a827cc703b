"""Exported checkpoints: what stock transformers loads, and that nothing is left of an export that fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INPUT_IDS, NEURONS
from helpers import sentence
from safetensors.torch import load_file

from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.export import export_pruned


def test_an_exported_checkpoint_is_loaded_by_stock_transformers_and_equals_the_masked_model(
    tiny_checkpoint: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "new" / "pruned"
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, folder, dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    model = load_model(tiny_checkpoint, torch.float32)
    with torch.no_grad():
        whole = model(INPUT_IDS).logits
        with mask(model, NEURONS):
            masked = model(INPUT_IDS).logits
        torch.testing.assert_close(exported(INPUT_IDS).logits, masked, rtol=1e-5, atol=1e-6)
    assert (whole - masked).abs().max() > 1e-3
    text = sentence(0, 9)
    assert (
        AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        == Checkpoint(tiny_checkpoint).tokenizer()(text)["input_ids"]
    )
    assert not exported.model.layers[1].mlp.gate_proj.weight[23].any()
    assert Checkpoint(str(folder)).fingerprint != Checkpoint(tiny_checkpoint).fingerprint


def test_an_exported_checkpoint_has_the_dtype_asked_for(tiny_checkpoint: str, tmp_path: Path) -> None:
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_an_export_does_not_touch_a_folder_that_exists(tiny_checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    with pytest.raises(FileExistsError, match="pruned exists already; nothing was overwritten"):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned", dtype=torch.float32)
    assert list((tmp_path / "pruned").iterdir()) == []


def test_an_interrupted_export_leaves_nothing(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        assert any(path.suffix == ".safetensors" for path in tmp_path.rglob("*")), "interrupted before the weights"
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_neurons_of_another_model_leaves_nothing(tiny_checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another model"):
        export_pruned(
            Checkpoint(tiny_checkpoint),
            [Component("model.layers.9.mlp.up_proj", 0, -1.0)],
            tmp_path / "a",
            dtype=torch.float32,
        )
    assert list(tmp_path.iterdir()) == []
