"""The weight files of a checkpoint folder: those that are read, what they hold, and the hash of what a folder holds."""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from sparc3_lightning.files import kept_sha256
from sparc3_lightning.sources import PICKLED, first_line

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# Beside the weights, what a model computes depends on these: its shape, its end tokens, and the ids of a text.
DESCRIBING = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)
_OF_ONE_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


class Weight(NamedTuple):
    """A tensor in a weight file.

    Args:
        file: The file.
        shape: Of the tensor.
        dtype: As safetensors calls it, such as ``BF16``.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def weight_paths(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads of a checkpoint folder, in the order in which it reads them.

    ``model.safetensors`` comes before an index. No other file is read: no variant such as ``model.fp16.safetensors``,
    and none that the index does not name.

    Raises:
        FileNotFoundError: If there is none, or the index names one that is not there.
        ValueError: If the index is damaged.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"The checkpoint folder {folder} {PICKLED}")
    if any(_OF_ONE_RANK.match(file) for file in files):
        raise ValueError(
            f"The checkpoint folder {folder} holds the shards of a training run ({files[0]}): save the whole model "
            "with save_pretrained."
        )
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"The checkpoint folder {folder} holds {', '.join(files[:3])}, but neither {WHOLE} nor {INDEX}, and no "
            "other file is read: rename it, or save the model with save_pretrained."
        )
    named = indexed_files(folder / INDEX)
    missing = [file for file in named if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The checkpoint folder {folder} lacks {', '.join(missing[:3])}, which its index names: fetch or copy it "
            "again."
        )
    return [folder / file for file in named]


def indexed_files(index: Path) -> list[str]:
    """Return the names of the files that an index of weight files names.

    Raises:
        ValueError: If it is no such index, or names a file outside its folder.
    """
    content = read_json(index)
    tensors = content.get("weight_map") if isinstance(content, dict) else None
    if not (
        isinstance(content, dict)
        and isinstance(content.get("metadata"), dict)  # which transformers wants, though it may be empty
        and isinstance(tensors, dict)
        and tensors
        and all(isinstance(file, str) for file in tensors.values())
    ):
        raise ValueError(f"{index} is damaged: it must hold 'metadata', and in 'weight_map' the file of each tensor.")
    files = sorted(set(tensors.values()))
    outside = [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is outside its folder: correct it.")
    return files


def read_json(path: Path) -> object:
    """Return the content of a JSON file.

    Raises:
        ValueError: If it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {first_line(error).rstrip('.')}.") from None


def weights_of(folder: Path) -> dict[str, Weight]:
    """Return the tensors of the weight files of a checkpoint folder; of two of one name that which transformers takes.

    Raises:
        OSError, ValueError: As ``weight_paths``; or if a file is damaged.
    """
    weights = {}
    for path in weight_paths(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    tensor = file.get_slice(name)
                    weights[name] = Weight(path, tuple(tensor.get_shape()), str(tensor.get_dtype()))
        except SafetensorError as error:
            raise OSError(
                f"A weight file of {str(folder)!r} is damaged: fetch or copy it again ({path.name}: "
                f"{first_line(error)})."
            ) from None
    return weights


def fingerprint_of(folder: Path) -> str:
    """Return a hash of all that a checkpoint folder is read for: its weights, its configs and its tokenizer."""
    files = {path for kind in DESCRIBING for path in folder.glob(kind) if path.is_file()}
    weights = weight_paths(folder)
    if weights != [folder / WHOLE]:
        files.add(folder / INDEX)
    digest = hashlib.sha256()
    for path in sorted({*files, *weights}):
        digest.update(f"{path.relative_to(folder).as_posix()} {kept_sha256(path)}\n".encode())
    return f"files:{digest.hexdigest()[:16]}"
