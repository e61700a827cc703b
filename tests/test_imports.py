"""The order of the rooms: imports go one way, in no circle, and no room takes a private name of another."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparc3_lightning

PACKAGE = Path(sparc3_lightning.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the top down: a module imports from its own room and from rooms below. The last line is the ground.
ORDER = (
    {"__main__"},
    {"cli"},
    {"stages"},
    {"report"},
    {"evaluation"},
    {"selection"},
    {"attribution", "scorers", "data"},
    {"models"},
    {"sources", "files", "provenance", "distributed", "signals", "errors"},
)


@cache
def imports_of(name: str) -> set[tuple[str, str]]:
    """Return the modules of this package, without its name, that a module imports from, and what it takes."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparc3_lightning":
            module = (node.module or "").removeprefix("sparc3_lightning").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.add((inner, "") if inner in MODULES else (module, alias.name))
    return found


def floor_of(name: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if name.split(".")[0] in rooms)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_a_module_imports_from_its_own_room_and_from_those_below(name):
    room = name.split(".")[0]
    for module, taken in imports_of(name) - {("__init__", "")}:
        if (other := module.split(".")[0]) not in ("", room):
            assert floor_of(name) < floor_of(other) or {room, other} <= ORDER[-1], f"{name} imports {module}"
            assert not taken.startswith("_"), f"{name} takes the private name {taken} of {module}"


def test_nine_modules_stand_beside_eight_rooms():
    tops = {name.split(".")[0] for name in MODULES} | {"__init__"}
    assert len({top for top in tops if (PACKAGE / f"{top}.py").is_file()}) == 9
    assert len({top for top in tops if (PACKAGE / top).is_dir()}) == 8


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {module for module, _ in imports_of(name)} - {name} for name in MODULES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_every_module_says_what_it_is_for(path):
    first, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")
    assert len(first) > 20, f"{path.name} does not say what it is for"
