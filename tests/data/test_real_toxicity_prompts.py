"""Prompts to continue, toxic and not: which are taken, which are left out, and in which batches they come."""

from pathlib import Path
from typing import Any

import pytest
from helpers import ids_of, sentence, set_up, write_jsonl
from prompt_rows import PROMPTS, TOXIC, flat_rows, list_prompts, nested_rows, texts_of

from sparc3_lightning.data.base import HubDataset
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts


@pytest.fixture
def rtp(prompts: str, tiny_checkpoint: str) -> Any:
    """A factory of set-up data modules."""

    def make(exclude: Any = (), **options: Any) -> RealToxicityPrompts:
        defaults = {"source": prompts, "num_prompts": None, "min_toxicity": 0.0, "tokenizer": tiny_checkpoint}
        return list_prompts(RealToxicityPrompts(**{**defaults, **options}), exclude)

    return make


def test_prompts_are_those_of_the_range_of_toxicity_with_both_ends(rtp: Any) -> None:
    assert texts_of(rtp()) == {PROMPTS[i] for i in range(8) if i != 2}
    assert texts_of(rtp(min_toxicity=0.9)) == {PROMPTS[i] for i in TOXIC}
    assert texts_of(rtp(min_toxicity=0.5, max_toxicity=0.9)) == {PROMPTS[i] for i in (3, 4, 7)}


def test_prompts_that_were_used_to_attribute_are_left_out_and_counted(
    rtp: Any, prompts: str, tiny_checkpoint: str
) -> None:
    used = [sample.id for sample in set_up(ToxicPrompts(prompts, num_samples=2, tokenizer=tiny_checkpoint)).samples]
    data = rtp([*used, "document-3", prompt_id(PROMPTS[1])], min_toxicity=0.9)
    assert texts_of(data) == {PROMPTS[i] for i in TOXIC[2:]}
    assert data.num_excluded == 2


def test_a_used_prompt_is_left_out_also_where_its_white_space_differs(rtp: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "spaced.jsonl", [{"text": f" {PROMPTS[0]}\n", "toxicity": 1}, *flat_rows()[3:]])
    assert rtp([prompt_id(PROMPTS[0])], source=source).num_excluded == 1


def test_the_number_of_prompts_is_exact_and_their_choice_is_seeded(rtp: Any) -> None:
    chosen = [frozenset(texts_of(rtp(num_prompts=3, seed=seed))) for seed in range(8)]
    assert {len(texts) for texts in chosen} == {3}
    assert len(set(chosen)) > 3
    assert rtp(num_prompts=3, seed=5).prompts == rtp(num_prompts=3, seed=5, batch_size=1).prompts


def test_too_few_prompts_are_an_error_that_says_what_to_change(rtp: Any) -> None:
    with pytest.raises(ValueError, match=r"Only 3 prompts of toxicity 0.9 to 1.0 are left") as raised:
        rtp([prompt_id(PROMPTS[0])], min_toxicity=0.9, num_prompts=4)
    assert "(1 were used to attribute)" in str(raised.value)
    assert "--data.prompts.num_prompts is 4: widen the range of toxicity, or lower it." in str(raised.value)
    with pytest.raises(ValueError, match=r"Only 0 prompts .*num_prompts is 1: widen the range of toxicity\.$"):
        rtp(min_toxicity=0.6, max_toxicity=0.7, num_prompts=1)
    with pytest.raises(ValueError, match=r"num_prompts is null, for all: widen the range of toxicity\.$"):
        rtp(min_toxicity=0.6, max_toxicity=0.7, num_prompts=None)


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_of_prompts_below_one_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"^--data.prompts.num_prompts must be at least 1, got {number}"):
        RealToxicityPrompts(num_prompts=number)


MILD = [sentence(200 + i, 4 + i) for i in range(5)]


@pytest.fixture
def mild(tmp_path: Path) -> str:
    """Another file, of prompts that are mostly not toxic."""
    toxicities = [0.1, 0.499, 0.5, None, 0.0]
    rows = [{"text": text, "toxicity": toxicity} for text, toxicity in zip(MILD, toxicities, strict=True)]
    return write_jsonl(tmp_path / "mild.jsonl", rows)


def test_non_toxic_prompts_come_beside_the_toxic_ones_from_the_same_file(rtp: Any) -> None:
    data = rtp(min_toxicity=0.9, num_nontoxic=1)
    assert texts_of(data) == {PROMPTS[i] for i in (*TOXIC, 1)}
    assert texts_of(rtp(min_toxicity=0.9)) == {PROMPTS[i] for i in TOXIC}, "none unless they are asked for"


def test_non_toxic_prompts_are_those_below_one_half_of_the_file_that_is_named(rtp: Any, mild: str) -> None:
    data = rtp(min_toxicity=0.9, num_nontoxic=3, nontoxic_source=mild)
    assert texts_of(data) == {PROMPTS[i] for i in TOXIC} | {MILD[i] for i in (0, 1, 4)}
    assert [prompt.toxicity for prompt in data.prompts if prompt.text in MILD] == [0.0, 0.499, 0.1], "longest first"
    assert texts_of(rtp(min_toxicity=0.9, nontoxic_source=mild)) == {PROMPTS[i] for i in TOXIC}


def test_the_choice_of_toxic_prompts_does_not_depend_on_whether_others_come_beside_them(rtp: Any, mild: str) -> None:
    options = {"num_prompts": 2, "min_toxicity": 0.5}
    for seed in range(4):
        alone, both = rtp(**options, seed=seed), rtp(**options, seed=seed, num_nontoxic=2, nontoxic_source=mild)
        assert texts_of(both) & set(PROMPTS) == texts_of(alone)
    chosen = {
        frozenset(texts_of(rtp(num_nontoxic=2, nontoxic_source=mild, min_toxicity=0.9, seed=s))) for s in range(6)
    }
    assert len(chosen) > 1


def test_non_toxic_prompts_that_were_used_to_attribute_are_left_out_and_counted_with_the_others(
    rtp: Any, mild: str
) -> None:
    used = [prompt_id(text) for text in (PROMPTS[0], PROMPTS[5], MILD[0], PROMPTS[1])]
    data = rtp(used, min_toxicity=0.9, num_nontoxic=2, nontoxic_source=mild)
    assert texts_of(data) == {PROMPTS[i] for i in (3, 6)} | {MILD[i] for i in (1, 4)}
    assert data.num_excluded == 3


def test_too_few_non_toxic_prompts_are_an_error_that_names_their_option(rtp: Any, mild: str) -> None:
    with pytest.raises(ValueError, match=r"Only 2 prompts of toxicity below 0.5 are left") as raised:
        rtp([prompt_id(MILD[0])], min_toxicity=0.9, num_nontoxic=3, nontoxic_source=mild)
    assert "(1 were used to attribute), but --data.prompts.num_nontoxic is 3" in str(raised.value)


def test_a_number_of_non_toxic_prompts_below_zero_or_groups_that_overlap_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="num_nontoxic must be at least 0, got -1"):
        RealToxicityPrompts(num_nontoxic=-1)
    with pytest.raises(ValueError, match=r"With num_nontoxic 3, min_toxicity must be at least 0.5, got 0.4"):
        RealToxicityPrompts(num_nontoxic=3, min_toxicity=0.4)
    RealToxicityPrompts(num_nontoxic=3, min_toxicity=0.5)
    RealToxicityPrompts(num_nontoxic=0, min_toxicity=0.0)


def test_the_file_of_non_toxic_prompts_is_fetched_if_it_is_needed(mild: str, prompts: str) -> None:
    both = RealToxicityPrompts(prompts, num_nontoxic=3, nontoxic_source=mild)
    both.prepare_data()
    assert [str(path) for path in both.fetched_files()] == [prompts, mild]
    missing = RealToxicityPrompts(prompts, num_nontoxic=3, nontoxic_source="nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        missing.prepare_data()
    unused = RealToxicityPrompts(prompts, nontoxic_source="nowhere.jsonl")
    unused.prepare_data()
    assert [str(path) for path in unused.fetched_files()] == [prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_prompts_are_padded_on_the_left_and_come_longest_first(batch_size: int, rtp: Any) -> None:
    data = rtp(batch_size=batch_size)
    seen = []
    for batch in data.test_dataloader():
        longest = max(len(ids_of(prompt.text)) for prompt in batch["prompts"])
        for prompt, row, mask in zip(batch["prompts"], batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids_of(prompt.text)
            assert row.tolist() == [0] * (longest - len(ids)) + ids
            assert mask.tolist() == [0] * (longest - len(ids)) + [1] * len(ids)
            seen.append(prompt)
    assert seen == data.prompts
    lengths = [len(prompt.text.split()) for prompt in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert data.longest == lengths[0]


def test_prompts_come_from_the_hub_when_no_source_is_named(monkeypatch: pytest.MonkeyPatch, rtp: Any) -> None:
    from datasets import Dataset

    asked = []

    def rows(self: HubDataset, *, streaming: bool) -> Any:
        asked.append(self)
        return Dataset.from_list(nested_rows())

    monkeypatch.setattr(HubDataset, "rows", rows)
    assert texts_of(rtp(source=None)) == texts_of(rtp())
    assert set(asked) == {HubDataset("allenai/real-toxicity-prompts", None, "train")}
