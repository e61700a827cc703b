"""The tables of an evaluation: rows of text; and what a terminal shows at the end: one of them, and what to do next."""

import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path

from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.intervals import FEW, Difference, Interval
from sparc3_lightning.evaluation.metrics import CONTINUATION_METRICS, mean
from sparc3_lightning.evaluation.results import OTHER_TEXT, RESULTS, Dose, Findings, Preference, Results, TextProtocol
from sparc3_lightning.models.components import plural
from sparc3_lightning.report.escaping import csv_text, for_shell, for_terminal
from sparc3_lightning.selection.neuron_list import CHOSEN

# Measures of the behaviour by their name in ``Effects``: name in tables, unit, digits.
BEHAVIOR = {
    "behavior_mean": ("Mean {}", "", 4),
    "expected_maximum_behavior": ("Expected maximum {}", "", 4),
    "behavior_probability": ("Prompts with {} of 0.5 or more", "%", 1),
}
TOXIC = "Prompts with a toxic continuation"  # what the last of them is called for toxicity itself
UNKNOWN = "-"
CANNOT = "cannot be said"  # of an interval: too few prompts changed, or what it is a share of could be 0
Table = list[tuple[str, ...]]
EXPORT = "pruned-model"  # folder to export to, beside the results, so that the model card tells them
WIDTH = 100  # columns of a terminal
MIN_NAME = 16  # columns of a name at least: enough to tell the rows of a table apart


def number(value: float | None) -> float:
    """Return a measure as results may hold it; NaN for one that is not known, or infinite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def ends(interval: Interval) -> tuple[float, float]:
    """Return the ends of an interval to draw; the upper one is infinite where only the lower is known."""
    low, high = number(interval.low), number(interval.high)
    return low, math.inf if not math.isnan(low) and math.isnan(high) else high


def behavior_table(results: Results, group: str, named: Callable[[str], str] = str) -> Table:
    """Return rows of name, before, after, change, its interval, p of the sign test and of the permutation test.

    What the other judges say of a measure follows what the headline's does.

    Args:
        results: Of an evaluation.
        group: Of prompts.
        named: What a judge is called, and a place that it is from.
    """
    rows: Table = []
    for key in BEHAVIOR:
        name, *cells = row_of_headline(results, group, key)
        rows.append((name, *cells))
        rows += [(f"{name}, {by}", *cells) for by, *cells in rows_of_judges(results, group, key, named)]
    return rows


def row_of_headline(results: Results, group: str, key: str) -> tuple[str, ...]:
    """Return what the headline's judge says of a measure, see ``behavior_table``."""
    template, unit, digits = BEHAVIOR[key]
    effects = results.effects.get(group)
    is_toxic = results.behavior == "toxicity" and key == "behavior_probability"
    name = TOXIC if is_toxic else template.format(results.behavior)
    cells = [cell(getattr(model.groups[group], key), unit, digits) for model in results.models.values()]
    return name, *cells, *[""] * (2 - len(cells)), *_effect(getattr(effects, key) if effects else None)


def rows_of_judges(results: Results, group: str, key: str, named: Callable[[str], str] = str) -> Table:
    """Return what the judges beside the headline's say of a measure, see ``behavior_table``."""
    rows: Table = []
    for name, judge in results.other_judges.items():
        by = f"by {named(name)}{' (chose the neurons)' if judge.is_chooser else ''}"
        effect = getattr(judge.effects[group], key) if group in judge.effects else None
        if effect is not None:
            cells = [cell(value, *BEHAVIOR[key][1:]) for value in (effect.before, effect.after)]
            rows.append((by, *cells, *_effect(effect)))
    return rows


def judge_table(results: Results, named: Callable[[str], str] = str) -> Table:
    """Return rows of a judge, what it is, its part, and how many continuations it could score, and could not."""
    rows: Table = []
    for name, judge in results.judges.items():
        parts = ["the headline"] if name == results.headline_judge else []
        parts += ["chose the neurons"] if judge.is_chooser else []
        kind, mark, place = judge.source.partition(": ")
        what = kind + mark + (named(place) if place else "") + (f", {judge.revision[:12]}" if judge.revision else "")
        part = ", ".join(parts) or "beside it"
        rows.append((named(name), what, part, f"{judge.num_scored}", f"{judge.num_failed}"))
    return rows


def agreement_of(results: Findings, named: Callable[[str], str] = str) -> str:
    """Return in a sentence how far the judges agree; "" for a single one."""
    found = results.agreement
    if found is None:
        return ""
    pairs = [
        f"{named(one)} and {named(other)} {_correlation(rho)}"
        for one, others in found.spearman.items()
        for other, rho in others.items()
    ]
    together = "both" if len(results.judges) == 2 else "all"
    return (
        f"{found.num_scored} continuations with and without pruning were scored by {together} judges. Krippendorff's "
        f"alpha at interval level, over what two or more could score, is {_correlation(found.krippendorff_alpha)}; "
        f"correlations of ranks (Spearman), each over what both could score: {'; '.join(pairs)}."
    )


def _correlation(value: float) -> str:
    return cell(value, "", 2) if math.isfinite(number(value)) else CANNOT


def chooser_judges(results: Findings, granularity: str) -> str:
    """Say that the headline is of a scorer that the neurons were chosen with; "" if it is of another."""
    if not results.is_judged_by_chooser:
        return ""
    others = "no other judge was asked" if len(results.judges) == 1 else "every judge had a part in the choice"
    return f"The scorer that chose the {plural(granularity)}, '{results.headline_judge}', judges them: {others}."


def control_table(results: Results) -> Table:
    """Return the effects of the chosen neurons, and of as many others.

    Returns:
        Rows of name; mean behavior before and after, its change and interval; change of perplexity and, if there is
        another text, of its perplexity; draws with evidence of an effect; mean behavior without the chosen neurons less
        that without these, and its interval.
    """
    effect = results.main_effect
    cells = (
        [*(cell(interval, "", 4) for interval in (effect.before, effect.after)), *_change(effect.percent)]
        if effect
        else []
    )
    firsts = [next(iter(results.perplexity_change)), *first_of_other_text(results)]
    perplexity = [_percent(results.perplexity_change[name].value) for name in firsts]
    rows: Table = [(f"The {results.num_neurons} chosen", *(cells or [UNKNOWN] * 4), *perplexity, "", "", "")]
    for kind, control in results.controls.items():
        effects = [draw.effect for draw in control.draws if draw.effect]
        name, outcome = CONTROLS[kind].name(results.granularity).capitalize(), control.outcome
        if (number_off := control.draws[0].num_neurons) != results.num_neurons:
            name += f", {number_off} alone"
        if outcome is None:  # no prompt has a score of every draw
            rows.append((name, *[UNKNOWN] * (7 + len(firsts))))
            continue
        means = [
            sum(values) / len(effects)
            for values in zip(*((effect.before, effect.after) for effect in effects), strict=True)
        ]
        row = [cell(mean, "", 4) for mean in means]
        row += [*_change(outcome.effect_percent), _percent(outcome.perplexity_percent)]
        if len(firsts) > 1:
            changes = [draw.other_text_percent for draw in control.draws]
            row.append(_percent(mean([change.value for change in changes if change])))
        row += [f"{outcome.num_draws_with_evidence} of {len(control.draws)}"]
        further = outcome.pruned_less_control
        row += [_signed(further.value, 4), _range(further, 4)]
        rows.append((name, *row))
    return rows


def other_table(results: Findings) -> Table:
    """Return rows of name, before, after, change, its interval, of everything but the behavior."""
    models = results.models
    missing = [""] * (2 - len(models))
    rows: Table = []
    for convention in results.baseline.perplexity:
        cells = [cell(model.perplexity[convention].value, "", 2) for model in models.values()]
        change = results.perplexity_change.get(convention)
        name = "Perplexity, other text" if convention.startswith(OTHER_TEXT) else "Perplexity"
        if name in [row[0] for row in rows]:
            name += f", {convention.removeprefix(OTHER_TEXT)} windows"
        rows.append((name, *cells, *missing, *(_change(change) if change else ("", ""))))
    cells = [cell(model.kl, "", 4) for model in models.values()]
    rows.append(("KL to the original, nats a token", *cells, *missing, "", ""))
    groups = [model.groups[results.headline] for model in models.values()]
    for key, metric in CONTINUATION_METRICS.items():
        cells = [cell(getattr(group, key), metric.unit, metric.digits) for group in groups]
        rows.append((metric.name, *cells, *missing, "", ""))
    rows.append(("Failed continuations", *(cell(group.num_failed, "", 0) for group in groups), *missing, "", ""))
    rows += _preference_rows(results.preference) if results.preference else []
    for task in results.zero_shot.get("baseline", {}):
        cells = [cell(results.zero_shot[model][task].get("accuracy"), "%", 1) for model in models]
        rows.append((f"Zero-shot accuracy, {task}", *cells, *missing, "", ""))
    return rows


def first_of_other_text(results: Findings) -> list[str]:
    """Return what the changes of perplexity have that of the other text by, for its first windows; [] without one."""
    return [name for name in results.perplexity_change if name.startswith(OTHER_TEXT)][:1]


def texts_of(results: Results) -> list[tuple[str, str]]:
    """Return each text that perplexity was measured on, and its windows in words."""
    protocol, num_tokens = results.protocol, results.baseline.num_tokens
    texts = {"": protocol.perplexity} | ({} if protocol.other_text is None else {OTHER_TEXT: protocol.other_text})
    return [
        (text.text, _windows_of(text, {name: num_tokens[before + name] for name in text.conventions}))
        for before, text in texts.items()
    ]


def _windows_of(perplexity: TextProtocol, num_tokens: Mapping[str, int]) -> str:
    parts = []
    for convention, tokens in num_tokens.items():
        stride = "" if convention == "disjoint" else f" with stride {perplexity.stride}"
        parts.append(f"{convention} windows of {perplexity.window} tokens{stride} ({tokens:,} predicted tokens)")
    which = {"none": "no window", "first": "the first window alone", "every": "every window"}
    bos = which.get(perplexity.bos, perplexity.bos)
    return " and ".join(parts) + f", with the beginning-of-sequence token in {bos}"


def few_windows(results: Results) -> str:
    """Return the numbers of windows that are too few for intervals to hold what they say, as ``7 and 12``; or ""."""
    return " and ".join(f"{number}" for number in results.baseline.num_windows.values() if number < FEW)


def _preference_rows(found: Preference) -> Table:
    """Return the share of sentence pairs whose stereotypical sentence is preferred, and the margin."""
    rows: Table = []
    for key, effect, name, unit, digits in (
        ("share", found.effect, f"Stereotype preferred, of {found.num_pairs} pairs", "%", 1),
        ("margin", found.margin_effect, "Log-likelihood of the stereotype less the other's, nats", "", 3),
    ):
        cells = [
            cell(getattr(measures, key), unit, digits) if measures else ""
            for measures in (found.baseline, found.pruned)
        ]
        if any(cells):
            rows.append((name, *cells, *(_change_of_preference(effect, unit) if effect else ("", ""))))
    return rows


def _change_of_preference(effect: Difference, unit: str) -> tuple[str, str]:
    # In percent of a mean margin near 0, a change would say nothing: it is left in nats.
    difference = effect.difference
    if unit:
        return _change(effect.percent)
    return _signed(difference.value, 3), _range(difference, 3) + (" nats" if difference.is_known else "")


def dose_table(doses: Iterable[Dose]) -> Table:
    """Return rows of neurons, damping; mean behavior, its change and interval; and the same of perplexity.

    The name of the selection comes first where there are several.
    """
    rows: Table = []
    doses = in_order(doses)
    several = len({dose.selection for dose in doses}) > 1
    for dose in doses:
        row = [*([dose.selection] if several else []), f"{dose.num_neurons}", f"{dose.damping:g}"]
        change = dose.behavior_percent
        row += [cell(dose.behavior_mean, "", 4), *(_change(change) if change else (UNKNOWN, UNKNOWN))]
        row += [cell(dose.perplexity, "", 2), *_change(dose.perplexity_percent)]
        rows.append(tuple(row))
    return rows


def evident_doses(doses: Sequence[Dose]) -> list[str]:
    """Return the names of the doses that give evidence of a change even though as many were measured."""
    return [dose.name for dose in in_order(doses) if dose.effect and dose.effect.is_evidence_among(len(doses))]


def doses_csv(doses: Iterable[Dose]) -> str:
    """Return the dose curve as CSV, a row per number of neurons and damping; what is not known is empty."""
    plain = ("selection", "num_neurons", "damping", "perplexity", "behavior_mean", "kl")
    doses, columns = list(doses), ["perplexity_percent", "behavior_percent"]
    columns += ["other_text_percent"] if any(dose.other_text_percent for dose in doses) else []
    rows: list[list[object]] = [[*plain, *(f"{column}{end}" for column in columns for end in ("", "_low", "_high"))]]
    rows[0] += [f"{column}_together_{end}" for column in columns[:2] for end in ("low", "high")]
    unknown = Interval(math.nan, math.nan, math.nan)
    for dose in in_order(doses):
        changes = [getattr(dose, column) or unknown for column in columns]
        values = [dose.num_neurons, dose.damping, dose.perplexity, dose.behavior_mean, dose.kl]
        values += [end for change in changes for end in (change.value, change.low, change.high)]
        of_all = [dose.together.perplexity_percent, dose.together.behavior_percent] if dose.together else [None, None]
        values += [end for change in of_all for end in ((change or unknown).low, (change or unknown).high)]
        rows.append([dose.selection, *values])
    return csv_text(rows)


def front_table(results: Findings) -> Table:
    """Return rows of selection; area under its front; and for each budget the change of behavior within it."""
    points = {dose.name: dose for dose in results.doses}
    rows: Table = []
    for selection, front in results.fronts.items():
        best = [points[name].behavior_percent if name else None for name in front.best.values()]
        cells = [with_interval(change, unit=" %") if change else "none" for change in best]
        rows.append((selection, f"{front.area:.1f}", *cells))
    return rows


def in_order(doses: Iterable[Dose]) -> list[Dose]:
    """Sort the doses by selection; those that are off first, then those that are damped; fewer neurons before more."""
    doses = list(doses)
    place = {selection: i for i, selection in enumerate(dict.fromkeys(dose.selection for dose in doses))}
    return sorted(doses, key=lambda dose: (place[dose.selection], -dose.damping, dose.num_neurons))


def cell(value: float | None, unit: str, digits: int) -> str:
    """Return a measure as text, in percent if that is its unit; a dash for one that is not known."""
    if not math.isfinite(number(value)):
        return UNKNOWN
    return f"{_fixed(100 * number(value), digits)} %" if unit == "%" else _fixed(number(value), digits)


def _signed(value: float | None, digits: int) -> str:
    """Return a difference as text; a dash for one that is not known."""
    return _fixed(number(value), digits, "+") if math.isfinite(number(value)) else UNKNOWN


def _fixed(value: float, digits: int, sign: str = "") -> str:
    """Return a number with so many digits after the point, unless it has more before it than a table has room for."""
    return f"{value:{sign}.{digits}{'f' if abs(value) < 1e8 else 'e'}}"


def _effect(effect: Difference | None) -> tuple[str, ...]:
    if effect is None:
        return "", "", "", ""
    tests = (effect.sign_test_p, effect.permutation_test_p)
    return *_change(effect.percent), *(f"{p:.3g}" if math.isfinite(number(p)) else UNKNOWN for p in tests)


def _change(percent: Interval) -> tuple[str, str]:
    return _percent(percent.value), _range(percent, 1) if math.isfinite(percent.value) else UNKNOWN


def with_interval(interval: Interval, digits: int = 1, sign: str = "+", unit: str = "") -> str:
    """Return a value with its interval, such as ``-45.5 (-50.9 to -39.4)``; a dash for one that is not known."""
    if not math.isfinite(interval.value):
        return UNKNOWN
    return f"{_fixed(interval.value, digits, sign)}{unit} ({_range(interval, digits, sign)})"


def _percent(value: float | None) -> str:
    return f"{_fixed(number(value), 1, '+')} %" if math.isfinite(number(value)) else UNKNOWN


def _range(interval: Interval, digits: int, sign: str = "+") -> str:
    if not interval.is_known:
        return CANNOT
    return f"{_fixed(interval.low, digits, sign)} to {_fixed(interval.high, digits, sign)}"


def aligned(rows: Table, width: int | None = None) -> str:
    """Return rows as text, the first of them over a line: the first column to the left, the others to the right.

    Args:
        rows: Of as many columns each.
        width: Of a line; a name that it has no room for is cut in its middle. None cuts nothing.
    """
    rows = [tuple(map(for_terminal, row)) for row in rows]
    if width is not None:
        others = sum(2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[1:])
        rows = [(cut(row[0], max(width - others, MIN_NAME)), *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def cut(text: str, longest: int) -> str:
    """Return a text; a longer one without its middle."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[len(text) - (longest - 1) // 2 :]}"


def closing(table: str, verdict: str, written: Sequence[str], commands: Sequence[str]) -> str:
    """Return what a terminal shows at the end of an evaluation.

    Args:
        table: From ``summary_table``.
        verdict: What was found, in words.
        written: A line for each file.
        commands: From ``next_commands``.
    """
    said = textwrap.fill(for_terminal(verdict), WIDTH, break_long_words=False, break_on_hyphens=False)
    lines = ["", table, "", said, "", *written]
    if commands:
        lines += ["", "What to do next:", *(f"  {command}" for command in commands), ""]
    return "\n".join(lines)


def commands_of(folder: Path, neurons: str | None) -> dict[str, str]:
    """Return commands that go on from an evaluation, to be pasted into a shell, by what they are for.

    Args:
        folder: Of its results.
        neurons: The list that was measured; None if there is none. One that was chosen of it goes before it.
    """
    chosen, commands = folder / CHOSEN, {}
    listed = _as_argument(chosen) if chosen.is_file() else neurons and _as_argument(neurons)
    if listed:
        places = (folder / (EXPORT if number == 1 else f"{EXPORT}-{number}") for number in count(1))
        export = next(place for place in places if not place.exists())
        commands["Write the changed model as a checkpoint of its own:"] = [
            *("sparc3", "export", "--model.neurons", listed),
            *("--model.export", _as_argument(export)),
        ]
        commands["Talk to both models, side by side:"] = ["sparc3", "chat", "--model.neurons", listed]
    commands["Measure it again, and compare every figure:"] = ["sparc3", "reproduce", _as_argument(folder / RESULTS)]
    return {what: for_shell(command) for what, command in commands.items()}


def next_commands(folder: Path, neurons: str | None, report: Path | None) -> list[str]:
    """Return the commands that a terminal shows at the end of an evaluation; see ``commands_of``.

    Args:
        folder: Of its results.
        neurons: The list that was measured, if there is one.
        report: The page; None if it was not drawn.
    """
    opener = {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")
    opened = [] if report is None else [for_shell([opener, _as_argument(report)])]
    return [*opened, *commands_of(folder, neurons).values()]


def report_command(folder: Path) -> str:
    """Return the command that draws a run again."""
    return for_shell(["sparc3", "report", _as_argument(folder)])


def _as_argument(path: Path | str) -> str:
    """Return a path that is not taken for an option, or for somebody's home."""
    return str(Path(path).absolute() if str(path).startswith(("-", "~")) else path)
