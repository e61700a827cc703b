"""The header of a GGUF file is read within its bounds: damaged and hostile files are one sentence, and at once."""

import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import metadata_of, tensors_of, tiny, write

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.gguf_header import Header

STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


def text(value: str | bytes, length: int | None = None) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def header(values: bytes = b"", tensors: bytes = b"", num_values: int = 0, num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + values + tensors


def value(kind: int, content: bytes, key: str | bytes = "a.b") -> bytes:
    return header(text(key) + struct.pack("<I", kind) + content, num_values=1)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return value(ARRAY, struct.pack("<IQ", kind, count) + content)


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, num_dimensions: int | None = None) -> bytes:
    count = len(shape) if num_dimensions is None else num_dimensions
    entry = text("t") + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)
    return header(tensors=entry, num_tensors=1) + bytes(200)


def test_metadata_and_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = tiny()
    path = write(tmp_path / "a.gguf", model, {"a.flag": True, "a.numbers": [0.5, 2.0], "a.text": "ä\n"})
    found = Header.read(path)
    for key, expected in (metadata_of(model) | {"a.flag": True, "a.numbers": [0.5, 2.0], "a.text": "ä\n"}).items():
        assert found.metadata[key] == (pytest.approx(expected) if isinstance(expected, float) else expected), key
    assert found.architecture == "llama"
    assert {name: stored.shape for name, stored in found.tensors.items()} == {
        name: weight.shape for name, weight in tensors_of(model).items()
    }
    assert np.array_equal(found.floats("output_norm.weight"), tensors_of(model)["output_norm.weight"])
    assert found.floats("absent") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GGU", "too early"),
        (b"PK\x03\x04" + bytes(100), "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (header(num_values=1 << 60), "too early"),
        (header(num_tensors=1 << 60), "too early"),
        (header(num_values=(1 << 64) - 1, num_tensors=(1 << 64) - 1), "too early"),
        (value(STRING, text("a", 1 << 60)), "too early"),
        (value(STRING, text("a", (1 << 64) - 1)), "too early"),
        (header(text("a", 1 << 60), num_values=1), "too early"),
        (value(STRING, text(b"\xff\xfe")), "not UTF-8"),
        (value(UINT32, bytes(4), key=b"\xff"), "not UTF-8"),
        (array(STRING, 1, text(b"\xc3")), "not UTF-8"),
        (array(STRING, 1 << 60, bytes(100)), "too early"),
        (array(UINT8, 1 << 60, bytes(100)), "is an array of 1152921504606846976 numbers"),
        (array(UINT32, 1 << 20, bytes(100)), "too early"),
        (array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 1000), "unknown kind 9"),
        (array(77, 1), "unknown kind 77"),
        (value(77, bytes(8)), "unknown kind 77"),
        (header(2 * (text("a") + struct.pack("<II", UINT32, 1)), num_values=2), "the key 'a' twice"),
        (header(tensors=2 * (text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)), num_tensors=2) + bytes(99), "'t' twice"),
        (tensor((1 << 60, 1 << 60)), "ends before the tensor 't'"),
        (tensor((2,), offset=1 << 60), "ends before the tensor 't'"),
        (tensor((2,), num_dimensions=1 << 31), "has 2147483648 dimensions"),
        (tensor((0, 4)), r"has the shape \[4, 0\]"),
        (tensor(()), r"has the shape \[\]"),
        (tensor((33,), kind=8), r"has the shape \[33\]"),
        (tensor((2,), kind=12345), "unknown kind 12345"),
        (header(text("general.alignment") + struct.pack("<II", UINT32, 0), num_values=1), "alignment is 0"),
        (header(text("general.alignment") + struct.pack("<I", STRING) + text("x"), num_values=1), "alignment is 'x'"),
    ],
)
def test_a_hostile_file_is_one_sentence_at_once(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"hostile.gguf is truncated, or not a GGUF file that can be read: .*{reason}"
    ):
        Header.read(path)
    assert time.monotonic() - start < 1


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change a few places of a file's header, or its length."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(changed), 12_000)) if draw.random() < 0.8 else draw.randrange(2000)
        match draw.randrange(5):
            case 0:
                changed[place] = draw.randrange(256)
            case 1:
                changed[place : place + 8] = struct.pack("<Q", draw.choice([0, 1, 1 << 31, 1 << 60, (1 << 64) - 1]))
            case 2:
                del changed[place : place + draw.randint(1, 64)]
            case 3:
                changed[place:place] = changed[place : place + draw.randint(1, 64)]
            case _:
                changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_a_header_that_was_changed_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    content, draw = write(tmp_path / "a.gguf", tiny()).read_bytes(), random.Random(0)
    path, messages = tmp_path / "changed.gguf", []
    for _ in range(200):
        path.write_bytes(mutated(content, draw))
        try:
            Header.read(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert [message for message in messages if not message.startswith(f"{path} is truncated, or not a GGUF")] == []


@pytest.mark.slow
def test_a_file_that_was_changed_anywhere_is_loaded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    content, draw = write(tmp_path / "a.gguf", tiny()).read_bytes(), random.Random(1)
    path, messages = tmp_path / "changed.gguf", []
    for _ in range(500):
        path.write_bytes(mutated(content, draw))
        start = time.monotonic()
        try:
            _ = Checkpoint(str(path)).location
        except (ValueError, OSError) as error:
            messages.append(str(error))
        assert time.monotonic() - start < 20
    assert len(messages) > 125
    assert [message for message in messages if "\n" in message or str(path) not in message] == []


def test_every_kind_of_quantization_that_gguf_knows_has_a_size() -> None:
    assert set(gguf.GGML_QUANT_SIZES) == set(gguf.GGMLQuantizationType)
