"""Pictures of a selection and of an evaluation, as PNG files that a phone shows as readably as a desk."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.results import Control, Dose, Lengths, Results
from sparc3_lightning.files import replacing
from sparc3_lightning.models.architectures import layer_of
from sparc3_lightning.models.components import plural
from sparc3_lightning.report.escaping import for_picture, public_name, told_apart
from sparc3_lightning.report.tables import cell, ends, in_order, number
from sparc3_lightning.selection.neuron_list import SelectionResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER, CONTROL = "#4477aa", "#cc6677", "#777777"
STRENGTHS = (AFTER, "#aa7700", "#228833", "#aa3377", "#332288")
MARKERS = "osD^v"  # of doses, by damping
CONTROL_MARKERS = "x+*1234"  # of controls, by kind
JUDGE = 22  # characters of a judge's name in a row
NAME = 28  # characters of a name in a legend of two columns
MAX_LINES = 12  # in a legend: more would leave no room for the picture
MAX_NUMBERS = 24  # beside the points of a line
LARGEST = 1e6  # percent: what is beyond is drawn there, since matplotlib cannot tell far numbers apart


class Row(NamedTuple):
    """A row of a picture of changes: the change in percent with its interval, and the single draws of a control."""

    label: str
    color: str
    change: Interval
    draws: Sequence[float] = ()


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a picture as PNG, under a temporary name first."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks, for each of them
        figure.savefig(temporary, format="png", dpi=200)


def _new_figure(height: float = 2.8) -> tuple["Figure", Any]:
    """Return a figure narrow enough for a phone to show its letters in almost their full size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_layers(neurons_per_module: dict[str, int], path: Path, granularity: str = "neuron") -> None:
    """Draw how many of the pruned neurons lie in each layer."""
    counts: dict[int, int] = defaultdict(int)
    for module, count in neurons_per_module.items():
        counts[layer_of(module)] += count
    figure, axes = _new_figure()
    axes.bar(list(counts), list(counts.values()), color=AFTER, width=0.8)
    axes.set(xlabel="layer", ylabel=f"pruned {for_picture(plural(granularity))}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def draw_differential(selection: SelectionResults, path: Path) -> None:
    """Draw the histogram of the ranking scores of all neurons, with the threshold of the pruned ones."""
    figure, axes = _new_figure()
    histogram = selection.histogram
    if all(map(math.isfinite, histogram["edges"])):
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=BEFORE)
    if math.isfinite(selection.threshold):
        axes.axvline(selection.threshold, color=AFTER, linewidth=1.5)
    # Above the axes, since the histogram may lie on either side of the line.
    axes.set_title(f"left of the line: the {selection.num_neurons} pruned", color=AFTER, fontsize=10)
    axes.set_yscale("log")
    name = selection.criterion
    by = (
        "differential relevance (general - behaviour)"
        if name == "difference"
        else f"{for_picture(name.replace('_', ' '), 40)}, lowest first"
    )
    axes.set(xlabel=by, ylabel=f"{for_picture(plural(selection.granularity))} (log scale)")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    save_figure(figure, path)


def draw_scatter(pairs: dict[str, list[tuple[float, float]]], path: Path, behavior: str = "toxicity") -> None:
    """Draw the mean score of each prompt's continuations before against after.

    Args:
        pairs: Before and after, by the name of the group of prompts.
        path: Of the picture.
        behavior: What was scored.
    """
    figure, axes = _new_figure(4.0)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    styles: tuple[dict[str, Any], ...] = (
        {"color": AFTER, "linewidths": 0},
        {"edgecolors": BEFORE, "facecolors": "none"},
    )
    for place, (group, points) in enumerate(pairs.items()):
        style = styles[place % len(styles)]
        axes.scatter(*zip(*points, strict=True), s=22, alpha=0.65, label=for_picture(group, NAME), **style)
    name = for_picture(behavior, 36)
    axes.set(xlabel=f"{name} before", ylabel=f"{name} after", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    if len(pairs) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def draw_changes(rows: Sequence[Row], path: Path) -> None:
    """Draw changes in percent, a row per model, with intervals and, below them, the draws of a control.

    An interval that does not end on the picture runs into an arrow at its edge. A point is hollow where its interval
    cannot be said.
    """
    figure, axes = _new_figure(0.85 + 0.5 * len(rows))
    left, right = _limits([row.change for row in rows], [draw for row in rows for draw in row.draws])
    for y, row in enumerate(rows):
        value, (low, high) = _near(row.change.value), _ends_or_value(row.change)
        error = _error(value, max(low, left), min(high, right))
        inside = "w" if math.isnan(ends(row.change)[0]) and not row.draws else row.color
        axes.errorbar(value, y, xerr=error, fmt="o", color=row.color, mfc=inside, markersize=7, capsize=3, zorder=3)
        for is_beyond, edge, marker in ((low < left, left, "<"), (high > right, right, ">")):
            if is_beyond:
                axes.plot(edge, y, marker, color=row.color, markersize=7, clip_on=False, zorder=4)
        single = list(map(_near, row.draws))
        axes.plot(single, [y + 0.24] * len(single), "o", color=row.color, markersize=3.5, alpha=0.6)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), xlabel="%, the original model being 0")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.tick_params(axis="y", length=0)
    save_figure(figure, path)


def _limits(changes: Sequence[Interval], draws: Sequence[float] = ()) -> tuple[float, float]:
    """Return the limits of an axis: they hold 0, all changes, and the intervals unless these are much longer."""
    values = [x for x in map(_near, [*(change.value for change in changes), *draws]) if math.isfinite(x)]
    longest = max(3 * max(map(abs, values), default=0.0), 10.0)
    reached = [min(max(x, -longest), longest) for change in changes for x in ends(change) if not math.isnan(x)]
    low, high = min([0.0, *values, *reached]), max([0.0, *values, *reached])
    margin = 0.06 * ((high - low) or 2.0)
    return low - margin, high + margin


def _near(value: float | None) -> float:
    """Return where a change is drawn; NaN if it is not known."""
    return min(max(number(value), -LARGEST), LARGEST)


def _ends_or_value(change: Interval) -> tuple[float, float]:
    """Return the ends of an interval, or its value where they are not known."""
    low, high = (_near(change.value) if math.isnan(end) else end for end in ends(change))
    return low, high


def _error(value: float, low: float, high: float) -> list[list[float]]:
    """Return the lengths of an error bar; an interval need not lie around its value."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def change_rows(results: Results) -> tuple[list[Row], list[Row]]:
    """Return the rows of the two pictures of changes: mean behavior and perplexity."""
    chosen = f"{results.num_neurons} chosen"
    behavior, perplexity = [], []
    names = told_apart(results.judges, lambda name: for_picture(public_name(name), JUDGE))
    others = [(f"by {names[name]}", of.effects) for name, of in results.other_judges.items()]
    for name, effects in [(chosen, results.effects), *others]:
        if (of_group := effects.get(results.headline)) and (effect := of_group.behavior_mean):
            behavior.append(Row(_label(name, effect.before, effect.after, 3), AFTER, effect.percent))
    convention, change = next(iter(results.perplexity_change.items()))
    before, after = (model.perplexity[convention].value for model in results.models.values())
    perplexity.append(Row(_label(chosen, before, after, 2), AFTER, change))
    for kind, control in results.controls.items():
        name = _name_of_control(kind)
        effects_of_draws = [draw.effect for draw in control.draws if draw.effect]
        if control.outcome:
            mean = (_mean(drawn.before for drawn in effects_of_draws), _mean(drawn.after for drawn in effects_of_draws))
            single = [number(drawn.percent.value) for drawn in effects_of_draws]
            behavior.append(Row(_label(name, *mean, 3), CONTROL, control.outcome.effect_percent, single))
        label = _label(name, before, _mean(draw.perplexity for draw in control.draws), 2)
        single = [number(draw.perplexity_percent.value) for draw in control.draws]
        perplexity.append(Row(label, CONTROL, Interval(_mean(single), math.nan, math.nan), single))
    return behavior, perplexity


def _name_of_control(kind: str) -> str:
    """Return the name of a control in a picture whose heading says what is off."""
    return kind.replace("_", " ")


def _label(name: str, before: float, after: float, digits: int) -> str:
    return f"{name}\n{cell(before, '', digits)} to {cell(after, '', digits)}"


def _mean(values: Iterable[float]) -> float:
    known = [number(value) for value in values]
    return sum(known) / len(known) if known else math.nan


def draw_doses(doses: Iterable[Dose], controls: Mapping[str, Control], path: Path, behavior: str = "toxicity") -> None:
    """Draw the change of the behavior against perplexity's: a point per number of neurons, a line per damping.

    Of several selections each has a line, from the lowest price to the highest. The bars hold for all points together.
    """
    from matplotlib.patheffects import withStroke

    figure, axes = _new_figure(4.6)
    axes.axhline(0, color="0.8", linewidth=1)
    axes.axvline(0, color="0.8", linewidth=1)
    scored = [dose for dose in in_order(doses) if dose.effect]
    several = len({dose.selection for dose in scored}) > 1
    shown: list[tuple[Interval, Interval]] = []
    for place, (selection, damping) in enumerate(dict.fromkeys((dose.selection, dose.damping) for dose in scored)):
        line = [dose for dose in scored if (dose.selection, dose.damping) == (selection, damping)]
        line.sort(key=lambda dose: (math.isnan(price := _near(dose.perplexity_percent.value)), price))
        changes = _changes(line)
        shown += changes
        x, y = ([_near(change[axis].value) for change in changes] for axis in (0, 1))
        color, below = STRENGTHS[place % len(STRENGTHS)], place % 2
        numbered = line[:: math.ceil(len(line) / MAX_NUMBERS)]
        label = "switched off" if damping == 1 else f"damped by {100 * damping:g} %"
        if several:
            name = for_picture(selection, NAME)
            label = name if damping == 1 else f"{name}, {label}"
        marker = MARKERS[(place + place // len(STRENGTHS)) % len(MARKERS)]  # so that no two of 25 lines look alike
        axes.plot(x, y, f"{marker}-", color=color, markersize=6, linewidth=1.5, label=label)
        for dose, of_dose, *at in zip(line, changes, x, y, strict=True):
            # An infinite bar has no length that matplotlib would draw.
            bars = [_error(v, *(max(min(e, 1e9), -1e9) for e in _ends_or_value(change)))
                    for v, change in zip(at, of_dose, strict=True)]  # fmt: skip
            axes.errorbar(*at, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=color, alpha=0.35, elinewidth=1)
            if dose not in numbered:
                continue
            axes.annotate(
                f"{dose.num_neurons}", at, xytext=(6, -6 if below else 6), textcoords="offset points", fontsize=9,
                va="top" if below else "bottom", color=color, path_effects=[withStroke(linewidth=3, foreground="w")],
                annotation_clip=True,
            )  # fmt: skip
    for place, (kind, control) in enumerate(controls.items()):
        marker = CONTROL_MARKERS[place % len(CONTROL_MARKERS)]
        changes = _changes(control.draws)
        shown += changes
        x, y = ([_near(change[axis].value) for change in changes] for axis in (0, 1))
        axes.scatter(x, y, marker=marker, color=CONTROL, s=36, linewidths=1.2, label=_name_of_control(kind))
    limits = [_limits([pair[axis] for pair in shown]) for axis in (0, 1)]
    of_behavior = f"change of mean {for_picture(behavior, 36)}, %"
    axes.set(xlabel="change of perplexity, %", ylabel=of_behavior, xlim=limits[0], ylim=limits[1])
    known = [_near(change.value) for change, _ in shown]
    if limits[0][1] > 300:  # a large dose that wrecks the model would press the others together
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=min([-2.0, *(x - 2 for x in known if math.isfinite(x))]))
        axes.xaxis.set_major_formatter("{x:g}")
    if shown:
        handles, labels = axes.get_legend_handles_labels()
        if (more := len(labels) - MAX_LINES) > 0:
            figure.supxlabel(f"and {more} more lines", fontsize=9)
        figure.legend(
            handles[:MAX_LINES], labels[:MAX_LINES], loc="outside lower center", ncols=2, frameon=False, fontsize=9,
            columnspacing=1.0,
        )  # fmt: skip
    save_figure(figure, path)


def draw_lengths(lengths: Lengths, path: Path, behavior: str = "toxicity") -> None:
    """Draw the mean score of pieces of the continuations, before and after: by position, then within the first tokens.

    The bar of a point is the interval of the change, seen from the point before: there is no evidence of a change where
    it reaches that one. A point is hollow where its interval cannot be said.
    """
    within = list(lengths.within.items())[1:]  # the first is the first position, too
    rows = [(f"tokens {name}", effect) for name, effect in lengths.at.items()]
    rows += [(f"first {name.partition('-')[2]}", effect) for name, effect in within]
    places = [y if y < len(lengths.at) else y + 0.5 for y in range(len(rows))]
    figure, axes = _new_figure(1.2 + 0.38 * len(rows))
    scored = [(y, effect) for y, (_, effect) in zip(places, rows, strict=True) if effect]
    for y, effect in scored:
        low, high = (effect.before + end for end in _ends_or_value(effect.difference))
        inside = AFTER if effect.difference.is_known else "w"
        axes.plot([effect.before, effect.after], [y, y], color="0.8", linewidth=1.5, zorder=1)
        axes.errorbar(
            effect.after, y, xerr=_error(effect.after, low, high), fmt="o", color=AFTER, mfc=inside, markersize=7,
            capsize=3, zorder=3,
        )  # fmt: skip
    before = [effect.before for _, effect in scored]
    axes.plot(before, [y for y, _ in scored], "D", color=BEFORE, markersize=6, zorder=2, label="before")
    axes.plot([], [], "o", color=AFTER, markersize=7, label="after, with the interval of the change")
    axes.set(xlabel=f"mean {for_picture(behavior, 36)}", ylim=(places[-1] + 0.5, -0.5))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_yticks(places, [label for label, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.get_major_locator().set_params(nbins=6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, columnspacing=1.0)
    save_figure(figure, path)


def _changes(doses: Iterable[Dose]) -> list[tuple[Interval, Interval]]:
    """Return where each dose that was scored lies: its change of perplexity, and of the behavior.

    The intervals are those that hold for all doses together, if there are any.
    """
    found = []
    for dose in doses:
        if not dose.effect:
            continue
        rise, change = dose.perplexity_percent, dose.effect.percent
        if (of := dose.together) and (bar := of.behavior_percent):
            rise = replace(rise, low=of.perplexity_percent.low, high=of.perplexity_percent.high)
            change = replace(change, low=bar.low, high=bar.high)
        found.append((rise, change))
    return found
