"""One evaluation of long continuations says what shorter ones would have, and goes on after a break."""

import math
from pathlib import Path

import pytest
from evaluations import PRUNED, completions, data, evaluation, run, save_neurons
from test_evaluate_resume import Noting, break_off
from transformers import AutoTokenizer

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.report.page import write_report
from sparc3_lightning.stages.evaluate import RESULTS

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")
JUDGE = "toy_scorers:letters"
OPTIONS = {"scorers": ["small", JUDGE], "num_continuations": 3, "temperature": 2.0}


@pytest.fixture(autouse=True)
def toy_scorers_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)


def letters(text: str) -> float:
    return math.nan if text.startswith("t") else text.count("e") / (1 + len(text))


def chosen_by_the_small_scorer(checkpoint: str) -> Path:
    return save_neurons(checkpoint, PRUNED, {"choosers": {"small": None}})


@pytest.mark.slow
def test_the_first_tokens_are_those_of_a_shorter_run_and_the_rest_is_scored_as_it_was_cut_by_hand(tiny_checkpoint):
    neurons = chosen_by_the_small_scorer(tiny_checkpoint)
    shorter = run(evaluation(tiny_checkpoint, neurons, **OPTIONS, max_new_tokens=20), data(8), "shorter")
    longer = run(evaluation(tiny_checkpoint, neurons, **OPTIONS, max_new_tokens=26, controls=Controls(1, 1)), data(8))
    judge = longer["headline_judge"]
    assert judge == JUDGE
    assert "lengths" not in shorter
    assert longer["lengths"]["within"]["1-20"] == shorter["effects"]["toxic"]["behavior_mean"]
    assert longer["lengths"]["within"]["1-26"] == longer["effects"]["toxic"]["behavior_mean"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    of_shorter = {(row["model"], row["prompt_id"], row["continuation_index"]): row for row in completions("shorter")}
    assert not any("parts" in row for row in of_shorter.values())
    num_failed = num_later = 0
    for row in completions():
        if row["model"] not in ("baseline", "pruned"):
            assert "parts" not in row
            continue
        short = of_shorter[row["model"], row["prompt_id"], row["continuation_index"]]
        assert short["token_ids"] == row["token_ids"][:20]
        later = letters(tokenizer.decode(row["token_ids"][20:], skip_special_tokens=True))
        is_there = row["num_tokens"] > 20
        num_later += is_there
        num_failed += (short["scores"][judge] is None) + (is_there and math.isnan(later))
        expected = None if not is_there or math.isnan(later) else later
        assert row["parts"] == {"1-20": {judge: short["scores"][judge]}, "21-26": {judge: expected}}
    assert longer["lengths"]["num_failed"] == num_failed > 0
    assert num_later > 0
    assert Path("out/lengths.png").is_file()


@pytest.mark.slow
def test_pieces_are_taken_over_from_a_run_that_broke_off_and_drawn_from_files(tiny_checkpoint, monkeypatch):
    neurons = chosen_by_the_small_scorer(tiny_checkpoint)
    options = {**OPTIONS, "num_continuations": 1, "max_new_tokens": 24}
    expected = run(evaluation(tiny_checkpoint, neurons, **options), data(4), "whole")
    break_off(evaluation(tiny_checkpoint, neurons, kind=Noting, **options), data(4), 3, monkeypatch)
    assert '"parts"' in Path("out/unfinished-0.jsonl").read_text()
    again = evaluation(tiny_checkpoint, neurons, kind=Noting, **options)
    again.note(monkeypatch)
    assert run(again, data(4)) == expected
    assert len(again.continued) == 2
    assert completions() == completions("whole")
    page = Path("out/report.html").read_text()
    write_report(Path("out/report.html"), Results.load(Path("out", RESULTS)), completions())
    assert Path("out/report.html").read_text() == page
    assert "Does it hold in longer texts?" in page


@pytest.mark.slow
def test_pieces_that_another_judge_scored_are_not_taken_over(tiny_checkpoint, monkeypatch):
    options = {**OPTIONS, "num_continuations": 1, "max_new_tokens": 24}
    neurons = chosen_by_the_small_scorer(tiny_checkpoint)
    break_off(evaluation(tiny_checkpoint, neurons, kind=Noting, **options), data(4), 3, monkeypatch)
    same_neurons = save_neurons(tiny_checkpoint, PRUNED)
    with pytest.raises(ValueError, match="its judge of pieces is 1, now it is 0"):
        run(evaluation(tiny_checkpoint, same_neurons, **options), data(4))
