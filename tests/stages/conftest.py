"""What tests of several stages need: inputs of an evaluation, an experiment that was run, and what takes no time."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import EVERY_SECOND, save_neurons, write_inputs
from experiments import Done, changed, pretend, remember_verbs, run, write_experiment
from helpers import changed as with_changes
from torch import Tensor

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import INDEX, Provenance, ShardWriter
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.evaluation import intervals
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.scorers.detoxify import SHIPPED
from sparc3_lightning.stages import evaluate
from sparc3_lightning.stages.experiment import Experiment

FEW = 1000


@pytest.fixture(scope="module", autouse=True)
def few_resamples(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spare most of the resamples, on which an evaluation spends its time; other processes would not know of it."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("distributed"):
            patch.setattr(intervals, "NUM_RESAMPLES", FEW)
        yield


@pytest.fixture
def seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def input_files(tmp_path):
    """A text of some 240 tokens, ten toxic prompts of 2 to 11 words and four mild ones, and scorers of our own."""
    write_inputs(tmp_path)


@pytest.fixture
def neurons(tiny_checkpoint) -> Path:
    """Every second neuron of both layers, found on the first two prompts."""
    return save_neurons(tiny_checkpoint, EVERY_SECOND)


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_args, **_kwargs):
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(evaluate, "load_for", fail)
    monkeypatch.setattr(evaluate, "load_scorer", fail)


@pytest.fixture
def as_if_from_python(monkeypatch):
    """Restore the seed that a run sets, and keep pytest's own arguments out of LightningCLI's sight."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


@pytest.fixture
def config(tmp_path, tiny_checkpoint) -> Path:
    return write_experiment(tmp_path, tiny_checkpoint)


@pytest.fixture
def verbs_run(monkeypatch) -> list[str]:
    """The verbs of the stages that were run, in order."""
    return remember_verbs(monkeypatch)


@pytest.fixture(scope="session")
def options(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All options of the experiment, as the command line hands them on."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("options")
    write_experiment(folder, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["sparc3"])
        patch.setattr(Experiment, "write_plan", lambda _, options, *__: found.update(options))
        cli.main(["run", "--config", "experiment.yaml", "--plan", "plan.txt"])
    return found


@pytest.fixture
def due(options: dict[str, Any]) -> Callable[..., list[str]]:
    """Return a function that runs an experiment of which no stage is computed, and returns the verbs that were due."""

    def run_pretended(*changes: str, run_stage: Callable[[str, Path], None] = pretend) -> list[str]:
        seen: list[str] = []

        def remembering(verb: str, config: Path) -> None:
            run_stage(verb, config)
            seen.append(verb)

        of = changed(options, changes)
        Experiment(**of["model"]).run(of, Path("out"), remembering)
        return seen

    return run_pretended


@pytest.fixture
def plan(options: dict[str, Any]) -> Callable[..., None]:
    """Return a function that writes the plan of an experiment."""

    def write_plan(*changes: str) -> None:
        of = changed(options, changes)
        Experiment(**of["model"]).write_plan(of, Path("out"), Path("plan.txt"))

    return write_plan


@pytest.fixture(scope="session")
def shared_run(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp("done")
    write_experiment(home, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["sparc3"])
        patch.setattr(intervals, "NUM_RESAMPLES", FEW)
        verbs = remember_verbs(patch)
        return Done(home, verbs, *run())


@pytest.fixture
def done(shared_run: Done, tmp_path: Path) -> Done:
    """The experiment after it was run, in the folder of the test: what the test writes there is its own."""
    shutil.copytree(shared_run.home, tmp_path, dirs_exist_ok=True)
    return shared_run


@pytest.fixture
def more_inputs(tmp_path, config) -> None:
    """Another file of prompts, and another scorer: a folder of Detoxify's format."""
    shutil.copy("prompts.jsonl", "mild.jsonl")
    shutil.copytree(SHIPPED, tmp_path / "other")


@pytest.fixture
def make_scores(tiny_checkpoint):
    """Return what writes an index of scores of weights of the tiny checkpoint, and returns its path."""
    model = load_model(tiny_checkpoint, torch.float32)
    shapes = {name: list(layer.weight.shape) for name, layer in find_layers(model, ["all"]).items()}
    spec = ScoreSpec("lrp", "attnlrp", "signed", layers=["all"], dtype="float32", granularity="weight")
    of = Provenance(tiny_checkpoint, Checkpoint(tiny_checkpoint).fingerprint, spec, {}, "d", 1, 2, 3, 0)

    def make(seed: int, changes: dict[str, Any] | None = None, **more: Tensor) -> Path:
        gen = torch.Generator().manual_seed(seed)
        scores = {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()} | more
        writer = ShardWriter(Path(f"seed-{seed}"), {name: score.shape for name, score in scores.items()})
        Path(f"seed-{seed}").mkdir(exist_ok=True)
        for name, score in scores.items():
            writer.add(name, score)
        writer.close(with_changes(of, **{"data_fingerprint": f"seed {seed}", **(changes or {})}))
        return Path(f"seed-{seed}", INDEX)

    return make
