"""What is left of an effect under stress: the table, the sentences, and a page of both."""

from collections.abc import Sequence
from pathlib import Path

from sparc3_lightning.evaluation.intervals import Difference, Interval
from sparc3_lightning.evaluation.stress import STRESS, Stressed, StressResults
from sparc3_lightning.files import write_atomically
from sparc3_lightning.models.components import counted, in_words
from sparc3_lightning.report.escaping import public_name, told_apart
from sparc3_lightning.report.page import page_environment
from sparc3_lightning.report.tables import UNKNOWN, Table, cell, first_of_other_text, with_interval
from sparc3_lightning.report.verdict import moved_mean, signed

PAGE = "stress.html"


def stress_table(results: StressResults) -> Table:
    """Return rows of stress; mean behaviour without and with pruning, its change in percent and interval.

    Behind them the change of perplexity by pruning, and what is left of the effect, with the interval of each. What
    the other judges say follows the headline's.
    """
    rows: Table = [("", results.behavior, "pruned", "change, %", "perplexity, %", "effect left, %")]
    for stressed in results.stressed:
        found = stressed.found
        change, names = next(iter(found.perplexity_change.values())), told_apart(found.judges)
        perplexity = with_interval(change)
        rows.append((stressed.name, *_effect(found.main_effect), perplexity, _left(stressed, found.headline_judge)))
        for name, judge in found.other_judges.items():
            effect = judge.effects[found.headline].behavior_mean
            rows.append((f"- {names[name]}", *_effect(effect), "", _left(stressed, name)))
    return rows


def _effect(effect: Difference | None) -> tuple[str, str, str]:
    if effect is None:
        return UNKNOWN, UNKNOWN, UNKNOWN
    return cell(effect.before, "", 4), cell(effect.after, "", 4), with_interval(effect.percent)


def _left(stressed: Stressed, judge: str) -> str:
    left = stressed.left.get(judge)
    return "" if left is None else with_interval(_in_percent(left), 0, "")


def utility_table(results: StressResults) -> Table:
    """Return rows of stress; of the model that is not pruned and of the pruned one, after the same stress.

    The columns are perplexity, length of continuations and distinct pairs of words of both, and the pruned model's
    divergence from the other one; if there is another text, its perplexity by both and the change by pruning.
    """
    has_other = bool(first_of_other_text(results.stressed[0].found))
    head = ["perplexity", "pruned", *(["other text", "pruned", "change, %"] if has_other else [])]
    rows: Table = [("", *head, "length, tokens", "pruned", "distinct-2", "pruned", "KL, nats a token")]
    for stressed in results.stressed:
        found = stressed.found
        models = list(found.models.values())
        groups = [model.groups[found.headline] for model in models]
        row = [cell(next(iter(model.perplexity.values())).value, "", 2) for model in models]
        for windows in first_of_other_text(found):
            row += [cell(model.perplexity[windows].value, "", 2) for model in models]
            row.append(with_interval(found.perplexity_change[windows]))
        row += [cell(group.mean_length, "", 1) for group in groups]
        row += [cell(group.distinct_2, "", 3) for group in groups]
        rows.append((stressed.name, *row, cell(models[-1].kl, "", 4)))
    return rows


def said_of_stress(stressed: Sequence[Stressed], behavior: str) -> str:
    """Return in words what is left of the effect."""
    first, *others = stressed
    effect = first.found.main_effect
    if effect is None:
        return f"Nothing could be scored: there is no effect on {behavior} to put under stress."
    said = [f"Mean {behavior} {moved_mean(effect)}{'' if effect.evidence else ', which is no evidence'}."]
    shares = {one.name: left for one in others if (left := one.left.get(first.found.headline_judge))}
    if shares:
        of_shares = [f"{signed(_in_percent(left), '')} after '{name}'" for name, left in shares.items()]
        said.append(f"Of this effect there is left {', '.join(of_shares)}.")
    for one in others:
        if not one.left and (there := one.found.main_effect):
            said.append(f"With {one.name} it {moved_mean(there)}.")
        if one.grew_back is not None:
            said.append(f"Of the pruned weights {100 * one.grew_back:.1f} % grew back (norm).")
    return " ".join(said)


def write_page(folder: Path) -> None:
    """Draw the page of a folder from its stress.json."""
    results = StressResults.load(folder / STRESS)
    found = results.stressed[0].found
    page = (
        page_environment(set())
        .get_template("stress.html")
        .render(
            results=results,
            name=public_name(results.checkpoint),
            neurons=in_words(results.kinds),
            prompts=counted(found.baseline.groups[found.headline].num_prompts, "prompt"),
            judge=told_apart(found.judges)[found.headline_judge],
            effects=stress_table(results),
            utility=utility_table(results),
        )
    )
    write_atomically(folder / PAGE, page)


def _in_percent(share: Interval) -> Interval:
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)
