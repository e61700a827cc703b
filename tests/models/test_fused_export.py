"""Exports of models that transformers puts together of other tensors: these very tensors are written back."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import INPUT_IDS, is_one_sentence
from mixtures import SAVED, SPLIT, make_mixture, open_, save_in_files, zero_rows_
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist, SplitModulelist

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component, prune_
from sparc3_lightning.models.export import Tensors, copied, export_pruned
from sparc3_lightning.models.tensors import TensorFile
from sparc3_lightning.models.weight_files import INDEX, weight_paths


def export(original: Path, folder: Path, dtype: torch.dtype | None = None, is_changed: bool = True) -> None:
    """Export a checkpoint with some rows set to zero, or as it is."""
    with copied(Checkpoint(str(original)), folder, dtype) as copy:
        layers = open_(copy.model)
        with copy.holding(layers):
            if is_changed:
                zero_rows_(copy.model, layers)
        assert all(parameter.is_meta for parameter in copy.model.parameters())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weight_paths(folder) for name, tensor in load_file(path).items()}


def logits_of(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits  # type: ignore[operator]


def check_same(found: nn.Module, expected: nn.Module) -> None:
    """Check that two models have the same tensors, bit for bit."""
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.few(3)
def test_rows_that_are_set_to_zero_are_zero_for_stock_transformers_and_all_else_is_as_it_was(
    kind: str, tmp_path: Path
) -> None:
    model = save_in_files(kind, tmp_path / "original")
    before = logits_of(model)
    layers = open_(model)
    export(tmp_path / "original", tmp_path / "export")
    zero_rows_(model, layers)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    check_same(reloaded, model)
    assert (logits_of(reloaded) - before).abs().max() > 1e-4
    original, exported = files_of(tmp_path / "original"), files_of(tmp_path / "export")
    assert original.keys() == exported.keys()
    assert len(original) > 5, "not in several files"
    tensors, changed = tensors_in(tmp_path / "original"), tensors_in(tmp_path / "export")
    assert tensors.keys() == changed.keys()
    names = [name for name, tensor in tensors.items() if not torch.equal(tensor, changed[name])]
    assert len(names) == len(layers) if kind in SPLIT else len(names) <= len(layers)
    assert all(".1." in name for name in names), names
    if kind in SPLIT:
        assert all(".experts.2." in name for name in names), names
    for file in original.keys() - {path.name for path in weight_paths(tmp_path / "original")}:
        assert original[file] == exported[file]


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.few(6)
def test_an_export_of_weights_that_are_held_but_not_changed_is_the_original_byte_for_byte(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_in_files(kind, tmp_path / "original", dtype=dtype)
    export(tmp_path / "original", tmp_path / "export", is_changed=False)
    assert files_of(tmp_path / "original") == files_of(tmp_path / "export")


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_an_export_in_another_dtype_has_the_same_tensors_in_it(kind: str, tmp_path: Path) -> None:
    model = save_in_files(kind, tmp_path / "original")
    export(tmp_path / "original", tmp_path / "export", torch.bfloat16)
    model = model.bfloat16()
    zero_rows_(model, open_(model))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    check_same(found, model)
    exported = tensors_in(tmp_path / "export")
    assert exported.keys() == tensors_in(tmp_path / "original").keys()
    index = json.loads((tmp_path / "export" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in exported.values())
    assert Checkpoint(str(tmp_path / "export")).fingerprint != Checkpoint(str(tmp_path / "original")).fingerprint


def test_experts_of_a_model_without_its_head_keep_their_names_without_the_prefix(tmp_path: Path) -> None:
    model = save_in_files("mixtral", tmp_path / "original", "1GB")
    path = tmp_path / "original" / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    names = load_file(path).keys()
    export(tmp_path / "original", tmp_path / "export")
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == names
    zero_rows_(model, open_(model))
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "export"), model)


def test_a_model_that_was_saved_with_fused_experts_keeps_them(tmp_path: Path) -> None:
    model = make_mixture("mixtral", torch.float32)
    model.save_pretrained(tmp_path / "original", save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert name in tensors_in(tmp_path / "original")
    export(tmp_path / "original", tmp_path / "export")
    zero_rows_(model, open_(model))
    assert torch.equal(tensors_in(tmp_path / "export")[name], model.get_parameter(name))
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "export"), model)


def test_several_layers_that_are_views_of_one_parameter_are_made_of_the_same_tensors_once(tmp_path: Path) -> None:
    save_in_files("qwen3_moe", tmp_path / "original")
    model = Checkpoint(str(tmp_path / "original")).skeleton()
    files = [TensorFile(path) for path in weight_paths(tmp_path / "original")]
    tensors = Tensors(Checkpoint(str(tmp_path / "original")), model, files)
    sources = tensors.of([*open_(model), *open_(model)])
    assert [source.parameters for source in sources] == [
        ("model.layers.1.mlp.experts.gate_up_proj",),
        ("model.layers.1.mlp.experts.down_proj",),
    ]
    assert len({tensors.files[part.name].path for part in sources[0].parts}) > 1
    numbers = [int(part.name.split(".")[5]) for part in sources[1].parts]
    assert numbers == list(range(12)), "10 comes after 9"


def test_neurons_of_experts_and_dense_ones_are_pruned_in_an_export_as_in_memory(tmp_path: Path) -> None:
    save_in_files("deepseek_v3", tmp_path / "original")
    expected = Checkpoint(str(tmp_path / "original")).load(torch.float32)
    experts = [f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in (0, 7)]
    others = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"]
    neurons = [
        Component(name, index, 0.0, damping) for name in experts + others for index, damping in ((3, 1), (5, 0.5))
    ]
    export_pruned(Checkpoint(str(tmp_path / "original")), neurons, tmp_path / "export")
    prune_(expected, neurons)
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "export"), expected)


def test_the_mean_of_a_neuron_of_an_expert_goes_into_the_fused_bias(tmp_path: Path) -> None:
    save_in_files("gpt_oss", tmp_path / "original")
    expected = Checkpoint(str(tmp_path / "original")).load(torch.float32)
    neurons = [Component("model.layers.1.mlp.experts.2.up_proj", 3, 0.0, mean=0.7)]
    export_pruned(Checkpoint(str(tmp_path / "original")), neurons, tmp_path / "export")
    prune_(expected, neurons)
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "export"), expected)
    before, after = tensors_in(tmp_path / "original"), tensors_in(tmp_path / "export")
    assert before.keys() == after.keys()
    bias = "model.layers.1.mlp.experts.down_proj_bias"
    assert (before[bias] != after[bias]).any(dim=1).tolist() == [False, False, True, False]


# What is refused.


def check_refused(original: Path, folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        export(original, folder)
    message = str(raised.value).replace(str(original), "")
    assert is_one_sentence(message), message
    assert message.endswith("or leave out --model.export.")
    assert not folder.exists()


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize("change", ["without", "other shape", "integers", "other dtype", "one more"])
def test_experts_whose_tensors_are_not_those_of_the_model_are_refused(change: str, tmp_path: Path) -> None:
    save_in_files("mixtral", tmp_path / "original", "1GB")
    path = tmp_path / "original" / "model.safetensors"
    tensors = load_file(path)
    weight = tensors.pop(EXPERT)
    changed = {
        "without": {},
        "other shape": {EXPERT: weight[1:]},
        "integers": {EXPERT: weight.to(torch.int8)},
        "other dtype": {EXPERT: weight.bfloat16()},
        "one more": {EXPERT: weight, EXPERT.replace(".2.", ".4."): weight.clone()},
    }
    save_file(tensors | changed[change], path, {"format": "pt"})
    check_refused(
        tmp_path / "original",
        tmp_path / "export",
        r"tensors of its files that 'model.layers.1.mlp.experts.gate_up_proj' is made of cannot be told from it "
        r"again; save it with save_pretrained\(folder, save_original_format=False\)",
    )


def test_a_conversion_that_transformers_cannot_revert_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_in_files("olmoe", tmp_path / "original")

    def fail(_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(MergeModulelist, "reverse_op", property(fail))
    check_refused(tmp_path / "original", tmp_path / "export", "of cannot be told from it again")


def test_a_conversion_that_does_not_give_the_same_numbers_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_in_files("olmoe", tmp_path / "original")
    convert = SplitModulelist.convert

    def rounded(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        made = convert(*arguments, **options)  # type: ignore[arg-type]
        return {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in made.items()}

    monkeypatch.setattr(SplitModulelist, "convert", rounded)
    check_refused(tmp_path / "original", tmp_path / "export", "of cannot be told from it again")
