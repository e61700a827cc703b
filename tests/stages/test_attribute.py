"""The predict loop that scores neurons: under a stock Trainer, against a naive oracle, and on bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import WORDS, sentence, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparc3_lightning.attribution.accumulator import NonfiniteRelevanceError
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.scores import Provenance, ScoreFile
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.stages import attribute
from sparc3_lightning.stages.attribute import SCORES, Attribution

UP_PROJ = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


@pytest.fixture(autouse=True)
def seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def documents(tmp_path) -> str:
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(sentence(i, 10 + 3 * i) for i in range(10)) + "\n")
    return str(path)


@pytest.fixture
def prompts(tmp_path) -> str:
    """Seven toxic prompts of 2 to 20 words, and three harmless ones."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"text": sentence(100 + i, 2 + 3 * i), "toxicity": 0.95} for i in range(7)]
    rows += [{"text": sentence(200 + i, 5), "toxicity": 0.1} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def scores_of(model: Attribution, data: L.LightningDataModule, folder: str = "out") -> ScoreFile:
    trainer(folder).predict(model, datamodule=data, return_predictions=False)
    return ScoreFile.load(Path(folder) / SCORES)


def naive_scores(checkpoint: str, samples: list[list[int]], rule: str, relevance: str) -> dict[str, torch.Tensor]:
    """One sample at a time, all logits, with the gradient of the weights themselves, in float64."""
    model = load_model(checkpoint, torch.float64)
    sums = {name: torch.zeros(24, dtype=torch.float64) for name in UP_PROJ}
    for input_ids in samples:
        for name in UP_PROJ:
            model.get_submodule(name).weight.requires_grad_().grad = None
        with lrp(model, rule):
            model(torch.tensor([input_ids]), use_cache=False).logits[0, -1].max().backward()
        for name in UP_PROJ:
            weight = model.get_submodule(name).weight
            product = weight.detach() * weight.grad
            sums[name] += (product.abs() if relevance == "magnitude" else product).sum(dim=1)
    return {name: total / len(samples) for name, total in sums.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[n].double(), b[n].double(), rtol=rtol, atol=rtol * float(b[n].abs().max())) for n in a
    )


def test_a_stock_trainer_writes_scores_with_shapes_and_a_full_header(tiny_checkpoint, documents):
    data = C4(documents, num_samples=3, seq_len=24, seed=5, batch_size=2)
    trainer().predict(Attribution(tiny_checkpoint), datamodule=data)
    with safe_open("out/scores.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == UP_PROJ
        assert all(file.get_tensor(name).shape == (24,) for name in UP_PROJ)
        assert all(file.get_tensor(name).dtype == torch.float32 for name in UP_PROJ)
        header = json.loads(file.metadata()["provenance"])
    spec = header.pop("spec")
    assert {*header, "spec"} == set(Provenance.__dataclass_fields__)
    assert set(spec) == set(ScoreSpec.__dataclass_fields__)
    header |= spec
    lengths = [10 + 3 * i for i in range(10)]
    expected = {
        "checkpoint": tiny_checkpoint,
        "checkpoint_fingerprint": Checkpoint(tiny_checkpoint).fingerprint,
        "method": "lrp",
        "rule": "attnlrp",
        "relevance": "magnitude",
        "layers": ["up_proj"],  # what the default stands for
        "dtype": "float32",
        "data_fingerprint": data.fingerprint(),
        "num_samples": 3,
        "num_tokens": 3 * 24,
        "seq_len": 24,
        "seed": 0,
        "num_nonfinite": 0,
    }
    assert {name: header[name] for name in expected} == expected
    assert len(set(header["sample_ids"])) == 3
    options = header["data"]
    assert (options["class"], options["source"], options["seed"], options["crop"]) == ("C4", documents, 5, "head")
    assert options["num_too_short"] <= sum(length < 24 for length in lengths)
    assert {"torch", "lightning", "transformers", "lxt", "sparc3_lightning", "python"} <= set(header["versions"])


def test_progress_is_logged_to_tensorboard_beside_the_scores(tiny_checkpoint, prompts):
    logger = TensorBoardLogger("logs", name="attribute")
    model = Attribution(tiny_checkpoint)
    trainer(logger=logger).predict(model, datamodule=ToxicPrompts(prompts, num_samples=4, batch_size=2))
    folder = Path("logs/attribute/version_0")
    assert model.output == folder / SCORES
    assert (folder / SCORES).is_file()
    assert list(folder.glob("events.out.tfevents.*"))
    assert str(folder / SCORES) in model.summary()


@pytest.mark.parametrize("relevance", ["magnitude", "signed"])
@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
def test_scores_equal_one_backward_pass_per_sample_with_weight_gradients(tiny_checkpoint, prompts, rule, relevance):
    data = ToxicPrompts(prompts, num_samples=7, batch_size=3)
    model = Attribution(tiny_checkpoint, rule=rule, relevance=relevance, dtype="float64")
    found = scores_of(model, data).scores
    expected = naive_scores(tiny_checkpoint, [sample.input_ids for sample in data.samples], rule, relevance)
    assert same(found, expected, 1e-6)


def test_wanda_scores_equal_the_norm_over_all_tokens_of_all_samples(tiny_checkpoint, prompts):
    data = ToxicPrompts(prompts, num_samples=7, batch_size=4)
    found = scores_of(Attribution(tiny_checkpoint, method="wanda", dtype="float64"), data)
    model = load_model(tiny_checkpoint, torch.float64)
    for name in UP_PROJ:
        inputs = []
        layer = model.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0][0]))
        for sample in data.samples:
            model(torch.tensor([sample.input_ids]))
        handle.remove()
        norms = torch.cat(inputs).norm(dim=0)
        expected = (layer.weight.abs() * norms).sum(dim=1)
        assert torch.allclose(found.scores[name].double(), expected, rtol=1e-6)
    spec = found.provenance.spec
    assert (spec.method, spec.rule, spec.relevance) == ("wanda", None, None)


@pytest.mark.parametrize(
    "options", [{}, {"relevance": "signed"}, {"method": "wanda"}], ids=["magnitude", "signed", "wanda"]
)
def test_any_batch_size_gives_the_same_scores(tiny_checkpoint, prompts, options):
    scores = {}
    for size in (1, 3, 7, 100):
        data = ToxicPrompts(prompts, num_samples=7, batch_size=size)
        model = Attribution(tiny_checkpoint, dtype="float64", **options)
        scores[size] = scores_of(model, data, f"out{size}")
    for size in (3, 7, 100):
        assert same(scores[size].scores, scores[1].scores, 1e-6)
        assert scores[size].provenance.num_samples == 7
        assert scores[size].provenance.data_fingerprint == scores[1].provenance.data_fingerprint


def test_methods_relevances_and_rules_give_different_scores(tiny_checkpoint, prompts):
    variants = {
        "magnitude": {},
        "signed": {"relevance": "signed"},
        "cp_lrp": {"rule": "cp_lrp"},
        "cp_lrp signed": {"rule": "cp_lrp", "relevance": "signed"},
        "wanda": {"method": "wanda"},
    }
    found = {
        name: scores_of(Attribution(tiny_checkpoint, **options), ToxicPrompts(prompts, num_samples=4), name).scores
        for name, options in variants.items()
    }
    names = list(found)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not same(found[one], found[other], 1e-2), (one, other)
    assert all((score >= 0).all() for score in found["magnitude"].values())
    assert any((score < 0).any() for score in found["signed"].values())


def test_several_targets_are_scored_at_once_each_as_if_alone(tiny_checkpoint, prompts):
    def run(layers, folder):
        return scores_of(Attribution(tiny_checkpoint, layers=layers), ToxicPrompts(prompts, num_samples=4), folder)

    both = run(["gate_proj", "down_proj"], "both")
    assert {name.rpartition(".")[2] for name in both.scores} == {"gate_proj", "down_proj"}
    assert {name: len(score) for name, score in both.scores.items() if "layers.0" in name} == {
        "model.layers.0.mlp.gate_proj": 24,
        "model.layers.0.mlp.down_proj": 16,
    }
    alone = run(["gate_proj"], "alone")
    assert same({name: both.scores[name] for name in alone.scores}, alone.scores)
    assert both.provenance.spec.layers == ["gate_proj", "down_proj"]


def test_the_same_run_twice_gives_the_same_bits(tiny_checkpoint, documents):
    def run(folder):
        return scores_of(Attribution(tiny_checkpoint), C4(documents, num_samples=4, seq_len=16, batch_size=2), folder)

    first, second = run("one"), run("two")
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in UP_PROJ)
    assert first.provenance == second.provenance


def test_the_model_is_as_it_was_after_attribution(tiny_checkpoint, prompts):
    model = Attribution(tiny_checkpoint)
    scores_of(model, ToxicPrompts(prompts, num_samples=4))
    fresh = load_model(tiny_checkpoint, torch.float32)
    input_ids = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        assert torch.equal(model.model(input_ids).logits, fresh(input_ids).logits)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.model.modules())
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_largest_logit_is_that_of_the_last_token_before_the_padding(make_model):
    model = make_model()
    rows = [[1, 10, 20, 30, 40], [1, 50], [1, 60, 70]]
    input_ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in rows])
    expected = [model(torch.tensor([row])).logits[0, -1].max().item() for row in rows]
    assert largest_logit(model, input_ids, mask).tolist() == pytest.approx(expected, rel=1e-12)


def test_inference_mode_is_refused_with_the_way_out(tiny_checkpoint, prompts):
    stock = trainer(inference_mode=True)
    with pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
        stock.predict(Attribution(tiny_checkpoint), datamodule=ToxicPrompts(prompts, num_samples=2))
    assert not Path("out", SCORES).exists()


def test_wanda_needs_no_gradient_and_so_runs_in_inference_mode(tiny_checkpoint, prompts):
    stock = trainer(inference_mode=True)
    stock.predict(Attribution(tiny_checkpoint, method="wanda"), datamodule=ToxicPrompts(prompts, num_samples=2))
    assert Path("out", SCORES).is_file()


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_args, **_kwargs):
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(attribute, "load_for", fail)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_sample_longer_than_the_context_is_refused_before_the_model_is_loaded(tiny_checkpoint, tmp_path):
    (tmp_path / "long.txt").write_text(sentence(0, 70))
    with pytest.raises(ValueError, match=r"65 tokens.* context 64.*--data.seq_len"):
        trainer().predict(Attribution(tiny_checkpoint), datamodule=C4("long.txt", num_samples=1, seq_len=65))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_prompt_longer_than_the_context_is_refused_with_its_own_way_out(tiny_checkpoint):
    Path("long.jsonl").write_text(json.dumps({"text": sentence(0, 70), "toxicity": 0.95}))
    with pytest.raises(ValueError, match=r"70 tokens, the model's context 64: .* --data.leave_out_long true\.$"):
        trainer().predict(Attribution(tiny_checkpoint), datamodule=ToxicPrompts("long.jsonl", num_samples=1))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_existing_scores_are_not_overwritten(tiny_checkpoint, documents):
    Path("out").mkdir()
    Path("out", SCORES).write_text("precious")
    with pytest.raises(FileExistsError, match=r"nothing was overwritten.*--trainer.logger.init_args.version"):
        trainer().predict(Attribution(tiny_checkpoint), datamodule=C4(documents, num_samples=2, seq_len=8))
    assert Path("out", SCORES).read_text() == "precious"


@pytest.mark.usefixtures("no_model_is_loaded")
def test_too_few_documents_are_an_error_before_the_model_is_loaded(tiny_checkpoint, documents):
    with pytest.raises(ValueError, match=r"Only \d of 10 documents have at least 30 tokens"):
        trainer().predict(Attribution(tiny_checkpoint), datamodule=C4(documents, num_samples=10, seq_len=30))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_float16_is_refused_for_lrp_before_the_model_is_loaded(tiny_checkpoint, documents):
    data = C4(documents, num_samples=2, seq_len=8)
    with pytest.raises(ValueError, match=r"float16.*--model\.dtype bfloat16"):
        trainer().predict(Attribution(tiny_checkpoint, dtype="float16"), datamodule=data)


def test_what_a_short_sample_shows_about_the_rules_is_told_and_written(tiny_checkpoint, documents, caplog):
    found = scores_of(Attribution(tiny_checkpoint), C4(documents, num_samples=2, seq_len=8))
    line = "LRP: logits unchanged; 100.0 % of the relevance conserved under CP attention; 2 of 2 layers reached"
    assert found.provenance.lrp_check == line
    assert line in caplog.text
    other = scores_of(Attribution(tiny_checkpoint, method="gradient"), C4(documents, num_samples=2, seq_len=8), "other")
    assert other.provenance.lrp_check is None


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_checkpoint_that_is_not_there_is_refused(documents):
    with pytest.raises(OSError, match=r"nowhere/at/all.*does not exist"):
        trainer().predict(Attribution("./nowhere/at/all"), datamodule=C4(documents, num_samples=2, seq_len=8))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(tiny_checkpoint, documents):
    Path("out").write_text("a file, not a folder")
    with pytest.raises(OSError, match="Cannot write to the output folder out"):
        trainer().predict(Attribution(tiny_checkpoint), datamodule=C4(documents, num_samples=2, seq_len=8))


def test_a_data_module_of_another_kind_is_refused(tiny_checkpoint):
    class Other(L.LightningDataModule):
        def predict_dataloader(self):
            return []

    with pytest.raises(TypeError, match=r"C4, ToxicPrompts"):
        trainer().predict(Attribution(tiny_checkpoint), datamodule=Other())


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["gate_proj"], r"gate_proj: give --model.layers of other layers"),
        (["self_attn.q_proj", "k_proj", "up_proj"], r"k_proj, q_proj: give --model.layers '\[up_proj\]'"),
        (["all"], r"gate_proj, k_proj, q_proj: give --model.layers '\[down_proj, o_proj, up_proj, v_proj\]'"),
    ],
)
def test_targets_that_cp_lrp_passes_no_relevance_through_are_refused(tiny_checkpoint, prompts, layers, named):
    model = Attribution(tiny_checkpoint, rule="cp_lrp", layers=layers)
    with pytest.raises(ValueError, match=rf"--model.rule cp_lrp passes no relevance through {named}"):
        scores_of(model, ToxicPrompts(prompts, num_samples=2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt"])
@pytest.mark.few(2)
def test_the_layers_that_cp_lrp_leaves_have_relevance_in_every_family(
    make_checkpoint, tiny_checkpoint, prompts, family
):
    none = {"gate_proj", "q_proj", "k_proj"}
    checkpoint = make_checkpoint(family)
    linear = find_layers(load_model(checkpoint, torch.float32), ["all"])
    left = sorted({name.rpartition(".")[2] for name in linear} - none)
    model = Attribution(checkpoint, rule="cp_lrp", layers=left)
    # transformers takes any tokenizer of a Qwen2 for its own kind, to which these words are nothing.
    found = scores_of(model, ToxicPrompts(prompts, num_samples=2, tokenizer=tiny_checkpoint)).scores
    assert all(score.count_nonzero() for score in found.values())


@pytest.mark.usefixtures("no_model_is_loaded")
def test_an_unknown_target_is_refused_with_the_names_there_are(tiny_checkpoint, prompts):
    with pytest.raises(ValueError, match=r"--model.layers.*'fc1'.*'down_proj'.*'up_proj'"):
        scores_of(Attribution(tiny_checkpoint, layers=["up_proj", "fc1"]), ToxicPrompts(prompts, num_samples=2))
    with pytest.raises(ValueError, match=r"--model.layers must name at least one"):
        Attribution(tiny_checkpoint, layers=[])


def test_targets_are_found_in_every_block(make_model):
    assert list(find_layers(make_model(num_hidden_layers=3), ["up_proj"])) == [
        f"model.layers.{i}.mlp.up_proj" for i in range(3)
    ]


def test_a_context_that_the_config_does_not_state_is_not_checked(make_model, monkeypatch):
    configs = (
        (make_model().config, 64),
        (SimpleNamespace(max_position_embeddings=None), 10**6),
        (SimpleNamespace(), 10**6),
    )
    for config, num_tokens in configs:
        monkeypatch.setattr(Checkpoint, "config", config)
        Checkpoint("any").check_context(num_tokens, "")


@pytest.fixture
def spoiled_checkpoint(tiny_checkpoint, tmp_path) -> str:
    """A copy whose embedding of the word 'fire' holds a NaN."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "spoiled")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][4 + WORDS.index("fire"), 3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def spoiled_prompts(tmp_path) -> str:
    texts = [
        "the dog and the cat",
        "a fire in the house",
        "you are good",
        "fire fire",
        "she would love the moon and the sun",
    ]
    path = tmp_path / "spoiled.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "toxicity": 1.0}) for text in texts))
    return str(path)


@pytest.mark.parametrize("method", ["lrp", "wanda"])
def test_a_nan_stops_with_the_name_of_the_module_and_the_sample(spoiled_checkpoint, spoiled_prompts, method):
    data = ToxicPrompts(spoiled_prompts, num_samples=5, batch_size=5)
    with pytest.raises(NonfiniteRelevanceError, match=r"up_proj.*--model.nonfinite zero") as caught:
        scores_of(Attribution(spoiled_checkpoint, method=method), data)
    spoiled = [sample.id for sample in data.samples if 4 + WORDS.index("fire") in sample.input_ids]
    assert len(spoiled) == 2
    assert any(name in str(caught.value) for name in spoiled)
    assert not Path("out", SCORES).exists()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_nan_is_replaced_counted_and_reported_when_asked(
    tiny_checkpoint, spoiled_checkpoint, spoiled_prompts, batch_size
):
    data = ToxicPrompts(spoiled_prompts, num_samples=5, batch_size=batch_size)
    model = Attribution(spoiled_checkpoint, nonfinite="zero", dtype="float64")
    found = scores_of(model, data)
    fire = 4 + WORDS.index("fire")
    clean = [sample.input_ids for sample in data.samples if fire not in sample.input_ids]
    expected = naive_scores(tiny_checkpoint, clean, "attnlrp", "magnitude")
    assert same(found.scores, {name: score * 3 / 5 for name, score in expected.items()}, 1e-6)
    assert found.provenance.num_nonfinite == 2 * 2 * 24
    assert found.provenance.num_samples == 5
    assert "96 values were NaN" in model.summary()
