"""Writing files so that a reader never meets half of one, and a full or read-only disk is noticed before the work."""

import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

LEFT_OUT = {"is_left_out": True}  # metadata of a field that a JSON file has only where it is not None


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


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty folder in which ``beside`` is prepared, and renamed to it; what is left there is removed.

    Its name carries the process and the host. What a killed process of this host left there is swept first.

    Args:
        beside: The path that is prepared. Its parent is made if it does not exist.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    sweep(beside.parent)
    temporary = Path(
        tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name[:40]}.{os.getpid()}-{platform.node()}.")
    )
    try:
        temporary.chmod(0o755)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the temporary folders that processes of this host left in a folder when they were killed."""
    made = re.compile(rf"\..*\.(\d+)-{re.escape(platform.node())}\.[a-z0-9_]{{8}}")
    for path in folder.iterdir():
        if (match := made.fullmatch(path.name)) and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def to_json(value: object) -> str:
    """Return plain values for JSON: NaN and infinity become null, a path a string, a dataclass a dict."""
    return json.dumps(_as_json(value), indent=2) + "\n"


def _as_json(value: Any) -> Any:
    if is_dataclass(value):
        found = {
            entry.name: _as_json(getattr(value, entry.name))
            for entry in fields(value)
            if entry.metadata != LEFT_OUT or getattr(value, entry.name) is not None
        }
        return {**found, **{name: getattr(value, name) for name in getattr(value, "WRITTEN_TOO", ())}}
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class JsonFile:
    """The content of one of our JSON files: plain values, and lists, dicts and dataclasses of them.

    The properties that a dataclass names in ``WRITTEN_TOO`` are written beside its fields, and not read.
    """

    FORMAT: ClassVar[str]  # such as "sparc3_lightning results 1", for results.json

    def to_json(self) -> str:
        """Return the content as JSON, in which NaN and infinity are null."""
        return to_json({"format": self.FORMAT, **_as_json(self)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of ``to_json``; null becomes NaN where the field is a number.

        Raises:
            ValueError: If it is of another format, or damaged.
        """
        content = json.loads(text)
        found = content.get("format") if isinstance(content, dict) else None
        if found != cls.FORMAT:
            raise ValueError(f"its format is {found!r}")
        return _read(cls, content)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If it is of another format, or damaged.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            name = f"{cls.FORMAT.split()[1]}.json"
            raise ValueError(f"{path} is not a {name} of format {cls.FORMAT!r}: {error!s:.200}") from None


def _read(kind: Any, value: Any, place: str = "") -> Any:
    """Convert a JSON value to the type of an annotation, with every dataclass inside.

    Args:
        kind: The annotation.
        value: What JSON gave.
        place: Where it lies, such as ``doses.0.kl``.

    Raises:
        ValueError: If the value is of another type, or lacks a field; the place is named.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:  # every union here is one with None
        return None if value is None else _read(inner[0], value, place)

    def inside(kind: Any, key: object, value: Any) -> Any:
        return _read(kind, value, f"{place}.{key}" if place else str(key))

    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        types = get_type_hints(kind)
        keys = [key for key in fields(kind) if key.name in value or key.metadata != LEFT_OUT]
        if missing := [key.name for key in keys if key.name not in value]:
            raise ValueError(f"{place or 'it'} has no {missing[0]}")
        return kind(**{key.name: inside(types[key.name], key.name, value[key.name]) for key in keys})
    if origin is list and isinstance(value, list):
        return [inside(inner[0], i, item) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: inside(inner[1], key, item) for key, item in value.items()}
    if kind is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(value)
    if origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{place} cannot be {value!r:.80}")


def check_absent(path: Path) -> None:
    """Raise FileExistsError if a run has written this file or folder already."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists already; nothing was overwritten. Choose another folder with "
            "--trainer.logger.init_args.version."
        )


SAVE_DIR = "--trainer.logger.init_args.save_dir"  # where the folders of the runs lie


def check_space(folder: Path, num_bytes: int, option: str = SAVE_DIR) -> None:
    """Raise OSError, which names the option of the folder, unless its disk has so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"The output needs {num_bytes / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free. Free space there, "
            f"or choose another folder with {option}."
        )


def check_writable(folder: Path, num_bytes: int = 1 << 20, option: str = SAVE_DIR) -> None:
    """Raise unless files of some size can be written to a folder, which is made if it does not exist.

    Args:
        folder: Where to write.
        num_bytes: Size of the file that is tried.
        option: That chooses the folder, for the error.

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
            f"another folder with {option}."
        ) from error
