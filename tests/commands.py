"""Commands that end the process."""

from typing import Any

import pytest

from sparc3_lightning.cli import main


def stops(capsys, *args: str) -> tuple[Any, str, str]:
    """Run a command that ends the process; return its exit code and what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(list(args))
    printed = capsys.readouterr()
    return done.value.code or 0, printed.out, printed.err
