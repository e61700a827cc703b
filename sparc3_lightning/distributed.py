"""Several processes that work on one job: how each is set up, and how they gather tensors and values."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

T = TypeVar("T")


def check_slurm_tasks(devices: object, num_nodes: int, environment: Mapping[str, str]) -> None:
    """Raise unless srun started one task for each device.

    Args:
        devices: Option ``--trainer.devices``; only a number can be checked.
        num_nodes: Option ``--trainer.num_nodes``.
        environment: Variables of the process.

    Raises:
        ValueError: If the numbers differ. Without this the ranks would wait for each other until a timeout.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    if tasks is None or not str(devices).isdigit() or int(str(devices)) * num_nodes == int(tasks):
        return
    nodes = environment.get("SLURM_STEP_NUM_NODES", "1")
    raise ValueError(
        f"srun started {tasks} task(s) on {nodes} node(s), but --trainer.devices {devices} x --trainer.num_nodes "
        f"{num_nodes} asks for {int(str(devices)) * num_nodes}: give srun --ntasks-per-node={devices} "
        f"--nodes={num_nodes}, or change these options."
    )


def usable_accelerator(accelerator: object) -> object:
    """Return the accelerator to take: the CPU where ``auto`` would be an Apple GPU, which has no float64.

    Args:
        accelerator: Option ``--trainer.accelerator``.

    Raises:
        ValueError: If such a GPU is asked for by name.
    """
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    is_apple = MPSAccelerator.is_available() and not CUDAAccelerator.is_available()
    if not is_apple or accelerator not in ("auto", "gpu", "mps"):
        return accelerator
    if accelerator != "auto":
        raise ValueError(
            f"--trainer.accelerator {accelerator}: an Apple GPU has no float64, in which sums are kept and tokens are "
            "drawn. Use cpu."
        )
    rank_zero_info("The CPU is used: an Apple GPU has no float64, in which sums are kept and tokens are drawn.")
    return "cpu"


def check_same_on_all_ranks(what: str, value: object) -> None:
    """Raise ValueError unless every rank has the same value, for example the hash of a file that each reads."""
    values = gather([value])
    different = [rank for rank, theirs in enumerate(values) if theirs != values[0]]
    if different:
        raise ValueError(
            f"Rank {different[0]} sees another {what} than rank 0 ({values[different[0]]!r}, {values[0]!r}): put the "
            "files where every node sees the same ones."
        )


def gather(rows: list[T]) -> list[T]:
    """Return the rows of all ranks, on each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    parts: list[list[T]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def gather_rows(own: Tensor, num_rows: int) -> Tensor:
    """Put the rows of all ranks together."""
    ranks = num_ranks()
    if ranks == 1:
        return own
    rows = own.new_empty(len(own) * ranks, own.shape[1])
    torch.distributed.all_gather_into_tensor(rows, own)
    return rows[:num_rows]


def num_ranks() -> int:
    """Return the number of processes that work on this job."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1
