"""Pictures of a comparison of behaviours: an UpSet plot, a heat map of correlations, and layer profiles."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparc3_lightning.figures import AFTER, BEFORE, save_figure

MAX_COLUMNS = 20  # of an UpSet plot: more are too narrow on a phone
FAINT = "0.88"


def draw_overlap(
    lists: Sequence[dict[str, Any]], overlaps: Sequence[dict[str, Any]], path: Path, granularity: str = "neuron"
) -> None:
    """Draw an UpSet plot: for each combination of lists a bar, of the neurons in these and no others, over its dots.

    Source: Lex et al. 2014, IEEE TVCG 20(12):1983.

    Args:
        lists: Name and number of neurons of each.
        overlaps: Lists and exclusive size of each combination; those of none are left out if there are many.
        path: Of the picture.
        granularity: What the lists are of.
    """
    from matplotlib.figure import Figure

    shown = [row for row in overlaps if len(overlaps) <= 7 or row["exclusive"]]
    left_out = sorted(shown, key=lambda row: -row["exclusive"])[MAX_COLUMNS:]
    shown = [row for row in shown if row not in left_out]
    names = [row["name"] for row in lists]
    figure = Figure(figsize=(4.8, 2.4 + 0.3 * len(lists)), layout="constrained")
    bars, dots = figure.subplots(2, sharex=True, height_ratios=[2.0, 0.3 * len(lists)])
    for x, row in enumerate(shown):
        color = AFTER if len(row["lists"]) > 1 else BEFORE
        bars.bar(x, row["exclusive"], color=color, width=0.7)
        bars.annotate(
            f"{row['exclusive']}", (x, row["exclusive"]), xytext=(0, 2), textcoords="offset points", ha="center",
            fontsize=9, color=color,
        )  # fmt: skip
        dots.plot([x] * len(names), range(len(names)), "o", color=FAINT, markersize=7)
        rows = [names.index(name) for name in row["lists"]]
        dots.plot([x, x], [min(rows), max(rows)], "-", color=color, linewidth=2)
        dots.plot([x] * len(rows), rows, "o", color=color, markersize=7)
    bars.spines[["top", "right"]].set_visible(False)
    bars.set(ylabel=f"pruned {granularity}s")
    bars.margins(y=0.12)
    bars.yaxis.get_major_locator().set_params(integer=True)
    bars.tick_params(axis="x", length=0)
    dots.spines[:].set_visible(False)
    dots.set_yticks(range(len(names)), [f"{row['name']} ({row['num_neurons']})" for row in lists])
    dots.set(ylim=(len(names) - 0.5, -0.5), xticks=[], xlim=(-0.6, len(shown) - 0.4))
    dots.tick_params(axis="y", length=0)
    if left_out:
        number = sum(row["exclusive"] for row in left_out)
        figure.supxlabel(f"and {len(left_out)} smaller combinations of {number} {granularity}s", fontsize=10)
    save_figure(figure, path)


def draw_correlation(names: Sequence[str], found: dict[str, list[list[float]]], path: Path) -> None:
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
    axes.set_yticks(range(number), [f"{name}  {i + 1}" for i, name in enumerate(names)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("correlation of differential relevance;\nabove the diagonal: given general text", fontsize=10)
    figure.colorbar(image, ax=axes, location="bottom", ticks=[-1, -0.5, 0, 0.5, 1], aspect=30)
    save_figure(figure, path)


def draw_profiles(layers: dict[str, Any], path: Path, granularity: str = "neuron") -> None:
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
        axes.set_title(name, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[-1].set(xlabel="layer")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(f"pruned {granularity}s", fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    save_figure(figure, path)
