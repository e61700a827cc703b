"""What a broken-off attribution leaves behind, so that the next one goes on: the sums of each rank.

A folder holds one file a rank and attempt, ``state-<attempt>-<rank>.safetensors``. A file is complete in itself: it
names the samples that its sums are of, so that ranks may be saved at different moments. An attempt begins with a file
of rank 0 that holds all that earlier attempts did; only the files of the last attempt count.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from sparc3_lightning.attribution.tensor_file import load_tensors, save_tensors
from sparc3_lightning.files import Count, parse_json, read_as
from sparc3_lightning.provenance import differences

Identity = Mapping[str, object]  # what tells a run from another, as JSON holds it
CONTENTS = {"checkpoint_fingerprint", "versions"}  # what is no option, and changes without being asked to
FORMAT = "sparc3_lightning state 1"
_NAME = re.compile(r"state-(\d+)-(\d+)\.safetensors")
_ROWS = "rows/"  # before the name of a module whose tensor holds a row a sample


@dataclass(frozen=True)
class Progress:
    """Sums over samples, and the rows of each sample.

    Args:
        identity: What tells the run from another: checkpoint, data, method and so on.
        sums: Per module, float64.
        sample_ids: The samples that the sums are of.
        num_nonfinite: Values that were NaN or infinite and were replaced by 0.
        attempt: Number of the attempt, from 0.
        rows: Per module one row for each of ``sample_ids``, in their order, such as its mean activations.
    """

    identity: Identity
    sums: dict[str, Tensor] = field(default_factory=dict)
    sample_ids: list[str] = field(default_factory=list)
    num_nonfinite: int = 0
    attempt: int = 0
    rows: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path, rank: int) -> None:
        """Write the state of one rank, under a temporary name first."""
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(dict(self.identity)),
            "sample_ids": json.dumps(self.sample_ids),
            "num_nonfinite": str(self.num_nonfinite),
        }
        tensors = {**self.sums, **{f"{_ROWS}{name}": rows for name, rows in self.rows.items()}}
        save_tensors(folder / f"state-{self.attempt}-{rank}.safetensors", tensors, metadata)

    def check_identity(self, identity: Identity, folder: Path) -> None:
        """Raise ValueError, naming the field that differs, if this is the state of another run."""
        for name in differences(self.identity, identity)[:1]:
            raise ValueError(
                f"{folder} holds the state of another run: its {name} is {self.identity.get(name)!r}, now it is "
                f"{identity.get(name)!r}. Choose another folder with --trainer.logger.init_args.version, or remove the "
                "files state-*.safetensors."
            )


def load_progress(folder: Path) -> Progress | None:
    """Add up the states of all ranks of the last attempt in a folder; None if there is none.

    Raises:
        ValueError: If a file is damaged, or two files hold the same sample.
    """
    found = [(match, path) for path in folder.glob("state-*") if (match := _NAME.fullmatch(path.name))]
    if not found:
        return None
    last = max(int(match.group(1)) for match, _ in found)
    # Rank 0 first: its sums hold those of earlier attempts, and addition in this order is the one of a single process.
    parts = [
        _load(path) for match, path in sorted(found, key=lambda item: int(item[0][2])) if int(match.group(1)) == last
    ]
    sums: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    sample_ids: list[str] = []
    for part in parts:
        part.check_identity(parts[0].identity, folder)
        for name, total in part.sums.items():
            sums[name] = sums[name] + total if name in sums else total
        for name, own in part.rows.items():
            rows[name] = torch.cat([rows[name], own]) if name in rows else own
        sample_ids += part.sample_ids
    if len(set(sample_ids)) != len(sample_ids):
        raise ValueError(f"The states in {folder} count a sample twice; remove the files state-*.safetensors.")
    return Progress(parts[0].identity, sums, sample_ids, sum(part.num_nonfinite for part in parts), last, rows)


def _load(path: Path) -> Progress:
    try:
        tensors, metadata = load_tensors(path, FORMAT)
        values = {name: metadata.get(name, "null") for name in ("identity", "sample_ids", "num_nonfinite")}
        of_modules = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ROWS)}
        state = Progress(
            read_as(dict[str, object], parse_json(values["identity"]), "identity"),
            of_modules,
            read_as(list[str], parse_json(values["sample_ids"]), "sample_ids"),
            read_as(Count, parse_json(values["num_nonfinite"]), "num_nonfinite"),
            rows={name.removeprefix(_ROWS): tensor for name, tensor in tensors.items() if name not in of_modules},
        )
        if any(rows.dim() != 2 or len(rows) != len(state.sample_ids) for rows in state.rows.values()):
            raise ValueError("it does not hold a row for each sample")
        if not all(total.is_floating_point() and total.isfinite().all() for total in state.sums.values()):
            raise ValueError("it holds sums that are not finite")
    except ValueError as error:
        raise ValueError(
            f"{path} is not a state of 'sparc3 attribute', or is damaged: {error}: remove it to begin again."
        ) from None
    return state


def remove_progress(folder: Path, before: int | None = None) -> None:
    """Remove the states in a folder: all, or the states of attempts before a number."""
    for path in folder.glob("state-*"):
        match = _NAME.fullmatch(path.name)
        if match and (before is None or int(match.group(1)) < before):
            path.unlink(missing_ok=True)


def go_on(output: Path, identity: Identity, takes_sums: bool = True) -> Progress:
    """Begin an attempt: where the state in the output's folder, or of the same run in a folder beside it, left off.

    Args:
        output: The file that a run writes at its end.
        identity: Of this run.
        takes_sums: Whether this run can add to sums of before; of several ranks that each keep some rows, none can.

    Returns:
        What was done before; empty if nothing was.

    Raises:
        ValueError: If the folder holds the state of another run, or a damaged one; or there are sums of before and this
            run cannot add to them.
    """
    folder = output.parent
    found = load_progress(folder)
    if found is not None:
        found.check_identity(identity, folder)
    else:
        found, folder = _unfinished_elsewhere(output, identity) or (None, folder)
    if found is None:
        return Progress(identity)
    if not takes_sums:
        raise ValueError(
            f"{folder}/state-*.safetensors holds sums of weights of one device, which several devices cannot go on "
            "from: give --trainer.devices 1 and --trainer.num_nodes 1, or remove that file to begin again."
        )
    progress = replace(found, attempt=found.attempt + 1)
    # Before any rank adds to it: from here on the files of earlier attempts no longer count.
    progress.save(output.parent, rank=0)
    remove_progress(output.parent, before=progress.attempt)
    rank_zero_info(f"Going on after {len(found.sample_ids)} samples of a run that broke off.")
    return progress


def _unfinished_elsewhere(output: Path, identity: Identity) -> tuple[Progress, Path] | None:
    """Return the furthest state of the same run in a folder beside the output's, and that folder."""
    same = []
    for folder in sorted({path.parent for path in output.parent.parent.glob("*/state-*.safetensors")}):
        if (folder / output.name).exists():
            continue
        try:
            state = load_progress(folder)
        except (OSError, ValueError) as error:  # it need not be this run's concern
            rank_zero_info(f"Sums of an earlier run were not used: {error}")
            continue
        if state is None:
            continue
        changed = differences(state.identity, identity)
        if not changed:
            same.append((state, folder))
        elif set(changed) <= CONTENTS:
            rank_zero_info(
                f"Sums of an earlier run in {folder} were not used: the {' and the '.join(changed)} changed."
            )
    return max(same, key=lambda found: len(found[0].sample_ids), default=None)
