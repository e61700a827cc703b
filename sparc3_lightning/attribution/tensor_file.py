"""Safetensors files of ours: tensors, and a header that says what they are and holds the checksum of it all."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparc3_lightning.files import CHECKSUM, check_checksum, write_atomically
from sparc3_lightning.sources import first_line

# What safetensors and torch raise where a header that can be read says what the file does not hold.
ERRORS = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError)


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the sha256 of tensors, of their names, dtypes and shapes, and of what a header says of them."""
    digest = hashlib.sha256(json.dumps(dict(metadata or {}), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors on any device, and a header, under a temporary name first.

    Args:
        path: Of the file.
        tensors: By name.
        metadata: What the header says; ``format`` is part of it.
    """
    own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(own, {**metadata, CHECKSUM: digest_of(own, metadata)}))


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file that another process may replace meanwhile.

    safetensors opens a path twice, for the header and for the data. Both are of one file here.
    """
    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as tensors:
        yield tensors


def load_tensors(path: Path, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and what their header says.

    Args:
        path: Of the file.
        format: What the header must say; a lower number at its end is an older version.

    Raises:
        ValueError: If the file is truncated, of another format, or was changed.
    """
    try:
        with opened(path) as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except ERRORS as error:
        raise ValueError(f"{path} is not a safetensors file, or is truncated: {first_line(error):.200}") from None
    _check_version(path, metadata.get("format"), format)
    if metadata.get("format") != format:
        kind = format.split()[1]
        raise ValueError(f"{path} is a safetensors file, but not {kind}: its header does not say {format!r}.")
    try:
        found = metadata.pop(CHECKSUM, None)
        check_checksum(found, digest_of(tensors, metadata))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}.") from None
    return tensors, metadata


def _check_version(path: Path, found: object, expected: str) -> None:
    """Raise ValueError if a file has the format of an older version."""
    name, _, number = expected.rpartition(" ")
    theirs = str(found).removeprefix(f"{name} ")
    if theirs.isdecimal() and int(theirs) < int(number):
        raise ValueError(f"{path} was written by an older version in format {theirs}; attribute again.")
