"""Safetensors files that are changed in place or written again: always what the library itself would read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparc3_lightning.models.tensors import Added, TensorFile, rewrite

TENSORS = {
    "half": torch.linspace(-1, 1, 7).half(),
    "one": torch.tensor(3.0),
    "none": torch.empty(0, 4),
    "long": torch.arange(3),
    "brain": torch.linspace(0, 9, 10).bfloat16().view(2, 5),
    "yes": torch.tensor([True, False, True]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt", "by": "ä"})
    return tmp_path / "a.safetensors"


def test_a_tensor_is_read_and_another_put_in_its_place(path: Path) -> None:
    before = path.read_bytes()
    file = TensorFile(path)
    for name in ("half", "one", "none", "brain"):
        assert torch.equal(file.read(name), TENSORS[name])
        file.write(name, file.read(name))
    assert path.read_bytes() == before
    file.write("brain", torch.zeros(5, 2).bfloat16().T)
    found = load_file(path)
    assert not found.pop("brain").any()
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_file_is_written_again_in_another_dtype_with_more_tensors(path: Path, dtype: torch.dtype | None) -> None:
    target = path.with_name("b.safetensors")
    source = TensorFile(path)
    rewrite(source, target, dtype, {"new": Added("brain", [3])})
    found = load_file(target)
    new = found.pop("new")
    assert new.dtype == dtype or torch.bfloat16
    assert new.tolist() == [0, 0, 0]
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype))
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "ä"}
    assert target.stat().st_size - TensorFile(target).start == source.size(dtype) - source.start + new.nbytes


def test_a_file_that_is_written_again_as_it_is_keeps_every_byte_of_its_data_and_its_order(path: Path) -> None:
    target = path.with_name("b.safetensors")
    rewrite(TensorFile(path), target, None, {})
    assert list(TensorFile(target).entries) == list(TensorFile(path).entries)
    assert target.read_bytes()[TensorFile(target).start :] == path.read_bytes()[TensorFile(path).start :]


def test_a_tensor_larger_than_what_is_in_memory_at_a_time_is_converted(tmp_path: Path) -> None:
    big = torch.arange((1 << 24) + 5, dtype=torch.float32)
    save_file({"big": big}, tmp_path / "a.safetensors")
    rewrite(TensorFile(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", torch.bfloat16, {})
    assert torch.equal(load_file(tmp_path / "b.safetensors")["big"], big.bfloat16())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 2) + b"{}more",
    ],
)
def test_a_damaged_file_is_an_error_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(
        OSError, match=r"The weight file .*bad\.safetensors is (damaged|truncated): fetch or copy it again"
    ):
        TensorFile(tmp_path / "bad.safetensors")


def test_a_truncated_file_is_an_error(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="is truncated"):
        TensorFile(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(OSError, match="is truncated"):
        TensorFile(path)
