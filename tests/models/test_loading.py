"""What is loaded is what the folder holds, in one process and in shards: nothing is made up, left out or converted."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INPUT_IDS, is_one_sentence
from mixtures import SAVED, save_in_files
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.sharding import load_sharded

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_in_shards(folder: Path | str) -> Any:
    """Load as fsdp2 does, by one rank that has all the shards."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return load_sharded(Checkpoint(str(folder)), torch.float32, mesh, torch.device("cpu"))


def load_whole(folder: Path | str) -> Any:
    return load_model(str(folder), torch.float32)


def tensors_of(model: Any) -> Tensors:
    found = {**dict(model.named_buffers()), **model.state_dict()}
    return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in found.items()}


both = pytest.mark.parametrize("load", [load_whole, load_in_shards])


def rewrite(folder: Path, change: Callable[[Tensors], object], file: str = "model.safetensors") -> None:
    """Change the tensors of a file in place, or save what the change returns."""
    weights = load_file(folder / file)
    found = change(weights)
    save_file(found if isinstance(found, dict) else weights, folder / file, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def split(folder: Path, index: Any = None) -> list[str]:
    """Split the weights into three files with an index, and return the files' names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    names = sorted(weights)
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i::3]}, folder / file, {"format": "pt"})
    places = {name: files[i % 3] for i, name in enumerate(names)}
    write_index(folder, places)
    return files


def write_index(folder: Path, places: Any, **content: Any) -> None:
    content = {"metadata": {}, "weight_map": places, **content}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


# Tensors that are not the model's.

WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no head": (lambda weights: weights.pop(HEAD), r"are 1 missing \(lm_head.weight\);"),
    "no embedding": (lambda weights: weights.pop(EMBEDDING), r"are 1 missing \(model.embed_tokens.weight\);"),
    "one layer lost": (lambda weights: weights.pop(UP), r"are 1 missing \(model.layers.1.mlp.up_proj.weight\);"),
    "another prefix": (
        renamed("module."),
        r"are 21 missing \(lm_head.weight, .*, \.\.\.\), 21 unexpected",
    ),
    "compiled": (renamed("_orig_mod."), r"21 unexpected \(_orig_mod.lm_head.weight"),
    "a bias": (
        lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
        r"are 1 unexpected \(model.layers.0.self_attn.q_proj.bias\);",
    ),
    "one more layer": (
        lambda weights: weights.update({n.replace(".1.", ".2."): w.clone() for n, w in weights.items() if ".1." in n}),
        r"are 9 unexpected \(model.layers.2.input_layernorm.weight, ",
    ),
    "another shape": (
        lambda weights: weights.update({UP: torch.ones(23, 16)}),
        r"are 1 of another shape \(model.layers.1.mlp.up_proj.weight \[23, 16\] for \[24, 16\]\);",
    ),
    "transposed": (lambda weights: weights.update({UP: weights[UP].T.contiguous()}), r"\[16, 24\] for \[24, 16\]"),
    "one tensor by two names": (
        lambda weights: weights.update({UP.removeprefix("model."): weights[UP].clone()}),
        r"are 1 unexpected \(model.layers.1.mlp.up_proj.weight\);",
    ),
    "a name and another": (
        lambda weights: weights.update({f"{UP}s": weights.pop(UP)}),
        r"are 1 missing \(model.layers.1.mlp.up_proj.weight\), 1 unexpected \(model.layers.1.mlp.up_proj.weights\);",
    ),
}


@both
@pytest.mark.parametrize("case", WRONG)
def test_files_with_other_tensors_than_the_model_are_refused_with_number_and_names(
    case: str, load: Callable[..., Any], copied: Path
) -> None:
    change, expected = WRONG[case]
    rewrite(copied, change)
    with pytest.raises(ValueError, match=expected) as raised:
        load(copied)
    message = str(raised.value)
    assert is_one_sentence(message.replace(", ...", "")), message
    assert message.startswith(f"The weight files of {str(copied)!r} do not hold the causal language model that its")


@both
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 4}, r"are 18 missing \(model.layers.2.input_layernorm.weight, "),
        ({"num_hidden_layers": 1}, r"are 9 unexpected \(model.layers.1."),
        ({"hidden_size": 32}, r"21 of another shape"),
        (
            {"num_key_value_heads": 4},
            r"4 of another shape \(model.layers.0.self_attn.k_proj.weight \[8, 16\] for",
        ),
        ({"attention_bias": True}, r"8 missing \(model.layers.0.self_attn.k_proj.bias, "),
        ({"model_type": "qwen3"}, r"4 missing \(model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_a_config_of_another_model_is_refused(
    changes: dict[str, Any], expected: str, load: Callable[..., Any], copied: Path
) -> None:
    configure(copied, **changes)
    with pytest.raises(ValueError, match=expected):
        load(copied)


# Files of which both loaders and transformers read the same.


def with_buffers(folder: Path) -> None:
    """Add what older files hold beside the weights."""
    rewrite(
        folder,
        lambda weights: weights.update(
            {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((2,), 7.0) for i in range(2)}
            | {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4), "position_ids": torch.arange(64)}
            | {"model.layers.0.self_attn.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
        ),
    )


def with_variant(folder: Path) -> None:
    save_file({n: -w for n, w in load_file(folder / "model.safetensors").items()}, folder / "model.fp16.safetensors")


def with_stale_index(folder: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"))


def with_older_parts(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for file in split(folder):
        rewrite(folder, lambda part: {name: -weight for name, weight in part.items()}, file)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_another_export(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    split(folder)
    save_file({name: -weight for name, weight in weights.items()}, folder / "consolidated.safetensors")


def with_gaps_in_the_index(folder: Path) -> None:
    files = split(folder)
    write_index(folder, {f"any{i}": file for i, file in enumerate(files)})


def with_one_tensor_twice(folder: Path) -> None:
    files = split(folder)
    for i, file in enumerate(files):
        rewrite(folder, lambda part, i=i: part.update({UP: torch.full((24, 16), float(i))}), file)


def with_equal_head(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))


def in_bfloat16(folder: Path) -> None:
    rewrite(folder, lambda weights: {name: weight.bfloat16() for name, weight in weights.items()})


def in_several_dtypes(folder: Path) -> None:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float32]
    rewrite(folder, lambda weights: {n: w.to(dtypes[i % 4]) for i, (n, w) in enumerate(weights.items())})


RIGHT: dict[str, tuple[Callable[[Path], object] | None, bool]] = {
    "as saved": (None, False),
    "parts": (split, False),
    "buffers of older files": (with_buffers, False),
    "a variant beside it": (with_variant, False),
    "a stale index beside it": (with_stale_index, False),
    "older parts beside it": (with_older_parts, False),
    "another export beside its parts": (with_another_export, False),
    "an index that leaves tensors out": (with_gaps_in_the_index, False),
    "one tensor in several parts": (with_one_tensor_twice, False),
    "bfloat16": (in_bfloat16, False),
    "several dtypes": (in_several_dtypes, False),
    "tied, with the same head": (with_equal_head, True),
    "tied, with another head": (None, True),
    "tied, without a head": (lambda folder: rewrite(folder, lambda weights: weights.pop(HEAD)), True),
    "tied, without an embedding": (lambda folder: rewrite(folder, lambda weights: weights.pop(EMBEDDING)), True),
    "without the prefix": (
        lambda folder: rewrite(folder, lambda weights: {n.removeprefix("model."): w for n, w in weights.items()}),
        False,
    ),
}


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.few(5)
def test_both_loaders_read_the_tensors_that_transformers_reads(case: str, copied: Path) -> None:
    from transformers import AutoModelForCausalLM

    change, is_tied = RIGHT[case]
    if change is not None:
        change(copied)
    configure(copied, tie_word_embeddings=is_tied)
    stock = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32).eval()
    expected = tensors_of(stock)
    for load in (load_whole, load_in_shards):
        model = load(copied)
        found = tensors_of(model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (load.__name__, name)
        with torch.no_grad():
            torch.testing.assert_close(model(INPUT_IDS).logits, stock(INPUT_IDS).logits, rtol=0, atol=1e-6)


def test_the_masks_in_a_file_of_an_old_gpt2_may_be_left_over(make_checkpoint: Callable[[str], str]) -> None:
    import shutil

    folder = Path(shutil.copytree(make_checkpoint("gpt2"), "old"))
    expected = load_file(folder / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(2)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-10000.0)
    rewrite(folder, lambda weights: weights.update(masks))
    for load in (load_whole, load_in_shards):
        assert torch.equal(tensors_of(load(folder))["transformer.h.0.mlp.c_fc.weight"], expected)


# Files that are refused, by both loaders in the same words.


def quantized_to(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: weights.update({UP: weights[UP].to(dtype)}))


def cut(num_bytes: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:num_bytes])

    return change


def with_header_length(length: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return change


def indexed(text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        split(folder)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def move(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / file)


def write(file: str, text: str = "{}") -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing part": (
        lambda folder: (folder / split(folder)[1]).unlink(),
        r"lacks model-00002-of-00003.safetensors, which its index names: fetch or copy it again",
    ),
    "a variant alone": (move("model.fp16.safetensors"), r"holds model.fp16.safetensors, but neither.*rename it"),
    "parts without an index": (
        lambda folder: (split(folder), (folder / "model.safetensors.index.json").unlink()),
        r"but neither model.safetensors nor model.safetensors.index.json",
    ),
    "the shards of a training": (move("shard-00000-model-00000-of-00002.safetensors"), "shards of a training run"),
    "an index that is cut": (indexed('{"metadata": {'), r"index.json is not valid JSON"),
    "an index that is nested": (indexed('{"a":' * 100_000), r"index.json is not valid JSON"),
    "an index that is a list": (indexed("[]"), r"index.json is damaged: it must hold 'metadata'"),
    "an index of no files": (indexed('{"metadata": {}, "weight_map": {}}'), r"index.json is damaged"),
    "an index of numbers": (indexed('{"metadata": {}, "weight_map": {"a": 1}}'), r"index.json is damaged"),
    "an index without metadata": (indexed('{"weight_map": {"a": "a.safetensors"}}'), r"index.json is damaged"),
    "an index that leads away": (
        indexed('{"metadata": {}, "weight_map": {"a": "../copied/a.safetensors"}}'),
        r"names '../copied/a.safetensors', which is outside its folder",
    ),
    "an adapter beside it": (write("adapter_config.json"), r"holds an adapter.*merge it into its base model first"),
    "an adapter alone": (
        lambda folder: (write("adapter_config.json")(folder), (folder / "config.json").unlink()),
        r"holds an adapter.*merge it into its base model first",
    ),
    "int8": (quantized_to(torch.int8), r"1 quantized tensors \(model.layers.1.mlp.up_proj.weight is I8\)"),
    "uint8": (quantized_to(torch.uint8), r"1 quantized tensors \(model.layers.1.mlp.up_proj.weight is U8\)"),
    "FP8": (quantized_to(torch.float8_e4m3fn), r"1 quantized tensors \(model.layers.1.mlp.up_proj.weight is F8_E4M3\)"),
    "FP8 of the other kind": (quantized_to(torch.float8_e5m2), r"1 quantized tensors .* is F8_E5M2\)"),
    "an empty file": (cut(0), r"A weight file of '.*copied' is damaged: fetch or copy it again"),
    "half a header": (cut(200), r"A weight file of '.*copied' is damaged"),
    "a byte less": (cut(-1), r"A weight file of '.*copied' is damaged"),
    "a header that is too long": (with_header_length(10**12), r"A weight file of '.*copied' is damaged"),
    "a header that is too short": (with_header_length(8), r"A weight file of '.*copied' is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_the_weights_are_refused_in_the_same_sentence_by_both_loaders(
    case: str, copied: Path
) -> None:
    change, expected = REFUSED[case]
    change(copied)
    messages = set()
    for load in (load_whole, load_in_shards):
        with pytest.raises((ValueError, OSError), match=expected) as raised:
            load(copied)
        messages.add(str(raised.value))
    assert len(messages) == 1
    assert "\n" not in next(iter(messages))


@both
def test_without_the_head_that_an_untied_config_wants_nothing_is_loaded(load: Callable[..., Any], copied: Path) -> None:
    configure(copied, tie_word_embeddings=False)
    rewrite(copied, lambda weights: weights.pop(HEAD))
    with pytest.raises(ValueError, match=r"are 1 missing \(lm_head.weight\)"):
        load(copied)


@pytest.fixture
def experts(tmp_path: Path) -> tuple[Path, Any]:
    """A folder with a tiny mixture of experts, whose tensors transformers fuses, and the model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 50}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts", model


def test_a_model_whose_tensors_are_converted_is_loaded_whole_and_in_shards(experts: tuple[Path, Any]) -> None:
    folder, model = experts
    for load in (load_whole, load_in_shards):
        found = tensors_of(load(folder))
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
FUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "one norm lost": (lambda weights: weights.pop("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
    "no head": (lambda weights: weights.pop(HEAD), r"1 missing \(lm_head.weight\)"),
    "an expert's matrix lost": (lambda weights: weights.pop(EXPERT), rf"are 1 missing \({EXPERT}\);"),
    "an expert lost": (
        lambda weights: {name: weight for name, weight in weights.items() if ".experts.1." not in name},
        rf"are 3 missing \({EXPERT}, ",
    ),
    "an expert more": (
        lambda weights: weights.update(
            {name.replace(".1.w", ".2.w"): weight.clone() for name, weight in weights.items() if ".experts.1." in name}
        ),
        r"are 3 unexpected \(model.layers.0.block_sparse_moe.experts.2.w1.weight, ",
    ),
    "an expert of another number": (
        lambda weights: {name.replace(".experts.1.", ".experts.7."): weight for name, weight in weights.items()},
        rf"are 3 missing \({EXPERT}, .*, 3 unexpected \(model.layers.0.block_sparse_moe.experts.7.w1.weight",
    ),
    "an expert of another shape": (
        lambda weights: weights.update({EXPERT: torch.ones(23, 16)}),
        rf"are 1 of another shape \({EXPERT} \[23, 16\] for \[24, 16\]\);",
    ),
    "all experts of another shape": (
        lambda weights: weights.update({name: torch.ones(24, 15) for name in weights if ".w1." in name}),
        r"are 2 of another shape \(model.layers.0.block_sparse_moe.experts.0.w1.weight \[24, 15\] for \[24, 16\], ",
    ),
    "a fused parameter beside its experts": (
        lambda weights: weights.update({"model.layers.0.mlp.experts.down_proj": torch.ones(2, 16, 24)}),
        r"are 1 unexpected \(model.layers.0.mlp.experts.down_proj\);",
    ),
    "all experts lost": (
        lambda weights: {name: weight for name, weight in weights.items() if ".experts." not in name},
        r"2 missing \(model.layers.0.mlp.experts.down_proj",
    ),
    "one tensor more": (
        lambda weights: weights.update({"more.weight": torch.ones(1)}),
        r"1 unexpected \(more.weight\)",
    ),
    "another shape": (
        lambda weights: weights.update({HEAD: torch.ones(9, 16)}),
        r"1 of another shape \(lm_head.weight",
    ),
}


@both
@pytest.mark.parametrize("case", FUSED)
@pytest.mark.few(8)
def test_what_is_lost_of_a_model_whose_tensors_are_converted_is_missed_too(
    case: str, load: Callable[..., Any], experts: tuple[Path, Any]
) -> None:
    folder, _ = experts
    change, expected = FUSED[case]
    assert EXPERT in load_file(folder / "model.safetensors")
    rewrite(folder, change)
    with pytest.raises(ValueError, match=expected) as raised:
        load(folder)
    assert is_one_sentence(str(raised.value).replace(", ...", ""))


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.few(3)
def test_models_of_all_kinds_are_read_in_shards_as_transformers_reads_them(kind: str, tmp_path: Path) -> None:
    model = save_in_files(kind, tmp_path / "model")
    sharded = load_in_shards(tmp_path / "model")
    found, expected = tensors_of(sharded), tensors_of(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
