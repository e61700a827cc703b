"""Rounding to few bits: against a slow second implementation, and in models of several families."""

import math

import pytest
import torch
from mixtures import make_mixture, open_
from torch import nn

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import find_layers, weight_of
from sparc3_lightning.models.components import Component, prune_
from sparc3_lightning.models.experts import ExpertLinear
from sparc3_lightning.models.rounding import check_can_be_rounded, round_, rounded


def slowly_rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round number by number: of all multiples of the group's step take the nearest."""
    found = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group].tolist()
            largest = 2 ** (bits - 1) - 1
            step = max(abs(value) for value in values) / largest
            grid = [i * step for i in range(-largest, largest + 1)]
            for i, value in enumerate(values):
                found[row, start + i] = min(grid, key=lambda point: abs(point - value))
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("inputs", "group"), [(8, 4), (10, 4), (3, 4), (7, 1), (5, 128)])
def test_each_group_of_inputs_is_rounded_to_the_nearest_multiple_of_its_step(bits, inputs, group):
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(bits), dtype=torch.float32)
    torch.testing.assert_close(rounded(weight, bits, group), slowly_rounded(weight.double(), bits, group).float())


def test_zeros_stay_zeros_the_largest_stays_and_rounding_twice_changes_nothing():
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[:, 7] = 0
    found = rounded(weight, 4)
    assert (found[weight == 0] == 0).all()
    for start in (0, 128, 256):
        part = weight[0, start : start + 128]
        place = start + int(part.abs().argmax())
        torch.testing.assert_close(found[0, place], weight[0, place])
    torch.testing.assert_close(rounded(found, 4), found)
    assert max(len(found[0, start : start + 128].unique()) for start in (0, 128, 256)) <= 15


def test_eight_bits_are_nearer_than_four_and_the_dtype_stays():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    errors = [(rounded(weight, bits) - weight).square().mean().item() for bits in (8, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-4
    assert rounded(weight.bfloat16(), 8).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 0, 9, -4])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"^--model.bits must be different numbers from 2 to 8, got \[{bits}\]\.$"):
        rounded(torch.ones(2, 2), bits)


def test_a_weight_that_is_not_finite_and_a_group_of_nothing_are_refused(make_model):
    with pytest.raises(ValueError, match="NaN or infinity"):
        rounded(torch.tensor([[1.0, math.nan]]), 4)
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        rounded(torch.ones(2, 2), 4, 0)
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = math.inf
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: The weight holds NaN or infinity"):
        round_(model, 4)


def test_experts_that_would_not_be_rounded_are_refused(make_model):
    class OtherExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 3, 2))

    check_can_be_rounded(make_model())
    with pytest.raises(OptionError, match=r"^--model\.bits must be \[\]: the model has experts of no known kind"):
        check_can_be_rounded(nn.Sequential(OtherExperts()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_layers_of_the_blocks_are_rounded_and_nothing_else(family, make_model):
    model, before = make_model(family), make_model(family)
    round_(model, 3)
    layers = find_layers(model, ["all"])
    for name, layer in find_layers(before, ["all"]).items():
        torch.testing.assert_close(weight_of(layers[name]), rounded(weight_of(layer), 3), rtol=0, atol=0)
    weights = {f"{name}.weight" for name in layers}
    changed = {
        name
        for (name, new), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == weights


def test_a_neuron_that_was_pruned_stays_pruned(make_model):
    model = make_model()
    prune_(model, [Component("model.layers.0.mlp.up_proj", 5, 0.0)])
    round_(model, 2)
    mlp = model.model.layers[0].mlp
    assert not mlp.up_proj.weight[5].any()
    assert not mlp.gate_proj.weight[5].any()
    assert not mlp.down_proj.weight[:, 5].any()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_rounded_each_by_itself_and_their_routers_are_not(kind):
    model, before = make_mixture(kind), make_mixture(kind)
    for of in (model, before):
        open_(of)
    layers = find_layers(before, ["all"])
    assert any(isinstance(layer, ExpertLinear) for layer in layers.values())
    expected = {name: rounded(weight_of(layer), 4) for name, layer in layers.items()}
    routers = {name: parameter.clone() for name, parameter in model.named_parameters() if "router" in name}
    round_(model, 4)
    for name, layer in find_layers(model, ["all"]).items():
        torch.testing.assert_close(weight_of(layer), expected[name], rtol=0, atol=0)
    assert all(torch.equal(model.get_parameter(name), old) for name, old in routers.items())
