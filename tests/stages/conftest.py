"""What tests of several stages need: the files and neurons of an evaluation, and what is to take no time."""

from pathlib import Path

import pytest
from evaluations import EVERY_SECOND, save_neurons, write_inputs

from sparc3_lightning.report import page as report
from sparc3_lightning.stages import evaluate


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
def without_a_report(monkeypatch):
    """Spare the pictures, which take longer than the figures of a model so tiny."""
    monkeypatch.setattr(report, "write_report", lambda *_: None)


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_args, **_kwargs):
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(evaluate, "load_for", fail)
    monkeypatch.setattr(evaluate, "load_scorer", fail)
