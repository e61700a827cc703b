"""The base of the stages: a folder for the results; one file, written last, marks them as complete."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import lightning as L

from sparc3_lightning.data.base import Kind
from sparc3_lightning.distributed import gather, is_rank_zero
from sparc3_lightning.files import at_home, check_absent, check_writable
from sparc3_lightning.stages.folders import check_config, folder_of, give_back, own, write_config
from sparc3_lightning.stages.trainer_options import check_trainer


class Stage(L.LightningModule):
    """One verb of the command line."""

    verb: ClassVar[str]
    OUTPUTS: ClassVar[tuple[str, ...]]  # the file that is written last; several names where an option chooses one
    READS: ClassVar[dict[str, Kind]] = {}  # options that name what may lie on this machine
    FILLED_IN: ClassVar[set[str]] = set()  # options that an experiment fills in
    config_yaml: str | None = None  # what config.yaml is to hold; None writes none
    shows_progress = False  # set by the command line; from Python the trainer has a bar of its own
    written = ""

    @classmethod
    def reads(cls, options: Mapping[str, object]) -> dict[str, Kind]:
        """Return the options among ``READS`` that a stage with such a config makes use of."""
        return cls.READS

    def begin(self, folder: Path, output: str | None = None) -> None:
        """Take a folder for the results, and own it.

        Args:
            folder: Where to write; it is made if it does not exist.
            output: Which of ``OUTPUTS`` is written last; None for the only one.

        Raises:
            OSError: If nothing can be written to the folder, it holds results, or another run owns it or has begun it.
        """
        self.folder = folder
        self.output = folder / (output or self.OUTPUTS[0])
        check_writable(folder)
        if is_rank_zero():
            own(folder, self.verb)
        check_absent(self.output)
        if self.config_yaml is not None:
            check_config(folder, self.config_yaml)

    def begin_loop(self, output: str | None = None) -> None:
        """Take the trainer's folder for the results. All ranks call this once, and raise together."""
        check_trainer(self.trainer)
        folder, refusal = folder_of(self.trainer, self.verb), None
        try:
            self.begin(folder, output)
        except OSError as error:
            refusal = error
        for refused in filter(None, gather([refusal])):
            raise refused

    def keep_config(self) -> None:
        """Write config.yaml, after the last check; a loop does so by itself, before its first batch."""
        if self.config_yaml is not None and is_rank_zero():
            write_config(self.folder, self.config_yaml)

    def on_predict_epoch_start(self) -> None:
        """Write config.yaml: the model is loaded."""
        self.keep_config()

    def on_test_epoch_start(self) -> None:
        """Write config.yaml: the model is loaded."""
        self.keep_config()

    def teardown(self, stage: str) -> None:
        """Own the folder no longer."""
        give_back(self.folder)

    def summary(self) -> str:
        """Say what was written, once the loop has ended; nothing on a rank that wrote nothing."""
        return self.written


def paths_of(given: Sequence[Path] | Path) -> list[Path]:
    """Return the files that an option names: one of them, or a list.

    Its type is a tuple or a path: given a path, an option of a Sequence has jsonargparse read the list from that file.
    """
    return [at_home(path) for path in ([given] if isinstance(given, str | Path) else given)]
