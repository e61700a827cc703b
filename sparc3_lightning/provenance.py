"""Which versions, commit and seed a result was made with."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sparc3_lightning", "torch", "lightning", "transformers", "lxt", "detoxify", "datasets", "safetensors")


@cache
def versions() -> dict[str, str]:
    """Return the versions of this package, of those that its results depend on, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def git_hash() -> str | None:
    """Return the commit of the working tree this package runs from, with '-dirty' if it was changed, or None."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", "provenance.py"], capture_output=True
        )
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None if tracked.returncode == 0 and done.returncode == 0 else None


def revision_of(checkpoint_fingerprint: str) -> str | None:
    """Return the commit of a checkpoint at the hub by its fingerprint; None for a local one."""
    return checkpoint_fingerprint.partition("commit:")[2] or None


def evaluation_settings(module: Any, data: Any) -> dict[str, Any]:
    """Return everything that the figures of an evaluation rest on, for results.json.

    Args:
        module: The ``Evaluation``.
        data: Its data module.
    """
    parts = {name: getattr(data, name) for name in ("text", "prompts", "pairs")}
    return {
        "behavior": module.behavior,
        "protocol": {
            **data.describe(),
            "toxicity": {
                **module.sampling._asdict(),
                "num_continuations": module.num_continuations,
                "num_seeds": module.num_continuations // module.per_seed,
                "scorers": module.scorer_names,
                "seed": run_seed(),
            },
        },
        "checkpoint": module.checkpoint,
        "checkpoint_fingerprint": module.fingerprint,
        "neurons": str(module.neurons_path) if module.neurons_path else None,
        "num_neurons": module.num_neurons,
        "granularity": module.granularity,
        "config": {
            "verb": module.verb,
            "model": dict(module.hparams),
            **{name: dict(part.hparams) for name, part in parts.items() if part is not None},
        },
        "versions": versions(),
        "git_hash": git_hash(),
    }


def run_seed() -> int:
    """Return the seed that seed_everything set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
