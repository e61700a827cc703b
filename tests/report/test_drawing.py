"""Drawing again from files: the same page, no model, and a failure costs nothing that was measured."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import replaced_at
from made_up import NEURONS, SELECTION, SELECTION_OF_NEURONS, made_up
from pages import reported

from sparc3_lightning.cli import entry_point, main
from sparc3_lightning.evaluation.completions import COMPLETIONS, load_completions, save_completions
from sparc3_lightning.evaluation.results import RESULTS, Results
from sparc3_lightning.files import sha256_of
from sparc3_lightning.report import card, page
from sparc3_lightning.report.drawing import draw, draw_or_warn

OUT = Path("out")


@pytest.fixture
def folder() -> Path:
    """What an evaluation has written when it begins to draw."""
    results, rows = made_up()
    SELECTION_OF_NEURONS.save(Path("prune/selection.json"))
    OUT.mkdir()
    (OUT / "config.yaml").write_text("seed_everything: 0\n")
    save_completions(OUT / COMPLETIONS, rows)
    reported(results, rows, NEURONS, Path("prune")).save(OUT / RESULTS)
    return OUT


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file: pytest would compare pictures that differ byte by byte, at any price."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_report_is_drawn_again_bit_for_bit_however_its_folder_is_written(folder, monkeypatch):
    assert draw(folder) == folder / "report.html"
    first = contents(folder)
    assert {"report.html", "model_card.md", "doses.csv", "differential.png", "layers.png", "toxicity.png"} <= set(first)
    for name in set(first) - {RESULTS, COMPLETIONS, "config.yaml"}:
        (folder / name).unlink()
    shutil.rmtree("prune")
    monkeypatch.setattr("sys.argv", ["sparc3"])
    main(["report", str(folder.absolute()) + "/"])
    assert contents(folder) == first


def test_a_page_comes_out_of_what_the_results_hold_and_no_scorer_is_asked(folder, monkeypatch, pictures_take_no_time):
    monkeypatch.setattr(page, "offensive_words", lambda *_: pytest.fail("a scorer was asked"))
    draw(folder)
    assert '<label class="masked">' in (folder / "report.html").read_text()


@pytest.mark.parametrize("change", ["a row is gone", "a judge is gone", "a score is gone", "another judge"])
@pytest.mark.few(2)
def test_a_page_is_not_drawn_of_continuations_that_the_results_are_not_about(folder, change):
    rows = load_completions(folder / COMPLETIONS)
    if change == "a row is gone":
        rows = rows[:-1]
    elif change == "a score is gone":
        rows[0] = {**rows[0], "scores": {**rows[0]["scores"], "other": None}}
    else:
        more = {} if change == "a judge is gone" else {"third": 0.5}
        rows = [{**row, "scores": {"small": row["scores"]["small"], **more}} for row in rows]
    save_completions(folder / COMPLETIONS, rows)
    with pytest.raises(ValueError, match=r"completions.jsonl does not hold the continuations that results.json beside"):
        draw(folder)
    assert not (folder / "report.html").exists()


FAILURES = {
    "a template": (card, "behavior_table", RuntimeError("bad\ntwo lines")),
    "a disk": (page, "write_atomically", OSError(28, "No space left on device")),
    "a picture": (page, "draw_changes", ValueError("ParseFatalException: $")),
    "a font": (page, "draw_layers", FileNotFoundError("no font")),
    "memory": (page, "draw_scatter", MemoryError()),
    "recursion": (page, "draw_doses", RecursionError("deep")),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.usefixtures("pictures_take_no_time")
@pytest.mark.few(2)
def test_whatever_fails_in_drawing_is_one_warning_that_says_how_to_draw_again(folder, monkeypatch, failure):
    before = contents(folder)
    place, name, error = FAILURES[failure]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.warns(UserWarning, match="not drawn") as warned:
            assert not draw_or_warn(folder)
    (message,) = [str(warning.message) for warning in warned]
    assert type(error).__name__ in message
    assert "'sparc3 report out' draws them" in message
    assert "\n" not in message
    assert before.items() <= contents(folder).items()
    assert draw_or_warn(folder), "the next time it can"


def test_without_matplotlib_there_is_a_warning_and_doses_csv(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"not drawn \(.*matplotlib"):
        assert not draw_or_warn(folder)
    assert (folder / "doses.csv").is_file()


def test_a_scorer_that_fails_on_single_words_masks_none(monkeypatch, pictures_take_no_time):
    class Failing:
        name = "failing"

        def score(self, texts: list[str]) -> list[float]:
            raise RuntimeError("no words")

    results, rows = made_up()
    with pytest.warns(UserWarning, match="No word of the report is masked: RuntimeError: no words"):
        inputs = page.report_inputs(rows, "small", NEURONS, None, Failing())
    assert inputs.masked_words is None
    page.write_report(OUT / "report.html", replace(results, report=inputs), rows)
    assert "could not say which words to mask" in (OUT / "report.html").read_text()


def test_a_selection_is_drawn_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparc3"])
    SELECTION.save(OUT / "selection.json")
    main(["report", "out"])
    assert {path.name for path in OUT.iterdir()} == {"selection.json", "layers.png", "differential.png"}


def test_the_folder_of_an_experiment_gets_the_page_of_its_evaluation(folder, pictures_take_no_time):
    run = Path("run")
    run.mkdir()
    (run / "experiment.json").write_text(json.dumps({"stages": {"evaluation": "out"}}))
    shutil.copy(folder / RESULTS, run / RESULTS)
    draw(run)
    assert (run / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    (run / "experiment.json").write_text("[[[")
    with pytest.raises(ValueError, match=r"experiment.json is damaged"):
        draw(run)


@pytest.mark.parametrize("given", ["nowhere", "empty", "alone", "damaged", "inconsistent", "without completions"])
@pytest.mark.few(3)
def test_a_folder_that_cannot_be_drawn_is_one_sentence(folder, given, monkeypatch, capsys, pictures_take_no_time):
    if given == "empty":
        Path("empty").mkdir()
    if given == "alone":
        replace(Results.load(folder / RESULTS), report=None).save(Path("alone") / RESULTS)
        shutil.copy(folder / COMPLETIONS, "alone")
    if given == "damaged":
        shutil.copytree(folder, given)
        Path(given, RESULTS).write_text((folder / RESULTS).read_text()[:-100])
    if given == "inconsistent":
        shutil.copytree(folder, given)
        replaced_at(Results.load(folder / RESULTS), "headline", "nobody").save(Path(given, RESULTS))
    if given == "without completions":
        shutil.copytree(folder, given)
        Path(given, COMPLETIONS).unlink()
    monkeypatch.setattr("sys.argv", ["sparc3", "report", given])
    with pytest.raises(SystemExit) as done:
        entry_point()
    said = str(done.value.code)
    assert said.startswith("sparc3: error: ")
    assert given in said
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "3", "[" * 5000, '{"model": 3}', "{}", '"text"', '{"model": "baseline", "prompt_id": true}', "\ufffd"],
)
@pytest.mark.few(3)
def test_a_damaged_row_of_completions_is_named_by_its_line(folder, line):
    path = folder / COMPLETIONS
    path.write_text(path.read_text().split("\n")[0] + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"completions.jsonl.*line 2"):
        load_completions(path)


def test_completions_that_json_can_hold_and_utf_8_cannot_are_kept(folder):
    rows = load_completions(folder / COMPLETIONS)
    rows[0]["continuation"] = "half \ud800, \u2028 and é"
    save_completions(folder / COMPLETIONS, rows)
    assert load_completions(folder / COMPLETIONS) == rows
