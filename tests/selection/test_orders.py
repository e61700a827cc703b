"""Orders of components, and what is left of a model without the first of them, against sorting by hand."""

import copy
from typing import Any

import pytest
import torch
from helpers import mlp_of
from torch import Tensor

from sparc3_lightning.models.components import mask
from sparc3_lightning.selection.orders import ComponentOrder, WeightOrder, random_scores

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
UP_PROJ = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
O_PROJ = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


def normal(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("modules", "size", "granularity"), [(UP_PROJ, 24, "neuron"), (O_PROJ, 4, "head"), (O_PROJ, 16, "channel")]
)
def test_components_go_by_the_magnitude_of_their_score_over_all_layers(make_model, modules, size, granularity):
    scores = normal(dict.fromkeys(modules, (size,)))
    by_hand = sorted((abs(score[i].item()), name, i) for name, score in scores.items() for i in range(size))
    order, model = ComponentOrder(scores, granularity), make_model()
    assert [(neuron.module, neuron.index) for neuron in order.components] == [(name, i) for _, name, i in by_hand]
    assert len(order) == 2 * size
    whole = logits(model)
    for number in (0, 1, size, 2 * size):
        with order.without(model, number) as out:
            found = logits(model)
        with mask(model, order.components[:number]):
            assert torch.equal(found, logits(model))
        assert out == number
        assert torch.equal(found, whole) == (number == 0)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("number", [1, 100, 700, 768])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_zero_while_they_are_out_and_come_back_bit_for_bit(make_model, family, number):
    model = make_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores = normal(dict.fromkeys([mlp_of(family, i)[0][0] for i in range(2)], (24, 16)))
    by_hand = copy.deepcopy(model)
    rows = [(abs(R_OI[o, i].item()), name, o, i) for name, R_OI in scores.items() for o in range(24) for i in range(16)]
    for _, name, o, i in sorted(rows)[:number]:
        by_hand.get_submodule(name).weight[(i, o) if family == "gpt2" else (o, i)] = 0  # Conv1D is transposed
    with WeightOrder(scores).without(model, number) as out:
        assert out == number
        for (name, parameter), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(parameter, expected), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_weights_come_back_after_an_error_and_none_is_changed_where_none_is_out(make_model):
    model, order = make_model(), WeightOrder(normal(dict.fromkeys(UP_PROJ, (24, 16))))
    whole = logits(model)
    with order.without(model, 0) as out:
        assert out == 0
        assert torch.equal(logits(model), whole)

    def fail() -> None:
        with order.without(model, 400):
            assert not torch.equal(logits(model), whole)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(logits(model), whole)


def test_weights_of_equal_relevance_go_together_and_are_counted(make_model):
    scores = {UP_PROJ[0]: torch.ones(24, 16)}
    scores[UP_PROJ[0]][:3] = 0
    order = WeightOrder(scores)
    for number, expected in ((1, 3 * 16), (3 * 16, 3 * 16), (3 * 16 + 1, 24 * 16)):
        with order.without(make_model(), number) as out:
            assert out == expected


def test_random_scores_have_the_shapes_and_depend_on_the_seed():
    like = normal({"a": (5,), "b": (3, 4)})
    first, again, other = random_scores(like, 1), random_scores(like, 1), random_scores(like, 2)
    assert {name: score.shape for name, score in first.items()} == {name: score.shape for name, score in like.items()}
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in like)
