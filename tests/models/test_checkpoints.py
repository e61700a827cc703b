"""Checkpoints: found, loaded, fingerprinted and exported; every way of not having one is one clear sentence."""

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
from helpers import WORDS, make_config, sentence
from safetensors.torch import load_file, save_file

from sparc3_lightning.models.checkpoints import Checkpoint, load_model, resolve_dtype
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.sources import PICKLED, explain_hub_error

CPU = torch.device("cpu")
INPUT_IDS = torch.tensor([[5, 17, 33, 8, 21, 40]])


@pytest.fixture
def copied(tiny_checkpoint: str, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copied"))


def config(checkpoint: Checkpoint) -> Any:
    return checkpoint.config


def fingerprint(checkpoint: Checkpoint) -> str:
    return checkpoint.fingerprint


def load_float32(checkpoint: Checkpoint) -> Any:
    return checkpoint.load(torch.float32)


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and ". " not in message


def test_a_folder_is_found_by_its_path(copied: Path) -> None:
    assert Checkpoint(str(copied)).location == str(copied)
    assert Checkpoint("copied").location == "copied"
    assert Checkpoint("./copied").location == "copied"


@pytest.mark.parametrize("checkpoint", ["meta-llama/Meta-Llama-3-8B", "gpt2"])
def test_the_id_of_a_hub_repository_passes_through(checkpoint: str) -> None:
    assert Checkpoint(checkpoint).location == checkpoint


def test_a_folder_without_config_json_is_not_a_checkpoint(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copied is not a checkpoint: it has no config.json"):
        _ = Checkpoint(str(copied)).location


def test_a_folder_with_pickled_weights_only_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no \*.safetensors file.*never loaded.*save_pretrained"):
        load_model(str(copied), torch.float32)


@pytest.mark.parametrize("checkpoint", ["missing.gguf", "./missing", "/missing/folder", "~/missing", "a/b/c"])
def test_a_local_path_that_does_not_exist_is_not_taken_for_a_hub_id(checkpoint: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        _ = Checkpoint(checkpoint).location


def test_a_file_that_is_no_gguf_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a GGUF file"):
        _ = Checkpoint(str(tmp_path / "model.safetensors")).location


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_is_loaded_in_the_dtype_asked_for_frozen_and_in_evaluation_mode(
    dtype: torch.dtype, tiny_checkpoint: str
) -> None:
    model = load_model(tiny_checkpoint, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert {parameter.device for parameter in model.parameters()} == {CPU}


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_an_accelerator() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("mps")) == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_named_dtype_holds_on_any_device(device: str) -> None:
    names: list[Any] = ["float32", "bfloat16", "float64"]
    assert [resolve_dtype(name, torch.device(device)) for name in names] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]


def test_the_tokenizer_of_the_checkpoint_is_loaded(tiny_checkpoint: str) -> None:
    tokenizer = Checkpoint(tiny_checkpoint).tokenizer()
    assert tokenizer(f"{WORDS[0]} {WORDS[7]} unknownword")["input_ids"] == [4, 11, 3]
    assert tokenizer.pad_token == "<pad>"


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_of_sequence(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    (copied / "special_tokens_map.json").unlink(missing_ok=True)
    assert Checkpoint(str(copied)).tokenizer().pad_token == "</s>"


def test_the_files_of_a_local_checkpoint_are_listed(tiny_checkpoint: str) -> None:
    names = {path.name for path in Checkpoint(tiny_checkpoint).fetch()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_an_unknown_architecture_is_one_sentence_with_the_way_out(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": "nonsense"}')
    for load in (config, load_float32):
        with pytest.raises(ValueError, match="does not know the architecture") as raised:
            load(Checkpoint(str(copied)))
        message = str(raised.value)
        assert is_one_sentence(message), message
        assert "nonsense" in message
        assert str(copied) in message
        assert "upgrade" in message


def test_a_config_without_a_model_type_is_a_clear_error(copied: Path) -> None:
    (copied / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not know the architecture.*model_type"):
        _ = Checkpoint(str(copied)).config


def test_a_config_that_is_not_json_is_a_clear_error(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": ')
    with pytest.raises(OSError, match=r"copied.*not a valid JSON file"):
        _ = Checkpoint(str(copied)).config


@pytest.mark.parametrize("architecture", ["vit", "t5"])
def test_a_model_that_is_no_causal_language_model_is_refused(architecture: str, copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": architecture}))
    with pytest.raises(ValueError, match=rf"\({architecture}\) is not a causal language model"):
        load_model(str(copied), torch.float32)


def test_truncated_weights_are_one_sentence_that_names_the_checkpoint(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"A weight file of '.*copied' is damaged: fetch or copy it again") as raised:
        load_model(str(copied), torch.float32)
    assert is_one_sentence(str(raised.value))


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


def test_the_fingerprint_of_a_folder_does_not_depend_on_its_name_or_its_tokenizer(
    tiny_checkpoint: str, copied: Path
) -> None:
    (copied / "tokenizer.json").write_text("{}")
    assert Checkpoint(str(copied)).fingerprint == Checkpoint(tiny_checkpoint).fingerprint
    assert Checkpoint("copied").fingerprint.startswith("files:")


def test_the_fingerprint_changes_with_any_weight_of_a_small_checkpoint(copied: Path) -> None:
    path = copied / "model.safetensors"
    weights = load_file(path)
    seen = {Checkpoint(str(copied)).fingerprint}
    for name, weight in weights.items():
        changed = weight.clone()
        changed.view(-1)[len(changed.view(-1)) // 2] += 1
        save_file({**weights, name: changed}, path, {"format": "pt"})
        seen.add(Checkpoint(str(copied)).fingerprint)
    assert len(seen) == 1 + len(weights)


def test_the_fingerprint_changes_with_the_config(copied: Path) -> None:
    before = Checkpoint(str(copied)).fingerprint
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert Checkpoint(str(copied)).fingerprint != before


def test_the_fingerprint_of_a_pruned_checkpoint_is_another_also_where_files_are_large(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(make_config("llama", hidden_size=128, intermediate_size=2048, num_hidden_layers=5))
    whole, pruned = tmp_path / "whole", tmp_path / "pruned"
    model.save_pretrained(whole)
    assert (whole / "model.safetensors").stat().st_size > 14 << 20
    model.model.layers[2].mlp.down_proj.weight.data[:, 1000] = 0
    model.save_pretrained(pruned)
    assert (whole / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    assert Checkpoint(str(whole)).fingerprint != Checkpoint(str(pruned)).fingerprint


def test_the_fingerprint_of_a_hub_repository_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "config", SimpleNamespace(_commit_hash="0123abcd"))
    assert Checkpoint("org/name").fingerprint == "commit:0123abcd"


NEURONS = [
    Component("model.layers.0.mlp.up_proj", 3, -1.0),
    Component("model.layers.1.mlp.up_proj", 0, -2.0),
    Component("model.layers.1.mlp.up_proj", 23, -3.0),
]


def test_an_exported_checkpoint_is_loaded_by_stock_transformers_and_equals_the_masked_model(
    tiny_checkpoint: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "new" / "pruned"
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, folder, dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    model = load_model(tiny_checkpoint, torch.float32)
    with torch.no_grad():
        whole = model(INPUT_IDS).logits
        with mask(model, NEURONS):
            masked = model(INPUT_IDS).logits
        torch.testing.assert_close(exported(INPUT_IDS).logits, masked, rtol=1e-5, atol=1e-6)
    assert (whole - masked).abs().max() > 1e-3
    text = sentence(0, 9)
    assert (
        AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        == Checkpoint(tiny_checkpoint).tokenizer()(text)["input_ids"]
    )
    assert not exported.model.layers[1].mlp.gate_proj.weight[23].any()
    assert Checkpoint(str(folder)).fingerprint != Checkpoint(tiny_checkpoint).fingerprint


def test_an_exported_checkpoint_has_the_dtype_asked_for(tiny_checkpoint: str, tmp_path: Path) -> None:
    export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_an_export_does_not_touch_a_folder_that_exists(tiny_checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    with pytest.raises(FileExistsError, match="pruned exists already; nothing was overwritten"):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned", dtype=torch.float32)
    assert list((tmp_path / "pruned").iterdir()) == []


def test_an_interrupted_export_leaves_nothing(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        assert any(path.suffix == ".safetensors" for path in tmp_path.rglob("*")), "interrupted before the weights"
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_pruned(Checkpoint(tiny_checkpoint), NEURONS, tmp_path / "pruned", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_neurons_of_another_model_leaves_nothing(tiny_checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another model"):
        export_pruned(
            Checkpoint(tiny_checkpoint),
            [Component("model.layers.9.mlp.up_proj", 0, -1.0)],
            tmp_path / "a",
            dtype=torch.float32,
        )
    assert list(tmp_path.iterdir()) == []


LLAMA_CPP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A tiny LLaMA of 8-bit weights as a GGUF file in llama.cpp's conventions, the same in torch, and its tokenizer."""
    import gguf
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaForCausalLM

    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    bpe.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=300, special_tokens=special, show_progress=False)
    bpe_state = json.loads(bpe.to_str())["model"]
    vocabulary = sorted(bpe_state["vocab"], key=bpe_state["vocab"].get)

    torch.manual_seed(0)
    config = make_config("llama", hidden_size=32, intermediate_size=64, vocab_size=len(vocabulary))
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(special) + [1] * (len(vocabulary) - len(special)))
    merges = bpe_state["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    quantized = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
        theirs = name
        for old, new in LLAMA_CPP_NAMES.items():
            theirs = theirs.replace(old, new)
        if parameter.dim() == 1:
            writer.add_tensor(theirs, parameter.numpy())
            continue
        blocks = gguf.quants.quantize(parameter.numpy(), quantized)
        weight = gguf.quants.dequantize(blocks, quantized)
        parameter.copy_(torch.from_numpy(weight))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp pairs neighbours for the rotation, transformers the halves of a head
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(theirs, gguf.quants.quantize(weight, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model, bpe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_loaded_as_float32_with_its_weights_and_its_tokenizer(
    gguf_model: tuple[Path, Any, Any], cache: Path
) -> None:
    path, expected, bpe = gguf_model
    model = load_model(str(path), torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    torch.testing.assert_close(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)
    tokenizer = Checkpoint(str(path)).tokenizer()
    text = "the stupid dog, 2 cats"
    assert tokenizer(text)["input_ids"] == bpe.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_gguf_file_is_dequantized_once(
    gguf_model: tuple[Path, Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers

    folder = Path(Checkpoint(str(gguf_model[0])).location)
    assert folder.parent == cache / "gguf"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "a temporary folder was left behind"
    assert folder.stat().st_mode & 0o777 == 0o755

    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_but_no_gguf(*arguments: Any, **options: Any) -> Any:
        assert "gguf_file" not in options, "dequantized again"
        return load(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_but_no_gguf)
    load_model(str(gguf_model[0]), torch.float32)
    elsewhere = shutil.copy(gguf_model[0], tmp_path / "renamed.gguf")
    assert Checkpoint(str(elsewhere)).location == str(folder)


def test_a_model_from_a_gguf_file_can_be_saved_fingerprinted_and_exported(
    gguf_model: tuple[Path, Any, Any], cache: Path, tmp_path: Path
) -> None:
    path = str(gguf_model[0])
    load_model(path, torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved"), torch.bfloat16).dtype == torch.bfloat16
    export_pruned(Checkpoint(path), NEURONS, tmp_path / "pruned", dtype=torch.float32)
    assert (
        Checkpoint(path).fingerprint
        == Checkpoint(Checkpoint(path).location).fingerprint
        != Checkpoint(str(tmp_path / "pruned")).fingerprint
    )


@pytest.mark.parametrize("kept", [0, 10, 1000, -1000])
def test_a_truncated_gguf_file_is_a_clear_error_and_leaves_nothing(
    kept: int, gguf_model: tuple[Path, Any, Any], cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_model[0].read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut.gguf is truncated, or not a GGUF file"):
        _ = Checkpoint("./cut.gguf").location
    assert list((cache / "gguf").iterdir()) == []


def test_a_foreign_file_with_the_ending_gguf_is_a_clear_error(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.gguf").write_text("plain text, and long enough for a header " * 10)
    with pytest.raises(ValueError, match=r"foreign.gguf is truncated, or not a GGUF file"):
        _ = Checkpoint("foreign.gguf").config
