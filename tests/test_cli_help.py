"""The command line: help of every verb, of its options and of the data."""

import functools
import inspect
import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass

import pytest
from commands import stops
from lightning import Trainer

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
from sparc3_lightning.stages.stress import Stress
from sparc3_lightning.stages.sweep import Sweep

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")


@pytest.fixture(scope="module")
def help_of() -> Callable[..., str]:
    """Return a function that returns the help text of a verb, or of a group of it, as wide as a terminal is."""

    @functools.cache
    def ask(verb: str, group: str = "", columns: int = 100) -> str:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
            patch.setenv("COLUMNS", str(columns))
            with pytest.raises(SystemExit) as done:
                main([verb, f"--{group}.help" if group else "--help"])
        assert not done.value.code
        return out.getvalue()

    return ask


def in_a_line(text: str) -> str:
    return " ".join(text.split())


def folded_in(help_text: str) -> list[str]:
    """Return the groups that a help text only names."""
    return re.findall(r"\n  --([\w.]+)\.help(?! CLASS)", help_text)


def explained_in(*help_texts: str) -> dict[str, str]:
    """Return what is said of each option, in one line."""
    parts = [part.split("\n\n")[0] for text in help_texts for part in re.split(r"\n  (?=-)", text)[1:]]
    return {re.search(r"--[\w.]+", part)[0]: in_a_line(part) for part in parts}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.few(5)
def test_help_of_every_verb_exits_with_0_and_says_what_the_verb_does(help_of, verb):
    out = help_of(verb)
    sentence_of_verb = {
        "prepare": "Fetch everything",
        "attribute": "Score the neurons",
        "prune": "Select the neurons",
        "evaluate": "Measure perplexity and toxicity",
        "sweep": "Measure toxicity against perplexity",
        "stress": "Measure what is left of an effect",
        "compare": "Compare the pruned neurons",
        "circuit": "Take the least relevant components out",
        "compress": "Set the weights of the lowest scores to zero",
        "export": "Write a list of neurons, channels, heads or weights into a plain checkpoint",
        "chat": "Answer prompts with the model as it is",
        "report": "Draw page, pictures and model card",
        "reproduce": "Measure an evaluation again from its results.json",
        "run": "Carry out the whole experiment",
    }[verb]
    assert sentence_of_verb in in_a_line(out)
    assert "--optimizer" not in out
    if verb == "report":
        assert re.search(r"\n  folder +Of a run of evaluate, sweep", out)
        assert not re.search("--(trainer|model|data|seed_everything)", out)
        return
    if verb == "reproduce":
        assert re.search(r"\n  results +The results.json of evaluate, sweep or run", out)
        assert "--trainer.help" in out
        assert not re.search("--(model|data|seed_everything)", out)
        return
    for option in ("--config", "--print_config", "--seed_everything", "--trainer.help"):
        assert option in out
    assert "--trainer.accelerator" not in out
    assert "a config is as trusted as code" in in_a_line(out)
    assert out.startswith(f"usage: sparc3 {verb} [--config FILE]"), "not the names of all options"


@pytest.mark.parametrize(
    ("verb", "group", "of", "hidden"),
    [
        ("attribute", "model", Attribution, set()),
        ("prune", "model", Pruning, set()),
        ("evaluate", "model", Evaluation, set()),
        ("sweep", "model", Sweep, {"options"}),
        ("stress", "model", Stress, {"options"}),
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
@pytest.mark.few(5)
def test_help_explains_each_option_with_its_default(help_of, verb, group, of, hidden):
    out = help_of(verb)
    texts = [out, *(help_of(verb, folded) for folded in folded_in(out))]
    explained = explained_in(*texts)
    defaults = {}
    for name, parameter in inspect.signature(of.__init__).parameters.items():
        if name == "self" or name in hidden:
            assert f"--{group}.{name}" not in explained
        elif is_dataclass(parameter.default):
            first, *_ = str(inspect.getdoc(parameter.default)).replace("``", "'").split("\n")
            heading = f"{first.removesuffix('.')}: --{group}.{name} CONFIG"
            assert heading in in_a_line("".join(texts)), "the group has its own heading"
            defaults |= {f"{name}.{field.name}": field.default for field in fields(parameter.default)}
        else:
            defaults[name] = parameter.default
    for name, default in defaults.items():
        option = f"--{group}.{name}"
        assert option in explained, option
        said, _, note = explained[option].rpartition(" (")
        assert len(said.split()) >= 4, f"{option} is not explained"
        assert note.startswith("required" if default is inspect.Parameter.empty else "default: "), option


def test_help_of_sweep_explains_the_options_of_evaluate_too(help_of):
    explained = {verb: explained_in(help_of(verb)) for verb in ("evaluate", "sweep")}
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


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.few(5)
def test_help_of_a_verb_is_a_page_of_at_most_100_lines_and_columns(help_of, verb):
    lines = help_of(verb).splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100
    assert not re.search(r"\n\n\n|type:|Union|Optional|Literal|sparc3_lightning\.", "\n".join(lines))
    assert max(map(len, help_of(verb, columns=80).splitlines())) <= 80
    assert help_of(verb, columns=300) == help_of(verb), "long lines are hard to read"


@pytest.mark.parametrize("verb", ["evaluate", "run"])
def test_the_trainers_help_shows_all_its_options_and_no_other(help_of, verb):
    out = help_of(verb, "trainer")
    explained = explained_in(out)
    wanted = {f"--trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters} - {"--trainer.self"}
    assert wanted <= set(explained)
    assert all(name.partition(".")[0] == "--trainer" for name in explained)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("verb", ["prepare", "run"])
def test_help_of_an_experiment_names_the_groups_of_its_stages_and_shows_each_by_itself(help_of, verb):
    out = help_of(verb)
    assert set(folded_in(out)) - {"estimate"} == {"trainer", "attribute", "prune", "evaluate"}
    assert ("estimate" in folded_in(out)) == (verb == "run")
    for group in ("attribute", "prune", "evaluate"):
        assert f"--{group}.dtype" not in out
        shown = explained_in(help_of(verb, group))
        assert all(re.match(rf"--{group}\b", name) for name in shown)
    assert {"--evaluate.scorers", "--evaluate.sampling.top_p", "--evaluate.zero_shot.tasks"} <= set(shown)


def test_the_line_of_an_option_says_what_its_value_is(help_of):
    said = explained_in(help_of("prune"), help_of("evaluate"), help_of("attribute"))
    assert said["--model.weak"].startswith("--model.weak {warn, error} ")
    assert said["--model.general"].startswith("--model.general [PATH, ...] or PATH ")
    assert said["--model.export"].startswith("--model.export PATH ")
    assert said["--model.dampings"].endswith("(default: [1.0])")
    assert said["--model.activations"].startswith("--model.activations {true, false} ")
    assert said["--data.text"] == "--data.text CLASS Text for perplexity. (required; classes: WikiText2)"
    assert said["--config"].startswith("-c, --config FILE ")
    assert said["--print_config"].startswith("--print_config[=flags] ")
    assert said["--data"].startswith("--data CLASS Samples to read (required): a class, ")


@pytest.mark.parametrize("name", ["C4", "ToxicPrompts"])
def test_help_of_the_data_explains_each_option(capsys, name):
    code, out, _ = stops(capsys, "attribute", f"--data.help={name}")
    assert code == 0
    for option in ("source", "num_samples", "batch_size", "tokenizer"):
        assert re.search(rf"--data.{option} \w+\s+\S+ \S+", out), option
    assert out.startswith("Help for "), "no list of all options before it"


def test_help_of_the_evaluation_data_explains_each_option(capsys):
    _, out, _ = stops(capsys, "evaluate", "--data.text.help")
    assert all(f"--data.text.{option}" in out for option in ("window", "stride", "conventions"))
    _, out, _ = stops(capsys, "evaluate", "--data.prompts.help")
    assert all(f"--data.prompts.{option}" in out for option in ("num_prompts", "min_toxicity", "seed"))
