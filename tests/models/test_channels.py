"""Channels of attentions: how they are masked, pruned, exported and drawn, against zeros written by hand."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fail_if_masked, mlp_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.variants import list_variants, neurons_of, of_kind
from sparc3_lightning.models.architectures import weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import KINDS, Component, by_layer, check, counts_of, mask, prune_
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.heads import channel_norms
from sparc3_lightning.models.sharding import load_sharded
from sparc3_lightning.selection.criteria import POOL, lowest_of_modules
from sparc3_lightning.selection.neuron_list import NeuronList

# The last layer of an attention in a block: of a LLaMA whose heads share values, of GPT-2 (Conv1D), of OPT (biases).
OUTPUTS = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}
INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
D = 4  # channels of a head
OFF = ({5: 1.0, 6: 0.25}, {0: 1.0, 13: 1.0})  # damping of each channel in each layer
each_family = pytest.mark.parametrize("family", OUTPUTS)
O_PROJ = OUTPUTS["llama"].format(1)


def channels_of(family: str) -> list[Component]:
    return [
        Component(OUTPUTS[family].format(block), index, -1.0, damping, granularity="channel")
        for block, of_block in enumerate(OFF)
        for index, damping in of_block.items()
    ]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def by_hand(model: Any, channels: list[Component], damping: float = 1.0) -> Any:
    """Return a copy whose columns of the channels are smaller."""
    other = copy.deepcopy(model)
    for channel in channels:
        weight_of(other.get_submodule(channel.module))[:, channel.index] *= 1 - damping * channel.damping
    return other


@each_family
@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_a_mask_takes_channels_away_without_touching_a_weight(make_model, family, damping):
    model, channels = make_model(family), channels_of(family)
    before, whole = weights(model), logits(model)
    with mask(model, channels, damping):
        found = logits(model)
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    torch.testing.assert_close(found, logits(by_hand(model, channels, damping)), rtol=1e-9, atol=1e-9)
    assert (found - whole).abs().max() > 1e-4
    assert torch.equal(logits(model), whole)


@each_family
def test_a_pruned_channel_is_a_column_of_zeros_and_all_else_stays(make_model, family):
    model, channels = make_model(family), channels_of(family)
    expected = weights(by_hand(model, channels))
    with mask(model, channels):
        masked = logits(model)
    prune_(model, channels)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    torch.testing.assert_close(logits(model), masked, rtol=1e-9, atol=1e-9)


@each_family
def test_all_channels_of_a_head_are_the_head(make_model, family):
    model, output = make_model(family), OUTPUTS[family].format(0)
    channels = [Component(output, i, -1.0, granularity="channel") for i in range(2 * D, 3 * D)]
    with mask(model, channels):
        found = logits(model)
    with mask(model, [Component(output, 2, -1.0, granularity="head")]):
        assert torch.equal(logits(model), found)


@each_family
def test_an_exported_checkpoint_computes_what_the_masked_model_computes(make_checkpoint, family):
    folder, channels = make_checkpoint(family), channels_of(family)
    model = load_model(folder, torch.float32)
    mixed = [*channels, Component(mlp_of(family, 1)[0][0], 3, -1.0)]
    mixed.append(Component(channels[0].module, 3, -1.0, granularity="head"))
    export_pruned(Checkpoint(folder), mixed, Path("pruned"))
    reloaded = AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.float32).eval()
    whole = logits(model)
    with mask(model, mixed):
        torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(reloaded) - whole).abs().max() > 1e-4


def test_what_is_off_is_0_even_where_it_is_infinite(make_model):
    model = make_model()
    channel = Component(O_PROJ, 5, -1.0, granularity="channel")
    expected = logits(by_hand(model, [channel]))
    weight_of(model.get_submodule(O_PROJ))[:, 5] = torch.inf
    prune_(model, [channel])
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


@each_family
def test_a_sharded_model_has_the_same_norms_and_the_same_mask(make_checkpoint, family):
    model, channels = load_model(make_checkpoint(family), torch.float32), channels_of(family)
    output = channels[0].module
    expected = torch.stack([column.norm() for column in weight_of(model.get_submodule(output)).T])
    torch.testing.assert_close(channel_norms(model, output), expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = load_sharded(Checkpoint(make_checkpoint(family)), torch.float32, mesh, torch.device("cpu"))
    torch.testing.assert_close(channel_norms(sharded, output), expected)
    assert KINDS["channel"].shape(sharded, output) == (16,)
    with mask(model, channels), mask(sharded, channels):
        torch.testing.assert_close(logits(sharded), logits(model))


@pytest.mark.parametrize("use", [fail_if_masked, prune_, check])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"index": 16}, "Channel 16 of .* the layer has 16 channels. Is neurons.json of another model"),
        ({"index": -1}, "Channel -1 of "),
        ({"mean": 0.5}, "Channel 3 of .* has a constant, which only a neuron can have"),
        ({"module": "model.layers.2.self_attn.o_proj"}, "not a layer of attention heads .*Is neurons.json of another"),
        ({"module": "model.layers.0.mlp.down_proj"}, "not a layer of attention heads"),
    ],
)
def test_a_channel_that_is_not_there_or_has_a_constant_is_refused_and_nothing_is_changed(
    make_model, use, bad, complaint
):
    model = make_model()
    before = weights(model)
    wrong = Component(**{"module": O_PROJ, "index": 3, "score": -1.0, "granularity": "channel", **bad})
    with pytest.raises(ValueError, match=complaint):
        use(model, [*channels_of("llama"), wrong])
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# Controls of lists that mix kinds.


@each_family
def test_controls_have_as_many_of_each_kind_in_each_layer_and_none_of_the_pruned(make_model, family):
    model, up = make_model(family), mlp_of(family, 0)[0][0]
    pruned = [*channels_of(family), Component(up, 3, -1.0), Component(up, 9, -1.0)]
    pruned += [Component(pruned[0].module, 1, -1.0, granularity="head")]
    pruned += [Component(up, 3, -1.0, granularity="weight", input=2)]
    least = [Component(up, i, 0.0) for i in range(10, 20)]
    least += [Component(c.module, i, 0.0, granularity="channel") for c in pruned[:4] for i in range(7, 12)]
    lists = {"": NeuronList(pruned, least_relevant=list(dict.fromkeys(least)))}
    variants = list_variants(lists, 1, controls=Controls(6))
    off = neurons_of(variants, lists, model, seed=0)
    expected = Counter((c.granularity, c.module) for c in pruned)
    for variant in variants:
        if variant.kind in ("random", "largest_weights"):
            check(model, off[variant.name])
            assert Counter((c.granularity, c.module) for c in off[variant.name]) == expected
            assert not {c.key for c in off[variant.name]} & {c.key for c in pruned}
    of_least = counts_of(off["least_relevant_0"])
    assert of_least == {"neuron": 2, "channel": 4}, "there is no head and no weight to draw"
    assert off["random_0"] != off["random_1"]
    for (kind, module), of_layer in by_layer(pruned).items():
        heaviest = lowest_of_modules(of_layer, [(module, -KINDS[kind].norms(model, module))])
        assert len(heaviest) <= POOL * len(of_layer)
        drawn = {c.key for v in of_kind(variants, "largest_weights") for c in by_layer(off[v.name])[kind, module]}
        assert drawn <= {c.key for c in heaviest}
