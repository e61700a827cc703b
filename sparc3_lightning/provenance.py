"""Which versions, commit and seed a result was made with."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparc3_lightning.files import kept_sha256

PACKAGES = ("sparc3_lightning", "torch", "lightning", "transformers", "lxt", "detoxify", "datasets", "safetensors")
OF_RESULTS = ("sparc3_lightning", "torch", "transformers", "lxt")  # another version may give other numbers


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


def versions_of_results() -> dict[str, str]:
    """Return the versions of the code that numbers come from: what another one computed is not taken over."""
    return {name: versions()[name] for name in OF_RESULTS}


def contents(paths: Iterable[Path]) -> str:
    """Return what identifies files by their names and all of their bytes, in whatever folder they lie.

    A file is read once while it stays as it is.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name} {kept_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> list[str]:
    """Return the names in which two identities differ, mine first."""
    names = dict.fromkeys((*mine, *theirs))
    return [name for name in names if theirs.get(name) != mine.get(name)]


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
