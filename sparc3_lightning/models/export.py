"""Writing a checkpoint: pruned, or changed in any other way, in Hugging Face format."""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sparc3_lightning.models.checkpoints import check_unchanged, load_config, load_model, load_tokenizer, skeleton_of
from sparc3_lightning.models.components import Component, prune_
from sparc3_lightning.models.neurons import check_have_biases, columns_of


def check_takes_means(checkpoint: str, attributed: str, modules: Iterable[str]) -> None:
    """Raise ValueError, without loading weights, unless neurons' means can be written into a checkpoint.

    Args:
        checkpoint: See ``locate``.
        attributed: The fingerprint it was attributed with.
        modules: Layers of the neurons, by their fully qualified names.
    """
    skeleton = skeleton_of(load_config(checkpoint, check_unchanged(checkpoint, attributed)))
    check_have_biases(skeleton, columns_of(skeleton, modules).values())


def export_pruned(checkpoint: str, neurons: Iterable[Component], folder: Path, **options: Any) -> None:
    """Write the checkpoint with the neurons' weights set to zero, see ``export_edited``."""
    export_edited(checkpoint, lambda model: prune_(model, neurons), folder, **options)


def export_edited(
    checkpoint: str, edit_: Callable[[Any], None], folder: Path, *, dtype: torch.dtype, revision: str | None = None
) -> None:
    """Write the checkpoint with changed weights, and its tokenizer, in Hugging Face format.

    Args:
        checkpoint: See ``locate``.
        edit_: Changes the model in place.
        folder: Where to write; must not exist yet. It appears when it is complete.
        dtype: Of the weights written.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        FileExistsError: If the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; nothing was overwritten.")
    model = load_model(checkpoint, dtype, revision)
    edit_(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o755)
        model.save_pretrained(temporary)
        load_tokenizer(checkpoint, revision).save_pretrained(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
