"""GGUF files as checkpoints: loaded, dequantized once, and refused where they are damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INPUT_IDS, NEURONS
from helpers import WORDS, make_config

from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.export import export_pruned

LLAMA_CPP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A tiny LLaMA of 8-bit weights as a GGUF file in llama.cpp's conventions, the same in torch, and its tokenizer."""
    import gguf
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaForCausalLM

    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    bpe.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=300, special_tokens=special, show_progress=False)
    bpe_state = json.loads(bpe.to_str())["model"]
    vocabulary = sorted(bpe_state["vocab"], key=bpe_state["vocab"].get)

    torch.manual_seed(0)
    config = make_config("llama", hidden_size=32, intermediate_size=64, vocab_size=len(vocabulary))
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(special) + [1] * (len(vocabulary) - len(special)))
    merges = bpe_state["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    quantized = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
        theirs = name
        for old, new in LLAMA_CPP_NAMES.items():
            theirs = theirs.replace(old, new)
        if parameter.dim() == 1:
            writer.add_tensor(theirs, parameter.numpy())
            continue
        blocks = gguf.quants.quantize(parameter.numpy(), quantized)
        weight = gguf.quants.dequantize(blocks, quantized)
        parameter.copy_(torch.from_numpy(weight))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp pairs neighbours for the rotation, transformers the halves of a head
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(theirs, gguf.quants.quantize(weight, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model, bpe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_loaded_as_float32_with_its_weights_and_its_tokenizer(
    gguf_model: tuple[Path, Any, Any], cache: Path
) -> None:
    path, expected, bpe = gguf_model
    model = load_model(str(path), torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    torch.testing.assert_close(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)
    tokenizer = Checkpoint(str(path)).tokenizer()
    text = "the stupid dog, 2 cats"
    assert tokenizer(text)["input_ids"] == bpe.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_gguf_file_is_dequantized_once(
    gguf_model: tuple[Path, Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers

    folder = Path(Checkpoint(str(gguf_model[0])).location)
    assert folder.parent == cache / "gguf"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "a temporary folder was left behind"
    assert folder.stat().st_mode & 0o777 == 0o755

    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_but_no_gguf(*arguments: Any, **options: Any) -> Any:
        assert "gguf_file" not in options, "dequantized again"
        return load(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_but_no_gguf)
    load_model(str(gguf_model[0]), torch.float32)
    elsewhere = shutil.copy(gguf_model[0], tmp_path / "renamed.gguf")
    assert Checkpoint(str(elsewhere)).location == str(folder)


def test_a_model_from_a_gguf_file_can_be_saved_fingerprinted_and_exported(
    gguf_model: tuple[Path, Any, Any], cache: Path, tmp_path: Path
) -> None:
    path = str(gguf_model[0])
    load_model(path, torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved"), torch.bfloat16).dtype == torch.bfloat16
    export_pruned(Checkpoint(path), NEURONS, tmp_path / "pruned", dtype=torch.float32)
    assert (
        Checkpoint(path).fingerprint
        == Checkpoint(Checkpoint(path).location).fingerprint
        != Checkpoint(str(tmp_path / "pruned")).fingerprint
    )


@pytest.mark.parametrize("kept", [0, 10, 1000, -1000])
def test_a_truncated_gguf_file_is_a_clear_error_and_leaves_nothing(
    kept: int, gguf_model: tuple[Path, Any, Any], cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_model[0].read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut.gguf is truncated, or not a GGUF file"):
        _ = Checkpoint("./cut.gguf").location
    assert list((cache / "gguf").iterdir()) == []


def test_a_foreign_file_with_the_ending_gguf_is_a_clear_error(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.gguf").write_text("plain text, and long enough for a header " * 10)
    with pytest.raises(ValueError, match=r"foreign.gguf is truncated, or not a GGUF file"):
        _ = Checkpoint("foreign.gguf").config
