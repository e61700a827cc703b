"""Activations kept beside the scores: against a loop over samples, over batches and after a break."""

import json
from pathlib import Path

import pytest
import torch
from helpers import sentence

from sparc3_lightning.attribution.activations import ACTIVATIONS, ActivationRecorder, Activations
from sparc3_lightning.attribution.progress import Progress, load_progress
from sparc3_lightning.cli import main
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.stages.attribute import Attribution

UP = "model.layers.{}.mlp.up_proj"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"text": sentence(i, 3 + i % 5), "toxicity": 0.95}) for i in range(11)]
    path.write_text("\n".join(lines))
    return path


def attribute(checkpoint: str, prompts: Path, *options: str) -> None:
    data = ["--data", "ToxicPrompts", f"--data.source={prompts}", "--data.num_samples=11"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    main(["attribute", f"--model.checkpoint={checkpoint}", *data, *quiet, *options])


def by_hand(checkpoint: str, prompts: Path) -> dict[str, torch.Tensor]:
    model, tokenizer = load_model(checkpoint, torch.float32), Checkpoint(checkpoint).tokenizer()
    rows: dict[str, list[torch.Tensor]] = {UP.format(layer): [] for layer in range(2)}
    for line in prompts.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        hidden = model(ids, output_hidden_states=True).hidden_states
        for layer, block in enumerate(model.model.layers):
            attended = (
                hidden[layer]
                + block.self_attn(
                    block.input_layernorm(hidden[layer]),
                    position_embeddings=model.model.rotary_emb(hidden[layer], torch.arange(ids.shape[1])[None]),
                    attention_mask=None,
                )[0]
            )
            x = block.post_attention_layernorm(attended)
            activation = block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
            rows[UP.format(layer)].append(activation[0].mean(dim=0))
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize(("method", "batch_size"), [("lrp", 4), ("wanda", 1), ("gradient", 16)])
def test_the_mean_activation_of_each_sample_is_that_of_one_at_a_time(tiny_checkpoint, prompts, method, batch_size):
    attribute(
        tiny_checkpoint, prompts, f"--model.method={method}", f"--data.batch_size={batch_size}",
        "--model.activations=true",
    )  # fmt: skip
    found = Activations.load(Path("lightning_logs/attribute/version_0") / ACTIVATIONS)
    expected = by_hand(tiny_checkpoint, prompts)
    assert found.num_tokens == [3 + i % 5 for i in range(11)]
    assert found.rows.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found.rows[name], rows, rtol=1e-4, atol=1e-6)
    tokens = torch.tensor(found.num_tokens).double()
    for name, mean in found.mean().items():
        over_tokens = (expected[name].double() * tokens[:, None]).sum(dim=0) / tokens.sum()
        torch.testing.assert_close(mean, over_tokens, rtol=1e-4, atol=1e-6)


def test_scores_are_the_same_with_activations_beside_them(tiny_checkpoint, prompts):
    attribute(tiny_checkpoint, prompts)
    attribute(tiny_checkpoint, prompts, "--model.activations=true")
    files = [Path(f"lightning_logs/attribute/version_{i}/scores.safetensors") for i in range(2)]
    from sparc3_lightning.attribution.scores import ScoreFile

    first, second = (ScoreFile.load(file).scores for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (files[0].parent / ACTIVATIONS).exists()


@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_activations_are_the_same_with_gradient_checkpointing(tiny_checkpoint, prompts, method):
    common = ("--model.activations=true", f"--model.method={method}", "--data.batch_size=2")
    attribute(tiny_checkpoint, prompts, *common)
    attribute(tiny_checkpoint, prompts, *common, "--model.gradient_checkpointing=true")
    plain, again = (Activations.load(Path(f"lightning_logs/attribute/version_{i}") / ACTIVATIONS) for i in range(2))
    assert (again.sample_ids, again.num_tokens) == (plain.sample_ids, plain.num_tokens)
    for name, rows in plain.rows.items():
        assert torch.equal(again.rows[name], rows)


def test_rows_of_a_run_that_broke_off_come_first(make_model):
    model = make_model()
    recorder = ActivationRecorder(columns_of(model, [UP.format(0)]))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for row in ids:
        with recorder.recording(None, [1]):
            model(row[None])
    whole = recorder.rows()[UP.format(0)]
    Progress({"run": 1}, {"a": torch.zeros(1)}, ["x"], rows={UP.format(0): whole[:1]}).save(Path(), rank=0)
    state = load_progress(Path())
    assert state is not None
    again = ActivationRecorder(columns_of(model, [UP.format(0)]))
    again.restore(state.rows)
    with again.recording(None, [1, 0]):
        model(ids[[1, 0]])
    assert torch.equal(again.rows()[UP.format(0)], whole)


def test_parts_of_ranks_are_put_in_the_order_of_the_samples():
    parts = [
        (["c", "a"], {"m": torch.tensor([[3.0], [1.0]])}),
        ([], {}),
        (["b"], {"m": torch.tensor([[2.0]])}),
    ]
    joined = Activations.join(parts, {"a": 5, "b": 6, "c": 7})
    assert joined.sample_ids == ["a", "b", "c"]
    assert joined.num_tokens == [5, 6, 7]
    assert joined.rows["m"].flatten().tolist() == [1.0, 2.0, 3.0]


def test_rows_that_are_not_one_a_sample_are_refused():
    with pytest.raises(ValueError, match="4 rows of activations of m are there for 2 samples"):
        Activations.join([(["a", "b"], {"m": torch.zeros(4, 3)})], {"a": 5, "b": 6})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activations": True, "layers": ["o_proj"]}, r"--model.activations true .*--model.layers .*'up_proj'"),
        ({"activations": True, "layers": ["up_proj", "all"]}, r"--model.activations true .*got \['up_proj', 'all'\]"),
        (
            {"activations": True, "granularity": "head"},
            r"--model.activations true .*not for heads.*--model.granularity",
        ),
        ({"activations": True, "method": "random"}, r"--model.method random .*leave out --model.activations"),
        (
            {"method": "activation", "layers": ["mlp.down_proj"]},
            r"--model.method activation .*got \['mlp.down_",
        ),
        ({"method": "activation", "granularity": "head"}, r"--model.method activation is not defined for heads"),
    ],
)
def test_activations_of_what_is_no_neuron_are_refused_by_the_options_alone(options, named):
    with pytest.raises(ValueError, match=named):
        Attribution("no/checkpoint", **options)


@pytest.mark.parametrize("layers", [["mlp.up_proj"], ["model.layers.1.mlp.gate_proj"]])
def test_activations_of_neurons_may_be_asked_for_by_a_longer_name(tiny_checkpoint, prompts, layers):
    attribute(tiny_checkpoint, prompts, "--model.activations=true", f"--model.layers={layers}")
    assert Activations.load(Path("lightning_logs/attribute/version_0") / ACTIVATIONS).rows


def test_a_file_that_is_missing_or_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--model\.activations true"):
        Activations.load(tmp_path / ACTIVATIONS)
    (tmp_path / ACTIVATIONS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is not a safetensors file, or is truncated"):
        Activations.load(tmp_path / ACTIVATIONS)
