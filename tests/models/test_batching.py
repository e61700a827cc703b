"""Items go through a function in batches that are halved where memory runs out; none is lost, none comes twice."""

import logging
from pathlib import Path

import pytest
import torch
from helpers import MODULES

from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models import batching
from sparc3_lightning.models.batching import Batching, check_size, fits_on_cpu, free_memory, largest_size, part_of
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.budget import PerplexityRise

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]


@pytest.fixture(autouse=True)
def nothing_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process with the objects of all tests that takes a second each time."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def fitting(most: int, tried: list[slice], error: BaseException = ERRORS[0]):
    def do(rows: slice) -> list[int]:
        tried.append(rows)
        if rows.stop - rows.start > most:
            raise error
        return list(range(rows.start, rows.stop))

    return do


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 16])
def test_every_item_comes_once_and_in_order_whatever_fits(most, error):
    size = Batching(16, is_auto=True)
    for num_items in (16, 13, 1, 0, 16):
        found = [item for part in size.each(num_items, fitting(most, [], error)) for item in part]
        assert found == list(range(num_items))
    assert size.size == max(2**i for i in range(5) if 2**i <= most)


def test_what_is_done_is_not_done_again_when_memory_runs_out_later():
    size, tried = Batching(4, is_auto=True), []

    def do(rows: slice) -> slice:
        tried.append((rows.start, rows.stop))
        if rows.start >= 4 and rows.stop - rows.start > 2:
            raise MemoryError
        return rows

    assert [(rows.start, rows.stop) for rows in size.each(10, do)] == [(0, 4), (4, 6), (6, 8), (8, 10)]
    assert tried == [(0, 4), (4, 8), (4, 6), (6, 8), (8, 10)]


def test_the_size_is_said_once_and_again_where_it_is_lowered(caplog):
    size = Batching(8, is_auto=True, group="data.prompts")
    with caplog.at_level(logging.INFO):
        for most in (4, 8, 2):
            list(size.each(8, fitting(most, [])))
    said = [record.message for record in caplog.records]
    assert said == [
        "--data.prompts.batch_size auto: 4 at a time.",
        "--data.prompts.batch_size auto: 2 at a time, lowered from 4.",
    ]


def test_the_memory_of_a_failed_try_is_given_back_before_the_next_one():
    alive: list[int] = []

    class Held:
        def __del__(self) -> None:
            alive.remove(id(self))

    def do(rows: slice) -> int:
        held = Held()
        alive.append(id(held))
        assert len(alive) == 1
        if rows.stop - rows.start > 1:
            raise MemoryError
        return rows.start

    assert list(Batching(8, is_auto=True).each(3, do)) == [0, 1, 2]


def test_a_number_is_not_halved_and_the_error_says_what_to_do():
    with pytest.raises(OptionError, match=r"--data.text.batch_size 4 \(CUDA out of memory.*lower it, or give auto"):
        list(Batching(4, is_auto=False, group="data.text").each(4, fitting(2, [])))


def test_not_even_one_item_that_fits_is_an_error():
    with pytest.raises(OptionError, match=r"--data.batch_size auto: memory ran out with a single one"):
        list(Batching(4, is_auto=True).each(4, fitting(0, [])))


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError(3)])
def test_another_error_is_none_of_its_business(error):
    with pytest.raises(type(error)):
        list(Batching(4, is_auto=True).each(4, fitting(2, [], error)))


def test_the_size_that_is_recorded_is_the_smallest_of_all_ranks(monkeypatch):
    monkeypatch.setattr(batching, "gather", lambda rows: [*rows, 3, 7])
    size = Batching(8, is_auto=True)
    size.agree()
    assert size.notes == {"auto_batch_size": 3}
    assert Batching(8, is_auto=False).notes == {}


def test_a_part_of_a_batch_has_the_rows_of_its_items_and_what_all_share():
    batch = {
        "ids": ["a", "b", "c"],
        "input_ids": torch.arange(12).view(6, 2),
        "start": torch.arange(3),
        "is_padded": True,
    }
    part = part_of(batch, slice(1, 3), 3)
    assert (part["ids"], part["start"].tolist(), part["is_padded"]) == (["b", "c"], [1, 2], True)
    assert part["input_ids"].tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert part_of(batch, slice(0, 3), 3) is batch


def test_auto_begins_by_tokens_with_at_most_64_items_and_at_least_one():
    cpu, accelerator = torch.device("cpu"), torch.device("cuda")
    assert [largest_size(longest, cpu) for longest in (0, 8, 32, 256, 1000, 5000)] == [64, 64, 32, 4, 1, 1]
    assert [largest_size(longest, accelerator) for longest in (8, 1024, 2048, 100_000)] == [64, 64, 32, 1]


def test_on_a_cpu_half_of_the_free_memory_is_enough(monkeypatch):
    monkeypatch.setattr(batching, "free_memory", lambda: 2 * 10 * 4 * 6 * 1000 * 30)
    assert fits_on_cpu(longest=30, vocab_size=1000) == 10
    assert fits_on_cpu(longest=30_000, vocab_size=1000) == 1
    monkeypatch.setattr(batching, "free_memory", lambda: None)
    assert fits_on_cpu(longest=30, vocab_size=1000) == 64


def test_free_memory_is_that_of_the_system_or_what_is_left_in_the_container():
    Path("meminfo").write_text("MemTotal:       100 kB\nMemAvailable:    50 kB\n")
    Path("memory.current").write_text("1024\n")
    assert free_memory(Path("meminfo"), Path("none")) == 50 * 1024
    for limit, free in (("11264", 10 * 1024), ("512", 0), ("max", 50 * 1024), ("1000000", 50 * 1024)):
        Path("memory.max").write_text(limit + "\n")
        assert free_memory(Path("meminfo"), Path()) == free
    assert (free_memory(Path("none"), Path("none")) or 1) > 0
    assert (free_memory() or 1) > 0


@pytest.mark.parametrize("size", [0, -1, "all", "8"])
def test_a_size_is_auto_or_at_least_1(size):
    with pytest.raises(ValueError, match="batch_size must be auto or at least 1"):
        check_size(size)


def test_a_rise_of_perplexity_and_the_costs_are_the_same_where_memory_runs_out(make_model):
    model = make_model()
    batch = pad_right([Sample(f"{i}", list(range(5 + i, 14))) for i in range(5)], 0)
    neurons = [Component(MODULES[i % 2], i, -1.0) for i in range(6)]

    def check(module: object, inputs: object, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["input_ids"]) > 2:
            raise MemoryError

    whole = PerplexityRise(model, [batch])
    expected = whole(neurons), whole.costs(neurons)
    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    size = Batching(5, is_auto=True)
    halved = PerplexityRise(model, [batch], size)
    found = halved(neurons), halved.costs(neurons)
    handle.remove()
    assert size.size == 2
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-8)
