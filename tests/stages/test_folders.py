"""The folder of a run: one of its own whatever the logger, with one owner at a time, and its config.yaml."""

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import sentence, trainer, write_jsonl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sparc3_lightning import Attribution
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.cli import main
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.stages.folders import check_config, folder_of, give_back, giving_back, own, reserve, write_config

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")
LOGS = Path("lightning_logs")
SCORES = "scores.safetensors"


class LikeWandb(Logger):
    """A logger whose folder is the same in every run, as W&B's is."""

    def __init__(self, save_dir: str | None = ".", version: str | None = None) -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def name(self) -> str:
        return "lightning_logs"

    @property
    def version(self) -> str | None:
        return self._version

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass


@pytest.fixture(autouse=True)
def prompts() -> str:
    return write_jsonl(Path("rows.jsonl"), [{"text": sentence(i, 6), "toxicity": 0.9} for i in range(4)])


def attribute(checkpoint: str, *changes: str) -> Path:
    data = ["--data", "ToxicPrompts", "--data.source", "rows.jsonl", "--data.num_samples", "4"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return main(["attribute", *quiet, "--model.checkpoint", checkpoint, *data, *changes]).model.folder


LOGGERS = {
    "none": "false",
    "no list": "[]",
    "wandb": "{class_path: test_folders.LikeWandb}",
    "wandb elsewhere": "{class_path: test_folders.LikeWandb, init_args: {save_dir: elsewhere}}",
    "wandb nowhere": "{class_path: test_folders.LikeWandb, init_args: {save_dir: null}}",
    "wandb of one id": "{class_path: test_folders.LikeWandb, init_args: {version: abc}}",
    "csv": "{class_path: CSVLogger, init_args: {save_dir: lightning_logs, name: attribute}}",
    "wandb and csv": "[{class_path: test_folders.LikeWandb}, {class_path: CSVLogger, init_args: {save_dir: tables}}]",
    "default": "true",
}


QUICK = ("none", "wandb")


@pytest.mark.parametrize(
    "logger",
    [pytest.param(each, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, each in LOGGERS.items()],
)
def test_every_run_has_a_folder_of_its_own_whatever_the_logger(tiny_checkpoint, logger):
    found = [attribute(tiny_checkpoint, "--trainer.logger", logger) for _ in range(2)]
    assert [folder.name for folder in found] == ["version_0", "version_1"]
    for folder in found:
        assert ScoreFile.load(folder / SCORES).provenance.num_samples == 4
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["checkpoint"] == tiny_checkpoint
        assert not (folder / ".lock").exists()
    main(["attribute", "--config", str(found[0] / "config.yaml")])
    assert (found[0].with_name("version_2") / SCORES).is_file(), "the saved config repeats it in the next folder"


def test_without_a_logger_the_folder_lies_in_default_root_dir(tiny_checkpoint):
    options = ["--trainer.logger", "false", "--trainer.default_root_dir", "here"]
    assert attribute(tiny_checkpoint, *options).relative_to(Path("here")) == LOGS / "attribute/version_0"


def test_a_stock_trainer_writes_to_its_root_without_a_logger_and_to_folders_beside_loggers_without_one(tmp_path):
    assert folder_of(trainer("out"), "attribute") == Path("out")
    assert folder_of(trainer(logger=CSVLogger("a", name="b", version="c")), "attribute") == Path("a/b/c")
    wandb = [folder_of(trainer(logger=LikeWandb()), "circuit") for _ in range(2)]
    assert wandb == [LOGS / "circuit/version_0", LOGS / "circuit/version_1"]
    assert folder_of(trainer(logger=LikeWandb("lightning_logs")), "prune") == LOGS / "prune/version_0"


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_two_runs_that_count_to_the_same_version_get_different_folders(kind):
    first, second = (trainer(logger=kind("logs", name="attribute")) for _ in range(2))
    assert first.logger.log_dir == second.logger.log_dir  # both have counted
    for one in (first, second):
        one.logger._version = None
        reserve(one)
    assert [Path(one.logger.log_dir).name for one in (first, second)] == ["version_0", "version_1"]
    given = trainer(logger=kind("logs", name="attribute", version=1))
    reserve(given)
    assert Path(given.logger.log_dir).name == "version_1"


def test_a_refused_run_leaves_no_empty_folder_behind(tiny_checkpoint):
    for logger in ("false", LOGGERS["default"]):
        with pytest.raises(FileNotFoundError):
            attribute(tiny_checkpoint, "--trainer.logger", logger, "--data.source", "nowhere.jsonl")
    assert not list(LOGS.glob("**/version_*"))
    assert attribute(tiny_checkpoint, "--trainer.logger", "false").name == "version_0"


# The owner of a folder.


@pytest.fixture
def taken() -> Iterator[Path]:
    """A folder that another process owns, as far as locks can tell."""
    folder = Path("taken")
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        lock.write("sparc3 attribute, process 77 on elsewhere, since noon")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def test_the_second_run_in_a_folder_is_told_who_holds_it_and_overwrites_nothing(tiny_checkpoint, taken):
    (taken / "config.yaml").write_text("its: own\n")
    stock = trainer(str(taken))
    data = ToxicPrompts(source="rows.jsonl", num_samples=4)
    with pytest.raises(OSError, match=r"taken is in use by sparc3 attribute, process 77 on elsewhere, since noon; "):
        stock.predict(Attribution(tiny_checkpoint), datamodule=data)
    options = ["--trainer.logger.init_args.save_dir", ".", "--trainer.logger.init_args.name", ""]
    with pytest.raises(OSError, match=r"taken is in use by .* --trainer.logger.init_args.version"):
        attribute(tiny_checkpoint, *options, "--trainer.logger.init_args.version", "taken")
    assert (taken / "config.yaml").read_text() == "its: own\n"
    assert not (taken / SCORES).exists()


@pytest.mark.parametrize("verb", ["run", "prepare"])
def test_an_experiment_owns_its_folder_too(tiny_checkpoint, taken, verb, tmp_path):
    from experiments import write_experiment

    config = write_experiment(tmp_path, tiny_checkpoint)
    where = ["--trainer.logger.init_args.save_dir", ".", "--trainer.logger.init_args.name", ""]
    with pytest.raises(OSError, match="taken is in use by"):
        main([verb, "--config", str(config), *where, "--trainer.logger.init_args.version", "taken"])
    assert [path.name for path in taken.iterdir()] == [".lock"]


def test_a_lock_says_whose_it_is_and_goes_with_its_owner(tmp_path):
    with giving_back():
        own(tmp_path, "prune")
        own(tmp_path, "prune")  # it has it
        text = (tmp_path / ".lock").read_text()
        assert re.fullmatch(rf"sparc3 prune, process {os.getpid()} on \S+, since \d{{4}}-\d\d-\d\d [\d:]+\n", text)
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (tmp_path / ".lock").exists()


def test_the_lock_file_of_a_run_that_was_killed_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("sparc3 attribute, process 77 on elsewhere, since noon and long ago")
    own(tmp_path, "prune")
    assert "noon" not in (tmp_path / ".lock").read_text()
    give_back(tmp_path)


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.warns(UserWarning, match=r"has no locks \(Operation not supported\): start no other run in it"):
        own(tmp_path, "prune")


def test_a_run_in_the_same_process_can_follow_one_that_failed(tiny_checkpoint):
    class Failing(Attribution):
        def predict_step(self, batch: object, batch_idx: int) -> None:
            raise RuntimeError("it fails")

    data = ToxicPrompts(source="rows.jsonl", num_samples=4)
    with pytest.raises(RuntimeError, match="it fails"):
        trainer("out").predict(Failing(tiny_checkpoint), datamodule=data, return_predictions=False)
    trainer("out").predict(Attribution(tiny_checkpoint), datamodule=data, return_predictions=False)
    assert [path.name for path in Path("out").iterdir()] == [SCORES]


# config.yaml

HERE = ["--trainer.logger.init_args.version", "here"]


def test_a_refused_run_does_not_touch_the_config_of_the_run_that_broke_off(tiny_checkpoint):
    folder = LOGS / "attribute/here"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("of: another\n")
    with pytest.raises(FileExistsError, match=r"here/config.yaml is of a run with other options; nothing was overwr"):
        attribute(tiny_checkpoint, *HERE)
    assert (folder / "config.yaml").read_text() == "of: another\n"
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match="needs samples"):
        main(["attribute", "--model.checkpoint", tiny_checkpoint, "--data", "NoSamples", *HERE])
    assert not (folder / "config.yaml").exists()


def test_a_run_that_is_refused_when_its_model_is_loaded_leaves_no_config(tiny_checkpoint, monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("a tensor is missing")

    monkeypatch.setattr("sparc3_lightning.stages.attribute.load_for", refuse)
    with pytest.raises(ValueError, match="a tensor is missing"):
        attribute(tiny_checkpoint, *HERE)
    assert not (LOGS / "attribute/here/config.yaml").exists()


def test_pruning_that_is_refused_leaves_no_config():
    with pytest.raises(FileNotFoundError):
        main(["prune", "--model.general", "nowhere", "--model.behavior", "nowhere", *HERE])
    assert not list(LOGS.rglob("config.yaml"))


def test_the_same_run_goes_on_in_its_folder_on_other_devices_or_without_a_bar(tiny_checkpoint):
    folder = attribute(tiny_checkpoint, *HERE)
    (folder / SCORES).unlink()
    attribute(tiny_checkpoint, *HERE, "--trainer.log_every_n_steps", "9", "--trainer.enable_progress_bar", "true")
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["log_every_n_steps"] == 9
    (folder / SCORES).unlink()
    with pytest.raises(FileExistsError, match="of a run with other options"):
        attribute(tiny_checkpoint, *HERE, "--seed_everything", "7")


def test_nothing_is_written_through_a_link(tmp_path):
    mine = "model: {checkpoint: tiny}\n"
    Path("other.yaml").write_text(mine)
    (tmp_path / "config.yaml").symlink_to("other.yaml")
    with pytest.raises(FileExistsError, match=r"config\.yaml is a link; nothing was overwritten"):
        check_config(tmp_path, mine)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(FileExistsError, match=r"config\.yaml is a link"):
        check_config(tmp_path, mine)


@pytest.mark.parametrize("text", ["", "\n", "model: {checkpoint: tiny, a: null}\n", "model:\n  checkpoint: tiny\n"])
def test_an_empty_file_or_the_same_options_are_no_obstacle(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    check_config(tmp_path, "model: {checkpoint: tiny}\n")


@pytest.mark.parametrize("content", [b"model: {checkpoint: other}\n", b"a: [", b"\xff\xfe", b"3\n"])
def test_another_config_or_a_damaged_one_is_not_overwritten(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(FileExistsError, match="or remove that file"):
        check_config(tmp_path, "model: {checkpoint: tiny}\n")


def test_a_full_disk_leaves_the_config_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("model: {checkpoint: tiny}\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_config(tmp_path, "model: {checkpoint: tiny}\n# again\n")
    assert (tmp_path / "config.yaml").read_text() == "model: {checkpoint: tiny}\n"
    assert not list(tmp_path.glob(".config.yaml*"))
