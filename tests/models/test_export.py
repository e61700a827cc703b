"""Exported checkpoints: the files of the original, of which the pruned weights alone differ."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INPUT_IDS, NEURONS
from helpers import FAMILIES, mlp_of, sentence
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.export import check_export, export_pruned
from sparc3_lightning.models.weight_files import INDEX

EXTRA = {"extra.weight": torch.arange(12.0).view(3, 4), "extra.steps": torch.arange(5)}
OTHERS = {
    "LICENSE": b"Yours\r\n",
    "README.md": b"# Mine\n",
    "chat_template.jinja": b"{{ messages }}",
    "preprocessor_config.json": b'{"size":  448}',
    "figures/one.txt": b"\x00\xff",
    ".gitattributes": b"* text",
}
LEFT_OUT = (
    *("pytorch_model.bin", "model.fp16.safetensors", "consolidated.00.pth", "onnx/model.onnx"),
    *("pytorch_model.bin.index.json", ".git/config", ".cache/huggingface/a.lock"),
)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def contents(path: Path) -> tuple[list[str], dict[str, str] | None, dict[str, torch.Tensor]]:
    """Return the names of a file's tensors in order, its metadata, and the tensors."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return names, file.metadata(), {name: file.get_tensor(name) for name in names}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def make_original(source: str, folder: Path, sharded: bool, rename: Callable[[str], str] = str) -> Path:
    """Copy a checkpoint, with further files and tensors, in one file or in several with their index."""
    shutil.copytree(source, folder)
    (whole,) = weight_files(folder)
    tensors = {**{rename(name): tensor for name, tensor in load_file(whole).items()}, **EXTRA}
    whole.unlink()
    metadata = {"format": "pt", "made_by": "hand"}
    if sharded:
        names = list(tensors)
        parts = [dict.fromkeys(names[i::3]) for i in range(3)]
        files = {f"model-{i:05}-of-00003.safetensors": part for i, part in enumerate(parts, start=1)}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, folder / file, metadata)
        size = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, part in files.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    else:
        save_file(tensors, whole, metadata)
    for name, content in OTHERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def logits_of(folder: Path | str, neurons: list[Component] | None = None, **options: Any) -> torch.Tensor:
    """Return what stock transformers makes of a checkpoint, with neurons masked."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad(), mask(model, neurons or []):
        return model(INPUT_IDS).logits


def neurons_of(family: str) -> list[Component]:
    """Neurons that are off or damped in both blocks."""
    (first, *_), _ = mlp_of(family, 0)
    (second, *_), _ = mlp_of(family, 1)
    return [Component(first, 3, 0.0), Component(second, 0, 0.0), Component(second, 23, 0.0, damping=0.5)]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(4)
def test_an_export_has_the_files_and_tensors_of_the_original_and_the_logits_of_the_masked_model(
    make_checkpoint: Callable[[str], str], tmp_path: Path, family: str, sharded: bool
) -> None:
    original, export = make_original(make_checkpoint(family), tmp_path / "original", sharded), tmp_path / "export"
    neurons = neurons_of(family)
    export_pruned(Checkpoint(str(original)), neurons, export)
    assert names_in(export) == names_in(original)
    for name in names_in(original):
        if not name.endswith(".safetensors"):
            assert (export / name).read_bytes() == (original / name).read_bytes(), name
    layers = [layer for block in range(2) for rows, column in [mlp_of(family, block)] for layer in (*rows, column)]
    for path in weight_files(original):
        names, metadata, tensors = contents(path)
        exported = contents(export / path.name)
        assert exported[:2] == (names, metadata)
        for name, tensor in tensors.items():
            other = exported[2][name]
            assert other.dtype == tensor.dtype
            if name.rpartition(".")[0] in layers:  # a row or a column of each neuron
                assert int((other != tensor).sum()) <= 2 * max(tensor.shape), name
            else:
                assert torch.equal(other, tensor), name
    masked = logits_of(original, neurons)
    torch.testing.assert_close(logits_of(export), masked, rtol=1e-5, atol=1e-5)
    assert (logits_of(original) - masked).abs().max() > 1e-3


def test_tensors_without_the_prefix_of_the_base_model_keep_their_names(
    make_checkpoint: Callable[[str], str], tmp_path: Path
) -> None:
    original = make_original(
        make_checkpoint("gpt2"), tmp_path / "original", False, lambda name: name.removeprefix("transformer.")
    )
    neurons = neurons_of("gpt2")
    export_pruned(Checkpoint(str(original)), neurons, tmp_path / "export")
    assert all_tensors(tmp_path / "export").keys() == all_tensors(original).keys()
    torch.testing.assert_close(logits_of(tmp_path / "export"), logits_of(original, neurons))


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_weights_of_another_dtype_are_written_if_that_is_asked_for(
    tiny_checkpoint: str, tmp_path: Path, sharded: bool
) -> None:
    original, export = make_original(tiny_checkpoint, tmp_path / "original", sharded), tmp_path / "export"
    export_pruned(Checkpoint(str(original)), NEURONS, export, dtype=torch.bfloat16)
    assert names_in(export) == names_in(original)
    before, after = all_tensors(original), all_tensors(export)
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    assert after.pop("extra.steps").dtype == torch.int64
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    for name, weight in after.items():
        if ".mlp." not in name:
            assert torch.equal(weight, before[name].bfloat16())
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    if sharded:
        size = json.loads((export / INDEX).read_text())["metadata"]["total_size"]
        assert size == sum(weight.nbytes for weight in after.values()) + EXTRA["extra.steps"].nbytes
    expected = logits_of(original, NEURONS, dtype=torch.bfloat16)
    assert torch.equal(logits_of(export, dtype="auto"), expected)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_means_go_into_biases_which_are_added_beside_their_weights(
    tiny_checkpoint: str, tmp_path: Path, sharded: bool
) -> None:
    original, export = make_original(tiny_checkpoint, tmp_path / "original", sharded), tmp_path / "export"
    neurons = [Component(NEURONS[0].module, 3, 0.0, mean=0.7), Component(NEURONS[1].module, 5, 0.0, 0.5, -0.3)]
    export_pruned(Checkpoint(str(original)), neurons, export)
    assert names_in(export) == names_in(original)
    new = all_tensors(export).keys() - all_tensors(original).keys()
    layers = ("up_proj", "gate_proj", "down_proj")
    assert new == {f"model.layers.{i}.mlp.{layer}.bias" for i in range(2) for layer in layers}
    if sharded:
        places = json.loads((export / INDEX).read_text())["weight_map"]
        assert all(places[name] == places[name.replace("bias", "weight")] for name in new)
    torch.testing.assert_close(logits_of(export), logits_of(original, neurons), rtol=1e-5, atol=1e-5)


def test_weights_in_other_formats_and_folders_of_tools_do_not_come_along_and_this_is_said(
    tiny_checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = make_original(tiny_checkpoint, tmp_path / "original", sharded=True)
    expected = names_in(original)
    for name in LEFT_OUT:
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / name).write_bytes(b"stale")
    caplog.set_level("INFO")
    export_pruned(Checkpoint(str(original)), NEURONS, tmp_path / "export")
    assert names_in(tmp_path / "export") == expected
    for name in LEFT_OUT:
        assert name.startswith(".") or name in caplog.text


def test_files_that_are_links_as_in_the_cache_of_the_hub_become_files(tiny_checkpoint: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in Path(tiny_checkpoint).iterdir():
        (snapshot / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in Path(tiny_checkpoint).iterdir()}
    export_pruned(Checkpoint(str(snapshot)), NEURONS, tmp_path / "export")
    assert not any(path.is_symlink() for path in (tmp_path / "export").iterdir())
    assert {path.name: path.read_bytes() for path in Path(tiny_checkpoint).iterdir()} == before


def test_an_export_is_another_checkpoint_with_the_same_tokenizer(tiny_checkpoint: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "new" / "pruned"
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, folder)
    text = sentence(0, 9)
    ids = Checkpoint(tiny_checkpoint).tokenizer()(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    assert Checkpoint(str(folder)).fingerprint != Checkpoint(tiny_checkpoint).fingerprint
    assert (folder.stat().st_mode & 0o777) == 0o755


# What is refused.


@pytest.mark.parametrize("change", ["without", "twice", "other shape", "integers"])
def test_weights_that_are_no_tensors_of_the_files_are_refused_before_anything_is_written(
    make_checkpoint: Callable[[str], str], tmp_path: Path, change: str
) -> None:
    original = tmp_path / "original"
    shutil.copytree(make_checkpoint("gpt2"), original)
    (path,) = weight_files(original)
    tensors, name = load_file(path), "transformer.h.0.mlp.c_proj.weight"
    weight = tensors.pop(name)
    if change == "twice":
        tensors |= {name: weight, name.removeprefix("transformer."): weight.clone()}
    elif change != "without":
        tensors[name] = weight[:-1] if change == "other shape" else weight.to(torch.int8)
    save_file(tensors, path, {"format": "pt"})
    message = (
        r"original' cannot be exported: its files hold no tensor that is .*c_proj\.weight' .*leave out --model\.export"
    )
    with pytest.raises(ValueError, match=message):
        check_export(Checkpoint(str(original)), ["transformer.h.0.mlp.c_fc"], "neuron", tmp_path / "export")
    with pytest.raises(ValueError, match=message):
        export_pruned(Checkpoint(str(original)), neurons_of("gpt2"), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_an_export_does_not_touch_a_folder_that_exists(tiny_checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    with pytest.raises(FileExistsError, match="pruned exists already; nothing was overwritten"):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned")
    assert list((tmp_path / "pruned").iterdir()) == []


def test_an_export_into_the_checkpoint_itself_is_refused(tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"--model\.export must lie outside of the checkpoint"):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, Path(tiny_checkpoint, "sub", "pruned"))
    assert not Path(tiny_checkpoint, "sub").exists()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_disk_that_is_too_small_by_one_byte_is_refused_and_one_that_just_suffices_is_not(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "first", dtype=dtype)
    size = sum(path.stat().st_size for path in (tmp_path / "first").iterdir())
    for free, is_enough in ((size // 2, False), (2 * size, True)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        folder = tmp_path / "deep" / f"{is_enough}"
        if is_enough:
            export_pruned(Checkpoint(tiny_checkpoint), NEURONS, folder, dtype=dtype)
            continue
        with pytest.raises(OSError, match=r"needs .* GB free.*--model\.export"):
            export_pruned(Checkpoint(tiny_checkpoint), NEURONS, folder, dtype=dtype)
        assert not (tmp_path / "deep").exists()


def test_a_place_that_cannot_be_written_is_refused(tiny_checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"Cannot write to the output folder .*file.*--model\.export"):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "file" / "pruned")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_export_that_breaks_off_leaves_nothing(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    copyfile = shutil.copyfile

    def interrupt(source: Path, target: Path) -> None:
        if source.suffix != ".safetensors":
            raise error
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    with pytest.raises(type(error)):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_an_export_sweeps_what_a_killed_one_left(tiny_checkpoint: str, tmp_path: Path) -> None:
    left = tmp_path / f".pruned.4194305-7-{platform.node()}.abcdefgh"  # no process of Linux has such a number
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_an_export_of_neurons_of_another_model_leaves_nothing(tiny_checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another model"):
        export_pruned(Checkpoint(tiny_checkpoint), [Component("model.layers.9.mlp.up_proj", 0, -1.0)], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
