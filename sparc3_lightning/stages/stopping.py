"""Signals that ask a run to stop: a loop leaves between two forward passes, and a Slurm job is queued again."""

import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.errors import OptionError
from sparc3_lightning.signals import STOPPING, forget_interrupts, leave_at_second_interrupt
from sparc3_lightning.stages.base import Stage
from sparc3_lightning.stages.terminal import Line

LISTENED = (*STOPPING, signal.SIGUSR1)


class StopRequest(L.Callback):
    """Whether Ctrl-C, SIGTERM or SIGUSR1 has asked to stop; the loop looks when all ranks are between two passes.

    It takes the place of Lightning's own handler in a Slurm job, which writes the whole model to hpc_ckpt_<n>.ckpt in
    the trainer's folder wherever the loop is, and loads that over the model of any loop that is started there later.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._outer: dict[int, Any] = {}  # the handlers that there are outside of the loop
        self._taken: set[int] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep Lightning's handler out, before it is set.

        Raises:
            ValueError: If a file is there that Lightning is about to load over the model.
        """
        self._outer = {number: signal.getsignal(number) for number in LISTENED}  # before Lightning adds its own
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        left = trainer._checkpoint_connector._hpc_resume_path
        if left is not None and SLURMEnvironment.detect():
            raise OptionError(
                "checkpoint",
                f"{left} is of a job that Lightning put into the queue again, and in a Slurm job it would load that in "
                "place of the weights of --.checkpoint: remove it, or run in another folder.",
            )

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self.listen()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self.listen()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a signal end the run at once from here on: everything that was measured is on the disk."""
        self.give_back(STOPPING)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self.give_back(LISTENED)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back, and the terminal; what ends the run is the exception."""
        if isinstance(pl_module, StoppableModule):
            pl_module.end_line()
        self.signal = None
        self.give_back(LISTENED)

    def listen(self) -> None:
        """Take the signals; elsewhere than in the main thread nothing is taken."""

        def note(number: int, frame: FrameType | None) -> None:
            leave_at_second_interrupt(number)
            self.signal = self.signal or number

        forget_interrupts()
        with suppress(ValueError):  # not the main thread
            for number in LISTENED:
                before = signal.signal(number, note)
                self._outer.setdefault(number, before)
                self._taken.add(number)

    def give_back(self, numbers: Iterable[int]) -> None:
        """Put back the handlers there were before; one of them gets the signal that the loop did not act on."""
        for number in self._taken & set(numbers):
            signal.signal(number, self._outer[number] or signal.SIG_DFL)
            self._taken.remove(number)
        if self.signal in STOPPING and self.signal not in self._taken:
            late, self.signal = self.signal, None
            signal.raise_signal(late)

    def agreed(self, device: torch.device) -> int | None:
        """Return the signal if any rank got one; all ranks must ask together."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            number = torch.tensor(self.signal or 0, device=device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.signal = int(number) or None
        return self.signal

    def leave(self, kept: str | None, is_global_zero: bool) -> None:
        """End the process; on SIGUSR1, by which Slurm announces the end of the time, the job is queued again.

        Args:
            kept: What is kept of this attempt, in words. None if nothing is: queued again, the job would never end.
            is_global_zero: Whether this is the rank that asks Slurm.
        """
        assert self.signal is not None
        job = os.environ.get("SLURM_JOB_ID") if self.signal == signal.SIGUSR1 else None
        again = " The job is not put into the queue again: give it more time." if job and kept is None else ""
        if kept is not None and job is None:
            again = " The same command goes on from there."
        rank_zero_info(f"Got {signal.Signals(self.signal).name}: {kept or 'nothing new is kept'}.{again}")
        if job and kept is not None and is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=False)
        raise SystemExit(128 + self.signal)


class StoppableModule(Stage):
    """A stage whose loop checks ``stop`` between two forward passes, and leaves when it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.stop = StopRequest()
        self._line: Line | None = None

    def begin_line(self, name: str, unit: str = "", total: float | None = None) -> None:
        """Show a line of progress from here on, see ``Line``, in place of the one before."""
        self.end_line()
        if self.shows_progress:
            self._line = Line(name, unit, total)

    def advance(self, amount: float) -> None:
        """Count what this rank has done, of which each of the others does as much."""
        if self._line is not None:
            self._line.advance(amount * self.trainer.world_size)

    def end_line(self) -> None:
        """Take the line of progress away."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def configure_callbacks(self) -> list[L.Callback]:
        """Listen for signals."""
        return [self.stop]
