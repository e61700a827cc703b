"""Writing a checkpoint: pruned, or changed in any other way, in Hugging Face format."""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, prune_
from sparc3_lightning.models.neurons import check_have_biases, columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_takes_means(checkpoint: Checkpoint, modules: Iterable[str]) -> None:
    """Raise ValueError, without loading weights, unless neurons' means can be written into a checkpoint.

    Args:
        checkpoint: To write them into.
        modules: Layers of the neurons, by their fully qualified names.
    """
    skeleton = checkpoint.skeleton()
    check_have_biases(skeleton, columns_of(skeleton, modules).values())


def export_pruned(checkpoint: Checkpoint, neurons: Iterable[Component], folder: Path, *, dtype: torch.dtype) -> None:
    """Write the checkpoint with the neurons' weights set to zero, see ``export_edited``."""
    export_edited(checkpoint, lambda model: prune_(model, neurons), folder, dtype=dtype)


def export_edited(
    checkpoint: Checkpoint, edit_: Callable[["PreTrainedModel"], None], folder: Path, *, dtype: torch.dtype
) -> None:
    """Write the checkpoint with changed weights, and its tokenizer, in Hugging Face format.

    Args:
        checkpoint: To change.
        edit_: Changes the model in place.
        folder: Where to write; must not exist yet. It appears when it is complete.
        dtype: Of the weights written.

    Raises:
        FileExistsError: If the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; nothing was overwritten.")
    model = checkpoint.load(dtype)
    edit_(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o755)
        model.save_pretrained(temporary)
        checkpoint.tokenizer().save_pretrained(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
