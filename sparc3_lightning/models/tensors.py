"""Safetensors files whose tensors are changed in place, or written again one by one: a large file is never in memory.

The format: eight bytes with the length of the header; the header, JSON that says where the data of each tensor lies;
and the data (https://github.com/huggingface/safetensors).
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
METADATA = "__metadata__"  # an entry of the header that is no tensor
CHUNK = 1 << 26  # bytes that are in memory at a time


@dataclass(frozen=True)
class Added:
    """A tensor of zeros that is added to a file, of the dtype of another one in it."""

    like: str
    shape: list[int]


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor.

    Args:
        dtype: Such as ``F32``.
        shape: Of the tensor.
        begin: Where its data begins, in bytes behind the header.
        end: Where it ends.
    """

    dtype: str
    shape: list[int]
    begin: int
    end: int

    @property
    def num_bits(self) -> int:
        """Size of a value, which its dtype ends in or, as ``F8_E4M3``, has in it: ``BOOL`` is a byte."""
        return int((re.search(r"\d+", self.dtype) or ["8"])[0])

    def of(self, dtype: torch.dtype | None) -> "Entry":
        """Return the entry if floating-point numbers are written in a dtype; None keeps theirs."""
        if dtype is None or self.dtype not in DTYPES:
            return self
        end = self.begin + dtype.itemsize * math.prod(self.shape)
        return Entry(CODES[dtype], self.shape, self.begin, end)


class TensorFile:
    """The tensors of a safetensors file, which are read from it and written to it one at a time.

    Args:
        path: Of the file.

    Raises:
        OSError: If it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] | None = header.pop(METADATA, None)
            self.entries = {
                name: Entry(entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()
            }
            self.start: int = 8 + length
            end = max((entry.end for entry in self.entries.values()), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            raise OSError(f"The weight file {path} is damaged: fetch or copy it again ({error!s:.80}).") from None
        if path.stat().st_size != self.start + end:
            raise OSError(f"The weight file {path} is truncated: fetch or copy it again.")

    def read(self, name: str) -> Tensor:
        """Return a tensor of floating-point numbers."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(self.start + entry.begin)
            return _tensor(file.read(entry.end - entry.begin), entry).view(entry.shape)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor is the one in the file, of the same dtype and shape, bit for bit."""
        entry = self.entries[name]
        if (DTYPES.get(entry.dtype), entry.shape) != (tensor.dtype, list(tensor.shape)):
            return False
        return _bytes_of(tensor) == _bytes_of(self.read(name))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the same shape and dtype in the place of another."""
        entry = self.entries[name]
        assert list(tensor.shape) == entry.shape, f"{name} has shape {list(tensor.shape)}, expected {entry.shape}"
        assert tensor.dtype == DTYPES[entry.dtype], f"{name} is {tensor.dtype}, expected {entry.dtype}"
        with self.path.open("r+b") as file:
            file.seek(self.start + entry.begin)
            file.write(_bytes_of(tensor))

    def size(self, dtype: torch.dtype | None) -> int:
        """Return the size in bytes if the floating-point numbers are written in a dtype; None keeps theirs."""
        of_tensors = (entry.of(dtype) for entry in self.entries.values())
        return self.start + sum(entry.end - entry.begin for entry in of_tensors)


def rewrite(source: TensorFile, target: Path, dtype: torch.dtype | None, added: Mapping[str, Added]) -> None:
    """Write a file again, with floating-point numbers of another dtype, or with more tensors.

    Names and metadata stay. Wider numbers come first, in the order of the file, which keeps all of them aligned.

    Args:
        source: The file.
        target: Where to write.
        dtype: Of the floating-point numbers written; None keeps theirs.
        added: Further tensors, by name.
    """
    found = {name: entry.of(dtype) for name, entry in source.entries.items()}
    for name, new in added.items():
        like = source.entries[new.like]
        found[name] = Entry(like.dtype, new.shape, 0, 0).of(dtype or DTYPES[like.dtype])
    header: dict[str, object] = {} if source.metadata is None else {METADATA: source.metadata}
    order, offset = sorted(found, key=lambda name: -found[name].num_bits), 0
    for name in order:
        entry = found[name]
        end = offset + entry.end - entry.begin
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with source.path.open("rb") as reading, target.open("wb") as writing:
        writing.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            entry = found[name]
            if name in added:
                writing.write(bytes(entry.end - entry.begin))
                continue
            old = source.entries[name]
            reading.seek(source.start + old.begin)
            for part in _parts(reading, old.end - old.begin):
                same = entry.dtype == old.dtype
                writing.write(part if same else _bytes_of(_tensor(part, old).to(DTYPES[entry.dtype])))


def _parts(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """Read so many bytes of a file, in parts that hold whole numbers."""
    for begin in range(0, num_bytes, CHUNK):
        yield file.read(min(CHUNK, num_bytes - begin))


def _tensor(data: bytes, entry: Entry) -> Tensor:
    """Return values, shape ``[values]``, that can be written to."""
    dtype = DTYPES[entry.dtype]
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
