"""Starts tests/stages/run_on_ranks.py on several ranks, and compares what they wrote with what one process wrote."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "stages" / "run_on_ranks.py"


def torchrun(ranks: int, *arguments: object, check: bool = True, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run the script on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def check_tensors_are_same(alone: Path, together: Path) -> None:
    """Assert that two files have the same tensors, to 1e-6 of the norm of each."""
    first, second = load_file(alone), load_file(together)
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] - second[name]).norm() <= 1e-6 * first[name].norm(), (together, name)


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of results.json by its path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{at} {key}".strip())
    else:
        yield at, value


def check_results_are_same(alone: Path, together: Path) -> dict[str, Any]:
    """Assert that two evaluations found the same, with the same continuations; return the leaves of the results."""
    first, second = (dict(leaves(json.loads((folder / "results.json").read_text()))) for folder in (alone, together))
    assert second.keys() == first.keys()
    for name, value in first.items():
        tolerance = 1e-3 if "percent" in name else 1e-6
        if isinstance(value, float):
            value = pytest.approx(value, rel=tolerance, abs=tolerance)
        assert second[name] == value or name == "verdict", name
    assert continuations(alone) == continuations(together)
    return first


def continuations(folder: Path) -> list[list[Any]]:
    """Return the model, the prompt, the number and the text of each continuation of an evaluation, in its order."""
    rows = map(json.loads, (folder / "completions.jsonl").read_text().splitlines())
    return [[row[name] for name in ("model", "prompt_id", "continuation_index", "continuation")] for row in rows]
