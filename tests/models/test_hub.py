"""Checkpoints of the hub: every way of not having one is one clear sentence."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import config, fingerprint, load_float32
from safetensors.torch import load_file

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.sources import PICKLED, explain_hub_error

GATED = "is gated: accept its licence on its page at the hub, then run 'hf auth login' or set HF_TOKEN."
NOT_FOUND = "is neither a folder here nor a repository at the hub (or it is private: set HF_TOKEN)."
NO_NETWORK = (
    "is not on this machine and the hub cannot be reached: run 'sparc3 prepare' where there is a network, or give the "
    "path of a local checkpoint folder."
)
NO_REVISION = "has no such branch, tag or commit at the hub: correct --model.revision."
TRANSFORMERS_SAYS = {
    "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.\n"
    "Check your internet connection.": NO_NETWORK,
    "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/org/name.": GATED,
    "org/name is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'\n"
    "If this is a private repository, make sure to pass a token": NOT_FOUND,
    "v9 is not a valid git identifier (branch name, tag name or commit id) that exists for this model name.": (
        NO_REVISION
    ),
}


@pytest.mark.parametrize(("text", "expected"), TRANSFORMERS_SAYS.items())
def test_what_transformers_says_of_the_hub_becomes_one_sentence(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(text)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    for ask in (config, Checkpoint.tokenizer, fingerprint, load_float32):
        with pytest.raises(OSError, match=r"^'org/name' ") as raised:
            ask(Checkpoint("org/name"))
        assert str(raised.value) == f"'org/name' {expected}"
        assert raised.value.__cause__ is None


def hub_error(name: str, message: str) -> Exception:
    import huggingface_hub.errors

    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    return getattr(huggingface_hub.errors, name)(message, response=response)


HUB_SAYS = [
    ("GatedRepoError", "403 Client Error. Cannot access gated repo for url https://hub/org/name/resolve/main/a", GATED),
    (
        "RepositoryNotFoundError",
        "401 Client Error. If you are trying to access a private or gated repo, make sure you are authenticated: "
        "https://hub/org/name/resolve/main/config.json",
        NOT_FOUND,
    ),
    ("RevisionNotFoundError", "404 Client Error. https://hub/org/name/resolve/v9/config.json", NO_REVISION),
]


@pytest.mark.parametrize(("name", "message", "expected"), HUB_SAYS)
def test_what_the_hub_says_becomes_one_sentence_also_below_other_errors(name: str, message: str, expected: str) -> None:
    direct = hub_error(name, message)
    outer = OSError("There was a specific connection error when trying to load org/name")
    outer.__cause__ = ValueError("in between")
    outer.__cause__.__context__ = direct
    for error in (direct, outer):
        assert explain_hub_error("org/name", error) == f"'org/name' {expected}"


def test_another_answer_of_the_hub_is_not_taken_for_a_missing_network() -> None:
    answer = hub_error("HfHubHTTPError", "429 Too Many Requests\nfor url https://hub/org/name/resolve/main/config.json")
    explanation = explain_hub_error("org/name", answer)
    assert explanation.startswith("'org/name' could not be loaded, the hub answered: 429 Too Many Requests for url")
    assert "\n" not in explanation


def test_an_error_that_is_not_understood_is_passed_on_in_one_line() -> None:
    assert explain_hub_error("a/b", OSError("Something odd\nand more")) == "'a/b' could not be loaded: Something odd"
    assert explain_hub_error("a/b", OSError()) == "'a/b' could not be loaded: OSError"


def test_without_a_network_a_hub_id_is_one_sentence_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for ask in (config, Checkpoint.tokenizer, Checkpoint.fetch, load_float32):
        with pytest.raises(OSError, match="hub cannot be reached") as raised:
            ask(Checkpoint("sparc3-tests/no-such-model"))
        assert str(raised.value) == f"'sparc3-tests/no-such-model' {NO_NETWORK}"


class Hub(BaseHTTPRequestHandler):
    """Refuses every repository in the way its name asks for, with the headers of the real hub."""

    ANSWERS = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "revision": (404, "RevisionNotFound")}

    def do_GET(self) -> None:
        status, code = next((self.ANSWERS[name] for name in self.ANSWERS if f"org/{name}" in self.path), (404, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ASK_HUB = """
import json
from sparc3_lightning.models.checkpoints import Checkpoint
asks = {"config": lambda checkpoint: checkpoint.config, "fetch": Checkpoint.fetch}
said = {}
for name in ("gated", "missing", "revision"):
    for key, ask in asks.items():
        try:
            ask(Checkpoint(f"org/{name}", "v9" if name == "revision" else None))
        except OSError as error:
            said[f"{key} {name}"] = str(error)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_repository_that_is_gated_or_missing_at_a_real_server_is_one_sentence(hub: str, tmp_path: Path) -> None:
    """In a process of its own: the address of the hub is read when its library is imported."""
    left_out = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", ASK_HUB], env=environment, capture_output=True, text=True, check=True)
    expected = {"gated": GATED, "missing": NOT_FOUND, "revision": NO_REVISION}
    assert json.loads(done.stdout.splitlines()[-1]) == {
        f"{ask} {name}": f"'org/{name}' {text}" for name, text in expected.items() for ask in ("config", "fetch")
    }


LOAD_PICKLED = """
import torch
from sparc3_lightning.models.checkpoints import Checkpoint
for load in (Checkpoint.fetch, lambda checkpoint: checkpoint.load(torch.float32)):
    try:
        load(Checkpoint("org/pickled"))
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_pickled_weights_of_the_hub_are_not_loaded_and_said_not_to_be_there(copied: Path, tmp_path: Path) -> None:
    """In a process of its own: the place of the cache is read when the hub's library is imported."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "hub" / "models--org--pickled"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    shutil.copytree(copied, snapshot)
    torch.save(weights, snapshot / "pytorch_model.bin")
    # As the hub's library notes that it asked for these files in vain.
    (repository / ".no_exist" / commit).mkdir(parents=True)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (repository / ".no_exist" / commit / name).touch()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD_PICKLED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"'org/pickled' {PICKLED}"] * 2


@pytest.fixture
def cached_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's library, with no network beside it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(hub: Path, name: str, folder: Path, commit: str) -> Path:
    """Put a folder into the cache of the hub's library, as the commit of the main branch of a repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def test_the_fingerprint_of_a_hub_repository_is_its_commit(copied: Path, cached_hub: Path) -> None:
    for commit in ("1" * 40, "2" * 40):
        put_in_cache(cached_hub, "org/name", copied, commit)
        assert Checkpoint("org/name").fingerprint == f"commit:{commit}"
    assert Checkpoint("org/name", "1" * 40).fingerprint == f"commit:{'1' * 40}"
    assert Checkpoint.unchanged("org/name", f"commit:{'1' * 40}").revision == "1" * 40


def test_a_checkpoint_of_the_hub_is_loaded_as_the_folder_it_is(copied: Path, cached_hub: Path) -> None:
    put_in_cache(cached_hub, "org/name", copied, "1" * 40)
    whole = load_float32(Checkpoint("org/name")).state_dict()
    expected = load_file(copied / "model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
    tokenizer = Checkpoint("org/name").tokenizer()
    assert tokenizer.get_vocab() == Checkpoint(str(copied)).tokenizer().get_vocab()


@pytest.mark.parametrize("commit", ["1" * 40, "2" * 40])
def test_of_the_hub_the_files_are_fetched_that_are_read_and_no_more(
    commit: str, copied: Path, cached_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str | None, list[str]]] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, allow_patterns))
        return str(folder)

    folder = put_in_cache(cached_hub, "org/name", copied, commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    if commit.startswith("2"):
        (folder / "model.safetensors").unlink()
        places = {f"any{i}": file for i, file in enumerate(files)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        for file in files:
            (folder / file).touch()
    Checkpoint("org/name").fetch()
    (first, patterns), *rest = asked
    assert first is None
    assert [pattern for pattern in patterns if "safetensors" in pattern] == ["model.safetensors"]
    assert rest == ([(commit, files)] if commit.startswith("2") else [])


def test_an_adapter_of_the_hub_is_refused(copied: Path, cached_hub: Path) -> None:
    (copied / "adapter_config.json").write_text("{}")
    put_in_cache(cached_hub, "org/name", copied, "1" * 40)
    with pytest.raises(ValueError, match=r"holds an adapter.*merge it into its base model first"):
        load_float32(Checkpoint("org/name"))
