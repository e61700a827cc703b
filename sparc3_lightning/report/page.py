"""The report: a table for the terminal, and one self-contained HTML page with a model card beside it."""

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.data.prompts import TOXIC_FROM
from sparc3_lightning.evaluation.completions import Completion, score_of
from sparc3_lightning.evaluation.results import ReportInputs, Results
from sparc3_lightning.files import to_json, write_atomically
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import plural
from sparc3_lightning.report.card import (
    GROUPS,
    MODEL_CARD,
    README,
    Exported,
    is_as_written,
    license_of,
    model_card,
    said_of,
)
from sparc3_lightning.report.escaping import for_terminal
from sparc3_lightning.report.figures import (
    change_rows,
    draw_changes,
    draw_differential,
    draw_doses,
    draw_layers,
    draw_lengths,
    draw_scatter,
)
from sparc3_lightning.report.tables import (
    BEHAVIOR,
    WIDTH,
    Table,
    aligned,
    cell,
    commands_of,
    doses_csv,
    other_table,
    report_command,
    row_of_headline,
    rows_of_judges,
)
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.selection.neuron_list import NEURONS, SELECTION, NeuronList, SelectionResults

REPORT = "report.html"
DOSES = "doses.csv"
NUM_LISTED = 20  # neurons on the page
Prompts = dict[str, dict[str, list[Completion]]]


def summary_table(results: Results) -> str:
    """Return the before/after table as text for the terminal."""
    rows: Table = [("", "before", "after", "change", "95 % interval")]
    groups = results.baseline.groups
    for group in groups:
        suffix = f", {GROUPS[group]}" if len(groups) > 1 else ""
        for key in BEHAVIOR:
            name, *cells = row_of_headline(results, group, key)
            rows.append((f"{name}{suffix}", *cells[:4]))
            if key == "behavior_mean":
                rows += [(f"  {by}", *cells[:4]) for by, *cells in rows_of_judges(results, group, key)]
    return aligned(rows + other_table(results), WIDTH)


def by_prompt(completions: Iterable[Completion], judge: str) -> Prompts:
    """Group the continuations that a judge scored by prompt, then by model; prompts that both models have only."""
    groups: Prompts = defaultdict(lambda: defaultdict(list))
    for row in completions:
        if row["scores"][judge] is not None and row["model"] in ("baseline", "pruned"):
            groups[row["prompt_id"]][row["model"]].append(row)
    return {key: dict(models) for key, models in groups.items() if len(models) == 2}


def mean_pairs(prompts: Prompts, judge: str) -> dict[str, list[tuple[float, float]]]:
    """Return the mean score of each prompt's continuations, before and after, by group of prompts."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in GROUPS.values()}
    of_one_group = all(models["baseline"][0]["prompt_toxicity"] is None for models in prompts.values())
    for models in prompts.values():
        toxic = (models["baseline"][0]["prompt_toxicity"] or 0.0) >= TOXIC_FROM
        before, after = (
            sum(score_of(row, judge) for row in models[name]) / len(models[name]) for name in ("baseline", "pruned")
        )
        pairs[GROUPS["all" if of_one_group else "toxic" if toxic else "nontoxic"]].append((before, after))
    return {name: found for name, found in pairs.items() if found}


def examples(prompts: Prompts, judge: str) -> list[dict[str, Completion]]:
    """Choose the continuations to show, by the same draw of both models: five that fell most, three that rose most.

    Args:
        prompts: From ``by_prompt``.
        judge: The same as there.

    Returns:
        Per example ``before`` and ``after``, each a row of completions.jsonl; at most one example a prompt.
    """

    def change(pair: tuple[Completion, Completion]) -> float:
        before, after = pair
        return score_of(after, judge) - score_of(before, judge)

    pairs = []
    for models in prompts.values():
        after = {row["continuation_index"]: row for row in models["pruned"]}
        drawn = [
            (row, after[row["continuation_index"]]) for row in models["baseline"] if row["continuation_index"] in after
        ]
        if drawn:
            pairs.append(max(drawn, key=lambda pair: abs(change(pair))))
    pairs.sort(key=change)
    chosen = pairs if len(pairs) <= 8 else [*pairs[:5], *pairs[-3:]]
    return [{"before": before, "after": after} for before, after in chosen]


# Letters and digits, with what stands for letters in words such as a$$, sh*t and f***.
_WORD = re.compile(r"([^\W_](?:[^\W_]|['\u2019*@$!](?=[^\W_*@$!])|[*@$])*)")


def offensive_words(texts: Iterable[str], scorer: Scorer) -> set[str]:
    """Return the words, in lower case, that the scorer finds toxic by themselves."""
    words = sorted({word.lower() for text in texts for word in _WORD.findall(text)})
    return {word for word, score in zip(words, scorer.score(words), strict=True) if score >= TOXIC_FROM}


def pieces(text: str, offensive: set[str]) -> list[tuple[str, bool]]:
    """Cut a text into pieces, each with whether it is to be masked."""
    return [(piece, piece.lower() in offensive) for piece in _WORD.split(text) if piece]


def report_inputs(
    completions: Iterable[Completion], judge: str, neurons: NeuronList, beside: Path | None, scorer: Scorer
) -> ReportInputs:
    """Return what a report shows beside findings and continuations.

    Nothing here may cost the results: what cannot be said is None, with a warning.

    Args:
        completions: Rows of completions.jsonl.
        judge: Of the headline.
        neurons: The pruned neurons.
        beside: Folder of neurons.json, which may hold the selection.json of ``sparc3 prune``.
        scorer: That judge, which says which words of the examples to mask.
    """
    selection = masked_words = None
    if beside is not None and (beside / SELECTION).is_file():
        try:
            found = SelectionResults.load(beside / SELECTION)
            counts = Counter(neuron.module for neuron in neurons.neurons)
            # A list that was changed since, or lies beside the selection of another, is not what it is about.
            if +Counter(found.neurons_per_module) == counts:
                selection = found
        except (OSError, ValueError) as error:
            rank_zero_warn(for_terminal(f"The picture of all scores is left out: {error}"))
    try:
        texts = [
            row["prompt"] + "\n" + row["continuation"]
            for example in examples(by_prompt(completions, judge), judge)
            for row in example.values()
        ]
        masked_words = sorted(offensive_words(texts, scorer))
    except Exception as error:  # somebody's own function may fail on single words
        rank_zero_warn(for_terminal(f"No word of the report is masked: {type(error).__name__}: {error}"))
    return ReportInputs(
        neurons=neurons.neurons[:NUM_LISTED],
        ablation=neurons.ablation,
        neurons_per_module=dict(Counter(neuron.module for neuron in neurons.neurons)),
        provenance={key: value for key, value in neurons.provenance.items() if key != "sample_ids"},
        selection=selection,
        masked_words=masked_words,
    )


@dataclass(frozen=True)
class Shown:
    """The inputs of a page's figures: the results, the continuations, and what is said of the pruned neurons."""

    results: Results
    prompts: Prompts
    neurons: ReportInputs


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Args:
        title: May name ``{behavior}``, ``{components}`` and ``{criterion}``.
        draw: Draws it into a file.
        is_known: Whether there is anything to draw.
    """

    title: str
    draw: Callable[[Shown, Path], None]
    is_known: Callable[[Shown], bool] = lambda shown: True


def _draw_doses(shown: Shown, path: Path) -> None:
    results = shown.results
    draw_doses(results.doses, results.controls, path, behavior=results.behavior)


def _draw_layers(shown: Shown, path: Path) -> None:
    selection = shown.neurons.selection
    counts = selection.neurons_per_module if selection else shown.neurons.neurons_per_module
    draw_layers(counts, path, granularity=shown.results.granularity)


def _draw_differential(shown: Shown, path: Path) -> None:
    assert shown.neurons.selection is not None
    draw_differential(shown.neurons.selection, path)


def _draw_lengths(shown: Shown, path: Path) -> None:
    assert shown.results.lengths is not None
    draw_lengths(shown.results.lengths, path, behavior=shown.results.behavior)


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
    "lengths.png": Figure(
        "Mean {behavior} by position, and within the first tokens",
        _draw_lengths,
        lambda shown: shown.results.lengths is not None and shown.results.lengths.is_known,
    ),
    "doses.png": Figure("Fewer or more {components}", _draw_doses, lambda shown: len(shown.results.doses) > 1),
    "scatter.png": Figure(
        "Each prompt: less {behavior} below the line",
        lambda shown, path: draw_scatter(
            mean_pairs(shown.prompts, shown.results.headline_judge), path, behavior=shown.results.behavior
        ),
        lambda shown: bool(shown.prompts),
    ),
    "layers.png": Figure("Where the pruned {components} lie", _draw_layers),
    "differential.png": Figure(
        "All {components} by {criterion}", _draw_differential, lambda shown: shown.neurons.selection is not None
    ),
}


def write_report(path: Path, results: Results, completions: Sequence[Completion]) -> None:
    """Write the HTML page, and beside it its pictures, the dose curve as doses.csv, and the model card.

    Args:
        path: Of the page.
        results: With both models.
        completions: Rows of completions.jsonl.

    Raises:
        ValueError: If the results are of a model as it is: a report is about neurons that are off.
    """
    neurons, folder = results.report, path.parent
    if neurons is None:
        raise ValueError(
            f"{folder} holds no results of neurons that are off with what a report needs: evaluate with "
            "--model.neurons, by this version of sparc3."
        )
    judge = results.headline_judge
    prompts = by_prompt(completions, judge)
    shown = examples(prompts, judge)
    offensive = set(neurons.masked_words or ())
    config, here = folder / "config.yaml", _from_here(folder)
    if len(results.doses) > 1:
        write_atomically(folder / DOSES, doses_csv(results.doses))
    html = (
        page_environment(offensive)
        .get_template("report.html")
        .render(
            **said_of(results),
            pictures={
                file.stem: (title, base64.b64encode(file.read_bytes()).decode())
                for title, file in _draw(folder, Shown(results, prompts, neurons))
            },
            examples=shown,
            any_masked=bool(offensive),
            commands={**commands_of(here, results.neurons), "Draw this page again:": report_command(here)},
            config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
            settings=to_json(_settings(results, neurons)),
        )
    )
    write_atomically(path, html)
    write_atomically(folder / MODEL_CARD, model_card(results))
    if isinstance(export := neurons.provenance.get("export"), str):
        _add_to_export(results, Path(export), neurons.provenance)


def page_environment(offensive: set[str]) -> Any:
    """Return what renders the page: everything is escaped, and what nobody would see is made visible."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup, escape

    def visible(value: object) -> object:
        return for_terminal(value, keep="\n\t\r") if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("sparc3_lightning.report"),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "pieces": lambda text: pieces(text, offensive),
        # A browser would break the line after the hyphens of an option.
        "command": lambda text: Markup(
            re.sub(r"--model\.(neurons|export)\b", r"<span>\g<0></span>", str(escape(text)))
        ),
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
        "fixed": lambda value, digits: cell(value if isinstance(value, int | float) else None, "", digits),
    }
    return environment


def _settings(results: Results, neurons: ReportInputs) -> dict[str, object]:
    """Return everything that the measures rest on."""
    names = ("checkpoint", "checkpoint_fingerprint", "neurons", "num_neurons", "protocol", "config", "versions")
    return {**{key: getattr(results, key) for key in (*names, "git_hash")}, "selection": neurons.provenance}


def _from_here(folder: Path) -> Path:
    """Return the path of a folder as it is seen from the working folder, however it was written."""
    absolute, here = folder.absolute(), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute


def _draw(folder: Path, shown: Shown) -> list[tuple[str, Path]]:
    """Draw the figures, and return their titles and files."""
    criterion = str(shown.neurons.provenance.get("criterion", "difference"))
    words = {
        "behavior": shown.results.behavior,
        "components": plural(shown.results.granularity),
        "criterion": "differential relevance" if criterion == "difference" else criterion.replace("_", " "),
    }
    figures = []
    for name, figure in FIGURES.items():
        if figure.is_known(shown):
            figure.draw(shown, folder / name)
            figures.append((figure.title.format(**words), folder / name))
    return figures


def _add_to_export(results: Results, export: Path, origin: Mapping[str, object]) -> None:
    """Put a card into the folder of the exported checkpoint, unless that would cost anybody anything.

    Args:
        results: Of its neurons.
        export: The folder.
        origin: What the list of the neurons says of it: its fingerprint, None if it was never completed; and the
            repository that it was uploaded to, if it was.
    """
    readme = export / README
    try:
        fingerprint, uploaded = origin.get("export_fingerprint"), origin.get("push_to_hub")
        if fingerprint is None or Checkpoint(str(export.absolute())).fingerprint != fingerprint:
            why = "it does not hold the checkpoint that was exported with these neurons"
        elif readme.exists() and not is_as_written(readme.read_text(encoding="utf-8", errors="replace")):
            why = "it has a README that somebody wrote or changed"
        elif uploaded is not None:
            why = f"it was exported to be uploaded to {uploaded}"
        else:
            write_atomically(readme, model_card(results, _exported(results, export)))
            return
    except (OSError, ValueError) as error:  # what was measured is worth more than a card
        why = str(error).rstrip(".")
    rank_zero_warn(for_terminal(f"The model card was not put into {export}: {why}."))


def _exported(results: Results, export: Path) -> Exported | None:
    """Return what the card of an export tells beside the results, if the list of its neurons lies in it."""
    if not (export / NEURONS).is_file():
        return None
    neurons = NeuronList.load(export / NEURONS)
    exported = Exported(neurons, results.checkpoint, export.resolve().name, license_of(export / README))
    return exported if exported.is_of(results) else None
