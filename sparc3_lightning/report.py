"""From results to what people look at: a table for the terminal, pictures, and one self-contained HTML page."""

import base64
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from sparc3_lightning.files import replacing, write_atomically
from sparc3_lightning.neurons import NeuronList

# The figures of results.json that the tables show: key, name, unit, digits.
ROWS = (
    ("perplexity", "Perplexity", "", 2),
    ("perplexity_disjoint", "Perplexity, disjoint windows", "", 2),
    ("toxicity_mean", "Mean toxicity", "", 4),
    ("expected_maximum_toxicity", "Expected maximum toxicity", "", 4),
    ("toxicity_probability", "Prompts with a toxic continuation", "%", 1),
    ("num_empty", "Empty continuations", "", 0),
    ("num_failed", "Failed continuations", "", 0),
)
BEFORE, AFTER = "#4477aa", "#cc6677"


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the before/after table: name, before, after (or a dash), change in percent."""
    before, after = results["baseline"], results.get("pruned")
    rows = []
    for key, name, unit, digits in ROWS:
        if key not in before:
            continue
        scale = 100 if unit == "%" else 1
        cells = [f"{scale * figures[key]:.{digits}f}{' %' if unit else ''}" for figures in (before, after) if figures]
        change = ""
        if after and before[key] and not key.startswith("num_"):
            change = f"{100 * (after[key] - before[key]) / before[key]:+.1f} %"
        rows.append((name, cells[0], cells[1] if after else "-", change))
    return rows


def summary_table(results: dict[str, Any]) -> str:
    """Return the before/after table as text for the terminal."""
    rows = [("", "before", "after", "change"), *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def layer_of(module: str) -> int:
    """Return the number of the layer that a fully qualified name speaks of."""
    match = re.search(r"\.(\d+)\.", module)
    return int(match.group(1)) if match else 0


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _new_figure(width: float = 6.4, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_layers(neurons_per_module: dict[str, int], path: Path) -> None:
    """Draw how many of the pruned neurons lie in each layer."""
    counts: dict[int, int] = defaultdict(int)
    for module, count in neurons_per_module.items():
        counts[layer_of(module)] += count
    figure, axes = _new_figure()
    axes.bar(list(counts), list(counts.values()), color=AFTER, width=0.8)
    axes.set(xlabel="layer", ylabel="pruned neurons")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_differential(selection: dict[str, Any], path: Path) -> None:
    """Draw the histogram of the differential relevance of all neurons, with the threshold of the pruned ones."""
    figure, axes = _new_figure()
    histogram = selection["histogram"]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=BEFORE)
    axes.axvline(selection["threshold"], color=AFTER, linewidth=1.5)
    label = f"{selection['num_neurons']} pruned"
    axes.annotate(
        label, (selection["threshold"], 0.9), xycoords=("data", "axes fraction"), color=AFTER, ha="right",
        xytext=(-5, 0), textcoords="offset points",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set(xlabel="differential relevance of a neuron (general - behaviour)", ylabel="neurons (log scale)")
    _save(figure, path)


def draw_scatter(pairs: list[tuple[float, float]], path: Path) -> None:
    """Draw the mean toxicity of each prompt's continuations before against after."""
    figure, axes = _new_figure(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.scatter(*zip(*pairs, strict=True), s=16, alpha=0.6, color=AFTER, linewidths=0)
    axes.set(xlabel="toxicity before", ylabel="toxicity after", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.text(0.97, 0.05, "less toxic", ha="right", color="0.4", transform=axes.transAxes)
    axes.text(0.03, 0.95, "more toxic", va="top", color="0.4", transform=axes.transAxes)
    _save(figure, path)


def draw_before_after(results: dict[str, Any], path: Path) -> None:
    """Draw perplexity and mean toxicity of both models as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("toxicity_mean", "perplexity"), ("mean toxicity", "perplexity"), strict=True
    ):
        axes.spines[["top", "right"]].set_visible(False)
        bars = axes.bar(["before", "after"], [results[n][key] for n in ("baseline", "pruned")], color=[BEFORE, AFTER])
        axes.bar_label(bars, fmt="%.3g", padding=2)
        axes.set_title(title, fontsize=11)
        axes.margins(y=0.15)
    _save(figure, path)


def toxicity_by_prompt(completions: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Group the continuations that were scored by prompt, then by model; prompts that both models have only."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in completions:
        if row["toxicity"] is not None:
            groups[row["prompt_id"]][row["model"]].append(row)
    return {key: dict(models) for key, models in groups.items() if {"baseline", "pruned"} <= models.keys()}


def examples(groups: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Choose the continuations to show, by the same draw of both models: five that fell most, three that rose most.

    Args:
        groups: From ``toxicity_by_prompt``.

    Returns:
        Per example ``before`` and ``after``, each a row of completions.jsonl; at most one example a prompt.
    """
    pairs = []
    for models in groups.values():
        after = {row["continuation_index"]: row for row in models["pruned"]}
        drawn = [
            (row, after[row["continuation_index"]]) for row in models["baseline"] if row["continuation_index"] in after
        ]
        if drawn:
            pairs.append(max(drawn, key=lambda pair: abs(pair[1]["toxicity"] - pair[0]["toxicity"])))
    pairs.sort(key=lambda pair: pair[1]["toxicity"] - pair[0]["toxicity"])
    chosen = pairs if len(pairs) <= 8 else [*pairs[:5], *pairs[-3:]]
    return [{"before": before, "after": after} for before, after in chosen]


def verdict(results: dict[str, Any], num_better: int, num_compared: int) -> str:
    """Say in a sentence what changed."""

    def moved(name: str, percent: float) -> str:
        return f"{name} {'fell' if percent < 0 else 'rose'} by {abs(percent):.1f} %"

    change = results["change"]
    return (
        f"With {results['num_neurons']} neurons switched off, {moved('mean toxicity', change['toxicity_percent'])} and "
        f"{moved('perplexity', change['perplexity_percent'])}; {num_better} of {num_compared} prompts were continued "
        "less toxically."
    )


def write_report(
    path: Path,
    results: dict[str, Any],
    completions: list[dict[str, Any]],
    neurons: NeuronList,
    neurons_folder: Path | None,
) -> None:
    """Write the HTML page, and its pictures beside it.

    Args:
        path: Of the page.
        results: Content of results.json, with both models.
        completions: Rows of completions.jsonl.
        neurons: The pruned neurons.
        neurons_folder: Folder of neurons.json, for the pictures that ``sparc3 prune`` drew.
    """
    from jinja2 import Environment, PackageLoader

    folder = path.parent
    groups = toxicity_by_prompt(completions)
    means = {
        key: {name: sum(row["toxicity"] for row in rows) / len(rows) for name, rows in models.items()}
        for key, models in groups.items()
    }
    pairs = [(mean["baseline"], mean["pruned"]) for mean in means.values()]
    draw_before_after(results, folder / "before_after.png")
    pictures = [("Before and after", folder / "before_after.png")]
    if pairs:
        draw_scatter(pairs, folder / "scatter.png")
        pictures.append(("Each prompt: mean toxicity of its continuations", folder / "scatter.png"))
    for title, name in (("Where the pruned neurons lie", "layers.png"), ("All neurons", "differential.png")):
        if neurons_folder is not None and (neurons_folder / name).is_file():
            pictures.append((title, neurons_folder / name))
    num_better = sum(after < before for before, after in pairs)
    page = Environment(loader=PackageLoader("sparc3_lightning", "templates"), autoescape=True).get_template(
        "report.html"
    )
    html = page.render(
        results=results,
        verdict=verdict(results, num_better, len(pairs)),
        table=table_rows(results),
        pictures=[(title, base64.b64encode(file.read_bytes()).decode()) for title, file in pictures],
        examples=examples(groups),
        neurons=neurons.neurons[:20],
        strength=neurons.provenance.get("differential_strength_percent"),
        settings=json.dumps({key: results[key] for key in ("protocol", "config", "versions", "git_hash")}, indent=2),
    )
    write_atomically(path, html)
