"""Writing files so that a reader never meets half of one, and a full or read-only disk is noticed before the work."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the place of ``path`` when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file under a temporary name, and rename it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def to_json(value: Any) -> str:
    """Return plain values as JSON; NaN and infinity, which it has not, become null, a path a string, fields a dict."""
    return json.dumps(_as_json(value), indent=2) + "\n"


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _as_json(asdict(value))
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_absent(path: Path) -> None:
    """Raise FileExistsError if a run has written this file or folder already."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists already; nothing was overwritten. Choose another folder with "
            "--trainer.logger.init_args.version."
        )


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless the disk of a folder has so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"The output needs {num_bytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free. Free space there, "
            "or choose another folder with --trainer.logger.init_args.save_dir."
        )


def check_writable(folder: Path, num_bytes: int = 1 << 20) -> None:
    """Raise unless files of some size can be written to a folder, which is made if it does not exist.

    Raises:
        OSError: If the folder is read-only, is a file, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(num_bytes))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"Cannot write to the output folder {folder}: {error.strerror or error}. Free space there, or choose "
            "another folder with --trainer.logger.init_args.save_dir."
        ) from error
