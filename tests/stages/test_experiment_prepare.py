"""The whole experiment: what is fetched beforehand."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from experiments import ALL, LOGS, MORE, run
from helpers import Unshuffled, sentence

from sparc3_lightning import cli
from sparc3_lightning.data.base import HubDataset
from sparc3_lightning.evaluation.zero_shot import ZeroShot
from sparc3_lightning.stages import experiment
from sparc3_lightning.stages.experiment import MANIFEST

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")


def test_prepare_writes_a_manifest_of_every_file_with_its_size_and_sha256(tiny_checkpoint):
    done = cli.main(["prepare", "--config", "experiment.yaml"])
    manifest = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())
    files = manifest["files"]
    for file in files:
        content = Path(file["path"]).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    found = {(file["purpose"], Path(file["path"]).name) for file in files}
    assert {
        ("checkpoint", "model.safetensors"),
        ("checkpoint", "tokenizer.json"),
        ("checkpoint", "config.json"),
        ("scorers", "toxicity.ckpt"),
        ("general_0", "general.txt"),
        ("general_1", "general.txt"),
        ("behavior", "prompts.jsonl"),
        ("text", "text.txt"),
        ("prompts", "prompts.jsonl"),
    } <= found
    assert not (LOGS / "attribute").exists()


@pytest.mark.usefixtures("more_inputs")
def test_prepare_fetches_every_judge_the_non_toxic_prompts_and_the_other_text_too():
    shutil.copy("text.txt", "letters.txt")
    other = ["--data.other_text", "WikiText2", "--data.other_text.source", "letters.txt"]
    done = cli.main(["prepare", "--config", "experiment.yaml", *MORE, *other])
    files = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())["files"]
    found = {(file["purpose"], Path(file["path"]).name) for file in files}
    assert {("scorers", "toxicity.ckpt"), ("prompts", "mild.jsonl"), ("other_text", "letters.txt")} <= found
    folders = {Path(file["path"]).parent.name for file in files if file["purpose"] == "scorers"}
    assert folders == {"toxicity_checkpoint", "other"}


def test_prepare_fetches_the_data_of_the_zero_shot_tasks_too(monkeypatch):
    asked = []

    def fetch_tasks(zero_shot: ZeroShot) -> list[Path]:
        asked.append(zero_shot)
        return [Path("text.txt")]

    monkeypatch.setattr(experiment, "fetch_tasks", fetch_tasks)
    options = ["--evaluate.zero_shot.tasks", "[mine]", "--evaluate.zero_shot.folder", "tasks"]
    done = cli.main(["prepare", "--config", "experiment.yaml", *options])
    files = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())["files"]
    assert asked == [ZeroShot(["mine"], Path("tasks"))]
    assert [file["path"] for file in files if file["purpose"] == "zero_shot"] == ["text.txt"]


@pytest.mark.slow
def test_prepare_keeps_the_documents_that_the_stages_of_a_revision_look_for(monkeypatch, verbs_run):
    monkeypatch.setenv("SPARC3_CACHE", "cache")
    rows = Unshuffled({"text": sentence(i, 20 + i)} for i in range(12))
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: rows)
    options = ["--model.revision", "v1", "--general.init_args.source", "null", "--model.general_seeds", "[0]"]
    options += [
        "--budget_text",
        "C4",
        "--budget_text.init_args.num_samples",
        "8",
        "--budget_text.init_args.seq_len",
        "16",
    ]
    options += ["--prune.budget.max_perplexity_increase", "0.5"]
    cli.main(["prepare", "--config", "experiment.yaml", *options])
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: pytest.fail("the stream was opened again"))
    run(*options)
    assert verbs_run == ALL[1:]


def test_prepare_says_what_cannot_be_had():
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt"):
        cli.main(["prepare", "--config", "experiment.yaml", "--general.init_args.source", "nowhere.txt"])
