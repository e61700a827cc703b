"""Imports point one way, and every module says what it is for."""

import ast
from pathlib import Path

import pytest

import sparc3_lightning

PACKAGE = Path(sparc3_lightning.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A module imports from its own layer or from layers below, never from above.
LAYERS = (
    {"cli"},
    {"experiment"},
    {"screening", "preflight", "local_files"},
    {"attribute", "prune", "budget", "evaluate", "sweep", "compare", "circuit", "compress", "data", "completions"},
    {"report"},
    {"score_groups", "weight_selection", "selected"},
    {
        "scores",
        "checkpoints",
        "scorers",
        "sources",
        "provenance",
        "sharding",
        "progress",
        "zero_shot",
        "classifiers",
        "activations",
    },
    {
        "overlap_findings",
        "overlap_tables",
        "overlap_figures",
        "circuit_tables",
        "findings",
        "verdict",
        "variants",
        "figures",
        "tables",
    },
    {"neuron_list", "preferences"},
    {"accumulator", "static_scores", "selections", "controls", "orders", "neurons", "heads", "weights"},
    {"lrp", "relevance", "targets", "metrics", "generation", "files", "intervals", "overlap", "sparsity", "hub_errors"},
    {"linear"},
)
# A script of its own that nothing imports.
SCRIPTS = {"train_scorer", "__main__"}
PURE = ("lrp", "relevance", "targets", "selections", "accumulator", "metrics", "generation", "neurons", "intervals")
PURE += ("controls", "overlap", "heads", "orders", "linear", "sparsity", "static_scores", "weights")
STAGES = ("attribute", "prune", "evaluate", "sweep", "compare", "circuit", "compress", "experiment", "cli", "data")


def imports_of(path: Path) -> set[str]:
    """Return the full names of all modules imported anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.add(node.module or "")
            if node.module == "sparc3_lightning":
                names |= {f"sparc3_lightning.{alias.name}" for alias in node.names}
    return names


def own_imports(name: str) -> set[str]:
    """Return the first part of the names of the package's own modules that a module imports."""
    prefix = "sparc3_lightning."
    return {found.removeprefix(prefix).split(".")[0] for found in imports_of(MODULES[name]) if found.startswith(prefix)}


def layer_of(name: str) -> int:
    part = name.split(".")[0]
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def test_every_module_has_its_place_in_a_layer():
    placed = set().union(*LAYERS) | SCRIPTS
    assert {name.split(".")[0] for name in MODULES if name != "__init__"} - placed - {""} == set()


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("", "__init__", *SCRIPTS)])
def test_imports_point_one_way(name):
    above = {other for other in own_imports(name) if layer_of(other) < layer_of(name)}
    assert not above, f"{name} imports {sorted(above)}, which are above it"


def test_no_two_modules_import_each_other():
    graph = {name: own_imports(name) for name in MODULES if "." not in name and name not in ("", "__init__")}
    graph["data"] = set().union(*(own_imports(name) for name in MODULES if name.startswith("data"))) - {"data"}

    def reachable(name: str, seen: frozenset[str]) -> None:
        for other in graph.get(name, ()):
            assert other not in seen, f"{name} imports {other}, which imports it"
            reachable(other, seen | {other})

    for name in graph:
        reachable(name, frozenset({name}))


@pytest.mark.parametrize("name", PURE)
def test_the_pure_modules_know_nothing_of_lightning_nor_of_the_stages(name):
    found = imports_of(MODULES[name])
    assert not [module for module in found if module.split(".")[0] in ("lightning", "pytorch_lightning")]
    assert not own_imports(name) & {*STAGES, "scores", "checkpoints", "scorers", "report", "sources"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_imports_a_script(name):
    assert not [other for other in MODULES if name in own_imports(other)]


def test_data_sets_know_nothing_of_the_stages():
    for name in MODULES:
        if name.startswith("data"):
            assert not own_imports(name) & {*STAGES} - {"data"}, name


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_every_module_has_a_docstring(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path.name} does not say what it is for"
    assert len(docstring.splitlines()[0]) > 20


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES.keys())
def test_a_module_is_short(path):
    assert len(path.read_text().splitlines()) <= 320
    assert path.stem not in ("utils", "helpers", "common")
