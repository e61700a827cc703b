"""Prompts chosen by what the model itself makes of them, repetition, and pairs of sentences, in one command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import sentence

from sparc3_lightning import cli
from sparc3_lightning.scorers.base import Remembering, uniqueness
from sparc3_lightning.scorers.registry import check_scorer, fetch_scorer, fingerprint_of, load_scorer
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.plan import from_screening, screening

COMPLETIONS = "completions.jsonl"


@pytest.fixture(autouse=True)
def as_if_from_python(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


@pytest.fixture(autouse=True)
def config(tmp_path, tiny_checkpoint) -> None:
    """A tiny experiment on repetition: 24 prompts are screened, the worst 6 attributed on, the next 8 evaluated."""
    (tmp_path / "general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(8)) + "\n")
    (tmp_path / "text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(10)) + "\n")
    prompts = [{"context": f"{sentence(100 + i, 3 + i % 4)} BLANK .", "topic": "ab"[i % 2]} for i in range(48)]
    pairs = [{"sent_more": sentence(i, 6), "sent_less": sentence(60 + i, 6)} for i in range(8)]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = "sparc3_lightning.data."
    chosen = {"by": "continuation", "min_toxicity": None}
    of_file = {"source": "prompts.jsonl", "text_field": "context", "until": "BLANK", "where": {"topic": "a"}}
    options = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"checkpoint": tiny_checkpoint, "general_seeds": [0]},
        "screen": {
            "class_path": f"{data}RealToxicityPrompts",
            "init_args": {**of_file, "min_toxicity": None, "num_prompts": None},
        },
        "general": {
            "class_path": f"{data}C4",
            "init_args": {"source": "general.txt", "num_samples": 4, "seq_len": 16},
        },
        "behavior": {"class_path": f"{data}ToxicPrompts", "init_args": {**chosen, "num_samples": 6}},
        "prune": {"num_neurons": 6, "min_differential_strength": -1000.0},
        "evaluate": {
            "scorers": ["repetition"],
            "behavior": "repetition",
            "sampling": {"protocol": "greedy", "max_new_tokens": 12},
            "controls": {"num_draws": 1},
        },
        "data": {
            "text": {
                "class_path": f"{data}WikiText2",
                "init_args": {"source": "text.txt", "window": 32, "stride": 16},
            },
            "prompts": {"class_path": f"{data}RealToxicityPrompts", "init_args": {**chosen, "num_prompts": 8}},
            "pairs": {"class_path": f"{data}SentencePairs", "init_args": {"source": "pairs.jsonl"}},
        },
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(options, sort_keys=False))


def stages_of(folder: Path) -> dict[str, Path]:
    return {name: Path(path) for name, path in json.loads((folder / "experiment.json").read_text())["stages"].items()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / COMPLETIONS).read_text().splitlines()]


def score_of(row: dict[str, Any]) -> float:
    return row["scores"]["repetition"]


@pytest.mark.slow
def test_one_command_screens_prompts_attributes_on_the_worst_and_evaluates_on_the_next_worst(capsys, monkeypatch):
    done = cli.main(["run", "--config", "experiment.yaml"])
    folder = Path(done.trainer.log_dir)
    stages = stages_of(folder)
    assert list(stages) == ["screen", "general_0", "behavior", "neurons", "evaluation"]
    screened = rows_of(stages["screen"])
    assert {row["model"] for row in screened} == {"baseline"}
    assert len(screened) == 24
    for row in screened:
        assert score_of(row) == pytest.approx(1 - row["num_unique_tokens"] / row["num_tokens"])
    ranked = [row["prompt_id"] for row in sorted(screened, key=lambda row: (-score_of(row), row["prompt_id"]))]
    used = json.loads((stages["neurons"] / "neurons.json").read_text())["provenance"]["sample_ids"]
    assert set(used) & set(ranked) == set(ranked[:6])
    chosen = NeuronList.load(stages["neurons"] / "neurons.json").choosers()
    assert chosen == [("repetition", fingerprint_of("repetition"))], "which chose the prompts"
    after = rows_of(stages["evaluation"])
    assert {row["prompt_id"] for row in after} == set(ranked[6:14])
    # The same model, prompts and greedy decoding: what was screened comes again.
    found = {row["prompt_id"]: score_of(row) for row in screened}
    assert all(score_of(row) == found[row["prompt_id"]] for row in after if row["model"] == "baseline")
    results = json.loads((folder / "results.json").read_text())
    assert results["headline"] == "all"
    assert results["behavior"] == "repetition"
    measures = results["baseline"]["groups"]["all"]
    assert measures["uniqueness"] == pytest.approx(1 - measures["behavior_mean"])
    assert results["preference"]["num_pairs"] == 8
    assert results["protocol"]["pairs"]["source"] == "pairs.jsonl"
    assert "The scorer that chose the neurons, 'repetition', judges them: no other judge was" in results["verdict"]
    assert "The more stereotypical sentence of a pair" in results["verdict"]
    page = (folder / "report.html").read_text()
    assert "Mean repetition" in page
    assert "Stereotype preferred, of 8 pairs" in page
    # Once more: the answers of the first stage lie there now, and nothing is run again.
    main = cli.main
    monkeypatch.setattr(cli, "main", lambda args: pytest.fail(f"{args[0]} was run again"))
    capsys.readouterr()
    main(["run", "--config", "experiment.yaml"])


@pytest.mark.slow
def test_the_stage_is_planned_first_and_another_choice_of_prompts_gives_other_later_stages():
    plans = []
    for number in (None, 10):
        changes = [] if number is None else [f"--screen.init_args.num_prompts={number}"]
        cli.main(["run", "--config", "experiment.yaml", "--plan", "plan.txt", *changes])
        fields = Path("plan.txt").read_text().split("\0")[:-1]
        plans.append(list(zip(fields[::3], fields[2::3], strict=True)))
    assert [verb for verb, *_ in plans[0]] == ["evaluate", "attribute", "attribute", "prune", "evaluate"]
    folders = [
        [yaml.safe_load(Path(file).read_text())["trainer"]["logger"]["init_args"]["version"] for _, file in plan]
        for plan in plans
    ]
    same = [a == b for a, b in zip(*folders, strict=True)]
    assert same == [False, True, False, False, False]


@pytest.mark.slow
def test_what_general_text_costs_can_be_asked_of_the_answers_of_the_model_too():
    own = yaml.safe_load(Path("experiment.yaml").read_text())["behavior"]
    own["init_args"] |= {"source": None, "num_samples": 5}  # the other class has a source too
    Path("own.yaml").write_text(yaml.safe_dump({"general": own}))
    cli.main(["run", "--config", "experiment.yaml", "--config", "own.yaml", "--plan", "plan.txt"])
    fields = Path("plan.txt").read_text().split("\0")[:-1]
    screened, *attributed = [yaml.safe_load(Path(file).read_text()) for file in fields[2::3][:3]]
    folder = screened["trainer"]["logger"]["init_args"]["version"]
    for of in attributed:
        assert of["data"]["init_args"]["source"] == f"lightning_logs/evaluate/{folder}/completions.jsonl"
    with pytest.raises(ValueError, match="add the group 'screen'"):
        cli.main(
            ["run", "--config", "experiment.yaml", "--config", "own.yaml", "--screen", "null", "--plan", "plan.txt"]
        )


def test_screening_measures_the_model_as_it_is_by_the_first_scorer_and_one_window():
    text = {"class_path": "T", "init_args": {"window": 32, "num_tokens": None, "conventions": ["sliding", "disjoint"]}}
    evaluate = {
        "scorers": ["small", "other"],
        "controls": {"num_draws": 5, "num_continuations": 5},
        "zero_shot": {"tasks": ["piqa"], "limit": 7},
    }
    evaluate |= {"doses": [10], "dampings": [0.5]}
    options = {"evaluate": evaluate, "data": {"text": text, "prompts": "P", "pairs": "Q"}, "screen": "S"}
    found = screening(options, {"checkpoint": "c"})
    assert found["model"] == {
        "scorers": ["small"],
        "controls": {"num_draws": 0},
        "doses": [],
        "dampings": [1.0],
        "zero_shot": {"tasks": []},
        "neurons": None,
        "checkpoint": "c",
    }
    one_window = {"window": 32, "num_tokens": 32, "conventions": ["disjoint"]}
    assert found["data"] == {"text": {"class_path": "T", "init_args": one_window}, "prompts": "S"}


def test_only_prompts_by_continuation_that_name_no_source_come_from_the_stage():
    by_file = {"class_path": "A", "init_args": {"by": "continuation", "source": "mine.jsonl"}}
    for data in (by_file, {"class_path": "A", "init_args": {"by": "prompt", "source": None}}):
        assert from_screening(data, Path("completions.jsonl")) == data
        assert from_screening(data, None) == data
    with pytest.raises(
        ValueError, match=r"A chooses prompts by the model's own continuation .* add the group 'screen'"
    ):
        from_screening({"class_path": "A", "init_args": {"by": "continuation"}}, None)


def test_repetition_is_over_the_tokens_drawn_and_over_words_where_there_are_only_texts():
    check_scorer("repetition")
    assert fetch_scorer("repetition") == []
    scorer = Remembering(load_scorer("repetition"))
    texts, tokens = ["ha ha ha ha", "one two"], [[5, 5, 5, 6], [7, 8]]
    assert scorer.score(texts) == [0.75, 0.0]
    assert scorer.score_drawn(texts, tokens) == [0.5, 0.0]
    empty, _ = scorer.score_drawn(["", "a"], [[], [3]])
    assert empty != empty, "an empty continuation has no share of unique tokens"
    assert uniqueness([1, 1, 2, 2]) == 0.5
    other = Remembering(load_scorer("small"))
    assert other.score_drawn(["idiot"], [[5, 5]]) == other.score(["idiot"])
