"""The command line: help of every verb, of its options and of the data."""

import functools
import inspect
import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from commands import stops

from sparc3_lightning.cli import VERBS, main
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.chat import Chat
from sparc3_lightning.stages.circuit import Circuit
from sparc3_lightning.stages.compare import Comparison
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.experiment import Experiment
from sparc3_lightning.stages.export import Export
from sparc3_lightning.stages.prune import Pruning
from sparc3_lightning.stages.sweep import Sweep

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")


@pytest.fixture(scope="module")
def help_of() -> Callable[[str], tuple[Any, str]]:
    """Return a function that returns the exit code and the help text of a verb."""

    @functools.cache
    def ask(verb: str) -> tuple[Any, str]:
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        return done.value.code or 0, out.getvalue()

    return ask


def options_in(help_text: str) -> dict[str, str]:
    """Return the explanation of each option that a help text lists."""
    parts = re.split(r"\n  (?=-)", help_text.partition("\noptions:\n")[2])
    found = {}
    for part in parts:
        names, _, explanation = re.sub(r"\s+", " ", part.strip().replace("\n", "  ", 1)).partition(" (type:")
        name = re.search(r"--[\w.]+", part)
        if name:
            found[name.group()] = re.sub(r"^(-\S+( [^\s,]+)?,? ?)+", "", names).strip() + explanation[:0]
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_exits_with_0_and_says_what_the_verb_does(help_of, verb):
    code, out = help_of(verb)
    assert code == 0
    sentence_of_verb = {
        "prepare": "Fetch everything",
        "attribute": "Score the neurons",
        "prune": "Select the neurons",
        "evaluate": "Measure perplexity and toxicity",
        "sweep": "Measure toxicity against perplexity",
        "compare": "Compare the pruned neurons",
        "circuit": "Take the least relevant components out",
        "compress": "Set the weights of the lowest scores to zero",
        "export": "Write a list of neurons, heads or weights into a plain checkpoint",
        "chat": "Answer prompts with the model as it is",
        "report": "Draw page, pictures and model card",
        "reproduce": "Measure an evaluation again from its results.json",
        "run": "Carry out the whole experiment",
    }[verb]
    assert sentence_of_verb in out
    assert "--optimizer" not in out
    if verb == "report":
        assert re.search(r"\n  folder +Of a run of evaluate, sweep", out)
        assert not re.search("--(trainer|model|data|seed_everything)", out)
        return
    if verb == "reproduce":
        assert re.search(r"\n  results +The results.json of evaluate, sweep or run", out)
        assert "--trainer.accelerator" in out
        assert not re.search("--(model|data|seed_everything)", out)
        return
    for option in ("--config", "--print_config", "--seed_everything", "--trainer.logger", "--trainer.accelerator"):
        assert option in out
    assert "a config is as trusted as code" in out
    assert out.startswith(f"usage: sparc3 {verb} [--config FILE]"), "not the names of all options"


@pytest.mark.parametrize(
    ("verb", "group", "of", "hidden"),
    [
        ("attribute", "model", Attribution, set()),
        ("prune", "model", Pruning, set()),
        ("evaluate", "model", Evaluation, set()),
        ("sweep", "model", Sweep, {"options"}),
        ("compare", "model", Comparison, set()),
        ("circuit", "model", Circuit, set()),
        ("compress", "model", Compression, set()),
        ("export", "model", Export, set()),
        ("chat", "model", Chat, set()),
        ("prepare", "model", Experiment, set()),
        ("run", "model", Experiment, set()),
        ("run", "attribute", Attribution, {"checkpoint", "dtype", "revision"}),
        ("run", "prune", Pruning, {"general", "behavior", "harmless"}),
        ("run", "evaluate", Evaluation, {"checkpoint", "dtype", "revision", "neurons"}),
    ],
)
def test_help_explains_each_option_with_its_default(help_of, verb, group, of, hidden):
    _, out = help_of(verb)
    explained = options_in(out)
    defaults = {}
    for name, parameter in inspect.signature(of.__init__).parameters.items():
        if name == "self" or name in hidden:
            assert f"--{group}.{name}" not in explained
        elif is_dataclass(parameter.default):
            first, *_ = str(inspect.getdoc(parameter.default)).split("\n")
            assert f"\n{first.removesuffix('.')}:\n  --{group}.{name} CONFIG" in out, "the group has its own heading"
            defaults |= {f"{name}.{field.name}": field.default for field in fields(parameter.default)}
        else:
            defaults[name] = parameter.default
    for name, default in defaults.items():
        option = f"--{group}.{name}"
        assert option in explained, option
        assert len(explained[option].split()) >= 2, f"{option} is not explained"
        entry = re.sub(r"\s+", " ", out[out.index(f"\n  {option} ") :].split("\n  --")[1])
        assert ("required" if default is inspect.Parameter.empty else "default: ") in entry, option


def test_help_of_sweep_explains_the_options_of_evaluate_too(help_of):
    explained = {verb: options_in(help_of(verb)[1]) for verb in ("evaluate", "sweep")}
    ours = {name for name in explained["evaluate"] if name.startswith("--model.")}
    assert len(ours) > 15
    own = {f"--model.{name}" for name in inspect.signature(Sweep.__init__).parameters} - {
        "--model.self",
        "--model.options",
    }
    assert {name for name in explained["sweep"] if name.startswith("--model.")} == ours | own
    assert {"--model.names", "--model.max_perplexity_increase"} <= own - ours
    same = {name for name in ours if not name.startswith(tuple(own))}
    assert "--model.sampling.top_p" in same
    assert all(explained["sweep"][name] == explained["evaluate"][name] for name in same)


@pytest.mark.parametrize("name", ["C4", "ToxicPrompts"])
def test_help_of_the_data_explains_each_option(capsys, name):
    code, out, _ = stops(capsys, "attribute", f"--data.help={name}")
    assert code == 0
    for option in ("source", "num_samples", "batch_size", "tokenizer"):
        assert re.search(rf"--data.{option} \w+\s+\S+ \S+", out), option


def test_help_of_the_evaluation_data_explains_each_option(capsys):
    _, out, _ = stops(capsys, "evaluate", "--data.text.help")
    assert all(f"--data.text.{option}" in out for option in ("window", "stride", "conventions"))
    _, out, _ = stops(capsys, "evaluate", "--data.prompts.help")
    assert all(f"--data.prompts.{option}" in out for option in ("num_prompts", "min_toxicity", "seed"))


def test_help_of_the_program_lists_the_verbs(capsys):
    code, out, _ = stops(capsys, "--help")
    assert code == 0
    assert all(re.search(rf"\n +{verb} +\w+", out) for verb in VERBS)
