"""The fingerprint of a checkpoint: every byte that is read counts, and a large file is read for it once."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import fingerprint
from helpers import WORDS, make_config

from sparc3_lightning import files as files_module
from sparc3_lightning.files import kept_sha256, sha256_of
from sparc3_lightning.models.checkpoints import Checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed, one entry each time."""
    files: list[Path] = []

    def remember(path: Path) -> str:
        files.append(path)
        return sha256_of(path)

    monkeypatch.setattr(files_module, "sha256_of", remember)
    return files


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that is worth keeping the hash of, and was changed a while ago."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(os.urandom(1 << 20) + b"end")
    make_old(path)
    return path


def make_old(path: Path) -> None:
    an_hour_ago = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(an_hour_ago, an_hour_ago))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def permute_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[WORDS[0]], vocabulary[WORDS[1]] = vocabulary[WORDS[1]], vocabulary[WORDS[0]]
    path.write_text(json.dumps(content))


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, **changes}))

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "a permuted vocabulary": permute_vocabulary,
    "another end token": edit("generation_config.json", eos_token_id=[2, 5]),
    "a BOS that is added": edit("tokenizer_config.json", add_bos_token=True),
    "an added token": edit("added_tokens.json", more=900),
    "a template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "a SentencePiece model": lambda folder: (folder / "tokenizer.model").write_bytes(b"\x00"),
    "another config": edit("config.json", rms_norm_eps=1e-3),
    "the first byte of a weight": lambda folder: flip(folder / "model.safetensors", -1),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_anything_that_is_read_is_another_fingerprint(case: str, copied: Path) -> None:
    before = fingerprint(Checkpoint(str(copied)))
    CHANGES[case](copied)
    assert fingerprint(Checkpoint(str(copied))) != before


@pytest.mark.parametrize("file", ["README.md", "model.fp16.safetensors", "neurons.json", "results.json", "notes.txt"])
def test_a_file_that_is_not_read_is_not_in_the_fingerprint(file: str, copied: Path) -> None:
    before = fingerprint(Checkpoint(str(copied)))
    (copied / file).write_text("{}")
    assert fingerprint(Checkpoint(str(copied))) == before


def test_any_flipped_bit_of_a_large_weight_file_is_another_fingerprint(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = tmp_path / "large"
    LlamaForCausalLM(make_config("llama", hidden_size=128, intermediate_size=2048)).save_pretrained(folder)
    path = folder / "model.safetensors"
    make_old(path)
    size = path.stat().st_size
    assert size > 3 << 20
    seen = {fingerprint(Checkpoint(str(folder)))}
    places = [size - 1, size // 2, (1 << 20) + (1 << 16) + 1, (2 << 20) - 1, (2 << 20) + (1 << 19)]
    for place in places:
        flip(path, place)
        make_old(path)
        seen.add(fingerprint(Checkpoint(str(folder))))
    assert len(seen) == 1 + len(places)


def test_the_parts_of_a_checkpoint_and_their_index_are_in_the_fingerprint(copied: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(copied).save_pretrained("parts", max_shard_size="10KB")
    parts = sorted(Path("parts").glob("*.safetensors"))
    assert len(parts) > 2
    seen = {fingerprint(Checkpoint("./parts"))}
    for part in parts:
        flip(part, -1)
        seen.add(fingerprint(Checkpoint("./parts")))
    edit("model.safetensors.index.json", more=1)(Path("parts"))
    seen.add(fingerprint(Checkpoint("./parts")))
    assert len(seen) == len(parts) + 2


def test_a_large_file_is_hashed_once(large: Path, hashed: list[Path], cache: Path) -> None:
    assert [kept_sha256(large) for _ in range(3)] == [sha256_of(large)] * 3
    link = large.with_name("link.safetensors")
    link.symlink_to(large)
    assert kept_sha256(link) == sha256_of(large)
    assert hashed == [large]
    assert [path.name[0] for path in cache.iterdir()] != ["."], "a temporary file was left behind"
    assert len(list(cache.iterdir())) == 1


def test_a_small_file_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "small").write_text("small")
    assert kept_sha256(tmp_path / "small") == sha256_of(tmp_path / "small")
    assert not cache.exists()


def test_a_file_that_was_changed_is_hashed_again_also_if_its_time_was_put_back(large: Path, hashed: list[Path]) -> None:
    status = large.stat()
    before = kept_sha256(large)
    flip(large, 1000)
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (large.stat().st_size, large.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert kept_sha256(large) == sha256_of(large) != before
    other = Path(shutil.copy2(large, large.with_name("other.safetensors")))
    other.replace(large)
    assert kept_sha256(large) == sha256_of(large)
    assert len(hashed) == 3


def test_a_file_that_was_changed_just_now_is_hashed_each_time(large: Path, hashed: list[Path]) -> None:
    large.touch()
    assert [kept_sha256(large) for _ in range(2)] == [sha256_of(large)] * 2
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["", "nonsense", "0" * 64, b"\xff\xfe", "flip", "cut", "of another file"])
def test_a_damaged_entry_of_the_cache_is_none(damage: str | bytes, large: Path, cache: Path) -> None:
    expected = kept_sha256(large)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    if damage == "flip":
        flip(entry, 0)
    elif damage == "of another file":
        other = large.with_name("other.safetensors")
        other.write_bytes(os.urandom(1 << 20))
        make_old(other)
        kept_sha256(other)
        (theirs,) = set(cache.iterdir()) - {entry}
        entry.write_bytes(theirs.read_bytes())
    else:
        content = whole[:-10] if damage == "cut" else damage
        entry.write_bytes(content.encode() if isinstance(content, str) else content)
    assert kept_sha256(large) == expected
    assert entry.read_bytes() == whole, "it was not mended"


def test_a_cache_that_cannot_be_written_to_costs_time_only(
    large: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    monkeypatch.setenv("SPARC3_CACHE", "file")
    assert [kept_sha256(large) for _ in range(2)] == [sha256_of(large)] * 2
    assert len(hashed) == 2
