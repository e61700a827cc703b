"""Writing files so that a reader never meets half of one, and reading only what was written.

A full or read-only disk is noticed before the work. What is written to be read again carries a checksum, and the types
and ranges of what is read are those of the annotations. The digest of a large file is kept in the folder of
fetched files.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    NotRequired,
    Self,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

LEFT_OUT = {"is_left_out": True}  # metadata of a field that a JSON file has only where it is not None
_WORTH_KEEPING = 1 << 20  # bytes; the hash of a smaller file is as quickly computed as looked up
_SURELY_OLD = 2 * 10**9  # nanoseconds; the clocks of some file systems count in steps of two seconds
CHECKSUM = "sha256"  # key of the checksum, the last one of a file or line


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have in a file; NaN stands for what is not known, and is in any range."""

    least: float
    most: float = math.inf


Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]


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

    Its name carries the process, its start, since numbers of processes are used again, and the host. What a killed
    process of this host left there is swept first.

    Args:
        beside: The path that is prepared. Its parent is made if it does not exist.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    sweep(beside.parent)
    temporary = Path(
        tempfile.mkdtemp(
            dir=beside.parent, prefix=f".{beside.name[:40]}.{os.getpid()}-{_began(os.getpid())}-{platform.node()}."
        )
    )
    try:
        temporary.chmod(0o755)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the temporary folders that processes of this host left in a folder when they were killed."""
    made = re.compile(rf"\..*\.(\d+)-(\d+)-{re.escape(platform.node())}\.[a-z0-9_]{{8}}")
    for path in folder.iterdir():
        if (match := made.fullmatch(path.name)) and not _is_alive(int(match[1]), int(match[2])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int, began: int) -> bool:
    """Tell whether a process lives that began at this time."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return _began(process) in (0, began)  # 0 where a machine hides the processes of others


def _began(process: int) -> int:
    """Return when a process began, in ticks since this machine did; 0 where there is no /proc."""
    try:
        # The name of the program, in brackets, may hold blanks; the start is the 20th field behind it.
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except OSError:
        return 0


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


def parse_json(text: str | bytes) -> object:
    """Parse JSON that was written here: NaN, infinity and a key that comes twice are errors too.

    Args:
        text: The JSON; bytes are UTF-8.

    Raises:
        ValueError: If it is no JSON, or is nested too deeply to be read.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=without_doubles)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs of a JSON object as a dict; raise ValueError if a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r:.80} twice")
    return found


def checksum(content: Mapping[str, object]) -> str:
    """Return the sha256 of plain values, whatever the order of their keys and the white space between them.

    Raises:
        ValueError: If a number is not finite.
    """
    plain = {name: value for name, value in content.items() if name != CHECKSUM}
    try:
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:  # which parsing met by a hair's breadth
        raise ValueError("it is nested too deeply") from None
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, object]) -> dict[str, object]:
    """Return values as JSON has them, see ``to_json``, with their checksum behind them."""
    plain = json.loads(json.dumps(_as_json(content)))
    return {**plain, CHECKSUM: checksum(plain)}


def unsealed(content: object) -> dict[str, object]:
    """Return the values without their checksum.

    Raises:
        ValueError: If this is no JSON object, or its checksum is not there or does not match.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it is a JSON {type(content).__name__}, expected an object")
    check_checksum(content.get(CHECKSUM), checksum(content))
    return {name: value for name, value in content.items() if name != CHECKSUM}


def check_checksum(found: object, expected: str) -> None:
    """Raise ValueError unless a checksum that was read is the one of what was read."""
    if found is None:
        raise ValueError("it has no checksum: it was changed by hand, or written by an older version")
    if found != expected:
        raise ValueError("its checksum does not match: it was changed or damaged after it was written")


def parse_sealed(text: str | bytes, format: str) -> dict[str, object]:
    """Return the content of a JSON file of ours.

    Args:
        text: Of the file.
        format: What it says it is.

    Raises:
        ValueError: If it is of another format, or was changed.
    """
    content = parse_json(text)
    found = content.get("format") if isinstance(content, dict) else None
    if found != format:
        raise ValueError(f"its format is {found!r:.80}")
    return unsealed(content)


@dataclass(frozen=True)
class JsonFile:
    """The content of one of our JSON files: plain values, and lists, dicts and dataclasses of them.

    The properties that a dataclass names in ``WRITTEN_TOO`` are written beside its fields, and not read.
    """

    FORMAT: ClassVar[str]  # such as "sparc3_lightning results 3", for results.json

    def to_json(self) -> str:
        """Return the content as JSON, in which NaN and infinity are null, with its checksum."""
        return to_json(sealed({"format": self.FORMAT, **_as_json(self)}))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the text of ``to_json``; null becomes NaN where the field is a number.

        Raises:
            ValueError: If it is of another format, or was changed.
        """
        return cast("Self", read_as(cls, parse_sealed(text, cls.FORMAT)))

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read the file.

        Raises:
            OSError: If it does not exist, or cannot be read.
            ValueError: If it is of another format, or was changed.
        """
        try:
            return cls.from_json(Path(path).read_bytes())
        except ValueError as error:
            name = f"{cls.FORMAT.split()[1]}.json"
            raise ValueError(f"{path} is not a {name} of format {cls.FORMAT!r}: {error!s:.200}") from None


@cache  # of rows there are many
def _types_of_row(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def read_as(kind: Any, value: Any, place: str = "") -> Any:
    """Convert a JSON value to the type of an annotation, with every dataclass and every typed dict inside.

    Args:
        kind: The annotation; ``Annotated`` with a ``Range`` limits a number.
        value: What JSON gave.
        place: Where it lies, such as ``doses.0.kl``.

    Raises:
        ValueError: If the value is of another type, out of its range, or lacks a field; the place is named.
    """
    origin, inner = get_origin(kind), get_args(kind)

    def inside(kind: Any, key: object, value: Any) -> Any:
        return read_as(kind, value, f"{place}.{key}" if place else str(key))

    if origin is NotRequired:
        return read_as(inner[0], value, place)
    if origin is Annotated:
        found, (_, limits) = read_as(inner[0], value, place), inner
        if found < limits.least or found > limits.most:
            end = "" if limits.most == math.inf else f" and at most {limits.most}"
            raise ValueError(f"{place} must be at least {limits.least}{end}, and is {found!r:.80}")
        return found
    if origin in (UnionType, Union):  # every union here is one with None
        return None if value is None else read_as(inner[0], value, place)
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
    elif is_dataclass(kind) or is_typeddict(kind):
        if isinstance(value, dict):
            if is_typeddict(kind):
                types = _types_of_row(kind)
                names = [name for name in types if name in value or name in kind.__required_keys__]
            else:
                types = get_type_hints(kind, include_extras=True)
                names = [key.name for key in fields(kind) if key.name in value or key.metadata != LEFT_OUT]
            if missing := [name for name in names if name not in value]:
                raise ValueError(f"{place or 'it'} has no {missing[0]}")
            return kind(**{name: inside(types[name], name, value[name]) for name in names})
    elif origin is list:
        if isinstance(value, list):
            return [inside(inner[0], i, item) for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: inside(inner[1], key, item) for key, item in value.items()}
    elif kind is float:
        if value is None:
            return math.nan
        # Not of an integer that is beyond every float, nor of 1e999, which is read as infinity.
        if type(value) in (int, float) and abs(value) <= _LARGEST:
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{place or 'it'} cannot be {value!r:.80}")


_LARGEST = sys.float_info.max


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


def cache_folder() -> Path:
    """Return the folder of fetched files: ``$SPARC3_CACHE``, by default ``~/.cache/sparc3_lightning``.

    Where there is no home folder, ``.cache`` lies in the current one.
    """
    if given := os.environ.get("SPARC3_CACHE"):
        return at_home(given)
    try:
        return at_home("~/.cache/sparc3_lightning")
    except ValueError:
        return Path(".cache/sparc3_lightning").absolute()


def at_home(path: str | Path) -> Path:
    """Return a path with the home folder in place of ~, if it begins with that.

    Raises:
        ValueError: If there is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home folder (is HOME set?). Give the whole path.") from None


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_sha256(path: Path) -> str:
    """Return the sha256 of a file, as 64 hexadecimal digits; that of a large one is computed once, and kept.

    It lies in the cache. It is computed again when the file has another path, size, time of change or inode, and as
    long as its last change is so recent that one more might not show in its time. What is kept is sealed with all of
    these, so that a damaged entry is none. Of several processes one computes it, and the others wait.
    """
    path = path.resolve()
    status = path.stat()
    if status.st_size < _WORTH_KEEPING:
        return sha256_of(path)
    identity = _identity(path, status)
    kept = cache_folder() / "hashes" / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]

    def sealed(digest: str) -> str:
        seal = hashlib.sha256(f"{identity}\n{digest}".encode(errors="surrogateescape")).hexdigest()
        return f"{digest} {seal}\n"

    def look_up() -> str | None:
        with suppress(OSError, ValueError):
            content = kept.read_text()
            if content == sealed(content[:64]):
                return content[:64]
        return None

    if (digest := look_up()) is not None:
        return digest
    with _alone_in(kept.parent):
        if (digest := look_up()) is not None:  # another process was first
            return digest
        is_old = time.time_ns() - status.st_mtime_ns > _SURELY_OLD
        digest = sha256_of(path)
        if is_old and _identity(path, path.stat()) == identity:
            with suppress(OSError):  # a cache that cannot be written to costs time only
                write_atomically(kept, sealed(digest))
    return digest


def _identity(path: Path, status: os.stat_result) -> str:
    return f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ctime_ns}\n{status.st_ino}"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time into a block, as far as the file system of a folder knows locks."""
    handle = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
