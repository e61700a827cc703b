"""What is answered before any library is loaded: the list of the verbs, the version, and a verb that is unknown."""

import inspect
import re
import subprocess
import sys
import time

import pytest

import sparc3_lightning
from sparc3_lightning.cli import STAGES, SparC3Trainer
from sparc3_lightning.stages.verbs import VERBS, answer, nearest

LOADED = """
import sys
from sparc3_lightning.__main__ import entry_point
for given in (["--help"], ["-h"], ["--version"], [], ["evalute"], ["-v", "--help"]):
    sys.argv = ["sparc3", *given]
    try:
        entry_point()
    except SystemExit:
        pass
print("loaded:", sorted({"torch", "lightning", "jsonargparse", "transformers", "rich"} & set(sys.modules)))
"""
NEEDED = """
import gc, sys
from sparc3_lightning.__main__ import entry_point
for verb in ("attribute", "evaluate", "run"):
    sys.argv = ["sparc3", verb, "--help"]
    try:
        entry_point()
    except SystemExit:
        pass
late = {"datasets", "pandas", "pyarrow", "sklearn", "detoxify", "lxt", "zennit", "lm_eval", "gguf", "pip"}
late |= {"transformers.generation.utils"}
print("loaded:", sorted(late & set(sys.modules)), gc.isenabled())
"""


def answered(capsys, *arguments: str) -> tuple[int, str, str]:
    """Return the exit code and what was printed."""
    with pytest.raises(SystemExit) as done:
        answer(arguments)
    printed = capsys.readouterr()
    return int(done.value.code or 0), printed.out, printed.err


def test_a_verb_is_said_to_do_what_the_docstring_of_its_method_says():
    assert {name: str(inspect.getdoc(getattr(SparC3Trainer, name))).split("\n")[0] for name in VERBS} == VERBS
    assert set(STAGES) < set(VERBS)


@pytest.mark.parametrize("before", [[], ["-v"], ["--verbose", "-v"]])
@pytest.mark.parametrize("given", ["-h", "--help"])
def test_help_lists_the_verbs_and_the_options_of_the_program(capsys, monkeypatch, given, before):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = answered(capsys, *before, given)
    assert (code, err) == (0, "")
    assert out.startswith("usage: sparc3 <verb> ")
    said = " ".join(out.split())
    assert all(f" {verb} {line} " in said for verb, line in VERBS.items())
    assert all(option in out for option in ("--help", "--version", "--verbose", "--print_completion"))
    assert max(map(len, out.splitlines())) <= 80


def test_the_version_is_shown(capsys):
    assert answered(capsys, "--version") == (0, f"sparc3 {sparc3_lightning.__version__}\n", "")
    assert answered(capsys, "-v", "--version", "evaluate")[0] == 0


def test_without_a_verb_the_help_is_shown_as_an_error(capsys):
    for given in ([], ["-v"], ["--verbose"]):
        code, out, err = answered(capsys, *given)
        assert (code, out) == (2, "")
        assert re.search(r"\n  evaluate +Measure", err)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("evalute", "evaluate"),
        ("Evaluate", "evaluate"),
        ("EVAL", "evaluate"),
        ("pruen", "prune"),
        ("attribution", "attribute"),
        ("reprodcue", "reproduce"),
        ("help", "--help"),
        ("--hlep", "--help"),
        ("--verison", "--version"),
        ("--print-completion", "--print_completion"),
        ("-c", ""),
        ("--config", ""),
        ("-run", ""),
        ("explain", ""),
        ("", ""),
        ("--model.checkpoint", ""),
        ("\x1b[31mprune", "prune"),
    ],
)
def test_an_unknown_verb_or_option_suggests_the_nearest_and_lists_the_verbs(capsys, given, meant):
    code, out, err = answered(capsys, "-v", given, "--help")
    assert (code, out) == (2, "")
    suggested = re.search(r"did you mean (\S+)\?", err)
    assert (suggested[1] if suggested else "") == meant
    assert err.startswith(f"sparc3: error: {given!r} is no {'option' if given.startswith('-') else 'verb'}")
    assert all(verb in err for verb in VERBS)
    assert "\x1b" not in err


@pytest.mark.parametrize("given", [["evaluate"], ["-v", "run", "--help"], ["--print_completion=shtab-zsh"]])
def test_everything_else_is_left_to_the_verb(given):
    answer(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--model.neuron", "--model.neurons"),
        ("--Model.Neurons", "--model.neurons"),
        ("--model.num-neurons", "--model.num_neurons"),
        ("--model.nuerons", "--model.neurons"),
        ("--modle.neurons", "--model.neurons"),
        ("--neurons", "--model.neurons"),
        ("--prune.top_p", "--model.sampling.top_p"),
        ("--seed", "--seed_everything"),
        ("--quux", None),
        ("--", None),
    ],
)
def test_the_nearest_option_is_found_by_its_end_its_beginning_or_its_letters(given, meant):
    known = ["--model.neurons", "--model.num_neurons", "--model.sampling.top_p", "--seed_everything", "-c"]
    assert nearest(given, known) == meant


@pytest.mark.slow
def test_help_version_and_a_wrong_verb_take_no_time_and_load_no_library():
    said = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout
    assert said.endswith("loaded: []\n")
    seconds = []
    for given in ("--help", "--version", "evalute") * 2:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sparc3_lightning", given], capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@pytest.mark.slow
def test_the_options_of_a_verb_are_known_without_what_only_its_work_needs():
    said = subprocess.run([sys.executable, "-c", NEEDED], check=True, capture_output=True, text=True).stdout
    assert said.endswith("loaded: [] True\n"), said[-300:]
