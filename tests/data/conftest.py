"""What tests of several data modules need: a file of prompts."""

from pathlib import Path

import pytest
from helpers import write_jsonl
from prompt_rows import nested_rows


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of prompts, four of which have a toxicity of at least 0.9."""
    return write_jsonl(tmp_path / "prompts.jsonl", nested_rows())
