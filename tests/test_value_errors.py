"""What is said of a value of the wrong type: one sentence with the option, the value and what is allowed."""

import re

import pytest

from sparc3_lightning.cli import main

PRUNE = ["prune", "--model.general", "[a]", "--model.behavior", "b"]
ATTRIBUTE = ["attribute", "--model.checkpoint", "x"]
EVALUATE = ["evaluate", "-c", "evaluate.yaml", "--model.checkpoint", "x"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*PRUNE, "--model.num_neurons", "many"], "--model.num_neurons must be a whole number, got many."),
        ([*PRUNE, "--model.num_neurons", "1.5"], "--model.num_neurons must be a whole number, got 1.5."),
        ([*PRUNE, "--model.weak", "no"], "--model.weak must be one of warn, error, got no."),
        (
            [*PRUNE, "--model.budget.max_perplexity_increase", "x"],
            "--model.budget.max_perplexity_increase must be a number or null, got x.",
        ),
        ([*PRUNE, "--data", "Foo"], "--data must be the name of a class or null, got Foo."),
        (
            [*PRUNE, "--data", "C4", "--data.num_samples", "x"],
            "--data.num_samples must be a whole number, got x.",
        ),
        ([*PRUNE, "--data", "ReferenceSamples"], "--data must be the name of a class or null, got ReferenceSamples."),
        (
            [*PRUNE, "--data.source", "a.txt"],
            "--data must be the name of a class, before --data.source.",
        ),
        (
            [*ATTRIBUTE, "--data.num_samples", "3", "--data", "C4"],
            "--data must be the name of a class, before --data.num_samples.",
        ),
        (
            [*ATTRIBUTE, "--data.init_args.source", "a.txt"],
            "--data must be the name of a class, before --data.source.",
        ),
        (
            ["run", "--config", "run.yaml", "--budget_text.source", "a.txt"],
            "--budget_text must be the name of a class, before --budget_text.source.",
        ),
        (
            [*PRUNE, "--trainer.profiler.filename", "a"],
            "--trainer.profiler must be the name of a class, before --trainer.profiler.filename.",
        ),
        ([*EVALUATE, "--data.prompts.chat", "maybe"], "--data.prompts.chat must be true or false, got maybe."),
        (
            [*EVALUATE, "--data.text.bos", "last"],
            "--data.text.bos must be one of first, every, none or null, got last.",
        ),
        (
            [*EVALUATE, "--data.text.conventions", "foo"],
            "--data.text.conventions must be a list, such as [a, b], got foo.",
        ),
        ([*EVALUATE, "--model.doses", "[1, x]"], "--model.doses must be a whole number, got x."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_one_sentence(command, said, capsys):
    with pytest.raises(SystemExit):
        main(command)
    found = capsys.readouterr().err.rpartition("error: ")[2].strip()
    assert re.sub(r"; classes: [\w, ]+\.$", ".", found) == said


@pytest.fixture
def said_of_config(tmp_path, capsys):
    """Return a function that returns what is said of a config of prune that is refused."""

    def refuse(text: str) -> str:
        config = tmp_path / "mine.yaml"
        config.write_text(text)
        with pytest.raises((SystemExit, ValueError)) as raised:
            main([*PRUNE, "--config", str(config)])
        return (capsys.readouterr().err.rpartition("error: ")[2] or str(raised.value)).strip()

    return refuse


def test_options_of_no_class_in_a_config_are_refused_in_one_sentence(said_of_config):
    said = said_of_config("data:\n  init_args:\n    source: a.txt\n")
    assert "--data must be the name of a class or null, got " in said
    assert "\n" not in said


def test_a_value_of_the_wrong_type_in_a_config_is_refused_in_one_sentence(said_of_config):
    said = said_of_config("model:\n  num_neurons: [3]\n")
    assert said.endswith("--model.num_neurons must be a whole number, got [3].")
    assert "\n" not in said
