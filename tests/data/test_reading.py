"""Rows of files as people have them: encodings, endings, JSON of all kinds; each error names the file and the row."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import sentence, set_up

from sparc3_lightning.data.c4 import C4
from sparc3_lightning.data.prompts import read_prompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.sources import read_records

ROWS = [{"text": "one", "toxicity": 0.25}, {"text": "zwei, δύο", "toxicity": None}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
BOM = b"\xef\xbb\xbf"


def read(name: str, content: bytes | str) -> list[dict[str, Any]]:
    """Write a file, gzipped if its name ends so, and read its rows."""
    raw = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return list(read_records(Path(name)))


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_a_byte_order_mark_is_no_text_and_every_text_format_may_be_gzipped(bom: bytes, ending: str) -> None:
    assert read(f"a.jsonl{ending}", bom + LINES.encode()) == ROWS
    assert read(f"a.json{ending}", bom + LINES.encode()) == ROWS
    assert read(f"a.json{ending}", bom + json.dumps(ROWS).encode()) == ROWS
    assert read(f"a.json{ending}", bom + b'{"g": {"n": ["one"]}}') == [{"group": "g", "name": "n", "text": "one"}]
    assert read(f"a.txt{ending}", bom + b"one\n\ntwo") == [{"text": "one"}, {"text": ""}, {"text": "two"}]
    assert read(f"a.raw{ending}", bom + b"one") == [{"text": "one"}]
    assert read(f"a.CSV{ending}", bom + b"text,n\none,1\n") == [{"text": "one", "n": "1"}]
    Path(f"w.txt{ending}").write_bytes(gzip.compress(bom + b"one\n") if ending else bom + b"one\n")
    assert WikiText2(f"w.txt{ending}").read_text() == "one\n"


def test_files_with_byte_order_marks_may_be_put_behind_each_other() -> None:
    assert read("a.txt", (BOM + b"one\n") * 2) == [{"text": "one"}] * 2
    assert read("a.jsonl", (BOM + LINES.encode()) * 2) == ROWS * 2
    assert read("a.json", BOM + BOM + LINES.encode()) == ROWS


def test_the_files_of_c4_are_read_by_their_own_name(tiny_checkpoint: str) -> None:
    name = "c4-train.00000-of-01024.json.gz"
    lines = [json.dumps({"text": sentence(i, 20), "timestamp": "t", "url": "u"}) for i in range(6)]
    assert len(read(name, "\n".join(lines) + "\n")) == 6
    assert len(set_up(C4(name, num_samples=6, seq_len=20, tokenizer=tiny_checkpoint)).samples) == 6


@pytest.mark.parametrize(
    "content",
    [LINES, "\n\n" + LINES, LINES.replace("\n", "\n\n"), LINES.replace("\n", "\r\n"), LINES.rstrip("\n")],
)
def test_lines_of_json_may_have_blank_ones_between_them(content: str) -> None:
    assert read("a.json", content) == read("a.jsonl", content) == ROWS


def test_a_json_file_of_one_line_or_one_object_is_a_row_unless_it_is_texts_by_group() -> None:
    assert read("a.json", json.dumps(ROWS[0])) == ROWS[:1]
    assert read("a.json", json.dumps(ROWS[0], indent=1)) == ROWS[:1]
    assert read("a.json", json.dumps({"filename": "f", "prompt": {"text": "t"}})) == [
        {"filename": "f", "prompt": {"text": "t"}}
    ]
    assert read("a.json", json.dumps(ROWS, indent=1)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz", "a.txt.gz", "a.csv.gz"])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda text: text.encode("cp1252"), r"line 3 is not UTF-8 \(byte 0xe9\): save the file"),
        (lambda text: text.encode().replace(b"\xc3\xa9", b"\xed\xa0\x80"), r"line 3 is not UTF-8 \(byte 0xed\)"),
        (lambda text: text.encode().replace(b"\xc3\xa9", b"\0"), "line 3 holds a NUL byte"),
        (lambda text: text.encode("utf-16"), r"line 1 is not UTF-8 \(byte 0xff\)"),
        (lambda text: text.encode("utf-16-be"), "line 1 holds a NUL byte"),
    ],
    ids=["cp1252", "surrogate", "nul", "utf-16", "utf-16 without a mark"],
)
def test_text_that_is_not_utf_8_is_an_error_with_file_and_line(
    name: str, spoil: Callable[[str], bytes], error: str
) -> None:
    contents = {"txt": "one\ntwo\ncafé\n", "csv": "text\none\ncafé\n"}
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("one", "two", "café"))
    with pytest.raises(ValueError, match=rf"^{name}, {error}"):
        read(name, spoil(contents.get(name.split(".")[1], lines)))


@pytest.mark.parametrize("text", [r"\ud800", r"a\udfffb", r"\uD83D and no more", r"\ude00\ud83d"])
def test_half_of_a_surrogate_pair_is_an_error_with_file_and_row(text: str) -> None:
    row = f'{{"prompt": {{"text": "{text}"}}}}'
    for name, content, place in (
        ("a.jsonl", f"{{}}\n{row}\n", "a.jsonl, line 2"),
        ("a.json", f'{{"text": "one"}}\n{row}\n', "a.json, line 2"),
        ("a.json", f"[{{}},\n {row}]", "a.json, row 2"),
        ("a.json", f'{{"g": {{"n": ["one", "{text}"]}}}}', "a.json, row 2"),
    ):
        with pytest.raises(ValueError, match=rf"{place} holds \\u[dD][0-9a-fA-F]{{3}}, half of a surrogate pair"):
            read(name, content)


def test_a_whole_surrogate_pair_and_other_escapes_are_text() -> None:
    assert read("a.jsonl", r'{"text": "\ud83d\ude00 \u00e9 \\ud800"}') == [{"text": "😀 é \\ud800"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"b": 1, "b": 2}', "it has the key 'b' twice"),
        ("tru", "Expecting value"),
    ],
    ids=["lists", "objects", "a long number", "a key twice", "no value"],
)
def test_json_that_cannot_be_read_is_an_error_with_the_file(name: str, value: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}(, line 2)? is not valid JSON: .*{reason}") as raised:
        read(name, f'{{"text": "one"}}\n{{"text": {value}}}\n')
    assert len(str(raised.value)) < 300
    with pytest.raises(ValueError, match=rf"^a.json is not valid JSON: .*{reason}"):
        read("a.json", f'[{{"text": {value}}}]')


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("content", [b"", BOM, b"\n"])
def test_an_empty_file_has_no_rows_and_prompts_of_it_are_refused_by_its_name(name: str, content: bytes) -> None:
    if name == "a.txt":
        assert read(name, content) == ([{"text": ""}] if content == b"\n" else [])
        return
    assert read(name, content) == []
    with pytest.raises(ValueError, match=rf"The file of prompts is empty \({name}\)"):
        read_prompts(read_records(Path(name)), place=name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b""), ("a.parquet", b""), ("a.parquet", b"PAR1" + bytes(99) + b"PAR1")]
)
def test_an_empty_file_of_a_format_that_is_never_empty_is_an_error_with_its_name(name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is") as raised:
        read(name, content)
    assert "\n" not in str(raised.value)


def test_a_truncated_gzip_file_is_an_error_whatever_is_in_it() -> None:
    for ending in ("jsonl", "json", "csv", "txt"):
        whole = gzip.compress(LINES.encode())
        Path(f"a.{ending}.gz").write_bytes(whole[:-10])
        with pytest.raises(ValueError, match=rf"^a.{ending}.gz is damaged, or not what its ending says"):
            list(read_records(Path(f"a.{ending}.gz")))


def test_a_csv_file_with_a_column_twice_or_a_quote_that_does_not_end_is_an_error_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^a.csv has the column 'text' twice"):
        read("a.csv", "text,n,text\none,1,two\n")
    assert read("a.csv", ",text,\n0,one,\n") == [{"": "", "text": "one"}]
    with pytest.raises(ValueError, match=r"^a.csv is damaged, or not what its ending says \(Error: line \d"):
        read("a.csv", 'text\none\n"two\n')


def test_a_parquet_file_without_the_column_is_an_error_with_file_and_row() -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "one"}]), "a.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of a.parquet has no text.*\(option text_field\); it has \['body'\]"):
        read_prompts(read_records(Path("a.parquet")), place="a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict({"text": [b"caf\xe9"]}), "a.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of a.parquet has no text"):
        read_prompts(read_records(Path("a.parquet")), place="a.parquet")


@pytest.mark.parametrize("toxicity", ["high", [0.5], {}, "1e999", 10**400, float("inf")])
def test_a_toxicity_that_is_no_number_is_an_error_with_the_row(toxicity: Any) -> None:
    with pytest.raises(ValueError, match=r"^Row 2 of a.jsonl has the toxicity .*, expected a number\.$"):
        read_prompts([{"text": "one"}, {"text": "two", "toxicity": toxicity}], place="a.jsonl")
    assert read_prompts([{"text": "two", "toxicity": float("nan")}])[0].toxicity is None


def test_a_continuation_that_is_no_text_is_an_error_with_the_row() -> None:
    with pytest.raises(ValueError, match=r"^Row 1 of the prompts has 3 in the field 'text', expected a text"):
        read_prompts([{"prompt": {"text": "one"}, "continuation": {"text": 3}}])
