"""The benchmarks run; that of the GPU on a tiny model, so that it works where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).with_name("benchmarks")


def run(*command: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_one_command_runs_the_benchmarks_by_name_and_writes_json(tmp_path):
    said = run(str(BENCHMARKS), "--only", "gpu", "--json", str(tmp_path / "found.json"))
    assert "## gpu\n\nNo GPU is here: nothing was measured." in said
    assert set(json.loads((tmp_path / "found.json").read_text())) == {"machine", "python"}


def test_the_benchmark_of_compression_says_which_text_is_missing():
    command = [sys.executable, str(BENCHMARKS / "compression.py"), "--c4", "nowhere.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--c4: nowhere.jsonl does not exist; give the path of a copy." in done.stderr


def test_the_benchmark_of_the_gpu_runs_on_a_tiny_model(tmp_path):
    said = run(str(BENCHMARKS / "gpu.py"), "--shape", "tiny", "--json", str(tmp_path / "found.json"))
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
