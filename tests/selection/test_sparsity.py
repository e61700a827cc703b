"""Masks against sorting in plain Python, one weight at a time: exact counts, ties by order, any sparsity."""

import math

import pytest
import torch
from torch import Tensor

from sparc3_lightning.attribution.relevance import squared_norms, wanda_score
from sparc3_lightning.selection.sparsity import check_sparsity, global_masks, global_threshold, num_pruned, prune_mask

SPARSITIES = [0.0, 1e-4, 0.1, 0.3, 0.5, 0.77, 1.0]
PATTERNS = ["row", "layer", "global"]


def draw(*shape: int, seed: int = 0, with_ties: bool = False) -> Tensor:
    scores = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return (6 * scores).floor() if with_ties else scores


def oracle(layers: dict[str, Tensor], sparsity: float, pattern: str) -> dict[str, list[list[bool]]]:
    """Put the weights that compete into a list, sort it, and strike out as many as it takes."""
    masks = {name: [[False] * score.shape[1] for _ in score] for name, score in layers.items()}
    groups: dict[object, list[tuple[float, int, str, int, int]]] = {}
    for name, score in layers.items():
        for row, values in enumerate(score.tolist()):
            for column, value in enumerate(values):
                key = {"row": (name, row), "layer": name, "global": None}.get(pattern, (name, row, column // 4))
                group = groups.setdefault(key, [])
                group.append((value, len(group), name, row, column))
    for group in groups.values():
        for _, _, name, row, column in sorted(group)[: round(sparsity * len(group))]:
            masks[name][row][column] = True
    return masks


def masks_of(layers: dict[str, Tensor], sparsity: float, pattern: str) -> dict[str, list[list[bool]]]:
    if pattern == "global":
        found = dict(global_masks(layers.items(), global_threshold(layers.items(), sparsity)))
    else:
        found = {name: prune_mask(score, sparsity, pattern) for name, score in layers.items()}
    return {name: mask.tolist() for name, mask in found.items()}


@pytest.mark.parametrize("with_ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_those_of_sorting_every_group(pattern, sparsity, with_ties):
    layers = {f"layer {i}": draw(5 + i, 12, seed=i, with_ties=with_ties) for i in range(3)}
    assert masks_of(layers, sparsity, pattern) == oracle(layers, sparsity, pattern)


@pytest.mark.parametrize("with_ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("4:4", 0), ("0:4", 1)])
def test_n_of_m_keeps_the_n_highest_of_m_side_by_side(pattern, sparsity, with_ties):
    layers = {"a": draw(5, 12, with_ties=with_ties)}
    check_sparsity(sparsity, pattern)
    assert masks_of(layers, sparsity, pattern) == oracle(layers, sparsity, pattern)


@pytest.mark.parametrize("seed", range(5))
def test_the_global_threshold_is_exact_over_magnitudes_far_apart(seed):
    spread = [0.0, -0.0, 1e-44, 1e-38, 1.0, 3e38]
    layers = {}
    for i in range(4):
        scores = draw(7, 9, seed=10 * seed + i) * 10 ** (20 * draw(7, 9, seed=10 * seed + i + 5) - 10)
        scores[0, : len(spread)] = torch.tensor(spread)
        layers[str(i)] = scores
    for number in range(0, 4 * 63 + 1, 7):
        found = dict(global_masks(layers.items(), global_threshold(layers.items(), number / 252)))
        assert sum(int(mask.sum()) for mask in found.values()) == number
        flat, pruned = (torch.cat([of[name].flatten() for name in layers]) for of in (layers, found))
        if 0 < number < 252:
            assert flat[pruned].max() <= flat[~pruned].min()


def test_the_global_threshold_goes_through_the_layers_twice():
    class Shards:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return ((str(i), draw(4, 4, seed=i)) for i in range(3))

    expected = torch.cat([draw(4, 4, seed=i).flatten() for i in range(3)]).kthvalue(24).values
    shards = Shards()
    assert global_threshold(shards, 0.5) == (expected, 1)
    assert shards.passes == 2


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_the_global_threshold_refuses_what_has_no_order_of_bits(bad):
    with pytest.raises(ValueError, match="must not be negative, nor NaN: layer 1"):
        global_threshold([("layer 0", draw(2, 2)), ("layer 1", torch.tensor([[1.0, bad]]))], 0.5)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_masks_of_wanda_are_those_of_a_loop_over_its_formula(pattern):
    """|W_ij| ||X_j||_2 from whole activations, then of each row, or of four weights, half: the lowest go."""
    gen = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 8, generator=gen, dtype=torch.float64)
    tokens = torch.randn(3, 10, 8, generator=gen, dtype=torch.float64)
    expected = []
    for row in weight.tolist():
        norms = [math.sqrt(sum(x[j] ** 2 for sample in tokens.tolist() for x in sample)) for j in range(8)]
        scores = [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
        size = 8 if pattern == "row" else 4
        gone = []
        for start in range(0, 8, size):
            of_group = range(start, start + size)
            gone += sorted(of_group, key=lambda j: scores[j])[: size // 2]
        expected.append([j in gone for j in range(8)])
    squares = squared_norms(tokens, None).sum(dim=0)
    assert prune_mask(wanda_score(weight, squares, of_neurons=False), 0.5, pattern).tolist() == expected


def test_counts_are_the_nearest_whole_number():
    assert [num_pruned(sparsity, 10) for sparsity in (0, 0.04, 0.06, 0.3, 0.96, 1)] == [0, 0, 1, 3, 10, 10]
    assert num_pruned(0.29, 100) == 29, "not 28, as a product of floats cut off would give"


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
def test_a_sparsity_outside_of_0_to_1_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"--model\.sparsity must be in \[0, 1\], got"):
        check_sparsity(sparsity, "row")


@pytest.mark.parametrize("pattern", ["rows", "2:", "4:2", "0:0", "2:4:8", ""])
def test_an_unknown_pattern_is_refused_with_the_ones_there_are(pattern):
    with pytest.raises(ValueError, match=r"--model\.pattern must be one of row, layer, global, or n:m .* 2:4; got"):
        check_sparsity(0.5, pattern)


def test_a_sparsity_that_n_of_m_cannot_have_is_refused_with_the_one_it_has():
    with pytest.raises(ValueError, match=r"--model\.pattern 1:4 keeps 1 of 4 .*must be 0\.75, got 0\.5"):
        check_sparsity(0.5, "1:4")


def test_rows_that_are_no_multiple_of_m_are_refused():
    with pytest.raises(ValueError, match="2:4: rows of 6 weights are no multiple of 4"):
        prune_mask(draw(2, 6), 0.5, "2:4")
