"""Longer continuations in pieces: where they are cut, what each piece scores, and the effect by position."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hand_written import difference

from sparc3_lightning.data.prompts import Prompt
from sparc3_lightning.evaluation.completions import (
    CompletionLog,
    completion_rows,
    load_completions,
    save_completions,
)
from sparc3_lightning.evaluation.generation import Continuation
from sparc3_lightning.evaluation.lengths import (
    by_length,
    lengths_of,
    pieces_of,
    positions,
    prefixes,
    score_pieces,
)
from sparc3_lightning.evaluation.results import Lengths
from sparc3_lightning.files import read_as, to_json
from sparc3_lightning.scorers.base import Remembering, Scorer
from sparc3_lightning.scorers.repetition import RepetitionScorer

PROMPT = Prompt("p", "the dog", 0.95, input_ids=[4, 30])


class Sums(Scorer):
    """Scores a text of numbers by their sum; one that holds a 13 cannot be scored."""

    def __init__(self) -> None:
        super().__init__("sums")
        self.asked: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.asked.append(list(texts))
        return [math.nan if "13" in text.split() else sum(map(int, text.split())) / 10_000 for text in texts]


def decode(ids: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in ids]


@pytest.mark.parametrize(
    ("most", "lengths"),
    [
        (1, [1]),
        (20, [20]),
        (21, [20, 21]),
        (50, [20, 50]),
        (51, [20, 50, 51]),
        (100, [20, 50, 100]),
        (700, [20, 50, 100, 200, 500, 700]),
        (2001, [20, 50, 100, 200, 500, 1000, 2000, 2001]),
    ],
)
def test_the_lengths_are_the_usual_ones_below_the_most_and_the_most_itself(most, lengths):
    assert lengths_of(most) == lengths


def test_a_piece_is_named_after_its_first_and_its_last_token_and_the_whole_is_no_piece():
    assert [piece.name for piece in prefixes(100)] == ["1-20", "1-50", "1-100"]
    assert [piece.name for piece in positions(100)] == ["1-20", "21-50", "51-100"]
    assert [piece.name for piece in pieces_of(100)] == ["1-20", "1-50", "21-50", "51-100"]
    assert pieces_of(20) == pieces_of(5) == []


@pytest.mark.parametrize("number", [0, 1, 19, 20, 21, 49, 50, 51, 99, 100])
def test_pieces_are_cut_by_token_and_one_that_begins_after_the_end_has_no_score(number):
    ids = list(range(100, 100 + number))
    found = score_pieces(pieces_of(100), [ids, [1] * 100], decode, Sums())
    expected = {"1-20": ids[:20], "1-50": ids[:50], "21-50": ids[20:50], "51-100": ids[50:]}
    for name, cut in expected.items():
        score, of_the_other = found[name]
        if cut or name.startswith("1-"):
            assert score == sum(cut) / 10_000, name
        else:
            assert math.isnan(score), name
        first, last = map(int, name.split("-"))
        assert of_the_other == (last - first + 1) / 10_000


def test_a_piece_that_no_continuation_reaches_is_not_put_to_the_scorer():
    scorer = Sums()
    found = score_pieces(pieces_of(100), [[1, 2], []], decode, scorer)
    assert scorer.asked == [["1 2", ""], ["1 2", ""]]
    assert all(map(math.isnan, [*found["21-50"], *found["51-100"]]))


def test_a_judge_that_counts_tokens_is_given_those_of_the_piece():
    ids = [7] * 20 + list(range(30))
    found = score_pieces(
        pieces_of(100), [ids], lambda rows: ["the same"] * len(rows), Remembering(RepetitionScorer("repetition"))
    )
    assert found["1-20"] == [1 - 1 / 20]
    assert found["21-50"] == [0.0]
    assert found["1-50"] == [1 - 30 / 50]


def drawn_row(ids: list[int], failed: bool = False, judge: str = "sums", model: str = "pruned") -> dict[str, Any]:
    parts = score_pieces(pieces_of(100), [ids], decode, Sums())
    of_pieces = {piece: {judge: scores} for piece, scores in parts.items()}
    texts = decode([ids])
    (row,) = completion_rows(model, PROMPT, [Continuation(ids, failed)], texts, {judge: Sums().score(texts)}, of_pieces)
    return row


def test_a_row_has_the_score_of_each_piece_and_null_where_there_is_none():
    row = drawn_row([1] * 30 + [13])
    assert row["scores"] == {"sums": None}
    assert row["parts"] == {
        "1-20": {"sums": 0.002},
        "1-50": {"sums": None},
        "21-50": {"sums": None},
        "51-100": {"sums": None},
    }
    failed = drawn_row([1] * 30, failed=True)
    assert all(score == {"sums": None} for score in failed["parts"].values())


@pytest.mark.parametrize("parts", [None, {}])
def test_a_row_of_one_length_is_as_ever(parts):
    (row,) = completion_rows("pruned", PROMPT, [Continuation([5], False)], ["a"], {"small": [0.5]}, parts)
    assert "parts" not in row


def test_rows_with_pieces_come_back_from_the_file(tmp_path):
    rows = [drawn_row([1] * 60), drawn_row([1] * 5)]
    save_completions(tmp_path / "completions.jsonl", rows)
    assert load_completions(tmp_path / "completions.jsonl") == rows
    save_completions(tmp_path / "completions.jsonl", [{**rows[0], "parts": {"1-20": {"sums": 1.5}}}])
    with pytest.raises(ValueError, match=r"line 1.parts.1-20.sums must be at least 0 and at most 1"):
        load_completions(tmp_path / "completions.jsonl")


def test_what_is_taken_over_keeps_its_pieces_by_the_name_that_this_run_gives_the_judge(tmp_path: Path):
    row = {**drawn_row([1] * 60), "scores": {"sums": 0.5, "other": 0.25}}
    (tmp_path / "old").mkdir()
    CompletionLog(tmp_path / "old", 0, {"seed": 0}, ["sums", "other"]).append([row])
    (tmp_path / "new").mkdir()
    kept = CompletionLog(tmp_path / "new", 0, {"seed": 0}, ["./sums", "./other"]).begin([PROMPT], 1)
    parts = {piece: {"./sums": scores["sums"]} for piece, scores in row["parts"].items()}
    assert kept == {"p": [{**row, "scores": {"./sums": 0.5, "./other": 0.25}, "parts": parts}]}


# Per model, prompt and continuation the tokens that were drawn: the model before says 40 everywhere, the one after
# less than half at first and more later; 13 cannot be scored.
NUM_TOKENS = {
    "t0": [100, 60],
    "t1": [100, 15],
    "t2": [70, 30],
    "t3": [100, 100],
    "t4": [80, 0],
    "t5": [51, 100],
    "t6": [10, 12],
}
LATER = {"t0": 20, "t1": 24, "t2": 30, "t3": 35, "t4": 38, "t5": 33, "t6": 40}


def tokens_of(model: str, prompt: str, j: int) -> list[int]:
    number = NUM_TOKENS[prompt][j]
    if model == "baseline":
        return [40 + j] * number
    ids = [14 + int(prompt[1])] * 20 + [20] * 30 + [LATER[prompt]] * 50
    ids[60] = 13 if (prompt, j) == ("t3", 1) else ids[60]
    return ids[:number]


def all_rows() -> list[dict[str, Any]]:
    rows = []
    for model in ("baseline", "pruned"):
        for prompt, numbers in NUM_TOKENS.items():
            for j in range(len(numbers)):
                row = drawn_row(tokens_of(model, prompt, j), model=model)
                rows.append({**row, "prompt_id": prompt, "continuation_index": j})
    mild = [{**row, "prompt_id": "n", "prompt_toxicity": 0.1} for row in rows if row["prompt_id"] == "t0"]
    control = [{name: value for name, value in row.items() if name != "parts"} for row in rows]
    return rows + mild + [{**row, "model": "random_0"} for row in control]


def by_hand(start: int, end: int) -> dict[str, dict[str, float]]:
    """Mean score of a piece per model and prompt, slow and obvious."""
    found: dict[str, dict[str, float]] = {"baseline": {}, "pruned": {}}
    for model, of_model in found.items():
        for prompt in NUM_TOKENS:
            scores = []
            for j in range(2):
                ids = tokens_of(model, prompt, j)
                if (start == 0 or len(ids) > start) and 13 not in ids[start:end]:
                    scores.append(sum(ids[start:end]) / 10_000)
            if scores:
                of_model[prompt] = sum(scores) / len(scores)
    return found


def found() -> Lengths:
    result = by_length(all_rows(), "sums", 100)
    assert result is not None
    return result


def test_the_effect_within_each_length_and_at_each_position_is_that_of_the_pieces_cut_by_hand():
    lengths = found()
    pieces = {"1-20": (0, 20), "1-50": (0, 50), "1-100": (0, 100), "21-50": (20, 50), "51-100": (50, 100)}
    for effects, names in ((lengths.within, ["1-20", "1-50", "1-100"]), (lengths.at, ["1-20", "21-50", "51-100"])):
        assert list(effects) == names
        for name, effect in effects.items():
            means = by_hand(*pieces[name])
            prompts = [prompt for prompt in NUM_TOKENS if all(prompt in of_model for of_model in means.values())]
            assert effect == difference(*([of_model[prompt] for prompt in prompts] for of_model in means.values()))
    assert lengths.at["51-100"].num_prompts == 6, "of one prompt no continuation is so long"
    assert lengths.at["1-20"] == lengths.within["1-20"]


def test_the_change_at_the_last_position_is_compared_with_the_first_over_prompts_that_have_both():
    first, last = by_hand(0, 20), by_hand(50, 100)
    prompts = sorted(last["pruned"])
    changes = [[of["pruned"][prompt] - of["baseline"][prompt] for prompt in prompts] for of in (first, last)]
    found_by_hand = difference(*changes)
    change = found().last_less_first
    assert (change.before, change.after) == pytest.approx((found_by_hand.before, found_by_hand.after))
    assert change.difference.value == pytest.approx(found_by_hand.difference.value)
    assert change.num_prompts == 6


def test_how_many_continuations_reach_a_position_is_told_of_both_models():
    reaching = found().reaching
    assert list(reaching) == ["21-50", "51-100"]
    of = {name: sum(sum(n > start for n in numbers) / 2 for numbers in NUM_TOKENS.values()) / 7
          for name, start in (("21-50", 20), ("51-100", 50))}  # fmt: skip
    assert {name: share.before for name, share in reaching.items()} == of
    assert all(share.difference.value == 0 for share in reaching.values())


def test_a_piece_that_could_not_be_scored_is_counted_and_one_that_is_not_there_is_not():
    assert found().num_failed == 1
    rows = all_rows()
    for row in rows:
        if "parts" in row:
            row["parts"] = {piece: {"sums": None} for piece in row["parts"]}
    nothing = by_length(rows, "sums", 100)
    assert not nothing.is_known
    assert nothing.last_less_first is None
    # Two prefixes of each of the 32 continuations, and later pieces of those that reach them.
    longer = [n for numbers in [*NUM_TOKENS.values(), NUM_TOKENS["t0"]] for n in numbers]
    assert nothing.num_failed == 2 * sum(2 + (n > 20) + (n > 50) for n in longer)


def test_there_is_nothing_to_tell_of_one_length_or_of_a_model_as_it_is():
    rows = all_rows()
    assert by_length(rows, "sums", 20) is None
    assert by_length([row for row in rows if row["model"] == "baseline"], "sums", 100) is None


def test_the_figures_come_back_from_json():
    written = to_json(found())
    assert to_json(read_as(Lengths, json.loads(written))) == written
