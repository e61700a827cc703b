"""What the README says of additions: a toy scorer, data set and verb, each by its own file and one row of a table."""

import re
from pathlib import Path

import lightning as L
import pytest
from helpers import sentence

from sparc3_lightning import Evaluation, ScoreFile, cli, data, load_scorer
from sparc3_lightning.data.base import ReferenceSamples, Sample
from sparc3_lightning.scorers import registry
from sparc3_lightning.scorers.base import Scorer
from sparc3_lightning.scorers.registry import check_scorer, fetch_scorer

QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(autouse=True)
def as_if_from_a_shell(monkeypatch):
    """Restore the seed that a run sets, and keep pytest's own arguments out of LightningCLI's sight."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


class Shouting(Scorer):
    """The share of capital letters."""

    words = ("shouting",)

    def score(self, texts):
        return [sum(c.isupper() for c in text) / max(len(text), 1) for text in texts]


class Greetings(ReferenceSamples):
    """Sentences of one length.

    Args:
        num_samples: How many.
    """

    def __init__(self, num_samples: int = 4) -> None:
        super().__init__(None, None, 2)
        self.save_hyperparameters(logger=False)
        self.num_samples = num_samples

    def prepare_data(self) -> None:
        pass

    def read_samples(self, tokenizer):
        return [Sample(str(i), tokenizer(sentence(i, 5))["input_ids"]) for i in range(self.num_samples)]


class Counting(L.LightningModule):
    """Counts.

    Args:
        number: How far.
    """

    def __init__(self, number: int = 3) -> None:
        super().__init__()
        self.number = number

    def count(self, folder: Path) -> None:
        (folder / "count.txt").write_text(str(self.number))


def test_a_scorer_is_a_class_and_a_row_of_the_table(monkeypatch):
    with pytest.raises(ValueError, match=r"--model.scorer: 'shouting' is neither 'small'"):
        check_scorer("shouting")
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS, Shouting])
    assert fetch_scorer("shouting") == []
    assert load_scorer("shouting").score(["ABab", "ab", ""]) == [0.5, 0.0, 0.0]
    Evaluation("x", scorer="shouting")
    with pytest.raises(ValueError, match=r"'whispering' is neither 'small', .*, shouting, nor a folder"):
        check_scorer("whispering")


def test_a_data_set_is_a_class_and_a_line_of_the_room(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(data, "Greetings", Greetings, raising=False)
    options = ["--model.checkpoint", tiny_checkpoint, "--data", "Greetings", "--data.num_samples", "3"]
    cli.main(["attribute", *QUIET, *options])
    assert ScoreFile.load(Path("scores.safetensors")).provenance.num_samples == 3


def test_a_verb_is_a_module_and_a_row_of_the_command_line_with_its_method(monkeypatch):
    monkeypatch.setitem(cli.STAGES, "count", cli.Stage(Counting))
    monkeypatch.setattr(cli.SparC3Trainer, "count", lambda self, model: model.count(Path()), raising=False)
    cli.main(["count", *QUIET, "--model.number", "5"])
    assert Path("count.txt").read_text() == "5"


def test_the_readme_names_files_that_are_there():
    section = README.partition("## Where to add what\n")[2]
    named = re.findall(r"\]\(([^)]+)\)", section)
    assert named
    assert [name for name in named if not (Path(__file__).parents[1] / name).is_file()] == []
    assert "\n## " not in section, "it is not the last section"
