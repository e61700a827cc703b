"""What costs predict of an edit: against a divergence that is measured, and where the search of a budget begins."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import MODULES

from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.selection.budget import Budget, choose_within
from sparc3_lightning.selection.prediction import Prediction

COSTS = {name: torch.rand(24, generator=torch.Generator().manual_seed(i)) / 100 for i, name in enumerate(MODULES)}


def ranking(number: int, damping: float = 1.0) -> list[Component]:
    return [Component(MODULES[i % 2], i, -1.0, damping) for i in range(number)]


@pytest.mark.parametrize("neuron", [0, 7])
def test_half_the_fisher_information_of_a_neuron_is_what_damping_it_a_little_diverges_by(make_model, neuron):
    model, ids = make_model(), torch.tensor([[5, 9, 40, 21, 33, 8, 17]])
    damped = Component(MODULES[0], neuron, -1.0, damping=0.1)

    def logs(damping: float) -> torch.Tensor:
        with torch.no_grad(), mask(model, [replace(damped, damping=damping)]):
            return model(ids).logits[0].double().log_softmax(dim=-1)

    before = logs(0.0)
    slopes = (logs(0.05) - logs(-0.05)) / 0.1
    # The mean over the positions of the square of what a drawn token's log-probability changes by.
    fisher = (before.exp() * slopes.square()).sum(dim=-1).mean()
    divergence = (before.exp() * (before - logs(0.1))).sum(dim=-1).mean().item()
    costs = {MODULES[0]: torch.full((24,), fisher.item())}  # of which the floor is a tenth
    assert math.log1p(Prediction(costs, 0.1).rise([damped])) == pytest.approx(1.1 * divergence, rel=0.05)


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_the_predicted_rise_is_that_of_half_the_costs_and_floors_times_the_dampings_squared(damping):
    ranked, prediction = ranking(20, damping), Prediction(COSTS, 0.1)
    floor, rises = 0.1 * torch.cat(list(COSTS.values())).mean().item(), []
    for n in range(1, 21):
        nats = sum(damping**2 * (COSTS[c.module][c.index].item() + floor) / 2 for c in ranked[:n])
        rises.append(math.exp(nats) - 1)
        assert prediction.rise(ranked[:n]) == pytest.approx(rises[-1])
    for budget in (1e-9, 0.004, rises[10] * 1.0001, 1.0):
        assert prediction.number_within(ranked, budget) == max(1, sum(rise <= budget for rise in rises))


class HalfAsDearAgain:
    """Stands for a model in which a list costs half as much again as is predicted."""

    def __init__(self) -> None:
        self.prediction = Prediction(COSTS, 0.1)
        self.asked: list[int] = []

    def __call__(self, neurons: list[Component]) -> float:
        self.asked.append(len(neurons))
        return 1.5 * self.prediction.rise(neurons)


def test_the_search_within_a_budget_begins_with_the_number_that_is_predicted():
    rise, ranked = HalfAsDearAgain(), ranking(24)
    chosen = choose_within(rise, ranked, Budget(0.03))
    assert rise.asked[0] == rise.prediction.number_within(ranked, 0.03)
    assert len(rise.asked) == len(set(rise.asked)) <= 5
    assert rise(chosen) <= 0.03 < rise(ranked[: len(chosen) + 1])
