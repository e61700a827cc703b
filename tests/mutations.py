"""Ways to damage a valid file: its bytes, or the JSON in it, which may then be given a checksum that matches.

Each way is a function of a path and of a generator of random numbers, which decides what is damaged.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

from sparc3_lightning.attribution.tensor_file import save_tensors
from sparc3_lightning.files import checksum

Damage = Callable[[Path, Random], None]
DEEP = "[" * 100_000
# What stands where something else did. JSON has the last five in its own way, or not at all.
VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 1.5, -0.5, 1e308, "", "x", "../x", "a\nb", {"a": 1}, {"": [None]}]
VALUES += [10**400, -(10**30), float("nan"), float("inf"), "\ud800", "@deep@"]


def damage_bytes(path: Path, draw: Random) -> None:
    """Flip a bit, cut the end off, drop, insert or repeat bytes, up to three times."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content) + 1)
        end = place + draw.randint(1, 40)
        kind = draw.randrange(5)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            del content[place:end]
        elif kind == 3:
            content[place:place] = draw.randbytes(draw.randint(1, 6))
        else:
            content[place:place] = content[place:end]
    path.write_bytes(content)


def change_json(content: Any, draw: Random) -> Any:
    """Replace a value by one of another type, drop, rename or repeat a key, or nest a value deeper, up to twice."""
    whole = [content]
    for _ in range(draw.randint(1, 2)):
        parent: Any = whole
        key: Any = 0
        while isinstance(parent[key], dict | list) and parent[key] and draw.random() < 0.9:
            parent = parent[key]
            key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        kind = draw.randrange(5)
        if kind <= 1 or parent is whole:
            parent[key] = deepcopy(draw.choice(VALUES)) if draw.random() < 0.8 else []
        elif kind == 2:
            del parent[key]
        elif kind == 3:
            parent[key] = [parent[key]]
        elif isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        else:
            parent.insert(key, parent[key])
    return whole[0]


def text_of(content: Any, forged: bool = False) -> str:
    """Return content as JSON; with a checksum that matches if it is to be forged, and holds no NaN."""
    if forged and isinstance(content, dict):
        with suppress(ValueError):
            content = {**content, "sha256": checksum(content)}
    return json.dumps(content).replace('"@deep@"', DEEP)


def damage_json(path: Path, draw: Random, forged: bool = False) -> None:
    """Change the JSON of a file."""
    path.write_text(text_of(change_json(json.loads(path.read_text()), draw), forged))


def damage_line(path: Path, draw: Random, forged: bool = False) -> None:
    """Change the JSON of one line of a file."""
    lines = path.read_text().splitlines()
    i = draw.randrange(len(lines))
    lines[i] = text_of(change_json(json.loads(lines[i]), draw), forged)
    path.write_text("".join(line + "\n" for line in lines))


def damage_header(path: Path, draw: Random) -> None:
    """Change the header of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = text_of(change_json(json.loads(content[8 : 8 + size]), draw)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def forge_metadata(path: Path, draw: Random) -> None:
    """Change the JSON in what a safetensors file says of itself, and give the file the checksum of that."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("sha256", None)  # a shard has none: its index does
    name = draw.choice(sorted(metadata))
    old = json.loads(metadata[name]) if metadata[name][0] in "[{0123456789" else metadata[name]
    save_tensors(path, load_file(path), {**metadata, name: text_of(change_json(old, draw))})
