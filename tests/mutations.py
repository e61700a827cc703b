"""Ways to damage a valid file: its bytes, or the JSON in it, which may then get a checksum that matches."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sparc3_lightning.attribution.tensor_file import save_tensors
from sparc3_lightning.files import checksum

Damage = Callable[[Path], None]
PLACES = st.integers(0, 1 << 16)
DEEP = "[" * 100_000
# What stands where something else did. JSON has the last five in its own way, or not at all.
VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 1.5, -0.5, 1e308, "", "x", "../x", "a\nb", [], {}, [[]], [None]]
VALUES += [{"a": 1}, {"": []}, 10**400, -(10**30), float("nan"), float("inf"), "\ud800", "@deep@"]


@st.composite
def damaged_bytes(draw: st.DrawFn) -> Damage:
    """Flip bits, cut, insert or repeat bytes, up to three times."""
    steps = draw(st.lists(st.tuples(st.integers(0, 4), PLACES, PLACES, st.binary(max_size=6)), min_size=1, max_size=3))

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        for kind, first, second, added in steps:
            place = first % (len(content) + 1)
            end = place + second % 40
            if kind == 0 and content:
                content[place % len(content)] ^= 1 << second % 8
            elif kind == 1:
                del content[place:]
            elif kind == 2:
                del content[place:end]
            elif kind == 3:
                content[place:place] = added
            else:
                content[place:place] = content[place:end]
        path.write_bytes(content)

    return damage


@st.composite
def changes_of_json(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Replace a value by one of another type, drop, rename or repeat a key, or nest a value deeper, up to twice."""
    steps = draw(st.lists(st.tuples(st.integers(0, 4), PLACES, st.sampled_from(VALUES)), min_size=1, max_size=2))

    def change(content: Any) -> Any:
        whole = [copy.deepcopy(content)]
        for kind, place, value in steps:
            places = list(_places(whole))
            parent, key = places[place % len(places)]
            if kind <= 1 or parent is whole:
                parent[key] = value
            elif kind == 2:
                del parent[key]
            elif kind == 3:
                parent[key] = [parent[key]]
            elif isinstance(parent, dict):
                parent[f"{key}x"] = parent.pop(key)
            else:
                parent.insert(key, parent[key])
        return whole[0]

    return change


def _places(value: Any) -> Any:
    """Yield every list or dict with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def text_of(content: Any, forged: bool = False) -> str:
    """Return content as JSON; with a checksum that matches if it is to be forged, and holds no NaN."""
    if forged and isinstance(content, dict):
        with suppress(ValueError):
            content = {**content, "sha256": checksum(content)}
    return json.dumps(content).replace('"@deep@"', DEEP)


@st.composite
def damaged_json(draw: st.DrawFn, forged: bool = False) -> Damage:
    """Change the JSON of a file."""
    change = draw(changes_of_json())

    def damage(path: Path) -> None:
        path.write_text(text_of(change(json.loads(path.read_text())), forged))

    return damage


@st.composite
def damaged_lines(draw: st.DrawFn, forged: bool = False) -> Damage:
    """Change the JSON of one line of a file."""
    change, place = draw(changes_of_json()), draw(PLACES)

    def damage(path: Path) -> None:
        lines = path.read_text().splitlines()
        i = place % len(lines)
        lines[i] = text_of(change(json.loads(lines[i])), forged)
        path.write_text("".join(line + "\n" for line in lines))

    return damage


@st.composite
def damaged_header(draw: st.DrawFn) -> Damage:
    """Change the header of a safetensors file."""
    change = draw(changes_of_json())

    def damage(path: Path) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = text_of(change(json.loads(content[8 : 8 + size]))).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])

    return damage


@st.composite
def forged_metadata(draw: st.DrawFn) -> Damage:
    """Change the JSON in what a safetensors file says of itself, and give the file the checksum of that."""
    change, place = draw(changes_of_json()), draw(PLACES)

    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        metadata.pop("sha256", None)  # a shard has none: its index does
        name = sorted(metadata)[place % len(metadata)]
        old = json.loads(metadata[name]) if metadata[name][0] in "[{0123456789" else metadata[name]
        save_tensors(path, load_file(path), {**metadata, name: text_of(change(old))})

    return damage
