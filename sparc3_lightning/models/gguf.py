"""A GGUF file as a checkpoint: dequantized once by transformers, and kept as a safetensors folder in the cache."""

import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparc3_lightning.sources import cache_folder, first_line, sha256_of


def dequantized(gguf: Path) -> Path:
    """Return the safetensors folder of a GGUF file, which is written to the cache when it is first asked for.

    Raises:
        ValueError: If it is truncated, or transformers cannot read it.
    """
    status = gguf.stat()
    folder = cache_folder() / "gguf" / _digest(gguf, status.st_size, status.st_mtime_ns)[:16]
    if folder.exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".dequantizing-"))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"{gguf} is truncated, or not a GGUF file that transformers can read: {first_line(error)}"
            ) from None
        # save_pretrained refuses a model that says it is quantized, and so does transformers when it loads it again.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError:
        if not folder.exists():  # unless another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Return the sha256 of a file, computed once as long as its size and time of change stay the same."""
    return sha256_of(path)
