"""The tables of circuits: text for the terminal, and CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparc3_lightning.report.figures import BEFORE, CONTROL, STRENGTHS, save_figure
from sparc3_lightning.report.tables import Table, aligned

COLUMNS = ("sparsity", "accuracy_mean", "accuracy_sd", "logit_difference_mean", "logit_difference_sd")


def circuit_csv(curves: Sequence[dict[str, Any]]) -> str:
    """Return a row for each granularity, method and sparsity: mean and standard deviation over the seeds."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["granularity", "method", "num_components", "num_seeds", "num_removed", *COLUMNS])
    for curve in curves:
        for step in curve["steps"]:
            # Of weights, those of equal relevance go together, and so each seed may have a number of its own.
            removed = round(sum(step["num_removed"]) / len(step["num_removed"]))
            of_curve = [curve[name] for name in ("granularity", "method", "num_components", "num_seeds")]
            rows.writerow([*of_curve, removed, *(step[name] for name in COLUMNS)])
    return file.getvalue()


def summary(results: dict[str, Any]) -> str:
    """Return the sparsest circuit of each method as text."""
    whole = results["whole_model"]
    middle = min((step["sparsity"] for step in results["curves"][0]["steps"]), key=lambda sparsity: abs(sparsity - 0.5))
    rows: Table = [("circuit", "seeds", "sparsity", "kept", "accuracy", f"accuracy at {middle:.0%}, mean +- sd")]
    for curve in results["curves"]:
        # A random order is a control: it has a curve and no circuit.
        circuit = curve.get("circuit")
        cells = ("-", "-", "-")
        if circuit:
            kept = f"{circuit['num_kept']:,} of {curve['num_components']:,}"
            cells = (f"{circuit['sparsity']:.1%}", kept, f"{circuit['accuracy']:.1%}")
        (step,) = (step for step in curve["steps"] if step["sparsity"] == middle)
        spread = "" if step["accuracy_sd"] is None else f" +- {step['accuracy_sd']:.1%}"
        name = f"{curve['granularity']}s, {curve['method']}"
        rows.append((name, str(curve["num_seeds"]), *cells, f"{step['accuracy_mean']:.1%}{spread}"))
    return (
        f"The whole model is right on {whole['accuracy']:.1%} of {results['num_samples']} samples; a circuit keeps "
        f"{results['threshold']:.0%} of that.\n\n{aligned(rows)}"
    )


def draw_circuit(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy against sparsity, a panel for each granularity: mean over the seeds, within a standard deviation.

    Args:
        results: Of ``sparc3 circuit``: the curves, the accuracy of the whole model, and the threshold.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(curve["granularity"] for curve in results["curves"]))
    colors = (BEFORE, *STRENGTHS)
    figure = Figure(figsize=(4.8, 0.9 + 2.1 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True, sharey=True, squeeze=False)[:, 0]
    full = 100 * results["whole_model"]["accuracy"]
    for axes, kind in zip(panels, kinds, strict=True):
        axes.axhline(results["threshold"] * full, color=CONTROL, linewidth=0.8, linestyle=":", label="threshold")
        curves = [curve for curve in results["curves"] if curve["granularity"] == kind]
        for i, curve in enumerate(curves):
            # The whole model is where every curve begins, with no deviation.
            x = [0.0, *(100 * step["sparsity"] for step in curve["steps"])]
            mean = [full, *(100 * step["accuracy_mean"] for step in curve["steps"])]
            deviation = [0.0, *(100 * (step["accuracy_sd"] or 0.0) for step in curve["steps"])]
            color = CONTROL if "circuit" not in curve else colors[i % len(colors)]
            axes.plot(x, mean, "o-", color=color, markersize=3, linewidth=1.5, label=curve["method"])
            low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_title(f"{curves[0]['num_components']:,} {kind}s", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    panels[-1].set(xlabel="sparsity in % (least relevant first)", ylim=(-3, 103))
    figure.supylabel("accuracy in %", fontsize=10)
    save_figure(figure, path)
