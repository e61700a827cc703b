"""The local files and folders that the config of a stage reads, by their content."""

from pathlib import Path
from typing import Any

from sparc3_lightning.checkpoints import fingerprint
from sparc3_lightning.classifiers import split_label
from sparc3_lightning.sources import is_local, sha256_of

KEYS = ("checkpoint", "source", "nontoxic_source", "scorer", "second_scorer", "lm_eval_folder")


def digests_of(value: Any, made: Path | None) -> list[str]:
    """Identify the content of every local file or folder that a config reads: sources, checkpoint and scorer.

    Not that of the file that an earlier stage of the same experiment makes: its path tells what it will hold.
    """
    if not isinstance(value, dict):
        return []
    found = []
    for key in KEYS:
        path = value.get(key)
        if isinstance(path, str) and key.endswith("scorer"):
            path = split_label(path)[0]
        if isinstance(path, str) and is_local(path) and path != str(made):
            found.append(fingerprint(path) if key == "checkpoint" else _content(Path(path).expanduser()))
    return found + [digest for item in value.values() for digest in digests_of(item, made)]


def _content(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return "".join(sha256_of(file) for file in files)
