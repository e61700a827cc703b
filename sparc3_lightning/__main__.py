"""``python -m sparc3_lightning`` is ``sparc3``."""

import gc
import sys

from sparc3_lightning.signals import ending_on_signals
from sparc3_lightning.stages.verbs import answer


def entry_point() -> None:
    """Run the command line from a shell; Ctrl-C is a line, too, while its libraries are imported."""
    with ending_on_signals():
        answer(sys.argv[1:])
        gc.disable()  # modules are never garbage, and looking for some among them takes a quarter of their imports
        from sparc3_lightning import cli

        gc.freeze()
        gc.enable()
        cli.entry_point()


if __name__ == "__main__":
    entry_point()
