"""The figures of a run, whose stages share a model and a tokenizer, are those of the same stages alone."""

import json
from pathlib import Path

import pytest
from experiments import LOGS

from sparc3_lightning import cli
from sparc3_lightning.evaluation.results import Results


@pytest.mark.slow
def test_the_evaluation_of_a_run_has_the_figures_of_the_evaluation_alone(done):
    stages = json.loads((done.folder / "experiment.json").read_text())["stages"]
    within, alone = Path(stages["evaluation"]), LOGS / "again/version_0"
    again = ["--trainer.logger.init_args.name", "again", "--trainer.logger.init_args.version", "0"]
    cli.main(["evaluate", "--config", str(within / "config.yaml"), *again])
    assert (alone / "completions.jsonl").read_bytes() == (within / "completions.jsonl").read_bytes()
    first, second = (Results.load(folder / "results.json") for folder in (within, alone))
    assert (second.models, second.change, second.verdict) == (first.models, first.change, first.verdict)
