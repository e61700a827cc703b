"""Zero-shot accuracy by lm-eval-harness, on tasks made on the spot; nothing is downloaded."""

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sentence, write_choice_task

from sparc3_lightning.evaluation import zero_shot
from sparc3_lightning.evaluation.zero_shot import ZeroShot, accuracy, check_tasks, fetch_tasks
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, mask

NEURONS = [Component(f"model.layers.{i}.mlp.up_proj", j, -1.0) for i in range(2) for j in range(0, 24, 2)]
DOCUMENTS = [
    {
        "question": sentence(i, 3 + i % 4),
        "choices": [sentence(100 + 3 * i + j, 2) for j in range(3)],
        "label": i % 3,
    }
    for i in range(20)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a task of three choices on local documents."""
    return write_choice_task(tmp_path, "toy_choice", DOCUMENTS)


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leave lm-eval's thousands of tasks out of its index, which takes many seconds to make."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    getattr(zero_shot.task_manager, "cache_clear", lambda: None)()
    yield
    getattr(zero_shot.task_manager, "cache_clear", lambda: None)()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def likeliest(model: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> list[int]:
    """Return the choice whose tokens are the likeliest after the question, one choice at a time."""
    chosen = []
    for document in documents:
        scores = []
        for choice in document["choices"]:
            context, end = (tokenizer(text)["input_ids"] for text in (document["question"], choice))
            with torch.no_grad():
                logs = model(torch.tensor([context + end])).logits[0].log_softmax(dim=1)
            scores.append(sum(logs[len(context) - 1 + k, token].item() for k, token in enumerate(end)))
        chosen.append(scores.index(max(scores)))
    return chosen


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.few(1)
def test_accuracy_before_and_after_is_that_of_the_likeliest_choices(folder: Path, tiny_checkpoint: str) -> None:
    model, tokenizer = load_model(tiny_checkpoint, torch.float32), Checkpoint(tiny_checkpoint).tokenizer()
    labels = [document["label"] for document in DOCUMENTS]
    accuracies = []
    for neurons in ([], NEURONS):
        with mask(model, neurons):
            found = accuracy(model, tokenizer, ZeroShot(["toy_choice"], folder))
            right = [a == b for a, b in zip(likeliest(model, tokenizer, DOCUMENTS), labels, strict=True)]
        share = sum(right) / len(right)
        assert list(found) == ["toy_choice"]
        assert found["toy_choice"]["accuracy"] == pytest.approx(share)
        assert found["toy_choice"]["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
        assert 0 < share < 1
        assert all(type(value) is float for value in found["toy_choice"].values())
        accuracies.append(share)
    assert accuracies[0] != accuracies[1], "the mask changes no answer, so the test shows little"


@pytest.mark.usefixtures("own_tasks_only")
def test_a_limit_takes_the_first_documents_and_the_model_stays_as_it_was(folder: Path, tiny_checkpoint: str) -> None:
    model, tokenizer = load_model(tiny_checkpoint, torch.float32), Checkpoint(tiny_checkpoint).tokenizer()
    before = [parameter.clone() for parameter in model.parameters()]
    found = accuracy(model, tokenizer, ZeroShot(["toy_choice"], folder, limit=7))
    chosen = likeliest(model, tokenizer, DOCUMENTS[:7])
    right = sum(choice == document["label"] for choice, document in zip(chosen, DOCUMENTS[:7], strict=True))
    assert found["toy_choice"]["accuracy"] == pytest.approx(right / 7)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.usefixtures("own_tasks_only")
def test_a_task_of_a_folder_is_known_and_another_is_an_error_that_says_how_to_find_tasks(folder: Path) -> None:
    check_tasks(ZeroShot(["toy_choice"], folder))
    for where, task in ((folder, "toy_chioce"), (None, "toy_choice")):
        with pytest.raises(
            ValueError, match=rf"--model.zero_shot.tasks: lm-eval-harness knows no task '{task}'"
        ) as raised:
            check_tasks(ZeroShot(["toy_choice", task] if where else [task], where))
        assert "lm_eval ls tasks" in str(raised.value)
        assert "--model.zero_shot.folder" in str(raised.value)


@pytest.mark.usefixtures("own_tasks_only")
def test_a_folder_of_tasks_that_does_not_exist_is_an_error_with_the_option() -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"--model.zero_shot.folder.*nowhere"):
        check_tasks(ZeroShot(["toy_choice"], Path("nowhere")))


@pytest.mark.usefixtures("own_tasks_only")
def test_the_data_of_tasks_are_fetched_without_a_model_and_their_files_named(folder: Path) -> None:
    files = fetch_tasks(ZeroShot(["toy_choice"], folder))
    assert files
    assert all(path.is_file() for path in files)
    assert fetch_tasks(ZeroShot([], folder)) == []


@pytest.mark.usefixtures("own_tasks_only")
def test_data_of_a_task_that_cannot_be_had_are_an_error_that_names_it_and_the_way_out(folder: Path) -> None:
    (folder.parent / "documents.jsonl").unlink()
    with pytest.raises(ConnectionError, match=r"--model.zero_shot.tasks \['toy_choice'\] .*documents.jsonl") as raised:
        fetch_tasks(ZeroShot(["toy_choice"], folder))
    assert "sparc3 prepare" in str(raised.value)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    check_tasks(ZeroShot())
    with pytest.raises(ValueError, match=r'--model.zero_shot.tasks .*pip install "sparc3_lightning\[lmeval\]"'):
        check_tasks(ZeroShot(["arc_easy"]))


def test_no_task_needs_no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    check_tasks(ZeroShot((), Path("nowhere")))
