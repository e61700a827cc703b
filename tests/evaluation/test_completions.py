"""The rows of completions.jsonl, and which of them an evaluation that goes on takes over."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparc3_lightning.data.prompts import Prompt
from sparc3_lightning.evaluation.completions import (
    CompletionLog,
    completion_rows,
    load_completions,
    read_unfinished,
    save_completions,
)
from sparc3_lightning.evaluation.generation import Continuation

PROMPT = Prompt("p", "the dog", 0.95, input_ids=[4, 30])
IDENTITY = {"seed": 0, "models": [("baseline", 2), ("pruned", 2), ("random_0", 1)]}
AS_JSON = json.loads(json.dumps(IDENTITY))
MODELS = {"baseline": 2, "pruned": 2, "random_0": 1}


def rows_of(prompt: str, models: dict[str, int] = MODELS) -> list[dict[str, Any]]:
    """Return short rows of a prompt, by several models."""
    return [
        {
            "prompt_id": prompt,
            "model": model,
            "continuation_index": j,
            "prompt": f"the text of {prompt}",
            "prompt_token_ids": [],
            "prompt_toxicity": 0.95,
            "continuation": "δ\u2028 x",
            "token_ids": [7, 8, 7],
            "num_tokens": 3,
            "num_unique_tokens": 2,
            "scores": {"small": 0.25},
        }
        for model, number in models.items()
        for j in range(number)
    ]


def log_with(folder: Path, rows: list[dict[str, Any]], rank: int = 0, identity: Any = IDENTITY) -> Path:
    log = CompletionLog(folder, rank, identity, ["small"])
    folder.mkdir(exist_ok=True)
    log.append(rows)
    return log.path


def begin(folder: Path, prompts: list[str], rows_per_prompt: int = 5) -> dict[str, list[dict[str, Any]]]:
    of = [Prompt(id_, f"the text of {id_}", 0.95) for id_ in prompts]
    return CompletionLog(folder, 0, IDENTITY, ["small"]).begin(of, rows_per_prompt)


def test_a_row_says_by_which_model_what_was_continued_how_long_and_how_toxic_it_is() -> None:
    drawn = [Continuation([5, 6, 5], False), Continuation([], False)]
    assert completion_rows("random_0", PROMPT, drawn, ["runs far", ""], {"small": [0.5, 0.25]}) == [
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
            "scores": {"small": toxicity},
        }
        for j, (text, ids, unique, toxicity) in enumerate([("runs far", [5, 6, 5], 2, 0.5), ("", [], 0, 0.25)])
    ]


def test_each_judge_has_a_score_of_its_own_and_one_that_gave_no_number_is_null_alone() -> None:
    drawn = [Continuation([5], False)] * 3
    rows = completion_rows(
        "pruned", PROMPT, drawn, ["a", "b", "c"], {"a": [0.5, math.nan, 0.75], "b": [math.inf, 0.125, 1.0]}
    )
    assert [row["scores"] for row in rows] == [{"a": 0.5, "b": None}, {"a": None, "b": 0.125}, {"a": 0.75, "b": 1.0}]


def test_a_continuation_that_failed_has_no_score_by_any_scorer() -> None:
    drawn = [Continuation([5], True), Continuation([6], False)]
    rows = completion_rows("pruned", PROMPT, drawn, ["a", "b"], {"a": [0.5, 0.25], "b": [0.75, 1.0]})
    assert [row["scores"] for row in rows] == [{"a": None, "b": None}, {"a": 0.25, "b": 1.0}]


def test_as_many_scores_as_continuations_are_needed() -> None:
    with pytest.raises(ValueError, match="zip"):
        completion_rows("pruned", PROMPT, [Continuation([5], False)] * 2, ["a", "b"], {"a": [0.5]})


def test_a_prompt_is_kept_if_every_model_has_continued_it_and_otherwise_continued_anew(tmp_path: Path) -> None:
    partly = {"baseline": 2, "pruned": 2}
    log_with(tmp_path / "out", rows_of("whole") + rows_of("partly", partly) + rows_of("not asked for"))
    kept = begin(tmp_path / "out", ["whole", "partly", "new"])
    assert kept == {"whole": rows_of("whole")}
    assert read_unfinished(tmp_path / "out" / "unfinished-0.jsonl") == (AS_JSON, rows_of("whole"))


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


def test_what_is_kept_has_the_names_that_this_run_gives_the_judges(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    before = [{**row, "scores": {"small": 0.25, "b": None}} for row in rows_of("a")]
    log_with(tmp_path / "version_0", before)
    prompts = [Prompt("a", "the text of a", 0.95)]
    kept = CompletionLog(tmp_path / "new", 0, IDENTITY, ["./copy", "other"]).begin(prompts, 5)
    assert kept == {"a": [{**row, "scores": {"./copy": 0.25, "other": None}} for row in rows_of("a")]}
    assert CompletionLog(tmp_path / "new", 0, IDENTITY, ["./copy"]).begin(prompts, 5) == {}, "of two judges, not of one"


@pytest.mark.parametrize("toxicity", [None, 0.3])
def test_what_is_kept_has_the_toxicity_that_this_run_gives_its_prompt(tmp_path: Path, toxicity: float | None) -> None:
    (tmp_path / "new").mkdir()
    log_with(tmp_path / "version_0", rows_of("a"))
    kept = CompletionLog(tmp_path / "new", 0, IDENTITY, ["small"]).begin([Prompt("a", "the text of a", toxicity)], 5)
    assert kept == {"a": [{**row, "prompt_toxicity": toxicity} for row in rows_of("a")]}


def test_a_prompt_that_is_now_read_as_other_tokens_is_continued_anew(tmp_path: Path) -> None:
    log_with(tmp_path / "out", [{**row, "prompt_token_ids": [4, 30]} for row in rows_of("a") + rows_of("b")])
    prompts = [Prompt("a", "", 0.95, input_ids=[4, 30]), Prompt("b", "", 0.95, input_ids=[1, 4, 30])]
    assert set(CompletionLog(tmp_path / "out", 0, IDENTITY, ["small"]).begin(prompts, 5)) == {"a"}


def test_other_models_in_the_same_folder_are_refused_with_what_they_were(tmp_path: Path) -> None:
    log_with(tmp_path / "out", rows_of("a"), identity={**IDENTITY, "models": [("baseline", 2), ("pruned", 2)]})
    with pytest.raises(ValueError, match=r"its models is \[\['baseline', 2\], \['pruned', 2\]\], now it is") as raised:
        begin(tmp_path / "out", ["a"])
    assert "--trainer.logger.init_args.version" in str(raised.value)
    assert "'random_0', 1" in str(raised.value)


@pytest.mark.parametrize("cut", [1, 9, 200])
def test_a_last_line_that_was_broken_off_is_left_aside(tmp_path: Path, cut: int) -> None:
    path = log_with(tmp_path / "out", rows_of("a") + rows_of("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    kept = begin(tmp_path / "out", ["a", "b"])
    assert kept == {"a": rows_of("a"), **({"b": rows_of("b")} if cut == 1 else {})}, "only its line break is lost"


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("bit", [1, 16])
def test_a_flipped_bit_is_refused_with_file_and_line_in_the_folder_and_passed_over_in_another(
    tmp_path: Path, place: float, bit: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = log_with(tmp_path / "out", rows_of("a"))
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    content[at] ^= bit
    path.write_bytes(content)
    number = content[:at].count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"out/unfinished-0.jsonl, line {number} cannot be used: .*\. Choose another"):
        begin(tmp_path / "out", ["a"])
    (tmp_path / "new").mkdir()
    with caplog.at_level("INFO"):
        assert begin(tmp_path / "new", ["a"]) == {}
    assert f"Continuations of an earlier run were not used: {path}, line {number} cannot be used" in caplog.text


def test_a_line_in_the_middle_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = log_with(tmp_path / "out", rows_of("a"))
    path.write_text(path.read_text()[:-9] + "\n" + json.dumps(rows_of("b")[0]) + "\n")
    with pytest.raises(ValueError, match=r"unfinished-0.jsonl, line 6 cannot be used"):
        begin(tmp_path / "out", ["a", "b"])


@pytest.mark.parametrize("start", [b"", b'{"format": "spar'])
def test_a_rank_that_was_killed_before_its_first_line_left_nothing_of_another_run(tmp_path: Path, start: bytes) -> None:
    log_with(tmp_path / "out", rows_of("a"))
    (tmp_path / "out" / "unfinished-1.jsonl").write_bytes(start)
    assert begin(tmp_path / "out", ["a"]) == {"a": rows_of("a")}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished-0.jsonl"]


def test_an_empty_file_alone_is_the_beginning_of_any_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished-0.jsonl").touch()
    assert begin(tmp_path / "out", ["a"]) == {}
    assert read_unfinished(tmp_path / "out" / "unfinished-0.jsonl") == (AS_JSON, [])


def test_files_of_more_ranks_than_there_are_now_are_taken_over(tmp_path: Path) -> None:
    for rank in range(8):
        log_with(tmp_path / "out", rows_of(f"p{rank}"), rank)
    prompts = [f"p{rank}" for rank in range(8)]
    assert begin(tmp_path / "out", prompts) == {prompt: rows_of(prompt) for prompt in prompts}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished-0.jsonl"]


def test_a_file_of_an_older_version_is_refused_in_the_folder_and_passed_over_in_another(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    lines = [{"identity": IDENTITY}, *rows_of("a")]
    (tmp_path / "old" / "unfinished-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"line 1 cannot be used: it has no checksum.*older version"):
        begin(tmp_path / "old", ["a"])
    (tmp_path / "new").mkdir()
    assert begin(tmp_path / "new", ["a"]) == {}


@pytest.mark.parametrize("name", ["scorers", "tokenizer", "versions", "checkpoint_fingerprint"])
def test_it_is_said_what_changed_where_another_folder_has_continuations_of_the_same_options(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    log_with(tmp_path / "version_0", rows_of("a"), identity={**IDENTITY, name: "before"})
    (tmp_path / "new").mkdir()
    log = CompletionLog(tmp_path / "new", 0, {**IDENTITY, name: "now"}, ["small"])
    with caplog.at_level("INFO"):
        assert log.begin([Prompt("a", "the text of a", 0.95)], 5) == {}
    assert f"version_0 were not used: the {name} changed." in caplog.text


def test_a_prompt_of_other_white_space_is_continued_anew(tmp_path: Path) -> None:
    log_with(tmp_path / "out", rows_of("a"))
    prompt = Prompt("a", "the text  of a", 0.95, input_ids=[4])
    assert CompletionLog(tmp_path / "out", 0, IDENTITY, ["small"]).begin([prompt], 5) == {}


def test_a_row_of_another_form_is_refused_with_its_line(tmp_path: Path) -> None:
    for wrong in ({"scores": {"small": 1.5}}, {"num_tokens": -1}, {"continuation_index": "1"}, {"prompt": None}):
        path = log_with(tmp_path / "out", [{**rows_of("a")[0], **wrong}])
        with pytest.raises(ValueError, match=rf"holds no continuations of this version: line 2.{next(iter(wrong))}\b"):
            begin(tmp_path / "out", ["a"])
        path.unlink()


def test_completions_come_back_and_a_line_that_was_changed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    save_completions(path, rows_of("a"))
    assert load_completions(path) == rows_of("a")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["continuation"] for line in lines[:-1]] == ["δ\u2028 x"] * 5
    lines[2] = lines[2].replace("0.25", "0.26")
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"completions.jsonl, line 3 cannot be used: its checksum does not match"):
        load_completions(path)
    save_completions(path, [])
    assert load_completions(path) == []


def test_removing_takes_the_files_of_all_ranks_of_this_folder_only(tmp_path: Path) -> None:
    for rank in range(3):
        log_with(tmp_path / "out", [], rank)
    other = log_with(tmp_path / "other", [])
    CompletionLog(tmp_path / "out", 0, IDENTITY, ["small"]).remove()
    assert not list((tmp_path / "out").iterdir())
    assert other.is_file()
