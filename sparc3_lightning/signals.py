"""Ctrl-C and SIGTERM outside of a loop: one line and the exit code of the signal, at whatever moment they come."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)
MOMENT = 0.3  # seconds; two Ctrl-C within it are one, since a launcher passes on what the terminal sends to all

_pressed: list[float] = []  # when Ctrl-C was pressed first


class Stopped(SystemExit):
    """A signal has ended the process. It is no KeyboardInterrupt, of which Lightning makes exit code 1."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}. What was complete before is kept; the same command goes on from there."


def forget_interrupts() -> None:
    """Count the next Ctrl-C as the first one."""
    _pressed.clear()


def leave_at_second_interrupt(number: int) -> None:
    """Note a signal, and end the process at once if it is the second Ctrl-C."""
    if number != signal.SIGINT:
        return
    now = time.monotonic()
    _pressed.append(now)
    if now - _pressed[0] > MOMENT:
        os._exit(128 + number)


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise Stopped in the main thread, so that half-written files are removed."""
    forget_interrupts()
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        leave_at_second_interrupt(number)
        if not is_stopping:
            is_stopping = True
            raise Stopped(number)

    for number in STOPPING:
        signal.signal(number, stop)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End the process, in the block, at Ctrl-C or SIGTERM with a line and the exit code of the signal."""
    stop_on_signals()
    try:
        yield
    except Stopped as stopped:
        print(f"sparc3: {stopped}", file=sys.stderr)
        raise SystemExit(stopped.code) from None


def run_process(command: Sequence[str]) -> int:
    """Run another process to its end, and return its exit code. A signal that asks to stop is passed on to it.

    Raises:
        Stopped: If such a signal came, once the process has ended, which may have had work to keep.
    """
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    with _handling(pass_on):
        process = subprocess.Popen(command)
        for number in asked:  # it came before there was a process
            process.send_signal(number)
        code = process.wait()
    if asked:
        raise Stopped(asked[0])
    return code


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    try:
        for number in STOPPING:
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)
