"""What parameters are made of, as transformers renames and converts tensors, and the way back."""

from pathlib import Path

import pytest
import torch
from decoders import build
from mixtures import save_in_files
from safetensors.torch import load_file
from torch import Tensor

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.conversion import Sources
from sparc3_lightning.models.loading import CAUSAL_LM, sources_of
from sparc3_lightning.models.weight_files import Weight

EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def sources_in(model: torch.nn.Module, tensors: dict[str, Tensor]) -> Sources:
    return Sources(model, {name: tensor.shape for name, tensor in tensors.items()})  # type: ignore[arg-type]


# One tensor for several parameters, several for one, experts, and other names; hybrids and latent attention.
@pytest.mark.parametrize(
    "model_type", ["hrm_text", "sarvam_moe", "lara_mini", "kimi_linear", "deepseek_v4", "inkling2_text", "granitemoe"]
)
@pytest.mark.few(3)
def test_the_tensors_of_files_make_up_the_parameters_and_these_the_tensors_bit_for_bit(
    model_type: str, tmp_path: Path
) -> None:
    model = build(model_type)
    model.save_pretrained(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), model.state_dict()
    sources = sources_in(model, tensors)
    assert not sources.left
    assert any(source.converter or source.name not in source.parameters for source in sources.found.values())
    made = {}
    for source in sources.found.values():
        assert sources.is_reversible(source), source.parameters
        assert not any(sources.differences(source))
        parameters = source.convert(model, tensors.__getitem__)
        assert parameters.keys() == set(source.parameters)
        reverted = source.revert(model, parameters)
        assert reverted.keys() == {part.renamed for part in source.parts}
        assert all(torch.equal(reverted[part.renamed], tensors[part.name]) for part in source.parts)
        made |= parameters
    tied = set(model.all_tied_weights_keys)
    assert made.keys() - tied == expected.keys() - tied
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 12), slice(9, 11)])
def test_rows_of_fused_experts_are_made_of_the_tensors_of_these_experts(rows: slice, tmp_path: Path) -> None:
    model = save_in_files("qwen3_moe", tmp_path, "1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    source = sources_in(model, tensors).found[EXPERTS].of_rows(rows)
    assert source is not None
    experts = {int(part.name.split(".")[5]) for part in source.parts}
    assert experts == set(range(rows.start, rows.stop))
    assert torch.equal(source.convert(model, tensors.__getitem__)[EXPERTS], model.get_parameter(EXPERTS)[rows])


def test_rows_of_what_is_put_together_otherwise_need_the_whole(tmp_path: Path) -> None:
    model = build("kimi_linear")
    model.save_pretrained(tmp_path)
    found = sources_in(model, load_file(tmp_path / "model.safetensors")).found
    assert found["model.norm.weight"].of_rows(slice(0, 2)) is None
    (convolution, *_) = (source for name, source in found.items() if name.endswith("self_attn.conv1d.weight"))
    assert len(convolution.parts) == 3
    assert convolution.of_rows(slice(0, 2)) is None


def test_what_is_put_together_of_unequal_parts_is_read_though_it_cannot_be_taken_apart(tmp_path: Path) -> None:
    model = build("olmo_hybrid")
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    first, second, third = (name for name in sorted(shapes) if "layers.0." in name and "_conv1d" in name)
    total = sum(shapes[name][0] for name in (first, second, third))
    # As wide as keys, queries and values are; transformers would write thirds.
    for name, rows in ((first, total // 4), (second, total // 4), (third, total // 2)):
        shapes[name] = (rows, *shapes[name][1:])
    weights = {name: Weight(tmp_path / "model.safetensors", shape, "F32") for name, shape in shapes.items()}
    source = sources_of("any", model, weights, CAUSAL_LM)["model.layers.0.linear_attn.conv1d.weight"]
    assert {part.name for part in source.parts} == {first, second, third}
    assert not Sources(model, shapes).is_reversible(source)
    weights[second] = weights[second]._replace(shape=(total // 4 - 1, *shapes[second][1:]))
    with pytest.raises(ValueError, match="of another shape"):
        sources_of("any", model, weights, CAUSAL_LM)
    del weights[second]
    with pytest.raises(ValueError, match=rf"1 missing \({second}\)"):
        sources_of("any", model, weights, CAUSAL_LM)


def test_a_mixture_is_loaded_whole_from_experts_that_lie_in_several_files(tmp_path: Path) -> None:
    model = save_in_files("deepseek_v3", tmp_path)
    found = Checkpoint(str(tmp_path)).load(torch.float32).state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
