"""Mutated configs of a valid checkpoint: a model is built, or there is one sentence, and never a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparc3_lightning.models.checkpoints import Checkpoint

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["llama", "gpt2", "gemma3", "bert", "gelu", "sdpa", "float16", "linear", "dynamic", "yarn"]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def mutations(draw: Any, content: dict[str, Any]) -> bytes:
    """Return the JSON of a config with some values changed, removed or added, and sometimes a byte."""
    mutated = dict(content)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(content)) | st.text(max_size=8) | st.sampled_from(ADDED))
        if draw(st.booleans()):
            mutated[key] = draw(VALUES)
        else:
            mutated.pop(key, None)
    text = bytearray(json.dumps(mutated).encode())
    if draw(st.integers(0, 4)) == 0:
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return bytes(text)


ADDED = ["auto_map", "quantization_config", "attn_implementation", "rope_scaling", "layer_types", "num_labels"]
ADDED += ["id2label", "torch_dtype", "sub_configs", "text_config", "tokenizer_class", "head_dim", "is_decoder"]


@pytest.mark.slow
def test_a_mutated_config_builds_a_model_or_is_one_sentence(tiny_checkpoint: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "mutated"))
    content = json.loads((folder / "config.json").read_text())

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(mutations(content))
    def check(text: bytes) -> None:
        (folder / "config.json").write_bytes(text)
        message = ""
        try:
            Checkpoint(str(folder)).load(torch.float32)
        except (ValueError, OSError) as error:
            message = str(error)
        assert "\n" not in message

    check()
