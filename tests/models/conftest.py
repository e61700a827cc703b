"""What tests of checkpoints need: one to be changed."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copied(tiny_checkpoint: str, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copied"))
