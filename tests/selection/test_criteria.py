"""Orders of neurons against slow loops over them, those that come first, and the difference of two sets of samples."""

from functools import partial

import pytest
import torch
from torch import Tensor

from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.criteria import (
    auroc,
    benefit_per_cost,
    by_auroc,
    differential_relevance,
    differential_strength,
    floor_of,
    normalized_difference,
    select_neurons,
    set_difference,
    weighted_difference,
)

BOTH = (differential_relevance, normalized_difference, set_difference, partial(benefit_per_cost, floor=0.1))


def scores(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.rand(n, generator=draw) for name, n in (("a", 13), ("b", 7))}


def flat(of: dict[str, Tensor]) -> list[float]:
    return [value for score in of.values() for value in score.tolist()]


def test_normalized_difference_does_not_depend_on_the_scale_of_a_side():
    general, behavior = scores(0), scores(1)
    found = flat(normalized_difference(general, behavior))
    expected = [
        g / sum(flat(general)) - b / sum(flat(behavior)) for g, b in zip(flat(general), flat(behavior), strict=True)
    ]
    assert found == pytest.approx(expected)
    assert flat(normalized_difference(scores(0, 100.0), behavior)) == pytest.approx(found, abs=1e-8)
    assert sum(found) == pytest.approx(0, abs=1e-12)


def test_shares_of_signed_scores_are_of_their_magnitudes():
    signed = {"a": torch.tensor([3.0, -1.0])}
    assert flat(normalized_difference({"a": torch.tensor([1.0, 1.0])}, signed)) == pytest.approx([0.5 - 0.75, 0.75])


@pytest.mark.parametrize(("top_behavior", "top_general"), [(0.1, 0.1), (0.5, 0.25), (1.0, 0.5), (1.0, 0.0), (0.3, 0.0)])
def test_set_difference_is_the_top_of_one_less_the_top_of_the_other(top_behavior, top_general):
    general, behavior = scores(2), scores(3)
    g, b = flat(general), flat(behavior)
    by_behavior = sorted(range(20), key=lambda i: -b[i])[: round(top_behavior * 20)]
    by_general = sorted(range(20), key=lambda i: -g[i])[: round(top_general * 20)]
    expected = [-b[i] if i in by_behavior and i not in by_general else float("inf") for i in range(20)]
    assert flat(set_difference(general, behavior, top_behavior, top_general)) == pytest.approx(expected)


@pytest.mark.parametrize(("top_behavior", "top_general"), [(0.5, 0.1), (0.1, 0.1), (0.5, 0.0), (1.0, 0.4), (0.9, 0.7)])
@pytest.mark.parametrize("of_general", [0, 3, 100])
@pytest.mark.parametrize("of_behavior", [0, 7, 100])
def test_as_many_neurons_are_eligible_however_many_have_the_same_score(
    top_behavior, top_general, of_behavior, of_general
):
    def mostly_dead(alive: int, seed: int) -> dict[str, Tensor]:
        values = torch.zeros(100)
        values[torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:alive]] = torch.rand(alive) + 0.1
        return {"a": values[:60], "b": values[60:]}

    general, behavior = mostly_dead(of_general, 0), mostly_dead(of_behavior, 1)
    g, b = flat(general), flat(behavior)
    # Equal scores go by the order of the modules, then by index.
    by_behavior = sorted(range(100), key=lambda i: (-b[i], i))[: round(top_behavior * 100)]
    by_general = sorted(range(100), key=lambda i: (-g[i], i))[: round(top_general * 100)]
    eligible = {i for i in by_behavior if i not in by_general}
    turned = dict(reversed(behavior.items()))  # a file may have its modules in another order
    found = flat(set_difference(general, turned, top_behavior, top_general))
    assert {i for i in range(100) if found[i] < float("inf")} == eligible
    if top_general == 0:
        assert len(eligible) == round(top_behavior * 100)
    assert all(found[i] == -b[i] for i in eligible)


def test_benefit_per_cost_prefers_what_gains_as_much_for_less_and_leaves_out_what_gains_nothing():
    cost = {"a": torch.tensor([1.0, 4.0, 1.0]), "b": torch.tensor([0.0, 0.0])}
    benefit = {"a": torch.tensor([1.0, 1.0, 3.0]), "b": torch.tensor([0.0, -1.0])}
    found = benefit_per_cost(cost, benefit, floor=0.5)  # of a mean of 1.2
    assert found["a"].tolist() == pytest.approx([-1 / 1.6, -1 / 4.6, -3 / 1.6])
    assert found["b"].tolist() == [float("inf")] * 2
    assert [neuron.index for neuron in select_neurons(found, 3)] == [2, 0, 1]
    with pytest.raises(ValueError, match="leaves only 3 of 5"):
        select_neurons(found, 4)


def test_the_floor_of_costs_shrinks_as_text_grows():
    assert [floor_of(number) for number in (512, 5120, 0)] == [1.0, 0.1, 0.0]


def test_a_cost_of_0_by_chance_does_not_come_before_a_benefit_that_is_much_larger():
    cost, benefit = {"a": torch.tensor([0.0, 0.5, 1.5])}, {"a": torch.tensor([1e-4, 1.0, 0.1])}
    assert [neuron.index for neuron in select_neurons(benefit_per_cost(cost, benefit, 0.1), 3)] == [1, 2, 0]


@pytest.mark.parametrize("selection", BOTH)
def test_scores_of_other_modules_are_refused(selection):
    with pytest.raises(ValueError, match="differ in their modules"):
        selection(scores(0), {"a": torch.rand(13)})


def test_a_side_without_scores_is_refused():
    nothing = {name: torch.zeros_like(score) for name, score in scores(0).items()}
    with pytest.raises(ValueError, match="behaviour's scores are 0 throughout"):
        normalized_difference(scores(0), nothing)
    with pytest.raises(ValueError, match=r"--model\.general holds a cost of 0 for every component"):
        benefit_per_cost(nothing, scores(0), 0.1)
    with pytest.raises(ValueError, match=r"--model\.behavior holds no benefit above 0"):
        benefit_per_cost(scores(0), {name: -score for name, score in scores(1).items()}, 0.1)


def test_no_more_neurons_are_selected_than_a_selection_leaves():
    ranked = set_difference(scores(0), scores(1), 0.2, 0.0)
    assert len(select_neurons(ranked, 4)) == 4
    with pytest.raises(ValueError, match=r"leaves only 4 of 20: ask for fewer, or .* raise --model\.top_behavior"):
        select_neurons(ranked, 5)


def activations(seed: int, num_samples: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randint(6, (num_samples, n), generator=draw).float() for name, n in (("a", 13), ("b", 7))}


def share_of_pairs(general: Tensor, behavior: Tensor) -> list[float]:
    """Per neuron, in how many pairs of samples the behaviour's is higher; a tie counts half."""
    shares = []
    for neuron in range(general.shape[1]):
        pairs = [(g, b) for g in general[:, neuron].tolist() for b in behavior[:, neuron].tolist()]
        shares.append(sum(1.0 if b > g else 0.5 if b == g else 0.0 for g, b in pairs) / len(pairs))
    return shares


def test_auroc_is_the_share_of_pairs_in_which_the_behaviour_is_higher():
    general, behavior = activations(0, 17)["a"], activations(1, 9)["a"]
    assert auroc(general, behavior).tolist() == pytest.approx(share_of_pairs(general, behavior))


def test_by_auroc_takes_the_neuron_first_that_tells_the_behaviour_best():
    general, behavior = activations(0, 17), activations(1, 9)
    found = by_auroc(general, behavior)
    shares = {(m, i): s for m in general for i, s in enumerate(share_of_pairs(general[m], behavior[m]))}
    assert flat(found) == pytest.approx([-share for share in shares.values()])
    first = select_neurons(found, 1)[0]
    assert (first.module, first.index) == max(shares, key=lambda place: shares[place])


def test_weighted_difference_is_the_difference_times_what_the_activation_tells_beyond_chance():
    general, behavior = scores(0), scores(1)
    of_general, of_behavior = activations(0, 17), activations(1, 9)
    shares = [s for m in general for s in share_of_pairs(of_general[m], of_behavior[m])]
    expected = [
        (g - b) * max(2 * share - 1, 0.0) for g, b, share in zip(flat(general), flat(behavior), shares, strict=True)
    ]
    assert any(share < 0.5 for share in shares)
    weight = {name: auroc(of_general[name], of_behavior[name]) for name in general}
    assert flat(weighted_difference(general, behavior, weight)) == pytest.approx(expected)


def test_auroc_of_what_is_apart_and_of_what_is_alike():
    low, high = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert auroc(low, high).tolist() == [1.0, 0.5]
    assert auroc(high, low).tolist() == [0.0, 0.5]


def test_differential_relevance_is_general_less_behaviour():
    general = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.5])}
    behavior = {"b": torch.tensor([2.0]), "a": torch.tensor([1.0, 4.0])}
    difference = differential_relevance(general, behavior)
    assert {name: value.tolist() for name, value in difference.items()} == {"a": [2.0, -3.0], "b": [-1.5]}
    assert list(difference) == ["a", "b"]


@pytest.mark.parametrize(
    "behavior",
    [
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)},
        {"a": torch.ones(2), "c": torch.ones(1)},
        {"a": torch.ones(2), "b": torch.ones(2)},
    ],
)
def test_scores_of_other_modules_or_shapes_have_no_difference(behavior):
    general = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="differ in their modules or shapes"):
        differential_relevance(general, behavior)
    with pytest.raises(ValueError, match="differ in their modules or shapes"):
        differential_strength(general, behavior)


def test_differential_strength_is_the_share_of_the_general_sum_in_percent():
    general = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0])}
    behavior = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([4.0])}
    assert differential_strength(general, behavior) == pytest.approx(25.0)
    assert differential_strength(behavior, general) == pytest.approx(-100 / 3)
    assert differential_strength(general, general) == 0


def test_differential_strength_of_no_relevance_is_nan():
    nothing = {"a": torch.zeros(2)}
    damping = differential_strength(nothing, {"a": torch.ones(2)})
    assert damping != damping


@pytest.mark.parametrize("num_neurons", [1, 7, 40, 60])
def test_selection_is_the_head_of_the_sorted_list_of_all_neurons(num_neurons):
    draw = torch.Generator().manual_seed(0)
    # Whole numbers, so that there are many ties.
    scores = {name: torch.randint(-3, 4, (20,), generator=draw).float() for name in ("b", "a", "c")}
    rows = [(score, place, i) for place, name in enumerate(scores) for i, score in enumerate(scores[name].tolist())]
    expected = [Component(list(scores)[place], i, score) for score, place, i in sorted(rows)[:num_neurons]]
    assert select_neurons(scores, num_neurons) == expected


def test_the_lowest_scores_over_modules_of_different_sizes_come_first():
    scores = {"a": torch.tensor([0.5, -3.0]), "b": torch.tensor([-1.0, 4.0, -5.0])}
    assert select_neurons(scores, 3) == [Component("b", 2, -5.0), Component("a", 1, -3.0), Component("b", 0, -1.0)]


def test_ties_go_to_the_first_module_and_the_first_index():
    scores = {"z": torch.zeros(3), "a": torch.zeros(2)}
    assert [(neuron.module, neuron.index) for neuron in select_neurons(scores, 4)] == [
        ("z", 0),
        ("z", 1),
        ("z", 2),
        ("a", 0),
    ]


@pytest.mark.parametrize("num_neurons", [0, -1, 4])
def test_a_number_of_neurons_out_of_bounds_is_refused(num_neurons):
    scores = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"--model.num_neurons must be between 1 and 3 .*got {num_neurons}\."):
        select_neurons(scores, num_neurons)


def test_scores_with_nan_cannot_be_ranked():
    with pytest.raises(ValueError, match="NaN"):
        select_neurons({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([float("nan")])}, 1)
