"""Configs and tokenizers that would not be loaded as they are: refused in one sentence, and no code of theirs runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config, is_one_sentence, load_float32
from helpers import WORDS, tokenizer_of

from sparc3_lightning.models.checkpoints import Checkpoint


def configure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(ask: Callable[[Checkpoint], Any], folder: Path) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        ask(Checkpoint(str(folder)))
    message = str(raised.value)
    assert is_one_sentence(message.replace(", ...", "")), message
    assert raised.value.__cause__ is None
    return message


HOSTILE: list[dict[str, Any]] = [
    {"hidden_size": "sixteen"},
    {"hidden_size": "16"},
    {"hidden_size": -16},
    {"hidden_size": 0},
    {"hidden_size": None},
    {"hidden_size": [16]},
    {"hidden_size": 10**30},
    {"intermediate_size": {}},
    {"num_attention_heads": 3},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": "two"},
    {"num_hidden_layers": 1_000_000},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 2.5},
    {"vocab_size": -1},
    {"vocab_size": "many"},
    {"hidden_act": "nonsense"},
    {"hidden_act": 7},
    {"rope_parameters": "nonsense"},
    {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}},
    {"max_position_embeddings": "long"},
    {"dtype": "nonsense"},
    {"model_type": ["llama"]},
    {"model_type": 7},
    {"model_type": None},
    {"model_type": "nonsense"},
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_a_config_of_wrong_types_or_sizes_is_one_sentence(changes: dict[str, Any], copied: Path) -> None:
    configure(copied, **changes)
    refusal(load_float32, copied)


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, "[" * 100_000, "[]", "3", '"llama"', "null", "", "{", '{"model_type": "llama"', "{}"]
)
def test_a_config_that_is_no_json_object_is_one_sentence(text: str, copied: Path) -> None:
    (copied / "config.json").write_text(text)
    for ask in (config, load_float32, Checkpoint.skeleton):
        refusal(ask, copied)


def test_a_config_in_another_encoding_is_one_sentence(copied: Path) -> None:
    (copied / "config.json").write_bytes("{}".encode("utf-16"))
    refusal(config, copied)


def test_layers_without_weights_are_counted_before_anything_is_built(copied: Path) -> None:
    configure(copied, num_hidden_layers=10**6)
    for ask in (Checkpoint.skeleton, load_float32):
        assert "says 1,000,000 layers, but its files hold 21 tensors: correct num_hidden_layers" in refusal(ask, copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a":' * 100_000, '{"eos_token_id": "</s>"}', '{"a": 1}{'])
def test_a_damaged_generation_config_is_one_sentence(text: str, copied: Path) -> None:
    (copied / "generation_config.json").write_text(text)
    assert "The generation_config.json of" in refusal(load_float32, copied)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn", 5])
def test_an_attention_of_another_package_is_refused_and_not_fetched(key: str, value: object, copied: Path) -> None:
    configure(copied, **{key: value})
    assert f"asks for the attention {value!r}" in refusal(config, copied)


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_an_attention_of_transformers_itself_is_taken(value: object, copied: Path) -> None:
    configure(copied, attn_implementation=value)
    load_float32(Checkpoint(str(copied)))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "made-up"},
        {"load_in_8bit": True},
        {},
        "int8",
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantized_checkpoint_is_refused_with_its_method_and_the_way_out(
    key: str, quantization: Any, copied: Path
) -> None:
    configure(copied, **{key: quantization})
    message = refusal(config, copied)
    if "quant_method" in quantization and key == "quantization_config":
        assert f"is quantized ({quantization['quant_method']})" in message
    assert refusal(load_float32, copied) == message


def test_an_entry_without_a_quantization_is_none(copied: Path) -> None:
    configure(copied, quantization_config=None)
    load_float32(Checkpoint(str(copied)))


def test_weight_files_of_the_configs_own_choice_are_refused(copied: Path) -> None:
    configure(copied, transformers_weights="other.safetensors")
    assert "names a weight file of its own (transformers_weights)" in refusal(config, copied)


# Code.

EVIL = """
from pathlib import Path
Path("sprung").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class EvilConfig(LlamaConfig):
    model_type = "evil"

class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}


@pytest.fixture
def evil(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with code beside it; whoever asks whether to run it fails."""

    def ask(*arguments: Any) -> str:
        pytest.fail("it was asked whether code may run")

    monkeypatch.setattr("builtins.input", ask)
    (copied / "evil.py").write_text(EVIL)
    return copied


@pytest.mark.parametrize("model_type", ["evil", "llama"])
@pytest.mark.parametrize("auto_map", [CODE, {"AutoConfig": CODE["AutoConfig"]}, "evil", ["evil.EvilConfig"]], ids=str)
def test_a_model_with_code_of_its_own_is_refused_at_once(model_type: str, auto_map: Any, evil: Path) -> None:
    configure(evil, model_type=model_type, auto_map=auto_map)
    for ask in (config, load_float32, Checkpoint.skeleton):
        refusal(ask, evil)
    assert not Path("sprung").exists()
    assert model_type == "evil" or "needs Python code of its own (auto_map in its config.json)" in refusal(config, evil)


def test_a_model_that_transformers_has_by_the_name_of_its_code_is_loaded_by_transformers(evil: Path) -> None:
    """As many a checkpoint of the hub, which came before transformers knew it."""
    code = {"AutoConfig": "configuration.LlamaConfig", "AutoModelForCausalLM": "org/name--modeling.LlamaForCausalLM"}
    configure(evil, auto_map=code)
    assert type(load_float32(Checkpoint(str(evil)))).__module__.startswith("transformers.")
    assert not Path("sprung").exists()


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["evil.EvilTokenizer", None]}, ["evil.EvilTokenizer", None]])
@pytest.mark.parametrize("tokenizer_class", ["EvilTokenizer", "PreTrainedTokenizerFast", None])
def test_a_tokenizer_with_code_of_its_own_is_refused_at_once(auto_map: Any, tokenizer_class: Any, evil: Path) -> None:
    configure(evil, "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer_class)
    message = refusal(Checkpoint.tokenizer, evil)
    assert "needs Python code of its own (auto_map in its tokenizer_config.json), which is never run" in message
    assert not Path("sprung").exists()


def test_code_that_would_draw_the_tokens_is_not_run(evil: Path) -> None:
    (evil / "custom_generate").mkdir()
    shutil.copy(evil / "evil.py", evil / "custom_generate" / "generate.py")
    load_float32(Checkpoint(str(evil)))
    assert not Path("sprung").exists()


# Tokenizers.


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1.0"}', '{"a":' * 100_000])
def test_a_damaged_tokenizer_is_one_sentence(text: str, copied: Path) -> None:
    (copied / "tokenizer.json").write_text(text)
    refusal(Checkpoint.tokenizer, copied)


def test_a_tokenizer_with_ids_for_which_there_is_no_embedding_is_refused(copied: Path) -> None:
    tokenizer_of([*WORDS, "more", "words"]).save_pretrained(copied)
    last = len(WORDS) + 5
    message = refusal(Checkpoint.tokenizer, copied)
    assert f"gives ids up to {last}, but the model has embeddings for {len(WORDS) + 4} tokens" in message


def test_tokens_that_were_added_need_no_embedding(copied: Path) -> None:
    tokenizer = tokenizer_of(WORDS)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copied)
    assert Checkpoint(str(copied)).tokenizer().pad_token_id == len(WORDS) + 4


def test_samples_of_another_tokenizer_are_refused_before_anything_is_loaded(copied: Path) -> None:
    from helpers import trainer

    from sparc3_lightning.data import ToxicPrompts
    from sparc3_lightning.stages.attribute import Attribution

    other = Path(shutil.copytree(copied, "other"))
    tokenizer_of([*WORDS, "words"]).save_pretrained(other)
    configure(other, vocab_size=len(WORDS) + 5)
    Path("prompts.jsonl").write_text(json.dumps({"text": f"{WORDS[0]} words {WORDS[1]}"}) + "\n")
    (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:-1])  # not looked at
    data = ToxicPrompts(source="prompts.jsonl", num_samples=1, tokenizer="./other", min_toxicity=None)
    with pytest.raises(ValueError, match=str(len(WORDS) + 4)):
        trainer().predict(Attribution(str(copied), "wanda"), datamodule=data, return_predictions=False)
