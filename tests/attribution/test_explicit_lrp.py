"""Scores of neurons, inside experts too, against relevance that is passed back by hand, without autograd."""

from typing import Any

import pytest
import torch
from explicit_lrp import FAMILIES, ExplicitDecoder
from slow_lrp import all_rules
from some_decoders import make_decoder
from torch import Tensor

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import Rule, lrp
from sparc3_lightning.attribution.spec import Score
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.models.experts import open_experts_

SAMPLES = [[5, 17, 42, 8, 39, 23, 1], [11, 2, 58, 30, 7]]
SCORES: tuple[Score, ...] = ("signed", "magnitude")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What the decoders have beside the sizes, so that each part of them matters.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {"head_dim": 4}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0}),
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
    "qwen3_moe": ("qwen3_moe", {"num_experts": 16}),
    "qwen3_moe with weights that sum to 1": ("qwen3_moe", {"norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": ROPE, "swiglu_limit": 1.0}),
}
NONE_BY_CP_LRP = ("q_proj", "k_proj", "gate_proj")
all_cases = pytest.mark.parametrize("case", CASES)


def explicit(model: Any, rule: str) -> list[ExplicitDecoder]:
    """Return the model written out, for each sample, with relevance."""
    decoders = [ExplicitDecoder(model, rule, torch.tensor(sample)) for sample in SAMPLES]
    for decoder in decoders:
        decoder.propagate()
    return decoders


def scores(model: Any, rule: Rule, score: Score, names: list[str]) -> dict[str, Tensor]:
    """Return what the package computes, of all samples at once."""
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(sample) for sample in SAMPLES], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s), dtype=torch.long) for s in SAMPLES], batch_first=True)
    accumulator = ScoreAccumulator({name: model.get_submodule(name) for name in names}, score)
    with lrp(model, rule), accumulator.recording(mask, ["a", "b"]):
        largest_logit(model, input_ids, mask).sum().backward()
    return accumulator.compute()


@all_cases
@pytest.mark.usefixtures("in_float64")
def test_the_model_written_out_gives_the_same_logits(case):
    family, changes = CASES[case]
    model = make_decoder(family, **changes)
    for sample in SAMPLES:
        input_ids = torch.tensor(sample)
        with torch.no_grad():
            expected = model(input_ids[None], use_cache=False).logits[0]
        got = ExplicitDecoder(model, "attnlrp", input_ids).logits.x
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@all_cases
@all_rules
@pytest.mark.usefixtures("in_float64")
def test_scores_are_those_of_relevance_passed_back_by_hand(case, rule):
    family, changes = CASES[case]
    model = make_decoder(family, **changes)
    open_experts_(model)
    decoders = explicit(model, rule)
    without = NONE_BY_CP_LRP if rule == "cp_lrp" else ()
    names = [name for name in decoders[0].layers if name.rpartition(".")[2] not in without]
    for score in SCORES:
        got = scores(model, rule, score, names)
        for name in names:
            expected = sum(getattr(decoder.layers[name], score)() for decoder in decoders) / len(SAMPLES)
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                got[name], expected, rtol=1e-6, atol=1e-9 * scale, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_each_family_that_is_written_out_is_compared():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)
