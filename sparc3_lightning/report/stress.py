"""What is left of an effect under stress: the table, the sentences, and a page of both."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from sparc3_lightning.evaluation.intervals import Interval
from sparc3_lightning.evaluation.stress import STRESS, Stressed, StressResults
from sparc3_lightning.files import write_atomically
from sparc3_lightning.report.escaping import for_terminal, public_name
from sparc3_lightning.report.tables import CANNOT, UNKNOWN, Table, cell

PAGE = "stress.html"
STYLE = (
    "body{margin:2rem auto;max-width:66rem;padding:0 1rem;font:1rem/1.5 system-ui,sans-serif;color:#1d2330}"
    "table{border-collapse:collapse;width:100%}th,td{padding:.4rem .55rem;border-bottom:1px solid #d9dde3;"
    "text-align:right}th:first-child,td:first-child{text-align:left}"
)


def stress_table(results: StressResults) -> Table:
    """Return rows of stress; mean behaviour without and with pruning, its change in percent and interval.

    Behind them the change of perplexity by pruning, and what is left of the effect, with the interval of each.
    """
    rows: Table = [("", results.behavior, "pruned", "change, %", "perplexity, %", "effect left, %")]
    for stressed in results.stressed:
        effect, change = stressed.found.main_effect, next(iter(stressed.found.perplexity_change.values()))
        before, after, percent = (effect.before, effect.after, effect.percent) if effect else (math.nan, math.nan, None)
        left = "" if stressed.left is None else _with_ends(_in_percent(stressed.left), 0)
        rows.append(
            (
                stressed.name,
                cell(before, "", 4),
                cell(after, "", 4),
                _with_ends(percent, 1, "+") if percent else UNKNOWN,
                _with_ends(change, 1, "+"),
                left,
            )
        )
    return rows


def utility_table(results: StressResults) -> Table:
    """Return rows of stress; of the model that is not pruned and of the pruned one, after the same stress.

    The columns are perplexity, length of continuations and distinct pairs of words of both, and the pruned model's
    divergence from the other one.
    """
    head = ("perplexity", "pruned", "length, tokens", "pruned", "distinct-2", "pruned", "KL, nats a token")
    rows: Table = [("", *head)]
    for stressed in results.stressed:
        found = stressed.found
        models = list(found.models.values())
        groups = [model.groups[found.headline] for model in models]
        rows.append(
            (
                stressed.name,
                *(cell(next(iter(model.perplexity.values())).value, "", 2) for model in models),
                *(cell(group.mean_length, "", 1) for group in groups),
                *(cell(group.distinct_2, "", 3) for group in groups),
                cell(models[-1].kl, "", 4),
            )
        )
    return rows


def said_of_stress(stressed: Sequence[Stressed], behavior: str) -> str:
    """Return in words what is left of the effect."""
    first, *others = stressed
    effect = first.found.main_effect
    if effect is None:
        return f"Nothing could be scored: there is no effect on {behavior} to put under stress."
    said = [f"Mean {behavior} changes by {_percent(effect.percent)}" + ("." if effect.evidence else ", no evidence.")]
    of_shares = [f"{_percent(_in_percent(one.left), '')} after '{one.name}'" for one in others if one.left is not None]
    if of_shares:
        said.append(f"Of this effect there is left {', '.join(of_shares)}.")
    for one in others:
        if one.left is None and (there := one.found.main_effect):
            said.append(f"With {one.name} it changes by {_percent(there.percent)}.")
        if one.grew_back is not None:
            said.append(f"Of the pruned weights {100 * one.grew_back:.1f} % grew back (norm).")
    return " ".join(said)


def write_page(folder: Path) -> None:
    """Draw the page of a folder from its stress.json."""
    results = StressResults.load(folder / STRESS)
    name = f"Under stress: {public_name(results.checkpoint)}"
    body = [
        f"<h1>{_text(name)}</h1>",
        f"<p>{_text(results.verdict)}</p>",
        f"<p>{_text(_explained(results))}</p>",
        _html(stress_table(results)),
        "<h2>What else the stress does</h2>",
        _html(utility_table(results)),
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>sparc3: {_text(name)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    write_atomically(folder / PAGE, page)


def _explained(results: StressResults) -> str:
    prompts = results.stressed[0].found.baseline.groups[results.stressed[0].found.headline].num_prompts
    return (
        f"Each row compares two models that have been through the same: one with {results.num_neurons} "
        f"{results.granularity}s pruned before it, and one without, over the same prompts and random draws "
        f"({prompts} prompts). Intervals are of 95 %. What is left of the effect is its size in {results.behavior} as "
        "a share of the first row's; other prompts have an effect of their own."
    )


def _html(rows: Table) -> str:
    head, *others = rows
    lines = ["<table>", "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in others]
    return "\n".join([*lines, "</table>"])


def _text(value: object) -> str:
    return html.escape(for_terminal(value))


def _in_percent(share: Interval) -> Interval:
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


def _with_ends(interval: Interval, digits: int, sign: str = "") -> str:
    """Return a value with its interval, such as ``-45.5 (-50.9 to -39.4)``."""
    if not math.isfinite(interval.value):
        return UNKNOWN
    value, *ends = (f"{number:{sign}.{digits}f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} ({' to '.join(ends)})" if interval.is_known else f"{value} (?)"


def _percent(interval: Interval, sign: str = "+") -> str:
    """Return a value in percent with its interval, in words."""
    if not math.isfinite(interval.value):
        return "what cannot be said"
    value, low, high = (f"{number:{sign}.1f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} % ({f'{low} to {high} %' if interval.is_known else f'interval {CANNOT}'})"
