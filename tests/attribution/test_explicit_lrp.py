"""Scores of neurons, inside experts too, against relevance that is passed back by hand, without autograd."""

from typing import Any

import pytest
import torch
from decoders import build
from explicit_lrp import FAMILIES, ExplicitDecoder
from slow_lrp import all_rules
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.lrp_check import check_lrp
from sparc3_lightning.attribution.rules import Rule
from sparc3_lightning.attribution.spec import Score
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.models.experts import open_experts_

pytestmark = pytest.mark.slow  # all of them together
SAMPLES = [[5, 17, 42, 8, 39, 23, 1], [11, 2, 58, 30, 7]]
SCORES: tuple[Score, ...] = ("signed", "magnitude")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What the decoders have beside the sizes, so that each part of them matters.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {}),
    # The factor of its embeddings, the root of the size, is kept in float32, where that of 64 is exact.
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "hidden_size": 64, "head_dim": 16}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"attention_multiplier": 0.7, "embedding_multiplier": 3.0}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "gpt_neox one after the other": (
        "gpt_neox",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "use_parallel_residual": False},
    ),
    "bloom": ("bloom", {}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6}),
    "qwen3_moe with weights that sum to 1": ("qwen3_moe", {"norm_topk_prob": True}),
    "minimax_m2": ("minimax_m2", {}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": ROPE, "swiglu_limit": 1.0}),
}
NONE_BY_CP_LRP = ("q_proj", "k_proj", "gate_proj")
SDPA = ("mistral", "qwen2", "gpt_neox", "gpt2", "mixtral")  # of the others attention is no different
all_cases = pytest.mark.parametrize("case", CASES)


def explicit(model: Any, rule: str) -> list[ExplicitDecoder]:
    """Return the model written out, for each sample, with the relevance of the largest logit."""
    decoders = [ExplicitDecoder(model, rule, rule, torch.tensor(sample)) for sample in SAMPLES]
    for decoder in decoders:
        decoder.propagate(int(decoder.logits.x[-1].argmax()))
    return decoders


def computed(model: Any, rule: Rule, names: list[str]) -> list[dict[str, Tensor]]:
    """Return what the package computes for each of ``SCORES``, of all samples at once."""
    input_ids = pad_sequence([torch.tensor(sample) for sample in SAMPLES], batch_first=True)
    mask = pad_sequence([torch.ones(len(sample), dtype=torch.long) for sample in SAMPLES], batch_first=True)
    layers = {name: model.get_submodule(name) for name in names}
    signed, magnitude = (ScoreAccumulator(layers, score) for score in SCORES)
    with lrp(model, rule), signed.recording(mask, ["a", "b"]), magnitude.recording(mask, ["a", "b"]):
        largest_logit(model, input_ids, mask).sum().backward()
    return [signed.compute(), magnitude.compute()]


@all_cases
@pytest.mark.usefixtures("in_float64")
def test_the_model_written_out_gives_the_same_logits(case):
    family, changes = CASES[case]
    model = build(family, torch.float64, "eager", **changes)
    for sample in SAMPLES:
        input_ids = torch.tensor(sample)
        with torch.no_grad():
            expected = model(input_ids[None], use_cache=False).logits[0]
        got = ExplicitDecoder(model, "attnlrp", "attnlrp", input_ids).logits.x
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("case", "attention"), [*((case, "eager") for case in CASES), *((case, "sdpa") for case in SDPA)]
)
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_scores_are_those_of_relevance_passed_back_by_hand(case, attention, rule):
    family, changes = CASES[case]
    model = build(family, torch.float64, attention, **changes)
    open_experts_(model)
    decoders = explicit(model, rule)
    names = [name for name in decoders[0].layers if rule == "attnlrp" or not name.endswith(NONE_BY_CP_LRP)]
    for name in decoders[0].layers.keys() - names:
        assert not any(decoder.layers[name].out.m.any() for decoder in decoders)
    for score, got in zip(SCORES, computed(model, rule, names), strict=True):
        for name in names:
            expected = sum(getattr(decoder.layers[name], score)() for decoder in decoders) / len(SAMPLES)
            atol = 1e-9 * expected.abs().max().item()
            torch.testing.assert_close(
                got[name], expected, rtol=1e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


@all_cases
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_the_check_finds_what_arrives_at_tokens_and_constants_by_hand(case, rule):
    family, changes = CASES[case]
    model = build(family, torch.float64, "eager", **changes)
    decoder = ExplicitDecoder(model, "cp_lrp", rule, torch.tensor(SAMPLES[0]))
    token = int(decoder.logits.x[-1].abs().argmax())
    decoder.propagate(token)
    last = next(name for name in reversed(decoder.layers) if ".experts." not in name)
    check = check_lrp(model, rule, {last: model.get_submodule(last)}, torch.tensor(SAMPLES[:1]))
    logit = decoder.logits.x[-1, token].item()
    assert check.conserved == pytest.approx(decoder.on_tokens() / logit, rel=1e-6)
    assert check.kept == pytest.approx(decoder.kept() / logit, rel=1e-6, abs=1e-9)


def test_among_the_experts_are_some_that_see_no_token():
    family, changes = CASES["qwen3_moe"]
    decoders = explicit(build(family, torch.float64, "eager", **changes), "attnlrp")
    experts = [name for name in decoders[0].layers if name.endswith("up_proj")]
    rows = [sum(len(decoder.layers[name].out.x) for decoder in decoders) for name in experts]
    assert 0 in rows
    assert max(rows) > 1


def test_each_family_that_is_written_out_is_compared():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)
