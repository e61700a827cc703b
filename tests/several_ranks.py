"""Starts tests/run_on_ranks.py on several ranks, and compares what they wrote with what one process wrote."""

import json
import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_on_ranks
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

SCRIPT = Path(run_on_ranks.__file__)
# Ranks are forked from a process that has imported this: each would take as long for that as for its work.
multiprocessing.set_forkserver_preload(["sparc3_lightning.stages.attribute", "sparc3_lightning.stages.evaluate"])


def on_ranks(ranks: int, *arguments: object) -> None:
    """Run the script on so many ranks.

    Raises:
        ProcessRaisedException: What one of them raised; the others are ended then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(run_on_ranks.rank, (ranks, port, list(map(str, arguments))), ranks, start_method="forkserver")


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script on so many ranks as a user starts them, to see how they end when something goes wrong."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=400)


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
