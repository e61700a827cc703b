"""Batch sizes: ``auto`` finds the largest that fits by trying; where memory runs out, the same items go in halves."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from sparc3_lightning.distributed import gather, num_ranks
from sparc3_lightning.errors import OptionError
from sparc3_lightning.sources import first_line

BatchSize = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"
MOST = 64  # items: a run can be stopped, and goes on later, between two batches
# Tokens with which to begin. On a CPU more are slower: attribution by SmolLM2-135M on 93 prompts of some 30 tokens
# takes 9.2 s by 8, 8.0 s by 31 and 17.1 s by 93. An accelerator has enough to do with as many, and memory tells.
TOKENS_ON_CPU, TOKENS = 1024, 65536
# Tensors of float32 as wide as the vocabulary that a target of relevance has at each token, forward and backward.
WIDE = 6
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
T = TypeVar("T")
B = TypeVar("B", bound=Mapping[str, object])


def largest_size(longest: int, device: torch.device) -> int:
    """Return the batch size that ``auto`` begins with: the same on every rank, whatever its memory.

    Args:
        longest: Tokens of the longest item.
        device: Of the model.
    """
    tokens = TOKENS_ON_CPU if device.type == "cpu" else TOKENS
    return min(MOST, max(1, tokens // max(1, longest)))


def fits_on_cpu(longest: int, vocab_size: int) -> int:
    """Return how many items half of the free memory is enough for, at least 1; other ranks on the machine share it.

    A CPU need not refuse memory that it lacks: the system may end the process in place of that.
    """
    free = free_memory()
    if free is None:
        return MOST
    return max(1, free // 2 // num_ranks() // (4 * WIDE * vocab_size * max(1, longest)))


def free_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes of memory that this process may still take, by the system and by its container; None if unknown.

    Args:
        proc: What Linux says of its memory.
        cgroup: Folder in which version 2 of control groups says it of a container, or a Slurm job.
    """
    found = []
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError, IndexError):
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found += [] if limit == "max" else [max(0, int(limit) - int(used))]
    except (OSError, ValueError):
        pass  # no container
    return min(found, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on an accelerator or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def part_of(batch: B, rows: slice, num_items: int) -> B:
    """Return some items of a batch, with the padding that they have there.

    Args:
        batch: Lists and tensors with one or more rows an item, and values that all items share.
        rows: Which items.
        num_items: How many there are.
    """
    if rows.start == 0 and rows.stop >= num_items:
        return batch

    def part(value: object) -> object:
        if isinstance(value, Tensor):
            each = len(value) // num_items  # a pair of sentences has two rows
            return value[each * rows.start : each * rows.stop]
        return value[rows] if isinstance(value, list) else value

    return cast("B", {name: part(value) for name, value in batch.items()})


class Batching:
    """How many items pass through a model at a time, and what happens where memory runs out.

    ``auto`` halves the size and takes the same items again. It says once with how many it goes on.

    Args:
        size: Items at a time, at the beginning.
        is_auto: Whether the size may be halved.
        group: Group of the option ``batch_size``, for what is said.
    """

    def __init__(self, size: int, is_auto: bool, group: str = "data") -> None:
        self.size = size
        self.is_auto = is_auto
        self.group = group
        self._said: int | None = None

    def agree(self) -> None:
        """Take the smallest size of all ranks, which must call this together."""
        self.size = min(gather([self.size]))

    @property
    def notes(self) -> dict[str, int]:
        """What is recorded beside the options of the data: the size that ``auto`` found."""
        return {"auto_batch_size": self.size} if self.is_auto else {}

    def each(self, num_items: int, do: Callable[[slice], T]) -> Iterator[T]:
        """Yield what a function makes of the items of a batch, some at a time.

        Args:
            num_items: Items in the batch.
            do: Takes the place of some items in the batch. It is called again for parts of the same items if memory
                runs out in it, so it must change nothing that outlives it before its last allocation.

        Raises:
            OptionError: If memory runs out with a size that was given, or with a single item.
        """
        start = 0
        while start < num_items:
            rows = slice(start, min(start + self.size, num_items))
            ran_out = ""
            try:
                found = do(rows)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                ran_out = first_line(error)
            # Only here: the error, while it is handled, holds on to the tensors of the function that it left.
            if ran_out:
                self._halve(rows.stop - rows.start, ran_out)
                continue
            if self.is_auto and self._said != self.size:
                lowered = "" if self._said is None else f", lowered from {self._said}"
                rank_zero_info(f"--{self.group}.batch_size auto: {self.size} at a time{lowered}.")
                self._said = self.size
            yield found
            start = rows.stop

    def alone(self, do: Callable[[], T]) -> T:
        """Return what a function makes of a single item.

        Raises:
            OptionError: If memory runs out.
        """
        try:
            return do()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._refusal(first_line(error)) from None

    def _halve(self, tried: int, ran_out: str) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1 or not self.is_auto:
            raise self._refusal(ran_out)
        self.size = tried // 2

    def _refusal(self, ran_out: str) -> OptionError:
        if not self.is_auto:
            what = f"Memory ran out with --.batch_size {self.size} ({ran_out:.200}): lower it, or give auto."
        else:
            what = (
                f"auto: memory ran out with a single one ({ran_out:.200}): take shorter texts, or a device with more "
            )
            what += "memory."
        return OptionError("batch_size", what, self.group)


def check_size(size: BatchSize) -> None:
    """Raise ValueError unless a batch size is ``auto`` or at least 1."""
    if size != AUTO and (isinstance(size, str) or size < 1):
        raise ValueError(f"batch_size must be auto or at least 1, got {size}.")
