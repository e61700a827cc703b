"""What a run shows while it works: the line of progress, and messages of this package alone."""

import io
import logging
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from sparc3_lightning import cli
from sparc3_lightning.evaluation.generation import Sampling, continue_prompts, draw_keys
from sparc3_lightning.stages.terminal import Line, is_verbose, speed, tick

SAID = """
import logging, sys, warnings
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers.utils import logging as theirs
from sparc3_lightning.stages.terminal import is_verbose, speak
from sparc3_lightning.distributed import usable_accelerator
from sparc3_lightning.report import drawing
from pathlib import Path
speak(is_verbose(sys.argv[1:]))
drawing.draw_or_warn(Path("\\x1bnowhere"))
warnings.warn("of a library")
rank_zero_warn("of Lightning")
rank_zero_info("GPU available: False")
logging.getLogger("any").warning("logged by a library")
theirs.get_logger("transformers").warning("logged by transformers")
bar = list(theirs.tqdm(range(2), desc="Loading weights"))
"""


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(total: float | None, out: io.StringIO) -> tuple[Line, Clock]:
    clock = Clock()
    return Line("Continuing", "continuations", total, clock, out), clock


@pytest.mark.usefixtures("as_if_from_python")
@pytest.mark.parametrize(
    ("options", "ours", "theirs"),
    [
        ([], True, None),  # Lightning's default is None, which means yes
        (["--trainer.enable_progress_bar", "true"], True, None),
        (["--trainer.enable_progress_bar", "false"], False, None),
        (["--trainer.callbacks", "[TQDMProgressBar]"], False, "TQDMProgressBar"),
        (["--trainer.callbacks", "TQDMProgressBar", "--trainer.enable_progress_bar", "true"], False, "TQDMProgressBar"),
    ],
)
@pytest.mark.few(2)
def test_the_line_of_progress_is_ours_unless_another_is_asked_for(options, ours, theirs, tiny_checkpoint):
    Path("general.txt").write_text("a b c d e f g h\n")
    data = ["--data", "C4", "--data.source", "general.txt", "--data.num_samples", "1", "--data.seq_len", "4"]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    done = cli.main(["attribute", "--model.checkpoint", tiny_checkpoint, *data, *cpu, *options])
    bar = done.trainer.progress_bar_callback
    assert done.model.shows_progress == ours
    assert (bar and type(bar).__name__) == theirs


def test_a_log_file_gets_a_line_soon_and_then_one_a_minute():
    out = io.StringIO()
    shown, clock = line(1000, out)
    times = []
    for _ in range(250):
        clock.now += 1
        before = out.tell()
        shown.advance(2)
        times += [clock.now - 100] if out.tell() > before else []
    shown.close()
    assert times == [5, 65, 125, 185, 245]
    assert out.getvalue().splitlines()[0] == ("Continuing: 10 of 1,000 continuations, 2.0 a second, 0:08:15 left")
    assert out.getvalue().isascii()
    assert not set(out.getvalue()) & set("\r\x1b%|#")


def test_a_short_piece_of_work_leaves_no_line_in_a_log_file():
    out = io.StringIO()
    shown, clock = line(10, out)
    clock.now += 4.9
    shown.advance(10)
    shown.close()
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("done", "total", "seconds", "said"),
    [
        (0, 8, 0, "0 of 8 continuations"),
        (0, 8, 9, "0 of 8 continuations"),
        (4, 8, 2, "4 of 8 continuations, 2.0 a second, 0:00:02 left"),
        (8, 8, 2, "8 of 8 continuations, 4.0 a second, 0:00:00 left"),
        (1, 3, 100, "1 of 3 continuations, 0.6 a minute, 0:03:20 left"),
        (50_000, 2_000_000, 10, "50,000 of 2,000,000 continuations, 5,000 a second, 0:06:30 left"),
        (9, 8, 3, "8 of 8 continuations, 2.7 a second, 0:00:00 left"),
        (6, None, 3, "6 continuations, 2.0 a second"),
        (1, 500_000, 1, f"1 of 500,000 continuations, 1.0 a second, {timedelta(seconds=499_999)} left"),
        (0, 0, 3, "0 of 0 continuations"),
    ],
)
def test_speed_and_the_time_left_are_those_of_what_was_done(done, total, seconds, said):
    shown, clock = line(total, io.StringIO())
    clock.now += seconds
    shown.advance(done)
    assert shown.said() == said


def test_shares_of_continuations_add_up_to_whole_ones():
    shown, clock = line(3, io.StringIO())
    clock.now += 1
    for _ in range(30):
        shown.advance(0.1)
    assert shown.said().startswith("3 of 3 ")


def test_on_a_terminal_the_line_is_drawn_in_place_and_taken_away():
    out = Terminal()
    shown, clock = line(8, out)
    clock.now += 2
    shown.advance(4)
    shown.close()
    shown.close()
    assert "Continuing" in out.getvalue()
    assert "\x1b" in out.getvalue()


def test_only_rank_zero_shows_a_line(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for out in (Terminal(), io.StringIO()):
        shown, clock = line(8, out)
        clock.now += 99
        shown.advance(4)
        shown.close()
        assert out.getvalue() == ""


def test_a_slow_rate_is_given_a_minute():
    assert [speed(rate) for rate in (0.01, 0.1, 9.94, 10, 12345)] == [
        "0.6 a minute",
        "0.1 a second",
        "9.9 a second",
        "10 a second",
        "12,345 a second",
    ]


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "✓"), ("ascii", "done"), ("latin-1", "done")])
def test_the_tick_is_a_word_where_the_output_has_no_such_sign(encoding, sign):
    assert tick(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) == sign


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_continuations_are_counted_while_they_grow(make_model, num_prompts):
    model, sampling = make_model(), Sampling(5, 1.0, 0.9, num_continuations=4)
    import torch

    ids = torch.full((num_prompts, 3), 7)
    keys = [draw_keys(0, f"p{i}", 4, 4) for i in range(num_prompts)]
    counted: list[float] = []
    drawn = continue_prompts(model, ids, torch.ones_like(ids), keys, sampling, on_drawn=counted.append)
    assert sum(counted) == pytest.approx(4 * num_prompts)
    assert len(counted) > 1
    assert drawn == continue_prompts(model, ids, torch.ones_like(ids), keys, sampling)


def test_verbose_is_asked_for_by_an_option_or_by_the_process_above(monkeypatch):
    assert is_verbose(["run", "-v"])
    assert is_verbose(["--verbose", "run"])
    assert not is_verbose(["run", "--config", "v.yaml"])
    monkeypatch.setenv("SPARC3_VERBOSE", "1")
    assert is_verbose(["run"])


def said(*options: str) -> str:
    done = subprocess.run([sys.executable, "-c", SAID, *options], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_lines_of_libraries_are_hidden_and_a_warning_of_ours_has_no_path():
    text = said()
    assert text.startswith("Warning: The results are in \\x1bnowhere, but not drawn")
    assert len(text.splitlines()) == 1
    assert "site-packages" not in text
    assert ".py:" not in text


@pytest.mark.slow
def test_verbose_shows_the_lines_of_libraries():
    text = said("--verbose")
    for part in ("of a library", "of Lightning", "GPU available", "logged by a library", "Loading weights", "nowhere"):
        assert part in text
    assert "logged by transformers" in text


def test_nothing_is_hidden_from_a_program_that_imports_the_package():
    assert logging.lastResort is not None
    with pytest.warns(UserWarning, match="of Lightning"):
        rank_zero_warn("of Lightning")
    assert Path(warnings.showwarning.__code__.co_filename).parent.name != "stages"
