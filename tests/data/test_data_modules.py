"""Data modules: which samples, prompts and windows are taken, in which order, and what is refused."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import WORDS, sentence

from sparc3_lightning.data.base import HubDataset, Sample, pad_right
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.prompts import Prompt, prompt_id, read_prompts
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2, disjoint_windows, sliding_windows
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.sources import read_records

IDS = {word: number for number, word in enumerate(WORDS, start=4)}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids_of(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def set_up(data: Any) -> Any:
    data.prepare_data()
    data.setup("predict")
    return data


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any use of the hub's data sets fail."""

    def refuse(self: HubDataset, *, streaming: bool) -> None:
        raise AssertionError(f"{self} was asked for")

    monkeypatch.setattr(HubDataset, "rows", refuse)


LENGTHS = [30, 8, 20, 12, 7, 40, 9, 13, 5, 20, 16, 25]
DOCUMENTS = [sentence(seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """A file of documents of 5 to 40 tokens, nine of which have at least 9."""
    return write_jsonl(tmp_path / "documents.jsonl", [{"text": text, "url": "u"} for text in DOCUMENTS])


@pytest.fixture
def c4(documents: str, tiny_checkpoint: str) -> Any:
    """A factory of set-up data modules."""

    def make(**options: Any) -> C4:
        return set_up(
            C4(**{"source": documents, "num_samples": 5, "seq_len": 9, "tokenizer": tiny_checkpoint, **options})
        )

    return make


def document_of(sample: Sample) -> list[int]:
    return ids_of(DOCUMENTS[int(sample.id.removeprefix("document-")) - 1])


def test_every_sample_is_the_head_of_the_document_it_is_named_after(c4: Any, no_hub: None) -> None:
    samples = c4().samples
    assert len(samples) == len({sample.id for sample in samples}) == 5
    for sample in samples:
        assert sample.input_ids == document_of(sample)[:9]


def test_a_random_crop_is_a_stretch_of_the_document_and_not_always_its_head(c4: Any) -> None:
    samples = c4(crop="random", num_samples=8).samples
    starts = []
    for sample in samples:
        whole = document_of(sample)
        starts.append(next(i for i in range(len(whole) - 8) if whole[i : i + 9] == sample.input_ids))
    assert len(set(starts)) > 3
    assert [sample.id for sample in samples] == [sample.id for sample in c4(num_samples=8).samples]


def test_a_random_crop_can_start_at_the_very_first_and_the_very_last_possible_token(
    tmp_path: Path, tiny_checkpoint: str
) -> None:
    source = write_jsonl(tmp_path / "same.jsonl", [{"text": " ".join(WORDS[:10])}] * 40)
    data = set_up(C4(source, num_samples=40, seq_len=8, crop="random", tokenizer=tiny_checkpoint))
    assert {sample.input_ids[0] for sample in data.samples} == {IDS[word] for word in WORDS[:3]}


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(c4: Any) -> None:
    for crop in ("head", "random"):
        assert c4(crop=crop).samples == c4(crop=crop).samples
        assert c4(crop=crop).samples != c4(crop=crop, seed=1).samples
    orders = {tuple(sample.id for sample in c4(seed=seed, num_samples=9).samples) for seed in range(4)}
    assert len(orders) == 4
    assert len({frozenset(order) for order in orders}) == 1, "all nine long documents, whatever the order"


def test_documents_that_are_too_short_are_passed_over_and_counted(c4: Any) -> None:
    data = c4(num_samples=9)
    assert data.notes == {"num_too_short": 3}
    assert {len(document_of(sample)) >= 9 for sample in data.samples} == {True}
    assert c4(seq_len=5, num_samples=12).notes == {"num_too_short": 0}


def test_reading_stops_when_there_are_enough_samples(c4: Any) -> None:
    assert [c4(num_samples=n).samples for n in (1, 4)] == [c4(num_samples=9).samples[:n] for n in (1, 4)]


def test_too_few_long_documents_are_an_error_that_says_what_to_change(c4: Any) -> None:
    with pytest.raises(ValueError, match=r"Only 9 of 12 documents have at least 9 tokens") as raised:
        c4(num_samples=10)
    assert all(option in str(raised.value) for option in ("--data.num_samples is 10", "--data.seq_len", "source"))


def test_an_empty_file_is_an_error(tmp_path: Path, c4: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="Only 0 of 0 documents"):
        c4(source="empty.jsonl")


def test_a_wrong_text_field_is_an_error_that_names_the_fields_there_are(c4: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 has no text in the field 'document' \(--data.text_field\)") as raised:
        c4(text_field="document")
    assert "['text', 'url']" in str(raised.value)
    source = write_jsonl(tmp_path / "null.jsonl", [{"text": DOCUMENTS[0]}, {"text": None}])
    with pytest.raises(ValueError, match="row 2 has no text"):
        c4(source=source, num_samples=1)


def test_a_wrong_text_field_of_the_hub_is_an_error_that_names_the_fields_there_are(
    stream: "Stream", tiny_checkpoint: str
) -> None:
    with pytest.raises(ValueError, match=r"allenai/c4: row 1 .* the field 'document' \(--data.text_field\)"):
        from_hub(tiny_checkpoint, text_field="document").prepare_data()
    with pytest.raises(ValueError, match=r"Salesforce/wikitext: row 1 .* it has \['text', 'url'\]"):
        WikiText2(text_field="document").read_text()


def test_another_text_field_and_a_text_file_give_the_same_samples(c4: Any, tmp_path: Path) -> None:
    renamed = write_jsonl(tmp_path / "renamed.jsonl", [{"document": text} for text in DOCUMENTS])
    (tmp_path / "plain.txt").write_text("\n".join(DOCUMENTS))
    assert c4(source=renamed, text_field="document").samples == c4().samples
    assert c4(source="plain.txt").samples == c4().samples


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"seq_len": 0}, {"num_samples": -1}, {"batch_size": 0}])
def test_numbers_below_one_are_refused_at_once(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        C4("missing.jsonl", **options)  # type: ignore[arg-type]


def test_a_missing_file_is_an_error_before_anything_is_loaded(tiny_checkpoint: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"'missing.jsonl' does not exist"):
        C4("missing.jsonl", tokenizer=tiny_checkpoint).prepare_data()


def test_without_a_tokenizer_and_a_model_the_option_is_named(documents: str) -> None:
    with pytest.raises(ValueError, match="No tokenizer: give the data module the option 'tokenizer'"):
        C4(documents, num_samples=1, seq_len=5).setup("predict")


def test_the_tokenizer_is_that_of_the_model_unless_another_is_named(documents: str, tiny_checkpoint: str) -> None:
    data = C4(documents, num_samples=1, seq_len=5)
    module = SimpleNamespace(checkpoint=Checkpoint(tiny_checkpoint, "main"))
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    assert data.tokenizer_checkpoint == Checkpoint(tiny_checkpoint, "main")
    assert len(set_up(data).samples) == 1
    data.tokenizer = "other"
    assert data.tokenizer_checkpoint == Checkpoint("other")
    data = C4(documents, num_samples=1, seq_len=5)
    data.model_checkpoint = Checkpoint(tiny_checkpoint, "main")
    assert data.tokenizer_checkpoint == Checkpoint(tiny_checkpoint, "main")


class Stream:
    """Stands in for the hub: a stream of documents that counts how often it was opened."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.opened: list[tuple[HubDataset, bool]] = []

    def __call__(self, dataset: HubDataset, streaming: bool) -> Any:
        from datasets import IterableDataset

        self.opened.append((dataset, streaming))

        def rows() -> Iterator[dict[str, str]]:
            yield from ({"text": text, "url": "u"} for text in self.texts)

        return IterableDataset.from_generator(rows)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stream:
    """A hub with sixty documents, and an empty cache."""
    stream = Stream([sentence(seed, 4 + seed * 7 % 30) + " δ\u2028" for seed in range(60)])
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: stream(self, streaming))
    return stream


def from_hub(tokenizer: str, **options: Any) -> C4:
    return C4(**{"num_samples": 6, "seq_len": 12, "buffer_size": 20, "tokenizer": tokenizer, **options})


def test_documents_of_the_hub_are_streamed_shuffled_and_long_enough(stream: Stream, tiny_checkpoint: str) -> None:
    data = set_up(from_hub(tiny_checkpoint))
    assert stream.opened == [(HubDataset("allenai/c4", "en", "train"), True)]
    assert {len(sample.input_ids) for sample in data.samples} == {12}
    tokenizer = Checkpoint(tiny_checkpoint).tokenizer()
    in_order = [ids for ids in (tokenizer(text)["input_ids"][:12] for text in stream.texts) if len(ids) == 12]
    taken = [sample.input_ids for sample in data.samples]
    assert all(ids in in_order for ids in taken)
    assert taken != in_order[:6], "the stream was not shuffled"
    assert data.notes["num_too_short"] > 0


@pytest.mark.parametrize("crop", ["head", "random"])
def test_a_later_run_takes_the_same_samples_without_the_hub(
    crop: str, stream: Stream, tiny_checkpoint: str, request: pytest.FixtureRequest
) -> None:
    first = set_up(from_hub(tiny_checkpoint, crop=crop))
    (kept,) = first.fetched_files()
    assert len(list(read_records(kept))) == 6 + first.notes["num_too_short"]
    request.getfixturevalue("no_hub")
    later = set_up(from_hub(tiny_checkpoint, crop=crop, batch_size=3))
    assert later.samples == first.samples
    assert later.notes == first.notes
    assert later.fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"num_samples": 5}, {"seq_len": 11}, {"buffer_size": 5}, {"text_field": "url"}]
)
def test_documents_are_kept_apart_for_every_option_that_chooses_them(
    options: dict[str, Any], tiny_checkpoint: str
) -> None:
    assert from_hub(tiny_checkpoint, **options)._kept_documents != from_hub(tiny_checkpoint)._kept_documents
    assert from_hub("other/tokenizer")._kept_documents != from_hub(tiny_checkpoint)._kept_documents


def test_another_seed_takes_other_documents_of_the_hub(stream: Stream, tiny_checkpoint: str) -> None:
    assert set_up(from_hub(tiny_checkpoint)).samples != set_up(from_hub(tiny_checkpoint, seed=1)).samples


def test_a_stream_that_ends_too_early_is_an_error_and_keeps_nothing(
    stream: Stream, tiny_checkpoint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Only \d+ of 60 documents have at least 30 tokens"):
        from_hub(tiny_checkpoint, seq_len=30, num_samples=50).prepare_data()
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_a_hub_that_cannot_be_reached_is_a_connection_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"'allenai/c4' cannot be had from the hub") as raised:
        C4.hub.rows(streaming=True)
    assert "sparc3 prepare" in str(raised.value)
    assert "option 'source'" in str(raised.value)


SAMPLES = [Sample("a", [5, 6]), Sample("b", [7, 8, 9, 10]), Sample("c", [11]), Sample("d", [12, 13, 14])]


def test_samples_are_padded_on_the_right_and_the_mask_tells_padding_apart() -> None:
    batch = pad_right(SAMPLES[:3], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 2], [7, 8, 9, 10], [11, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_batches_come_longest_first_and_hold_every_sample_once(batch_size: int, tiny_checkpoint: str) -> None:
    data = ToxicPrompts("unused", batch_size=batch_size, tokenizer=tiny_checkpoint)
    data.samples, data.pad_token_id = SAMPLES, 0
    batches = list(data.predict_dataloader())
    assert [name for batch in batches for name in batch["sample_ids"]] == ["b", "d", "a", "c"]
    assert [len(batch["sample_ids"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for batch in batches:
        for name, row, mask in zip(batch["sample_ids"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert row[mask.bool()].tolist() == next(s.input_ids for s in SAMPLES if s.id == name)
    assert (data.longest, data.num_tokens) == (4, 10)


def test_the_fingerprint_depends_on_tokens_their_order_and_where_samples_end() -> None:
    def fingerprint(*rows: list[int]) -> str:
        data = ToxicPrompts("unused")
        data.samples = [Sample(f"name {i}", row) for i, row in enumerate(rows)]
        return data.fingerprint()

    base = fingerprint([1, 2], [3])
    others = [fingerprint([3], [1, 2]), fingerprint([1], [2, 3]), fingerprint([1, 2], [4]), fingerprint([1, 2, 3])]
    assert len({base, *others}) == 5
    data = ToxicPrompts("unused")
    data.samples = [Sample("another name", [1, 2]), Sample("", [3])]
    assert data.fingerprint() == base


def test_the_fingerprint_of_a_file_changes_with_the_samples_taken_only(c4: Any) -> None:
    base = c4().fingerprint()
    assert base == c4(batch_size=4).fingerprint()
    others = [c4(seed=1), c4(seq_len=8), c4(num_samples=4), c4(crop="random")]
    assert len({base, *(data.fingerprint() for data in others)}) == 5


TOXICITIES = [0.95, 0.2, None, 0.9, 0.89, 1.0, 0.91, 0.5]
PROMPTS = [sentence(100 + i, 3 + i) for i in range(len(TOXICITIES))]
TOXIC = [0, 3, 5, 6]  # at least 0.9, in the order of the file


def nested_rows() -> list[dict[str, Any]]:
    # The toxicity of the original continuation says nothing about the prompt.
    return [
        {"filename": "f", "prompt": {"text": text, "toxicity": toxicity}, "continuation": {"text": "", "toxicity": 1.0}}
        for text, toxicity in zip(PROMPTS, TOXICITIES, strict=True)
    ]


def flat_rows() -> list[dict[str, Any]]:
    return [{"text": text, "toxicity": toxicity} for text, toxicity in zip(PROMPTS, TOXICITIES, strict=True)]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of prompts, four of which have a toxicity of at least 0.9."""
    return write_jsonl(tmp_path / "prompts.jsonl", nested_rows())


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
        "toxicity": toxicity,
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
    source = write_jsonl(tmp_path / "completions.jsonl", rows)
    options: dict[str, Any] = {"by": "continuation", "tokenizer": tiny_checkpoint}
    data = set_up(ToxicPrompts(source, num_samples=2, **options))
    assert data.samples == [Sample(prompt_id(PROMPTS[i]), ids_of(PROMPTS[i])) for i in (0, 3)]
    with pytest.raises(ValueError, match=r"Only 2 of 3 prompts have a toxicity of at least 0.9 by continuation"):
        set_up(ToxicPrompts(source, num_samples=3, **options))


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


def list_prompts(data: Any, exclude: Any = ()) -> Any:
    """Set up either kind of data module."""
    if isinstance(data, ToxicPrompts):
        return set_up(data)
    data.setup_prompts(exclude, data.load_tokenizer())
    return data


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


@pytest.fixture
def rtp(prompts: str, tiny_checkpoint: str) -> Any:
    """A factory of set-up data modules."""

    def make(exclude: Any = (), **options: Any) -> RealToxicityPrompts:
        defaults = {"source": prompts, "num_prompts": None, "min_toxicity": 0.0, "tokenizer": tiny_checkpoint}
        return list_prompts(RealToxicityPrompts(**{**defaults, **options}), exclude)

    return make


def texts_of(data: RealToxicityPrompts) -> set[str]:
    return {prompt.text for prompt in data.prompts}


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
    assert "--data.prompts.num_prompts is 4: lower it, or widen the range of toxicity" in str(raised.value)
    with pytest.raises(ValueError, match="Only 0 prompts"):
        rtp(min_toxicity=0.6, max_toxicity=0.7)


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_of_prompts_below_one_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"num_prompts must be at least 1, got {number}"):
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


def test_sliding_windows_score_every_token_but_the_first_exactly_once_with_as_much_before_it_as_fits() -> None:
    for num_tokens in range(2, 40):
        for window in range(2, 14):
            for stride in range(1, window):
                counts: Counter[int] = Counter()
                for w in sliding_windows(num_tokens, window, stride):
                    assert 0 <= w.start < w.end <= num_tokens
                    assert w.end - w.start <= window
                    assert 1 <= w.num_scored < w.end - w.start, "a token is scored that has nothing before it"
                    assert w.start % stride == 0
                    for token in range(w.end - w.num_scored, w.end):
                        counts[token] += 1
                        assert token < window or token - w.start >= window - stride
                case = (num_tokens, window, stride)
                assert counts == Counter(range(1, num_tokens)), case


def test_windows_side_by_side_score_all_but_the_first_token_of_each() -> None:
    for num_tokens in range(2, 60):
        for window in range(2, 14):
            windows = sliding_windows(num_tokens, window, window)
            scored = [token for w in windows for token in range(w.end - w.num_scored, w.end)]
            assert scored == [token for token in range(num_tokens) if token % window != 0], (num_tokens, window)
            assert all(w.num_scored < w.end - w.start for w in windows)


def test_disjoint_windows_are_full_lie_side_by_side_and_drop_the_tail() -> None:
    for num_tokens in range(2, 60):
        for window in range(2, 14):
            windows = disjoint_windows(num_tokens, window)
            assert len(windows) == num_tokens // window
            covered = [token for w in windows for token in range(w.start, w.end)]
            assert covered == list(range(num_tokens // window * window))
            assert {w.num_scored for w in windows} <= {window - 1}


TEXT = " \n = A = \n \n a dog and \n the cat \n"


def hub_rows() -> list[str]:
    """Return the rows of TEXT as Salesforce/wikitext has them: blank ones empty, others with their line break."""
    return ["", " = A = \n", "", " a dog and \n", " the cat \n"]


@pytest.fixture
def wiki(tiny_checkpoint: str, tmp_path: Path) -> Any:
    """A factory of data modules whose windows are set up, on 100 words unless they have a source."""
    (tmp_path / "words.txt").write_text(sentence(7, 100))

    def make(**options: Any) -> WikiText2:
        defaults = {"source": "words.txt", "window": 16, "stride": 4, "tokenizer": tiny_checkpoint}
        data = WikiText2(**{**defaults, **options})
        data.prepare_data()
        data.setup_windows(data.load_tokenizer())
        return data

    return make


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.txt", "WIKI.TXT"])
def test_a_raw_file_is_joined_as_the_rows_of_the_hub_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(TEXT)
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: [{"text": row} for row in hub_rows()])
    assert WikiText2(str(tmp_path / name)).read_text() == WikiText2().read_text() == "\n\n".join(hub_rows())


def test_a_raw_file_in_a_wheel_is_joined_alike_with_and_without_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    digest = "0123456789ab" + "0" * 52
    for folder in ("wiki==1", f"wiki==1-{digest[:12]}"):
        path = tmp_path / "cache" / "pypi" / folder / "data" / "wiki.raw"
        path.parent.mkdir(parents=True)
        path.write_text(TEXT)
    for source in ("pypi:wiki==1/data/wiki.raw", f"pypi:wiki==1/data/wiki.raw#sha256={digest}"):
        assert WikiText2(source).read_text() == "\n\n".join(hub_rows())


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("w.csv", "id,body\n1,one\n", r"w.csv: row 1 .* 'text' \(--data.text.text_field\); it has \['body', 'id'\]"),
        ("w.csv", "id,text\n1,one\n2\n", r"w.csv: row 2 has no text in the field 'text'"),
        ("w.csv", "body\none,two\n", r"w.csv: row 1 .* it has \['None', 'body'\]"),
        ("w.jsonl", '{"text": "one"}\n{"text": null}\n', r"w.jsonl: row 2 has no text in the field 'text'"),
    ],
)
def test_a_wrong_text_field_of_the_text_is_an_error_that_names_the_fields_there_are(
    tmp_path: Path, name: str, content: str, error: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=error):
        WikiText2(str(tmp_path / name)).read_text()


def test_rows_of_a_jsonl_file_are_joined_by_two_line_breaks(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"passage": "one"}, {"passage": ""}, {"passage": "two"}])
    assert WikiText2(source, text_field="passage").read_text() == "one\n\n\n\ntwo"


def test_the_windows_of_both_conventions_are_those_of_the_text(wiki: Any) -> None:
    data = wiki()
    assert data.input_ids.tolist() == ids_of(sentence(7, 100))
    assert data.windows == sliding_windows(100, 16, 4) + disjoint_windows(100, 16)
    assert wiki(conventions=("disjoint",)).windows == disjoint_windows(100, 16)
    assert wiki(conventions=["sliding"]).windows == sliding_windows(100, 16, 4)


def test_only_the_first_tokens_are_used_when_their_number_is_given(wiki: Any) -> None:
    data = wiki(num_tokens=50)
    assert data.input_ids.tolist() == ids_of(sentence(7, 100))[:50]
    assert max(window.end for window in data.windows) == 50
    assert wiki(num_tokens=1000).windows == wiki().windows


@pytest.mark.parametrize("options", [{"num_tokens": 15}, {"window": 101}])
def test_a_text_shorter_than_one_window_is_an_error(options: dict[str, int], wiki: Any) -> None:
    wiki(num_tokens=16)
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than --data.text.window \d+"):
        wiki(**options)


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 17}, {"window": 1, "stride": 1}, {"stride": -4}])
def test_a_stride_or_window_that_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stride must be between 1 and the window"):
        WikiText2(**{"window": 16, "stride": 4, **options})  # type: ignore[arg-type]


def test_no_convention_and_a_number_of_tokens_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--data.text.conventions must name"):
        WikiText2(conventions=())
    for number in (0, -5):
        with pytest.raises(ValueError, match=rf"--data.text.num_tokens must be at least 1, got {number}"):
            WikiText2(num_tokens=number)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_hold_every_window_once_filled_on_the_right(batch_size: int, wiki: Any) -> None:
    data = wiki(num_tokens=90, batch_size=batch_size)
    seen = []
    for batch in data.test_dataloader():
        longest = max(window.end - window.start for window in batch["windows"])
        assert batch["input_ids"].shape == (len(batch["windows"]), longest)
        for window, row in zip(batch["windows"], batch["input_ids"], strict=True):
            expected = data.input_ids[window.start : window.end]
            assert torch.equal(row[: len(expected)], expected)
            assert not row[len(expected) :].any()
            seen.append(window)
    assert seen == data.windows


@pytest.mark.realdata
def test_the_real_wikitext_2_has_its_known_rows_and_words(shared: Path, wiki: Any) -> None:
    path = shared / "data" / "wikitext2" / "wiki.test.raw"
    text = WikiText2(str(path)).read_text()
    raw = path.read_text(encoding="utf-8")
    assert raw.count("\n") == 4358
    assert text.split() == raw.split()
    # 2,891 of the 4,358 rows of the hub's split hold text; rows are joined by two line breaks, and keep their own.
    assert text.count("\n") == 2 * (4358 - 1) + 2891
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    data = wiki(source=str(path), window=2048, stride=512)
    # A word-level tokenizer finds the words of the text, and punctuation apart from words.
    assert 241_211 <= len(data.input_ids) < 300_000
    assert (
        sum(window.num_scored for window in data.windows if window.convention == "sliding") == len(data.input_ids) - 1
    )
    assert sum(window.convention == "disjoint" for window in data.windows) == len(data.input_ids) // 2048


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


@pytest.fixture
def evaluation(tiny_checkpoint: str, prompts: str, tmp_path: Path) -> EvaluationData:
    """A text and prompts."""
    (tmp_path / "words.txt").write_text(sentence(7, 100))
    text = WikiText2("words.txt", window=16, stride=4, tokenizer=tiny_checkpoint)
    return EvaluationData(text, RealToxicityPrompts(prompts, num_prompts=3, tokenizer=tiny_checkpoint))


def test_the_text_is_read_before_the_prompts_in_one_loop(evaluation: EvaluationData) -> None:
    evaluation.prepare_data()
    evaluation.setup("test")
    windows, prompts = evaluation.test_dataloader()
    assert sum(len(batch["windows"]) for batch in windows) == len(evaluation.text.windows) > 0
    assert sum(len(batch["prompts"]) for batch in prompts) == 3


def test_a_second_setup_changes_nothing(evaluation: EvaluationData) -> None:
    evaluation.setup("test")
    windows, prompts = evaluation.text.windows, evaluation.prompts.prompts
    evaluation.setup("test")
    assert evaluation.text.windows is windows
    assert evaluation.prompts.prompts is prompts


@pytest.fixture
def other_tokenizer(tiny_checkpoint: str, tmp_path: Path) -> str:
    """The words of the tiny checkpoint in reverse order."""
    file = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"), "tokenizer.json")
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {word: len(IDS) + 7 - number for word, number in IDS.items()}
    file.write_text(json.dumps(content))
    return str(file.parent)


def in_the_hands_of(data: Any, checkpoint: str, stage: str) -> Any:
    """Set data up as a trainer does for a module with a checkpoint."""
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(checkpoint=Checkpoint(checkpoint)))
    data.setup(stage)
    return data


def test_a_second_checkpoint_with_the_same_data_module_gets_tokens_of_its_own(
    evaluation: EvaluationData, prompts: str, tiny_checkpoint: str, other_tokenizer: str
) -> None:
    evaluation.text.tokenizer = evaluation.prompts.tokenizer = None
    samples = ToxicPrompts(prompts, num_samples=3)
    in_the_hands_of(evaluation, tiny_checkpoint, "test")
    in_the_hands_of(samples, tiny_checkpoint, "predict")
    text, first = evaluation.text.input_ids, [sample.input_ids for sample in samples.samples]
    in_the_hands_of(evaluation, other_tokenizer, "test")
    in_the_hands_of(samples, other_tokenizer, "predict")
    assert evaluation.text.input_ids.tolist() == [len(IDS) + 7 - i for i in text.tolist()]
    assert evaluation.prompts._tokenizer.name_or_path == other_tokenizer
    assert [sample.input_ids for sample in samples.samples] == [[len(IDS) + 7 - i for i in ids] for ids in first]
    before = samples.samples
    assert in_the_hands_of(samples, other_tokenizer, "predict").samples is before


def test_the_prompts_that_the_module_excludes_are_left_out(evaluation: EvaluationData, tiny_checkpoint: str) -> None:
    evaluation.text.tokenizer = evaluation.prompts.tokenizer = None
    excluded = {prompt_id(PROMPTS[5])}
    module = SimpleNamespace(checkpoint=Checkpoint(tiny_checkpoint), excluded_prompts=excluded)
    evaluation.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    evaluation.setup("test")
    assert texts_of(evaluation.prompts) == {PROMPTS[i] for i in (0, 3, 6)}
    assert evaluation.prompts.num_excluded == 1


def test_the_description_says_where_text_and_prompts_come_from_and_how_many_were_left_out(
    evaluation: EvaluationData,
) -> None:
    evaluation.prompts.num_excluded = 7
    evaluation.prompts.nontoxic_source, evaluation.prompts.num_nontoxic = "mild.jsonl", 2
    conventions = ["sliding", "disjoint"]
    assert evaluation.describe() == {
        "perplexity": {"conventions": conventions, "window": 16, "stride": 4, "text": "words.txt"},
        "prompts": {"source": evaluation.prompts.source, "nontoxic_source": "mild.jsonl", "excluded": 7},
    }
    hub = EvaluationData(WikiText2(), RealToxicityPrompts()).describe()
    assert hub["perplexity"]["text"] == "WikiText-2 raw test"
    assert hub["prompts"]["source"] == "allenai/real-toxicity-prompts"


def test_the_description_names_no_stride_of_disjoint_windows_and_no_file_that_is_not_read() -> None:
    text = WikiText2("words.txt", window=16, stride=4, conventions=["disjoint"])
    found = EvaluationData(text, RealToxicityPrompts("prompts.jsonl", nontoxic_source="nowhere.jsonl")).describe()
    assert found["perplexity"] == {"conventions": ["disjoint"], "window": 16, "stride": None, "text": "words.txt"}
    assert found["prompts"]["nontoxic_source"] is None


def test_a_missing_file_of_either_kind_is_an_error_before_anything_is_loaded(evaluation: EvaluationData) -> None:
    for part in (evaluation.text, evaluation.prompts):
        source, part.source = part.source, "missing.txt"
        with pytest.raises(FileNotFoundError, match=r"'missing.txt' does not exist"):
            evaluation.prepare_data()
        part.source = source
