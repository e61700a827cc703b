"""An attribution takes the memory that an estimate says: of SmolLM2's shape on 1, 2 and 4 ranks, and of experts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import memory_on_ranks
import pytest

CHECKPOINTING = {"gradient_checkpointing": True}
WEIGHTS = {"granularity": "weight", "layers": ["all"]}
# The C library keeps memory that is given back, and more of it the smaller the pieces are.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says the most memory since a moment")
@pytest.mark.parametrize(
    ("shape", "ranks", "cases"),
    [
        ("smollm2", 1, [{}, CHECKPOINTING, WEIGHTS]),
        ("smollm2", 2, [CHECKPOINTING]),
        ("smollm2", 4, [{}]),
        ("mixture", 1, [{}]),
    ],
    ids=["1", "2", "4", "experts"],
)
def test_memory_is_what_an_estimate_says(shape, ranks, cases, tmp_path):
    command = [sys.executable, memory_on_ranks.__file__, str(tmp_path / "found"), shape, str(ranks)]
    command += map(json.dumps, cases)
    subprocess.run(command, check=True, env={**os.environ, **AT_ONCE}, timeout=600)
    found = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert [row["options"] for row in found] == cases
    for row in found:
        # Beside the weights too, which alone are more than half of it.
        assert row["estimated"] == pytest.approx(row["measured"], rel=0.1), row
