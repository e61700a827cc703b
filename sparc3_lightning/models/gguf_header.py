"""What a GGUF file says about itself: its metadata, and the names, shapes and places of its tensors."""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

# Of each kind of number: its letter in struct, by its code in the file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_NUMBERS = 1 << 22  # in one array: vocabularies stay far below, and transformers reads arrays one by one
_MOST_DIMENSIONS = 4


class Stored(NamedTuple):
    """A tensor of a file.

    Args:
        shape: As in torch, the dimension that moves fastest last.
        kind: Code of its number format or quantization.
        start: Where its bytes begin, counted from the beginning of the file.
        size: How many bytes they are.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What stands before the weights of a GGUF file.

    Args:
        path: Of the file.
        metadata: Its values by their keys.
        tensors: Its tensors by their names.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Stored]

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Read it, without the weights.

        Raises:
            ValueError: If the file is no GGUF file, damaged, or ends before its last tensor does.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return cls(path, *_Reader(content).header())
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path} is truncated, or not a GGUF file that can be read: {error}.") from None

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture; the keys about the model begin with it."""
        return str(self.metadata.get("general.architecture", ""))

    def floats(self, name: str) -> np.ndarray | None:
        """Return a tensor that is stored as float32, or None if there is none of that name and kind."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.kind != 0:
            return None
        return np.fromfile(self.path, dtype="<f4", count=math.prod(tensor.shape), offset=tensor.start)


class _Reader:
    """Reads one after the other, and nothing past the end; what is wrong is a ValueError without a full stop."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    def header(self) -> tuple[dict[str, Value], dict[str, Stored]]:
        if self.bytes(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are known (of numbers in little-endian order)")
        num_tensors, num_values = self.number("Q"), self.number("Q")
        metadata: dict[str, Value] = {}
        for _ in range(self.at_most(num_values, 13)):
            key = self.text("a key")
            if key in metadata:
                raise ValueError(f"it has the key {key!r} twice")
            metadata[key] = self.value(key, self.number("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(self.at_most(num_tensors, 24)):
            name = self.text("the name of a tensor")
            if name in found:
                raise ValueError(f"it has the tensor {name!r} twice")
            num_dimensions = self.number("I")
            if num_dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"the tensor {name!r} has {num_dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(num_dimensions))[::-1]
            found[name] = shape, self.number("I"), self.number("Q")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.place // alignment) * alignment
        return metadata, {name: self.stored(name, *of, start) for name, of in found.items()}

    def stored(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> Stored:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"the tensor {name!r} is of the unknown kind {kind}")
        in_block, size_of_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or 0 in shape or shape[-1] % in_block:
            raise ValueError(f"the tensor {name!r} has the shape {list(shape)}")
        size = math.prod(shape) // in_block * size_of_block
        if start + offset + size > len(self.content):
            raise ValueError(f"it ends before the tensor {name!r} does")
        return Stored(shape, kind, start + offset, size)

    def value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self.text(f"the value of {key!r}")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"the value of {key!r} is of the unknown kind {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return [self.text(f"an entry of {key!r}") for _ in range(self.at_most(count, 8))]
        if inner not in _NUMBERS:
            raise ValueError(f"{key!r} is an array of entries of the unknown kind {inner}")
        if count > _MOST_NUMBERS:
            raise ValueError(f"{key!r} is an array of {count} numbers")
        form = f"<{count}{_NUMBERS[inner]}"
        return list(struct.unpack(form, self.bytes(struct.calcsize(form))))

    def number(self, letter: str) -> int:
        (value,) = struct.unpack(f"<{letter}", self.bytes(struct.calcsize(f"<{letter}")))
        return value

    def text(self, what: str) -> str:
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def bytes(self, count: int) -> bytes:
        if count > len(self.content) - self.place:
            raise ValueError("it ends too early")
        self.place += count
        return self.content[self.place - count : self.place]

    def at_most(self, count: int, size: int) -> int:
        """Return how many entries there are, each of so many bytes or more, if the file is long enough for them."""
        if count > (len(self.content) - self.place) // size:
            raise ValueError("it ends too early")
        return count
