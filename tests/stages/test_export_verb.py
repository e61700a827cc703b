"""The verb export: from any list to a plain checkpoint, shard by shard, with a model card, and to the hub."""

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import INPUT_IDS
from evaluations import evaluation, perplexity_of, run, save_neurons
from gguf_files import tiny
from gguf_files import write as write_gguf
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from made_up import made_up
from pages import reported
from transformers import AutoModelForCausalLM

from sparc3_lightning.cli import main
from sparc3_lightning.evaluation.results import RESULTS
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.tensors import TensorFile
from sparc3_lightning.report.tables import next_commands
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.export import Export

UP, OUTPUT = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"
LISTS = {
    "neurons": [Component(UP, 3, -1.0), Component(UP, 20, -0.5, damping=0.5)],
    "neurons held at their mean": [Component(UP, 3, -1.0, mean=0.7), Component(UP, 5, -1.0, 0.5, -0.3)],
    "heads": [
        Component(OUTPUT, 0, -1.0, granularity="head"),
        Component(OUTPUT, 3, -1.0, damping=0.25, granularity="head"),
    ],
    "weights": [
        Component(UP, 3, -1.0, granularity="weight", input=4),
        Component(OUTPUT, 0, -1.0, damping=0.5, granularity="weight", input=15),
    ],
    "neurons and channels": [
        Component(UP, 3, -1.0),
        Component(OUTPUT, 2, -1.0, granularity="channel"),
        Component(OUTPUT, 9, -1.0, damping=0.5, granularity="channel"),
    ],
    "neurons and heads": [Component(UP, 3, -1.0), Component(OUTPUT, 2, -1.0, granularity="head")],
}
OUT, EXPORT = Path("out"), Path("exported")


@pytest.fixture
def sharded(tiny_checkpoint: str) -> str:
    """A checkpoint of many shards, with a model card of its own."""
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained("sharded", max_shard_size="3KB")
    for path in Path(tiny_checkpoint).glob("tokenizer*"):
        shutil.copy(path, "sharded")
    Path("sharded/README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    return "sharded"


@pytest.fixture
def neurons(tiny_checkpoint: str) -> Path:
    """A list of neurons of the tiny checkpoint."""
    return save_neurons(tiny_checkpoint, LISTS["neurons"])


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read, or written, before the input was checked")

    monkeypatch.setattr(TensorFile, "read", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)
    monkeypatch.setattr(Checkpoint, "load", fail)


def shards(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.few(2)
def test_stock_transformers_computes_of_the_export_what_the_masked_model_computes(sharded: str, kind: str) -> None:
    chosen = LISTS[kind]
    Export(save_neurons(sharded, chosen), EXPORT).write(OUT)
    model, exported = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (sharded, EXPORT))
    with torch.no_grad():
        before = model(INPUT_IDS).logits
        with mask(model, chosen):
            torch.testing.assert_close(exported(INPUT_IDS).logits, model(INPUT_IDS).logits, rtol=1e-5, atol=1e-5)
        assert (exported(INPUT_IDS).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [kind for kind in LISTS if "mean" not in kind])
def test_shards_without_a_weight_of_the_list_are_the_same_byte_for_byte(sharded: str, kind: str) -> None:
    Export(save_neurons(sharded, LISTS[kind]), EXPORT).write(OUT)
    before, after = shards(sharded), shards(EXPORT)
    assert before.keys() == after.keys()
    touched = {name for name in before if before[name] != after[name]}
    held = {path.name for path in Path(sharded).glob("*.safetensors") if "layers.1." in str(TensorFile(path).entries)}
    assert touched
    assert touched <= held < before.keys()


def test_no_more_than_the_weights_of_one_part_are_in_memory(sharded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = 0, 0
    read, write, holds = TensorFile.read, TensorFile.write, TensorFile.holds

    def counted_read(file: TensorFile, name: str) -> torch.Tensor:
        nonlocal held, most
        found = read(file, name)
        held += found.nbytes
        most = max(most, held)
        return found

    def counted_write(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        nonlocal held
        held -= tensor.nbytes
        write(file, name, tensor)

    def counted_holds(file: TensorFile, name: str, tensor: torch.Tensor) -> bool:
        nonlocal held
        found = holds(file, name, tensor)
        held -= tensor.nbytes  # it has read what it compares with
        return found

    monkeypatch.setattr(TensorFile, "read", counted_read)
    monkeypatch.setattr(TensorFile, "write", counted_write)
    monkeypatch.setattr(TensorFile, "holds", counted_holds)
    both = [Component(f"model.layers.{i}.mlp.up_proj", j, -1.0) for i in range(2) for j in range(9)]
    Export(save_neurons(sharded, both), EXPORT).write(OUT)
    assert held == 0
    assert most == 4 * 16 * 24 * 4  # the three matrices of one MLP, and the one that is compared


def test_a_gguf_file_is_exported_as_the_folder_it_was_dequantized_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    path = str(write_gguf(tmp_path / "tiny.gguf", tiny()))
    chosen = LISTS["neurons"]
    Export(save_neurons(path, chosen), EXPORT).write(OUT)
    model = load_model(path, torch.float32)
    with mask(model, chosen):
        expected = model(INPUT_IDS).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(EXPORT)(INPUT_IDS).logits, expected)


@pytest.mark.usefixtures("as_if_from_python")
def test_the_command_line_exports_a_list_of_a_colleague_from_a_copy_of_the_checkpoint(tiny_checkpoint: str) -> None:
    path = save_neurons(tiny_checkpoint, LISTS["neurons"], {"checkpoint": "/home/ann/secret/llama"})
    shutil.copytree(tiny_checkpoint, "copy")
    options = ["--model.neurons", str(path), "--model.export", str(EXPORT), "--model.checkpoint", "./copy"]
    folder = Path(main(["export", "--trainer.accelerator", "cpu", *options]).trainer.log_dir)
    found = NeuronList.load(folder / "neurons.json")
    assert found.neurons == LISTS["neurons"]
    assert found.provenance["export_fingerprint"] == Checkpoint(str(EXPORT)).fingerprint
    assert (folder / "config.yaml").is_file()
    assert "secret" not in (EXPORT / "README.md").read_text() + (EXPORT / "neurons.json").read_text()


def test_the_list_in_the_export_makes_the_export_again(sharded: str) -> None:
    Export(save_neurons(sharded, LISTS["heads"]), EXPORT).write(OUT)
    Export(EXPORT / "neurons.json", Path("again"), sharded).write(Path("out2"))
    assert shards("again") == shards(EXPORT)


@pytest.mark.usefixtures("as_if_from_python")
@pytest.mark.parametrize("place", ["my runs: [1] # {a}", "-out", "~ann"])
def test_the_command_that_an_evaluation_ends_with_is_taken_as_it_is(neurons: Path, place: str) -> None:
    Path(place).mkdir()
    moved = shutil.move(neurons, Path(place))
    export = next_commands(Path(place), moved, None)[0]
    main([*shlex.split(export)[1:], "--trainer.accelerator", "cpu"])
    assert Path(place, "pruned-model/model.safetensors").is_file()


# The model card.


def save_results(checkpoint: str, chosen: list[Component], path: Path) -> Any:
    """Save made-up results of an evaluation of two neurons."""
    of = {"checkpoint": checkpoint, "checkpoint_fingerprint": Checkpoint(checkpoint).fingerprint}
    results, rows = made_up()
    results = reported(replace(results, **of), rows, NeuronList(chosen, {**of, "criterion": "difference"}))
    path.parent.mkdir(exist_ok=True)
    results.save(path)
    return results


@pytest.mark.parametrize("place", ["beside the list", "beside the export", "named"])
def test_the_model_card_tells_what_was_measured_which_neurons_they_are_and_how_to_repeat_it(
    sharded: str, place: str
) -> None:
    path = save_neurons(sharded, LISTS["neurons"])
    folder = Path({"beside the list": ".", "beside the export": "evaluated", "named": "elsewhere"}[place])
    results = save_results(sharded, LISTS["neurons"], folder / RESULTS)
    export = Path("evaluated/exported")
    Export(path, export, results=folder / RESULTS if place == "named" else None).write(OUT)
    card = ModelCard.load(export / "README.md")
    measured = {(one.metric_type, one.dataset_config): one.metric_value for one in card.data.eval_results or ()}
    assert measured["toxicity", "toxic prompts"] == results.effects["toxic"].behavior_mean.after
    assert (card.data.base_model, card.data.license, card.data.model_name) == ("sharded", "apache-2.0", "exported")
    assert results.verdict in card.text
    assert "They are, by layer:\n\n- model.layers.1.mlp.up\\_proj: 3, 20\n" in card.text
    assert (
        "    sparc3 export --model.neurons neurons.json --model.checkpoint sharded --model.export exported" in card.text
    )
    assert "\n\n\n" not in card.text
    assert Path(sharded, "README.md").read_text().endswith("# Mine\n")


@pytest.mark.slow
@pytest.mark.usefixtures("input_files", "seed_of_the_run")
def test_what_evaluate_proposes_at_its_end_has_the_card_of_the_evaluation(tiny_checkpoint: str, neurons: Path) -> None:
    found = run(evaluation(tiny_checkpoint, neurons), folder="evaluated")
    Export(neurons, Path("evaluated/exported")).write(OUT)
    card = ModelCard.load("evaluated/exported/README.md")
    assert found["verdict"] in card.text.replace("\\", "")
    measured = {one.metric_name: one.metric_value for one in card.data.eval_results or ()}
    assert measured["Perplexity, sliding windows"] == perplexity_of(found, "pruned")


@pytest.mark.parametrize("other", ["other neurons", "another checkpoint", "damaged", None])
def test_results_that_are_not_of_these_neurons_are_not_told(
    tiny_checkpoint: str, neurons: Path, other: str | None
) -> None:
    if other == "damaged":
        Path(RESULTS).write_text("{}")
    elif other is not None:
        chosen = LISTS["neurons"][::-1] if other == "other neurons" else LISTS["neurons"]
        results = save_results(tiny_checkpoint, chosen, Path(RESULTS))
        if other == "another checkpoint":
            replace(results, checkpoint_fingerprint="files:abc").save(Path(RESULTS))
        with pytest.raises(ValueError, match=r"--model\.results: results\.json is not an evaluation of neurons\.json"):
            Export(neurons, EXPORT, results=Path(RESULTS)).write(OUT)
        shutil.rmtree(OUT)
    Export(neurons, EXPORT).write(OUT)
    card = ModelCard.load(EXPORT / "README.md")
    assert "It was not evaluated" in card.text
    assert "up\\_proj: 3, 20" in card.text
    assert card.data.eval_results is None
    assert "\n\n\n" not in card.text


def test_a_card_names_the_first_thousand_weights_of_a_long_list(tiny_checkpoint: str) -> None:
    chosen = [
        Component(f"model.layers.{i}.mlp.up_proj", j, -1.0, granularity="weight", input=k)
        for i in range(2)
        for j in range(24)
        for k in range(16)
    ]
    chosen += [
        Component("model.layers.0.mlp.gate_proj", j, -1.0, granularity="weight", input=k)
        for j in range(24)
        for k in range(16)
    ]
    Export(save_neurons(tiny_checkpoint, chosen), EXPORT).write(OUT)
    text = (EXPORT / "README.md").read_text()
    assert "The first 1000 of them, by layer:" in text
    assert text.count("\\[") == 1000
    assert NeuronList.load(EXPORT / "neurons.json").neurons == chosen


# What is refused, before a weight is read.


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": Path("taken")}, r"--model\.export: taken exists already; nothing was overwritten\."),
        ({"export": Path("file/new")}, r"Cannot write to the output folder .*--model\.export"),
        ({"checkpoint": "other"}, r"neurons\.json is for the checkpoint .*, but --model\.checkpoint is 'other' \("),
        ({"checkpoint": "./missing"}, r"missing"),
        ({"neurons": Path("no.json")}, r"--model\.neurons: no\.json does not exist"),
        ({"neurons": Path("foreign.json")}, r"Neuron 99 of .*up_proj does not exist"),
        ({"neurons": Path("nameless.json")}, r"--model\.neurons: nameless\.json does not say which checkpoint"),
        ({"results": Path("no.json")}, r"--model\.results: no\.json does not exist"),
        ({"private": False}, r"--model\.private is for what is uploaded: add --model\.push_to_hub"),
        ({"push_to_hub": "a/b/c"}, r"--model\.push_to_hub must be the id of a repository.*'a/b/c'"),
        ({"push_to_hub": "my model"}, r"--model\.push_to_hub must be the id of a repository.*'my model'"),
    ],
)
def test_an_input_that_cannot_be_exported_is_refused(
    tiny_checkpoint: str, make_checkpoint: Callable[[str], str], options: dict[str, Any], message: str
) -> None:
    Path("taken").mkdir()
    Path("file").write_text("mine")
    Path("other").symlink_to(make_checkpoint("qwen2"))
    save_neurons(tiny_checkpoint, [Component(UP, 99, -1.0)]).rename("foreign.json")
    NeuronList(LISTS["neurons"]).save(Path("nameless.json"))
    given: dict[str, Any] = {"neurons": save_neurons(tiny_checkpoint, LISTS["neurons"]), "export": EXPORT, **options}
    with pytest.raises((ValueError, OSError), match=message):
        Export(**given).write(OUT)
    assert not EXPORT.exists()
    assert list(Path("taken").iterdir()) == []


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_nothing_that_looks_finished_and_the_next_one_sweeps_it(
    neurons: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (child := os.fork()):
        try:
            monkeypatch.setattr(TensorFile, "write", lambda *_: os._exit(9))
            Export(neurons, EXPORT).write(OUT)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not EXPORT.exists()
    assert not (OUT / "neurons.json").exists()
    assert [path.is_dir() for path in Path().glob(".exported*")] == [True]
    Export(neurons, EXPORT).write(OUT)
    assert not list(Path().glob(".exported*"))
    assert AutoModelForCausalLM.from_pretrained(EXPORT)


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in of the hub: Ann's, who is in one organization, with one repository."""
    who = {"name": "ann", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
    found = SimpleNamespace(who=who, private={"ann/taken": False}, files={})

    def create(_: HfApi, repository: str, private: bool) -> str:
        found.private[repository] = private
        return f"https://huggingface.co/{repository}"

    def upload(_: HfApi, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert commit_message == "Add exported"
        found.files[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr(HfApi, "whoami", lambda _: found.who)
    monkeypatch.setattr(HfApi, "repo_exists", lambda _, repository: repository in found.private)
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return found


@pytest.mark.parametrize(
    ("name", "private", "repository"),
    [("my-model", True, "ann/my-model"), ("lab/my-model", True, "lab/my-model"), ("ann/open", False, "ann/open")],
)
def test_what_is_uploaded_is_the_export_and_private_unless_it_is_said(
    neurons: Path, hub: SimpleNamespace, name: str, private: bool, repository: str
) -> None:
    options = {} if private else {"private": False}
    said = Export(neurons, EXPORT, push_to_hub=name, **options).write(OUT)
    assert said.endswith(f"Uploaded: https://huggingface.co/{repository}")
    assert hub.private[repository] is private
    assert hub.files == {repository: {path.name: path.read_bytes() for path in EXPORT.iterdir()}}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "neurons.json"} <= hub.files[
        repository
    ].keys()


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ann/taken", {}, r"--model\.push_to_hub: ann/taken exists already; nothing was overwritten"),
        ("bob/model", {}, r"--model\.push_to_hub: bob/model cannot be made .* who may write to ann, lab\."),
        ("ann/model", {"auth": {"accessToken": {"role": "read"}}}, r"of ann, which may only read\."),
        (
            "ann/model",
            LocalTokenNotFoundError(),
            r"--model\.push_to_hub needs a token .*'hf auth login' or set HF_TOKEN",
        ),
        (
            "ann/model",
            ConnectionError("no route"),
            r"--model\.push_to_hub ann/model: the hub cannot be reached \(no route",
        ),
    ],
)
def test_a_repository_that_cannot_be_made_is_refused_before_a_weight_is_read(
    neurons: Path, hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, change: Any, message: str
) -> None:
    def fail(_: HfApi) -> None:
        raise change

    if isinstance(change, Exception):
        monkeypatch.setattr(HfApi, "whoami", fail)
    else:
        hub.who |= change
    with pytest.raises((ValueError, OSError), match=message):
        Export(neurons, EXPORT, push_to_hub=name).write(OUT)
    assert not EXPORT.exists()


def test_an_upload_that_breaks_off_keeps_the_export_and_says_how_to_go_on(
    neurons: Path, hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("cut")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(OSError, match=r"complete in exported, .*\(cut\): run hf upload ann/model exported --private$"):
        Export(neurons, EXPORT, push_to_hub="ann/model").write(OUT)
    assert AutoModelForCausalLM.from_pretrained(EXPORT)
    assert (OUT / "neurons.json").is_file()
