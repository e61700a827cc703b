"""The selection of neurons: its options, the inputs it needs, and its order of all neurons."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sparc3_lightning.attribution.activations import ACTIVATIONS, Activations
from sparc3_lightning.models.components import Component, Scored
from sparc3_lightning.selection.criteria import (
    Scores,
    benefit_per_cost,
    by_auroc,
    differential_relevance,
    lowest_of_modules,
    normalized_difference,
    select_neurons,
    set_difference,
    weighted_difference,
)
from sparc3_lightning.selection.neuron_list import BudgetUse, Selected, histogram


@dataclass(frozen=True)
class Sides:
    """What neurons are ranked by: general text on one side, the behaviour on the other.

    Args:
        general: General scores per module, shape ``[out_features]``.
        behavior: Scores of the behaviour.
        top_behavior: For ``set_difference``, share of all neurons by the behaviour.
        top_general: For ``set_difference``, share of all neurons by general text that is left out.
        general_rows: Mean activation in each general sample, per module, shape ``[samples, neurons]``; empty if the
            selection needs none.
        behavior_rows: The same of the behaviour's samples.
        floor: Of general scores that are costs, in units of their mean, see ``floor_of``.
    """

    general: Scores
    behavior: Scores
    top_behavior: float = 0.1
    top_general: float = 0.1
    general_rows: Scores = field(default_factory=dict)
    behavior_rows: Scores = field(default_factory=dict)
    floor: float = 0.0


@dataclass(frozen=True)
class Criterion:
    """How a selection ranks neurons, and which inputs it needs.

    Args:
        rank: Returns scores per module: what is lowest is pruned first, and infinity is never pruned.
        needs_scores: Whether scores count; else activations alone do.
        needs_activations: Whether activations count.
        needs_one_kind: Whether the sides are compared value by value, so that they must be of one method and target.
        needs_costs: Whether the general side must be costs and the behaviour's benefits, see ``check_are_costs``.
    """

    rank: Callable[[Sides], dict[str, Tensor]]
    needs_scores: bool = True
    needs_activations: bool = False
    needs_one_kind: bool = False
    needs_costs: bool = False


def _weighted_difference(sides: Sides) -> dict[str, Tensor]:
    auroc = {name: -score for name, score in by_auroc(sides.general_rows, sides.behavior_rows).items()}
    return weighted_difference(sides.general, sides.behavior, auroc)


CRITERIA = {
    "difference": Criterion(lambda sides: differential_relevance(sides.general, sides.behavior), needs_one_kind=True),
    "normalized_difference": Criterion(lambda sides: normalized_difference(sides.general, sides.behavior)),
    "set_difference": Criterion(
        lambda sides: set_difference(sides.general, sides.behavior, sides.top_behavior, sides.top_general)
    ),
    "benefit_per_cost": Criterion(
        lambda sides: benefit_per_cost(sides.general, sides.behavior, sides.floor), needs_costs=True
    ),
    "auroc": Criterion(
        lambda sides: by_auroc(sides.general_rows, sides.behavior_rows), needs_scores=False, needs_activations=True
    ),
    "weighted_difference": Criterion(_weighted_difference, needs_activations=True, needs_one_kind=True),
}
if TYPE_CHECKING:
    CriterionName = str
else:  # for the command line, which refuses any other name
    CriterionName = Literal[*CRITERIA]


@dataclass(frozen=True)
class NeuronRanking:
    """All neurons in the order of a selection.

    Args:
        scores: What ranks them, per module; see ``Criterion``.
        general: General scores, per module.
        damping: How far each is switched off.
        means: What takes the place of each neuron's activation, per module; None for 0.
        granularity: What the scores are of.
    """

    scores: Mapping[str, Tensor]
    general: Scores
    damping: float = 1.0
    means: Mapping[str, Tensor] | None = None
    granularity: Scored = "neuron"

    @property
    def eligible(self) -> Tensor:
        """The scores of all neurons that may be pruned, shape ``[neurons]``."""
        flat = torch.cat(list(self.scores.values()))
        return flat[flat < math.inf]

    def first(self, number: int) -> list[Component]:
        """Return the first neurons of the order, each with its ablation.

        Raises:
            ValueError: As ``criteria.select``.
        """
        return edited(select_neurons(self.scores, number, self.granularity), self.damping, self.means)

    def selected(
        self,
        chosen: list[Component],
        listed: list[Component],
        differential_strength: float | None = None,
        budget: BudgetUse | None = None,
    ) -> Selected:
        """Return the neurons to prune, the next ones in the ranking, the least relevant ones, and figures of all.

        Args:
            chosen: The neurons to prune.
            listed: The first of the order, with those that were chosen.
            differential_strength: In percent.
            budget: What was measured to stay within the budget.
        """
        taken = {neuron.key for neuron in chosen}
        pool = lowest_of_modules(chosen, ((name, score.abs()) for name, score in self.general.items()))
        return Selected(
            chosen,
            [replace(n, damping=chosen[0].damping) for n in listed if n.key not in taken],
            edited(pool, 1.0, self.means),
            modules=list(self.scores),
            num_candidates=sum(map(len, self.scores.values())),
            granularity=self.granularity,
            num_negative=int((self.eligible < 0).sum()),
            histogram=histogram(self.eligible),
            differential_strength=differential_strength,
            budget=budget,
        )


def edited(neurons: Sequence[Component], damping: float, means: Mapping[str, Tensor] | None = None) -> list[Component]:
    """Return neurons with their damping, and their mean where means are given."""
    return [replace(n, damping=damping, mean=means[n.module][n.index].item() if means else n.mean) for n in neurons]


def activations_beside(scores: Sequence[Path]) -> dict[str, Tensor]:
    """Read the mean activations in every sample of several score files, per module, shape ``[samples, neurons]``.

    Raises:
        FileNotFoundError, ValueError: If there are none beside a score file, or they are damaged.
    """
    parts = [Activations.load(path.parent / ACTIVATIONS).rows for path in scores]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def means_beside(scores: Sequence[Path]) -> dict[str, Tensor]:
    """Read the mean activation of each neuron over the tokens of each score file, averaged over the files.

    Raises:
        FileNotFoundError, ValueError: If there are none beside a score file, or they are damaged.
    """
    parts = [Activations.load(path.parent / ACTIVATIONS).mean() for path in scores]
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}
