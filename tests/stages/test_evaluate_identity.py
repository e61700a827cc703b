"""Continuations are taken over only where all that they rest on has the contents that it had, whatever its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluations import PRUNED, data, evaluation, run, save_neurons
from safetensors.torch import load_file, save_file

from sparc3_lightning.evaluation.completions import read_unfinished
from sparc3_lightning.provenance import versions
from sparc3_lightning.scorers.detoxify import SHIPPED
from sparc3_lightning.scorers.registry import fingerprint_of

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files", "no_model_is_loaded")
REFUSED = r"holds continuations of another run: its {} is "


@pytest.fixture
def begun(tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that begins an evaluation in a folder, and breaks off where the model would be loaded."""
    shutil.copytree(tiny_checkpoint, "mine")
    shutil.copytree(SHIPPED, "scorer")
    monkeypatch.syspath_prepend(str(Path().absolute()))

    def begin(folder: str = "out", tokenizer: str | None = None, **options: Any) -> dict[str, Any]:
        neurons = save_neurons("mine", PRUNED)
        with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
            run(evaluation("mine", neurons, **options), data(tokenizer=tokenizer), folder)
        return dict(read_unfinished(Path(folder, "unfinished-0.jsonl"))[0] or {})

    return begin


def change_weights(path: str) -> None:
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, path, {"format": "pt"})


def change_json(path: str, **changes: Any) -> None:
    content = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    Path(path).write_text(json.dumps({**content, **changes}))


def flip_a_bit(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


CHANGES = {
    "weights of the scorer": ("scorers", lambda: flip_a_bit("scorer/toxicity.ckpt")),
    "config of the scorer": ("scorers", lambda: change_json("scorer/config.json", hidden_act="relu")),
    "tokenizer of the scorer": ("scorers", lambda: change_json("scorer/tokenizer.json", version="2.0")),
    "end tokens": ("tokenizer", lambda: change_json("mine/generation_config.json", eos_token_id=[2, 5])),
    "tokenizer": ("tokenizer", lambda: change_json("mine/tokenizer_config.json", clean_up_tokenization_spaces=True)),
    "chat template": ("tokenizer", lambda: Path("mine/chat_template.jinja").write_text("{{ messages }}")),
    "weights": ("checkpoint_fingerprint", lambda: change_weights("mine/model.safetensors")),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.few(3)
def test_what_was_changed_under_the_same_path_makes_another_run(begun, what):
    field, change = CHANGES[what]
    before = begun(scorers=["scorer"])
    assert begun(scorers=["scorer"]) == before
    change()
    # A fingerprint that covers more than the weights is the first field to differ.
    with pytest.raises(ValueError, match=REFUSED.format(f"({field}|checkpoint_fingerprint)")):
        begun(scorers=["scorer"])


def test_a_copy_under_another_path_makes_the_same_run(begun):
    before = begun(scorers=["scorer", "small"], tokenizer="mine")
    assert before["scorers"][0] == before["scorers"][1], "the folder is a copy of the one that is shipped"
    shutil.copytree("scorer", "copy")
    shutil.copytree("mine", "words")
    assert begun(scorers=["copy", "scorer"], tokenizer="words") == before


def test_every_judge_counts(begun):
    begun(scorers=["repetition", "scorer"])
    Path("scorer/vocab.txt").write_text("another")
    with pytest.raises(ValueError, match=REFUSED.format("scorers")):
        begun(scorers=["repetition", "scorer"])


@pytest.mark.slow
def test_the_source_of_a_function_counts(begun):
    before = begun(scorers=["toy_scorers:zero"])
    assert begun("other", scorers=["toy_scorers:nothing"])["scorers"] != before["scorers"]
    source = Path("toy_scorers.py")
    source.write_text(source.read_text().replace("[0.0]", "[0.5]"))
    with pytest.raises(ValueError, match=REFUSED.format("scorers")):
        begun(scorers=["toy_scorers:zero"])


@pytest.mark.slow
def test_all_files_of_a_package_that_is_not_installed_count_and_its_version_if_it_is(tmp_path, monkeypatch):
    package = tmp_path / "my_scorers"
    (package / "inner").mkdir(parents=True)
    for file in ("__init__.py", "inner/__init__.py", "inner/words.txt"):
        (package / file).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    before = fingerprint_of("my_scorers.inner:score")
    assert fingerprint_of("my_scorers.inner:score") == before
    (package / "inner" / "words.txt").write_text("one more")
    assert fingerprint_of("my_scorers.inner:score") != before
    with pytest.raises(ValueError, match=r"'my_scorers.none.deep:score' cannot be imported"):
        fingerprint_of("my_scorers.none.deep:score")
    assert f"torch {versions()['torch']}" in fingerprint_of("torch.nn:functional")


@pytest.mark.parametrize("package", ["torch", "transformers", "sparc3_lightning"])
def test_other_versions_make_another_run(begun, monkeypatch, package):
    begun(scorers=["small"])
    monkeypatch.setitem(versions(), package, "0.0.1")
    with pytest.raises(ValueError, match=REFUSED.format("versions") + rf".*'{package}': "):
        begun(scorers=["small"])


def test_a_dtype_that_is_named_is_the_one_that_auto_comes_to(begun):
    before = begun(scorers=["small"])
    assert begun(scorers=["small"], dtype="float32") == before
    with pytest.raises(ValueError, match=REFUSED.format("dtype") + "'torch.float32', now it is 'torch.float64'"):
        begun(scorers=["small"], dtype="float64")


def test_continuations_of_a_folder_beside_are_not_used_either_and_a_line_says_what_changed(begun, caplog):
    begun("runs/version_0", scorers=["scorer"])
    Path("scorer/vocab.txt").write_text("another")
    with caplog.at_level("INFO"):
        begun("runs/version_1", scorers=["scorer"])
    assert "Continuations of an earlier run in runs/version_0 were not used: the scorers changed." in caplog.text
