"""reproduction.json: the figures of an evaluation beside those of the same evaluation, measured again elsewhere."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

import torch

from sparc3_lightning.evaluation.completions import Completion
from sparc3_lightning.evaluation.findings import Continuations
from sparc3_lightning.evaluation.intervals import ROUNDING, Difference, Interval, Resampled
from sparc3_lightning.evaluation.metrics import CONTINUATION_METRICS
from sparc3_lightning.evaluation.results import MEASURES, Findings, Results
from sparc3_lightning.files import Count, JsonFile
from sparc3_lightning.provenance import differences

REPRODUCTION = "reproduction.json"
SLACK = 0.05  # share of itself by which a figure may change that has no interval
LEAST_SLACK = 0.001
# Options, and what is derived from other figures or is a part of one.
NOT_COMPARED = {"behavior_by_seed", "common_random_numbers_variance_factor", "damping", "fronts"}
NOT_COMPARED |= {"num_draws_with_evidence", "num_empty", "standard_error", "together"}
OF_DRAWS = ("num_failed", "num_scored")  # counts that depend on what was drawn

Outcome = Literal["equal", "within the interval", "differs"]


@dataclass(frozen=True)
class Changed:
    """Something that the figures rest on and that is not the same there and here; ``none`` stands for what is not."""

    name: str
    there: str
    here: str


@dataclass(frozen=True)
class Figure:
    """A figure by its place in results.json, there and here, and how far apart the two may be.

    ``low`` and ``high`` are the ends of its interval there or, where it has none there, of the one over prompts here;
    of a figure without any, 5 % of itself to either side, and 0.001 at least. A count is to be the same; of texts that
    could be scored, or not, one more or less is allowed as well. NaN stands for what is not known.
    """

    name: str
    there: float
    here: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class ReproductionResults(JsonFile):
    """The content of reproduction.json.

    Args:
        results: The results.json that was reproduced.
        num_differing: How many figures differ by more than their intervals.
        changed: What was not the same here, of versions, checkpoint, data, scorers and device.
        figures: Each figure, in the order of results.json.
    """

    FORMAT = "sparc3_lightning reproduction 1"
    results: str
    num_differing: Count
    changed: list[Changed]
    figures: list[Figure]


def changes(there: Mapping[str, str], here: Mapping[str, str]) -> list[Changed]:
    """Return what is not the same there and here, by its name."""
    return [Changed(name, there.get(name, "none"), here.get(name, "none")) for name in differences(there, here)]


def compare(there: Results, here: Results, completions: Sequence[Completion]) -> list[Figure]:
    """Compare the figures of two evaluations.

    Args:
        there: One of them.
        here: The other.
        completions: Rows of the other.
    """
    theirs, mine = dict(_figures(_findings(there))), dict(_figures(_findings(here)))
    known = _intervals_of_prompts(here, completions) | _intervals_of_changes(there)
    return [
        _compared(name, theirs.get(name, math.nan), mine.get(name, math.nan), known.get(name))
        for name in dict.fromkeys((*theirs, *mine))
        # Where it cannot be said how large a change in percent is, the change itself is compared.
        if not name.endswith(".percent") or (name in theirs and name in mine)
    ]


def _findings(results: Results) -> dict[str, object]:
    return {field.name: getattr(results, field.name) for field in fields(Findings)}


def _figures(value: object, place: str = "") -> Iterator[tuple[str, float | Interval]]:
    """Yield every figure of some findings, and its place."""
    if isinstance(value, Difference):  # the rest of it are tests of the same
        both = {"difference": value.difference, "percent": value.percent}
        value = {name: change for name, change in both.items() if name == "difference" or change.is_known}
    if isinstance(value, Interval) or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield place, value
        return
    if isinstance(value, list):
        items = {getattr(item, "name", str(i)): item for i, item in enumerate(value)}
    elif is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        items = dict(value) if isinstance(value, Mapping) else {}
    for name, item in items.items():
        if name not in NOT_COMPARED:
            yield from _figures(item, f"{place}.{name}" if place else str(name))


def _compared(name: str, there: float | Interval, here: float | Interval, known: Interval | None) -> Figure:
    interval = there if isinstance(there, Interval) else known
    is_counted = isinstance(there, int) and isinstance(here, int)
    left, right = (float(side.value if isinstance(side, Interval) else side) for side in (there, here))
    if interval is not None and interval.is_known:
        low, high = interval.low, interval.high
    else:
        slack = max(SLACK * abs(left), LEAST_SLACK)
        if is_counted:
            slack = max(SLACK * left, 1.0) if name.endswith(OF_DRAWS) else 0.0
        low, high = left - slack, left + slack
    outcome: Outcome = "differs"
    if _are_equal(left, right, is_counted):
        outcome = "equal"
    elif low <= min(left, right) and max(left, right) <= high:
        outcome = "within the interval"
    return Figure(name, left, right, low, high, outcome)


def _are_equal(there: float, here: float, is_counted: bool) -> bool:
    if is_counted or math.isnan(there) or math.isnan(here):
        return there == here or (math.isnan(there) and math.isnan(here))
    return math.isclose(there, here, rel_tol=ROUNDING, abs_tol=1e-9)


def _intervals_of_prompts(results: Results, completions: Sequence[Completion]) -> dict[str, Interval]:
    """Return the intervals, over prompts, of what was measured of each model's continuations."""
    continuations = Continuations(completions, results.headline_judge)
    found = {}
    for model, measured in results.models.items():
        for group in measured.groups:
            values = {name: continuations.values(model, group, name) for name in MEASURES}
            prompts = continuations.of(model, group)
            for name, metric in CONTINUATION_METRICS.items():
                values[name] = torch.tensor([metric.measure([rows]) for rows in prompts], dtype=torch.float64)
            for name, of_prompts in values.items():
                valid = of_prompts[of_prompts.isfinite()]
                if len(valid):
                    found[f"{model}.groups.{group}.{name}"] = Resampled(valid, torch.ones_like(valid)).mean()
    return found


def _intervals_of_changes(results: Results) -> dict[str, Interval]:
    """Return the intervals of numbers that stand alone in results.json and follow from a change that has one."""
    before = next(iter(results.baseline.perplexity.values())).value
    found = {}
    if effect := results.main_effect:
        found["change.behavior_percent"] = effect.percent
    if results.perplexity_change:
        found["change.perplexity_percent"] = next(iter(results.perplexity_change.values()))
    kinds = {f"controls.{kind}": control.draws for kind, control in results.controls.items()}
    for place, doses in {"doses": results.doses, **{f"{kind}.draws": draws for kind, draws in kinds.items()}}.items():
        for dose in doses:
            change = dose.perplexity_percent
            low, high = (before * (1 + end / 100) for end in (change.low, change.high))
            found[f"{place}.{dose.name}.perplexity"] = Interval(dose.perplexity, low, high)
    for kind, draws in kinds.items():  # the mean of the draws lies where they do
        intervals = [draw.perplexity_percent for draw in draws]
        low, high = min(interval.low for interval in intervals), max(interval.high for interval in intervals)
        found[f"{kind}.outcome.perplexity_percent"] = Interval(math.nan, low, high)
    return found
