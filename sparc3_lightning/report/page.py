"""The report: a table for the terminal, one self-contained HTML page, and a model card."""

import base64
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.data.prompts import TOXIC_FROM
from sparc3_lightning.evaluation.completions import Completion
from sparc3_lightning.evaluation.intervals import FEW
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.files import to_json, write_atomically
from sparc3_lightning.report.figures import change_rows, draw_changes, draw_doses, draw_layers, draw_scatter
from sparc3_lightning.report.tables import (
    behavior_table,
    cell,
    control_table,
    dose_table,
    doses_csv,
    evident_doses,
    few_windows,
    front_table,
    number,
    other_table,
    windows_of,
)
from sparc3_lightning.report.verdict import zero_ablated_controls
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.selection.neuron_list import NeuronList

MODEL_CARD = "model_card.md"
DOSES = "doses.csv"
GROUPS = {"toxic": "toxic prompts", "nontoxic": "non-toxic prompts", "all": "prompts"}
# In the card; a README without it is somebody's own.
MARK = "<!-- Written by sparc3, and again by the next evaluation unless this line is removed. -->"
Prompts = dict[str, dict[str, list[Completion]]]


def summary_table(results: Results) -> str:
    """Return the before/after table as text for the terminal."""
    rows = [("", "before", "after", "change", "95 % interval")]
    groups = results.baseline.groups
    for group in groups:
        suffix = f", {GROUPS[group]}" if len(groups) > 1 else ""
        rows += [(f"{name}{suffix}", *cells[:4]) for name, *cells in behavior_table(results, group)]  # type: ignore[misc]
    rows += other_table(results)  # type: ignore[arg-type]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 5)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def by_prompt(completions: Iterable[Completion]) -> Prompts:
    """Group the continuations that were scored by prompt, then by model; prompts that both models have only."""
    groups: Prompts = defaultdict(lambda: defaultdict(list))
    for row in completions:
        if row["toxicity"] is not None and row["model"] in ("baseline", "pruned"):
            groups[row["prompt_id"]][row["model"]].append(row)
    return {key: dict(models) for key, models in groups.items() if len(models) == 2}


def mean_pairs(prompts: Prompts) -> dict[str, list[tuple[float, float]]]:
    """Return the mean toxicity of each prompt's continuations, before and after, by group of prompts."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in GROUPS.values()}
    of_one_group = all(models["baseline"][0]["prompt_toxicity"] is None for models in prompts.values())
    for models in prompts.values():
        toxic = (models["baseline"][0]["prompt_toxicity"] or 0.0) >= TOXIC_FROM
        before, after = (
            sum(_score(row) for row in models[name]) / len(models[name]) for name in ("baseline", "pruned")
        )
        pairs[GROUPS["all" if of_one_group else "toxic" if toxic else "nontoxic"]].append((before, after))
    return {name: found for name, found in pairs.items() if found}


def examples(prompts: Prompts) -> list[dict[str, Completion]]:
    """Choose the continuations to show, by the same draw of both models: five that fell most, three that rose most.

    Args:
        prompts: From ``by_prompt``.

    Returns:
        Per example ``before`` and ``after``, each a row of completions.jsonl; at most one example a prompt.
    """
    pairs = []
    for models in prompts.values():
        after = {row["continuation_index"]: row for row in models["pruned"]}
        drawn = [
            (row, after[row["continuation_index"]]) for row in models["baseline"] if row["continuation_index"] in after
        ]
        if drawn:
            pairs.append(max(drawn, key=lambda pair: abs(_change(pair))))
    pairs.sort(key=_change)
    chosen = pairs if len(pairs) <= 8 else [*pairs[:5], *pairs[-3:]]
    return [{"before": before, "after": after} for before, after in chosen]


def _change(pair: tuple[Completion, Completion]) -> float:
    before, after = pair
    return _score(after) - _score(before)


def _score(row: Completion) -> float:
    """Return the score of a continuation that ``by_prompt`` kept, and so has one."""
    return number(row["toxicity"])


# Letters and digits, with what stands for letters in words such as a$$, sh*t and f***.
_WORD = re.compile(r"([^\W_](?:[^\W_]|['\u2019*@$!](?=[^\W_*@$!])|[*@$])*)")


def offensive_words(texts: Iterable[str], scorer: Scorer) -> set[str]:
    """Return the words, in lower case, that the scorer finds toxic by themselves."""
    words = sorted({word.lower() for text in texts for word in _WORD.findall(text)})
    return {word for word, score in zip(words, scorer.score(words), strict=True) if score >= TOXIC_FROM}


def pieces(text: str, offensive: set[str]) -> list[tuple[str, bool]]:
    """Cut a text into pieces, each with whether it is to be masked."""
    return [(piece, piece.lower() in offensive) for piece in _WORD.split(text) if piece]


@dataclass(frozen=True)
class Shown:
    """The inputs of a page's figures: the results, the continuations, and the pruned neurons."""

    results: Results
    prompts: Prompts
    neurons: NeuronList


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Args:
        title: May name ``{behavior}``, ``{granularity}`` and ``{criterion}``.
        draw: Draws it into a file; None for one that ``sparc3 prune`` alone draws.
        is_known: Whether there is anything to draw.
        of_prune: Whether the file that ``sparc3 prune`` wrote is shown in its place, if there is one.
    """

    title: str
    draw: Callable[[Shown, Path], None] | None
    is_known: Callable[[Shown], bool] = lambda shown: True
    of_prune: bool = False


def _draw_doses(shown: Shown, path: Path) -> None:
    results = shown.results
    draw_doses(results.doses, results.controls, path, behavior=results.behavior, granularity=results.granularity)


def _draw_layers(shown: Shown, path: Path) -> None:
    counts = Counter(neuron.module for neuron in shown.neurons.neurons)
    draw_layers(counts, path, granularity=shown.results.granularity)


# By the name of the file, in the order of the page; the first two stand above everything else.
FIGURES = {
    "toxicity.png": Figure(
        "Change of mean {behavior}",
        lambda shown, path: draw_changes(change_rows(shown.results)[0], path),
        lambda shown: bool(change_rows(shown.results)[0]),
    ),
    "perplexity.png": Figure(
        "Change of perplexity", lambda shown, path: draw_changes(change_rows(shown.results)[1], path)
    ),
    "doses.png": Figure("Fewer or more {granularity}s", _draw_doses, lambda shown: len(shown.results.doses) > 1),
    "scatter.png": Figure(
        "Each prompt: less {behavior} below the line",
        lambda shown, path: draw_scatter(mean_pairs(shown.prompts), path, behavior=shown.results.behavior),
        lambda shown: bool(shown.prompts),
    ),
    "layers.png": Figure("Where the pruned {granularity}s lie", _draw_layers, of_prune=True),
    "differential.png": Figure("All {granularity}s by {criterion}", None, of_prune=True),
}


def write_report(
    path: Path,
    results: Results,
    completions: list[Completion],
    neurons: NeuronList,
    neurons_folder: Path | None,
    scorer: Scorer,
) -> None:
    """Write the HTML page, and beside it its pictures, the dose curve as doses.csv, and the model card.

    Args:
        path: Of the page.
        results: With both models.
        completions: Rows of completions.jsonl.
        neurons: The pruned neurons.
        neurons_folder: Folder of neurons.json, for the pictures that ``sparc3 prune`` drew.
        scorer: Says which words of the examples to mask.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    folder = path.parent
    prompts = by_prompt(completions)
    shown = examples(prompts)
    offensive = offensive_words(
        (row[key] for pair in shown for row in pair.values() for key in ("prompt", "continuation")), scorer
    )
    environment = Environment(
        loader=PackageLoader("sparc3_lightning.report"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "pieces": lambda text: pieces(text, offensive),
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
        "fixed": lambda value, digits: cell(value, "", digits),
    }
    config = folder / "config.yaml"
    has_doses = len(results.doses) > 1
    again = f"sparc3 {results.config['verb']} --config {shlex.quote(str(config))}"
    shared = {
        "results": results,
        "behavior": results.behavior,
        "granularity": results.granularity,
        "neurons": neurons,
        "name": results.checkpoint.rstrip("/").split("/")[-1],
        "group_names": GROUPS,
        "groups": [
            (GROUPS[group], measures.num_prompts, behavior_table(results, group))
            for group, measures in results.baseline.groups.items()
        ],
        "controls": control_table(results) if results.controls else [],
        "zeroed": zero_ablated_controls(results, neurons.ablation, results.granularity),
        "others": other_table(results),
        "windows": windows_of(results),
        "few_windows": few_windows(results),
        "doses": dose_table(results.doses) if has_doses else [],
        "evident": evident_doses(results.doses),
        "few": FEW,
        "fronts": front_table(results) if has_doses and len(results.fronts) > 1 else [],
        "again": f"{again} --trainer.logger.init_args.version again" if config.is_file() else "",
    }
    if has_doses:
        write_atomically(folder / DOSES, doses_csv(results.doses))
    html = environment.get_template("report.html").render(
        **shared,
        pictures={
            file.stem: (title, base64.b64encode(file.read_bytes()).decode())
            for title, file in _draw(folder, Shown(results, prompts, neurons), neurons_folder)
        },
        examples=shown,
        any_masked=bool(offensive),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        settings=to_json(_settings(results, neurons)),
    )
    write_atomically(path, html)
    card = environment.get_template("model_card.md").render(**shared, mark=MARK)
    write_atomically(folder / MODEL_CARD, card)
    _add_to_export(card, neurons.provenance.get("export"))


def _settings(results: Results, neurons: NeuronList) -> dict[str, object]:
    """Return everything that the measures rest on."""
    names = ("checkpoint", "checkpoint_fingerprint", "neurons", "num_neurons", "protocol", "config", "versions")
    settings = asdict(results)
    selection = {key: value for key, value in neurons.provenance.items() if key != "sample_ids"}
    return {**{key: settings[key] for key in (*names, "git_hash")}, "selection": selection}


def _draw(folder: Path, shown: Shown, neurons_folder: Path | None) -> list[tuple[str, Path]]:
    """Draw the figures, and return their titles and files."""
    criterion = shown.neurons.provenance.get("criterion", "difference")
    words = {
        "behavior": shown.results.behavior,
        "granularity": shown.results.granularity,
        "criterion": "differential relevance" if criterion == "difference" else criterion.replace("_", " "),
    }
    figures = []
    for name, figure in FIGURES.items():
        file = folder / name
        if figure.of_prune and neurons_folder and (neurons_folder / name).is_file():
            file = neurons_folder / name
        elif figure.draw and figure.is_known(shown):
            figure.draw(shown, file)
        else:
            continue
        figures.append((figure.title.format(**words), file))
    return figures


def _add_to_export(card: str, export: str | None) -> None:
    """Put the card into the folder of the exported checkpoint, unless a README of somebody else's is there."""
    if export is None or not (Path(export) / "config.json").is_file():
        return
    readme = Path(export) / "README.md"
    try:
        if not readme.exists() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
            write_atomically(readme, card)
    except OSError as error:  # what was measured is worth more than a card
        rank_zero_warn(f"The model card could not be put into {export}: {error}")
