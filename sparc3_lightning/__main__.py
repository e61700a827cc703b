"""``python -m sparc3_lightning`` is ``sparc3``."""

import sys

from sparc3_lightning.signals import ending_on_signals
from sparc3_lightning.stages.verbs import answer


def entry_point() -> None:
    """Run the command line from a shell; Ctrl-C is a line, too, while its libraries are imported."""
    with ending_on_signals():
        answer(sys.argv[1:])
        from sparc3_lightning import cli

        cli.entry_point()


if __name__ == "__main__":
    entry_point()
