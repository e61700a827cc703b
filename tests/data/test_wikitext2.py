"""The text whose perplexity is measured: how it is joined, and its windows."""

import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ids_of, sentence, write_jsonl

from sparc3_lightning.data.base import HubDataset
from sparc3_lightning.data.wikitext2 import WikiText2, disjoint_windows, sliding_windows
from sparc3_lightning.files import sha256_of


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
    wheel = Path("wiki-1-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/wiki.raw", TEXT)
    digest = sha256_of(wheel)
    for folder in ("wiki==1", f"wiki==1-{digest[:12]}"):
        (tmp_path / "cache/pypi" / folder).mkdir(parents=True)
        shutil.copy(wheel, tmp_path / "cache/pypi" / folder)
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


@pytest.mark.parametrize("convention", ["sliding", "disjoint"])
@pytest.mark.parametrize("content", ["", " \n", "dog"])
def test_a_text_without_a_single_window_is_an_error(content: str, convention: str, wiki: Any) -> None:
    Path("short.txt").write_text(content)
    with pytest.raises(ValueError, match=r"text for perplexity has \d tokens, fewer than --data.text.window 2\."):
        wiki(source="short.txt", window=2, stride=1, conventions=[convention])


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 17}, {"window": 1, "stride": 1}, {"stride": -4}])
def test_a_stride_or_window_that_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stride must be between 1 and the window"):
        WikiText2(**{"window": 16, "stride": 4, **options})  # type: ignore[arg-type]


def test_no_convention_and_a_number_of_tokens_below_one_are_refused() -> None:
    for conventions in ((), ("slidng",), ("disjoint", "all")):
        with pytest.raises(ValueError, match=r"--data.text.conventions must name"):
            WikiText2(conventions=conventions)  # type: ignore[arg-type]
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
