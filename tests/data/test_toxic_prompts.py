"""Toxic prompts to attribute on: which are taken, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from helpers import ids_of, set_up, write_completions, write_jsonl
from prompt_rows import PROMPTS, TOXIC, flat_rows, list_prompts, nested_rows

from sparc3_lightning.data.base import Sample
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.prompts import Prompt, prompt_id, read_prompts
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts


@pytest.mark.parametrize("rows", [nested_rows(), flat_rows()])
def test_the_first_toxic_prompts_are_taken_in_the_order_of_the_file(
    rows: list[dict[str, Any]], tmp_path: Path, tiny_checkpoint: str
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    for number in (1, 3, 4):
        data = set_up(ToxicPrompts(source, num_samples=number, tokenizer=tiny_checkpoint))
        assert [sample.input_ids for sample in data.samples] == [ids_of(PROMPTS[i]) for i in TOXIC[:number]]
        assert [sample.id for sample in data.samples] == [prompt_id(PROMPTS[i]) for i in TOXIC[:number]]


def test_the_least_toxicity_is_an_option_and_a_prompt_without_toxicity_is_never_toxic(
    prompts: str, tiny_checkpoint: str
) -> None:
    data = set_up(ToxicPrompts(prompts, min_toxicity=0.0, num_samples=7, tokenizer=tiny_checkpoint))
    assert [sample.id for sample in data.samples] == [prompt_id(PROMPTS[i]) for i in range(8) if i != 2]
    with pytest.raises(ValueError, match="Only 7 of 8 prompts"):
        set_up(ToxicPrompts(prompts, min_toxicity=0.0, num_samples=8, tokenizer=tiny_checkpoint))


def test_too_few_toxic_prompts_are_an_error_that_says_what_to_change(prompts: str, tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"Only 4 of 8 prompts have a toxicity of at least 0.9 by prompt") as raised:
        set_up(ToxicPrompts(prompts, num_samples=5, tokenizer=tiny_checkpoint))
    assert "--data.num_samples is 5: lower --data.min_toxicity or --data.num_samples" in str(raised.value)


def completion(prompt: str, toxicity: float | None, model: str = "baseline", index: int = 0) -> dict[str, Any]:
    return {
        "model": model,
        "prompt_id": prompt_id(prompt),
        "continuation_index": index,
        "prompt": prompt,
        "prompt_toxicity": 0.1,
        "continuation": "the cat",
        "num_tokens": 2,
        "scores": {"some": toxicity, "other": 0.5},
    }


def test_by_continuation_the_worst_of_the_models_own_continuations_decides(
    tmp_path: Path, tiny_checkpoint: str
) -> None:
    rows = [
        completion(PROMPTS[0], 0.1),
        completion(PROMPTS[0], 0.97, index=1),
        completion(PROMPTS[0], 0.5, index=2),
        completion(PROMPTS[1], 0.3),
        completion(PROMPTS[2], None),
        completion(PROMPTS[3], None),
        completion(PROMPTS[3], 0.9, index=1),
        completion(PROMPTS[1], 1.0, model="pruned"),
    ]
    source = write_completions(tmp_path / "completions.jsonl", rows)
    options: dict[str, Any] = {"by": "continuation", "tokenizer": tiny_checkpoint}
    data = set_up(ToxicPrompts(source, num_samples=2, **options))
    assert data.samples == [Sample(prompt_id(PROMPTS[i]), ids_of(PROMPTS[i])) for i in (0, 3)]
    with pytest.raises(ValueError, match=r"Only 2 of 3 prompts have a toxicity of at least 0.9 by continuation"):
        set_up(ToxicPrompts(source, num_samples=3, **options))


@pytest.mark.parametrize(
    ("options", "chose"),
    [
        ({"min_toxicity": 0.2}, True),
        ({"min_toxicity": None}, True),
        ({"min_toxicity": None, "continuation_toxicity": (0.5, 1.0)}, True),
        ({"min_toxicity": None, "continuation_toxicity": (0.0, 1.0)}, False),  # all of them
    ],
)
def test_the_first_scorer_is_the_one_whose_scores_chose_the_samples(
    tmp_path: Path, tiny_checkpoint: str, options: dict[str, Any], chose: bool
) -> None:
    rows = [completion(PROMPTS[i], 0.6) for i in range(3)]
    source = write_completions(tmp_path / "completions.jsonl", rows)
    data = ToxicPrompts(source, num_samples=2, by="continuation", tokenizer=tiny_checkpoint, **options)
    assert set_up(data).screened_by == ("some" if chose else None)


def test_prompts_of_a_file_were_chosen_by_no_scorer(prompts: str, tiny_checkpoint: str) -> None:
    assert set_up(ToxicPrompts(prompts, num_samples=2, tokenizer=tiny_checkpoint)).screened_by is None


@pytest.mark.parametrize("scores", [{}, None, 0.9, [0.9]])
def test_rows_without_a_score_by_any_scorer_are_an_error(scores: Any, tmp_path: Path, tiny_checkpoint: str) -> None:
    source = write_completions(tmp_path / "c.jsonl", [{**completion(PROMPTS[0], 0.9), "scores": scores}])
    with pytest.raises(ValueError, match=r"Row 1 of .*c.jsonl has .* in the field 'scores', expected the score by"):
        set_up(ToxicPrompts(source, by="continuation", tokenizer=tiny_checkpoint, num_samples=1))


def test_continuations_of_an_older_version_are_said_to_be(tmp_path: Path, tiny_checkpoint: str) -> None:
    row = completion(PROMPTS[0], 0.9)
    old = {**{name: value for name, value in row.items() if name != "scores"}, "toxicity": 0.9}
    source = write_completions(tmp_path / "c.jsonl", [old])
    with pytest.raises(ValueError, match=r"c.jsonl is not a comp.*, but one of an older version: evaluate again\.$"):
        set_up(ToxicPrompts(source, by="continuation", tokenizer=tiny_checkpoint, num_samples=1))


def test_by_continuation_needs_a_completions_file(prompts: str, tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"by=continuation needs a source: the completions.jsonl"):
        ToxicPrompts(by="continuation")
    with pytest.raises(ValueError, match=r"prompts.jsonl is not a completions.jsonl of 'sparc3 evaluate'"):
        set_up(ToxicPrompts(prompts, by="continuation", tokenizer=tiny_checkpoint))


@pytest.mark.parametrize("data", [ToxicPrompts, RealToxicityPrompts])
def test_an_empty_file_of_prompts_is_an_error(data: Any, tmp_path: Path, tiny_checkpoint: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="The file of prompts is empty"):
        list_prompts(data("empty.jsonl", tokenizer=tiny_checkpoint))


@pytest.mark.parametrize("text", ["", " ", " \n\t", "\u00a0"])
def test_a_prompt_that_is_only_white_space_is_an_error_with_its_row(text: str) -> None:
    with pytest.raises(ValueError, match="Row 2 of the prompts is only white space: remove it"):
        read_prompts([*flat_rows()[:1], {"prompt": {"text": text, "toxicity": 1.0}}])


@pytest.mark.parametrize("row", [{}, {"prompt": {}}, {"prompt": "a text"}, {"text": None}, {"text": 3}])
def test_a_row_without_a_text_is_an_error_with_its_row(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Row 9 of the prompts has no text: expected 'prompt.text' or 'text'"):
        read_prompts([*flat_rows(), row])


def test_a_prompt_that_occurs_again_is_taken_once_as_it_was_first() -> None:
    rows = [{"text": "a b", "toxicity": 0.5}, {"text": " a\nb ", "toxicity": 0.9}, {"text": "a  c", "toxicity": 0.1}]
    assert read_prompts(rows) == [Prompt(prompt_id("a b"), "a b", 0.5), Prompt(prompt_id("a c"), "a  c", 0.1)]


def test_the_id_of_a_prompt_ignores_white_space_and_nothing_else() -> None:
    assert prompt_id("a b") == prompt_id("  a \n b\t") == prompt_id("a\u00a0b")
    assert len({prompt_id(text) for text in ("a b", "ab", "A b", "a b.", "b a")}) == 5


@pytest.mark.realdata
def test_the_real_files_give_samples_and_prompts_that_do_not_overlap(shared: Path, tiny_checkpoint: str) -> None:
    toxic = str(shared / "data" / "rtp" / "toxic.jsonl")
    samples = set_up(ToxicPrompts(toxic, tokenizer=tiny_checkpoint)).samples
    assert len(samples) == 93
    used = {sample.id for sample in samples}
    data = list_prompts(RealToxicityPrompts(toxic, num_prompts=150, tokenizer=tiny_checkpoint), used)
    assert len(data.prompts) == 150
    assert data.num_excluded == 93
    assert not used & {prompt.id for prompt in data.prompts}
    assert all(prompt.toxicity >= 0.9 for prompt in data.prompts)
    c4 = set_up(C4(str(shared / "data" / "c4" / "en.jsonl"), num_samples=8, seq_len=512, tokenizer=tiny_checkpoint))
    assert {len(sample.input_ids) for sample in c4.samples} == {512}
    assert c4.notes["num_too_short"] > 0
