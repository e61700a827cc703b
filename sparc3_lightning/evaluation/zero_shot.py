"""Zero-shot accuracy by lm-eval-harness (the extra ``lmeval``), to see what else pruning changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparc3_lightning.errors import OptionError, OptionFileNotFoundError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot accuracy by lm-eval-harness, before and after pruning (needs the extra ``lmeval``).

    Args:
        tasks: Names of tasks of the harness, such as piqa; without any, nothing is measured.
        folder: Folder with the YAML of tasks of your own, which may name Python code that then runs.
        limit: Documents per task; None for all.
    """

    tasks: Sequence[str] = ()
    folder: Path | None = None
    limit: int | None = None


def check_tasks(zero_shot: ZeroShot) -> None:
    """Raise ValueError unless lm-eval is installed and knows the tasks; nothing is downloaded."""
    if not zero_shot.tasks:
        return
    if find_spec("lm_eval") is None:
        raise OptionError("zero_shot.tasks", 'needs lm-eval-harness: pip install "sparc3_lightning[lmeval]".')
    if zero_shot.folder is not None and not zero_shot.folder.is_dir():
        raise OptionFileNotFoundError("zero_shot.folder", f": {zero_shot.folder} is no folder.")
    known = set(task_manager(zero_shot.folder).all_tasks)
    unknown = [task for task in zero_shot.tasks if task not in known]
    if unknown:
        raise OptionError(
            "zero_shot.tasks",
            f": lm-eval-harness knows no task {unknown[0]!r}; 'lm_eval ls tasks' lists them, and "
            "--.zero_shot.folder names a folder with tasks of your own.",
        )


def fetch_tasks(zero_shot: ZeroShot) -> list[Path]:
    """Build the tasks, fetch their data, and return the data files.

    Raises:
        ValueError: As ``check_tasks``.
        ConnectionError: If the data are not in the cache and cannot be fetched, or a task cannot be built.
    """
    check_tasks(zero_shot)
    if not zero_shot.tasks:
        return []
    try:
        built = task_manager(zero_shot.folder).load(list(zero_shot.tasks))["tasks"]
    except Exception as error:  # a task is code of others, and raises what it will
        raise ConnectionError(
            f"--model.zero_shot.tasks {list(zero_shot.tasks)} cannot be built ({type(error).__name__}: "
            f"{error!s:.200}). If their data cannot be had here, run 'sparc3 prepare' with --evaluate.zero_shot.tasks "
            "where there is a network."
        ) from error
    splits = [split for task in built.values() for split in dict(task.dataset or {}).values()]
    return list(dict.fromkeys(Path(file["filename"]) for split in splits for file in getattr(split, "cache_files", ())))


def accuracy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", zero_shot: ZeroShot
) -> dict[str, dict[str, float]]:
    """Return the accuracy of a model on each task, without examples in the prompt.

    Args:
        model: Causal language model of transformers.
        tokenizer: Its tokenizer.
        zero_shot: The tasks.

    Returns:
        Per task ``accuracy``, in [0, 1], and ``standard_error``; and every other number that the task reports.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=list(zero_shot.tasks),
        num_fewshot=0,
        limit=zero_shot.limit,
        task_manager=task_manager(zero_shot.folder),
        bootstrap_iters=1000,
        verbosity="ERROR",
    )
    return {task: _plain(measures) for task, measures in found["results"].items()}


def _plain(measures: Mapping[str, object]) -> dict[str, float]:
    numbers = {key.removesuffix(",none"): value for key, value in measures.items() if isinstance(value, float)}
    if "acc" in numbers:
        numbers["accuracy"] = numbers.pop("acc")
        numbers["standard_error"] = numbers.pop("acc_stderr", float("nan"))
    return numbers


@cache  # an index of thousands of tasks, which takes seconds
def task_manager(folder: Path | None) -> "TaskManager":
    """Return lm-eval-harness's index of its own tasks and of those in a folder, which is made once a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))
