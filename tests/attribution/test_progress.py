"""A run that breaks off goes on: nothing is lost, nothing is counted twice."""

import json
import math
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from evaluations import flat
from helpers import sentence
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from sparc3_lightning.attribution.progress import Progress, go_on, load_progress, remove_progress
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.completions import CompletionLog
from sparc3_lightning.evaluation.generation import SamplingOptions
from sparc3_lightning.stages.attribute import SCORES, Attribution
from sparc3_lightning.stages.evaluate import Evaluation

NUM_SAMPLES = 40


def wait_for_more_than(number: int, folder: str) -> None:
    """Wait until the sums of more samples are saved, 20 s at most: a fork of a process with threads may stand still."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(FileNotFoundError):  # the state before the next one goes when that is there
            if (progress := load_progress(Path(folder))) is not None and len(progress.sample_ids) > number:
                return
        time.sleep(0.02)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"text": sentence(i, 3 + i % 9), "toxicity": 0.95} for i in range(60)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trainer(folder: str) -> Trainer:
    logger = CSVLogger(folder, name="", version="")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, logger=logger, inference_mode=False, **quiet)


def attribute(
    checkpoint: str, prompts: str, folder: str, pause: float = 0.0, num_samples: int = NUM_SAMPLES, **options
) -> None:
    class Paced(Attribution):
        def predict_step(self, batch, batch_idx):
            time.sleep(pause)
            super().predict_step(batch, batch_idx)

    data = ToxicPrompts(source=prompts, num_samples=num_samples, batch_size=2)
    module = Paced(checkpoint, **{"save_every": 1, **options})
    trainer(folder).predict(module, datamodule=data, return_predictions=False)


def start(target, *arguments) -> multiprocessing.Process:
    """Run a function in a fork of this process, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(path: str, pattern: str) -> None:
    end = time.monotonic() + 60
    while not list(Path(path).glob(pattern)):
        assert time.monotonic() < end, f"{pattern} did not appear"
        time.sleep(0.02)


def scores(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, SCORES))


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), name


@pytest.mark.slow
def test_kill_9_at_random_moments_damages_no_file_and_counts_nothing_twice(tiny_checkpoint: str, prompts: str) -> None:
    attribute(tiny_checkpoint, prompts, "whole", num_samples=60)
    draw = random.Random(0)
    done = 0
    for number in range(20):
        process = start(attribute, tiny_checkpoint, prompts, "killed", 0.4, 60)
        if number % 3 == 0:  # a busy machine may be long about the beginning, and save nothing before every other kill
            wait_for_more_than(done, "killed")
        time.sleep(draw.uniform(0.0, 0.35 if number % 3 == 0 else 0.8))
        assert not Path("killed", SCORES).exists(), "the run was done before it was killed 20 times: pause longer"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        progress = load_progress(Path("killed"))  # raises if a file is damaged or a sample is counted twice
        if progress is not None:
            assert len(progress.sample_ids) >= done
            done = len(progress.sample_ids)
    assert 0 < done < 60
    attribute(tiny_checkpoint, prompts, "killed", num_samples=60)
    assert_equal(scores("whole"), scores("killed"))
    assert not list(Path("killed").glob("state-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.slow
def test_a_signal_saves_the_sums_and_ends_the_run(tiny_checkpoint: str, prompts: str, number: signal.Signals) -> None:
    attribute(tiny_checkpoint, prompts, "whole")

    def slowly() -> None:
        attribute(tiny_checkpoint, prompts, "stopped", 0.1, save_every=3)

    process = start(slowly)
    wait_for("stopped", "state-*.safetensors")
    before = len(load_progress(Path("stopped")).sample_ids)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert NUM_SAMPLES > len(load_progress(Path("stopped")).sample_ids) >= before
    attribute(tiny_checkpoint, prompts, "stopped")
    assert_equal(scores("whole"), scores("stopped"))


@pytest.mark.slow
def test_a_run_goes_on_from_a_folder_beside_its_own(tiny_checkpoint: str, prompts: str, caplog) -> None:
    attribute(tiny_checkpoint, prompts, "whole")
    process = start(attribute, tiny_checkpoint, prompts, "runs/version_0", 0.1)
    wait_for("runs/version_0", "state-*.safetensors")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with caplog.at_level("INFO"):
        attribute(tiny_checkpoint, prompts, "runs/version_1")
    assert "Going on after" in caplog.text
    assert_equal(scores("whole"), scores("runs/version_1"))


@pytest.mark.parametrize(("option", "value"), [("relevance", "signed"), ("rule", "cp_lrp"), ("dtype", "float64")])
@pytest.mark.slow
def test_a_state_of_another_config_is_refused_with_the_field_that_differs(
    tiny_checkpoint: str, prompts: str, option: str, value: str
) -> None:
    process = start(attribute, tiny_checkpoint, prompts, "other", 0.1)
    wait_for("other", "state-*.safetensors")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(ValueError, match=option):
        attribute(tiny_checkpoint, prompts, "other", **{option: value})
    assert load_progress(Path("other")) is not None


@pytest.mark.parametrize("again", ["runs/version_0", "runs/version_1"])
def test_sums_of_weights_of_one_device_are_refused_by_several(
    tiny_checkpoint: str, prompts: str, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Attribution, "on_predict_epoch_end", lambda _: pytest.fail("it breaks off"))
        with pytest.raises(pytest.fail.Exception, match="breaks off"):
            attribute(tiny_checkpoint, prompts, "runs/version_0", granularity="weight")
    with monkeypatch.context() as several:
        several.setattr(Trainer, "world_size", 2)
        with pytest.raises(ValueError, match=r"^runs/version_0/state-\*.safetensors holds.*--trainer.devices 1"):
            attribute(tiny_checkpoint, prompts, again, granularity="weight")
    assert not list(Path("runs").glob("version_1/state-*")), "nothing is copied by what is refused"
    attribute(tiny_checkpoint, prompts, again, granularity="weight")
    assert list(Path(again).glob("weight_scores*"))


def test_states_of_several_ranks_add_up_and_only_the_last_attempt_counts(tmp_path: Path) -> None:
    identity = {"method": "lrp"}
    one, two = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 0.25]).double()
    Progress(identity, {"a": 100 * one}, ["x"], 0, attempt=0).save(tmp_path, rank=1)
    Progress(identity, {"a": one}, ["x", "y"], 3, attempt=1).save(tmp_path, rank=0)
    Progress(identity, {"a": two}, ["z"], 1, attempt=1).save(tmp_path, rank=1)
    loaded = load_progress(tmp_path)
    assert loaded.sums["a"].tolist() == (one + two).tolist()
    assert loaded.sample_ids == ["x", "y", "z"]
    assert (loaded.num_nonfinite, loaded.attempt) == (4, 1)
    remove_progress(tmp_path, before=1)
    assert sorted(path.name for path in tmp_path.glob("state-*")) == ["state-1-0.safetensors", "state-1-1.safetensors"]
    Progress(identity, {"a": two}, ["y"], 0, attempt=1).save(tmp_path, rank=2)
    with pytest.raises(ValueError, match="twice"):
        load_progress(tmp_path)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state-0-0.safetensors").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="damaged"):
        load_progress(tmp_path)


def test_a_state_that_is_replaced_while_it_is_read_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Progress({"method": "lrp"}, {"a": torch.ones(9).double()}, ["x"]).save(tmp_path, rank=0)
    data_of = torch.UntypedStorage.from_file

    def data_after_another_save(*args, **options) -> torch.UntypedStorage:  # the header was read from the path before
        Progress({"method": "lrp"}, {"a": torch.full((9,), 2.0).double()}, ["y"]).save(tmp_path, rank=0)
        return data_of(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", data_after_another_save)
    read = [load_progress(tmp_path) for _ in range(2)]
    assert [(state.sample_ids, state.sums["a"].tolist()) for state in read] == [(["x"], [1.0] * 9), (["y"], [2.0] * 9)]


@pytest.mark.parametrize("place", [20, 100, 300, -1, -9])
def test_a_flipped_bit_of_a_state_is_refused_by_its_file(tmp_path: Path, place: int) -> None:
    state = Progress({"method": "lrp"}, {"a": torch.ones(9).double()}, ["x"], 0, rows={"a": torch.ones(1, 3)})
    state.save(tmp_path, rank=0)
    assert load_progress(tmp_path).sample_ids == ["x"]
    content = bytearray((tmp_path / "state-0-0.safetensors").read_bytes())
    content[place] ^= 4
    (tmp_path / "state-0-0.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"state-0-0.safetensors is not a state of 'sparc3 attribute', or is damaged"):
        load_progress(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        Progress({}, {"a": torch.tensor([1.0, math.nan])}, ["x"]),
        Progress({}, {"a": torch.tensor([1, 2])}, ["x"]),
        Progress({}, {"a": torch.ones(2)}, ["x"], rows={"a": torch.ones(2, 3)}),
        Progress({}, {"a": torch.ones(2)}, [1]),
        Progress({}, {"a": torch.ones(2)}, ["x"], -1),
    ],
    ids=["NaN", "whole numbers", "a row too many", "a number for a name", "less than none"],
)
def test_a_state_that_cannot_be_is_refused(tmp_path: Path, state: Progress) -> None:
    state.save(tmp_path, rank=0)
    with pytest.raises(ValueError, match=r"state-0-0.safetensors is not a state of 'sparc3 attribute', or is damaged"):
        load_progress(tmp_path)


@pytest.mark.parametrize("name", ["versions", "checkpoint_fingerprint", "relevance"])
def test_sums_of_a_folder_beside_are_used_only_for_the_same_contents_and_it_is_said_what_changed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = {"relevance": "magnitude", "versions": {"torch": "1"}, "checkpoint_fingerprint": "files:1"}
    Progress(before, {"a": torch.ones(2)}, ["x"]).save(tmp_path / "version_0", rank=0)
    output = tmp_path / "version_1" / SCORES
    assert go_on(output, before).sample_ids == ["x"]
    (tmp_path / "version_1" / "state-1-0.safetensors").unlink()
    with caplog.at_level("INFO"):
        assert go_on(output, {**before, name: "another"}).sample_ids == []
    said = f"Sums of an earlier run in {tmp_path / 'version_0'} were not used: the {name} changed."
    assert (said in caplog.text) == (name != "relevance"), "another option makes another run"


def test_a_damaged_state_of_a_folder_beside_is_passed_over_and_said(tmp_path: Path, caplog) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "state-0-0.safetensors").write_bytes(b"not a state")
    with caplog.at_level("INFO"):
        assert go_on(tmp_path / "version_1" / SCORES, {}).sample_ids == []
    assert "Sums of an earlier run were not used: " in caplog.text
    assert "version_0/state-0-0.safetensors is not a state of 'sparc3 attribute', or is damaged" in caplog.text


def evaluate(
    checkpoint: str,
    prompts: str,
    text: str,
    folder: str,
    stop_after: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    in_text: bool = False,
) -> Evaluation:
    class Stopping(Evaluation):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == 1:
                self.num_batches = getattr(self, "num_batches", 0) + 1
            if in_text if dataloader_idx == 0 else stop_after is not None and self.num_batches > stop_after:
                os.kill(os.getpid(), number)
            super().test_step(batch, batch_idx, dataloader_idx)

    data = EvaluationData(
        WikiText2(source=text, window=16, stride=8), RealToxicityPrompts(source=prompts, num_prompts=20, batch_size=4)
    )
    module = Stopping(checkpoint, scorers=["small"], sampling=SamplingOptions(num_continuations=2, max_new_tokens=5))
    trainer(folder).test(module, datamodule=data, verbose=False)
    return module


@pytest.mark.slow
def test_an_evaluation_does_not_generate_twice_what_it_has_scored(tiny_checkpoint: str, prompts: str) -> None:
    Path("text.txt").write_text("\n".join(sentence(500 + i, 12) for i in range(10)))
    whole = evaluate(tiny_checkpoint, prompts, "text.txt", "whole")
    process = start(evaluate, tiny_checkpoint, prompts, "text.txt", "broken", 3)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with Path("broken/unfinished-0.jsonl").open("a") as file:
        file.write('{"model": "baseline", "prompt')  # as if killed while writing
    again = evaluate(tiny_checkpoint, prompts, "text.txt", "broken")
    assert (whole.num_batches, again.num_batches) == (5, 2)
    assert flat(asdict(again.results.baseline)) == pytest.approx(flat(asdict(whole.results.baseline)), nan_ok=True)
    lines = [Path(folder, "completions.jsonl").read_text() for folder in ("whole", "broken")]
    assert lines[0] == lines[1]
    assert not list(Path("broken").glob("unfinished-*"))


@pytest.fixture
def slurm_job(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a Slurm job; returns the file that says what scontrol was asked."""
    names = ("NTASKS", "JOB_ID", "JOB_NAME", "PROCID", "LOCALID", "NODEID")
    for name, value in zip(names, ("1", "42", "sparc3", "0", "0", "0"), strict=True):
        monkeypatch.setenv(f"SLURM_{name}", value)
    asked, command = Path("asked").absolute(), Path("bin/scontrol")
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent.absolute()}:{os.environ['PATH']}")
    return asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.slow
def test_an_evaluation_stops_at_a_signal_and_goes_on_when_slurm_starts_it_again(
    tiny_checkpoint: str, prompts: str, slurm_job: Path, number: signal.Signals
) -> None:
    Path("text.txt").write_text("\n".join(sentence(500 + i, 12) for i in range(10)))
    whole = evaluate(tiny_checkpoint, prompts, "text.txt", "whole")
    process = start(evaluate, tiny_checkpoint, prompts, "text.txt", "stopped", 2, number)
    process.join(60)
    assert process.exitcode == 128 + number
    # After SIGTERM it is Slurm itself, if anyone, who puts the job into the queue again.
    assert slurm_job.exists() == (number == signal.SIGUSR1)
    assert not list(Path().rglob("hpc_ckpt*"))
    again = evaluate(tiny_checkpoint, prompts, "text.txt", "stopped")
    assert (whole.num_batches, again.num_batches) == (5, 2), "the batch in which the signal came is kept too"
    # While the loop does not listen yet, or no more, Lightning's handler must not write the model either.
    assert not again.trainer._accelerator_connector.cluster_environment.auto_requeue
    assert flat(asdict(again.results.baseline)) == pytest.approx(flat(asdict(whole.results.baseline)), nan_ok=True)


@pytest.mark.slow
def test_an_evaluation_that_has_kept_nothing_new_is_not_put_into_the_queue_again(
    tiny_checkpoint: str, prompts: str, slurm_job: Path
) -> None:
    Path("text.txt").write_text("\n".join(sentence(500 + i, 12) for i in range(10)))
    process = start(evaluate, tiny_checkpoint, prompts, "text.txt", "stopped", None, signal.SIGUSR1, True)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert not slurm_job.exists()


def test_weights_that_lightning_kept_of_another_job_are_refused(
    tiny_checkpoint: str, prompts: str, slurm_job: Path
) -> None:
    Path("text.txt").write_text(sentence(0, 60))
    Path("hpc_ckpt_1.ckpt").touch()
    with pytest.raises(ValueError, match="is of a job that Lightning put into the queue again"):
        evaluate(tiny_checkpoint, prompts, "text.txt", "out")
    with pytest.raises(ValueError, match="is of a job that Lightning put into the queue again"):
        attribute(tiny_checkpoint, prompts, "out")


def test_continuations_of_another_run_are_refused_with_the_field_that_differs(tmp_path: Path) -> None:
    CompletionLog(tmp_path, 0, {"seed": 0, "scorer": "small"}, ["small"]).append([])
    with pytest.raises(ValueError, match="scorer"):
        CompletionLog(tmp_path, 0, {"seed": 0, "scorer": "original"}, ["original"]).begin([], 1)
