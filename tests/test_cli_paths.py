"""Paths of options: the home folder, one path where a list is asked, and a machine without a home."""

import os
from pathlib import Path

import pytest
import yaml
from experiments import write_experiment
from helpers import random_scores, save_scores, sentence, write_jsonl

from sparc3_lightning.cli import main
from sparc3_lightning.files import at_home, cache_folder

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")
WEAK = ["--model.min_differential_strength", "-1000", "--model.num_neurons", "3"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home of mine"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def scores(home) -> list[Path]:
    return [save_scores(str(home / f"{i}.safetensors"), random_scores(i), data_fingerprint=str(i)) for i in range(2)]


@pytest.mark.parametrize("general", ["~/0.safetensors", ["~/0.safetensors"]])
@pytest.mark.usefixtures("scores")
def test_a_tilde_in_yaml_is_the_home_folder_in_every_path_and_one_path_a_list_of_one(home, general):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "~/logs", "name": "prune"}}
    model = {"general": general, "behavior": "~/1.safetensors", "num_neurons": 3, "min_differential_strength": -1000}
    Path("tilde.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}, "model": model}))
    done = main(["prune", "--config", "tilde.yaml"])
    assert done.model.folder == home / "logs/prune/version_0"
    assert done.model.general == [home / "0.safetensors"]
    assert (home / "logs/prune/version_0/neurons.json").is_file()
    assert not Path("~").exists()
    main(["prune", "--config", str(home / "logs/prune/version_0/config.yaml")])
    assert (home / "logs/prune/version_1/neurons.json").is_file()


@pytest.mark.usefixtures("scores")
def test_one_path_and_a_tilde_on_the_command_line(home):
    files = ["--model.general=~/0.safetensors", "--model.behavior=~/1.safetensors"]
    done = main(["prune", *files, *WEAK])
    assert done.model.general == [home / "0.safetensors"]
    with pytest.raises(ValueError, match=r"must name from 2 to 10 files, .* got 1"):
        main(["compare", "--model.neurons", "~/neurons.json"])
    with pytest.raises(FileNotFoundError, match=str(home / "weights.json")):
        main(["compress", "--model.general", "~/weights.json", "--model.export", "~/sparse"])
    with pytest.raises(FileNotFoundError, match=str(home / "none.safetensors")):
        main(["circuit", "--model.checkpoint", "x", "--data", "IOI", "--model.scores", "~/none.safetensors"])


def test_model_data_and_scorer_are_found_at_home(tiny_checkpoint, home):
    (home / "model").symlink_to(tiny_checkpoint)
    write_jsonl(home / "rows.jsonl", [{"text": sentence(i, 6), "toxicity": 0.9} for i in range(4)])
    data = {"class_path": "ToxicPrompts", "init_args": {"source": "~/rows.jsonl", "num_samples": 4}}
    config = {"model": {"checkpoint": "~/model"}, "data": data, "trainer": {"accelerator": "cpu"}}
    Path("tilde.yaml").write_text(yaml.safe_dump(config))
    done = main(["attribute", "--config", "tilde.yaml", "--trainer.enable_progress_bar", "false"])
    assert (done.model.folder / "scores.safetensors").is_file()


def test_the_plan_and_the_logs_of_an_experiment_may_lie_at_home(tiny_checkpoint, home, tmp_path):
    config = write_experiment(tmp_path, tiny_checkpoint)
    main(["run", "--config", str(config), "--plan=~/plan", "--model.logs=~/logs"])
    stages = (home / "plan").read_text().split("\0")[2::3]
    saved = yaml.safe_load(Path(stages[0]).read_text())["trainer"]["logger"]["init_args"]
    assert saved["save_dir"] == str(home / "logs")


@pytest.fixture
def no_home(monkeypatch) -> None:
    """A user without a home folder, as containers have them."""
    for name in ("HOME", "USER", "LOGNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_a_tilde_is_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"^~/a.safetensors: there is no such home folder \(is HOME set\?\)"):
        main(["prune", "--model.general=~/a.safetensors", "--model.behavior=b"])
    assert not Path("~").exists()
    monkeypatch.delenv("SPARC3_CACHE", raising=False)
    assert cache_folder() == Path(".cache/sparc3_lightning").absolute()


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_everything_else_works(tiny_checkpoint):
    source = write_jsonl(Path("rows.jsonl"), [{"text": sentence(i, 6), "toxicity": 0.9} for i in range(4)])
    data = ["--data", "ToxicPrompts", "--data.source", source, "--data.num_samples", "4"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    done = main(["attribute", *quiet, "--model.checkpoint", tiny_checkpoint, *data])
    assert (done.model.folder / "scores.safetensors").is_file()


def test_the_home_of_nobody_is_a_sentence_and_other_paths_stay_as_they_are():
    with pytest.raises(ValueError, match="~nobody-has-this-name/x: there is no such home folder"):
        at_home("~nobody-has-this-name/x")
    assert at_home("a/~/b") == Path("a/~/b")
    assert at_home("~") == Path(os.environ["HOME"])
