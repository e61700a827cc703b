"""The tables of a comparison of behaviours: text for the terminal, and CSV."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

from sparc3_lightning.models.components import Key
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.selection.overlap import RANDOM, WITHIN_LAYERS
from sparc3_lightning.tables import Table, cell, granularity_of

FIGURES = ("expected", "enrichment", "p_value", "log10_p_value")
BETWEEN = " & "
MAX_IN_FULL = 4  # lists whose 15 combinations are all printed; of more lists the CSV has them


def summary(results: dict[str, Any]) -> str:
    """Return the tables of a comparison as text: what the lists share, the correlations, and the classes by sign."""
    checkpoint = f" of {results['checkpoint']}" if results["checkpoint"] else ""
    of = f"{granularity_of(results)}s"
    parts = [f"{results['num_candidates']:,} {of}{checkpoint}", aligned(_overlap_table(results["overlaps"], of))]
    if "correlation" in results:
        parts.append(aligned(_correlation_table(results)))
        parts.append(aligned(_class_table(results["classes"], of)))
    return "\n\n".join(parts)


def aligned(rows: Table) -> str:
    """Return rows as text, the first of them over a line: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def p_value(log10_p: float) -> str:
    """Return a p-value as text, however small it is.

    Example:
        >>> p_value(-1.0), p_value(-408.25)
        ('0.1', '5.6e-409')
    """
    if log10_p > -3:
        return f"{10**log10_p:.3g}"
    exponent = math.floor(log10_p)
    mantissa = f"{10 ** (log10_p - exponent):.1f}"
    return f"1.0e{exponent + 1:03}" if mantissa == "10.0" else f"{mantissa}e{exponent:03}"


def overlaps_csv(overlaps: Sequence[dict[str, Any]]) -> str:
    """Return a row for each combination of lists; empty cells where a figure has no meaning."""
    found = [{"lists": BETWEEN.join(row["lists"]), "num_lists": len(row["lists"]), **_figures(row)} for row in overlaps]
    return _csv([list(found[-1]), *([row.get(name) for name in found[-1]] for row in found)])


def neurons_csv(
    names: Sequence[str],
    keys: Sequence[Key],
    lists: Sequence[NeuronList],
    differential_SN: Tensor | None,
) -> str:
    """Return a row for each pruned neuron: its rank in each list that holds it, and its differential relevance.

    Args:
        names: Of the behaviours.
        keys: Of each neuron, or weight.
        lists: Of each behaviour.
        differential_SN: Shape ``[behaviours, neurons]``, if it is known.
    """
    ranks = [{n.key: rank for rank, n in enumerate(pruned.neurons, start=1)} for pruned in lists]
    heads = [
        "module",
        "index",
        *(["input"] if len(keys[0]) > 2 else []),
        "num_lists",
        *(f"rank_{name}" for name in names),
    ]
    if differential_SN is not None:
        heads += [f"differential_{name}" for name in names]
    rows = []
    for i, key in enumerate(keys):
        places = [of.get(key) for of in ranks]
        values = [] if differential_SN is None else differential_SN[:, i].tolist()
        rows.append([*key, sum(place is not None for place in places), *places, *values])
    return _csv([heads, *rows])


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a combination, with those of each way to draw at random under names of their own."""
    known = [kind for kind in (RANDOM, WITHIN_LAYERS) if kind in row]
    figures = {f"{kind}_{figure}": row[kind][figure] for kind in known for figure in FIGURES}
    return {"inclusive": row["inclusive"], "exclusive": row["exclusive"], **figures}


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        [None if isinstance(value, float) and not math.isfinite(value) else value for value in row] for row in rows
    )
    return file.getvalue()


def _overlap_table(overlaps: Sequence[dict[str, Any]], of: str) -> Table:
    kinds = [kind for kind in (RANDOM, WITHIN_LAYERS) if kind in overlaps[-1]]
    heads = {RANDOM: ("by chance", "enrichment", "p"), WITHIN_LAYERS: ("within layers", "enrichment", "p")}
    rows: Table = [(f"pruned {of}", "shared", "in no other", *(head for kind in kinds for head in heads[kind]))]
    num_lists = len(overlaps[-1]["lists"])
    for row in overlaps:
        if num_lists > MAX_IN_FULL and 2 < len(row["lists"]) < num_lists:
            continue
        name = "all lists" if len(row["lists"]) == num_lists > MAX_IN_FULL else BETWEEN.join(row["lists"])
        cells = [name, str(row["inclusive"]), str(row["exclusive"])]
        for kind in kinds:
            cells += _chance(row[kind]) if kind in row else ["", "", ""]
        rows.append(tuple(cells))
    return rows


def _chance(chance: dict[str, float]) -> list[str]:
    return [f"{chance['expected']:.3g}", cell(chance["enrichment"], "", 1), p_value(chance["log10_p_value"])]


def _correlation_table(results: dict[str, Any]) -> Table:
    names, found = [row["name"] for row in results["lists"]], results["correlation"]
    rows: Table = [("correlation of differential relevance", "Pearson", "Spearman", "given general text")]
    for i, j in combinations(range(len(names)), 2):
        values = [cell(found[name][i][j], "", 3) for name in ("pearson", "spearman", "partial")]
        rows.append((f"{names[i]}{BETWEEN}{names[j]}", *values))
    return rows


def _class_table(classes: dict[str, Any], of: str) -> Table:
    """Return the classes by sign, as numbers and shares of all neurons and of those that are pruned for a behaviour."""
    every, pruned = classes["all"], classes["pruned"]
    rows: Table = [("sign of differential relevance", f"all {of}", "", "pruned", "")]

    def add(name: str, number: int, of_pruned: int) -> None:
        cells = [(f"{n:,}", cell(n / of["neurons"], "%", 1)) for n, of in ((number, every), (of_pruned, pruned))]
        rows.append((name, *cells[0], *cells[1]))

    add("general: positive for all", every["general"], pruned["general"])
    if every["neutral"]:
        add("neutral: 0 for one, negative for none", every["neutral"], pruned["neutral"])
    for row, other in zip(every["specific"], pruned["specific"], strict=True):
        add(f"specific to {row['lists'][0]}", row["neurons"], other["neurons"])
    if len(every["specific"]) <= MAX_IN_FULL:
        for row, other in zip(every["shared"], pruned["shared"], strict=True):
            add(f"shared by {BETWEEN.join(row['lists'])}", row["neurons"], other["neurons"])
        return rows
    for number in range(2, len(every["specific"]) + 1):
        counts = [sum(row["neurons"] for row in of["shared"] if len(row["lists"]) == number) for of in (every, pruned)]
        add(f"shared by {number} behaviours", *counts)
    return rows
