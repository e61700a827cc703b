"""Evaluation under a stock Trainer: what it measures and writes, and that it can be repeated."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from evaluations import (
    EVERY_SECOND,
    PROMPTS,
    PRUNED,
    UP,
    completions,
    data,
    evaluation,
    flat,
    perplexity_of,
    run,
    save_neurons,
    toxic,
    write_inputs,
)
from helpers import ids_of

from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.generation import Sampling, SamplingOptions
from sparc3_lightning.evaluation.zero_shot import ZeroShot
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.sharding import load_for
from sparc3_lightning.scorers.detoxify import DetoxifyScorer
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages import evaluate
from sparc3_lightning.stages.evaluate import COMPLETIONS, REPORT, Evaluation

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")


class Measured(NamedTuple):
    """An evaluation without options, and what it wrote; a test leaves all of it as it is."""

    model: Evaluation
    results: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def both(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The model as it is, and without every second neuron."""
    return measured_in(tmp_path_factory.mktemp("both"), tiny_checkpoint, EVERY_SECOND)


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The model as it is alone."""
    return measured_in(tmp_path_factory.mktemp("baseline"), tiny_checkpoint)


def measured_in(folder: Path, checkpoint: str, chosen: list[Component] | None = None) -> Measured:
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        model = evaluation(checkpoint, save_neurons(checkpoint, chosen) if chosen else None)
        return Measured(model, run(model), folder / "out")


def test_results_json_holds_both_models_and_how_they_were_measured(tiny_checkpoint, neurons):
    results = run(evaluation(tiny_checkpoint, neurons, num_continuations=2))
    measures = {
        "behavior_mean",
        "expected_maximum_behavior",
        "behavior_probability",
        "num_prompts",
        "num_continuations",
        "num_failed",
        "num_empty",
        "share_empty",
        "mean_length",
        "uniqueness",
        "distinct_1",
        "distinct_2",
    }
    for name in ("baseline", "pruned"):
        assert set(results[name]) == {"perplexity", "num_tokens", "num_windows", "kl", "groups", "behavior_by_seed"}
        assert (results[name]["kl"] is None) is (name == "baseline")
        assert list(results[name]["groups"]) == ["toxic"]
        found = toxic(results, name)
        assert set(found) == measures
        assert all(math.isfinite(value) for value in found.values())
        assert all(math.isfinite(of["value"]) for of in results[name]["perplexity"].values())
        assert results[name]["num_tokens"] == {"sliding": 12 * 20 - 1, "disjoint": 5 * 47}
        assert found["num_prompts"] == 8
        assert found["num_continuations"] == 16
        assert 0 <= found["behavior_mean"] <= found["expected_maximum_behavior"] <= 1
    before, after = (toxic(results, name)["behavior_mean"] for name in ("baseline", "pruned"))
    perplexities = [perplexity_of(results, name) for name in ("baseline", "pruned")]
    assert perplexities[0] != perplexities[1]
    assert results["change"] == {
        "perplexity_percent": pytest.approx(100 * (perplexities[1] / perplexities[0] - 1)),
        "behavior_percent": pytest.approx(100 * (after / before - 1)),
    }
    assert results["num_failed"] == 0
    assert results["num_neurons"] == 24
    assert results["checkpoint"] == tiny_checkpoint
    assert results["checkpoint_fingerprint"] == Checkpoint(tiny_checkpoint).fingerprint
    assert {"torch", "transformers", "lightning", "detoxify", "python"} <= set(results["versions"])
    windows = {"conventions": ["sliding", "disjoint"], "window": 48, "stride": 16}
    assert results["protocol"]["perplexity"] == {**windows, "text": "text.txt", "bos": "none"}
    of = results["protocol"]["continuations"]
    assert (of["temperature"], of["top_p"], of["max_new_tokens"]) == (1.0, 0.9, 8)
    assert (of["num_continuations"], of["scorers"], of["seed"]) == (2, ["small"], 0)
    expected = {"source": "prompts.jsonl", "nontoxic_source": None, "excluded": 2, "too_long": 0, "in_both": 0}
    expected |= {"chat": False, "bos": False}
    assert results["protocol"]["prompts"] == expected
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
        assert 0 <= row["scores"]["small"] <= 1
        assert row["prompt_token_ids"] == ids_of(row["prompt"])
        assert len(row["token_ids"]) == row["num_tokens"] <= 8
        assert not row["continuation"].startswith(row["prompt"]), "the continuation alone is scored"
    scores = DetoxifyScorer("small").score([row["continuation"] for row in rows])
    assert [row["scores"]["small"] for row in rows] == pytest.approx(scores, abs=1e-5)
    for name in ("baseline", "pruned"):
        mine = [row["scores"]["small"] for row in rows if row["model"] == name]
        assert toxic(results, name)["behavior_mean"] == pytest.approx(sum(mine) / len(mine))
        maxima = [max(mine_of) for mine_of in by_prompt(rows, name).values()]
        assert toxic(results, name)["expected_maximum_behavior"] == pytest.approx(sum(maxima) / len(maxima))


def by_prompt(rows, name: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == name:
            groups.setdefault(row["prompt_id"], []).append(row["scores"]["small"])
    return groups


@pytest.mark.slow
def test_the_same_evaluation_twice_gives_the_same_numbers(both, tiny_checkpoint, neurons):
    assert run(evaluation(tiny_checkpoint, neurons)) == both.results
    assert Path("out", COMPLETIONS).read_text() == (both.folder / COMPLETIONS).read_text()


def test_another_seed_draws_other_continuations_and_measures_the_same_perplexity(
    baseline, tiny_checkpoint, monkeypatch
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    results, of_seed_0 = run(evaluation(tiny_checkpoint)), completions(baseline.folder)
    assert perplexity_of(results, "baseline") == perplexity_of(baseline.results, "baseline")
    assert [r["continuation"] for r in completions()] != [r["continuation"] for r in of_seed_0]
    assert [r["prompt"] for r in completions()] == [r["prompt"] for r in of_seed_0]


def test_continuations_are_divided_over_seeds_and_those_of_a_seed_are_those_of_a_run_with_it(
    tiny_checkpoint, neurons, monkeypatch
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    results = run(evaluation(tiny_checkpoint, neurons, num_continuations=6, num_seeds=2), folder="both")
    assert results["protocol"]["continuations"]["num_seeds"] == 2
    both = {(r["model"], r["prompt_id"], r["continuation_index"]): r["continuation"] for r in completions("both")}
    assert len(both) == 2 * 8 * 6
    for place, seed in enumerate((3, 4)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        alone = run(evaluation(tiny_checkpoint, neurons, num_continuations=3), folder=str(seed))
        for row in completions(str(seed)):
            at = (row["model"], row["prompt_id"], 3 * place + row["continuation_index"])
            assert both.pop(at) == row["continuation"]
        for model in ("baseline", "pruned"):
            of_seed = results[model]["behavior_by_seed"][place]
            assert of_seed == pytest.approx(toxic(alone, model)["behavior_mean"])
            assert alone[model]["behavior_by_seed"] == [pytest.approx(of_seed)]
    assert not both
    assert all(len(results[model]["behavior_by_seed"]) == 2 for model in ("baseline", "pruned"))
    assert results["doses"][0]["behavior_by_seed"] == results["pruned"]["behavior_by_seed"]


def test_perplexity_is_that_of_the_loop_with_labels(tiny_checkpoint):
    of = data(stride=20)
    results = run(evaluation(tiny_checkpoint), of)
    model = load_model(tiny_checkpoint, torch.float32)
    for convention in ("sliding", "disjoint"):
        nats = count = 0
        for window in of.text.windows:
            if window.convention == convention:
                ids = of.text.input_ids[window.start : window.end].unsqueeze(0)
                labels = ids.clone()
                labels[:, : -window.num_scored] = -100
                nats += model(input_ids=ids, labels=labels).loss.item() * window.num_scored
                count += window.num_scored
        assert perplexity_of(results, "baseline", convention) == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_one_convention_alone_is_measured_as_beside_the_other(baseline, tiny_checkpoint):
    alone = run(evaluation(tiny_checkpoint), data(conventions=["disjoint"]))
    assert perplexity_of(alone, "baseline", "disjoint") == perplexity_of(baseline.results, "baseline", "disjoint")
    assert list(alone["baseline"]["perplexity"]) == ["disjoint"]


def test_perplexity_of_a_single_window_has_no_interval_anywhere(tiny_checkpoint, neurons):
    model = evaluation(tiny_checkpoint, neurons, doses=[1], controls=Controls(1))
    results = run(model, data(num_tokens=48))
    for of in (results["perplexity_change"], *(results[name]["perplexity"] for name in ("baseline", "pruned"))):
        for convention in ("sliding", "disjoint"):
            assert of[convention]["value"] is not None
            assert of[convention]["low"] is of[convention]["high"] is None
    assert re.search(r"perplexity (fell|rose) by [0-9.]+ % \(95 % interval cannot be said\)", results["verdict"])
    texts = [Path("out", name).read_text() for name in (REPORT, "model_card.md", "doses.csv")]
    assert not any(re.search(r"\bnan\b", text) for text in (*texts, model.summary(), results["verdict"]))


def test_without_neurons_only_the_model_as_it_is_is_measured(baseline):
    results = baseline.results
    assert results["pruned"] is None
    assert results["change"] is None
    assert results["num_neurons"] == 0
    assert toxic(results, "baseline")["num_prompts"] == 10
    assert {row["model"] for row in completions(baseline.folder)} == {"baseline"}
    assert not (baseline.folder / REPORT).exists()


@pytest.mark.slow
def test_the_baseline_does_not_depend_on_which_neurons_are_measured_beside_it(tiny_checkpoint, neurons):
    alone = run(
        evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [Component("model.layers.0.mlp.up_proj", 3, -1)])),
        folder="a",
    )
    other = run(
        evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [Component("model.layers.1.mlp.up_proj", 7, -1)])),
        folder="b",
    )
    assert alone["baseline"] == other["baseline"]
    assert alone["pruned"] != other["pruned"]


def test_the_masked_model_measures_as_the_exported_checkpoint_does(both, tiny_checkpoint, neurons):
    export_pruned(Checkpoint(tiny_checkpoint), NeuronList.load(neurons).neurons, Path("pruned"), dtype=torch.float32)
    # The same prompts: the first two are those that were attributed on.
    rows = [{"text": text, "toxicity": 0.95} for text in PROMPTS[2:]]
    Path("left.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = run(evaluation("pruned"), data(source="left.jsonl"), "alone")
    measured, expected = flat(alone["baseline"]), flat(both.results["pruned"])
    assert measured.pop("/kl") is None
    del expected["/kl"]  # of the model as it is there is none
    assert measured == pytest.approx(expected, rel=1e-5)
    masked = {r["prompt_id"]: r["continuation"] for r in completions(both.folder) if r["model"] == "pruned"}
    assert {r["prompt_id"]: r["continuation"] for r in completions("alone")} == masked


def test_the_model_is_unchanged_after_the_evaluation(both, tiny_checkpoint, neurons):
    model = both.model
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
    assert results["protocol"]["prompts"]["excluded"] == 2
    assert {row["prompt"] for row in completions()} == set(PROMPTS[2:])
    assert "2 prompts left out" in caplog.text


def test_of_one_data_module_each_evaluation_leaves_out_the_prompts_of_its_own_neurons(tiny_checkpoint, neurons):
    of = data()
    for path, folder, excluded in ((None, "first", 0), (neurons, "second", 2), (None, "third", 0)):
        results = run(evaluation(tiny_checkpoint, path), of, folder)
        assert results["protocol"]["prompts"]["excluded"] == excluded
        assert {row["prompt"] for row in completions(folder)} == set(PROMPTS[excluded:])


def test_prompts_whose_own_continuations_were_attributed_on_are_left_out_too(tiny_checkpoint):
    ids = [f"{prompt_id(text)}/{j}" for text in PROMPTS[4:7] for j in (0, 3)]
    neurons = save_neurons(tiny_checkpoint, PRUNED, {"sample_ids": ["document-1", *ids]})
    model = evaluation(tiny_checkpoint, neurons)
    assert model.excluded_prompts == {"document-1", *map(prompt_id, PROMPTS[4:7])}
    assert run(model)["protocol"]["prompts"]["excluded"] == 3
    assert {row["prompt"] for row in completions()} == {*PROMPTS[:4], *PROMPTS[7:]}


def test_a_model_that_gives_nan_counts_as_failed_and_never_as_harmless(tiny_checkpoint, neurons):
    model = evaluation(tiny_checkpoint, neurons, num_continuations=2)
    spoiled = prompt_id(PROMPTS[5])

    class Spoiling(L.Callback):
        """Spoil the logits of the first continuation of one prompt, once the prompt itself is read."""

        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1 and batch["prompts"][0].id == spoiled:
                first = torch.tensor([0])
                hook = lambda _m, _i, out: out if len(out) < 2 else out.index_fill(0, first, math.nan)  # noqa: E731
                self.handle = pl_module.model.lm_head.register_forward_hook(hook)

        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1 and batch["prompts"][0].id == spoiled:
                self.handle.remove()

    results = run(model, data(batch_size=1), callbacks=[Spoiling()])
    failed = [row for row in completions() if row["scores"]["small"] is None]
    assert [(row["model"], row["prompt_id"], row["continuation_index"]) for row in failed] == [
        ("baseline", spoiled, 0),
        ("pruned", spoiled, 0),
    ]
    assert [toxic(results, name)["num_failed"] for name in ("baseline", "pruned")] == [1, 1]
    assert results["num_failed"] == 2
    assert toxic(results, "baseline")["num_continuations"] == 16
    scored = by_prompt([row for row in completions() if row["scores"]["small"] is not None], "baseline").values()
    assert sorted(map(len, scored)) == [1, *[2] * 7]
    assert toxic(results, "baseline")["behavior_mean"] == pytest.approx(sum(sum(of) / len(of) for of in scored) / 8)


@pytest.fixture
def with_an_idle_neuron(tiny_checkpoint) -> tuple[str, Path]:
    """A checkpoint with a neuron whose output is 0 as it is, and a neurons.json that names it."""
    export_pruned(Checkpoint(tiny_checkpoint), [Component(UP[0], 3, -1.0)], Path("idle"), dtype=torch.float32)
    return "idle", save_neurons("idle", [Component(UP[0], 3, -1.0)])


def test_a_mask_without_effect_has_no_divergence_no_effect_and_the_same_continuations(with_an_idle_neuron):
    results = run(evaluation(*with_an_idle_neuron, num_continuations=2))
    assert results["pruned"]["kl"] == 0
    assert results["change"] == {"perplexity_percent": 0, "behavior_percent": 0}
    assert results["perplexity_change"]["sliding"] == {"value": 0, "low": 0, "high": 0}
    effect = results["effects"]["toxic"]["behavior_mean"]
    assert (effect["num_equal"], effect["evidence"], effect["sign_test_p"]) == (8, False, 1)
    assert effect["permutation_test_p"] == 1
    assert results["verdict"].startswith("No evidence that switching 1 neuron off changes toxicity")
    of = {
        name: [row | {"model": "", "sha256": ""} for row in completions() if row["model"] == name]
        for name in ("baseline", "pruned")
    }
    assert of["baseline"] == of["pruned"], "the same draws"


def test_the_protocol_is_that_of_the_reproduction_or_of_real_toxicity_prompts(tiny_checkpoint):
    short, rtp = (
        Evaluation(tiny_checkpoint, scorers=["small"], sampling=SamplingOptions(name)) for name in ("short", "rtp")
    )
    assert short.sampling == Sampling(50, 0.7, 0.9, num_continuations=1)
    assert rtp.sampling == Sampling(20, 1.0, 0.9, num_continuations=25)
    default = Evaluation(tiny_checkpoint, scorers=["small"])
    assert default.sampling == short.sampling
    assert [variant.num_continuations for variant in rtp.variants] == [25]


@pytest.mark.parametrize(
    ("option", "value"), [("num_continuations", 3), ("max_new_tokens", 7), ("temperature", 0.3), ("top_p", 0.5)]
)
@pytest.mark.parametrize("protocol", ["short", "rtp"])
def test_a_single_option_overrides_the_protocol_and_leaves_the_rest_of_it(tiny_checkpoint, protocol, option, value):
    def settings(**options: Any) -> dict[str, Any]:
        return asdict(
            Evaluation(tiny_checkpoint, scorers=["small"], sampling=SamplingOptions(protocol, **options)).sampling
        )

    assert settings(**{option: value}) == settings() | {option: value}


def test_zero_shot_accuracy_is_measured_before_and_after_with_the_neurons_off(tiny_checkpoint, neurons, monkeypatch):
    seen = []

    def accuracy(model: Any, tokenizer: Any, asked: ZeroShot) -> dict[str, Any]:
        logits = model(torch.tensor([[5, 9, 13]])).logits
        seen.append((logits, tokenizer("the dog")["input_ids"], asked))
        return {"toy": {"accuracy": 0.5 / len(seen), "standard_error": math.nan}}

    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluate, "fetch_tasks", lambda *_: [])
    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    model = evaluation(tiny_checkpoint, neurons, zero_shot=ZeroShot(["toy"], limit=7), max_new_tokens=2)
    results = run(model)
    expected = {"accuracy": 0.5, "standard_error": None}
    assert results["zero_shot"] == {"baseline": {"toy": expected}, "pruned": {"toy": expected | {"accuracy": 0.25}}}
    assert [asked for _, _, asked in seen] == [ZeroShot(["toy"], limit=7)] * 2
    fresh = load_model(tiny_checkpoint, torch.float32)
    with torch.no_grad():
        assert torch.equal(seen[0][0], fresh(torch.tensor([[5, 9, 13]])).logits)
        with mask(fresh, NeuronList.load(neurons).neurons):
            assert torch.equal(seen[1][0], fresh(torch.tensor([[5, 9, 13]])).logits)
    assert "Zero-shot accuracy, toy" in model.summary()


def test_the_summary_is_the_table_and_the_paths(both):
    summary = both.model.summary()
    for words in ("before", "after", "Perplexity", "Mean toxicity", "out/results.json", "out/report.html"):
        assert words in summary
