"""The check of the rules on the model itself: what it measures, and what it refuses."""

import re

import pytest
import torch
from slow_lrp import INPUT_IDS, gradients, positions_of
from torch import nn

from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.lrp_check import LrpCheck, NonfiniteLogitsError, check_lrp
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.sharding import checkpoint_blocks_

LINE = "LRP: logits unchanged; 100.0 % of the relevance conserved under CP attention; 2 of 2 layers reached"


class Fused(torch.autograd.Function):
    """A kernel of a package that is not seen."""

    @staticmethod
    def forward(ctx, x):
        return torch.nn.functional.silu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Kernel(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return Fused.apply(self.layer(x))


def check(model, rule="attnlrp", layers=("up_proj",)):
    return check_lrp(model, rule, find_layers(model, layers), INPUT_IDS)


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_llama_conserves_all(make, rule, dtype):
    found = check(make(dtype=dtype), rule)
    assert found.logits_unchanged
    assert found.conserved == pytest.approx(1, abs=0.05 if dtype is torch.bfloat16 else 1e-5)
    assert found.kept == 0
    if dtype is not torch.bfloat16:
        assert str(found) == LINE


def test_the_line_names_what_constants_keep():
    found = LrpCheck(True, 0.7174, 0.2826, 2, 2)
    assert "71.7 % of the relevance conserved under CP attention, 28.3 % kept by biases and other const" in str(found)


@pytest.mark.parametrize("options", [{"family": "gpt2"}, {"family": "opt"}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.usefixtures("in_float64")
def test_what_biases_and_positions_keep_is_their_gradient_times_them(make, options):
    model = make(**options)
    found = check(model, layers=["all"])
    constants = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    if (positions := positions_of(model)) is not None:
        constants.append(positions.weight)
    for constant in constants:
        constant.requires_grad_()
    with lrp(model, "cp_lrp"):
        logits = model(INPUT_IDS).logits[0, -1]
    target = logits[logits.abs().argmax()]
    of_each = torch.autograd.grad(target, constants, allow_unused=True)
    on_constants = sum((c * g).sum().item() for c, g in zip(constants, of_each, strict=True) if g is not None)
    assert abs(found.kept) > 1e-3
    assert found.conserved + found.kept == pytest.approx(1, rel=1e-6)
    if options.get("family"):  # of LLaMA the check has the gates of AttnLRP
        assert found.kept == pytest.approx(on_constants / target.item(), rel=1e-6)


def test_the_model_is_as_before_and_so_are_its_gradients(make):
    model = make()
    before = gradients(model)
    check(model)
    assert all(torch.equal(value, before[name]) for name, value in gradients(model).items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_blocks_that_are_computed_again_pass_the_check(make):
    model = make()
    checkpoint_blocks_(model)
    assert str(check(model)) == LINE


def test_a_fused_kernel_is_refused_by_name(make):
    model = make()
    model.model.layers[1].mlp.up_proj = Kernel(model.model.layers[1].mlp.up_proj)
    with pytest.raises(OptionError, match=r"method lrp cannot look into .*\.Fused, .*'llama'.*--model.method gradient"):
        check(model, layers=["down_proj"])


def test_a_custom_operation_of_another_package_is_refused_by_name(make):
    @torch.library.custom_op("other::silu", mutates_args=())
    def silu(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x)

    silu.register_autograd(lambda ctx, gradient: gradient)
    model = make()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: silu(output))
    with pytest.raises(OptionError, match="lrp cannot look into other_silu"):
        check(model, layers=["down_proj"])


def test_an_operation_whose_rule_is_not_right_is_refused_with_what_is_conserved(make):
    model = make()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.cosh() - 1)
    with pytest.raises(OptionError, match=r"lrp conserves \d.* of the target logit of 'llama'.*not within 1 %"):
        check(model)


def test_logits_that_change_are_refused(make):
    model = make()

    def drift(module, inputs, output):
        return output * (1 + 1e-9) if "forward" in vars(model) else output

    model.lm_head.register_forward_hook(drift)
    with pytest.raises(OptionError, match=r"method lrp changes the logits of 'llama' by \d"):
        check(model)


@pytest.mark.parametrize(
    ("rule", "layers", "match"),
    [
        ("cp_lrp", ["gate_proj", "up_proj"], "without gate_proj, or --model.rule attnlrp"),
        ("cp_lrp", ["q_proj"], "--model.rule cp_lrp passes no relevance through model.layers.0.self_attn.q_proj"),
        ("attnlrp", ["up_proj"], r"attnlrp passes no relevance through model.layers.1.mlp.up_proj"),
    ],
)
def test_layers_at_which_no_relevance_arrives_are_refused_by_name(make, rule, layers, match):
    model = make()
    if rule == "attnlrp":
        model.model.layers[1].mlp.down_proj.weight.data.zero_()
    with pytest.raises(OptionError, match=match):
        check(model, rule, layers)


def test_logits_that_differ_from_pass_to_pass_may_differ_under_the_rules_too(make):
    model, draw = make(dtype=torch.float32), torch.Generator().manual_seed(0)
    model.lm_head.register_forward_hook(lambda *of: of[2] * (1 + 1e-7 * torch.rand(of[2].shape, generator=draw)))
    assert check(model).logits_unchanged


def test_a_sample_without_logits_shows_nothing(make):
    model = make()
    model.get_input_embeddings().weight.data[INPUT_IDS[0, 2]] = torch.nan
    with pytest.raises(NonfiniteLogitsError, match=re.escape("NaN or infinite")):
        check(model)
