"""Several processes that work on one job: how each is set up, and how they gather tensors and values."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor

T = TypeVar("T")
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # numbers of steps from here on are the script of a job, the shell of salloc and so on


def check_slurm_tasks(devices: object, num_nodes: int, environment: Mapping[str, str]) -> None:
    """Raise unless srun started one task for each device, where a Slurm job has several tasks.

    Args:
        devices: Option ``--trainer.devices``; only a number can be checked.
        num_nodes: Option ``--trainer.num_nodes``.
        environment: Variables of the process.

    Raises:
        ValueError: If the numbers differ, or srun was left out. Without this the ranks would wait for each other until
            a timeout.
    """
    if not _is_of_srun(environment):
        _check_is_alone(num_nodes, environment)
        return
    tasks = environment["SLURM_STEP_NUM_TASKS"]
    if not str(devices).isdigit() or int(str(devices)) * num_nodes == int(tasks):
        return
    nodes = environment.get("SLURM_STEP_NUM_NODES", "1")
    raise ValueError(
        f"srun started {tasks} task(s) on {nodes} node(s), but --trainer.devices {devices} x --trainer.num_nodes "
        f"{num_nodes} asks for {int(str(devices)) * num_nodes}: give srun --ntasks-per-node={devices} "
        f"--nodes={num_nodes}, or change these options."
    )


def check_is_single(verb: str, environment: Mapping[str, str]) -> None:
    """Raise if a verb that works in one process was started as several, which would all write the same files.

    Args:
        verb: What is started.
        environment: Variables of the process.

    Raises:
        ValueError: If srun or torchrun started several.
    """
    by_torchrun = int(environment["WORLD_SIZE"]) if {"LOCAL_WORLD_SIZE", "WORLD_SIZE"} <= environment.keys() else 1
    number = int(environment["SLURM_STEP_NUM_TASKS"]) if _is_of_srun(environment) else by_torchrun
    if number > 1:
        plan = " (configs/slurm/pipeline.sh gives each stage its tasks)" if verb == "run" else ""
        raise ValueError(
            f"'sparc3 {verb}' works in one process, but was started as {number}, which would write the same files: "
            f"start it once, with 'srun --ntasks=1' in a Slurm job{plan}."
        )


def _is_of_srun(environment: Mapping[str, str]) -> bool:
    """Tell whether srun started this process; the script of a job and the shell of salloc may be steps as well."""
    step = environment.get("SLURM_STEP_ID", "0")
    return "SLURM_STEP_NUM_TASKS" in environment and step.isdigit() and int(step) < FIRST_SPECIAL_STEP


def _check_is_alone(num_nodes: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError if a process that srun did not start would wait for others that nobody starts."""
    nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    per_node = environment.get("SLURM_NTASKS_PER_NODE") or "1"
    tasks = int(environment.get("SLURM_NTASKS") or int(per_node) * int(nodes))
    # In a job of such a name Lightning starts the processes of this node itself.
    starts_itself = environment.get("SLURM_JOB_NAME") in ("bash", "interactive") and num_nodes == 1
    if tasks > 1 and not starts_itself:
        raise ValueError(
            f"This Slurm job has {tasks} tasks, but srun did not start this process, which would wait for the others "
            "for ever: put srun before sparc3, or 'srun --ntasks=1' for a single process."
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


def is_rank_zero() -> bool:
    """Tell whether this is rank 0, also before the ranks know each other."""
    return getattr(rank_zero_only, "rank", 0) == 0


def gather(rows: list[T]) -> list[T]:
    """Return the rows of all ranks, on each of them."""
    if (ranks := num_ranks()) == 1:
        return rows
    parts: list[list[T]] = [[]] * ranks
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
