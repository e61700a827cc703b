"""Krippendorff's alpha against a coincidence matrix that is filled by hand, and against published values."""

import math
from collections import defaultdict
from itertools import permutations

import pytest
import torch

from sparc3_lightning.evaluation.agreement import krippendorff_alpha

_ = math.nan


def slow_alpha(rows: list[list[float]]) -> float:
    """Fill the matrix of coincidences as Krippendorff 2011 does, and compare what is observed and expected."""
    coincidences: dict[tuple[float, float], float] = defaultdict(float)
    for unit in zip(*rows, strict=True):
        values = [value for value in unit if not math.isnan(value)]
        for pair in permutations(range(len(values)), 2):
            coincidences[values[pair[0]], values[pair[1]]] += 1 / (len(values) - 1)
    total: dict[float, float] = defaultdict(float)
    for (value, _other), number in coincidences.items():
        total[value] += number
    n = sum(total.values())
    observed = sum(number * (c - k) ** 2 for (c, k), number in coincidences.items()) / n
    pairs = [(c, k) for c in total for k in total]
    expected = sum(total[c] * total[k] * (c - k) ** 2 for c, k in pairs if c != k) / (n * (n - 1))
    return 1 - observed / expected


# Krippendorff 2011, section D: four observers, twelve units; at interval level 0.849.
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
# Three coders, fifteen units, many of them missing; at interval level 0.811.
THREE_CODERS = [
    [_, _, _, _, _, 3, 4, 1, 2, 1, 1, 3, 3, _, 3],
    [1, _, 2, 1, 3, 3, 4, 3, _, _, _, _, _, _, _],
    [_, _, 2, 1, 3, 4, 4, _, 2, 1, 1, 3, 3, _, 4],
]


@pytest.mark.parametrize(("rows", "alpha"), [(FOUR_OBSERVERS, 0.849), (THREE_CODERS, 0.811)])
def test_the_published_values_come_out(rows, alpha):
    assert krippendorff_alpha(torch.tensor(rows)) == pytest.approx(alpha, abs=5e-4)
    assert slow_alpha(rows) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_one_of_the_matrix_of_coincidences_whatever_is_missing(seed):
    draw = torch.Generator().manual_seed(seed)
    judges, texts = 2 + seed % 4, 5 + 7 * seed
    scores = torch.rand(judges, texts, generator=draw, dtype=torch.float64)
    scores[torch.rand(judges, texts, generator=draw) < 0.3] = math.nan
    assert krippendorff_alpha(scores) == pytest.approx(slow_alpha(scores.tolist()), rel=1e-9)


def test_judges_who_agree_have_1_and_those_who_say_the_opposite_less_than_0():
    scores = torch.tensor([0.1, 0.5, 0.9, 0.3])
    assert krippendorff_alpha(torch.stack([scores, scores, scores])) == 1.0
    assert krippendorff_alpha(torch.stack([scores, 1 - scores])) < 0


def test_it_says_how_far_values_agree_and_not_how_far_ranks_do():
    scores = torch.linspace(0, 1, 20)
    assert krippendorff_alpha(torch.stack([scores, scores / 10])) < 0.5
    assert krippendorff_alpha(torch.stack([100 + 7 * scores, 100 + 7 * scores])) == 1.0


def test_a_text_of_a_single_score_has_no_part_in_it():
    both = [[0.1, 0.4, 0.8], [0.2, 0.4, 0.7]]
    more = [[*both[0], 0.9, _], [*both[1], _, _]]
    assert krippendorff_alpha(torch.tensor(more)) == krippendorff_alpha(torch.tensor(both))


@pytest.mark.parametrize(
    "rows", [[[0.25] * 3, [0.25] * 3], [[_, _], [_, _]], [[0.1, _], [_, 0.2]], [[], []], [[0.1, 0.9]]]
)
def test_where_nothing_varies_or_nothing_is_scored_by_two_it_is_not_known(rows):
    assert math.isnan(krippendorff_alpha(torch.tensor(rows)))
