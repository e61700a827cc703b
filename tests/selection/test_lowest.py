"""The lowest of many scores, in each of its forms, against a sort of single numbers."""

import math

import pytest
import torch

from sparc3_lightning.selection.criteria import POOL, lowest_of_modules, select_neurons
from sparc3_lightning.selection.lowest import Lowest, lowest, lowest_first


@pytest.mark.parametrize("number", [1, 7, 40, 60])
@pytest.mark.parametrize("shape", [(20,), (4, 5)], ids=["neurons", "weights"])
def test_the_lowest_are_the_head_of_a_sorted_list_of_all_and_of_equal_scores_the_first(number, shape):
    draw = torch.Generator().manual_seed(number)
    # Whole numbers, so that there are many ties; and what is never to be chosen.
    scores = {name: torch.randint(-3, 4, shape, generator=draw).float() for name in ("b", "a", "c")}
    scores["a"].flatten()[3] = -0.0
    scores["b"].flatten()[5] = math.inf
    flat = torch.cat([score.flatten() for score in scores.values()])
    ordered = sorted((score, place) for place, score in enumerate(flat.tolist()))
    keys = [
        ("bac"[place // 20], *((place % 20,) if len(shape) == 1 else divmod(place % 20, 5))) for _, place in ordered
    ]
    found = Lowest(number, "neuron" if len(shape) == 1 else "weight")
    for name, score in scores.items():
        found.add(name, score)
    assert [component.key for component in found.components] == keys[:number]
    assert [component.score for component in found.components] == [score for score, _ in ordered[:number]]
    if len(shape) == 1 and number < 60:
        assert select_neurons(scores, number) == found.components
    places = [place for _, place in ordered[:number]]
    assert lowest_first(flat, number).tolist() == places
    assert lowest(flat.unsqueeze(0), number)[0].nonzero().flatten().tolist() == sorted(places)
    pruned = found.components[:2]
    for name in {component.module for component in pruned}:
        taken = {component.key for component in pruned}
        pool = [component.key for component in lowest_of_modules(pruned, scores.items()) if component.module == name]
        count = sum(component.module == name for component in pruned)
        assert pool == [key for key in keys if key[0] == name and key not in taken][: POOL * count]
