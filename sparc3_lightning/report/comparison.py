"""compare.json, and the tables and pictures of a comparison of behaviours: text for the terminal, CSV and PNG."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import combinations
from pathlib import Path

from torch import Tensor

from sparc3_lightning.files import LEFT_OUT, JsonFile
from sparc3_lightning.models.components import Component, Key, counts_of, plural
from sparc3_lightning.provenance import git_hash, versions
from sparc3_lightning.report.escaping import csv_text, for_picture, for_terminal
from sparc3_lightning.report.figures import AFTER, BEFORE, save_figure
from sparc3_lightning.report.tables import UNKNOWN, Table, aligned, cell
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.selection.overlap import Chance, Classes, Matrix, Overlap

COMPARISON = "compare.json"
KINDS = {"random": "by chance", "random_within_layers": "within layers"}  # of chance: field of an overlap, and its head
BETWEEN = " & "
MAX_IN_FULL = 4  # lists whose 15 combinations are all printed; of more lists the CSV has them


@dataclass(frozen=True)
class Listed:
    """One of the lists that are compared, and the score files of its behaviour if they are known."""

    name: str
    neurons: str
    num_neurons: int
    num_layers: int
    criterion: str | None
    general: list[str] | None = field(default=None, metadata=LEFT_OUT)
    behavior: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class ComparisonResults(JsonFile):
    """The content of compare.json.

    ``layers`` is from ``find_profiles``. ``correlation``, from ``find_correlations``, and the classes of ``all``
    neurons and of the ``pruned`` ones are None without score files.
    """

    FORMAT = "sparc3_lightning compare 2"
    checkpoint: str | None
    checkpoint_fingerprint: str | None
    num_candidates: int
    granularity: str
    normalize: bool
    lists: list[Listed]
    overlaps: list[Overlap]
    layers: dict[str, dict[str, list[int]]]
    correlation: dict[str, Matrix] | None = field(default=None, metadata=LEFT_OUT)
    classes: dict[str, Classes] | None = field(default=None, metadata=LEFT_OUT)
    versions: dict[str, str] = field(default_factory=versions)
    git_hash: str | None = field(default_factory=git_hash)


def summary(results: ComparisonResults) -> str:
    """Return the tables of a comparison as text: shared neurons, correlations, and classes by sign."""
    checkpoint = f" of {for_terminal(results.checkpoint)}" if results.checkpoint else ""
    components = plural(results.granularity)
    parts = [
        f"{results.num_candidates:,} {components}{checkpoint}",
        aligned(_overlap_table(results.overlaps, components)),
    ]
    if len(results.overlaps) > 1:
        parts.append(f"Each p is of its row alone, not corrected for the {len(results.overlaps)} combinations.")
    if results.correlation and results.classes:
        parts.append(aligned(_correlation_table([pruned.name for pruned in results.lists], results.correlation)))
        parts.append(aligned(_class_table(results.classes["all"], results.classes["pruned"], components)))
    return "\n\n".join(parts)


def p_value(log10_p: float) -> str:
    """Return a p-value as text, however small it is.

    Example:
        >>> p_value(-1.0), p_value(-408.25)
        ('0.1', '5.6e-409')
    """
    if math.isnan(log10_p):
        return UNKNOWN
    if log10_p > -3 or math.isinf(log10_p):
        return f"{10**log10_p:.3g}"
    exponent = math.floor(log10_p)
    mantissa = f"{10 ** (log10_p - exponent):.1f}"
    return f"1.0e{exponent + 1:03}" if mantissa == "10.0" else f"{mantissa}e{exponent:03}"


def overlaps_csv(overlaps: Sequence[Overlap]) -> str:
    """Return a row for each combination of lists; empty cells where a measure has no meaning."""
    kinds, measures = _kinds(overlaps), [measure.name for measure in fields(Chance)]
    rows: list[list[object]] = [
        ["lists", "num_lists", "inclusive", "exclusive", *(f"{kind}_{name}" for kind in kinds for name in measures)]
    ]
    for row in overlaps:
        rows.append([BETWEEN.join(row.lists), len(row.lists), row.inclusive, row.exclusive])
        for chance in (getattr(row, kind) for kind in kinds):
            rows[-1] += astuple(chance) if chance else [None] * len(measures)
    return csv_text(rows)


def _kinds(overlaps: Sequence[Overlap]) -> list[str]:
    """Return the known kinds of chance; the last combination, of all lists, has them all."""
    return [kind for kind in KINDS if getattr(overlaps[-1], kind)]


def neurons_csv(
    names: Sequence[str],
    components: Mapping[Key, Component],
    lists: Sequence[NeuronList],
    differential_SN: Tensor | None,
) -> str:
    """Return a row for each pruned neuron: its rank in each list that holds it, and its differential relevance.

    Args:
        names: Of the behaviours.
        components: The pruned ones by their keys.
        lists: Of each behaviour.
        differential_SN: Shape ``[behaviours, neurons]``, if it is known.
    """
    ranks = [{n.key: rank for rank, n in enumerate(pruned.neurons, start=1)} for pruned in lists]
    kinds = counts_of(components.values())
    places = [
        "module",
        "index",
        *(["input"] if "weight" in kinds else []),
        *(["granularity"] if len(kinds) > 1 else []),
    ]
    heads = [*places, "num_lists", *(f"rank_{name}" for name in names)]
    if differential_SN is not None:
        heads += [f"differential_{name}" for name in names]
    rows = []
    for i, (key, component) in enumerate(components.items()):
        held = [rank.get(key) for rank in ranks]
        values = [] if differential_SN is None else differential_SN[:, i].tolist()
        place = [getattr(component, name) for name in places]
        rows.append([*place, sum(rank is not None for rank in held), *held, *values])
    return csv_text([heads, *rows])


def _overlap_table(overlaps: Sequence[Overlap], components: str) -> Table:
    kinds = _kinds(overlaps)
    heads = [head for kind in kinds for head in (KINDS[kind], "enrichment", "p")]
    rows: Table = [(f"pruned {components}", "shared", "in no other", *heads)]
    num_lists = len(overlaps[-1].lists)
    for row in overlaps:
        if num_lists > MAX_IN_FULL and 2 < len(row.lists) < num_lists:
            continue
        name = "all lists" if len(row.lists) == num_lists > MAX_IN_FULL else BETWEEN.join(row.lists)
        cells = [name, str(row.inclusive), str(row.exclusive)]
        for kind in kinds:
            cells += _chance(getattr(row, kind))
        rows.append(tuple(cells))
    return rows


def _chance(chance: Chance | None) -> list[str]:
    if chance is None:
        return ["", "", ""]
    return [f"{chance.expected:.3g}", cell(chance.enrichment, "", 1), p_value(chance.log10_p_value)]


def _correlation_table(names: Sequence[str], found: Mapping[str, Matrix]) -> Table:
    rows: Table = [("correlation of differential relevance", "Pearson", "Spearman", "given general text")]
    for i, j in combinations(range(len(names)), 2):
        values = [cell(found[name][i][j], "", 3) for name in ("pearson", "spearman", "partial")]
        rows.append((f"{names[i]}{BETWEEN}{names[j]}", *values))
    return rows


def _class_table(every: Classes, pruned: Classes, components: str) -> Table:
    """Return the classes by sign, as numbers and shares of all neurons and of those that are pruned for a behaviour."""
    rows: Table = [("sign of differential relevance", f"all {components}", "", "pruned", "")]

    def add(name: str, number: int, of_pruned: int) -> None:
        cells = [(f"{n:,}", cell(n / total.neurons, "%", 1)) for n, total in ((number, every), (of_pruned, pruned))]
        rows.append((name, *cells[0], *cells[1]))

    add("general: positive for all", every.general, pruned.general)
    if every.neutral:
        add("neutral: 0 for one, negative for none", every.neutral, pruned.neutral)
    for row, other in zip(every.specific, pruned.specific, strict=True):
        add(f"specific to {row.lists[0]}", row.neurons, other.neurons)
    if len(every.specific) <= MAX_IN_FULL:
        for row, other in zip(every.shared, pruned.shared, strict=True):
            add(f"shared by {BETWEEN.join(row.lists)}", row.neurons, other.neurons)
        return rows
    for number in range(2, len(every.specific) + 1):
        counts = [sum(row.neurons for row in classes.shared if len(row.lists) == number) for classes in (every, pruned)]
        add(f"shared by {number} behaviours", *counts)
    return rows


MAX_COLUMNS = 20  # of an UpSet plot: more are too narrow on a phone


FAINT = "0.88"


def draw_overlap(lists: Sequence[Listed], overlaps: Sequence[Overlap], path: Path, granularity: str = "neuron") -> None:
    """Draw an UpSet plot: for each combination of lists a bar, of the neurons in these and no others, over its dots.

    Source: Lex et al. 2014, IEEE TVCG 20(12):1983.

    Args:
        lists: What is compared.
        overlaps: One for each combination; empty ones are left out if there are many.
        path: Of the picture.
        granularity: What the lists are of.
    """
    from matplotlib.figure import Figure

    shown = [row for row in overlaps if len(overlaps) <= 7 or row.exclusive]
    left_out = sorted(shown, key=lambda row: -row.exclusive)[MAX_COLUMNS:]
    shown = [row for row in shown if row not in left_out]
    names = [row.name for row in lists]
    figure = Figure(figsize=(4.8, 2.4 + 0.3 * len(lists)), layout="constrained")
    bars, dots = figure.subplots(2, sharex=True, height_ratios=[2.0, 0.3 * len(lists)])
    for x, row in enumerate(shown):
        color = AFTER if len(row.lists) > 1 else BEFORE
        bars.bar(x, row.exclusive, color=color, width=0.7)
        bars.annotate(
            f"{row.exclusive}", (x, row.exclusive), xytext=(0, 2), textcoords="offset points", ha="center",
            fontsize=9, color=color,
        )  # fmt: skip
        dots.plot([x] * len(names), range(len(names)), "o", color=FAINT, markersize=7)
        rows = [names.index(name) for name in row.lists]
        dots.plot([x, x], [min(rows), max(rows)], "-", color=color, linewidth=2)
        dots.plot([x] * len(rows), rows, "o", color=color, markersize=7)
    bars.spines[["top", "right"]].set_visible(False)
    bars.set(ylabel=f"pruned {plural(granularity)}")
    bars.margins(y=0.12)
    bars.yaxis.get_major_locator().set_params(integer=True)
    bars.tick_params(axis="x", length=0)
    dots.spines[:].set_visible(False)
    dots.set_yticks(range(len(names)), [f"{for_picture(row.name, 28)} ({row.num_neurons})" for row in lists])
    dots.set(ylim=(len(names) - 0.5, -0.5), xticks=[], xlim=(-0.6, len(shown) - 0.4))
    dots.tick_params(axis="y", length=0)
    if left_out:
        number = sum(row.exclusive for row in left_out)
        figure.supxlabel(f"and {len(left_out)} smaller combinations of {number} {plural(granularity)}", fontsize=10)
    save_figure(figure, path)


def draw_correlation(names: Sequence[str], found: Mapping[str, Matrix], path: Path) -> None:
    """Draw the correlations of each pair: Pearson's below the diagonal, and given the general scores above it.

    Args:
        names: Of the behaviours.
        found: Matrices ``pearson`` and ``partial``.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    number = len(names)
    values = [[found["pearson" if i > j else "partial"][i][j] for j in range(number)] for i in range(number)]
    figure = Figure(figsize=(4.8, 2.0 + 0.32 * max(number, 4)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for i, j in itertools.permutations(range(number), 2):
        # Without the 0 before the point ten of them fit beside each other.
        text = f"{values[i][j]:.2f}".replace("0.", ".") if math.isfinite(values[i][j]) else "-"
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color="w" if abs(values[i][j]) > 0.6 else "k")
    axes.set_xticks(range(number), [f"{i + 1}" for i in range(number)])
    axes.set_yticks(range(number), [f"{for_picture(name, 28)}  {i + 1}" for i, name in enumerate(names)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("correlation of differential relevance;\nabove the diagonal: given general text", fontsize=10)
    figure.colorbar(image, ax=axes, location="bottom", ticks=[-1, -0.5, 0, 0.5, 1], aspect=30)
    save_figure(figure, path)


def draw_profiles(layers: Mapping[str, Mapping[str, Sequence[int]]], path: Path, granularity: str = "neuron") -> None:
    """Draw how many pruned neurons of each list lie in each layer, and how many of those another list holds too.

    Args:
        layers: Numbers in each layer by the name of the list, of the ``pruned`` and of the ``shared`` neurons.
        path: Of the picture.
        granularity: What the lists are of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 1.0 + 1.0 * len(layers["pruned"])), layout="constrained")
    panels = figure.subplots(len(layers["pruned"]), sharex=True, sharey=True)
    for axes, (name, counts) in zip(panels, layers["pruned"].items(), strict=True):
        axes.bar(range(len(counts)), counts, color=BEFORE, width=0.8, label="pruned for it alone")
        axes.bar(range(len(counts)), layers["shared"][name], color=AFTER, width=0.8, label="for another too")
        axes.set_title(for_picture(name), fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[-1].set(xlabel="layer")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(f"pruned {plural(granularity)}", fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    save_figure(figure, path)
