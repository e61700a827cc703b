"""The rows of completions.jsonl, and which of them an evaluation that goes on takes over."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparc3_lightning.data.prompts import Prompt
from sparc3_lightning.evaluation.completions import CompletionLog, completion_rows
from sparc3_lightning.evaluation.generation import Continuation

PROMPT = Prompt("p", "the dog", 0.95, input_ids=[4, 30])
IDENTITY = {"seed": 0, "models": [("baseline", 2), ("pruned", 2), ("random_0", 1)]}
MODELS = {"baseline": 2, "pruned": 2, "random_0": 1}


def rows_of(prompt: str, models: dict[str, int] = MODELS) -> list[dict[str, Any]]:
    """Return short rows of a prompt, by several models."""
    return [
        {
            "prompt_id": prompt,
            "model": model,
            "continuation_index": j,
            "prompt_token_ids": [],
            "prompt_toxicity": 0.95,
            "toxicity": 0.25,
            "continuation": "δ\u2028 x",
        }
        for model, number in models.items()
        for j in range(number)
    ]


def log_with(folder: Path, rows: list[dict[str, Any]], rank: int = 0, identity: Any = IDENTITY) -> Path:
    log = CompletionLog(folder, rank, identity)
    folder.mkdir(exist_ok=True)
    log.append(rows)
    return log.path


def begin(folder: Path, prompts: list[str], rows_per_prompt: int = 5) -> dict[str, list[dict[str, Any]]]:
    return CompletionLog(folder, 0, IDENTITY).begin([Prompt(id_, "", 0.95) for id_ in prompts], rows_per_prompt)


def test_a_row_says_by_which_model_what_was_continued_how_long_and_how_toxic_it_is() -> None:
    drawn = [Continuation([5, 6, 5], False), Continuation([], False)]
    assert completion_rows("random_0", PROMPT, drawn, ["runs far", ""], [[0.5, 0.25]]) == [
        {
            "model": "random_0",
            "prompt_id": "p",
            "continuation_index": j,
            "prompt": "the dog",
            "prompt_token_ids": [4, 30],
            "prompt_toxicity": 0.95,
            "continuation": text,
            "token_ids": ids,
            "num_tokens": len(ids),
            "num_unique_tokens": unique,
            "toxicity": toxicity,
        }
        for j, (text, ids, unique, toxicity) in enumerate([("runs far", [5, 6, 5], 2, 0.5), ("", [], 0, 0.25)])
    ]


def test_a_second_scorer_has_a_field_of_its_own_and_one_that_gave_no_number_is_null_alone() -> None:
    drawn = [Continuation([5], False)] * 3
    rows = completion_rows("pruned", PROMPT, drawn, ["a", "b", "c"], [[0.5, math.nan, 0.75], [math.inf, 0.125, 1.0]])
    assert [(row["toxicity"], row["second_toxicity"]) for row in rows] == [(0.5, None), (None, 0.125), (0.75, 1.0)]


def test_a_continuation_that_failed_has_no_score_by_any_scorer() -> None:
    drawn = [Continuation([5], True), Continuation([6], False)]
    rows = completion_rows("pruned", PROMPT, drawn, ["a", "b"], [[0.5, 0.25], [0.75, 1.0]])
    assert [(row["toxicity"], row["second_toxicity"]) for row in rows] == [(None, None), (0.25, 1.0)]


def test_as_many_scores_as_continuations_are_needed() -> None:
    with pytest.raises(ValueError, match="zip"):
        completion_rows("pruned", PROMPT, [Continuation([5], False)] * 2, ["a", "b"], [[0.5]])


def test_a_prompt_is_kept_if_every_model_has_continued_it_and_otherwise_continued_anew(tmp_path: Path) -> None:
    partly = {"baseline": 2, "pruned": 2}
    log_with(tmp_path / "out", rows_of("whole") + rows_of("partly", partly) + rows_of("not asked for"))
    kept = begin(tmp_path / "out", ["whole", "partly", "new"])
    assert kept == {"whole": rows_of("whole")}
    lines = [json.loads(line) for line in (tmp_path / "out" / "unfinished-0.jsonl").read_text().splitlines()]
    assert lines == [{"identity": json.loads(json.dumps(IDENTITY))}, *rows_of("whole")]


def test_the_models_of_a_prompt_may_lie_in_the_files_of_several_ranks_and_none_counts_twice(tmp_path: Path) -> None:
    rows = rows_of("a")
    log_with(tmp_path / "out", rows[:3], rank=0)
    log_with(tmp_path / "out", rows[2:], rank=1)  # one of them in both
    log_with(tmp_path / "out", rows_of("b")[:3] * 2, rank=2)  # six rows, but of three continuations
    assert begin(tmp_path / "out", ["a", "b"]) == {"a": rows}
    assert [path.name for path in (tmp_path / "out").glob("unfinished-*")] == ["unfinished-0.jsonl"]


def test_a_neighbouring_folder_of_the_same_run_is_used_and_of_another_run_passed_over(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    log_with(tmp_path / "version_0", rows_of("a"))
    log_with(tmp_path / "version_1", rows_of("b"), identity={**IDENTITY, "models": [("baseline", 5)]})
    assert begin(tmp_path / "new", ["a", "b"]) == {"a": rows_of("a")}
    assert (tmp_path / "version_0" / "unfinished-0.jsonl").is_file()


@pytest.mark.parametrize("toxicity", [None, 0.3])
def test_what_is_kept_has_the_toxicity_that_this_run_gives_its_prompt(tmp_path: Path, toxicity: float | None) -> None:
    (tmp_path / "new").mkdir()
    log_with(tmp_path / "version_0", rows_of("a"))
    kept = CompletionLog(tmp_path / "new", 0, IDENTITY).begin([Prompt("a", "", toxicity)], 5)
    assert kept == {"a": [{**row, "prompt_toxicity": toxicity} for row in rows_of("a")]}


def test_a_prompt_that_is_now_read_as_other_tokens_is_continued_anew(tmp_path: Path) -> None:
    log_with(tmp_path / "out", [{**row, "prompt_token_ids": [4, 30]} for row in rows_of("a") + rows_of("b")])
    prompts = [Prompt("a", "", 0.95, input_ids=[4, 30]), Prompt("b", "", 0.95, input_ids=[1, 4, 30])]
    assert set(CompletionLog(tmp_path / "out", 0, IDENTITY).begin(prompts, 5)) == {"a"}


def test_other_models_in_the_same_folder_are_refused_with_what_they_were(tmp_path: Path) -> None:
    log_with(tmp_path / "out", rows_of("a"), identity={**IDENTITY, "models": [("baseline", 2), ("pruned", 2)]})
    with pytest.raises(ValueError, match=r"its models is \[\['baseline', 2\], \['pruned', 2\]\], now it is") as raised:
        begin(tmp_path / "out", ["a"])
    assert "--trainer.logger.init_args.version" in str(raised.value)
    assert "'random_0', 1" in str(raised.value)


def test_a_line_that_was_cut_off_is_left_aside_with_all_behind_it(tmp_path: Path) -> None:
    path = log_with(tmp_path / "out", rows_of("a"))
    path.write_text(path.read_text()[:-9] + "\n" + json.dumps(rows_of("b")[0]) + "\n")
    assert begin(tmp_path / "out", ["a", "b"]) == {}


def test_removing_takes_the_files_of_all_ranks_of_this_folder_only(tmp_path: Path) -> None:
    for rank in range(3):
        log_with(tmp_path / "out", [], rank)
    other = log_with(tmp_path / "other", [])
    CompletionLog(tmp_path / "out", 0, IDENTITY).remove()
    assert not list((tmp_path / "out").iterdir())
    assert other.is_file()
