"""A push to a local stand-in of the hub: huggingface_hub itself uploads the export, and this is what arrives."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from evaluations import save_neurons

from sparc3_lightning.models.components import Component
from sparc3_lightning.models.tensors import TensorFile
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.export import Export

TOKEN = "hf_of_ann"
OUT, EXPORT = Path("out"), Path("exported")


@dataclass
class Hub:
    """What the stand-in was sent. It has the repository ann/taken, which no file may go to."""

    address: str = ""
    role: str = "write"
    breaks_off_at: str = ""  # a part of the address that it answers with an error of its own
    asked: list[str] = field(default_factory=list)
    repositories: dict[str, str] = field(default_factory=lambda: {"ann/taken": "public"})
    large: dict[str, bytes] = field(default_factory=dict)  # by their sha256
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer a call as the hub does."""
        self.asked.append(f"{method} {path}")
        if self.breaks_off_at and self.breaks_off_at in path:
            return 403, {"error": "out of order"}
        *before, last = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            token = {"role": self.role}
            return 200, {"type": "user", "name": "ann", "orgs": [{"name": "lab"}], "auth": {"accessToken": token}}
        if path == "/api/repos/create":
            sent = json.loads(body)
            name = f"{sent.get('organization') or 'ann'}/{sent['name']}"
            assert name not in self.repositories
            # Which of the two it is depends on the version of huggingface_hub.
            self.repositories[name] = sent.get("visibility", "private" if sent.get("private") else "public")
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
            return 200, {"errors": [], "warnings": []}
        if before[:1] == ["large"]:
            assert hashlib.sha256(body).hexdigest() == last
            self.large[last] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.address}/large/{one['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        name = "/".join(path.split("/")[3:5])
        if method == "GET" or name not in self.repositories:
            return (200, {"id": name}) if name in self.repositories else (404, {"error": "Repository not found"})
        if "preupload" in before:
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            told = [
                {"path": file, "uploadMode": modes[file.endswith(".safetensors")], "shouldIgnore": False}
                for file in files
            ]
            return 200, {"files": told}
        assert "commit" in before, path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
                continue
            is_large = line["key"] == "lfsFile"
            content = self.large[value["oid"]] if is_large else base64.b64decode(value["content"])
            self.files.setdefault(name, {})[value["path"]] = content
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/{name}/commit/{'0' * 40}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the hub on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def call(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = self.path.partition("?")[0]
            # What is signed by its address needs no token.
            knows = path.startswith("/large/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            code, content = hub.answer(self.command, path, body) if knows else (401, {"error": "who?"})
            said = json.dumps(content).encode()
            self.send_response(code)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = do_HEAD = call

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # another protocol, on other servers
    huggingface_hub.close_session()  # one of another test may have a proxy
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def neurons(tiny_checkpoint: str) -> Path:
    """A list of neurons of the tiny checkpoint."""
    return save_neurons(tiny_checkpoint, [Component("model.layers.1.mlp.up_proj", 3, -1.0)])


@pytest.mark.parametrize(
    ("name", "options", "repository", "visibility"),
    [
        ("my-model", {}, "ann/my-model", "private"),
        ("lab/my-model", {"private": True}, "lab/my-model", "private"),
        ("ann/my-model", {"private": False}, "ann/my-model", "public"),
    ],
)
def test_the_hub_is_sent_the_very_files_of_the_export_and_keeps_them_private_unless_it_is_said(
    neurons: Path, hub: Hub, name: str, options: dict[str, bool], repository: str, visibility: str
) -> None:
    said = Export(neurons, EXPORT, push_to_hub=name, **options).write(OUT)
    assert said.endswith(f"Uploaded: {hub.address}/{repository}")
    assert hub.repositories == {"ann/taken": "public", repository: visibility}
    assert hub.files == {repository: {path.name: path.read_bytes() for path in EXPORT.iterdir()}}
    assert [hashlib.sha256(content).hexdigest() for content in hub.large.values()] == list(hub.large)
    assert hub.messages == ["Add exported"]
    assert NeuronList.load(OUT / "neurons.json").provenance["push_to_hub"] == repository
    create = hub.asked.index("POST /api/repos/create")
    assert {"GET /api/whoami-v2", f"GET /api/models/{repository}"} <= set(hub.asked[:create])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ann/taken", {}, r"^--model\.push_to_hub: ann/taken exists already; nothing was overwritten\.$"),
        ("bob/model", {}, r"^--model\.push_to_hub: bob/model cannot be made .* who may write to ann, lab\.$"),
        ("ann/model", {"role": "read"}, r"of ann, which may only read\.$"),
        ("ann/model", {"breaks_off_at": "whoami"}, r"^--model\.push_to_hub ann/model: the hub answered: "),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_a_weight_is_read(
    neurons: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a weight was read"))
    for field_name, value in changes.items():
        setattr(hub, field_name, value)
    with pytest.raises((ValueError, OSError), match=message):
        Export(neurons, EXPORT, push_to_hub=name).write(OUT)
    assert not EXPORT.exists()
    assert hub.files == {}
    assert not [call for call in hub.asked if call.startswith("POST")]


def test_a_token_that_the_hub_does_not_know_is_said(neurons: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(OSError, match=r"^--model\.push_to_hub my-model: the hub answered: .*'hf auth login' or set HF"):
        Export(neurons, EXPORT, push_to_hub="my-model").write(OUT)
    assert hub.asked == []


@pytest.mark.parametrize("part", ["repos/create", "preupload", "large", "commit"])
def test_an_upload_that_breaks_off_anywhere_says_that_the_export_is_complete_and_how_to_go_on(
    neurons: Path, hub: Hub, part: str
) -> None:
    hub.breaks_off_at = part
    with pytest.raises(OSError, match=r"complete in exported, .*: run hf upload ann/model exported --private$"):
        Export(neurons, EXPORT, push_to_hub="ann/model").write(OUT)
    assert hub.files == {}
    assert hub.repositories.get("ann/model") == (None if part == "repos/create" else "private")
    assert (EXPORT / "model.safetensors").is_file()
    assert (OUT / "neurons.json").is_file()


def test_a_compression_is_sent_with_its_model_card(make_scores: Callable[..., Path], hub: Hub) -> None:
    Compression([make_scores(0)], Path("sparse")).compress(Path("compressed"))
    said = Export(Path("compressed/sparsity.json"), EXPORT, push_to_hub="my-model").write(OUT)
    assert said.endswith(f"Uploaded: {hub.address}/ann/my-model")
    assert hub.repositories["ann/my-model"] == "private"
    assert hub.files == {"ann/my-model": {path.name: path.read_bytes() for path in EXPORT.iterdir()}}
    assert b"parameters set to zero" in hub.files["ann/my-model"]["README.md"]
    assert (OUT / "sparsity.json").is_file()
