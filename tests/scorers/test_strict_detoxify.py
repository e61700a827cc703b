"""Checkpoints of Detoxify that do not hold the model they name are refused, and no code beside them runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparc3_lightning.scorers.detoxify import SHIPPED, DetoxifyScorer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint, to be changed."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "scorer"))


def change_(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = torch.load(folder / "toxicity.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "toxicity.ckpt")


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda state: state.pop("classifier.weight"), r"1 missing \(classifier.weight\)"),
    (
        lambda state: state.update({"classifier.weights": state.pop("classifier.weight")}),
        r"1 unexpected \(classifier.w",
    ),
    (lambda state: state.update({"more.weight": torch.ones(2)}), r"1 unexpected \(more.weight\)"),
    (lambda state: state.update({"classifier.bias": torch.ones(3)}), "holds other weights than the config beside it"),
]


@pytest.mark.parametrize(("change", "expected"), WRONG)
def test_a_checkpoint_with_other_tensors_than_its_model_is_refused(
    change: Callable[[dict[str, Any]], object], expected: str, folder: Path
) -> None:
    change_(folder, lambda checkpoint: change(checkpoint["state_dict"]))
    with pytest.raises(ValueError, match=expected) as raised:
        DetoxifyScorer(str(folder))
    assert str(folder / "toxicity.ckpt") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_positions_that_older_checkpoints_hold_may_be_left_over(folder: Path) -> None:
    texts = ["You are a stupid idiot."]
    expected = DetoxifyScorer(str(folder)).score(texts)
    positions = {"bert.embeddings.position_ids": torch.arange(128)[None]}
    change_(folder, lambda checkpoint: checkpoint["state_dict"].update(positions))
    assert DetoxifyScorer(str(folder)).score(texts) == expected


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("tokenizer_name", "AutoTokenizer"),
        ("tokenizer_name", "BertConfig"),
        ("model_name", "AutoModelForSequenceClassification"),
        ("model_name", "pipeline"),
        ("model_name", "NoSuchModel"),
        ("model_name", None),
    ],
)
def test_a_class_that_could_run_code_of_the_folder_is_refused(
    key: str, name: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked whether code may run"))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('sprung').touch()\nclass Evil: pass\n")
    for file, auto in (
        ("config.json", "AutoModelForSequenceClassification"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ):
        content = json.loads((folder / file).read_text())
        code = ["evil.Evil", None] if auto == "AutoTokenizer" else "evil.Evil"
        (folder / file).write_text(json.dumps({**content, "auto_map": {auto: code}}))
    change_(folder, lambda checkpoint: checkpoint["config"]["arch"]["args"].update({key: name}))
    with pytest.raises(ValueError, match=f"names {name!r} as its {key}, which is no such class of transformers"):
        DetoxifyScorer(str(folder))
    assert not Path("sprung").exists()
