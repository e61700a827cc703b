"""Which versions, commit and seed a result was made with."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def run_seed() -> int:
    """Return the seed that seed_everything set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
