"""What a run draws, from the files that lie in its folder alone: so a drawing that failed can be made again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.evaluation.completions import COMPLETIONS, load_completions
from sparc3_lightning.evaluation.results import RESULTS, Results
from sparc3_lightning.evaluation.stress import STRESS
from sparc3_lightning.files import write_atomically
from sparc3_lightning.report import page
from sparc3_lightning.report.circuits import CIRCUIT, CircuitResults, circuit_csv, draw_circuit
from sparc3_lightning.report.comparison import (
    COMPARISON,
    ComparisonResults,
    draw_correlation,
    draw_overlap,
    draw_profiles,
    overlaps_csv,
)
from sparc3_lightning.report.escaping import for_terminal
from sparc3_lightning.report.figures import draw_differential, draw_layers
from sparc3_lightning.report.stress import PAGE, write_page
from sparc3_lightning.selection.neuron_list import SELECTION, SelectionResults
from sparc3_lightning.sources import first_line

EXPERIMENT = "experiment.json"


def _draw_evaluation(folder: Path) -> str:
    results, completions = Results.load(folder / RESULTS), load_completions(folder / COMPLETIONS)
    counts = {name: [judge.num_scored, judge.num_failed] for name, judge in results.judges.items()}
    found = {name: [0, 0] for row in completions for name in row["scores"]}
    for row in completions:
        for name in found:
            found[name][row["scores"].get(name) is None] += 1
    if found != counts:
        raise ValueError(
            f"{folder / COMPLETIONS} does not hold the continuations that {RESULTS} beside it is about: scored and not "
            f"scored by each judge are {found} there, {counts} in the results. Evaluate again."
        )
    page.write_report(folder / page.REPORT, results, completions)
    return page.REPORT


def _draw_experiment(folder: Path) -> str:
    """Draw the evaluation of an experiment, and copy its page."""
    try:
        evaluation = Path(json.loads((folder / EXPERIMENT).read_text(encoding="utf-8"))["stages"]["evaluation"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / EXPERIMENT} is damaged ({type(error).__name__}: {error!s:.80}).") from None
    _draw_evaluation(evaluation)
    shutil.copyfile(evaluation / page.REPORT, folder / page.REPORT)
    return page.REPORT


def _draw_circuit(folder: Path) -> str:
    results = CircuitResults.load(folder / CIRCUIT)
    write_atomically(folder / "circuit.csv", circuit_csv(results.curves))
    draw_circuit(results, folder / "circuit.png")
    return "circuit.png"


def _draw_comparison(folder: Path) -> str:
    results = ComparisonResults.load(folder / COMPARISON)
    write_atomically(folder / "overlap.csv", overlaps_csv(results.overlaps))
    draw_overlap(results.lists, results.overlaps, folder / "overlap.png", results.granularity)
    draw_profiles(results.layers, folder / "layers.png", results.granularity)
    if results.correlation is not None:
        draw_correlation([row.name for row in results.lists], results.correlation, folder / "correlation.png")
    return "overlap.png"


def _draw_stress(folder: Path) -> str:
    write_page(folder)
    return PAGE


def _draw_selection(folder: Path) -> str:
    selection = SelectionResults.load(folder / SELECTION)
    draw_layers(selection.neurons_per_module, folder / "layers.png", selection.granularity)
    draw_differential(selection, folder / "differential.png")
    return "differential.png"


# By the file that is drawn; each returns the name of what it drew last. An experiment has results.json too.
DRAWN: dict[str, Callable[[Path], str]] = {
    EXPERIMENT: _draw_experiment,
    RESULTS: _draw_evaluation,
    CIRCUIT: _draw_circuit,
    COMPARISON: _draw_comparison,
    STRESS: _draw_stress,
    SELECTION: _draw_selection,
}


def draw(folder: Path) -> Path:
    """Draw what a run of evaluate, sweep, circuit, compare, prune or run shows, from the files in its folder.

    Args:
        folder: Of the run.

    Returns:
        The page, or the last picture.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it that could be drawn.
        ValueError: If a file is damaged, or anything fails in drawing it.
    """
    name = next((name for name in DRAWN if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(DRAWN)}: give the folder of a run that is done.")
    try:
        return folder / DRAWN[name](folder)
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever it is, the files are there and it can be drawn again
        raise ValueError(f"{folder / name} could not be drawn: {type(error).__name__}: {first_line(error)}") from error


def draw_or_warn(folder: Path) -> bool:
    """Draw as ``draw`` does; what was measured is in the folder, and so a failure is a warning.

    Returns:
        Whether it was drawn.
    """
    try:
        draw(folder)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = f"{type(cause).__name__}: {first_line(cause):.300}"
        rank_zero_warn(
            for_terminal(f"The results are in {folder}, but not drawn ({reason}). 'sparc3 report {folder}' draws them.")
        )
        return False
    return True
