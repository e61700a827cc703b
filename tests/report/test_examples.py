"""The examples of the page: which are shown, and which words of them are masked."""

from typing import Any

import pytest
from made_up import INSULTS, Words, made_up
from pages import write

from sparc3_lightning.report.page import by_prompt, examples, mean_pairs, offensive_words, pieces

pytestmark = pytest.mark.usefixtures("pictures_take_no_time")


def pair(prompt: int, before: float | None, after: float | None, draw: int = 0) -> list[dict[str, Any]]:
    shared = {
        "prompt_id": f"id{prompt}",
        "continuation_index": draw,
        "prompt": f"prompt {prompt}",
        "prompt_toxicity": 1,
    }
    return [
        {**shared, "model": model, "continuation": f"{model} {prompt}", "scores": {"some": score}}
        for model, score in (("baseline", before), ("pruned", after))
    ]


def changes(rows: list[dict[str, Any]]) -> list[float]:
    found = examples(by_prompt(rows, "some"), "some")
    return [round(e["after"]["scores"]["some"] - e["before"]["scores"]["some"], 3) for e in found]


def test_the_examples_are_those_that_fell_most_and_rose_most_each_once():
    rows = [row for i in range(20) for row in pair(i, 0.5, 0.5 + 0.01 * (i - 10))]
    assert changes(rows) == [-0.1, -0.09, -0.08, -0.07, -0.06, 0.07, 0.08, 0.09]
    assert changes(rows[:4]) == [-0.1, -0.09]


def test_a_prompt_is_shown_by_the_draw_that_changed_most():
    rows = pair(0, 0.5, 0.4) + pair(0, 0.5, 0.9, draw=1) + pair(0, 0.5, 0.2, draw=2)
    assert changes(rows) == [0.4]
    rows = pair(0, 0.5, 0.1) + pair(0, 0.5, 0.6, draw=1)
    assert changes(rows) == [-0.4]


def test_only_draws_that_both_models_have_a_score_of_are_compared():
    rows = pair(0, None, 0.1) + pair(1, 0.2, None) + pair(2, 0.3, 0.1) + pair(3, 0.4, 0.4)[:1]
    rows += [{**pair(4, 0.9, 0.1)[0], "model": "random_0"}]
    assert list(by_prompt(rows, "some")) == ["id2"]
    lone = [pair(5, 0.5, 0.1)[0], pair(5, 0.5, 0.1, draw=1)[1]]
    assert examples(by_prompt(lone, "some"), "some") == []


def test_the_means_of_a_prompt_are_kept_apart_by_group():
    rows = pair(0, 0.5, 0.25) + pair(0, 0.75, 0.5, draw=1) + pair(1, 0.5, 0.5) + pair(2, 0.125, 0.25)
    for row in rows[-2:]:
        row["prompt_toxicity"] = 0.49
    for row in rows[:2]:
        row["prompt_toxicity"] = 0.5
    assert mean_pairs(by_prompt(rows, "some"), "some") == {
        "toxic prompts": [(0.625, 0.375), (0.5, 0.5)],
        "non-toxic prompts": [(0.125, 0.25)],
    }
    for row in rows:
        row["prompt_toxicity"] = None  # prompts of one's own, never scored
    assert list(mean_pairs(by_prompt(rows, "some"), "some")) == ["prompts"]


def test_the_scorer_chooses_the_words_to_mask():
    scorer = Words()
    assert offensive_words(["You IDIOT, you", "stupid-looking 3 unscored"], scorer) == {"idiot", "stupid"}
    assert scorer.asked == ["3", "idiot", "looking", "stupid", "unscored", "you"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("An idiot.", ["idiot"]),
        ("Idiot! IDIOT? idiots", ["Idiot", "IDIOT"]),
        ("stupid-idiot", ["stupid", "idiot"]),
        ("what sh*t is f***, you a$$hole", ["sh*t", "f***", "a$$hole"]),
        ("a b!tch, idiot! idiot!!", ["b!tch", "idiot", "idiot"]),
        ("'idiot' “idiot” (idiot) idiot's", ["idiot", "idiot", "idiot"]),
        ("wanker's wanker", ["wanker's"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_a_word_is_masked_whatever_its_case_and_spelling(text, masked):
    cut = pieces(text, INSULTS)
    assert [piece for piece, offensive in cut if offensive] == masked
    assert "".join(piece for piece, _ in cut) == text


def test_every_offensive_word_of_the_examples_is_masked_and_no_other():
    page = write()
    assert len(page.masked) == 8 * 3
    assert set(page.masked) == {"stupid", "Idiot"}
    assert page.tags.count("label") == 8 * 3 + 1
    assert "masked until you click" in page.words
    rest = page.shown.replace("stupid", "", 8).replace("Idiot", "", 16)
    assert "stupid" not in rest
    assert "Idiot" not in rest


def test_without_offensive_words_there_is_nothing_to_click():
    rows = [{**row, "prompt": "A prompt", "continuation": "a text"} for row in made_up()[1]]
    page = write(completions=rows)
    assert page.masked == []
    assert {"label", "input"}.isdisjoint(page.tags)
    assert "masked" not in page.words


def test_unicode_reaches_the_page_as_it_is_and_emptiness_is_named():
    texts = {"baseline": "Grüße, 世界 🙂\n\nnext", "pruned": "  \n"}
    rows = [{**row, "continuation": texts.get(row["model"], "")} for row in made_up()[1]]
    page = write(completions=rows)
    assert "Grüße, 世界 🙂\n\nnext" in page.shown
    assert "(empty)" in page.shown
