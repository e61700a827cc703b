"""Where BOS stands in the windows of a text: by default as the model was trained, and as it is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WORDS, ids_of, sentence
from spoken import BOS, adding, checkpoint_with

from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.wikitext2 import WikiText2, disjoint_windows, sliding_windows

TEXT = sentence(7, 100)
IDS = ids_of(TEXT)


@pytest.fixture
def make(make_checkpoint: Any, tmp_path: Path) -> Any:
    """A factory of texts whose windows are set up, for a family and a tokenizer that adds BOS or not."""
    (tmp_path / "words.txt").write_text(TEXT)
    made: dict[tuple[str, str], str] = {}

    def text_of(family: str, adds: str = "<s>", **options: Any) -> WikiText2:
        if (family, adds) not in made:
            tokenizer = adding(adds, "</s>" if adds else "", WORDS)
            made[family, adds] = checkpoint_with(tokenizer, make_checkpoint(family), tmp_path / f"{family}{len(adds)}")
        data = WikiText2(
            **{"source": "words.txt", "window": 16, "stride": 4, "tokenizer": made[family, adds], **options}
        )
        data.setup_windows(data.load_tokenizer())
        return data

    return text_of


def tokens_of(data: WikiText2) -> dict[Any, tuple[list[int], list[int]]]:
    """Return the token ids of each window by its convention and start, and those that are scored."""
    found = {}
    for batch in data.test_dataloader():
        for row, window in zip(batch["input_ids"].tolist(), batch["windows"], strict=True):
            ids = row[: batch["num_before"] + window.end - window.start]
            found[window.convention, window.start] = ids, ids[len(ids) - window.num_scored :]
    return found


@pytest.mark.parametrize(
    ("family", "adds", "expected"),
    [("llama", "<s>", "first"), ("gemma3_text", "<s>", "every"), ("llama", "", "none"), ("gemma3_text", "", "none")],
)
def test_by_default_bos_stands_where_the_tokenizer_and_the_model_want_it(
    make: Any, family: str, adds: str, expected: str
) -> None:
    assert make(family, adds).has_bos == expected


def test_every_type_of_gemma_needs_bos_in_every_window(make: Any, tmp_path: Path) -> None:
    make("gemma3_text")
    config = tmp_path / "gemma3_text3" / "config.json"
    content = json.loads(config.read_text())
    for kind in ("gemma", "gemma2"):
        config.write_text(json.dumps({**content, "model_type": kind}))
        assert make("gemma3_text").has_bos == "every"


def test_before_the_first_window_alone_is_as_it_was(make: Any) -> None:
    whole = [BOS, *IDS]
    for data in (
        make("llama"),
        make("llama", bos="first"),
        make("gemma3_text", bos="first"),
        make("llama", "", bos="first"),
    ):
        assert data.input_ids.tolist() == whole
        assert data.windows == sliding_windows(101, 16, 4) + disjoint_windows(101, 16)
        for (_, start), (ids, _) in tokens_of(data).items():
            assert ids == whole[start : start + 16]


def test_without_bos_the_text_alone_is_cut(make: Any) -> None:
    for data in (
        make("llama", bos="none"),
        make("gemma3_text", bos="none"),
        make("llama", "", bos="none"),
        make("llama", ""),
    ):
        assert data.input_ids.tolist() == IDS
        assert data.windows == sliding_windows(100, 16, 4) + disjoint_windows(100, 16)
        assert all(BOS not in ids for ids, _ in tokens_of(data).values())


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("adds", ["<s>", ""])
def test_before_every_window_bos_is_one_of_its_tokens_and_each_token_of_the_text_is_scored_once(
    make: Any, adds: str, batch_size: int
) -> None:
    data = make("llama", adds, bos="every", batch_size=batch_size)
    found = tokens_of(data)
    scored: dict[str, list[int]] = {"sliding": [], "disjoint": []}
    for (convention, start), (ids, last) in found.items():
        assert ids == [BOS, *IDS[start : start + 15]]
        assert len(last) <= 15
        scored[convention] += last
    assert scored["sliding"] == IDS
    assert scored["disjoint"] == IDS[:90], "fifteen by fifteen, without the tail"
    assert max(len(ids) for ids, _ in found.values()) == 16


def test_gemma_has_bos_before_every_window_by_default(make: Any) -> None:
    assert tokens_of(make("gemma3_text")) == tokens_of(make("llama", bos="every"))


def test_a_text_that_brings_its_own_bos_has_it_once(make: Any) -> None:
    make("llama"), make("llama", "")
    Path("words.txt").write_text(f"<s> {TEXT}")
    for data, expected in (
        (make("llama"), [BOS, *IDS]),
        (make("llama", "", bos="first"), [BOS, *IDS]),
        (make("llama", bos="none"), IDS),
        (make("llama", "", bos="every"), IDS),
        (make("llama", ""), [BOS, *IDS]),
    ):
        assert data.input_ids.tolist() == expected


def test_a_stride_or_a_text_without_room_for_bos_is_refused(make: Any) -> None:
    assert make("llama", bos="every", stride=15).windows
    with pytest.raises(ValueError, match=r"--data.text.stride must be at most 15, got 16: of the 16 tokens .* 1 stand"):
        make("llama", bos="every", stride=16)
    assert make("llama", bos="every", stride=16, conventions=["disjoint"]).windows
    assert make("llama", bos="every", num_tokens=15).windows
    with pytest.raises(ValueError, match=r"has 14 tokens, fewer than --data.text.window 16"):
        make("llama", bos="every", num_tokens=14)


@pytest.mark.parametrize("convention", ["sliding", "disjoint"])
def test_a_window_without_room_for_the_text_is_refused(make: Any, convention: str) -> None:
    options = {"bos": "every", "stride": 1, "conventions": [convention]}
    data = make("llama", "<s> <unk>", window=3, **options)
    assert len(data.before) == 2
    assert {window.num_scored for window in data.windows} == {1}
    with pytest.raises(ValueError, match=r"--data.text.window must be more than the 2 tokens .*, got 2\."):
        make("llama", "<s> <unk>", window=2, **options)


def test_bos_of_a_tokenizer_that_has_none_is_refused(make: Any, make_checkpoint: Any, tmp_path: Path) -> None:
    tokenizer = adding("", "", WORDS)
    tokenizer.bos_token = None
    of = {"tokenizer": checkpoint_with(tokenizer, make_checkpoint("llama"), tmp_path / "none")}
    assert make("llama", **of).has_bos == "none"
    for where in ("first", "every"):
        with pytest.raises(ValueError, match=r"--data.text.bos cannot be had: the tokenizer has no such token"):
            make("llama", bos=where, **of)


def test_a_random_stretch_of_a_document_has_bos_only_for_models_that_are_lost_without(
    make: Any, make_checkpoint: Any, tmp_path: Path
) -> None:
    make("llama"), make("gemma3_text")
    Path("documents.txt").write_text("\n".join(sentence(i, 40) for i in range(8)))
    options: dict[str, Any] = {"num_samples": 8, "seq_len": 9, "crop": "random"}
    drawn = {}
    for family in ("llama", "gemma3_text"):
        data = C4("documents.txt", tokenizer=str(tmp_path / f"{family}3"), **options)
        data.setup("predict")
        drawn[family] = [sample.input_ids for sample in data.samples]
        assert {len(ids) for ids in drawn[family]} == {9}
        assert data.notes["bos"] is (family == "gemma3_text")
    assert sum(ids[0] == BOS for ids in drawn["llama"]) < 8
    for plain, with_bos in zip(drawn["llama"], drawn["gemma3_text"], strict=True):
        assert with_bos == [BOS, *plain[1:]], "the same stretch"
    assert all(torch.tensor(ids).max() < len(WORDS) + 4 for ids in drawn["llama"])
