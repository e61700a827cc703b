"""The base of the stages: a folder for the results; one file, written last, marks them as complete."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import lightning as L

from sparc3_lightning.data.base import Kind
from sparc3_lightning.files import check_absent, check_writable


class Stage(L.LightningModule):
    """One verb of the command line."""

    verb: ClassVar[str]
    OUTPUTS: ClassVar[tuple[str, ...]]  # the file that is written last; several names where an option chooses one
    READS: ClassVar[dict[str, Kind]] = {}  # options that name what may lie on this machine
    FILLED_IN: ClassVar[set[str]] = set()  # options that an experiment fills in
    written = ""

    @classmethod
    def reads(cls, options: Mapping[str, object]) -> dict[str, Kind]:
        """Return the options among ``READS`` that a stage with such a config makes use of."""
        return cls.READS

    def begin(self, folder: Path, output: str | None = None) -> None:
        """Take a folder for the results.

        Args:
            folder: Where to write; it is made if it does not exist.
            output: Which of ``OUTPUTS`` is written last; None for the only one.

        Raises:
            OSError: If nothing can be written to the folder, or it holds results.
        """
        self.folder = folder
        self.output = folder / (output or self.OUTPUTS[0])
        check_writable(folder)
        check_absent(self.output)

    def begin_loop(self, output: str | None = None) -> None:
        """Take the trainer's folder for the results. All ranks call this once, since the folder is a broadcast."""
        self.begin(Path(self.trainer.log_dir or "."), output)

    def summary(self) -> str:
        """Say what was written, once the loop has ended; nothing on a rank that wrote nothing."""
        return self.written
