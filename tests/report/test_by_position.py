"""Longer texts in the report: what the sentence claims, and what picture and page show."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import made_up
from pages import CARD, check_texts, write

from sparc3_lightning.evaluation.intervals import Difference, paired_difference, unknown
from sparc3_lightning.evaluation.reproduction import compare
from sparc3_lightning.evaluation.results import Lengths, Results
from sparc3_lightning.report import figures
from sparc3_lightning.report.figures import draw_lengths
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.verdict import by_position


def effect(change: float, spread: float = 0.02, number: int = 60, before: float = 0.4) -> Difference:
    """A change of the mean by so much, over prompts that differ by so much."""
    around = torch.linspace(-1, 1, number, dtype=torch.float64) * spread
    return paired_difference(torch.full((number,), before, dtype=torch.float64), before + change + around)


def changes(first: float, last: float, spread: float = 0.02, number: int = 60) -> Difference:
    around = torch.linspace(-1, 1, number, dtype=torch.float64) * spread
    return paired_difference(torch.full((number,), first, dtype=torch.float64), last + around, most=2.0)


def lengths(*at: Difference | None, less: Difference | None = None, num_failed: int = 0) -> Lengths:
    names = [["1-20", "21-50", "51-100", "101-200", "201-500", "501-1000"][i] for i in range(len(at))]
    within = {f"1-{name.partition('-')[2]}": of for name, of in zip(names, at, strict=True)}
    reaching = {name: effect(-0.02, before=0.8) for name in names[1:]}
    return Lengths(within, dict(zip(names, at, strict=True)), less, reaching, num_failed)


FADING = lengths(effect(-0.2), effect(-0.1), effect(0.0), less=changes(-0.2, 0.0))


def test_an_effect_that_is_smaller_at_the_end_fades_and_each_position_is_told():
    said = by_position(FADING, "toxicity")
    first = effect(-0.2).percent
    interval = f"{first.low:+.1f} to {first.high:+.1f} %"
    assert said.startswith(
        f"Mean toxicity by position: tokens 1-20: -50.0 % ({interval}), evident; tokens 21-50: -25.0"
    )
    assert "tokens 51-100: +0.0 % (" in said or "tokens 51-100: -0.0 % (" in said
    assert said.count(", evident") == 2
    assert said.count(", no evidence of a change") == 1
    assert "The effect fades: the change is -0.200 at the first and +0.000 at the last, +0.200 (" in said.replace(
        "-0.000", "+0.000"
    )
    assert "too narrow" not in said


def test_an_effect_that_is_larger_at_the_end_grows_and_one_whose_interval_holds_zero_does_neither():
    grown = by_position(lengths(effect(-0.1), effect(-0.2), less=changes(-0.1, -0.2)), "toxicity")
    assert "The effect grows: the change is -0.100 at the first and -0.200 at the last" in grown
    held = by_position(lengths(effect(-0.1), effect(-0.11), less=changes(-0.1, -0.11, spread=0.5)), "toxicity")
    assert "No evidence that the effect fades or grows: the change is -0.100 at the first and -0.110" in held
    risen = by_position(lengths(effect(0.2), effect(0.1), less=changes(0.2, 0.1)), "toxicity")
    assert "The effect fades" in risen


def test_of_a_beginning_without_an_effect_nothing_is_said_to_fade():
    nothing = lengths(effect(-0.01, spread=0.3), effect(-0.2), less=changes(-0.01, -0.2))
    for of in (nothing, lengths(None, effect(-0.1))):
        said = by_position(of, "toxicity")
        assert said.endswith("Without an evident effect at the first of them it cannot be said whether it fades.")


def test_an_effect_at_the_first_position_alone_is_not_denied():
    said = by_position(lengths(effect(-0.2), None), "toxicity")
    assert ", evident; tokens 21-50: no prompt has a score of both models." in said
    assert said.endswith(
        "Whether the effect fades cannot be said: no prompt has scores at the first and at the last of them."
    )


def test_an_effect_that_is_less_because_there_is_less_to_take_away_is_not_said_to_fade_alone():
    same = lengths(effect(-0.2), effect(-0.05, before=0.1), less=changes(-0.2, -0.05))
    said = by_position(same, "toxicity")
    assert "The effect fades, but in percent of what was there it does not: the change is -0.200 at the first" in said
    more = lengths(effect(-0.2, before=0.4), effect(-0.3, before=0.9), less=changes(-0.2, -0.3))
    assert "The effect grows, but in percent of what was there it does not:" in by_position(more, "toxicity")
    unknown_share = replace(same, at={**same.at, "1-20": replace(effect(-0.2), percent=unknown(math.nan))})
    assert "The effect fades: " in by_position(unknown_share, "toxicity")


def test_evidence_at_a_position_counts_for_all_of_them_together():
    weak = effect(-0.1)
    weak = replace(weak, permutation_test_p=0.03)
    assert weak.evidence
    assert "no evidence of a change" in by_position(lengths(weak, weak), "toxicity")


def test_a_position_without_scores_and_few_prompts_are_named():
    said = by_position(lengths(effect(-0.2, number=12), effect(-0.1, number=9), None), "repetition")
    assert "tokens 51-100: no prompt has a score of both models." in said
    assert said.endswith("Intervals over only 9 prompts may be too narrow.")
    assert by_position(lengths(None, None), "x") == "No piece of a continuation could be scored by both models."


@pytest.mark.usefixtures("pictures_take_no_time")
def test_the_page_shows_picture_and_sentence_and_the_table_of_the_terminal_and_the_card_do_not():
    results, rows = made_up()
    plain, without = summary_table(results), write(results, rows)
    card = CARD.read_text()
    assert "longer texts" not in without.words
    assert not Path("out/lengths.png").exists()
    page = write(replace(results, lengths=replace(FADING, num_failed=3)), rows)
    assert "Does it hold in longer texts?" in page.words
    assert by_position(FADING, "toxicity") in page.words
    assert "of tokens 21-50 there are some in 80 % before and 78 % after; of tokens 51-100" in page.words
    assert "3 pieces could not be scored and are left out." in page.words
    assert len(page.links) == len(without.links) + 1
    assert Path("out/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert (summary_table(results), CARD.read_text()) == (plain, card)


@pytest.mark.usefixtures("pictures_take_no_time")
def test_pieces_of_which_none_was_scored_have_a_page_without_the_picture():
    results, rows = made_up()
    page = write(replace(results, lengths=lengths(None, None)), rows)
    assert "No piece of a continuation could be scored by both models." in page.words
    assert not Path("out/lengths.png").exists()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


@pytest.mark.parametrize(
    "of",
    [
        lengths(effect(-0.2), effect(-0.1)),
        lengths(*(effect(-0.1 * i, before=0.9) for i in range(6))),
        lengths(effect(-0.2), None, replace(effect(0.1), difference=unknown(0.1))),
        lengths(effect(-0.0001, spread=0.00001, before=0.001), effect(0.0, before=0.001)),
    ],
    ids=["two", "six", "unknown", "tiny"],
)
@pytest.mark.filterwarnings("error")
def test_the_picture_has_a_row_for_each_piece_and_nothing_is_cut_off_or_covered(drawn, of):
    draw_lengths(of, Path("x"), behavior="a behaviour of a long name, such as toxicity")
    (figure,) = drawn
    axes = figure.axes[0]
    figure.draw_without_rendering()
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels == [*(f"tokens {name}" for name in of.at), *(f"first {name[2:]}" for name in list(of.within)[1:])]
    scored = [found for found in [*of.at.values(), *list(of.within.values())[1:]] if found]
    before = next(line for line in axes.lines if line.get_label() == "before")
    assert list(before.get_xdata()) == [found.before for found in scored]
    after = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert after == [found.after for found in scored]
    low, high = axes.get_xlim()
    ends = [found.before + end for found in scored for end in (found.difference.low, found.difference.high)]
    assert low <= min([0.0, *ends])
    assert high >= max(end for end in [*ends, *after] if not math.isnan(end))
    texts = [axes.xaxis.label, *axes.get_yticklabels(), *axes.get_xticklabels()]
    texts = [text for text in texts if text.get_text()]
    inside = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    texts = [axes.xaxis.label, *axes.get_yticklabels(), *inside, *figure.legends[0].get_texts()]
    check_texts(figure, texts, [text.get_window_extent() for text in texts])
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())


def test_results_come_back_from_json_and_every_figure_of_them_is_compared():
    results, rows = made_up()
    results = replace(results, lengths=FADING)
    again = Results.from_json(results.to_json())
    assert again.lengths == FADING
    assert "lengths" not in made_up()[0].to_json()
    found = {figure.name: figure.outcome for figure in compare(results, again, rows)}
    assert set(found.values()) == {"equal"}
    assert {
        "lengths.within.1-100.difference",
        "lengths.at.21-50.percent",
        "lengths.last_less_first.difference",
        "lengths.reaching.51-100.difference",
        "lengths.num_failed",
    } <= set(found)
    other = replace(results, lengths=replace(FADING, at={**FADING.at, "21-50": effect(-0.3)}))
    differing = {figure.name for figure in compare(results, other, rows) if figure.outcome == "differs"}
    assert differing == {"lengths.at.21-50.difference", "lengths.at.21-50.percent"}
