"""The local files and folders that the config of a stage reads, by their content."""

from pathlib import Path
from typing import Any

from sparc3_lightning.attribution.targets import LEXICAL
from sparc3_lightning.models.checkpoints import fingerprint
from sparc3_lightning.scorers.classifiers import split_label
from sparc3_lightning.sources import is_local, sha256_of

SCORERS = ("scorer", "second_scorer", "lexicon")
KEYS = ("checkpoint", "tokenizer", "source", "nontoxic_source", *SCORERS, "lm_eval_folder")


def digests_of(value: Any, made: Path | None) -> list[str]:
    """Identify the content of every local file or folder that a config reads: sources, checkpoints and scorers.

    Not that of the file that an earlier stage of the same experiment makes: its path tells what it will hold.
    """
    if not isinstance(value, dict):
        return []
    found = []
    for key in KEYS:
        path = value.get(key)
        if not isinstance(path, str) or (key == "lexicon" and value.get("target") not in LEXICAL):
            continue
        path = split_label(path)[0] if key in SCORERS else path
        if is_local(path) and path != str(made):
            found.append(fingerprint(path) if key == "checkpoint" else _content(Path(path).expanduser(), key))
    return found + [digest for item in value.values() for digest in digests_of(item, made)]


def _content(path: Path, key: str) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    if key == "tokenizer" and path.is_dir():  # that of a checkpoint, whose weights may be large and are not read
        files = [file for file in files if file.suffix != ".safetensors"]
    return "".join(sha256_of(file) for file in files)
