"""What a run says while it works: a line of progress, and its own messages without those of the libraries."""

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sparc3_lightning.distributed import is_rank_zero
from sparc3_lightning.report.escaping import for_terminal

PACKAGE = str(Path(__file__).parents[1])
VERBOSE = "SPARC3_VERBOSE"  # stands for -v in the processes that a run starts
FIRST_AFTER, EVERY = 5.0, 60.0  # seconds: when a log file gets its first line of progress, and the next ones


class Line:
    """The line of progress of one piece of work: what is done, how fast, and the time left.

    On a terminal it is drawn in place. Elsewhere, as in a log file, it is a plain line a minute. Only rank 0 shows it.

    Args:
        name: Of the work.
        unit: What is counted, in the plural.
        total: How much there is to do, of all ranks; None if that is not known.
        clock: Seconds that pass.
        out: Where it is shown; None for the standard output.
        is_shown: Whether it is shown at all.
    """

    def __init__(
        self,
        name: str,
        unit: str = "",
        total: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        out: TextIO | None = None,
        is_shown: bool = True,
    ) -> None:
        self.name, self.unit, self.total = name, unit, total
        self.done = 0.0
        self._clock, self._began = clock, clock()
        self._due = self._began + FIRST_AFTER
        self._out = out or sys.stdout
        self._bar: Progress | None = None
        self._is_shown = is_shown and is_rank_zero()
        if self._is_shown and self._out.isatty():
            self._bar = Progress(
                SpinnerColumn("line"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[said]}", markup=False),
                console=Console(file=self._out),
                transient=True,  # what stays is said by the stage
                refresh_per_second=4,
                redirect_stdout=out is None,
                redirect_stderr=out is None and sys.stderr.isatty(),
            )
            self._task = self._bar.add_task(name, total=total, said="")
            self._bar.start()

    def advance(self, amount: float) -> None:
        """Count what was done, by all ranks together."""
        self.done += amount
        if self.total is not None:  # the last batches of several ranks hold fillers
            self.done = min(self.done, self.total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, said=self.said())
        elif self._is_shown and self._clock() >= self._due:
            self._due = self._clock() + EVERY
            print(f"{self.name}: {self.said()}", file=self._out, flush=True)

    def said(self) -> str:
        """Say what is done, how fast, and the time left."""
        # Continuations that are half drawn count by their share, and sums of shares end a little below the whole.
        done = f"{math.floor(self.done + 1e-6):,}"
        parts = [f"{done} {self.unit}" if self.total is None else f"{done} of {self.total:,.0f} {self.unit}"]
        seconds = self._clock() - self._began
        if self.done > 0 and seconds > 0:
            parts.append(speed(self.done / seconds))
            if self.total is not None:
                left = (self.total - self.done) * seconds / self.done
                parts.append(f"{timedelta(seconds=math.ceil(left))} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def speed(rate: float) -> str:
    """Return a rate, given a second, in words: of what is slow a minute.

    Example:
        >>> speed(1234.5), speed(2.04), speed(0.05)
        ('1,234 a second', '2.0 a second', '3.0 a minute')
    """
    if rate < 0.1:
        return f"{60 * rate:.1f} a minute"
    return f"{rate:,.{0 if rate >= 10 else 1}f} a second"


def tick(out: TextIO) -> str:
    """Return the sign of a stage that is done, as an output can show it."""
    try:
        "✓".encode(out.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "done"
    return "✓"


def is_verbose(arguments: list[str]) -> bool:
    """Tell whether every line of the libraries is asked for, by -v or by the process that started this one."""
    return not {"-v", "--verbose"}.isdisjoint(arguments) or bool(os.environ.get(VERBOSE))


def speak(verbose: bool) -> None:
    """Set up messages and warnings for a process that was started from a shell.

    Ours are shown: an information as it is, a warning behind "Warning: ", without a path. Those of the libraries are
    hidden.

    Args:
        verbose: Show those as well, as they come.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_escape)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if type(handler) is logging.StreamHandler:
            handler.emit = _emit  # type: ignore[method-assign]  # to the stderr of now, which a line of progress holds
    show = warnings.formatwarning
    if verbose:
        os.environ[VERBOSE] = "1"
        warnings.formatwarning = lambda *given, **more: for_terminal(show(*given, **more), keep="\n\t")
        return
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # datasets reads it when a stage imports it, if any does: with pandas that takes a tenth of all that starts.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.lastResort = logging.NullHandler()  # else it prints the warnings of libraries
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # what prints; a program's own handlers get everything
                handler.addFilter(_is_error_or_ours)
    warnings.showwarning = _show_ours


def _emit(record: logging.LogRecord) -> None:
    print(record.getMessage(), file=sys.stderr, flush=True)


def _escape(record: logging.LogRecord) -> bool:
    """Show what a name in a message could tell the terminal to do, and let the message pass."""
    record.msg, record.args = for_terminal(record.getMessage(), keep="\n\t"), ()
    return True


def _is_error_or_ours(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or _is_ours()


def _show_ours(message: Warning | str, *_: object, **__: object) -> None:
    if _is_ours():
        print(f"Warning: {for_terminal(message, keep=chr(10))}", file=sys.stderr, flush=True)


def _is_ours() -> bool:
    """Tell whether the message under way is one that this package gave to rank_zero_info or rank_zero_warn."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and Path(frame.f_code.co_filename).name != "rank_zero.py":
        frame = frame.f_back
    while frame is not None and Path(frame.f_code.co_filename).name == "rank_zero.py":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)
