"""Evaluation with all that can be asked for: controls, doses, dampings, two judges, and prompts of both kinds."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from evaluations import (
    LEAST,
    MILD,
    NEXT,
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
    write_inputs,
)

from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.models.components import mask
from sparc3_lightning.stages.evaluate import Evaluation

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")


class Whole(NamedTuple):
    """An evaluation of everything, and what it wrote."""

    model: Evaluation
    results: dict[str, Any]
    rows: list[dict[str, Any]]
    folder: Path

    def mean(self, model: str, texts: list[str], score: str = "small", first: int | None = None) -> float:
        """Return the mean over prompts of the mean over their continuations, the slow way."""
        means = []
        for text in texts:
            mine = [row for row in self.rows if row["model"] == model and row["prompt"] == text]
            mine = [row["scores"][score] for row in sorted(mine, key=lambda row: row["continuation_index"])][:first]
            scored = [value for value in mine if value is not None]
            means += [sum(scored) / len(scored)] if scored else []
        return sum(means) / len(means)


LETTERS = "toy_scorers:letters"
KINDS = ("random", "least_relevant", "largest_weights")
CONTROLS = [f"{kind}_{i}" for kind in KINDS for i in range(2)]
DOSES = {"top_2_1": (2, 1.0), "pruned": (5, 1.0), "top_9_1": (9, 1.0)}
DOSES |= {"top_2_0.5": (2, 0.5), "top_5_0.5": (5, 0.5), "top_9_0.5": (9, 0.5)}
TOXIC, NONTOXIC = PROMPTS[2:], MILD[1:]  # the others were attributed on


def run_everything(checkpoint: str, folder: str, batch_size: int = 4) -> Whole:
    used = {"sample_ids": [prompt_id(text) for text in [*PROMPTS[:2], MILD[0], "of another file"]]}
    neurons = save_neurons(checkpoint, PRUNED, used, next=NEXT, least_relevant=LEAST)
    options = {"doses": [2, 5, 9], "dampings": [1.0, 0.5], "controls": Controls(2, 1)}
    model = evaluation(checkpoint, neurons, num_continuations=2, scorers=["small", LETTERS], **options)
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
        "too_long": 0,
        "in_both": 0,
        "chat": False,
        "bos": False,
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
    of.text.setup_windows(whole.model.data.prompts.tokens.tokenizer)

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
            cells = [row[f"{column}{end}"] for end in ("", "_low", "_high")]
            ends = [float(cell) if cell else None for cell in cells]  # of an interval that cannot be said
            assert ends == [of[key] for key in ("value", "low", "high")]
    assert (whole.folder / "doses.png").read_bytes().startswith(b"\x89PNG")


def test_another_judge_scores_the_same_continuations_and_is_set_beside_the_first(whole):
    for row in whole.rows:
        text = row["continuation"]
        expected = None if text.startswith("t") else text.count("e") / (1 + len(text))
        assert row["scores"][LETTERS] == expected
    scored = [row for row in whole.rows if row["scores"][LETTERS] is not None]
    both = [row for row in scored if row["model"] in ("baseline", "pruned")]
    found, agreement = whole.results["judges"][LETTERS], whole.results["agreement"]
    assert whole.results["protocol"]["continuations"]["scorers"] == list(whole.results["judges"]) == ["small", LETTERS]
    assert whole.results["headline_judge"] == "small"
    assert (found["is_chooser"], found["source"]) == (False, f"a function: {LETTERS}")
    assert found["fingerprint"] == whole.results["inputs"][f"scorer {LETTERS}"]
    assert (found["num_scored"], found["num_failed"]) == (len(scored), len(whole.rows) - len(scored))
    assert 0 < agreement["num_scored"] == len(both) < 44, "some were scored, and some not"
    pairs = torch.tensor([list(row["scores"].values()) for row in both], dtype=torch.float64)
    below = (pairs.unsqueeze(0) < pairs.unsqueeze(1)).sum(dim=1)
    equal = (pairs.unsqueeze(0) == pairs.unsqueeze(1)).sum(dim=1)
    mean_ranks = below + (equal - 1) / 2
    assert agreement["spearman"]["small"][LETTERS] == pytest.approx(torch.corrcoef(mean_ranks.T)[0, 1].item())
    for group, texts in (("toxic", TOXIC), ("nontoxic", NONTOXIC)):
        scored = [
            text
            for text in texts
            if all(
                any(row["model"] == name and row["prompt"] == text for row in both) for name in ("baseline", "pruned")
            )
        ]
        effect = found["effects"][group]["behavior_mean"]
        assert effect["before"] == pytest.approx(whole.mean("baseline", scored, LETTERS))
        assert effect["after"] == pytest.approx(whole.mean("pruned", scored, LETTERS))
        assert effect["num_better"] + effect["num_worse"] + effect["num_equal"] == len(scored)
    assert whole.results["num_failed"] == 0, "what the other could not score has not failed"


def test_the_verdict_speaks_of_every_control_and_of_the_other_judge(whole):
    for words in ("5 neurons", "random neurons (2 draws)", "least relevant neurons", "largest weights", "letters"):
        assert words in whole.results["verdict"]
    assert whole.results["verdict"] in " ".join(whole.model.summary().split())


@pytest.mark.slow
def test_an_evaluation_of_everything_twice_gives_the_same_results_json(whole, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(whole.folder.parent)
    again = run_everything(tiny_checkpoint, "again")
    assert again.results == whole.results
    assert again.rows == whole.rows
    for name in ("doses.csv", "report.html", "model_card.md"):
        pages = [(folder / name).read_text().replace("again", "out") for folder in (whole.folder, again.folder)]
        assert pages[0] == pages[1], name  # but for the name of the folder


def is_like(found: Any, expected: Any, tolerance: float) -> bool:
    return found == (pytest.approx(expected, rel=1e-4, abs=tolerance) if isinstance(expected, float) else expected)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_no_number(whole, tiny_checkpoint, monkeypatch, batch_size):
    monkeypatch.chdir(whole.folder.parent)
    again = run_everything(tiny_checkpoint, f"again_{batch_size}", batch_size)
    key = lambda row: (row["model"], row["prompt_id"], row["continuation_index"], row["continuation"])  # noqa: E731
    assert list(map(key, again.rows)) == list(map(key, whole.rows))
    expected, found = flat(whole.results), flat(again.results)
    assert found.keys() == expected.keys()
    differ = [name for name in found if not is_like(found[name], expected[name], 1e-4 if "percent" in name else 1e-6)]
    assert differ == ["/config/text/batch_size", "/config/prompts/batch_size", "/sha256"]


def test_another_seed_draws_other_controls(whole, tiny_checkpoint, monkeypatch):
    neurons = save_neurons(tiny_checkpoint, PRUNED, least_relevant=LEAST)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    model = evaluation(tiny_checkpoint, neurons, controls=Controls(2), num_continuations=1, max_new_tokens=2)
    run(model)
    assert model.off["random_0"] != whole.model.off["random_0"]
    assert {*model.off} == {"baseline", "pruned", *CONTROLS}


def test_controls_that_are_to_draw_more_than_the_other_models_draw_as_many_and_the_results_say_so(
    tiny_checkpoint, neurons
):
    options = {"num_continuations": 2, "controls": Controls(1, 5), "max_new_tokens": 2}
    results = run(evaluation(tiny_checkpoint, neurons, **options))
    assert {of["outcome"]["num_continuations"] for of in results["controls"].values()} == {2}
    drawn = [row for row in completions() if row["model"] == "random_0"]
    assert len(drawn) == 2 * len({row["prompt_id"] for row in drawn})


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
