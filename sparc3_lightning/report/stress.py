"""What is left of an effect under stress: the table, the sentences, and a page of both."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from sparc3_lightning.evaluation.intervals import Difference, Interval
from sparc3_lightning.evaluation.stress import STRESS, Stressed, StressResults
from sparc3_lightning.files import write_atomically
from sparc3_lightning.models.components import in_words
from sparc3_lightning.report.escaping import for_terminal, public_name, told_apart
from sparc3_lightning.report.tables import CANNOT, UNKNOWN, Table, cell

PAGE = "stress.html"
STYLE = (
    "body{margin:2rem auto;max-width:66rem;padding:0 1rem;font:1rem/1.5 system-ui,sans-serif;color:#1d2330}"
    "table{border-collapse:collapse;width:100%}th,td{padding:.4rem .55rem;border-bottom:1px solid #d9dde3;"
    "text-align:right}th:first-child,td:first-child{text-align:left}"
)


def stress_table(results: StressResults) -> Table:
    """Return rows of stress; mean behaviour without and with pruning, its change in percent and interval.

    Behind them the change of perplexity by pruning, and what is left of the effect, with the interval of each. What
    the other judges say follows the headline's.
    """
    rows: Table = [("", results.behavior, "pruned", "change, %", "perplexity, %", "effect left, %")]
    for stressed in results.stressed:
        found = stressed.found
        change, names = next(iter(found.perplexity_change.values())), told_apart(found.judges)
        perplexity = _with_ends(change, 1, "+")
        rows.append((stressed.name, *_effect(found.main_effect), perplexity, _left(stressed, found.headline_judge)))
        for name, judge in found.other_judges.items():
            effect = judge.effects[found.headline].behavior_mean
            rows.append((f"- {names[name]}", *_effect(effect), "", _left(stressed, name)))
    return rows


def _effect(effect: Difference | None) -> tuple[str, str, str]:
    if effect is None:
        return UNKNOWN, UNKNOWN, UNKNOWN
    return cell(effect.before, "", 4), cell(effect.after, "", 4), _with_ends(effect.percent, 1, "+")


def _left(stressed: Stressed, judge: str) -> str:
    left = stressed.left.get(judge)
    return "" if left is None else _with_ends(_in_percent(left), 0)


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
    shares = {one.name: left for one in others if (left := one.left.get(first.found.headline_judge))}
    if shares:
        of_shares = [f"{_percent(_in_percent(left), '')} after '{name}'" for name, left in shares.items()]
        said.append(f"Of this effect there is left {', '.join(of_shares)}.")
    for one in others:
        if not one.left and (there := one.found.main_effect):
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
    found = results.stressed[0].found
    number = found.baseline.groups[found.headline].num_prompts
    return (
        f"Each row compares two models that have been through the same: one with {in_words(results.kinds)} pruned "
        f"before it, and one without. Both continued the same {number} prompts from the same random draws, which "
        f"{told_apart(found.judges)[found.headline_judge]} scored. Intervals are of 95 %. "
        f"What is left of the effect is its size in {results.behavior} as a share of the first row's; other prompts "
        "have an effect of their own."
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
