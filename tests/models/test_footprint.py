"""What passes cost, by fake tensors: against torch's counter on the real model, and against all of its blocks."""

from typing import Any

import pytest
import torch
from mixtures import MIXTURES, make_mixture
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.models import footprint
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.experts import open_experts_
from sparc3_lightning.models.footprint import Cost, Layout, Meter, cost_of

# What they call is what tests/stages/test_estimate.py calls; tracing fake tensors takes longer than the tests.
pytestmark = pytest.mark.no_cover


def config_of(num_blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def under_rules(model: Any) -> None:
    """Find the activations of a model, for which numbers are needed."""
    with lrp(model):
        pass


def attribute(model: Any, meter: Meter | None = None) -> None:
    accumulator = ScoreAccumulator(find_layers(model, ["all"]), "magnitude")
    with lrp(model), accumulator.recording(None, ["one", "another"]):
        largest_logit(model, torch.zeros(2, 8, dtype=torch.long)).sum().backward()


def cost(num_blocks: int, **layout: Any) -> Cost:
    return cost_of("tiny", config_of(num_blocks), torch.float32, Layout(**layout), attribute, under_rules)


def test_operations_are_those_that_torch_counts_in_the_real_run():
    model = AutoModelForCausalLM.from_config(config_of(7)).eval().requires_grad_(False)
    # The attention of a CPU is one that torch's counter does not know, but it knows the products that it stands for:
    # those of the backward pass are one more, since the weights of attention are formed again there.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attribute(model)
    assert cost(7).operations == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "layout",
    [{}, {"gradient_checkpointing": True}, {"num_ranks": 4, "is_sharded": True}],
    ids=["plain", "checkpointing", "sharded"],
)
def test_two_shallow_models_tell_what_a_deep_one_costs(layout, monkeypatch):
    found = cost(7, **layout)
    monkeypatch.setattr(footprint, "DEPTHS", (8, 9))  # so that all seven blocks are measured
    whole = cost(7, **layout)
    assert (found.operations, found.weights) == (whole.operations, whole.weights)
    assert found.peak == pytest.approx(whole.peak, rel=0.001)


def test_checkpointing_and_shards_take_less_memory_and_no_fewer_operations():
    plain, checkpointed = cost(7), cost(7, gradient_checkpointing=True)
    sharded = cost(7, num_ranks=4, is_sharded=True)
    assert checkpointed.peak < plain.peak
    assert checkpointed.operations > plain.operations
    assert sharded.operations == plain.operations
    assert sharded.weights == pytest.approx(plain.weights / 4, rel=0.01)
    assert not torch.distributed.is_initialized()


def test_memory_is_that_of_the_tensors_that_live_at_a_time():
    with FakeTensorMode(), Meter() as meter:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        view = kept[:10]
        assert meter.now == view.untyped_storage().nbytes() == 4000
        del kept, view
        assert (meter.now, max(meter.peaks)) == (0, 6000)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_share_the_tokens_cost_what_those_of_a_real_run_do(kind):
    model = make_mixture(kind, torch.float32).eval().requires_grad_(False)
    open_experts_(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attribute(model)
    found = cost_of(kind, model.config, torch.float32, Layout(), attribute, under_rules)
    assert found.operations == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_mixture_that_is_sharded_holds_its_share_of_the_experts():
    config = make_mixture("mixtral").config
    plain, sharded = (
        cost_of("mixture", config, torch.float32, layout, attribute, under_rules)
        for layout in (Layout(), Layout(num_ranks=4, is_sharded=True))
    )
    assert sharded.weights == pytest.approx(plain.weights / 4, rel=0.01)
    assert sharded.operations == plain.operations


def test_experts_may_be_more_than_the_tokens_that_they_share():
    def forward(model: Any, meter: Meter | None = None) -> None:
        largest_logit(model, torch.zeros(2, 8, dtype=torch.long))

    model = make_mixture("qwen3_moe", torch.float32, num_experts=64, num_experts_per_tok=1).eval()
    open_experts_(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(model)
    found = cost_of("many", model.config, torch.float32, Layout(), forward)
    assert found.operations == pytest.approx(counter.get_total_flops(), rel=0.02)
