"""Neurons for comparison: as many per layer, none of the pruned, and drawn evenly."""

import itertools
from collections import Counter

import pytest
import torch

from sparc3_lightning.evaluation.controls import draw_like, random_like
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import POOL, lowest_of_modules

A, B, C = (f"model.layers.{i}.mlp.up_proj" for i in range(3))
SIZES = {A: 10, B: 40, C: 7}
SHAPES = {("neuron", name): (size,) for name, size in SIZES.items()}
PRUNED = [
    Component(A, 3, -5.0),
    Component(B, 0, -4.0),
    Component(A, 9, -3.0),
    Component(B, 39, -2.0),
    Component(B, 20, -1.0),
]


def places(neurons: list[Component]) -> list[tuple[str, int]]:
    return [(neuron.module, neuron.index) for neuron in neurons]


def per_module(neurons: list[Component]) -> dict[str, int]:
    return dict(Counter(neuron.module for neuron in neurons))


@pytest.mark.parametrize("seed", range(8))
def test_random_neurons_are_as_many_in_each_layer_as_were_pruned_and_none_of_those(seed):
    drawn = random_like(PRUNED, SHAPES, seed)
    assert per_module(drawn) == {A: 2, B: 3}
    assert len(set(places(drawn))) == 5
    assert not set(places(drawn)) & set(places(PRUNED))
    assert all(0 <= neuron.index < SIZES[neuron.module] for neuron in drawn)


def test_the_same_seed_draws_the_same_neurons_and_other_seeds_others():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [tuple(sorted(places(random_like(PRUNED, SHAPES, seed)))) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    assert [tuple(sorted(places(random_like(PRUNED, SHAPES, seed)))) for seed in range(20)] == first
    assert len(set(first)) == 20


def test_every_free_neuron_and_every_pair_of_them_is_drawn_equally_often():
    pruned = [Component(A, 3, 0.0), Component(A, 9, 0.0)]
    free = [index for index in range(10) if index not in (3, 9)]
    single, pairs = Counter(), Counter()
    for seed in range(2000):
        drawn = sorted(neuron.index for neuron in random_like(pruned, SHAPES, seed))
        single.update(drawn)
        pairs[tuple(drawn)] += 1
    assert sorted(single) == free
    # Chi-square of 27 degrees of freedom is above 55.5 once in a thousand times; of the singles, less than of 7: 24.3.
    expected = 2000 / 28
    assert sum((pairs[pair] - expected) ** 2 / expected for pair in itertools.combinations(free, 2)) < 55.5
    assert sum((single[index] - 500) ** 2 / 500 for index in free) < 24.3


def test_layers_of_the_same_size_are_not_drawn_alike():
    pruned = [Component(A, 0, 0.0), Component(A, 1, 0.0), Component(B, 0, 0.0), Component(B, 1, 0.0)]
    alike = 0
    for seed in range(50):
        drawn = random_like(pruned, dict.fromkeys(SHAPES, (40,)), seed)
        alike += {n.index for n in drawn if n.module == A} == {n.index for n in drawn if n.module == B}
    assert alike <= 1


def test_a_draw_takes_from_the_pool_as_many_of_each_layer_and_keeps_their_scores():
    pool = (
        [Component(A, i, float(i)) for i in range(8)]
        + [Component(B, i, 10.0 + i) for i in range(12)]
        + [Component(C, 0, 9.0)]
    )
    drawn = draw_like(PRUNED, pool, 0)
    assert per_module(drawn) == {A: 2, B: 3}, "layer C has no pruned neuron"
    assert set(drawn) < set(pool)
    assert len(set(drawn)) == 5
    every = {neuron for seed in range(60) for neuron in draw_like(PRUNED, pool, seed)}
    assert every == {neuron for neuron in pool if neuron.module != C}
    assert draw_like(PRUNED, pool, 1) != drawn


def test_a_pool_that_is_too_small_is_taken_whole():
    pool = [Component(A, 5, 1.0), Component(B, 1, 2.0), Component(B, 2, 3.0), Component(B, 3, 4.0)]
    assert set(draw_like(PRUNED, pool, 0)) == set(pool)
    assert set(draw_like(PRUNED, pool[1:], 7)) == set(pool[1:])
    assert draw_like(PRUNED, [], 0) == []


def test_where_nearly_a_whole_layer_was_pruned_random_neurons_are_those_that_are_left():
    pruned = [Component(C, index, 0.0) for index in range(5)]
    assert sorted(places(random_like(pruned, SHAPES, 0))) == [(C, 5), (C, 6)]


def test_the_pool_of_the_lowest_has_several_times_as_many_of_each_layer_from_the_lowest_up():
    scores = {name: torch.rand(size, generator=torch.Generator().manual_seed(size)) for name, size in SIZES.items()}
    scores[B] = -scores[B]  # lower than any of A: layers are not ranked against each other
    pool = lowest_of_modules(PRUNED, scores.items())
    for module, number in [(A, 2), (B, 3)]:
        taken = {neuron.index for neuron in PRUNED if neuron.module == module}
        free = sorted((score, i) for i, score in enumerate(scores[module].tolist()) if i not in taken)
        expected = [Component(module, i, score) for score, i in free[: POOL * number]]
        assert [neuron for neuron in pool if neuron.module == module] == expected
    assert per_module(pool) == {A: 8, B: 15}, "10 are wanted of the first layer, but 2 of its 10 were pruned"
    assert len(pool) == 23


def test_the_pruned_are_not_in_the_pool_even_if_they_are_the_lowest_of_all():
    scores = {A: torch.arange(10.0), B: torch.arange(40.0)}
    pruned = [Component(A, 0, 0.0), Component(B, 2, 0.0)]
    assert places(lowest_of_modules(pruned, scores.items())) == [
        *((A, i) for i in range(1, 6)),
        *((B, i) for i in (0, 1, 3, 4, 5)),
    ]


def test_equal_scores_are_taken_in_the_order_of_their_index():
    pool = lowest_of_modules([Component(B, 1, 0.0)], {B: torch.zeros(40)}.items())
    assert [neuron.index for neuron in pool] == [0, 2, 3, 4, 5]


def test_draws_from_the_lowest_are_a_fifth_of_the_pool_each():
    pool = lowest_of_modules(PRUNED[1:2], {B: torch.arange(40.0)}.items())
    drawn = {neuron.index for seed in range(60) for neuron in draw_like(PRUNED[1:2], pool, seed)}
    assert drawn == {1, 2, 3, 4, 5}
    assert len(draw_like(PRUNED[1:2], pool, 0)) == 1
