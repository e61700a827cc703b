"""The folder of a run: which one it is, who owns it while the run lives, and the config.yaml in it."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparc3_lightning.distributed import is_rank_zero
from sparc3_lightning.files import check_writable, write_atomically
from sparc3_lightning.stages.trainer_options import NOT_RESULTS

LOGS = "lightning_logs"
CONFIG = "config.yaml"
LOCK = ".lock"

_owned: dict[Path, int] = {}  # the folders that this process owns, and the open file of each lock
_made: list[Path] = []  # the folders that were made for a run of this process


def folder_of(trainer: L.Trainer, verb: str) -> Path:
    """Return the folder of a run, the same on all ranks, which must call this together and once.

    It is the folder that a logger keeps for its version (TensorBoard, CSV); beside other loggers, such as W&B, a new
    ``lightning_logs/<verb>/version_<n>`` in their save_dir; without a logger the trainer's ``default_root_dir``.

    Args:
        trainer: Any trainer.
        verb: What it runs.
    """
    folder = Path()  # of the other ranks, which are told
    if is_rank_zero():
        versioned = _first_versioned(trainer)
        if versioned is not None:
            folder = Path(versioned.log_dir)
        elif trainer.loggers:
            folder = new_folder(Path(trainer.loggers[0].save_dir or "."), verb)
        else:
            folder = Path(trainer.default_root_dir)
    return trainer.strategy.broadcast(folder)


def new_folder(root: Path, verb: str) -> Path:
    """Make the next folder ``version_<n>``; of two runs that begin at once each gets its own.

    Args:
        root: Folder of the folder ``lightning_logs``, or that folder itself.
        verb: What is run.
    """
    parent = (root if root.name == LOGS else root / LOGS) / verb
    check_writable(parent)
    found = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
    for number in count(max((int(name) + 1 for name in found if name.isdecimal()), default=0)):
        folder = parent / f"version_{number}"
        if _make(folder):
            return folder
    raise AssertionError("numbers do not end")


def reserve(trainer: L.Trainer) -> None:
    """Make the folder of a logger that counts its versions, before another run can count up to the same one.

    A version that was given is nobody else's: that folder may be of the same run, which goes on.
    """
    logger = _first_versioned(trainer)
    if not is_rank_zero() or logger is None or logger._version is not None:
        return
    while not _make(Path(logger.log_dir)):
        logger._version = None  # count again


def _first_versioned(trainer: L.Trainer) -> TensorBoardLogger | CSVLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger | CSVLogger)), None)


def _make(folder: Path) -> bool:
    """Make a folder; tell whether it was not there before."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise OSError(
            f"Cannot make the output folder {folder}: {error.strerror or error}. Choose another one with "
            "--trainer.logger.init_args.save_dir."
        ) from error
    _made.append(folder.resolve())
    return True


def own(folder: Path, verb: str) -> None:
    """Own a folder until this process ends, or gives it back.

    Args:
        folder: Of a run.
        verb: What is run, for the one who comes second.

    Raises:
        OSError: If another process owns it.
    """
    folder = folder.resolve()
    if folder in _owned:
        return
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, folder / LOCK):
                break
        except OSError as error:
            owner = os.read(handle, 500).decode(errors="replace").strip() or "another run"
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                rank_zero_warn(f"{folder} has no locks ({error.strerror}): start no other run in it.")
                return
            raise OSError(
                f"{folder} is in use by {owner}; nothing was overwritten. Wait until that has ended, or choose another "
                "folder with --trainer.logger.init_args.version."
            ) from None
        os.close(handle)  # of a lock that was given back in this moment: its file is gone
    _owned[folder] = handle
    with suppress(OSError):  # a lock on a full disk is a lock
        os.ftruncate(handle, 0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"sparc3 {verb}, process {os.getpid()} on {socket.gethostname()}, since {began}\n".encode())


def _is_at(handle: int, path: Path) -> bool:
    """Tell whether an open file is the one that lies at a path now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def give_back(folder: Path) -> None:
    """Own a folder no longer, if this process does."""
    folder = folder.resolve()
    handle = _owned.pop(folder, None)
    if handle is not None:
        (folder / LOCK).unlink(missing_ok=True)  # before the lock goes, so that it is nobody else's
        os.close(handle)


@contextmanager
def giving_back() -> Iterator[None]:
    """Give back, when the block ends, the folders that were owned in it, and remove those it made and left empty."""
    owned, num_made = set(_owned), len(_made)
    try:
        yield
    finally:
        for folder in set(_owned) - owned:
            give_back(folder)
        for folder in _made[num_made:]:
            with suppress(OSError):  # it is not empty, as it should be
                folder.rmdir()
        del _made[num_made:]


def check_config(folder: Path, config: str) -> None:
    """Raise FileExistsError if a folder holds the config.yaml of another run.

    Args:
        folder: Of a run.
        config: What its config.yaml is to hold. Options that change no results may differ from what it holds.
    """
    path = folder / CONFIG
    if not os.path.lexists(path):
        return
    try:
        text = "" if path.is_symlink() else path.read_text(encoding="utf-8")
        is_same = not text.strip() or _measured(yaml.safe_load(text)) == _measured(yaml.safe_load(config))
    except (ValueError, yaml.YAMLError):
        is_same = False
    if path.is_symlink() or not is_same:
        raise FileExistsError(
            f"{path} is {'a link' if path.is_symlink() else 'of a run with other options'}; nothing was overwritten. "
            "Choose another folder with --trainer.logger.init_args.version, or remove that file."
        )


def write_config(folder: Path, config: str) -> None:
    """Write config.yaml, once nothing of the run can be refused any more."""
    write_atomically(folder / CONFIG, config)


def _measured(config: object) -> object:
    """Return the options that results rest on."""
    if isinstance(config, dict) and isinstance(config.get("trainer"), dict):
        trainer = {name: value for name, value in config["trainer"].items() if name not in NOT_RESULTS}
        config = {**config, "trainer": trainer}
    return without_none(config)


def without_none(value: object) -> object:
    """Return options without those that are None, of every group."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return value
