"""Costs of components: the Fisher information of their gains by chunks, against a gain a chunk and plain autograd."""

from typing import Any

import pytest
import torch
from helpers import FAMILIES, mlp_of
from mixtures import make_mixture
from torch import Tensor

from sparc3_lightning.attribution.accumulator import Costs, ScoreAccumulator
from sparc3_lightning.attribution.targets import target_of
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.models.architectures import find_layers, twins_of
from sparc3_lightning.models.experts import is_expert, open_experts_
from sparc3_lightning.models.heads import head_dims
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.models.noise import draw_key, draw_rows
from sparc3_lightning.models.sharding import checkpoint_blocks_

SEED, CHUNK = 3, 4


@pytest.fixture
def samples() -> list[Sample]:
    """Samples of 2 to 11 tokens, some of them no whole number of chunks."""
    draw = torch.Generator().manual_seed(0)
    return [Sample(f"s{n}", torch.randint(4, 100, (n,), generator=draw).tolist()) for n in (9, 2, 4, 11, 8)]


def accumulate(
    model: Any, layers: Any, samples: list[Sample], size: int, chunk: int = CHUNK, fillers: int = 0, **options: Any
) -> ScoreAccumulator:
    """Record samples in padded batches, as the predict step does; the last ones only fill the batch."""
    real = samples[: len(samples) - fillers]
    costs = Costs(chunk, sum(len(sample.input_ids) for sample in real), {sample.id for sample in samples[1::2]})
    accumulator = ScoreAccumulator(layers, "fisher", costs=costs, **options)
    for start in range(0, len(samples), size):
        batch = pad_right(samples[start : start + size], 0)
        mask = batch["attention_mask"] if batch["is_padded"] else None
        weights = [int(name in {sample.id for sample in real}) for name in batch["sample_ids"]]
        with accumulator.recording(mask, batch["sample_ids"], weights):
            target_of(model, "sampled", batch, mask, None, SEED).sum().backward()  # type: ignore[arg-type]
    return accumulator


def oracle(model: Any, layers: dict[str, Any], samples: list[Sample], chunk: int = CHUNK, size: int = 1):
    """Give each chunk of each sample, and each input or ``size`` of them, a gain of its own, and differentiate by it.

    The layers of an expert know which tokens they get.
    """
    totals: dict[str, Tensor] = {}
    for sample in samples:
        tokens = torch.tensor([sample.input_ids])
        numbers = torch.arange(len(sample.input_ids)) // chunk
        gains: dict[str, Tensor] = {}

        def times(name: str, numbers: Tensor = numbers, gains: dict[str, Tensor] = gains):
            def hook(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
                of = inputs[0].shape[-1] // size
                gain = gains.setdefault(name, torch.ones(numbers[-1] + 1, of, dtype=torch.float64, requires_grad=True))
                places = numbers if getattr(module, "tokens", None) is None else numbers[module.tokens]
                return (inputs[0] * gain[places].repeat_interleave(size, dim=1),)

            return hook

        handles = [
            one.register_forward_pre_hook(times(name))
            for name, layer in layers.items()
            for one in (layer, *twins_of(model).get(layer, ()))
        ]
        log_TV = model(tokens, use_cache=False).logits[0].log_softmax(dim=-1)
        for handle in handles:
            handle.remove()
        key = torch.tensor([draw_key(SEED, sample.id)])
        drawn = [int(draw_rows(row.detach()[None], key, torch.tensor([t]))) for t, row in enumerate(log_TV)]
        target = torch.stack([log_TV[t, token] for t, token in enumerate(drawn)]).sum()
        found = torch.autograd.grad(target, list(gains.values()))
        for name, gradient in zip(gains, found, strict=True):
            totals[name] = totals.get(name, 0) + gradient.square().sum(dim=0)
    number = sum(len(sample.input_ids) for sample in samples)
    return {name: total / number for name, total in totals.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, cost in found.items():
        torch.testing.assert_close(
            cost.double(), expected.get(name, torch.zeros(cost.shape).double()), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_cost_of_a_neuron_is_the_square_of_the_gradient_by_a_gain_in_each_chunk(make, samples, family, in_float64):
    model = make(family)
    columns = columns_of(model, [mlp_of(family, block)[0][0] for block in range(2)])
    assert_same(accumulate(model, columns, samples, 2).compute(), oracle(model, columns, samples))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_cost_of_a_head_is_by_one_gain_for_all_its_inputs(make, samples, family, in_float64):
    model = make(family)
    layers = find_layers(model, [{"gpt2": "attn.c_proj", "opt": "out_proj"}.get(family, "o_proj")])
    found = accumulate(model, layers, samples, 3, granularity="head", head_dims=head_dims(model, layers))
    assert_same(found.compute(), oracle(model, layers, samples, size=4))


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text", "gpt_oss"])
def test_chunks_of_an_expert_are_those_of_the_tokens_of_the_sample(samples, kind, in_float64):
    model = make_mixture(kind)
    open_experts_(model)
    layers = {name: layer for name, layer in find_layers(model, ["down_proj"]).items() if is_expert(layer)}
    expected = oracle(model, layers, samples)
    assert_same(accumulate(model, layers, samples, 3).compute(), expected)
    rare = [samples[1]]  # of two tokens, which some experts never see
    found = accumulate(model, layers, rare, 1).compute()
    assert not all(cost.any() for cost in found.values())
    assert_same(found, oracle(model, layers, rare))


def test_neither_batches_nor_fillers_nor_recomputation_change_a_cost(make, samples, in_float64):
    model = make()
    columns = columns_of(model, find_layers(model, ["up_proj"]))
    alone = accumulate(model, columns, samples, 1)
    others = [accumulate(model, columns, samples, 5), accumulate(model, columns, samples[::-1], 2)]
    others.append(accumulate(model, columns, [*samples, Sample("filler", [7] * 11)], 3, fillers=1))
    checkpoint_blocks_(model)
    others.append(accumulate(model, columns, samples, 2))
    for other in others:
        assert_same(other.compute(), {name: cost.double() for name, cost in alone.compute().items()})
    odd = accumulate(model, columns, samples[1::2], 2)
    even, second = alone.halves
    torch.testing.assert_close(second, sum(odd.halves), rtol=1e-9, atol=0)
    assert even.shape == second.shape == (48,)


def test_a_chunk_as_long_as_the_text_is_one_gain_and_a_chunk_of_one_is_a_gain_a_token(make, samples, in_float64):
    model = make()
    columns = columns_of(model, find_layers(model, ["up_proj"]))
    for chunk in (1, 3, 100):
        expected = oracle(model, columns, samples[:2], chunk)
        assert_same(accumulate(model, columns, samples[:2], 2, chunk).compute(), expected)


def test_a_layer_that_two_blocks_share_has_one_gain(make, samples, in_float64):
    model = make()
    layers = columns_of(model, ["model.layers.0.mlp.up_proj"])
    first, second = (model.model.layers[i].mlp.down_proj for i in range(2))
    second.weight = first.weight
    model.all_tied_weights_keys = {"model.layers.1.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight"}
    assert twins_of(model) == {first: [second]}
    found = accumulate(model, layers, samples, 3, twins=twins_of(model)).compute()
    assert_same(found, oracle(model, layers, samples))


def test_half_of_the_cost_is_what_switching_a_neuron_off_costs_in_nats_a_token(make, in_float64):
    model = make()
    layer = model.model.layers[0].mlp.down_proj
    tokens = torch.randint(4, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    many = [Sample(str(i), tokens[0].tolist()) for i in range(400)]  # the same text, with other draws
    cost = accumulate(model, {"layer": layer}, many, 100, chunk=6).compute()["layer"].double()
    least = 0.05  # so little is taken away that the second order is all there is
    log = model(tokens).logits[0].log_softmax(dim=-1)
    for neuron in (0, 5, 11):
        factor = torch.ones(24, dtype=torch.float64)
        factor[neuron] = 1 - least
        handle = layer.register_forward_pre_hook(lambda _, inputs, factor=factor: (inputs[0] * factor,))
        other = model(tokens).logits[0].log_softmax(dim=-1)
        handle.remove()
        divergence = (log.exp() * (log - other)).sum(dim=-1).mean()
        assert cost[neuron] / 2 == pytest.approx(divergence.item() / least**2, rel=0.25)
