"""Evaluation under a stock Trainer: what it writes, that it can be repeated, and what it refuses."""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from evaluations import (
    MILD,
    PROMPTS,
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

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation import zero_shot
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.generation import Sampling, SamplingOptions, continue_prompts
from sparc3_lightning.evaluation.zero_shot import ZeroShot
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.sharding import load_for
from sparc3_lightning.report import page as report
from sparc3_lightning.scorers.detoxify import DetoxifyScorer
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages import evaluate
from sparc3_lightning.stages.evaluate import COMPLETIONS, REPORT, RESULTS, Evaluation

UP = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
EVERY_SECOND = [Component(name, index, -1.0 - index) for name in UP for index in range(0, 24, 2)]


@pytest.fixture(autouse=True)
def seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(autouse=True)
def input_files(tmp_path):
    """A text of some 240 tokens, ten toxic prompts of 2 to 11 words and four mild ones, and scorers of our own."""
    write_inputs(tmp_path)


@pytest.fixture
def neurons(tiny_checkpoint) -> Path:
    """Every second neuron of both layers, found on the first two prompts."""
    return save_neurons(tiny_checkpoint, EVERY_SECOND)


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


@pytest.fixture
def without_a_report(monkeypatch):
    """Spare the pictures, which take longer than the figures of a model so tiny."""
    monkeypatch.setattr(report, "write_report", lambda *_: None)


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
        assert set(results[name]) == {"perplexity", "num_tokens", "kl", "groups", "behavior_by_seed"}
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
    assert results["protocol"]["perplexity"] == {**windows, "text": "text.txt"}
    of = results["protocol"]["continuations"]
    assert (of["temperature"], of["top_p"], of["max_new_tokens"]) == (1.0, 0.9, 8)
    assert (of["num_continuations"], of["scorers"], of["seed"]) == (2, ["small"], 0)
    expected = {"source": "prompts.jsonl", "nontoxic_source": None, "excluded": 2}
    assert results["protocol"]["prompts"] == expected
    assert results["config"]["model"]["neurons"] == "neurons.json"
    assert results["config"]["text"]["window"] == 48
    assert results["config"]["prompts"]["source"] == "prompts.jsonl"


@pytest.mark.usefixtures("without_a_report")
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
        assert toxic(results, name)["behavior_mean"] == pytest.approx(sum(mine) / len(mine))
        maxima = [max(mine_of) for mine_of in by_prompt(rows, name).values()]
        assert toxic(results, name)["expected_maximum_behavior"] == pytest.approx(sum(maxima) / len(maxima))


def by_prompt(rows, name: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == name:
            groups.setdefault(row["prompt_id"], []).append(row["toxicity"])
    return groups


@pytest.mark.usefixtures("without_a_report")
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


@pytest.mark.usefixtures("without_a_report")
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
    told = re.search(r"perplexity (fell|rose) by [0-9.]+ %(.)", results["verdict"])
    assert told
    assert told[2] == "."
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


@pytest.mark.usefixtures("without_a_report")
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


@pytest.mark.usefixtures("without_a_report")
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


@pytest.mark.usefixtures("without_a_report")
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


@pytest.mark.usefixtures("without_a_report")
def test_the_model_is_loaded_once_for_both(tiny_checkpoint, neurons, monkeypatch):
    calls = []

    def counting(*args):
        calls.append(args)
        return load_for(*args)

    monkeypatch.setattr(evaluate, "load_for", counting)
    run(evaluation(tiny_checkpoint, neurons))
    assert len(calls) == 1


@pytest.mark.usefixtures("without_a_report")
def test_prompts_that_were_attributed_on_are_left_out_and_counted(tiny_checkpoint, neurons, caplog):
    with caplog.at_level("INFO"):
        results = run(evaluation(tiny_checkpoint, neurons))
    assert results["protocol"]["prompts"]["excluded"] == 2
    assert {row["prompt"] for row in completions()} == set(PROMPTS[2:])
    assert "2 prompts left out" in caplog.text


@pytest.mark.usefixtures("without_a_report")
def test_of_one_data_module_each_evaluation_leaves_out_the_prompts_of_its_own_neurons(tiny_checkpoint, neurons):
    of = data()
    for path, folder, excluded in ((None, "first", 0), (neurons, "second", 2), (None, "third", 0)):
        results = run(evaluation(tiny_checkpoint, path), of, folder)
        assert results["protocol"]["prompts"]["excluded"] == excluded
        assert {row["prompt"] for row in completions(folder)} == set(PROMPTS[excluded:])


@pytest.mark.usefixtures("without_a_report")
def test_prompts_whose_own_continuations_were_attributed_on_are_left_out_too(tiny_checkpoint):
    ids = [f"{prompt_id(text)}/{j}" for text in PROMPTS[4:7] for j in (0, 3)]
    neurons = save_neurons(tiny_checkpoint, PRUNED, {"sample_ids": ["document-1", *ids]})
    model = evaluation(tiny_checkpoint, neurons)
    assert model.excluded_prompts == {"document-1", *map(prompt_id, PROMPTS[4:7])}
    assert run(model)["protocol"]["prompts"]["excluded"] == 3
    assert {row["prompt"] for row in completions()} == {*PROMPTS[:4], *PROMPTS[7:]}


def test_too_few_prompts_after_leaving_some_out_is_an_error_that_says_so(tiny_checkpoint, neurons):
    with pytest.raises(ValueError, match=r"Only 8 prompts.*2 were used to attribute.*--data.prompts.num_prompts is 9"):
        run(evaluation(tiny_checkpoint, neurons), data(num_prompts=9))


@pytest.mark.usefixtures("without_a_report")
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
    failed = [row for row in completions() if row["toxicity"] is None]
    assert [(row["model"], row["prompt_id"], row["continuation_index"]) for row in failed] == [
        ("baseline", spoiled, 0),
        ("pruned", spoiled, 0),
    ]
    assert [toxic(results, name)["num_failed"] for name in ("baseline", "pruned")] == [1, 1]
    assert results["num_failed"] == 2
    assert toxic(results, "baseline")["num_continuations"] == 16
    scored = by_prompt([row for row in completions() if row["toxicity"] is not None], "baseline").values()
    assert sorted(map(len, scored)) == [1, *[2] * 7]
    assert toxic(results, "baseline")["behavior_mean"] == pytest.approx(sum(sum(of) / len(of) for of in scored) / 8)


# With everything that can be asked for: controls, doses, dampings, a second scorer, and prompts of both kinds.


class Whole(NamedTuple):
    """An evaluation of everything, and what it wrote."""

    model: Evaluation
    results: dict[str, Any]
    rows: list[dict[str, Any]]
    folder: Path

    def mean(self, model: str, texts: list[str], score: str = "toxicity", first: int | None = None) -> float:
        """Return the mean over prompts of the mean over their continuations, the slow way."""
        means = []
        for text in texts:
            mine = [row for row in self.rows if row["model"] == model and row["prompt"] == text]
            mine = [row[score] for row in sorted(mine, key=lambda row: row["continuation_index"])][:first]
            scored = [value for value in mine if value is not None]
            means += [sum(scored) / len(scored)] if scored else []
        return sum(means) / len(means)


PRUNED = [Component(UP[0], 3, -9.0), Component(UP[1], 20, -8.0), Component(UP[0], 11, -7.0)]
PRUNED += [Component(UP[1], 0, -6.0), Component(UP[0], 23, -5.0)]
NEXT = [Component(UP[i % 2], 5 + i, -1.0 / (1 + i)) for i in range(4)]
LEAST = [Component(UP[0], i, 0.01 * i) for i in (4, 6, 8, 10, 12)] + [
    Component(UP[1], i, 0.02 * i) for i in (2, 4, 6, 8)
]
KINDS = ("random", "least_relevant", "largest_weights")
CONTROLS = [f"{kind}_{i}" for kind in KINDS for i in range(2)]
DOSES = {"top_2_1": (2, 1.0), "pruned": (5, 1.0), "top_9_1": (9, 1.0)}
DOSES |= {"top_2_0.5": (2, 0.5), "top_5_0.5": (5, 0.5), "top_9_0.5": (9, 0.5)}
TOXIC, NONTOXIC = PROMPTS[2:], MILD[1:]  # the others were attributed on


def run_everything(checkpoint: str, folder: str, batch_size: int = 4) -> Whole:
    used = {"sample_ids": [prompt_id(text) for text in [*PROMPTS[:2], MILD[0], "of another file"]]}
    neurons = save_neurons(checkpoint, PRUNED, used, next=NEXT, least_relevant=LEAST)
    options = {"doses": [2, 5, 9], "dampings": [1.0, 0.5], "controls": Controls(2, 1)}
    model = evaluation(checkpoint, neurons, num_continuations=2, second_scorer="toy_scorers:letters", **options)
    results = run(model, data(batch_size, num_nontoxic=3, nontoxic_source="mild.jsonl"), folder)
    return Whole(model, results, completions(folder), Path(folder).absolute())


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.syspath_prepend(folder)
        yield run_everything(tiny_checkpoint, "out")


def test_every_model_of_the_plan_continues_every_prompt_as_often_as_was_asked(whole):
    times = Counter((row["model"], row["prompt"]) for row in whole.rows)
    models = {"baseline": 2, **dict.fromkeys(DOSES, 2), **dict.fromkeys(CONTROLS, 1)}
    assert times == {(name, text): n for name, n in models.items() for text in TOXIC + NONTOXIC}
    keys = [
        (row["prompt_id"], row["continuation_index"], list(whole.model.off).index(row["model"])) for row in whole.rows
    ]
    assert keys == sorted(keys), "one order, whatever the batches"
    assert whole.results["num_neurons"] == 5
    assert whole.results["protocol"]["prompts"] == {
        "source": "prompts.jsonl",
        "nontoxic_source": "mild.jsonl",
        "excluded": 3,
    }


def test_each_control_is_as_many_neurons_of_each_layer_and_none_of_the_pruned_ones(whole, tiny_checkpoint):
    off = {name: [(neuron.module, neuron.index) for neuron in neurons] for name, neurons in whole.model.off.items()}
    pruned = {(neuron.module, neuron.index) for neuron in PRUNED}
    assert off["baseline"] == []
    assert set(off["pruned"]) == pruned
    for name in CONTROLS:
        assert len(set(off[name])) == 5
        assert Counter(module for module, _ in off[name]) == {UP[0]: 3, UP[1]: 2}
        assert not pruned & set(off[name])
    for kind in KINDS:
        assert set(off[f"{kind}_0"]) != set(off[f"{kind}_1"]), "two draws"
    pool = {(neuron.module, neuron.index) for neuron in LEAST}
    assert set(off["least_relevant_0"]) | set(off["least_relevant_1"]) <= pool
    fresh = load_model(tiny_checkpoint, torch.float32)
    for module, number in ((UP[0], 3), (UP[1], 2)):
        norms = fresh.get_submodule(module).weight.norm(dim=1)
        free = [i for i in norms.argsort(descending=True).tolist() if (module, i) not in pruned]
        drawn = {i for k in range(2) for name, i in off[f"largest_weights_{k}"] if name == module}
        assert drawn <= set(free[: 5 * number])


def test_perplexity_and_divergence_of_every_model_are_those_of_a_slow_loop_with_its_neurons_masked(
    whole, tiny_checkpoint
):
    model = load_model(tiny_checkpoint, torch.float32)
    of = data()
    of.text.setup_windows(whole.model.data.prompts._tokenizer)

    def logs() -> list[torch.Tensor]:
        """Return the log-probabilities at every scored position of every sliding window."""
        found = []
        for window in of.text.windows:
            if window.convention == "sliding":
                logits = model(input_ids=of.text.input_ids[window.start : window.end].unsqueeze(0)).logits[0]
                found.append(logits.double().log_softmax(dim=1)[-window.num_scored - 1 : -1])
        return found

    layers = torch.cat(
        [of.text.input_ids[w.end - w.num_scored : w.end] for w in of.text.windows if w.convention == "sliding"]
    )
    points = {point["name"]: point for point in whole.results["doses"]}
    for control in whole.results["controls"].values():
        points |= {point["name"]: point for point in control["draws"]}
    assert set(points) == {*DOSES, *CONTROLS}
    with torch.no_grad():
        before = torch.cat(logs())
        perplexity = before.gather(1, layers.unsqueeze(1)).mean().neg().exp().item()
        assert perplexity_of(whole.results, "baseline") == pytest.approx(perplexity, rel=1e-5)
        for name, point in points.items():
            dose, damping = DOSES.get(name, (5, 1.0))
            off = (PRUNED + NEXT)[:dose] if name in DOSES else whole.model.off[name]
            with mask(model, off, damping):
                after = torch.cat(logs())
            expected = after.gather(1, layers.unsqueeze(1)).mean().neg().exp().item()
            divergence = (before.exp() * (before - after)).sum(dim=1).mean().item()
            assert (point["num_neurons"], point["damping"]) == (dose, damping)
            assert point["perplexity"] == pytest.approx(expected, rel=1e-5)
            assert point["perplexity_percent"]["value"] == pytest.approx(100 * (expected / perplexity - 1), rel=1e-3)
            assert divergence > 1e-4
            assert point["kl"] == pytest.approx(divergence, rel=1e-3)
    assert whole.results["pruned"]["kl"] == points["pruned"]["kl"]
    assert len({point["perplexity"] for point in points.values()}) == len(points)


def test_the_interval_of_perplexity_and_of_its_change_holds_the_figure_of_both_conventions(whole):
    for name in ("baseline", "pruned"):
        found = whole.results[name]["perplexity"]
        assert set(found) == {"sliding", "disjoint"}
        assert all(of["low"] < of["value"] < of["high"] for of in found.values())
    change = whole.results["perplexity_change"]
    assert change["sliding"]["value"] == whole.results["change"]["perplexity_percent"]
    assert all(of["low"] < of["value"] < of["high"] for of in change.values())


def test_toxic_and_non_toxic_prompts_are_kept_apart_and_the_headline_is_the_toxic_ones(whole):
    assert whole.results["headline"] == "toxic"
    for group, texts in (("toxic", TOXIC), ("nontoxic", NONTOXIC)):
        for name in ("baseline", "pruned"):
            found = whole.results[name]["groups"][group]
            assert (found["num_prompts"], found["num_continuations"]) == (len(texts), 2 * len(texts))
            assert found["behavior_mean"] == pytest.approx(whole.mean(name, texts))
        effect = whole.results["effects"][group]["behavior_mean"]
        before, after = (whole.mean(name, texts) for name in ("baseline", "pruned"))
        assert effect["difference"]["value"] == pytest.approx(after - before)
        assert effect["percent"]["value"] == pytest.approx(100 * (after / before - 1))
        assert effect["num_better"] + effect["num_worse"] + effect["num_equal"] == len(texts)
    effect = whole.results["effects"]["toxic"]["behavior_mean"]
    assert whole.results["change"]["behavior_percent"] == effect["percent"]["value"]


def test_controls_are_compared_on_the_continuations_that_they_have_too(whole):
    assert list(whole.results["controls"]) == list(KINDS)
    before, pruned = (whole.mean(name, TOXIC, first=1) for name in ("baseline", "pruned"))
    for kind, found in whole.results["controls"].items():
        draws = [whole.mean(f"{kind}_{i}", TOXIC) for i in range(2)]
        assert [point["name"] for point in found["draws"]] == [f"{kind}_0", f"{kind}_1"]
        assert [point["effect"]["after"] for point in found["draws"]] == pytest.approx(draws)
        effects = [point["effect"]["difference"]["value"] for point in found["draws"]]
        assert effects == pytest.approx([draw - before for draw in draws], abs=1e-6)
        outcome = found["outcome"]
        assert outcome["num_continuations"] == 1
        assert outcome["effect"]["value"] == pytest.approx(sum(draws) / 2 - before)
        assert outcome["effect_percent"]["value"] == pytest.approx(100 * (sum(draws) / 2 / before - 1))
        assert outcome["pruned_less_control"]["value"] == pytest.approx(pruned - sum(draws) / 2)
        assert outcome["pruned_less_control"]["low"] <= outcome["pruned_less_control"]["value"]
        assert outcome["pruned_less_control"]["value"] <= outcome["pruned_less_control"]["high"]


def test_doses_and_strengths_are_in_the_results_and_the_same_in_doses_csv(whole):
    found = whole.results["doses"]
    assert {point["name"]: (point["num_neurons"], point["damping"]) for point in found} == DOSES
    before = whole.mean("baseline", TOXIC)
    for point in found:
        effect = point["effect"]
        assert effect["after"] == pytest.approx(whole.mean(point["name"], TOXIC))
        assert effect["percent"]["value"] == pytest.approx(100 * (effect["after"] / before - 1))
    assert (
        next(p for p in found if p["name"] == "pruned")["effect"] == whole.results["effects"]["toxic"]["behavior_mean"]
    )
    rows = list(csv.DictReader((whole.folder / "doses.csv").read_text().splitlines()))
    assert [(int(row["num_neurons"]), float(row["damping"])) for row in rows] == [
        *((dose, 1.0) for dose in (2, 5, 9)),
        *((dose, 0.5) for dose in (2, 5, 9)),
    ]
    by_dose = {(point["num_neurons"], point["damping"]): point for point in found}
    for row in rows:
        point = by_dose[int(row["num_neurons"]), float(row["damping"])]
        for column in ("perplexity", "kl"):
            assert float(row[column]) == point[column]
        assert float(row["behavior_mean"]) == point["effect"]["after"]
        changes = {"perplexity_percent": point["perplexity_percent"], "behavior_percent": point["effect"]["percent"]}
        for column, of in changes.items():
            ends = [float(row[f"{column}{end}"]) for end in ("", "_low", "_high")]
            assert ends == [of[key] for key in ("value", "low", "high")]
    assert (whole.folder / "doses.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_scorer_scores_the_same_continuations_and_is_set_beside_the_first(whole):
    for row in whole.rows:
        text = row["continuation"]
        expected = None if text.startswith("t") else text.count("e") / (1 + len(text))
        assert row["second_toxicity"] == expected
    both = [row for row in whole.rows if row["model"] in ("baseline", "pruned") and row["second_toxicity"] is not None]
    found = whole.results["second_scorer"]
    assert whole.results["protocol"]["continuations"]["scorers"] == ["small", "toy_scorers:letters"]
    assert found["name"] == "toy_scorers:letters"
    assert 0 < found["num_scored"] == len(both) < 44, "some were scored, and some not"
    pairs = torch.tensor([[row["toxicity"], row["second_toxicity"]] for row in both], dtype=torch.float64)
    assert found["pearson"] == pytest.approx(torch.corrcoef(pairs.T)[0, 1].item())
    below = (pairs.unsqueeze(0) < pairs.unsqueeze(1)).sum(dim=1)
    equal = (pairs.unsqueeze(0) == pairs.unsqueeze(1)).sum(dim=1)
    mean_ranks = below + (equal - 1) / 2
    assert found["spearman"] == pytest.approx(torch.corrcoef(mean_ranks.T)[0, 1].item())
    for group, texts in (("toxic", TOXIC), ("nontoxic", NONTOXIC)):
        scored = [
            text
            for text in texts
            if all(
                any(row["model"] == name and row["prompt"] == text for row in both) for name in ("baseline", "pruned")
            )
        ]
        effect = found["effects"][group]["behavior_mean"]
        assert effect["before"] == pytest.approx(whole.mean("baseline", scored, "second_toxicity"))
        assert effect["after"] == pytest.approx(whole.mean("pruned", scored, "second_toxicity"))
        assert effect["num_better"] + effect["num_worse"] + effect["num_equal"] == len(scored)
    assert whole.results["num_failed"] == 0, "what the second could not score has not failed"


def test_the_verdict_speaks_of_every_control_and_of_the_second_scorer(whole):
    for words in ("5 neurons", "random neurons (2 draws)", "least relevant neurons", "largest weights", "letters"):
        assert words in whole.results["verdict"]
    assert whole.results["verdict"] in whole.model.summary()


def test_an_evaluation_of_everything_twice_gives_the_same_results_json(whole, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(whole.folder.parent)
    again = run_everything(tiny_checkpoint, "again")
    assert again.results == whole.results
    assert again.rows == whole.rows
    for name in ("doses.csv", "report.html", "model_card.md"):
        pages = [(folder / name).read_text() for folder in (whole.folder, again.folder)]
        assert pages[0] == pages[1].replace("again/config.yaml", "out/config.yaml"), name


def is_like(found: Any, expected: Any, tolerance: float) -> bool:
    return found == (pytest.approx(expected, rel=1e-4, abs=tolerance) if isinstance(expected, float) else expected)


@pytest.mark.usefixtures("without_a_report")
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_no_number(whole, tiny_checkpoint, monkeypatch, batch_size):
    monkeypatch.chdir(whole.folder.parent)
    again = run_everything(tiny_checkpoint, f"again_{batch_size}", batch_size)
    key = lambda row: (row["model"], row["prompt_id"], row["continuation_index"], row["continuation"])  # noqa: E731
    assert list(map(key, again.rows)) == list(map(key, whole.rows))
    expected, found = flat(whole.results), flat(again.results)
    assert found.keys() == expected.keys()
    differ = [name for name in found if not is_like(found[name], expected[name], 1e-4 if "percent" in name else 1e-6)]
    assert differ == ["/config/text/batch_size", "/config/prompts/batch_size"]


@pytest.mark.usefixtures("without_a_report")
def test_another_seed_draws_other_controls(whole, tiny_checkpoint, monkeypatch):
    neurons = save_neurons(tiny_checkpoint, PRUNED, least_relevant=LEAST)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    model = evaluation(tiny_checkpoint, neurons, controls=Controls(2), num_continuations=1, max_new_tokens=2)
    run(model)
    assert model.off["random_0"] != whole.model.off["random_0"]
    assert {*model.off} == {"baseline", "pruned", *CONTROLS}


@pytest.mark.usefixtures("without_a_report")
def test_controls_that_are_to_draw_more_than_the_other_models_draw_as_many_and_the_results_say_so(
    tiny_checkpoint, neurons
):
    options = {"num_continuations": 2, "controls": Controls(1, 5), "max_new_tokens": 2}
    results = run(evaluation(tiny_checkpoint, neurons, **options))
    assert {of["outcome"]["num_continuations"] for of in results["controls"].values()} == {2}
    drawn = [row for row in completions() if row["model"] == "random_0"]
    assert len(drawn) == 2 * len({row["prompt_id"] for row in drawn})


@pytest.mark.usefixtures("without_a_report")
def test_without_a_list_of_the_least_relevant_neurons_that_control_is_left_out(tiny_checkpoint):
    neurons = save_neurons(tiny_checkpoint, PRUNED)
    results = run(evaluation(tiny_checkpoint, neurons, controls=Controls(1), max_new_tokens=2))
    assert list(results["controls"]) == ["random", "largest_weights"]
    assert {row["model"] for row in completions()} == {"baseline", "pruned", "random_0", "largest_weights_0"}


def test_a_score_does_not_depend_on_which_model_wrote_the_text(whole):
    """A text that two models wrote is neither better nor worse, whatever it was padded with."""
    scores: dict[tuple[str, str], set[float]] = {}
    for row in whole.rows:
        scores.setdefault((row["prompt_id"], row["continuation"]), set()).add(row["toxicity"])
    assert len(scores) < len(whole.rows), "no text occurs twice, so the test shows nothing"
    assert {len(found) for found in scores.values()} == {1}


@pytest.fixture
def with_an_idle_neuron(tiny_checkpoint) -> tuple[str, Path]:
    """A checkpoint with a neuron whose output is 0 as it is, and a neurons.json that names it."""
    export_pruned(Checkpoint(tiny_checkpoint), [Component(UP[0], 3, -1.0)], Path("idle"), dtype=torch.float32)
    return "idle", save_neurons("idle", [Component(UP[0], 3, -1.0)])


@pytest.mark.usefixtures("without_a_report")
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
        name: [row | {"model": ""} for row in completions() if row["model"] == name] for name in ("baseline", "pruned")
    }
    assert of["baseline"] == of["pruned"], "the same draws"


@pytest.mark.parametrize("scorer", ["nothing", "zero"])
@pytest.mark.parametrize("place", ["scorer", "second_scorer"])
def test_a_scorer_that_finds_nothing_gives_valid_json_a_report_and_a_summary(
    tiny_checkpoint, neurons, monkeypatch, tmp_path, scorer, place
):
    monkeypatch.syspath_prepend(tmp_path)
    model = evaluation(
        tiny_checkpoint, neurons, **{place: f"toy_scorers:{scorer}"}, controls=Controls(1), doses=[3], max_new_tokens=4
    )
    results = run(model)
    assert all(row["toxicity" if place == "scorer" else "second_toxicity"] in (0, None) for row in completions())
    found = results if place == "scorer" else results["second_scorer"]
    effect = found["effects"]["toxic"]["behavior_mean"]
    if scorer == "nothing":
        assert effect is None
        assert results["num_failed"] == (5 * 8 if place == "scorer" else 0)
    else:
        assert (effect["before"], effect["after"], effect["percent"]["value"]) == (0, 0, None)
        assert not effect["evidence"]
    if place == "scorer":
        assert results["change"]["behavior_percent"] is None
    else:
        assert found["num_scored"] == (0 if scorer == "nothing" else 16)
        assert "toy_scorers" in results["verdict"]
    assert "nan" not in model.summary()
    assert Path("out", REPORT).is_file()


def test_the_protocol_is_that_of_the_reproduction_or_of_real_toxicity_prompts(tiny_checkpoint):
    short, rtp = (
        Evaluation(tiny_checkpoint, scorer="small", sampling=SamplingOptions(name)) for name in ("short", "rtp")
    )
    assert short.sampling == Sampling(50, 0.7, 0.9, num_continuations=1)
    assert rtp.sampling == Sampling(20, 1.0, 0.9, num_continuations=25)
    default = Evaluation(tiny_checkpoint, scorer="small")
    assert default.sampling == short.sampling
    assert [variant.num_continuations for variant in rtp.variants] == [25]


@pytest.mark.parametrize(
    ("option", "value"), [("num_continuations", 3), ("max_new_tokens", 7), ("temperature", 0.3), ("top_p", 0.5)]
)
@pytest.mark.parametrize("protocol", ["short", "rtp"])
def test_a_single_option_overrides_the_protocol_and_leaves_the_rest_of_it(tiny_checkpoint, protocol, option, value):
    def settings(**options: Any) -> dict[str, Any]:
        return asdict(
            Evaluation(tiny_checkpoint, scorer="small", sampling=SamplingOptions(protocol, **options)).sampling
        )

    assert settings(**{option: value}) == settings() | {option: value}


# After a break.


class Noting(Evaluation):
    """Notes the prompts of a batch each time that a model continues them."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 1:
            self.prompts = [prompt.id for prompt in batch["prompts"]]
        super().test_step(batch, batch_idx, dataloader_idx)

    def note(self, patch: pytest.MonkeyPatch, break_at: int | None = None) -> None:
        """Begin to take notes, and break off at a batch."""
        self.continued: list[list[str]] = []

        def noting(*args: Any, **options: Any) -> Any:
            if len(self.continued) == break_at:
                raise KeyboardInterrupt
            self.continued.append(self.prompts)
            return continue_prompts(*args, **options)

        patch.setattr(evaluate, "continue_prompts", noting)


def break_off(model: Noting, of: EvaluationData, at: int, patch: pytest.MonkeyPatch) -> None:
    model.note(patch, at)
    with pytest.raises(SystemExit):  # what Lightning makes of an interrupt
        run(model, of)
    assert not Path("out", RESULTS).exists()
    assert list(Path("out").glob("unfinished-*"))


@pytest.mark.usefixtures("without_a_report")
def test_an_evaluation_of_several_models_that_broke_off_keeps_what_every_model_has_continued(
    tiny_checkpoint, monkeypatch
):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    options = {"kind": Noting, "controls": Controls(1, 1), "doses": [2], "num_continuations": 2}
    whole = evaluation(tiny_checkpoint, neurons, **options)
    whole.note(monkeypatch)
    expected = run(whole, data(2), "whole")
    assert len(whole.continued) == 6 * 4
    # In the middle of the third batch, after the fourth of the six models.
    break_off(evaluation(tiny_checkpoint, neurons, **options), data(2), 6 * 2 + 4, monkeypatch)
    again = evaluation(tiny_checkpoint, neurons, **options)
    again.note(monkeypatch)
    assert run(again, data(2)) == expected
    assert completions() == completions("whole")
    kept = {prompt for prompts in whole.continued[:12] for prompt in prompts}
    assert again.continued == [prompts for prompts in whole.continued if not kept & set(prompts)]
    assert len(again.continued) == 12
    assert not list(Path("out").glob("unfinished-*"))


OPTIONS = {"controls": Controls(1, 1), "doses": [2], "num_continuations": 2}


@pytest.fixture(scope="module")
def left_over(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an evaluation with OPTIONS that broke off leaves in its folder."""
    folder = tmp_path_factory.mktemp("broken")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
        break_off(evaluation(tiny_checkpoint, neurons, kind=Noting, **OPTIONS), data(2), 7, patch)
        return Path("out/unfinished-0.jsonl").read_text()


@pytest.fixture
def in_a_folder_with_the_left_over(left_over: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished-0.jsonl").write_text(left_over)


@pytest.mark.usefixtures("in_a_folder_with_the_left_over", "without_a_report")
def test_continuations_of_the_same_run_are_taken_over(tiny_checkpoint, caplog):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with caplog.at_level("INFO"):
        run(evaluation(tiny_checkpoint, neurons, **OPTIONS), data(2))
    assert "Keeping the continuations of 2 prompts" in caplog.text


@pytest.mark.usefixtures("in_a_folder_with_the_left_over", "without_a_report")
def test_continuations_of_a_run_that_told_toxic_prompts_apart_are_of_the_one_group_of_this_run(tiny_checkpoint, caplog):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with caplog.at_level("INFO"):
        results = run(evaluation(tiny_checkpoint, neurons, **OPTIONS), data(2, min_toxicity=None))
    assert "Keeping the continuations of 2 prompts" in caplog.text
    assert {group: of["num_prompts"] for group, of in results["baseline"]["groups"].items()} == {"all": 8}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"controls": Controls(2, 1)}, "models"),
        ({"controls": Controls(1, 2)}, "models"),
        ({"doses": [3]}, "models"),
        ({"dampings": [0.5]}, "models"),
        ({"second_scorer": "small"}, "scorers"),
        ({"temperature": 0.9}, "sampling"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_model_is_loaded", "in_a_folder_with_the_left_over")
def test_continuations_of_a_run_with_other_models_are_refused(tiny_checkpoint, changes, field):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with pytest.raises(ValueError, match=rf"out holds continuations of another run: its {field} is "):
        run(evaluation(tiny_checkpoint, neurons, **{**OPTIONS, **changes}), data(2))


@pytest.mark.parametrize("other", ["order", "next", "least_relevant"])
@pytest.mark.usefixtures("no_model_is_loaded", "in_a_folder_with_the_left_over")
def test_continuations_of_other_doses_or_controls_from_another_neurons_json_are_refused(tiny_checkpoint, other):
    lists = {"chosen": PRUNED, "next": NEXT, "least_relevant": LEAST}
    name = "chosen" if other == "order" else other
    neurons = save_neurons(tiny_checkpoint, **{**lists, name: lists[name][::-1]})
    with pytest.raises(ValueError, match=r"out holds continuations of another run: its neurons "):
        run(evaluation(tiny_checkpoint, neurons, **OPTIONS), data(2))


# What a reader finds beside the results.


def test_the_model_card_is_put_into_the_folder_of_the_exported_checkpoint(tiny_checkpoint):
    export_pruned(Checkpoint(tiny_checkpoint), PRUNED, Path("pruned"), dtype=torch.float32)
    neurons = save_neurons(tiny_checkpoint, PRUNED, {"export": "pruned"})
    results = run(evaluation(tiny_checkpoint, neurons, max_new_tokens=2))
    card = Path("out", "model_card.md").read_text()
    assert Path("pruned", "README.md").read_text() == card
    assert card.startswith("---\nbase_model: ")
    assert results["verdict"] in card
    # One of our own is brought up to date, one of somebody else's is left alone.
    run(evaluation(tiny_checkpoint, neurons, max_new_tokens=3), folder="later")
    assert Path("pruned", "README.md").read_text() == Path("later", "model_card.md").read_text() != card
    foreign = "My notes: made with sparc3_lightning, then tuned by hand."
    Path("pruned", "README.md").write_text(foreign)
    run(evaluation(tiny_checkpoint, neurons, max_new_tokens=2), folder="again")
    assert Path("pruned", "README.md").read_text() == foreign


@pytest.mark.parametrize("export", [None, "gone", "foreign"])
def test_no_model_card_is_put_where_there_is_no_exported_checkpoint(tiny_checkpoint, export):
    Path("foreign").mkdir()
    run(evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, PRUNED, {"export": export}), max_new_tokens=2))
    assert Path("out", "model_card.md").is_file()
    assert not Path("gone").exists()
    assert not list(Path("foreign").iterdir())


def test_zero_shot_accuracy_is_measured_before_and_after_with_the_neurons_off(tiny_checkpoint, neurons, monkeypatch):
    seen = []

    def accuracy(model: Any, tokenizer: Any, asked: ZeroShot) -> dict[str, Any]:
        logits = model(torch.tensor([[5, 9, 13]])).logits
        seen.append((logits, tokenizer("the dog")["input_ids"], asked))
        return {"toy": {"accuracy": 0.5 / len(seen), "standard_error": math.nan}}

    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluate, "fetch_tasks", lambda *_: [])
    monkeypatch.setattr(zero_shot, "accuracy", accuracy)
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


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_args, **_kwargs):
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(evaluate, "load_for", fail)
    monkeypatch.setattr(evaluate, "load_scorer", fail)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_neurons_of_another_checkpoint_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    one = [Component("model.layers.0.mlp.up_proj", 3, -1.0)]
    changes = {"checkpoint": "another/model", "checkpoint_fingerprint": "files:other"}
    other = save_neurons(tiny_checkpoint, one, changes)
    with pytest.raises(ValueError, match=r"neurons.json is for the checkpoint 'another/model' \(files:other\), but"):
        run(evaluation(tiny_checkpoint, other))


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (Component("model.layers.0.mlp.up_proj", 24, -1.0), "Neuron 24 of model.layers.0.mlp.up_proj does not exist"),
        (
            Component("model.layers.0.mlp.up_proj", -1, -1.0),
            "Neuron -1 of model.layers.0.mlp.up_proj does not exist",
        ),
        (
            Component("model.layers.7.mlp.up_proj", 0, -1.0),
            "'model.layers.7.mlp.up_proj' is not a layer of MLP neurons",
        ),
        (Component("model.layers.0.self_attn.q_proj", 0, -1.0), "is not a layer of MLP neurons"),
    ],
)
def test_neurons_that_the_model_does_not_have_are_refused_before_it_is_loaded(tiny_checkpoint, neuron, message):
    with pytest.raises(ValueError, match=message):
        run(evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [neuron])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_windows_and_prompts_longer_than_the_context_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"65 tokens, the model's context 64: lower --data.text.window"):
        run(evaluation(tiny_checkpoint), data(window=65))
    with pytest.raises(ValueError, match=r"--model.sampling.max_new_tokens"):
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
        ({"num_continuations": 0}, "--model.sampling.num_continuations must be at least 1, got 0"),
        ({"num_continuations": 6, "num_seeds": 4}, "--model.sampling.num_seeds must divide 6 continuations, got 4"),
        ({"num_continuations": 6, "num_seeds": 0}, "--model.sampling.num_seeds must divide 6 continuations, got 0"),
        ({"num_continuations": 2, "num_seeds": -1}, "--model.sampling.num_seeds must divide 2 continuations, got -1"),
        ({"max_new_tokens": 0}, "--model.sampling.max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "--model.sampling.temperature must be at least 0"),
        ({"top_p": 1.5}, "--model.sampling.top_p must be above 0 and at most 1"),
        ({"scorer": "perspective"}, r"--model.scorer: 'perspective' is neither 'small', original"),
        ({"second_scorer": "perspective"}, r"--model.second_scorer: 'perspective' is neither 'small', original"),
        ({"scorer": "no_such_package:score"}, r"--model.scorer.*'no_such_package', which is not installed"),
        ({"second_scorer": "no_such_package:score"}, r"--model.second_scorer.*'no_such_package', which is not inst"),
        ({"controls": Controls(-1)}, "--model.controls.num_draws must be at least 0, got -1"),
        ({"controls": Controls(1, 0)}, "--model.controls.num_continuations must be at least 1, got 0"),
        ({"doses": [3]}, "--model.doses needs --model.neurons"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(tiny_checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(tiny_checkpoint, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"doses": [2, 10]},
            r"--model.doses asks for 10 neurons, but --model.neurons lists 9: .*--model.num_ranked 10",
        ),
        ({"doses": [0, 3]}, r"--model.doses must be different numbers above 0, got \[0, 3\]"),
        ({"doses": [3, 3]}, r"--model.doses must be different numbers above 0, got \[3, 3\]"),
        ({"doses": [3], "dampings": [0.0]}, r"--model.dampings must be above 0 and at most 1, got \[0.0\]"),
        ({"doses": [3], "dampings": [0.5, 1.5]}, r"--model.dampings must be above 0 and at most 1"),
        ({"doses": [3], "dampings": []}, r"--model.dampings must be above 0 and at most 1, got \[\]"),
        ({"controls": Controls(1, 0)}, r"--model.controls.num_continuations must be at least 1, got 0"),
    ],
)
def test_doses_strengths_and_controls_that_cannot_be_are_refused_at_once(tiny_checkpoint, options, message):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with pytest.raises(ValueError, match=message):
        evaluation(tiny_checkpoint, neurons, **options)


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize("which", ["next", "least_relevant"])
def test_listed_neurons_that_the_model_does_not_have_are_refused_before_it_is_loaded(tiny_checkpoint, which):
    neurons = save_neurons(tiny_checkpoint, PRUNED, **{which: [Component(UP[0], 24, 0.0)]})
    with pytest.raises(ValueError, match=r"Neuron 24 of model.layers.0.mlp.up_proj does not exist"):
        run(evaluation(tiny_checkpoint, neurons, controls=Controls(1)))


@pytest.mark.parametrize("name", ["math:no_such_function", "json.no_such_module:loads", "toy_scorers.inner:zero"])
def test_a_function_scorer_that_does_not_exist_is_refused_before_the_model_is_loaded(
    tiny_checkpoint, monkeypatch, tmp_path, name
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(evaluate, "load_for", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=f"'{name}'"):
        run(evaluation(tiny_checkpoint, scorer=name))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_data_of_zero_shot_tasks_that_cannot_be_had_stop_the_run_before_the_model_is_loaded(
    tiny_checkpoint, monkeypatch
):
    def fetch_tasks(asked: ZeroShot) -> None:
        raise ConnectionError(f"no data of {asked.tasks}")

    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluate, "fetch_tasks", fetch_tasks)
    with pytest.raises(ConnectionError, match=r"no data of \['piqa'\]"):
        run(evaluation(tiny_checkpoint, zero_shot=ZeroShot(["piqa"])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_zero_shot_accuracy_on_several_devices_is_refused_before_the_model_is_loaded(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"--model.zero_shot.tasks needs one device"):
        run(evaluation(tiny_checkpoint, zero_shot=ZeroShot(["piqa"])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_too_few_non_toxic_prompts_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"Only 4 prompts of toxicity below 0.5.*--data.prompts.num_nontoxic is 5"):
        run(evaluation(tiny_checkpoint), data(num_nontoxic=5, nontoxic_source="mild.jsonl"))


def test_a_neurons_json_that_is_missing_or_foreign_is_refused_at_once(tiny_checkpoint):
    with pytest.raises(
        FileNotFoundError, match=r"--model.neurons: nowhere.json does not exist; 'sparc3 prune' writes it"
    ):
        evaluation(tiny_checkpoint, Path("nowhere.json"))
    Path("foreign.json").write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match=r"foreign.json is not a neurons.json"):
        evaluation(tiny_checkpoint, Path("foreign.json"))


def test_the_summary_is_the_table_and_the_paths(both):
    summary = both.model.summary()
    for words in ("before", "after", "Perplexity", "Mean toxicity", "out/results.json", "out/report.html"):
        assert words in summary
