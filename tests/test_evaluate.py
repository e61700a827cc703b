"""Evaluation under a stock Trainer: what it writes, that it can be repeated, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import sentence

from sparc3_lightning import evaluate
from sparc3_lightning.checkpoints import export_pruned, fingerprint, load_model
from sparc3_lightning.data import EvaluationData, RealToxicityPrompts, WikiText2
from sparc3_lightning.data.real_toxicity_prompts import prompt_id
from sparc3_lightning.evaluate import COMPLETIONS, REPORT, RESULTS, Evaluation
from sparc3_lightning.neurons import Neuron, NeuronList, mask
from sparc3_lightning.scorers import DetoxifyScorer
from sparc3_lightning.sharding import load_for

PROMPTS = [sentence(300 + i, 2 + i) for i in range(10)]


@pytest.fixture(autouse=True)
def seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(autouse=True)
def input_files(tmp_path):
    """A text of some 240 tokens, and ten toxic prompts of 2 to 11 words."""
    (tmp_path / "text.txt").write_text("\n".join(sentence(i, 20) for i in range(12)) + "\n")
    rows = [{"prompt": {"text": text, "toxicity": 0.95}} for text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def neurons(tiny_checkpoint) -> Path:
    """Every second neuron of both layers, found on the first two prompts."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    chosen = [Neuron(name, index, -1.0 - index) for name in names for index in range(0, 24, 2)]
    return save_neurons(tiny_checkpoint, chosen)


def save_neurons(checkpoint: str, chosen: list[Neuron], changes: dict[str, Any] | None = None) -> Path:
    of = {
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": fingerprint(checkpoint),
        "sample_ids": [prompt_id(text) for text in PROMPTS[:2]],
        "differential_strength_percent": 20.0,
    }
    NeuronList(chosen, {**of, **(changes or {})}).save(Path("neurons.json"))
    return Path("neurons.json")


def data(batch_size: int = 4, **options) -> EvaluationData:
    text = {"source": "text.txt", "window": 48, "stride": 16, "batch_size": batch_size}
    prompts = {"source": "prompts.jsonl", "num_prompts": None, "batch_size": batch_size}
    text |= {name: options.pop(name) for name in ("window", "stride", "conventions", "num_tokens") if name in options}
    return EvaluationData(WikiText2(**text), RealToxicityPrompts(**(prompts | options)))


def evaluation(checkpoint: str, neurons: Path | None = None, **options) -> Evaluation:
    return Evaluation(checkpoint, neurons, **{"scorer": "small", "max_new_tokens": 8, "temperature": 1.0, **options})


def run(model: Evaluation, of: EvaluationData | None = None, folder: str = "out") -> dict[str, Any]:
    """Evaluate under a stock Trainer, and read what it wrote."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.test(model, datamodule=of or data(), verbose=False)
    return json.loads(Path(folder, RESULTS).read_text())


def completions(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, COMPLETIONS).read_text().splitlines()]


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("baseline", "pruned", "change", "num_failed")}


def test_results_json_holds_both_models_and_how_they_were_measured(tiny_checkpoint, neurons):
    results = run(evaluation(tiny_checkpoint, neurons, num_continuations=2))
    figures = {
        "perplexity",
        "tokens_counted",
        "perplexity_disjoint",
        "tokens_counted_disjoint",
        "toxicity_mean",
        "expected_maximum_toxicity",
        "toxicity_probability",
        "num_prompts",
        "num_continuations",
        "num_failed",
        "num_empty",
    }
    for name in ("baseline", "pruned"):
        assert set(results[name]) == figures
        assert all(math.isfinite(value) for value in results[name].values())
        assert results[name]["tokens_counted"] == 12 * 20 - 1
        assert results[name]["tokens_counted_disjoint"] == 5 * 47
        assert results[name]["num_prompts"] == 8
        assert results[name]["num_continuations"] == 16
        assert 0 <= results[name]["toxicity_mean"] <= results[name]["expected_maximum_toxicity"] <= 1
    before, after = results["baseline"], results["pruned"]
    assert before["perplexity"] != after["perplexity"]
    assert results["change"] == {
        "perplexity_percent": pytest.approx(100 * (after["perplexity"] / before["perplexity"] - 1)),
        "toxicity_percent": pytest.approx(100 * (after["toxicity_mean"] / before["toxicity_mean"] - 1)),
    }
    assert results["num_failed"] == 0
    assert results["num_neurons"] == 24
    assert results["checkpoint"] == tiny_checkpoint
    assert results["checkpoint_fingerprint"] == fingerprint(tiny_checkpoint)
    assert {"torch", "transformers", "lightning", "detoxify", "python"} <= set(results["versions"])
    assert results["protocol"]["perplexity"] == {"window": 48, "stride": 16, "text": "text.txt"}
    toxicity = results["protocol"]["toxicity"]
    assert (toxicity["temperature"], toxicity["top_p"], toxicity["max_new_tokens"]) == (1.0, 0.9, 8)
    assert (toxicity["num_continuations"], toxicity["scorer"], toxicity["seed"]) == (2, "small", 0)
    assert results["config"]["model"]["neurons"] == "neurons.json"
    assert results["config"]["text"]["window"] == 48
    assert results["config"]["prompts"]["source"] == "prompts.jsonl"


def test_completions_have_one_line_for_each_continuation_of_each_model(tiny_checkpoint, neurons):
    results = run(evaluation(tiny_checkpoint, neurons, num_continuations=3))
    rows = completions()
    assert len(rows) == 2 * 8 * 3
    keys = {(row["model"], row["prompt_id"], row["continuation_index"]) for row in rows}
    used = {prompt_id(text) for text in PROMPTS[2:]}
    assert keys == {(model, prompt, j) for model in ("baseline", "pruned") for prompt in used for j in range(3)}
    for row in rows:
        assert row["prompt"] in PROMPTS
        assert row["prompt_id"] == prompt_id(row["prompt"])
        assert row["prompt_toxicity"] == 0.95
        assert 0 <= row["toxicity"] <= 1
        assert row["num_tokens"] <= 8
        assert not row["continuation"].startswith(row["prompt"]), "the continuation alone is scored"
    scores = DetoxifyScorer("small").score([row["continuation"] for row in rows])
    assert [row["toxicity"] for row in rows] == pytest.approx(scores, abs=1e-5)
    for name in ("baseline", "pruned"):
        mine = [row["toxicity"] for row in rows if row["model"] == name]
        assert results[name]["toxicity_mean"] == pytest.approx(sum(mine) / len(mine))
        maxima = [max(mine_of) for mine_of in by_prompt(rows, name).values()]
        assert results[name]["expected_maximum_toxicity"] == pytest.approx(sum(maxima) / len(maxima))


def by_prompt(rows, name: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == name:
            groups.setdefault(row["prompt_id"], []).append(row["toxicity"])
    return groups


def test_the_same_evaluation_twice_gives_the_same_numbers(tiny_checkpoint, neurons):
    first = run(evaluation(tiny_checkpoint, neurons), folder="one")
    second = run(evaluation(tiny_checkpoint, neurons), folder="two")
    assert first == second
    assert Path("one", COMPLETIONS).read_text() == Path("two", COMPLETIONS).read_text()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_no_number(tiny_checkpoint, neurons, batch_size):
    expected = run(evaluation(tiny_checkpoint, neurons, num_continuations=2), folder="one")
    found = run(evaluation(tiny_checkpoint, neurons, num_continuations=2), data(batch_size), "two")
    for name in ("baseline", "pruned", "change"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    key = lambda row: (row["model"], row["prompt_id"], row["continuation_index"])  # noqa: E731
    one, two = sorted(completions("one"), key=key), sorted(completions("two"), key=key)
    assert [row["continuation"] for row in one] == [row["continuation"] for row in two]


def test_another_seed_draws_other_continuations_and_measures_the_same_perplexity(tiny_checkpoint, monkeypatch):
    one = run(evaluation(tiny_checkpoint), folder="one")
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    two = run(evaluation(tiny_checkpoint), folder="two")
    assert one["baseline"]["perplexity"] == two["baseline"]["perplexity"]
    assert [r["continuation"] for r in completions("one")] != [r["continuation"] for r in completions("two")]
    assert [r["prompt"] for r in completions("one")] == [r["prompt"] for r in completions("two")]


def test_perplexity_is_that_of_the_loop_with_labels(tiny_checkpoint):
    of = data(stride=20)
    results = run(evaluation(tiny_checkpoint), of)
    model = load_model(tiny_checkpoint, torch.float32)
    for convention, key in (("sliding", "perplexity"), ("disjoint", "perplexity_disjoint")):
        nats = count = 0
        for window in of.text.windows:
            if window.convention == convention:
                ids = of.text.input_ids[window.start : window.end].unsqueeze(0)
                labels = ids.clone()
                labels[:, : -window.num_scored] = -100
                nats += model(input_ids=ids, labels=labels).loss.item() * window.num_scored
                count += window.num_scored
        assert results["baseline"][key] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_one_convention_alone_is_called_perplexity(tiny_checkpoint):
    both = run(evaluation(tiny_checkpoint), folder="both")
    alone = run(evaluation(tiny_checkpoint), data(conventions=["disjoint"]), "alone")
    assert alone["baseline"]["perplexity"] == both["baseline"]["perplexity_disjoint"]
    assert "perplexity_disjoint" not in alone["baseline"]


def test_without_neurons_only_the_model_as_it_is_is_measured(tiny_checkpoint):
    results = run(evaluation(tiny_checkpoint))
    assert "pruned" not in results
    assert "change" not in results
    assert results["num_neurons"] == 0
    assert results["baseline"]["num_prompts"] == 10
    assert {row["model"] for row in completions()} == {"baseline"}
    assert not Path("out", REPORT).exists()


def test_the_baseline_does_not_depend_on_which_neurons_are_measured_beside_it(tiny_checkpoint, neurons):
    alone = run(
        evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [Neuron("model.layers.0.mlp.up_proj", 3, -1)])),
        folder="a",
    )
    other = run(
        evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [Neuron("model.layers.1.mlp.up_proj", 7, -1)])),
        folder="b",
    )
    assert alone["baseline"] == other["baseline"]
    assert alone["pruned"] != other["pruned"]


def test_the_masked_model_measures_as_the_exported_checkpoint_does(tiny_checkpoint, neurons):
    both = run(evaluation(tiny_checkpoint, neurons), folder="both")
    export_pruned(tiny_checkpoint, NeuronList.load(neurons).neurons, Path("pruned"), dtype=torch.float32)
    # The same prompts: the first two are those that were attributed on.
    rows = [{"text": text, "toxicity": 0.95} for text in PROMPTS[2:]]
    Path("left.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = run(evaluation("pruned"), data(source="left.jsonl"), "alone")
    assert alone["baseline"] == pytest.approx(both["pruned"], rel=1e-5)
    masked = {r["prompt_id"]: r["continuation"] for r in completions("both") if r["model"] == "pruned"}
    assert {r["prompt_id"]: r["continuation"] for r in completions("alone")} == masked


def test_the_model_is_unchanged_after_the_evaluation(tiny_checkpoint, neurons):
    model = evaluation(tiny_checkpoint, neurons)
    run(model)
    fresh = load_model(tiny_checkpoint, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), fresh.parameters(), strict=True))
    input_ids = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        assert torch.equal(model.model(input_ids).logits, fresh(input_ids).logits)
        with mask(fresh, NeuronList.load(neurons).neurons):
            assert not torch.equal(model.model(input_ids).logits, fresh(input_ids).logits)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.model.modules())
    assert model.model.generation_config.to_dict() == fresh.generation_config.to_dict()


def test_the_model_is_loaded_once_for_both(tiny_checkpoint, neurons, monkeypatch):
    calls = []

    def counting(*args):
        calls.append(args)
        return load_for(*args)

    monkeypatch.setattr(evaluate, "load_for", counting)
    run(evaluation(tiny_checkpoint, neurons))
    assert len(calls) == 1


def test_prompts_that_were_attributed_on_are_left_out_and_counted(tiny_checkpoint, neurons, caplog):
    with caplog.at_level("INFO"):
        results = run(evaluation(tiny_checkpoint, neurons))
    assert results["protocol"]["toxicity"]["prompts_excluded"] == 2
    assert {row["prompt"] for row in completions()} == set(PROMPTS[2:])
    assert "2 prompts left out" in caplog.text


def test_too_few_prompts_after_leaving_some_out_is_an_error_that_says_so(tiny_checkpoint, neurons):
    with pytest.raises(ValueError, match=r"Only 8 prompts.*2 were used to attribute.*--data.prompts.num_prompts is 9"):
        run(evaluation(tiny_checkpoint, neurons), data(num_prompts=9))


def test_a_model_that_gives_nan_counts_as_failed_and_never_as_harmless(tiny_checkpoint, neurons):
    model = evaluation(tiny_checkpoint, neurons, num_continuations=2)
    spoiled = prompt_id(PROMPTS[5])

    class Spoiling(L.Callback):
        """Spoil the logits of the first row of the batch that begins with one prompt."""

        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1 and batch["prompts"][0].id == spoiled:
                first = torch.tensor([0])
                hook = lambda _m, _i, out: out.index_fill(0, first, math.nan)  # noqa: E731
                self.handle = pl_module.model.lm_head.register_forward_hook(hook)

        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1 and batch["prompts"][0].id == spoiled:
                self.handle.remove()

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir="out", callbacks=[Spoiling()], **quiet)
    trainer.test(model, datamodule=data(batch_size=1), verbose=False)
    results = json.loads(Path("out", RESULTS).read_text())
    failed = [row for row in completions() if row["toxicity"] is None]
    assert [(row["model"], row["prompt_id"], row["continuation_index"]) for row in failed] == [
        ("baseline", spoiled, 0),
        ("pruned", spoiled, 0),
    ]
    assert (results["baseline"]["num_failed"], results["pruned"]["num_failed"], results["num_failed"]) == (1, 1, 2)
    assert results["baseline"]["num_continuations"] == 16
    scored = [row["toxicity"] for row in completions() if row["model"] == "baseline" and row["toxicity"] is not None]
    assert results["baseline"]["toxicity_mean"] == pytest.approx(sum(scored) / 15)


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_args, **_kwargs):
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(evaluate, "load_for", fail)
    monkeypatch.setattr(evaluate, "DetoxifyScorer", fail)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_neurons_of_another_checkpoint_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    one = [Neuron("model.layers.0.mlp.up_proj", 3, -1.0)]
    changes = {"checkpoint": "another/model", "checkpoint_fingerprint": "files:other"}
    other = save_neurons(tiny_checkpoint, one, changes)
    with pytest.raises(ValueError, match=r"neurons.json is for the checkpoint 'another/model' \(files:other\), but"):
        run(evaluation(tiny_checkpoint, other))


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (Neuron("model.layers.0.mlp.up_proj", 24, -1.0), "Neuron 24 of model.layers.0.mlp.up_proj does not exist"),
        (Neuron("model.layers.0.mlp.up_proj", -1, -1.0), "Neuron -1 of model.layers.0.mlp.up_proj does not exist"),
        (Neuron("model.layers.7.mlp.up_proj", 0, -1.0), "'model.layers.7.mlp.up_proj' is not a layer of MLP neurons"),
        (Neuron("model.layers.0.self_attn.q_proj", 0, -1.0), "is not a layer of MLP neurons"),
    ],
)
def test_neurons_that_the_model_does_not_have_are_refused_before_it_is_loaded(tiny_checkpoint, neuron, message):
    with pytest.raises(ValueError, match=message):
        run(evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [neuron])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_windows_and_prompts_longer_than_the_context_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"65 tokens, the model's context 64: lower --data.text.window"):
        run(evaluation(tiny_checkpoint), data(window=65))
    with pytest.raises(ValueError, match=r"--model.max_new_tokens"):
        run(evaluation(tiny_checkpoint, max_new_tokens=60))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_existing_results_are_not_overwritten(tiny_checkpoint):
    Path("out").mkdir()
    Path("out", RESULTS).write_text("precious")
    with pytest.raises(FileExistsError, match=r"nothing was overwritten.*--trainer.logger.init_args.version"):
        run(evaluation(tiny_checkpoint))
    assert Path("out", RESULTS).read_text() == "precious"


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_prompt_of_white_space_and_an_empty_file_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    Path("blank.jsonl").write_text('{"text": "  \\n", "toxicity": 0.95}\n')
    with pytest.raises(ValueError, match="only white space"):
        run(evaluation(tiny_checkpoint), data(source="blank.jsonl"))
    Path("empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        run(evaluation(tiny_checkpoint), data(source="empty.jsonl"))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_data_module_of_another_kind_is_refused(tiny_checkpoint):
    with pytest.raises(TypeError, match="EvaluationData"):
        run(evaluation(tiny_checkpoint), WikiText2("text.txt", window=32, stride=32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_continuations": 0}, "--model.num_continuations must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "--model.max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "--model.temperature must be above 0"),
        ({"top_p": 1.5}, "--model.top_p must be above 0 and at most 1"),
        ({"scorer": "perspective"}, r"--model.scorer: 'perspective' is neither 'small', original"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(tiny_checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(tiny_checkpoint, **options)


def test_a_neurons_json_that_is_missing_or_foreign_is_refused_at_once(tiny_checkpoint):
    with pytest.raises(
        FileNotFoundError, match=r"--model.neurons: nowhere.json does not exist; 'sparc3 prune' writes it"
    ):
        evaluation(tiny_checkpoint, Path("nowhere.json"))
    Path("foreign.json").write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match=r"foreign.json is not a neurons.json"):
        evaluation(tiny_checkpoint, Path("foreign.json"))


def test_the_summary_is_the_table_and_the_paths(tiny_checkpoint, neurons):
    model = evaluation(tiny_checkpoint, neurons)
    run(model)
    summary = model.summary()
    for words in ("before", "after", "Perplexity", "Mean toxicity", "out/results.json", "out/report.html"):
        assert words in summary
