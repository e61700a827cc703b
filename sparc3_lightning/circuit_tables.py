"""The tables of circuits: text for the terminal, and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from sparc3_lightning.overlap_tables import aligned
from sparc3_lightning.tables import Table

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
