"""The benchmarks run; that of the GPU on a tiny model, so that it works where there is one."""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from random import Random

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).with_name("benchmarks")


def run(*command: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.fixture
def run_here(monkeypatch):
    """Run a benchmark in this process, which has imported most of what it needs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_benchmark(name: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *options])
        import_module(name).main()

    return run_benchmark


def test_one_command_runs_the_benchmarks_by_name_and_writes_json(tmp_path):
    said = run(str(BENCHMARKS), "--only", "gpu", "--json", str(tmp_path / "found.json"))
    assert "## gpu\n\nNo GPU is here: nothing was measured." in said
    assert set(json.loads((tmp_path / "found.json").read_text())) == {"machine", "python"}


def test_no_selection_has_one_score_file_for_both_sides(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, (general, behavior, _) in import_module("common").SELECTIONS.items():
        assert general != behavior, name  # which `sparc3 prune` refuses


def test_the_benchmark_of_compression_says_which_text_is_missing(run_here):
    with pytest.raises(SystemExit, match=r"--c4: nowhere\.jsonl does not exist; give the path of a copy\."):
        run_here("compression", "--c4", "nowhere.jsonl")


def test_the_benchmark_of_the_gpu_runs_on_a_tiny_model(run_here, tmp_path, capsys):
    run_here("gpu", "--shape", "tiny", "--json", str(tmp_path / "found.json"))
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() > {
        "floor",
        "signed",
        "magnitude",
        "magnitude of all weights",
        "magnitude, checkpointing",
        "naive",
    }
    assert all(f"| {name} |" in said for name in found if name not in ("device", "rate"))


def test_the_benchmark_of_families_trains_measures_and_keeps_its_checkpoints(run_here, tmp_path, monkeypatch, capsys):
    random = Random(0)
    # So many words that every expert is chosen for one.
    neutral = ["".join(random.choices("abcdefghijklmnop", k=3)) for _ in range(300)]
    toxic = [*neutral, *["stupid", "idiots", "ugly", "fool"] * 40]
    rows = [[i % 2, " ".join(random.choices(toxic if i % 2 else neutral, k=70 if i % 4 else 16))] for i in range(8000)]
    with (tmp_path / "comments.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["is_offensive", "text"], *rows])
    passages = [{"passage": " ".join(random.choices(neutral, k=90))} for _ in range(4000)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    options = {
        "models": "mixtral",
        "minutes": "0.02",
        "budgets": "0.1",
        "prompts": "4",
        "continuations": "2",
        "draws": "1",
        "of_draws": "2",
        "tokens": "1024",
        "cache": str(tmp_path / "cache"),
        "folder": str(tmp_path / "stages"),
        "comments": str(tmp_path / "comments.csv"),
        "passages": str(tmp_path / "passages.jsonl"),
        "json": str(tmp_path / "found.json"),
    }
    families = import_module("families")
    monkeypatch.setattr(families, "OF_DOCUMENTS", (64, 32, 64))
    monkeypatch.setattr(families, "speak", lambda verbose: None)  # it hides what libraries say until the process ends
    run_here("families", *(part for name, of in options.items() for part in (f"--{name}", of)))
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["selection"] for row in found] == ["published", "recommended"]
    assert all(row["off"].startswith(f"{row['spread']['neurons']:,} neuron") for row in found if row["spread"])
    assert any(row["spread"] for row in found)
    assert "| mixtral | 10 | published |" in said
    assert "perplexity" in said.partition("steps")[2]
    (checkpoint,) = (tmp_path / "cache").iterdir()
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    of_recipe = {"cache": tmp_path / "cache", "minutes": float(options["minutes"])}
    there = Namespace(**of_recipe, comments=options["comments"], passages=options["passages"])
    (tmp_path / "comments.csv").unlink()  # what is there is not trained again
    assert families.train("mixtral", there) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
