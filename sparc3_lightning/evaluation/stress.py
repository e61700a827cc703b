"""stress.json: what is left of the effect of switching neurons off after the model has been through something."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparc3_lightning.evaluation.findings import Continuations
from sparc3_lightning.evaluation.intervals import Interval, Resampled
from sparc3_lightning.evaluation.results import Findings, PromptProtocol, Settings, Verdict

STRESS = "stress.json"
AS_IT_IS = "as it is"
OTHER_PROMPTS = "other prompts"


@dataclass(frozen=True)
class Stressed:
    """What was found of the two models after one stress: the ``baseline`` has been through the same.

    Args:
        name: Of the stress.
        found: As an evaluation of the two finds it.
        prompts: Where the prompts are from.
        left: What is left of the effect on the mean behaviour, as a share of the one without stress, by judge, see
            ``shares_left``; empty where the prompts are others.
        grew_back: Norm of what came back of the pruned weights in a training, over the norm of what was taken away;
            None without a training.
    """

    name: str
    found: Findings
    prompts: PromptProtocol
    left: dict[str, Interval | None]
    grew_back: float | None


@dataclass(frozen=True, kw_only=True)
class StressResults(Settings, Verdict):
    """The content of stress.json; the first of the stresses is none."""

    FORMAT = "sparc3_lightning stress 2"
    stressed: list[Stressed]


def shares_left(before: Continuations, after: Continuations, judges: Iterable[str]) -> dict[str, Interval | None]:
    """Return the effect under a stress as a share of the one without, over the same prompts, by judge.

    Both are changes of the mean score by pruning, and the share is the ratio of their means over prompts, with the
    interval of such a ratio, see ``Resampled``. Its ends are NaN where the effect without stress could be 0.

    Args:
        before: Of the models as they are.
        after: Of the models under stress.
        judges: Names of the scorers.

    Returns:
        Shares, 1 where the effect is what it was, None where no prompt has all scores. Empty if the prompts are not the
        same.
    """
    group = before.headline
    if after.groups.get(group) != before.groups[group]:
        return {}
    return {judge: _share_left(before, after, group, judge) for judge in judges}


def _share_left(before: Continuations, after: Continuations, group: str, judge: str) -> Interval | None:
    first, second = (of.changes("baseline", "pruned", group, judge) for of in (after, before))
    valid = torch.isfinite(first + second)
    return Resampled(first[valid], second[valid]).ratio() if valid.any() else None
