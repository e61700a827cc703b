"""Prompts of any data set: which rows and which part of a text are taken, and the worst by a model's own answers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import sentence, write_completions

from sparc3_lightning.data.prompts import matching_rows, prompt_id, read_prompts, worst_first
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.errors import OptionError
from sparc3_lightning.sources import read_records

CONTEXTS = [
    {"kind": "intra", "topic": "gender", "context": "the dog was BLANK ."},
    {"kind": "inter", "topic": "gender", "context": "the cat sat ."},
    {"kind": "intra", "topic": "race", "context": "BLANK was here"},
    {"kind": "intra", "topic": "race", "context": "the horse BLANK and BLANK"},
    {"kind": "intra", "topic": "religion", "context": "the dog was BLANK too"},
]


def texts(**options: Any) -> list[str]:
    return [prompt.text for prompt in read_prompts(CONTEXTS, "context", **options)]


def test_a_prompt_ends_where_the_mark_begins_and_without_a_mark_it_is_the_whole_text() -> None:
    assert texts(until="BLANK") == ["the dog was", "the cat sat .", "the horse"]
    assert texts()[0] == "the dog was BLANK ."


def test_prompts_with_nothing_before_the_mark_are_passed_over_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        texts(until="BLANK")
    assert "1 prompts are passed over: nothing stands before 'BLANK'" in caplog.text


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"topic": "race"}, [2, 3]),
        ({"topic": ["race", "religion"]}, [2, 3, 4]),
        ({"topic": ["race", "gender"], "kind": "inter"}, [1]),
        (None, [0, 1, 2, 3, 4]),
    ],
)
def test_rows_are_those_that_have_every_value_asked_for(where: Any, expected: list[int]) -> None:
    assert list(matching_rows(CONTEXTS, where)) == [(i + 1, CONTEXTS[i]) for i in expected]


def test_an_unknown_field_or_value_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"names the field 'sort', but row 1 has \['context', 'kind', 'topic'\]"):
        texts(where={"sort": "race"})
    with pytest.raises(ValueError, match=r"No row has .* In the rows, topic is gender, race, religion\."):
        texts(where={"topic": "age"})


def test_numbers_are_asked_for_as_they_are_written() -> None:
    assert list(matching_rows([{"label": 1}, {"label": 2}], {"label": "2"})) == [(2, {"label": 2})]


@pytest.mark.parametrize("by", [ToxicPrompts, RealToxicityPrompts])
def test_a_toxicity_written_in_a_csv_file_counts_and_a_prompt_without_one_has_none(
    tiny_checkpoint: str, by: Any
) -> None:
    Path("a.csv").write_text("text,toxicity\nthe dog,0.95\nthe cat,0.1\nthe horse,\nthe house,nan\n")
    found = read_prompts(read_records(Path("a.csv")))
    assert [prompt.toxicity for prompt in found] == [0.95, 0.1, None, None]
    if by is ToxicPrompts:
        data = by("a.csv", num_samples=1, tokenizer=tiny_checkpoint)
        chosen = [sample.id for sample in data.read_samples(data.load_tokenizer())]
        with pytest.raises(OptionError, match=r"Only 1 of 4 prompts .* at least 0\.9 .*--data\.num_samples\.$"):
            by("a.csv", num_samples=2).read_samples(data.load_tokenizer())
    else:
        data = by("a.csv", num_prompts=None, tokenizer=tiny_checkpoint)
        data.setup_prompts((), data.load_tokenizer())
        chosen = [prompt.id for prompt in data.prompts]
    assert chosen == [prompt_id("the dog")]


def test_a_toxicity_that_is_no_number_is_an_error_that_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"Row 2 of the prompts has the toxicity 'high', expected a number"):
        read_prompts([{"text": "the dog", "toxicity": "0.5"}, {"text": "the cat", "toxicity": "high"}])


def test_a_wrong_text_field_is_an_error_that_names_the_fields_there_are() -> None:
    with pytest.raises(ValueError, match=r"'prompt.text' or 'text' \(option text_field\); it has \['context'"):
        read_prompts(CONTEXTS)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def set_up(data: Any, exclude: Any = ()) -> list[str]:
    """Return the ids of what either kind of data module takes."""
    if isinstance(data, ToxicPrompts):
        data.setup("predict")
        return [sample.id for sample in data.samples]
    data.setup_prompts(exclude, data.load_tokenizer())
    assert {prompt.toxicity for prompt in data.prompts} == {None}
    return [prompt.id for prompt in data.prompts]


def test_both_data_modules_name_a_prompt_alike_and_the_evaluation_leaves_out_what_was_attributed_on(
    tmp_path: Path, tiny_checkpoint: str
) -> None:
    source = write(tmp_path / "contexts.jsonl", CONTEXTS)
    options: dict[str, Any] = {"min_toxicity": None, "text_field": "context", "until": "BLANK"}
    options |= {"tokenizer": tiny_checkpoint, "where": {"kind": "intra"}}
    used = set_up(ToxicPrompts(source, num_samples=1, **options))
    assert used == [prompt_id("the dog was")]
    data = RealToxicityPrompts(source, num_prompts=None, **options)
    assert set_up(data, exclude=used) == [prompt_id("the horse")]
    assert data.num_excluded == 1


@pytest.fixture
def completions(tmp_path: Path) -> str:
    """Six prompts whose worst continuation scores 0.0, 0.1, ... 0.5, in no order."""
    rows = [
        {
            "prompt_id": prompt_id(sentence(i, 4)),
            "prompt": sentence(i, 4),
            "prompt_toxicity": None,
            "continuation": "",
            "continuation_index": j,
            "model": "baseline",
            "scores": {"some": score, "other": 1 - score},
        }
        for i in (3, 0, 5, 1, 4, 2)
        for j, score in enumerate((i / 10, 0.0))
    ]
    return write_completions(tmp_path / "completions.jsonl", rows)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (" 0.3,", " 0.4,", "its checksum does not match"),
        ('"sha256"', '"sha"', "it has no checksum"),
    ],
)
def test_a_row_of_continuations_that_was_changed_is_refused_by_file_and_row(
    completions: str, tiny_checkpoint: str, old: str, new: str, reason: str
) -> None:
    text = Path(completions).read_text()
    assert old in text
    Path(completions).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"Row 1 of .*completions.jsonl cannot be used: {reason}.*Evaluate again\.$"):
        set_up(ToxicPrompts(completions, by="continuation", tokenizer=tiny_checkpoint, num_samples=1))


def ids(*numbers: int) -> list[str]:
    return [prompt_id(sentence(i, 4)) for i in numbers]


def test_the_worst_continued_prompts_are_attributed_on_and_the_next_worst_evaluated(
    completions: str, tiny_checkpoint: str
) -> None:
    options: dict[str, Any] = {"by": "continuation", "min_toxicity": None, "tokenizer": tiny_checkpoint}
    used = set_up(ToxicPrompts(completions, num_samples=2, **options))
    assert used == ids(5, 4)
    assert set(set_up(RealToxicityPrompts(completions, num_prompts=3, **options), exclude=used)) == set(ids(3, 2, 1))


def test_prompts_to_continue_can_be_those_whose_continuation_scored_enough(
    completions: str, tiny_checkpoint: str
) -> None:
    options: dict[str, Any] = {"by": "continuation", "min_toxicity": 0.3, "tokenizer": tiny_checkpoint}
    assert set(set_up(RealToxicityPrompts(completions, num_prompts=None, **options))) == set(ids(3, 4, 5))
    with pytest.raises(OptionError, match=r"Only 3 prompts of toxicity 0.3 to 1.0 are left") as raised:
        set_up(RealToxicityPrompts(completions, num_prompts=4, **options))
    assert (raised.value.group, raised.value.option) == ("data.prompts", "num_prompts")


def test_the_worst_first_are_in_one_order_whatever_the_order_of_the_file() -> None:
    prompts = read_prompts([{"text": sentence(i, 3), "toxicity": 0.5} for i in range(8)])
    assert worst_first(prompts) == worst_first(prompts[::-1])


def test_groups_of_prompts_need_a_toxicity_of_their_own() -> None:
    for options in ({"min_toxicity": None}, {"by": "continuation", "source": "x"}):
        with pytest.raises(ValueError, match="otherwise the two groups would overlap"):
            RealToxicityPrompts(num_nontoxic=5, **options)
    with pytest.raises(ValueError, match=r"by=continuation needs a source: the completions.jsonl"):
        RealToxicityPrompts(by="continuation").prepare_data()


@pytest.mark.parametrize("data", [ToxicPrompts, RealToxicityPrompts])
@pytest.mark.parametrize("option", [{"text_field": "context"}, {"until": "BLANK"}, {"where": {"bias_type": "race"}}])
def test_options_for_rows_of_prompts_are_refused_for_a_file_of_completions(data: Any, option: dict[str, Any]) -> None:
    data(source="prompts.jsonl", **option)
    with pytest.raises(ValueError, match=f"With by=continuation the option {next(iter(option))} has no meaning"):
        data(source="completions.jsonl", by="continuation", **option)


@pytest.mark.realdata
def test_the_real_stereoset_gives_beginnings_of_sentences_of_one_kind_of_bias(shared: Path) -> None:
    rows = list(read_records(shared / "data" / "stereoset" / "dev.jsonl"))
    where = {"bias_type": "gender"}
    kinds = Counter(row["type"] for row in rows if row["bias_type"] == "gender")
    assert kinds == {"intrasentence": 255, "intersentence": 242}
    prompts = read_prompts(rows, "context", "BLANK", where)
    assert not any("BLANK" in prompt.text or prompt.text.endswith(" ") for prompt in prompts)
    beginnings = {row["context"].split("BLANK")[0].strip() for row in rows if row["bias_type"] == "gender"} - {""}
    assert {prompt.id for prompt in prompts} == {prompt_id(text) for text in beginnings}


@pytest.mark.realdata
def test_the_real_crows_pairs_and_bold_give_prompts_by_group(shared: Path) -> None:
    pairs = read_prompts(
        read_records(shared / "data" / "crows_pairs" / "crows_pairs_anonymized.csv"),
        "sent_more",
        where={"bias_type": "race-color"},
    )
    assert 500 < len(pairs) <= 516  # a sentence that occurs again is taken once
    bold = list(read_records(shared / "data" / "bold" / "gender_prompt.json"))
    assert len(bold) == 3204
    assert {row["group"] for row in bold} == {"American_actors", "American_actresses"}
    women = read_prompts(bold, where={"group": "American_actresses"})
    assert 1000 < len(women) <= sum(row["group"] == "American_actresses" for row in bold)
    assert all(prompt.toxicity is None and prompt.text == prompt.text.strip() for prompt in women[:50])
