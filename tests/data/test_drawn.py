"""A model's own continuations as samples: the tokens that it read and drew, whatever their text would be read as."""

from pathlib import Path
from typing import Any

import pytest
from helpers import WORDS, ids_of, set_up, write_completions
from spoken import BOS, EOS, adding, checkpoint_with
from tokenizers import decoders, models, pre_tokenizers

from sparc3_lightning.data.prompts import Prompt, continued, prompt_id
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.evaluation.completions import completion_rows
from sparc3_lightning.evaluation.generation import Continuation
from sparc3_lightning.files import sealed


def glued() -> Any:
    """Return a tokenizer that decodes a first word without the blank before it, as LLaMA's does, and reads BOS."""
    tokenizer = adding("<s>", "</s>")
    vocabulary = {"<pad>": 0, "<s>": BOS, "</s>": EOS, "<unk>": 3}
    words = [*(f"▁{word}" for word in WORDS[:50]), *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary |= {word: i for i, word in enumerate(words, start=4)}
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocabulary, [], unk_token="<unk>", ignore_merges=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return tokenizer


def rows_of(tokens: Tokens, prompt: str, drawn: list[list[int]]) -> list[dict[str, Any]]:
    """Return the rows of an evaluation."""
    (ids,) = tokens.encode_prompts([prompt])
    continuations = [Continuation(row, False) for row in drawn]
    of = Prompt(prompt_id(prompt), prompt, 0.95, input_ids=ids)
    rows = completion_rows("baseline", of, continuations, tokens.decode(drawn), {"some": [0.9] * len(drawn)})
    return [dict(row) for row in rows]


def samples_of(rows: list[dict[str, Any]], checkpoint: str, **options: Any) -> list[Any]:
    source = write_completions(Path("completions.jsonl"), rows)
    of: dict[str, Any] = {"by": "continuation", "continuation_toxicity": (0.5, 1.0), "num_samples": len(rows)}
    return set_up(ToxicPrompts(source, tokenizer=checkpoint, **of, **options)).samples


def test_what_was_drawn_is_attributed_though_its_text_would_be_read_as_something_else(
    tiny_checkpoint: str, tmp_path: Path
) -> None:
    tokens = Tokens(glued())
    vocabulary = tokens.tokenizer.get_vocab()
    prompt, drawn = "the to", [[vocabulary["▁and"], vocabulary["▁in"]], [vocabulary["a"], EOS - 1, vocabulary["b"]]]
    rows = rows_of(tokens, prompt, drawn)
    assert rows[0]["continuation"] == "and in", "the blank before it is lost"
    again = tokens.encode_prompts([row["prompt"] + row["continuation"] for row in rows])
    checkpoint = checkpoint_with(tokens.tokenizer, tiny_checkpoint, tmp_path / "glued")
    before = [BOS, vocabulary["▁the"], vocabulary["▁to"]]
    for sample, ids, reread in zip(samples_of(rows, checkpoint), drawn, again, strict=True):
        assert (sample.input_ids, sample.start) == ([*before, *ids], 3)
        assert sample.input_ids != reread


def test_a_file_of_other_tools_without_token_ids_is_read_as_text(tiny_checkpoint: str) -> None:
    rows = rows_of(Tokens(adding()), "the dog", [ids_of("cat"), ids_of("and bird")])
    for row in rows:
        del row["token_ids"], row["prompt_token_ids"]
        row["continuation"] = f" {row['continuation']}"
    assert [(sample.input_ids, sample.start) for sample in samples_of(rows, tiny_checkpoint)] == [
        (ids_of("the dog cat"), 2),
        (ids_of("the dog and bird"), 2),
    ]


def test_prompts_alone_are_read_as_text_with_or_without_token_ids(tiny_checkpoint: str) -> None:
    source = write_completions(Path("completions.jsonl"), rows_of(Tokens(adding()), "the dog", [ids_of("cat")]))
    data = ToxicPrompts(source, by="continuation", num_samples=1, tokenizer=tiny_checkpoint)
    assert [sample.input_ids for sample in set_up(data).samples] == [ids_of("the dog")]


def test_token_ids_of_another_tokenizer_are_refused(tiny_checkpoint: str) -> None:
    other = Tokens(adding(words=[*reversed(WORDS), "user", "assistant"]))
    with pytest.raises(
        ValueError, match=r"completions.jsonl: the token ids of the continuation \w+/0 are not its text"
    ):
        samples_of(rows_of(other, "the dog", [other.encode_bare(["cat"])[0]]), tiny_checkpoint)
    rows = rows_of(Tokens(adding()), "the dog", [ids_of("cat")])
    rows[0]["token_ids"] = [*ids_of("cat"), 5000]
    assert len(samples_of(rows, tiny_checkpoint)) == 1, "no model is known, and a tokenizer does not speak of it"
    with pytest.raises(ValueError, match=r"has the token 5000"):
        Tokens(adding(), vocab_size=106).check("id/0", rows[0]["token_ids"])


def test_a_prompt_that_was_continued_in_a_chat_is_not_attributed_without_and_the_other_way_round(
    tiny_checkpoint: str, tmp_path: Path
) -> None:
    template = "you {{ messages[0].content }} we"
    checkpoint = checkpoint_with(adding(words=WORDS, chat=template), tiny_checkpoint, tmp_path / "chatty")
    plain, chat = (rows_of(Tokens(adding(chat=template), chat=c), "the dog", [ids_of("cat")]) for c in (False, True))
    assert samples_of(chat, checkpoint, chat=True)[0].input_ids == ids_of("you the dog we cat")
    assert samples_of(plain, checkpoint)[0].input_ids == ids_of("the dog cat")
    for rows, option in ((plain, True), (chat, False)):
        with pytest.raises(ValueError, match=r"was not continued as the tokens .* give --data.chat as that evaluation"):
            samples_of(rows, checkpoint, chat=option)


def test_a_prompt_in_a_chat_with_the_date_is_attributed_as_it_was_read_then(
    tiny_checkpoint: str, tmp_path: Path
) -> None:
    dated = "{{ strftime_now('the') }} {{ messages[0].content }} we"
    checkpoint = checkpoint_with(adding(words=WORDS, chat=dated), tiny_checkpoint, tmp_path / "dated")
    rows = rows_of(Tokens(adding(chat=dated.replace("the", "a")), chat=True), "dog", [ids_of("cat")])
    assert samples_of(rows, checkpoint, chat=True)[0].input_ids == ids_of("a dog we cat")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", "5, 6"),
        ("token_ids", [5, "6"]),
        ("token_ids", [5, -1]),
        ("token_ids", [5, True]),
        ("token_ids", [5, 6.0]),
        ("token_ids", [1 << 40]),
        ("prompt_token_ids", None),
        ("continuation", None),
        ("prompt", 3),
        ("prompt_id", 3),
        ("continuation_index", "0"),
        ("continuation_index", True),
        ("scores", {"some": "high"}),
        ("scores", {"some": [0.5]}),
        ("prompt_toxicity", "high"),
    ],
)
def test_a_field_of_another_type_is_an_error_with_the_row(field: str, value: Any) -> None:
    rows = rows_of(Tokens(adding()), "the dog", [ids_of("cat"), ids_of("bird")])
    rows[1][field] = value
    with pytest.raises(
        ValueError,
        match=rf"^Row 2 of c\.jsonl has .*{'toxicity' if 'high' in str(value) or field == 'scores' else field}",
    ):
        continued(map(sealed, rows), "c.jsonl")


def test_the_same_continuation_twice_is_an_error_with_the_row() -> None:
    rows = rows_of(Tokens(adding()), "the dog", [ids_of("cat")])
    with pytest.raises(ValueError, match=r"Row 2 of c.jsonl is a second continuation 0 of the prompt"):
        continued([*map(sealed, rows * 2)], "c.jsonl")


def test_a_continuation_without_a_score_is_left_out_as_before() -> None:
    rows = rows_of(Tokens(adding()), "the dog", [ids_of("cat"), ids_of("bird"), ids_of("tree")])
    rows[0]["scores"]["some"], rows[1]["scores"]["some"] = None, float("nan")
    assert [prompt.continuation for prompt in continued(map(sealed, rows), "c.jsonl")] == ["tree"]
