"""Ctrl-C and SIGTERM: one line, the exit code of the signal, and what was done is kept."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import sentence, trainer, write_jsonl

from sparc3_lightning import signals
from sparc3_lightning.attribution.progress import load_progress
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.signals import Stopped, run_process, stop_on_signals
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.stopping import StopRequest

SCORES = "scores.safetensors"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back the handlers of the test run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.forget_interrupts()


@pytest.fixture
def left(monkeypatch) -> list[int]:
    """The exit codes with which the process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def data(num_samples: int = 12) -> ToxicPrompts:
    rows = [{"text": sentence(i, 3 + i % 5), "toxicity": 0.9} for i in range(num_samples)]
    return ToxicPrompts(source=write_jsonl(Path("rows.jsonl"), rows), num_samples=num_samples, batch_size=1)


class Interrupted(Attribution):
    """Gets a signal in its fourth batch."""

    number = signal.SIGINT

    def predict_step(self, batch: dict, batch_idx: int) -> None:
        if batch_idx == 3:
            signal.raise_signal(self.number)
        super().predict_step(batch, batch_idx)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_loop_saves_what_is_done_says_so_in_a_line_and_goes_on_to_the_same_scores(
    tiny_checkpoint, caplog, number, code, monkeypatch
):
    monkeypatch.setattr(Interrupted, "number", number)
    trainer("whole").predict(Attribution(tiny_checkpoint), datamodule=data(), return_predictions=False)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as done:
        trainer("out").predict(Interrupted(tiny_checkpoint), datamodule=data(), return_predictions=False)
    assert done.value.code == code
    assert f"Got {number.name}: 4 samples of rank 0 are saved. The same command goes on from there." in caplog.text
    assert len(load_progress(Path("out")).sample_ids) == 4
    trainer("out").predict(Attribution(tiny_checkpoint), datamodule=data(), return_predictions=False)
    whole, again = (ScoreFile.load(Path(folder, SCORES)).scores for folder in ("whole", "out"))
    assert all(whole[name].equal(again[name]) for name in whole)


def test_after_a_loop_the_handlers_are_those_of_before(tiny_checkpoint):
    def mine(*_: object) -> None:
        pass

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    for number in numbers:
        signal.signal(number, mine)
    trainer("out").predict(Attribution(tiny_checkpoint), datamodule=data(2), return_predictions=False)
    assert [signal.getsignal(number) for number in numbers] == [mine] * 3


class LateInterrupted(Attribution):
    """Gets a signal when no batch is left."""

    def on_predict_epoch_end(self) -> None:
        signal.raise_signal(signal.SIGINT)
        super().on_predict_epoch_end()


def test_a_signal_that_comes_after_the_last_batch_ends_the_run_when_its_results_are_written(tiny_checkpoint):
    stop_on_signals()
    with pytest.raises(Stopped, match="stopped by SIGINT"):
        trainer("out").predict(LateInterrupted(tiny_checkpoint), datamodule=data(2), return_predictions=False)
    assert ScoreFile.load(Path("out", SCORES)).provenance.num_samples == 2


def test_outside_of_a_loop_a_signal_raises_what_lightning_does_not_swallow():
    stop_on_signals()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stop_on_signals()
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(number)
        assert stopped.value.code == code
        assert str(stopped.value).startswith(f"stopped by {number.name}. What was complete before is kept")
    assert not issubclass(Stopped, Exception | KeyboardInterrupt)


@pytest.mark.parametrize("in_a_loop", [True, False])
def test_a_second_ctrl_c_ends_the_process_at_once_and_an_echo_of_the_first_does_not(monkeypatch, left, in_a_loop):
    if in_a_loop:
        request = StopRequest()
        request.listen()
    else:
        stop_on_signals()
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    try:
        signal.raise_signal(signal.SIGINT)
    except Stopped:
        assert not in_a_loop
    now += 0.1
    signal.raise_signal(signal.SIGINT)
    assert left == []
    signal.raise_signal(signal.SIGTERM)
    now += 1
    signal.raise_signal(signal.SIGTERM)
    assert left == [], "a launcher may ask twice"
    signal.raise_signal(signal.SIGINT)
    assert left == [130]


CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.2)
    open("kept", "w").close()
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
open("ready", "w").close()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_a_child_that_has_time_to_keep_its_work(number):
    def send() -> None:
        while not Path("ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run_process([sys.executable, "-c", CHILD])
    assert stopped.value.code == 128 + number
    assert Path("kept").exists()
    assert signal.getsignal(number) == before


def test_the_exit_code_of_a_child_is_returned():
    assert run_process([sys.executable, "-c", "raise SystemExit(3)"]) == 3


RUN = """
import sys, time
from sparc3_lightning import cli
from sparc3_lightning.stages import attribute
moment = sys.argv.pop(1)
def waiting(of):
    def wait(*args, **kwargs):
        print("waiting", flush=True)
        time.sleep(60)
        return of(*args, **kwargs)
    return wait
if moment == "load":
    attribute.load_for = waiting(attribute.load_for)
else:
    attribute.Attribution.predict_step = waiting(attribute.Attribution.predict_step)
cli.entry_point()
"""


def start(moment: str, checkpoint: str) -> "subprocess.Popen[str]":
    """Start an attribution, and return its process once it waits at a moment."""
    samples = ["--data", "ToxicPrompts", "--data.source", "rows.jsonl", "--data.num_samples", "12"]
    options = ["--model.checkpoint", checkpoint, *samples, "--trainer.accelerator", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, moment, "attribute", *options, "--trainer.enable_progress_bar", "false"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if "waiting\n" not in iter(process.stdout.readline, ""):
        pytest.fail(process.stderr.read())
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_a_shell_the_load_of_a_model_ends_with_a_line_and_no_traceback(tiny_checkpoint, number, code):
    data()
    process = start("load", tiny_checkpoint)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.rstrip().splitlines()[-1].startswith(f"sparc3: stopped by {number.name}.")
    assert "Traceback" not in said
    assert not list(Path().rglob(".lock"))
    assert not list(Path().rglob("config.yaml"))


@pytest.mark.slow
def test_in_a_shell_the_second_ctrl_c_ends_a_loop_that_does_not_come_to_its_end(tiny_checkpoint):
    data()
    process = start("step", tiny_checkpoint)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the batch is not done"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
