"""GGUF files as checkpoints: loaded, dequantized once, and refused where they are damaged or parts."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import INPUT_IDS, NEURONS, is_one_sentence
from gguf_files import byte_pairs, tensors_of, tiny, write
from mixtures import make_mixture

from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, prune_
from sparc3_lightning.models.experts import open_experts_
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.gguf import FORMAT


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny LLaMA as a GGUF file, and the same in torch."""
    model = tiny()
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model), model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def refused(path: Path) -> str:
    """Return the one sentence with which a file is refused."""
    with pytest.raises(ValueError, match=r".") as error:
        _ = Checkpoint(str(path)).location
    assert is_one_sentence(str(error.value).replace(str(path), "")), error.value
    return str(error.value)


def test_a_gguf_file_is_loaded_as_float32_with_its_weights_and_its_tokenizer(cache: Path, tmp_path: Path) -> None:
    expected, q8 = tiny(), gguf.GGMLQuantizationType.Q8_0
    for parameter in expected.parameters():
        if parameter.dim() > 1:  # to what 8 bits can say
            blocks = gguf.quants.quantize(parameter.numpy(), q8)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, q8)))
    path = write(tmp_path / "tiny.gguf", expected, kind=q8)
    model = load_model(str(path), torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    torch.testing.assert_close(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)
    tokenizer = Checkpoint(str(path)).tokenizer()
    text = "the stupid dog, 2 cats"
    assert tokenizer(text)["input_ids"] == byte_pairs()[0].encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_gguf_file_is_dequantized_once(
    gguf_model: tuple[Path, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers

    folder = Path(Checkpoint(str(gguf_model[0])).location)
    assert folder.parent == cache / "gguf"
    assert names(folder.parent) == [folder.name], "a temporary folder was left behind"
    assert folder.stat().st_mode & 0o777 == 0o755

    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_but_no_gguf(*arguments: Any, **options: Any) -> Any:
        assert "gguf_file" not in options, "dequantized again"
        return load(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_but_no_gguf)
    load_model(str(gguf_model[0]), torch.float32)
    elsewhere = shutil.copy(gguf_model[0], tmp_path / "renamed.gguf")
    assert Checkpoint(str(elsewhere)).location == str(folder)


def test_what_an_earlier_version_dequantized_is_not_used(gguf_model: tuple[Path, Any], cache: Path) -> None:
    folder = Path(Checkpoint(str(gguf_model[0])).location)
    name, _, version = folder.name.rpartition("-")
    assert version == str(FORMAT)
    shutil.rmtree(folder)
    for earlier in (name, f"{name}-{FORMAT - 1}"):
        (folder.parent / earlier).mkdir()
        (folder.parent / earlier / "config.json").write_text("{}")
    torch.testing.assert_close(
        load_model(str(gguf_model[0]), torch.float32)(INPUT_IDS).logits, gguf_model[1](INPUT_IDS).logits
    )


def test_a_model_from_a_gguf_file_can_be_saved_fingerprinted_and_exported(
    gguf_model: tuple[Path, Any], cache: Path, tmp_path: Path
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


def test_experts_of_a_gguf_file_are_loaded_and_exported(cache: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": len(byte_pairs()[1]), "hidden_size": 32, "head_dim": 8, "norm_topk_prob": True}
    expected = make_mixture("qwen3_moe", torch.float32, **sizes)
    path = str(write(tmp_path / "tiny.gguf", expected))
    for name, parameter in load_model(path, torch.float32).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    neurons = [Component("model.layers.1.mlp.experts.5.up_proj", 3, -1.0)]
    export_pruned(Checkpoint(path), neurons, tmp_path / "pruned")
    pruned = load_model(str(tmp_path / "pruned"), torch.float32)
    open_experts_(expected)
    prune_(expected, neurons)
    assert not pruned.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[5, [3, 31]].any()
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_files_beside_a_gguf_file_are_not_read(gguf_model: tuple[Path, Any], cache: Path, tmp_path: Path) -> None:
    shutil.copy(gguf_model[0], tmp_path / "tiny.gguf")
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": ["x.X", "x.X"]}, "tokenizer_class": "X"}')
    (tmp_path / "x.py").write_text("raise SystemExit")
    checkpoint = Checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.load(torch.float32).config.model_type == "llama"
    assert checkpoint.tokenizer().eos_token == "</s>"


def test_what_a_killed_process_left_of_a_gguf_file_is_swept(gguf_model: tuple[Path, Any], cache: Path) -> None:
    left = cache / "gguf" / f".other.4194305-7-{platform.node()}.abcdefgh"
    began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    going_on = cache / "gguf" / f".other.{os.getpid()}-{began}-{platform.node()}.abcdefgh"
    for folder in (left, going_on):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(100))
    folder = Path(Checkpoint(str(gguf_model[0])).location)
    assert names(cache / "gguf") == sorted([going_on.name, folder.name])


SLOW_TO_SAVE = """
import sys, time, transformers
from sparc3_lightning.models.checkpoints import Checkpoint

def save_pretrained(self, folder):
    print("saving", flush=True)
    time.sleep(600)

transformers.PreTrainedModel.save_pretrained = save_pretrained
Checkpoint(sys.argv[1]).location
"""


@pytest.mark.slow
def test_a_kill_while_a_gguf_file_is_dequantized_leaves_nothing_at_the_next_start(
    gguf_model: tuple[Path, Any], cache: Path
) -> None:
    path = str(gguf_model[0])
    with subprocess.Popen([sys.executable, "-c", SLOW_TO_SAVE, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        process.kill()
    assert [name[0] for name in names(cache / "gguf")] == ["."]
    folder = Path(Checkpoint(path).location)
    assert names(cache / "gguf") == [folder.name]


@pytest.mark.parametrize("kept", [0, 10, 1000, -1000, -1])
def test_a_truncated_gguf_file_is_a_clear_error_and_leaves_nothing(
    kept: int, gguf_model: tuple[Path, Any], cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_model[0].read_bytes()[:kept])
    assert "cut.gguf is truncated, or not a GGUF file" in refused(tmp_path / "cut.gguf")
    assert names(cache / "gguf") == []


def test_a_foreign_file_with_the_ending_gguf_is_a_clear_error(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.gguf").write_text("plain text, and long enough for a header " * 10)
    with pytest.raises(ValueError, match=r"foreign.gguf is truncated, or not a GGUF file"):
        _ = Checkpoint("foreign.gguf").config


def test_a_part_of_a_split_gguf_file_is_refused_with_the_way_out(cache: Path, tmp_path: Path) -> None:
    model = tiny()
    weights = tensors_of(model)
    split = {"split.no": 0, "split.count": 3, "split.tensors.count": len(weights)}
    first = dict.fromkeys(list(weights)[5:])
    for name, metadata in (("renamed", split), ("tiny-00001-of-00003", split), ("tiny-00001-of-00003", {})):
        path = write(tmp_path / f"{name}.gguf", model, metadata, first)
        assert "is one of 3 parts of a split GGUF file: join them with 'llama-gguf-split --merge" in refused(path)
    later = gguf.GGUFWriter(tmp_path / "later.gguf", "llama")
    later.kv_data[0].clear()  # only the first part says what the model is
    for key, value in split.items():
        later.add_uint16(key, value + (key == "split.no"))
    later.add_tensor("output_norm.weight", weights["output_norm.weight"])
    for write_part in (later.write_header_to_file, later.write_kv_data_to_file, later.write_tensors_to_file):
        write_part()
    later.close()
    assert "is one of 3 parts" in refused(tmp_path / "later.gguf")
    assert names(cache / "gguf") == []


def test_a_gguf_file_split_into_one_part_is_loaded(cache: Path, tmp_path: Path) -> None:
    model = tiny()
    path = write(tmp_path / "tiny-00001-of-00001.gguf", model, {"split.no": 0, "split.count": 1})
    torch.testing.assert_close(load_model(str(path), torch.float32)(INPUT_IDS).logits, model(INPUT_IDS).logits)


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_what_is_no_language_model_is_refused(kind: str, cache: Path, tmp_path: Path) -> None:
    assert f"holds no language model, but {kind!r}" in refused(
        write(tmp_path / "a.gguf", tiny(), {"general.type": kind})
    )
