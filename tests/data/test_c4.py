"""Documents: which are taken, where each is cropped, those of the hub, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import IDS, WORDS, ids_of, sentence, set_up, write_jsonl

from sparc3_lightning.data.base import HubDataset, Sample
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.sources import read_records


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
    assert data.notes == {"num_too_short": 3, "bos": False}
    assert {len(document_of(sample)) >= 9 for sample in data.samples} == {True}
    assert c4(seq_len=5, num_samples=12).notes["num_too_short"] == 0


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
    with pytest.raises(ValueError, match=r"must be (auto or )?at least 1"):
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


def test_the_fingerprint_of_a_file_changes_with_the_samples_taken_only(c4: Any) -> None:
    base = c4().fingerprint()
    assert base == c4(batch_size=4).fingerprint()
    others = [c4(seed=1), c4(seq_len=8), c4(num_samples=4), c4(crop="random")]
    assert len({base, *(data.fingerprint() for data in others)}) == 5
