"""What a GGUF file says about its model comes out, or the file is refused by the name of what would be lost."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import is_one_sentence
from gguf_files import INPUT_IDS, tiny, write

from sparc3_lightning.models.checkpoints import Checkpoint

ROPE = {"rope_theta": 10000.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check_same(path: Path, expected: Any) -> Any:
    """Check that the model of a file gives the logits of another one, and return its config."""
    model = Checkpoint(str(path)).load(torch.float32)
    torch.testing.assert_close(model(INPUT_IDS).logits, expected(INPUT_IDS).logits, rtol=1e-5, atol=1e-5)
    return model.config


def refused(path: Path, cache: Path) -> str:
    """Return the one sentence with which a file is refused; nothing is kept of it."""
    with pytest.raises(ValueError, match=r": use the original checkpoint") as error:
        _ = Checkpoint(str(path)).location
    assert is_one_sentence(str(error.value).replace(str(path), "")), error.value
    assert not (cache / "gguf").exists() or list((cache / "gguf").iterdir()) == []
    return str(error.value)


def stretched(factor: float, low: float, high: float, context: int, theta: float, num_turned: int) -> np.ndarray:
    """Return the factors that llama.cpp's converter writes for LLaMA 3.1, shape ``[num_turned / 2]``."""
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, num_turned, 2, dtype=torch.float32) / num_turned)):
        wavelength = 2 * torch.pi / float(frequency)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("gpt2", True)]
)
@pytest.mark.few(2)
def test_a_model_of_a_family_comes_out_as_it_is(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    config = check_same(write(tmp_path / "a.gguf", model), model)
    assert config.tie_word_embeddings == tied


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"type": "none", "factor": 4.0}, {}),
        ({"type": "linear", "factor": 1.0, "finetuned": True}, {}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        ),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 1.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
    ],
)
@pytest.mark.few(2)
def test_scaled_positions_are_carried_over(
    family: str, metadata: dict[str, Any], scaling: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(family, max_position_embeddings=256, rope_parameters=ROPE | {"rope_type": "default"} | scaling)
    path = write(tmp_path / "a.gguf", model, {f"{family}.rope.scaling.{key}": it for key, it in metadata.items()})
    config = check_same(path, model)
    assert config.rope_parameters["rope_type"] == scaling.get("rope_type", "default")


def test_a_linear_scale_of_the_old_kind_is_carried_over(tmp_path: Path) -> None:
    model = tiny(rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0})
    check_same(write(tmp_path / "a.gguf", model, {"llama.rope.scale_linear": 4.0}), model)


@pytest.mark.parametrize("head", [8, 64])
@pytest.mark.parametrize(
    ("factor", "low", "high", "context", "theta"),
    [(32.0, 1.0, 4.0, 8192, 500000.0), (8.0, 1.0, 4.0, 8192, 10000.0), (2.5, 1.0, 4.0, 64, 10000.0)],
)
@pytest.mark.few(2)
def test_the_factors_of_llama_3_1_become_its_rope_parameters(
    head: int, factor: float, low: float, high: float, context: int, theta: float, tmp_path: Path
) -> None:
    said = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling = {"rope_theta": theta, "rope_type": "llama3", "original_max_position_embeddings": context, **said}
    model = tiny(head_dim=head, max_position_embeddings=1 << 14, rope_parameters=scaling)
    factors = stretched(factor, low, high, context, theta, head)
    assert not np.all(factors == 1.0)
    config = check_same(write(tmp_path / "a.gguf", model, tensors={"rope_freqs.weight": factors}), model)
    assert config.rope_parameters["rope_type"] == "llama3"
    if head == 64:  # narrow heads have too few wavelengths to tell one set of parameters from another
        assert config.rope_parameters == scaling


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    model = tiny()
    config = check_same(write(tmp_path / "a.gguf", model, tensors={"rope_freqs.weight": np.ones(4, "f4")}), model)
    assert config.rope_parameters == ROPE | {"rope_type": "default"}


@pytest.mark.parametrize(
    "factors",
    [
        np.array([1.0, 7.0, 2.0, 3.0], "f4"),
        np.array([8.0, 1.0, 1.0, 1.0], "f4"),
        np.array([1.0, -1.0, 0.0, np.nan], "f4"),
        np.ones(3, "f4"),
        np.ones(4, "f2"),
    ],
)
def test_other_factors_are_refused(factors: np.ndarray, cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny(), tensors={"rope_freqs.weight": factors})
    assert "rope_freqs.weight" in refused(path, cache)


def test_factors_of_other_limits_than_those_of_llama_3_1_are_refused(cache: Path, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": stretched(8.0, 1.0, 16.0, 8192, 10000.0, 64)}
    assert "not those of LLaMA 3.1" in refused(write(tmp_path / "a.gguf", tiny(head_dim=64), tensors=factors), cache)


def test_factors_and_a_scale_together_are_refused(cache: Path, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": stretched(8.0, 1.0, 4.0, 8192, 500000.0, 8)}
    model = tiny(rope_parameters=ROPE | {"rope_theta": 500000.0, "rope_type": "default"})
    path = write(tmp_path / "a.gguf", model, {"llama.rope.scaling.factor": 2.0}, factors)
    assert "rope_freqs.weight" in refused(path, cache)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases_of_the_attention_and_the_mlp_are_carried_over(family: str, tmp_path: Path) -> None:
    biases = {"attention_bias": True} | ({"mlp_bias": True} if family == "llama" else {})
    model = tiny(family, **biases)
    config = check_same(write(tmp_path / "a.gguf", model), model)
    assert config.attention_bias


@pytest.mark.parametrize(
    ("family", "changes", "tensors", "message"),
    [
        (
            "llama",
            {"attention_bias": True},
            {"blk.1.attn_output.bias": None},
            r"lacks .*blk\.1\.attn_output\.bias, 1 in",
        ),
        ("llama", {}, {"blk.1.attn_q.bias": np.ones(32, "f4")}, r"no place for \(blk\.1\.attn_q\.bias, 1 in all"),
        ("qwen2", {}, {"blk.0.attn_output.bias": np.ones(32, "f4")}, r"no place for \(blk\.0\.attn_output\.bias, 1 in"),
        (
            "qwen2",
            {},
            {"blk.0.attn_q.bias": None, "blk.1.attn_q.bias": None},
            r"lacks .*blk\.0\.attn_q\.bias, 2 in all",
        ),
        ("llama", {}, {"blk.1.ffn_up.weight": None}, r"lacks .*blk\.1\.ffn_up\.weight"),
        ("llama", {}, {"blk.0.ffn_gate_exps.weight": np.ones((4, 64, 32), "f4")}, r"blk\.0\.ffn_gate_exps\.weight"),
        ("llama", {}, {"blk.0.attn_q_norm.weight": np.ones(8, "f4")}, r"blk\.0\.attn_q_norm\.weight"),
        ("llama", {}, {"rope_factors_long.weight": np.ones(4, "f4")}, r"rope_factors_long\.weight"),
        ("qwen2", {}, {"blk.2.nextn.eh_proj.weight": np.ones((32, 64), "f4")}, r"blk\.2\.nextn\.eh_proj\.weight"),
        ("llama", {}, {"blk.0.ffn_up.weight": np.ones((32, 64), "f4")}, r"ffn_up|up_proj|mismatch"),
        ("llama", {}, {"token_embd.weight": np.ones((301, 32), "f4")}, r"numbers in its tensors"),
    ],
)
@pytest.mark.few(4)
def test_tensors_without_a_place_and_places_without_a_tensor_are_refused(
    family: str, changes: dict[str, Any], tensors: dict[str, Any], message: str, cache: Path, tmp_path: Path
) -> None:
    assert re.search(message, refused(write(tmp_path / "a.gguf", tiny(family, **changes), tensors=tensors), cache))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.logit_scale", 0.0625),
        ("llama.residual_scale", 0.22),
        ("llama.embedding_scale", 12.0),
        ("llama.attention.scale", 0.1),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.causal", False),
        ("llama.attention.sliding_window", 16),
        ("llama.attention.value_length", 4),
        ("llama.attention.key_length", 16),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.attention.head_count_kv", [2, 4]),
        ("llama.feed_forward_length", [64, 32]),
        ("llama.expert_count", 8),
        ("llama.rope.dimension_count", 4),
        ("llama.rope.freq_base_swa", 500.0),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.attn_factor", 1.19),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.tensor_data_layout", "reference"),
        ("llama.something_new", 1),
        ("llama.something_new", "a"),
        ("llama.block_count", 1_000_000),
        ("llama.block_count", 3),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 3),
        ("llama.embedding_length", 1 << 31),
        ("llama.vocab_size", 299),
        ("llama.attention.layer_norm_rms_epsilon", "small"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.context_length", None),
        ("llama.rope.scaling.factor", float("inf")),
        ("llama.vocab_size", 0.5),
        ("llama.rope.freq_base", "large"),
    ],
)
@pytest.mark.few(12)
def test_what_a_config_cannot_say_is_refused(key: str, value: Any, cache: Path, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.gguf", tiny(), {key: value}), cache)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.causal", True),
        ("llama.attention.sliding_window", 64),
        ("llama.attention.key_length", 8),
        ("llama.attention.value_length", 8),
        ("llama.expert_count", 0),
        ("llama.expert_used_count", 0),
        ("llama.vocab_size", None),
        ("llama.rope.freq_base", None),
        ("llama.rope.dimension_count", None),
        ("llama.tensor_data_layout", "Meta AI original pth"),
        ("general.name", None),
        ("general.type", None),
        ("quantize.imatrix.entries_count", 224),
        ("other.thing", 1),
    ],
)
@pytest.mark.few(2)
def test_what_changes_nothing_is_let_in(key: str, value: Any, tmp_path: Path) -> None:
    model = tiny()
    check_same(write(tmp_path / "a.gguf", model, {key: value}), model)


def test_numbers_that_transformers_passes_over_are_carried_over(tmp_path: Path) -> None:
    model = tiny("qwen3", head_dim=12, num_key_value_heads=4, rms_norm_eps=0.01, max_position_embeddings=96)
    path = write(tmp_path / "a.gguf", model, {"qwen3.attention.head_count_kv": None})
    config = check_same(path, model)
    assert (config.head_dim, config.num_key_value_heads, config.max_position_embeddings) == (12, 4, 96)
    gpt2 = tiny("gpt2", max_position_embeddings=48, layer_norm_epsilon=1e-5)
    assert check_same(write(tmp_path / "b.gguf", gpt2), gpt2).n_positions == 48


def test_windows_and_angles_that_transformers_passes_over_are_carried_over(tmp_path: Path) -> None:
    phi3 = tiny("phi3", sliding_window=4)
    assert check_same(write(tmp_path / "c.gguf", phi3, {"phi3.attention.sliding_window": 4}), phi3).sliding_window == 4
    starcoder2 = tiny("starcoder2", rope_parameters={"rope_type": "default", "rope_theta": 99999.0})
    check_same(write(tmp_path / "d.gguf", starcoder2), starcoder2)


def test_yarn_is_refused_where_a_config_would_read_it_as_something_else(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny("phi3"), {"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.factor": 4.0})
    assert "'yarn', which phi3 cannot" in refused(path, cache)


@pytest.mark.parametrize("factor", [None, 8.0])
def test_gemma_3_scales_the_positions_of_its_full_attention_only(factor: float | None, tmp_path: Path) -> None:
    full = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    parameters = {"full_attention": full | {"rope_theta": 1e6}, "sliding_attention": local}
    sizes = {"head_dim": 256, "num_hidden_layers": 6, "sliding_window": 4}
    model = tiny("gemma3_text", rope_parameters=parameters, **sizes)
    scaling = {"type": "linear", "factor": factor} if factor else {}
    path = write(tmp_path / "a.gguf", model, {f"gemma3.rope.scaling.{key}": value for key, value in scaling.items()})
    config = check_same(path, model)
    assert config.rope_parameters == parameters
    assert config.sliding_window == 4


def test_gemma_3_slides_where_the_pattern_says(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"] * 2
    model = tiny("gemma3_text", head_dim=256, num_hidden_layers=4, sliding_window=4, layer_types=types)
    for pattern in (2, [True, False, True, False]):
        path = write(tmp_path / "a.gguf", model, {"gemma3.attention.sliding_window_pattern": pattern})
        assert check_same(path, model).layer_types == types


def test_gemma_3_with_heads_of_another_width_than_its_attention_is_divided_by_is_refused(
    cache: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.gguf", tiny("gemma3_text", head_dim=8, num_hidden_layers=6))
    assert "heads of width 8" in refused(path, cache)


@pytest.mark.parametrize(
    ("metadata", "adds"),
    [
        ({}, (False, False)),
        ({"add_bos_token": False, "add_eos_token": False}, (False, False)),
        ({"add_bos_token": True}, (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"pre": "llama-bpe"}, (True, False)),
        ({"pre": "llama-bpe", "add_bos_token": False}, (False, False)),
    ],
)
@pytest.mark.few(2)
def test_a_text_begins_and_ends_as_the_file_says(
    metadata: dict[str, Any], adds: tuple[bool, bool], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.gguf", tiny(), {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    ids = Checkpoint(str(path)).tokenizer()("the dog")["input_ids"]
    assert (ids[0] == 1, ids[-1] == 2) == adds


@pytest.mark.parametrize(("key", "name"), [("bos", "bos"), ("eos", "eos"), ("padding", "pad")])
def test_special_tokens_are_those_of_the_file(key: str, name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(write(tmp_path / "a.gguf", tiny(), {f"tokenizer.ggml.{key}_token_id": 3})))
    assert getattr(checkpoint.tokenizer(), f"{name}_token_id") == 3
    assert getattr(checkpoint.config, f"{name}_token_id") == 3


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.eos_token_id": 300},
        {
            "tokenizer.ggml.tokens": ["a", "a", "b"],
            "tokenizer.ggml.token_type": [1, 1, 1],
            "tokenizer.ggml.merges": [""],
        },
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.merges": ["th e q"]},
        {"tokenizer.chat_template": 7},
        {"tokenizer.ggml.model": "rwkv"},
    ],
)
def test_a_tokenizer_that_does_not_come_out_is_refused(metadata: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.gguf", tiny(), metadata), cache)
