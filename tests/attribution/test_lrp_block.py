"""The block in which a model is under the rules: the logits are the same, the model is restored, what is refused."""

import copy
from typing import Any

import pytest
import torch
from slow_lrp import INPUT_IDS, all_families, all_rules, assert_same, gradients
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.models.sharding import checkpoint_blocks_


def logits(model: Any) -> Tensor:
    """Return all logits, without a graph."""
    with torch.no_grad():
        return model(INPUT_IDS).logits


@all_families
@all_rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.few(16)
def test_logits_are_the_same_with_and_without_the_rules(make, family, rule, dtype, implementation):
    model = make(family, dtype=dtype, attn_implementation=implementation)
    before = logits(model)
    with lrp(model, rule):
        inside = logits(model)
    assert before.dtype == dtype
    assert torch.equal(inside, before)


@all_families
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch_are_the_same_with_and_without_the_rules(make, family, implementation, side):
    # Not float64, where transformers' eager attention gives NaN for a row of padding alone.
    model = make(family, dtype=torch.float32, attn_implementation=implementation)
    input_ids = torch.cat([INPUT_IDS, INPUT_IDS.flip(1)])
    mask = torch.ones_like(input_ids)
    padding = slice(0, 3) if side == "left" else slice(-3, None)
    input_ids[1, padding], mask[1, padding] = 0, 0
    with torch.no_grad():
        before = model(input_ids, attention_mask=mask).logits
        with lrp(model):
            inside = model(input_ids, attention_mask=mask).logits
    assert before.isfinite().all()
    assert torch.equal(inside, before)


@all_families
@all_rules
def test_greedy_continuations_are_the_same_with_and_without_the_rules(make, family, rule):
    model = make(family)
    options: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    before = model.generate(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS), **options)
    with lrp(model, rule):
        inside = model.generate(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS), **options)
    assert before.shape[1] == INPUT_IDS.shape[1] + 10
    assert torch.equal(inside, before)


def _state(model: Any) -> list[Any]:
    """Return all that ``lrp`` may change: methods and hooks of the modules, the config, both registries."""
    methods = {name: {"forward", "_norm"} & module.__dict__.keys() for name, module in model.named_modules()}
    hooks = [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    registries = [dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)]
    return [methods, hooks, model.config.to_dict(), model.config._attn_implementation, *registries]


@all_families
@all_rules
def test_leaving_the_block_restores_the_model_bit_for_bit(make, family, rule):
    model = make(family)
    before, logits_before, gradients_before = _state(model), logits(model), gradients(model)
    with lrp(model, rule):
        assert _state(model) != before
        gradients(model)
    assert _state(model) == before
    assert torch.equal(logits(model), logits_before)
    assert_same(gradients(model), gradients_before, rtol=0)


@all_families
def test_an_exception_inside_the_block_restores_the_model_bit_for_bit(make, family):
    model = make(family)
    before, logits_before, gradients_before = _state(model), logits(model), gradients(model)
    with pytest.raises(ZeroDivisionError), lrp(model):  # noqa: PT012
        gradients(model)
        _ = 1 / 0
    assert _state(model) == before
    assert torch.equal(logits(model), logits_before)
    assert_same(gradients(model), gradients_before, rtol=0)


def test_a_forward_that_a_module_had_of_its_own_is_put_back(make):
    model = make()
    expected = gradients(model)["logit"]
    activation = model.model.layers[0].mlp.act_fn
    for module in (model, activation):
        own = module.forward
        module.forward = own
        with lrp(model):
            assert module.forward is not own
            assert torch.equal(gradients(model)["logit"], expected)
        assert module.__dict__["forward"] is own


@all_families
def test_the_block_can_be_entered_again_and_with_another_rule(make, family):
    model = make(family)
    found = []
    for rule in ("attnlrp", "cp_lrp", "attnlrp"):
        with lrp(model, rule):
            found.append(gradients(model))
    assert_same(found[2], found[0], rtol=0)
    assert not torch.equal(found[1]["d embeddings"], found[0]["d embeddings"])


@all_families
def test_the_rules_of_one_model_leave_another_of_its_class_alone(make, family):
    model, other = make(family), make(family, seed=1)
    before, gradients_before = _state(other)[:4], gradients(other)
    with lrp(model):
        assert _state(other)[:4] == before
        assert_same(gradients(other), gradients_before, rtol=0)
        twin = copy.deepcopy(other)
        assert_same(gradients(twin), gradients_before, rtol=0)


def test_two_models_of_one_class_can_be_under_the_rules_at_once(make):
    model, other = make(), make(seed=1)
    with lrp(model):
        expected = gradients(model)
    with lrp(other):
        expected_of_other = gradients(other)
    with lrp(model):
        with lrp(other):
            assert_same(gradients(model), expected, rtol=0)
            assert_same(gradients(other), expected_of_other, rtol=0)
        assert_same(gradients(model), expected, rtol=0)


def _assert_refused(model: Any, match: str, rule: Any = "attnlrp") -> None:
    """Assert that the rules are refused with a message, and nothing is changed."""
    before = _state(model)
    with pytest.raises(ValueError, match=match), lrp(model, rule):
        pytest.fail("the block was entered")
    assert _state(model) == before


def test_float16_is_refused(make):
    _assert_refused(make(dtype=torch.float16), "float16.*--model.dtype")


def test_training_mode_is_refused(make):
    _assert_refused(make().train(), r"model\.eval\(\)")


def test_applying_the_rules_twice_is_refused_and_leaves_the_first_in_place(make):
    model = make()
    with lrp(model):
        expected = gradients(model)
        _assert_refused(model, "does not nest")
        _assert_refused(model, "does not nest", rule="cp_lrp")
        assert_same(gradients(model), expected, rtol=0)


def test_an_unknown_rule_is_refused_and_the_known_ones_are_named(make):
    _assert_refused(make(), "'gradient'.*'attnlrp'.*'cp_lrp'", rule="gradient")


def test_an_operation_without_a_rule_is_refused_by_name_and_the_model_restored(make):
    model = make()
    model.model.layers[1].mlp.act_fn = nn.GLU()
    model.model.layers[1].mlp.down_proj = nn.Linear(12, 16).double()
    model.model.layers[1].mlp.up_proj = nn.Linear(16, 12).double()
    before = _state(model)
    with pytest.raises(ValueError, match=r"no LRP rule for the operation glu.*--model\.method"), lrp(model):
        gradients(model)
    assert _state(model) == before


def test_a_compiled_and_a_scripted_part_are_refused_by_name(make):
    model = make()
    model.model.layers[1].mlp._compiled_call_impl = lambda x: x
    _assert_refused(model, r"model\.layers\.1\.mlp is compiled")
    model = make()
    model.model.layers[0].mlp.act_fn = torch.jit.trace(nn.SiLU(), torch.ones(1))
    _assert_refused(model, r"model\.layers\.0\.mlp\.act_fn is compiled")


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [("is_encoder_decoder", True, "an encoder"), ("quantization_config", {"bits": 4}, "quantized weights")],
)
def test_models_of_other_kinds_are_refused(make, option, value, match):
    model = make()
    setattr(model.config, option, value)
    _assert_refused(model, match)


def test_a_copy_made_inside_the_block_is_one_of_the_model(make):
    model = make()
    with lrp(model):
        expected = gradients(model)
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert_same(gradients(twin), expected, rtol=0)


def test_what_is_done_with_the_logits_has_the_plain_gradient(make):
    model = make()
    with lrp(model):
        logits = model(INPUT_IDS).logits.detach().requires_grad_()
        (torch.softmax(logits, dim=-1) * logits.exp() / logits.sigmoid()).sum().backward()
    other = logits.detach().requires_grad_()
    (torch.softmax(other, dim=-1) * other.exp() / other.sigmoid()).sum().backward()
    assert torch.equal(logits.grad, other.grad)


@all_rules
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_that_are_computed_again_have_the_same_gradients(make, family, rule):
    model, again = make(family), make(family)
    checkpoint_blocks_(again)
    with lrp(model, rule):
        expected = gradients(model)
    with lrp(again, rule):
        assert_same(gradients(again), expected, rtol=0)
