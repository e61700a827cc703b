"""The export of prune: its place is checked before anything is searched, and an export that fails loses nothing."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import run
from helpers import provenance, random_scores, save_scores
from transformers import AutoModelForCausalLM

from sparc3_lightning.cli import main
from sparc3_lightning.data import C4
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.selection.budget import Budget
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.prune import NEURONS, UNFINISHED, Pruning, finish_export

OUT, EXPORT = Path("out"), Path("pruned")


@pytest.fixture
def files(tiny_checkpoint: str) -> tuple[list[Path], Path]:
    """Scores of the tiny checkpoint."""
    of = provenance(tiny_checkpoint, Checkpoint(tiny_checkpoint).fingerprint)
    general = save_scores("general.safetensors", random_scores(0), of)
    return [general], save_scores("behavior.safetensors", random_scores(9, 0.5), of)


@contextmanager
def full_disk() -> Iterator[pytest.ExceptionInfo[OSError]]:
    """A disk that fills up while a checkpoint is copied."""

    def fail(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(
            OSError, match=r"No space left on device.* The neurons are kept in .*neurons\.json\."
        ) as failed:
            yield failed


@pytest.fixture
def nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded before the place of the export was checked")

    monkeypatch.setattr(Checkpoint, "load", fail)


@pytest.mark.usefixtures("nothing_is_searched")
@pytest.mark.parametrize("place", ["no space", "a file", "in the checkpoint"])
def test_a_place_that_an_export_cannot_have_is_refused_before_a_budget_is_searched(
    tiny_checkpoint: str, files: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    Path("file").write_text("mine")
    export = {"no space": EXPORT, "a file": Path("file", "pruned"), "in the checkpoint": Path(tiny_checkpoint, "new")}
    if place == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    pruning = Pruning(*files, budget=Budget(max_perplexity_increase=0.1), export=export[place])
    Path("text.txt").write_text("the dog\n")
    with pytest.raises((OSError, ValueError), match=r"--model\.export"):
        pruning.prune(OUT, C4("text.txt", 1, 2))
    assert not (OUT / NEURONS).exists()


def test_the_neurons_are_kept_when_the_export_fails_and_nothing_half_written_stays(
    files: tuple[list[Path], Path], tmp_path: Path
) -> None:
    with full_disk():
        Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    neurons = NeuronList.load(OUT / NEURONS)
    assert len(neurons.neurons) == 3
    assert neurons.provenance["export_fingerprint"] is None
    assert not EXPORT.exists()
    assert not list(tmp_path.glob(".pruned*"))


def test_an_export_that_failed_can_be_finished(files: tuple[list[Path], Path]) -> None:
    with full_disk():
        Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    found = finish_export(OUT)
    assert found == NeuronList.load(OUT / NEURONS)
    assert found.provenance["export_fingerprint"] == Checkpoint(str(EXPORT)).fingerprint
    assert not (OUT / UNFINISHED).exists()


def test_the_same_pruning_finishes_an_export_that_failed_and_another_one_is_refused(
    files: tuple[list[Path], Path],
) -> None:
    with full_disk():
        Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    kept = NeuronList.load(OUT / NEURONS)
    for other in (None, Path("elsewhere")):
        with pytest.raises(FileExistsError, match=r"neurons\.json exists already"):
            Pruning(*files, num_neurons=3, export=other).prune(OUT)
    found = Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    assert found.neurons == kept.neurons
    assert found.provenance["export_fingerprint"] == Checkpoint(str(EXPORT)).fingerprint
    assert not (OUT / UNFINISHED).exists()


def test_what_a_failed_export_says_is_the_command_that_finishes_it_and_other_options_are_refused(
    files: tuple[list[Path], Path],
) -> None:
    (general,), behavior = files
    command = ["prune", "--model.general", str(general), "--model.behavior", str(behavior)]
    command += ["--model.export", str(EXPORT), "--model.num_neurons", "3"]
    with full_disk() as failed:
        main(command)
    option = re.search(r"with (--trainer\.logger\.init_args\.version) (\S+)\.$", str(failed.value))
    assert option is not None
    with pytest.raises(FileExistsError, match="of a run with other options"):
        main([*command, "--model.num_ranked", "7", *option.groups()])
    main([*command, *option.groups()])
    (folder,) = Path("lightning_logs/prune").iterdir()
    assert NeuronList.load(folder / NEURONS).provenance["export_fingerprint"] == Checkpoint(str(EXPORT)).fingerprint


def die_at_write(number: int) -> None:
    """End this process when it is about to write, rename or remove something here for the n-th time."""
    here, found = Path.cwd(), count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        is_here = writes and isinstance(arguments[0], str | Path) and here in Path(arguments[0]).absolute().parents
        if is_here and next(found) == number:
            os._exit(9)

    sys.addaudithook(watch)


@pytest.mark.distributed
def test_a_pruning_that_is_killed_at_any_of_its_writes_is_made_up_for_by_the_same_one(
    files: tuple[list[Path], Path],
) -> None:
    def prune(out: Path, export: Path) -> NeuronList:
        pruning = Pruning(*files, num_neurons=3, export=export)
        pruning.config_yaml = "seed_everything: 0\n"
        return pruning.prune(out)

    whole = prune(Path("whole"), Path("of_whole"))
    num_repeated = 0
    for number in count(1):
        out, export = Path(f"out_{number}"), Path(f"pruned_{number}")
        if not (child := os.fork()):
            try:
                die_at_write(number)
                prune(out, export)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if (out / NEURONS).exists() and not (out / UNFINISHED).exists():
            found = NeuronList.load(out / NEURONS)
        else:
            found = prune(out, export)
            num_repeated += 1
        assert found.neurons == whole.neurons
        assert found.provenance == {**whole.provenance, "export": str(export)}, number
        assert Checkpoint(str(export)).fingerprint == found.provenance["export_fingerprint"]
        assert not list(Path().glob(".pruned_*"))
        if code == 0:
            break
        assert code == 9
    assert num_repeated > 20


def test_what_was_put_in_the_place_of_an_export_is_not_taken_for_it(files: tuple[list[Path], Path]) -> None:
    with full_disk():
        Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    EXPORT.mkdir()
    with pytest.raises(OSError, match=r"pruned exists already; nothing was overwritten\. The neurons are kept"):
        Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    assert not list(EXPORT.iterdir())
    EXPORT.rmdir()
    Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    assert AutoModelForCausalLM.from_pretrained(EXPORT)


def test_a_list_of_neurons_knows_the_fingerprint_of_its_export(files: tuple[list[Path], Path]) -> None:
    found = Pruning(*files, num_neurons=3, export=EXPORT).prune(OUT)
    content = json.loads((OUT / NEURONS).read_text())["provenance"]
    assert content == found.provenance
    assert content["export_fingerprint"] == Checkpoint(str(EXPORT)).fingerprint
    assert content["export_fingerprint"] != content["checkpoint_fingerprint"]


def test_the_dtype_of_the_checkpoint_stays_whatever_the_scores_were_computed_in(tiny_checkpoint: str) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).save_pretrained("half")
    of = provenance("half", Checkpoint("half").fingerprint)
    sides = [save_scores(f"{i}.safetensors", random_scores(i, 1 / (1 + i)), of) for i in range(2)]
    Pruning(sides[:1], sides[1], num_neurons=3, export=EXPORT).prune(OUT)
    assert AutoModelForCausalLM.from_pretrained(EXPORT, dtype="auto").dtype == torch.bfloat16
    names = {path.name for path in EXPORT.iterdir()}
    assert names == {path.name for path in Path("half").iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("as_if_from_python", "config")
def test_an_experiment_finishes_an_export_that_failed() -> None:
    with full_disk():
        run("--prune.export", "pruned")
    (stage,) = Path("lightning_logs/prune").iterdir()
    found = (stage / NEURONS).read_bytes()
    run("--prune.export", "pruned")
    assert NeuronList.load(stage / NEURONS).provenance["export_fingerprint"] == Checkpoint("pruned").fingerprint
    assert json.loads(found)["neurons"] == json.loads((stage / NEURONS).read_text())["neurons"]
    assert (EXPORT / "README.md").is_file(), "the evaluation puts its card there"


def test_a_sparse_checkpoint_of_no_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match=r"--model\.export: .*taken exists already"):
        Compression([Path("a")], tmp_path / "taken")
