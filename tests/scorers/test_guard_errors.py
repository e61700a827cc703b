"""Guards that cannot be asked: every YAML, name and checkpoint that is refused, and with which sentence."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import is_one_sentence
from guards import ASKING, QWEN, SPOKEN, byte_tokenizer, save_guard, write_yaml
from helpers import tokenizer_of
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from sparc3_lightning.errors import OptionError
from sparc3_lightning.scorers.guards import GuardScorer
from sparc3_lightning.scorers.registry import check_scorer
from sparc3_lightning.stages.evaluate import Evaluation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_guard(tmp_path_factory.mktemp("guard") / "tiny")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("guard:qwen3guard", "did you mean guard:qwen3guard-gen-0.6b?"),
        ("guard:Llama-Guard-3-1B", "did you mean guard:llama-guard-3-1b?"),
        ("guard:Qwen/Qwen3Guard-Gen-0.6B", "did you mean guard:qwen3guard-gen-0.6b?"),
        ("guard:zzz", "a guard that is shipped: the shipped ones are granite-guardian-3.1-2b, llama-guard-3-1b,"),
        ("guard:", "names neither a file here nor a guard"),
        ("guard:missing/own.yaml", "names neither a file here nor a guard"),
        ("guard:.", "names neither a file here nor a guard"),
        ("guard:../guards/shieldgemma-2b", "did you mean guard:shieldgemma-2b?"),
    ],
)
def test_an_unknown_guard_is_refused_with_those_that_are_shipped(name: str, expected: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(expected)) as raised:
        check_scorer(name)
    assert isinstance(raised.value, OptionError)
    assert str(raised.value).startswith("--model.scorer: ")
    assert "granite-guardian-3.1-2b, llama-guard-3-1b, qwen3guard-gen-0.6b, shieldgemma-2b." in str(raised.value)
    with pytest.raises(FileNotFoundError):
        GuardScorer(name)


GOOD: dict[str, Any] = {"checkpoint": "some/guard", **QWEN}
WITHOUT = {name: {key: value for key, value in GOOD.items() if key != name} for name in GOOD}
FIELDS: list[tuple[dict[str, Any], str]] = [
    (WITHOUT["checkpoint"], "it has no checkpoint"),
    (WITHOUT["unsafe"], "it has no unsafe"),
    (WITHOUT["safe"], "it has no safe"),
    (WITHOUT["messages"], "it must have either messages or a prompt"),
    ({**GOOD, "prompt": "{text}"}, "it must have either messages or a prompt"),
    ({**GOOD, "label": "Unsafe"}, "it has an unknown field 'label': its fields are checkpoint, unsafe, safe"),
    ({**GOOD, "message": "{text}"}, "it has an unknown field 'message': did you mean messages"),
    ({**GOOD, 3: 4}, "it has an unknown field '3'"),
    ({**GOOD, "checkpoint": " "}, "its checkpoint is empty"),
    ({**GOOD, "checkpoint": 7}, "checkpoint cannot be 7"),
    ({**GOOD, "revision": 7}, "revision cannot be 7"),
    ({**GOOD, "unsafe": []}, "it has no label that is unsafe"),
    ({**GOOD, "safe": []}, "it has no label that is safe"),
    ({**GOOD, "safe": ["Safe", " "]}, "a label that is safe is empty"),
    ({**GOOD, "unsafe": [""]}, "a label that is unsafe is empty"),
    ({**GOOD, "unsafe": "Unsafe"}, "unsafe cannot be 'Unsafe'"),
    ({**GOOD, "unsafe": [3]}, "unsafe.0 cannot be 3"),
    ({**GOOD, "unsafe": [True]}, 'put them in quotes, "Yes"'),
    ({**GOOD, "safe": [False]}, "safe holds true or false"),
    ({**GOOD, "unsafe": ["Unsafe", "Safe"]}, "it has the label 'Safe' twice"),
    ({**GOOD, "safe": ["Safe", "Safe"]}, "it has the label 'Safe' twice"),
    ({**GOOD, "messages": "{text}"}, "messages cannot be '{text}'"),
    ({**GOOD, "messages": ["{text}"]}, "messages.0 cannot be '{text}'"),
    ({**GOOD, "messages": []}, "{text}, for which the text is put, stands nowhere"),
    ({**GOOD, "messages": [{"role": "user", "content": "{ text }"}]}, "stands nowhere in its messages"),
    ({**GOOD, "answer": 3}, "answer cannot be 3"),
    ({**GOOD, "arguments": ["a"]}, "arguments cannot be ['a']"),
    ({**GOOD, "arguments": {"tokenize": True}}, "its argument 'tokenize' cannot be given to a chat template"),
    ({**GOOD, "arguments": {"chat_template": "x"}}, "its argument 'chat_template' cannot be given"),
    ({**GOOD, "arguments": {"messages": []}}, "its argument 'messages' cannot be given"),
    ({**GOOD, "arguments": {3: 4}}, "its argument 3 cannot be given"),
    (
        {**GOOD, "messages": None, "prompt": "is it bad?"},
        "{text}, for which the text is put, stands nowhere in its pro",
    ),
    ({**GOOD, "messages": None, "prompt": ""}, "stands nowhere in its prompt"),
    ({"checkpoint": "a/b", **ASKING, "arguments": {"a": 1}}, "its arguments are for a chat template"),
]


@pytest.mark.parametrize(("content", "expected"), FIELDS)
def test_a_yaml_that_describes_no_guard_is_refused(content: dict[Any, Any], expected: str) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match=re.escape(expected)) as raised:
        check_scorer("guard:own.yaml")
    assert str(raised.value).startswith("--model.scorer: 'guard:own.yaml' describes no guard: ")
    assert is_one_sentence(str(raised.value))


DEEP = "[" * 1000 + "]" * 1000
TEXTS: list[tuple[bytes, str]] = [
    (b"", "holds a NoneType"),
    (b"- a\n- b\n", "holds a list"),
    (b"checkpoint: [\n", "cannot be read"),
    (b"checkpoint: \xff\n", "cannot be read"),
    (b"checkpoint: a\0b\n", "cannot be read"),
    (b"checkpoint: a\ncheckpoint: b\n", "it has the key 'checkpoint' twice"),
    (b"arguments: {a: 1, a: 2}\n", "it has the key 'a' twice"),
    (b"arguments: &a [*a]\n", "it holds an alias"),
    (b"arguments: &a {b: 1}\nmessages: [*a, *a]\n", "it holds an alias"),
    (b"checkpoint: a\n---\ncheckpoint: b\n", "cannot be read"),
    (b"? [a, b]\n: c\n", "cannot be read"),
    (f"arguments: {DEEP}\n".encode(), "cannot be read"),
    (b"#" * 70_000, "has 70,000 bytes, and at most 65,536 are read"),
    (b"checkpoint: !!python/object/apply:os.mkdir [sprung]\n", "cannot be read"),
    (b"checkpoint: !!python/name:os.system\n", "cannot be read"),
    (b"checkpoint: !Ref x\n", "cannot be read"),
]


@pytest.mark.parametrize(("content", "expected"), TEXTS, ids=[text[:20].decode("latin1") for text, _ in TEXTS])
@pytest.mark.few(5)
def test_a_yaml_that_is_none_or_large_or_code_is_refused_and_nothing_of_it_runs(content: bytes, expected: str) -> None:
    Path("own.yaml").write_bytes(content)
    with pytest.raises(OptionError, match=re.escape(expected)) as raised:
        check_scorer("guard:own.yaml")
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")
    assert not Path("sprung").exists()


def refused(folder: str, expected: str, **fields: Any) -> None:
    """Load a guard, which must be refused before its weights are read."""
    name = write_yaml("own.yaml", folder, **fields)
    with pytest.raises(ValueError, match=expected) as raised:
        GuardScorer(name)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_labels_that_the_vocabulary_lacks_are_refused(tiny: str) -> None:
    refused(
        tiny, r"The label 'Bad' of 'guard:own.yaml' has '<unk>' where it should differ", **{**QWEN, "unsafe": ["Bad"]}
    )
    refused(tiny, r"The label 'Good' of .* has '<unk>'", **{**QWEN, "safe": ["Good"]})
    refused(
        tiny,
        r"The label 'Good' of .* has no token where it should differ",
        **{**QWEN, "unsafe": ["Good"], "safe": ["Bad"]},
    )
    refused(tiny, r"The label '</s>' of .* has '</s>' where it should differ", **{**QWEN, "safe": ["</s>"]})


def test_labels_of_which_one_begins_another_or_some_share_a_token_are_refused(tiny: str) -> None:
    refused(tiny, "The label 'Safe' of .* has no token", **{**QWEN, "unsafe": ["Safe No"], "safe": ["Safe"]})
    refused(
        tiny,
        "The labels 'Safe No' and 'Safe Yes' of .* begin with the same token 'Safe', and others do not",
        **{**QWEN, "unsafe": ["Safe No"], "safe": ["Safe Yes", "Unsafe"]},
    )


def test_a_label_whose_token_has_no_row_in_the_head_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(SPOKEN)
    tokenizer.add_tokens(["Bad"])
    folder = save_guard(tmp_path / "more", tokenizer=tokenizer, vocab_size=len(SPOKEN) + 4)
    refused(folder, "The label 'Bad' of .* has 'Bad' where it should differ", **{**ASKING, "unsafe": ["Bad"]})


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    folder = save_guard(tmp_path / "plain", chat=None)
    refused(folder, "'guard:own.yaml' has messages, but the tokenizer of .* has no chat template for them", **QWEN)


@pytest.mark.parametrize("chat", ["{{ raise_exception('alternate!') }}", "{{ missing.field }}", "{% if %}"])
def test_a_chat_template_that_fails_is_a_sentence(tmp_path: Path, chat: str) -> None:
    folder = save_guard(tmp_path / "failing", chat=chat)
    refused(folder, "The chat template of .*failing' fails on the messages of 'guard:own.yaml': correct them", **QWEN)


def test_a_prompt_that_fills_the_context_is_refused(tiny: str) -> None:
    refused(
        tiny,
        "has a prompt of 71 tokens before any text, and the .* has 64",
        **{**ASKING, "prompt": "a " * 70 + "{text} ?"},
    )


def test_an_encoder_and_a_decoder_is_refused_before_anything_is_loaded() -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(CONFIG_MAPPING["bart"](d_model=16).to_json_string())
    save_file({}, "model/model.safetensors", {"format": "pt"})
    name = write_yaml("own.yaml", "./model", **QWEN)
    with pytest.raises(OptionError, match=r"^--model.scorers: './model' \(bart\) is an encoder and a decoder"):
        Evaluation("x", scorers=[name])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "t5"}, "is not a causal language model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "needs Python code of its own"),
    ],
)
def test_a_checkpoint_that_would_not_be_loaded_as_it_is_is_refused_by_the_check(
    tiny: str, changes: dict[str, Any], expected: str
) -> None:
    folder = Path(shutil.copytree(tiny, "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(OptionError, match=expected):
        check_scorer(write_yaml("own.yaml", "./changed", **QWEN))


def test_a_checkpoint_that_is_not_there_is_refused_by_the_check() -> None:
    with pytest.raises(FileNotFoundError, match=r"--model.scorer: './gone' does not exist"):
        check_scorer(write_yaml("own.yaml", "./gone", **QWEN))
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--model.scorer: The folder empty is not a checkpoint"):
        check_scorer(write_yaml("own.yaml", "empty", **QWEN))


def test_labels_of_pieces_that_share_one_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["abc"] * 9)
    folder = save_guard(tmp_path / "bytes", tokenizer=tokenizer)
    refused(
        folder, "'xa' and 'xb' of .* begin with the same token 'x'", prompt="{text}\n", unsafe=["xa"], safe=["xb", "y"]
    )
