"""Files appear whole or not at all, and a folder that cannot be written to is noticed before the work."""

import errno
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sparc3_lightning.files import check_writable, replacing, temporary_folder, to_json, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_takes_the_place_of_the_old_file_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_block_that_fails_leaves_the_old_file_and_no_temporary_one(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_block_that_fails_leaves_nothing_where_there_was_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError), replacing(tmp_path / "new" / "a.json"):  # noqa: PT011
        raise ValueError
    assert names(tmp_path / "new") == []


def test_a_disk_that_fills_up_on_the_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_missing_folders_are_made_and_the_file_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_is_written_as_utf_8_with_its_line_breaks_as_they_are(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "δ\n\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "δ\n\r\n".encode()


def test_a_folder_is_prepared_beside_its_place_and_renamed(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "new" / "a") as temporary:
        assert f".{os.getpid()}-{began()}-{platform.node()}." in temporary.name
        (temporary / "x").write_text("x")
        temporary.replace(tmp_path / "new" / "a")
    assert names(tmp_path / "new") == ["a"]
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o755


def began() -> int:
    """When this process began, as Linux counts it."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_is_not_finished_is_removed(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), temporary_folder(tmp_path / "a") as temporary:  # noqa: PT012
        (temporary / "x").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_folders_that_killed_processes_of_this_host_left_are_swept_and_no_others(tmp_path: Path) -> None:
    host, dead = platform.node(), 4194305  # no process of Linux has a number above 4194304
    left = [
        f".a.{dead}-7-{host}.abcdefgh",
        f".other.gguf.{dead}-7-{host}.a_c0efgh",
        f".a.{os.getpid()}-{began() - 1}-{host}.abcdefgh",  # its number is in use again
    ]
    kept = [
        f".a.{os.getpid()}-{began()}-{host}.abcdefgh",
        f".a.{dead}-7-{host}x.abcdefgh",
        f"a.{dead}-7-{host}.abcdefgh",
        "a",
        ".git",
    ]
    for name in left + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    with temporary_folder(tmp_path / "b"):
        pass
    assert names(tmp_path) == sorted(kept)


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_the_name_of_a_folder_may_be_as_long_as_the_file_system_lets_it_be(name: str, tmp_path: Path) -> None:
    with temporary_folder(tmp_path / name) as temporary:
        temporary.replace(tmp_path / name)
    assert names(tmp_path) == [name]


def test_what_json_has_not_becomes_null_however_deep_it_lies() -> None:
    value = {
        "a": math.nan,
        "b": [1.5, math.inf, {"c": (-math.inf, 0.0)}],
        "d": "NaN",
        "e": None,
        "f": True,
        "g": 10**20,
        "h": [[math.nan]],
        "i": [Path("folder") / "file"],
    }
    expected = {
        "a": None,
        "b": [1.5, None, {"c": [None, 0.0]}],
        "d": "NaN",
        "e": None,
        "f": True,
        "g": 10**20,
        "h": [[None]],
        "i": ["folder/file"],
    }
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert text.endswith("}\n")
    assert list(json.loads(text)) == list(value), "the order stays"


def test_numbers_that_json_has_are_written_in_full() -> None:
    value = {"third": 1 / 3, "tiny": 5e-324, "large": 1.7976931348623157e308}
    assert json.loads(to_json(value)) == value


def test_a_writable_folder_is_made_and_stays_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def no_space(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_an_output_folder_that_is_a_file_is_an_error_that_names_the_option(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="Cannot write to the output folder") as raised:
        check_writable(tmp_path / folder)
    assert "--trainer.logger.init_args.save_dir" in str(raised.value)
    assert str(tmp_path / folder) in str(raised.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("owner", "function", "ablation", "reason"),
    [
        (os, "fsync", no_space, "No space left on device"),
        (tempfile, "TemporaryFile", read_only, "Read-only file system"),
    ],
)
def test_a_full_or_read_only_output_folder_is_an_error_that_names_the_option(
    owner: Any, function: str, ablation: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, function, ablation)
    with pytest.raises(OSError, match=reason) as raised:
        check_writable(tmp_path / "out")
    assert "--trainer.logger.init_args.save_dir" in str(raised.value)
    assert names(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_folder_without_permission_to_write_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"Permission denied.*--trainer.logger.init_args.save_dir"):
            check_writable(tmp_path)
    finally:
        tmp_path.chmod(0o755)
