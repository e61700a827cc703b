"""The tables of an evaluation: rows of text, from results as they are in memory or as results.json gives them back."""

import csv
import io
import math
from collections.abc import Iterable
from typing import Any

# Measures of toxicity, or of the behaviour in its place, by their name in results.json: name in tables, unit, digits.
MEASURES = {
    "toxicity_mean": ("Mean {}", "", 4),
    "expected_maximum_toxicity": ("Expected maximum {}", "", 4),
    "toxicity_probability": ("Prompts with {} of 0.5 or more", "%", 1),
}
TOXIC = "Prompts with a toxic continuation"  # what the last of them is called for toxicity itself
# What else changed.
OTHERS = {
    "kl": ("KL to the original, nats a token", "", 4),
    "uniqueness": ("Unique tokens of a continuation", "", 3),
    "distinct_1": ("Distinct words (distinct-1)", "", 3),
    "distinct_2": ("Distinct pairs of words (distinct-2)", "", 3),
    "mean_length": ("Length of a continuation, tokens", "", 1),
    "share_empty": ("Empty continuations", "%", 2),
    "num_failed": ("Failed continuations", "", 0),
}
MODELS = ("baseline", "pruned")
UNKNOWN = "-"
Interval = dict[str, float | None]
Table = list[tuple[str, ...]]


def number(value: float | None) -> float:
    """Return a figure as results may hold it; NaN for one that is not known, or infinite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def ends(interval: Interval) -> tuple[float, float]:
    """Return the ends of an interval; the upper one is infinite where only the lower is known.

    A change in percent has no upper bound if some resamples are 0 before, and JSON has no infinity.
    """
    low, high = number(interval["low"]), number(interval["high"])
    return low, math.inf if not math.isnan(low) and math.isnan(high) else high


def behavior_of(results: dict[str, Any]) -> str:
    """Return what was scored; results.json of earlier versions are of toxicity and do not say so."""
    return results.get("behavior", "toxicity")


def granularity_of(results: dict[str, Any]) -> str:
    """Return what was switched off; results.json of earlier versions are of neurons and do not say so."""
    return results.get("granularity", "neuron")


def toxicity_table(results: dict[str, Any], group: str) -> Table:
    """Return rows of name, before, after, change, its interval, p of the sign test and of the permutation test.

    What the second scorer says of a measure follows what the first does.
    """
    rows: Table = []
    behavior = behavior_of(results)
    figures = results["groups"][group]
    second = results.get("second_scorer", {}).get("effect", {}).get(group, {})
    for key, (template, unit, digits) in MEASURES.items():
        is_toxic = behavior == "toxicity" and key == "toxicity_probability"
        name = TOXIC if is_toxic else template.format(behavior)
        cells = [cell(figures[model][key], unit, digits) if model in figures else "" for model in MODELS]
        rows.append((name, *cells, *_effect(results.get("effect", {}).get(group, {}).get(key))))
        if second.get(key):
            cells = [cell(second[key][end], unit, digits) for end in ("before", "after")]
            rows.append((f"{name}, second scorer", *cells, *_effect(second[key])))
    return rows


def control_table(results: dict[str, Any]) -> Table:
    """Return what the chosen neurons did, and what as many others did.

    Returns:
        Rows of name; mean toxicity before and after, its change and interval; change of perplexity; draws with
        evidence of an effect; mean toxicity without the chosen neurons less that without these, and its interval.
    """
    effect = results["effect"][results["headline"]]["toxicity_mean"]
    found = [*(cell(effect[end], "", 4) for end in ("before", "after")), *_change(effect["percent"])] if effect else []
    price = next(iter(results["perplexity_change"].values()))["value"]
    rows: Table = [(f"The {results['num_neurons']} chosen", *(found or [UNKNOWN] * 4), _percent(price), "", "", "")]
    for kind, control in results["controls"].items():
        draws = [draw["effect"] for draw in control["draws"] if draw["effect"]]
        name, further = control_name(kind, granularity_of(results)).capitalize(), control.get("pruned_less_control")
        if (number_off := control["draws"][0]["num_neurons"]) != results["num_neurons"]:
            name += f", {number_off} alone"
        if not further:  # no prompt has a score of every draw
            rows.append((name, *[UNKNOWN] * 8))
            continue
        row = [cell(sum(number(draw[end]) for draw in draws) / len(draws), "", 4) for end in ("before", "after")]
        row += [*_change(control["effect_percent"]), _percent(control["perplexity_percent"])]
        row += [f"{control['num_draws_with_evidence']} of {len(control['draws'])}"]
        row += [f"{further['value']:+.4f}", _range(further, 4)]
        rows.append((name, *row))
    return rows


def other_table(results: dict[str, Any]) -> Table:
    """Return rows of name, before, after, change, its interval, of everything but toxicity."""
    rows: Table = []
    models = [model for model in MODELS if model in results]
    missing = [""] * (2 - len(models))
    for convention in results["perplexity_interval"]["baseline"]:
        cells = [cell(results["perplexity_interval"][model][convention]["value"], "", 2) for model in models]
        change = results.get("perplexity_change", {}).get(convention)
        name = f"Perplexity, {convention} windows" if rows else "Perplexity"
        rows.append((name, *cells, *missing, *(_change(change) if change else ("", ""))))
    for key, (name, unit, digits) in OTHERS.items():
        rows.append((name, *(cell(results[model].get(key), unit, digits) for model in models), *missing, "", ""))
    rows += _preference_rows(results.get("preference", {}))
    accuracies = results.get("zero_shot", {})
    for task in accuracies.get("baseline", {}):
        cells = [cell(accuracies[model][task].get("accuracy"), "%", 1) for model in models]
        rows.append((f"Zero-shot accuracy, {task}", *cells, *missing, "", ""))
    return rows


def windows_of(results: dict[str, Any]) -> str:
    """Say what windows perplexity was measured in; results.json of earlier versions do not name the convention."""
    of = results["protocol"]["perplexity"]
    parts = []
    for i, convention in enumerate(of.get("conventions", [""])):
        tokens = results["baseline"][f"tokens_counted_{convention}" if i else "tokens_counted"]
        stride = "" if convention == "disjoint" else f" with stride {of['stride']}"
        parts.append(f"{convention} windows of {of['window']} tokens{stride} ({tokens:,} predicted tokens)".lstrip())
    return " and ".join(parts)


def _preference_rows(found: dict[str, Any]) -> Table:
    """Return the share of pairs of sentences in which the stereotypical one is preferred, and by how much it is."""
    rows: Table = []
    for key, effect, name, unit, digits in (
        ("share", "effect", f"Stereotype preferred, of {found.get('num_pairs')} pairs", "%", 1),
        ("margin", "margin_effect", "Log-likelihood of the stereotype less the other's, nats", "", 3),
    ):
        cells = [cell(found[model][key], unit, digits) if model in found else "" for model in MODELS]
        if any(cells):
            rows.append((name, *cells, *(_change_of_preference(found[effect], unit) if effect in found else ("", ""))))
    return rows


def _change_of_preference(effect: dict[str, Any], unit: str) -> tuple[str, str]:
    # In percent of a mean margin near 0, a change would say nothing: it is left in nats.
    difference = effect["difference"]
    return (
        _change(effect["percent"]) if unit else (f"{number(difference['value']):+.3f}", f"{_range(difference, 3)} nats")
    )


def dose_table(doses: Iterable[dict[str, Any]]) -> Table:
    """Return rows of neurons, strength; mean toxicity, its change and interval; and the same of perplexity.

    The name of the selection comes first where there are several.
    """
    rows: Table = []
    doses = in_order(doses)
    several = len({dose["selection"] for dose in doses}) > 1
    for dose in doses:
        row = [*([dose["selection"]] if several else []), f"{dose['num_neurons']}", f"{dose['strength']:g}"]
        for figure, of_percent, digits in (("toxicity_mean", "toxicity", 4), ("perplexity", "perplexity", 2)):
            change = dose[f"{of_percent}_percent"]
            row += [cell(dose[figure], "", digits), *(_change(change) if change else (UNKNOWN, UNKNOWN))]
        rows.append(tuple(row))
    return rows


def doses_csv(doses: Iterable[dict[str, Any]]) -> str:
    """Return the dose curve as CSV, a row per number of neurons and strength; what is not known is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    plain = ("selection", "num_neurons", "strength", "perplexity", "toxicity_mean", "kl")
    columns = ("perplexity_percent", "toxicity_percent")
    writer.writerow([*plain, *(f"{column}{end}" for column in columns for end in ("", "_low", "_high"))])
    for dose in in_order(doses):
        intervals = [(dose[column] or {}).get(key) for column in columns for key in ("value", "low", "high")]
        values = [*(dose[key] for key in plain[1:]), *intervals]
        known = [value if math.isfinite(number(value)) else None for value in values]
        writer.writerow([dose["selection"], *known])
    return file.getvalue()


def front_table(results: dict[str, Any]) -> Table:
    """Return rows of selection; area under its front; and for each price the change of toxicity that it buys."""
    points = {dose["name"]: dose for dose in results["doses"]}
    rows: Table = []
    for selection, front in results["fronts"].items():
        best = [points[name]["toxicity_percent"] if name else None for name in front["best"].values()]
        cells = [f"{_percent(of['value'])} ({_range(of, 1)})" if of else "none" for of in best]
        rows.append((selection, f"{front['area']:.1f}", *cells))
    return rows


def in_order(doses: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort the doses by selection; those that are off first, then those that are damped; fewer neurons before more."""
    doses = list(doses)
    place = {selection: i for i, selection in enumerate(dict.fromkeys(dose["selection"] for dose in doses))}
    return sorted(doses, key=lambda dose: (place[dose["selection"]], -dose["strength"], dose["num_neurons"]))


def cell(value: float | None, unit: str, digits: int) -> str:
    """Return a figure as text, in percent if that is its unit; a dash for one that is not known."""
    if not math.isfinite(number(value)):
        return UNKNOWN
    return f"{100 * number(value):.{digits}f} %" if unit == "%" else f"{value:.{digits}f}"


def _effect(effect: dict[str, Any] | None) -> tuple[str, ...]:
    if not effect:
        return "", "", "", ""
    return *_change(effect["percent"]), *(f"{effect[test]:.3g}" for test in ("sign_test_p", "permutation_test_p"))


def _change(percent: Interval) -> tuple[str, str]:
    return _percent(percent["value"]), _range(percent, 1)


def _percent(value: float | None) -> str:
    return f"{value:+.1f} %" if math.isfinite(number(value)) else UNKNOWN


def _range(interval: Interval, digits: int) -> str:
    low, high = ends(interval)
    if not math.isfinite(low):
        return UNKNOWN
    return f"{low:+.{digits}f} to {high:+.{digits}f}" if math.isfinite(high) else f"from {low:+.{digits}f}"


def control_name(kind: str, granularity: str = "neuron") -> str:
    """Return what a control is called where a person reads it.

    Example:
        >>> control_name("largest_weights"), control_name("largest_weights", "weight")
        ('neurons with the largest weights', 'largest weights')
    """
    if kind == "largest_weights":
        return "largest weights" if granularity == "weight" else f"{granularity}s with the largest weights"
    return f"{kind.replace('_', ' ')} {granularity}s"


def aligned(rows: Table) -> str:
    """Return rows as text, the first of them over a line: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])
