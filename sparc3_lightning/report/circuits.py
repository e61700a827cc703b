"""circuit.json, and the tables of circuits: text for the terminal, and CSV."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparc3_lightning.files import LEFT_OUT, JsonFile
from sparc3_lightning.models.components import plural
from sparc3_lightning.provenance import git_hash, versions
from sparc3_lightning.report.escaping import csv_text, for_picture, for_terminal
from sparc3_lightning.report.figures import BEFORE, CONTROL, STRENGTHS, save_figure
from sparc3_lightning.report.tables import Table, aligned

CIRCUIT = "circuit.json"
COLUMNS = ("sparsity", "accuracy_mean", "accuracy_sd", "logit_difference_mean", "logit_difference_sd")


@dataclass(frozen=True)
class Measured:
    """How often a model is right, and its mean logit difference."""

    accuracy: float
    logit_difference: float


@dataclass(frozen=True)
class Step:
    """What is measured where the least relevant components are out, by one order."""

    sparsity: float
    num_removed: int
    accuracy: float
    logit_difference: float


@dataclass(frozen=True)
class CircuitFound(Step):
    """The sparsest step that keeps enough of the accuracy; its file, if there is one, lists the removed components."""

    num_kept: int
    file: str | None


@dataclass(frozen=True)
class SeedSteps:
    """The steps of all seeds at a sparsity; a single seed has no standard deviation, which is None."""

    sparsity: float
    num_removed: list[int]
    accuracy_mean: float
    accuracy_sd: float | None
    accuracy: list[float]
    logit_difference_mean: float
    logit_difference_sd: float | None
    logit_difference: list[float]


@dataclass(frozen=True)
class Curve:
    """The steps of a method, and its circuit if it has one. A random order is a control, without scores and circuit.

    ``emptied`` is the model without any of the components.
    """

    method: str
    granularity: str
    num_components: int
    num_seeds: int
    steps: list[SeedSteps]
    scores: list[str] | None = field(default=None, metadata=LEFT_OUT)
    circuit: CircuitFound | None = None
    emptied: Measured | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class CircuitResults(JsonFile):
    """The content of circuit.json; samples that were used to attribute are left out."""

    FORMAT = "sparc3_lightning circuit 2"
    WRITTEN_TOO = ("chance", "warnings")
    checkpoint: str
    checkpoint_fingerprint: str
    data: dict[str, object]
    num_samples: int
    num_left_out: int
    whole_model: Measured
    threshold: float
    curves: list[Curve]
    versions: dict[str, str] = field(default_factory=versions)
    git_hash: str | None = field(default_factory=git_hash)

    @property
    def chance(self) -> float:
        """The accuracy up to which a model may be guessing between the two tokens, see ``chance_level``."""
        return chance_level(self.num_samples)

    @property
    def warnings(self) -> list[str]:
        """What is no more than guessing, or than what is left with every component out, in words."""
        number, guessed = self.num_samples, f"guessing is right on up to {self.chance:.1%}"
        found = []
        if self.whole_model.accuracy <= self.chance:
            found.append(
                f"The whole model is right on {self.whole_model.accuracy:.1%} of {number} samples, and {guessed}: it "
                "has no behaviour that a circuit could keep."
            )
        for curve in self.curves:
            if curve.circuit is None:
                continue
            least = f"{guessed} of {number} samples"
            reached = self.chance
            if curve.emptied is not None and curve.emptied.accuracy > reached:
                reached = curve.emptied.accuracy
                least = f"so is the model with every {curve.granularity.replace('+', ' and ')} out on {reached:.1%}"
            if curve.circuit.accuracy <= reached:
                found.append(
                    f"The circuit of {plural(curve.granularity)} by {curve.method} is right on "
                    f"{curve.circuit.accuracy:.1%}, and {least}: it need not keep anything of the behaviour."
                )
        return found


def chance_level(num_samples: int) -> float:
    """Return the accuracy that guessing between two tokens exceeds in less than 5 % of sets of so many samples.

    Example:
        >>> chance_level(128), chance_level(4)
        (0.5703125, 1.0)
    """
    above = 0
    for right in range(num_samples, -1, -1):  # of all 2^n ways to guess, those with more than so many right
        above += math.comb(num_samples, right)
        if 20 * above >= 2**num_samples:
            return right / num_samples
    return 0.0


def circuit_csv(curves: Sequence[Curve]) -> str:
    """Return a row for each granularity, method and sparsity: mean and standard deviation over the seeds."""
    rows: list[list[object]] = [["granularity", "method", "num_components", "num_seeds", "num_removed", *COLUMNS]]
    for curve in curves:
        for step in curve.steps:
            # Weights of equal relevance go together, and so each seed may have a number of its own.
            removed = round(sum(step.num_removed) / len(step.num_removed))
            of_curve = [curve.granularity, curve.method, curve.num_components, curve.num_seeds]
            rows.append([*of_curve, removed, *(getattr(step, name) for name in COLUMNS)])
    return csv_text(rows)


def summary(results: CircuitResults) -> str:
    """Return the sparsest circuit of each method as text."""
    middle = min((step.sparsity for step in results.curves[0].steps), key=lambda sparsity: abs(sparsity - 0.5))
    rows: Table = [("circuit", "seeds", "sparsity", "kept", "accuracy", f"accuracy at {middle:.0%}, mean +- sd")]
    for curve in results.curves:
        cells = ("-", "-", "-")
        if circuit := curve.circuit:
            kept = f"{circuit.num_kept:,} of {curve.num_components:,}"
            cells = (f"{circuit.sparsity:.1%}", kept, f"{circuit.accuracy:.1%}")
        (step,) = (step for step in curve.steps if step.sparsity == middle)
        spread = "" if step.accuracy_sd is None else f" +- {step.accuracy_sd:.1%}"
        name = f"{plural(curve.granularity)}, {curve.method}"
        rows.append((name, str(curve.num_seeds), *cells, f"{step.accuracy_mean:.1%}{spread}"))
    said = (
        f"The whole model is right on {results.whole_model.accuracy:.1%} of {results.num_samples} samples; a circuit "
        f"keeps {results.threshold:.0%} of that."
    )
    return "\n\n".join([said, aligned(rows), *(f"Warning: {for_terminal(text)}" for text in results.warnings)])


def draw_circuit(results: CircuitResults, path: Path) -> None:
    """Draw accuracy against sparsity, a panel for each granularity: mean over the seeds, within a standard deviation.

    Args:
        results: Of ``sparc3 circuit``.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(curve.granularity for curve in results.curves))
    colors = (BEFORE, *STRENGTHS)
    figure = Figure(figsize=(4.8, 0.9 + 2.1 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True, sharey=True, squeeze=False)[:, 0]
    full = 100 * results.whole_model.accuracy
    for axes, kind in zip(panels, kinds, strict=True):
        axes.axhline(results.threshold * full, color=CONTROL, linewidth=0.8, linestyle=":", label="threshold")
        axes.axhline(100 * results.chance, color=CONTROL, linewidth=0.8, linestyle="--", label="guessing")
        curves = [curve for curve in results.curves if curve.granularity == kind]
        for i, curve in enumerate(curves):
            # The whole model is where every curve begins, with no deviation.
            x = [0.0, *(100 * step.sparsity for step in curve.steps)]
            mean = [full, *(100 * step.accuracy_mean for step in curve.steps)]
            deviation = [0.0, *(100 * (step.accuracy_sd or 0.0) for step in curve.steps)]
            color = CONTROL if curve.scores is None else colors[i % len(colors)]
            axes.plot(x, mean, "o-", color=color, markersize=3, linewidth=1.5, label=for_picture(curve.method, 28))
            low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_title(f"{curves[0].num_components:,} {for_picture(plural(kind))}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    panels[-1].set(xlabel="sparsity in % (least relevant first)", ylim=(-3, 103))
    figure.supylabel("accuracy in %", fontsize=10)
    save_figure(figure, path)
