"""The command line: an unknown option suggests the nearest, wherever it stands; none is guessed from its beginning."""

import subprocess
from pathlib import Path

import pytest
import yaml
from commands import stops

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")


def refused(capsys, *args: str) -> str:
    """Return what is said of a wrong command."""
    code, out, err = stops(capsys, *args)
    assert (code, out) == (2, "")
    return err.partition("error: ")[2].removesuffix("\n").replace(", Greetings", "")  # a class of another test


@pytest.mark.parametrize(
    ("verb", "given", "meant"),
    [
        ("evaluate", "--model.neuron", "--model.neurons"),  # argparse would take it for the one that begins so
        ("evaluate", "--Model.neurons", "--model.neurons"),
        ("evaluate", "--model.nuerons", "--model.neurons"),
        ("evaluate", "--modl.neurons", "--model.neurons"),
        ("evaluate", "--neurons", "--model.neurons"),
        ("evaluate", "-model.neurons", "--model.neurons"),
        ("evaluate", "--model.scorer", "--model.scorers"),
        ("evaluate", "--model.samplign.top_p", "--model.sampling.top_p"),
        ("evaluate", "--model.top_p", "--model.sampling.top_p"),
        ("evaluate", "--data.txt", "--data.text"),
        ("evaluate", "--trainer.devics", "--trainer.devices"),
        ("evaluate", "--seed", "--seed_everything"),
        ("evaluate", "--hlep", "--help"),
        ("prune", "--model.num-neurons", "--model.num_neurons"),
        ("run", "--genral", "--general"),
        ("run", "--model.num_neurons", "--prune.num_neurons"),
        ("run", "--prune.budget.rfine", "--prune.budget.refine"),
        ("attribute", "--trainer.hlep", "--trainer.help"),
    ],
)
@pytest.mark.few(5)
def test_an_unknown_option_suggests_the_nearest(capsys, verb, given, meant):
    for args in ([given, "3"], [f"{given}=3"]):
        assert refused(capsys, verb, *args) == f"unrecognized option {given}: did you mean {meant}?"


def test_an_option_of_another_verb_is_said_to_be_one(capsys):
    said = "unrecognized option --model.num_neurons: it is one of 'sparc3 prune'."
    assert refused(capsys, "evaluate", "--model.num_neurons", "3") == said
    said = "unrecognized option --model.checkpoint: it is one of 'sparc3 attribute'."
    assert refused(capsys, "report", "folder", "--model.checkpoint", "x") == said


def test_an_option_that_is_like_none_suggests_none_and_every_unknown_one_is_named(capsys):
    assert refused(capsys, "evaluate", "--quux=1") == "unrecognized option --quux."
    said = "unrecognized option --quux.\nunrecognized option --model.nuerons: did you mean --model.neurons?"
    assert refused(capsys, "evaluate", "--quux", "1", "--model.nuerons", "2") == said


@pytest.mark.parametrize(
    ("verb", "config", "said"),
    [
        ("evaluate", {"model": {"neuron": "x"}}, "--model.neuron: did you mean --model.neurons?"),
        ("attribute", {"model": {"checkpoint": "x", "rlue": "y"}}, "--model.rlue: did you mean --model.rule?"),
        ("attribute", {"modle": {"checkpoint": "x"}}, "--modle.checkpoint: did you mean --model.checkpoint?"),
        (
            "evaluate",
            {"model": {"sampling": {"topp": 1}}},
            "--model.sampling.topp: did you mean --model.sampling.top_p?",
        ),
        ("run", {"prune": {"budgt": {"refine": 1}}}, "--prune.budgt.refine: did you mean --prune.budget.refine?"),
        ("evaluate", {"trainer": {"devics": 1}}, "--trainer.devics: did you mean --trainer.devices?"),
        ("evaluate", {"model": {"num_neurons": 1}}, "--model.num_neurons: it is one of 'sparc3 prune'."),
        ("evaluate", {"quux": 1}, "--quux."),
        ("evaluate", {"verbose": True}, "--verbose."),
        ("evaluate", {"help": True}, "--help."),
    ],
)
@pytest.mark.parametrize("printed", [[], ["--print_config"]])
def test_an_unknown_name_in_a_config_suggests_the_nearest(capsys, verb, config, said, printed):
    Path("typo.yaml").write_text(yaml.safe_dump(config))
    assert refused(capsys, verb, "--config", "typo.yaml", *printed) == f"unrecognized option {said}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"class_path": "C4", "init_args": {"num_sampels": 3}},
            "--data.num_sampels of C4: did you mean --data.num_samples?",
        ),
        ({"class_path": "C4", "init_args": {"quux": 3}}, "--data.quux of C4."),
    ],
)
def test_an_unknown_option_of_a_class_suggests_the_nearest(capsys, data, said):
    Path("typo.yaml").write_text(yaml.safe_dump({"model": {"checkpoint": "x"}, "data": data}))
    assert refused(capsys, "attribute", "-c", "typo.yaml") == f"unrecognized option {said}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["attribute", "-c", "lrp.yaml", "--data.num-samples", "3"],
            "--data.num-samples of C4: did you mean --data.num_samples?",
        ),
        (
            ["attribute", "-c", "lrp.yaml", "--data.init_args.Num_samples", "3"],
            "--data.Num_samples of C4: did you mean --data.num_samples?",
        ),
        (
            ["evaluate", "-c", "evaluate.yaml", "--data.text.windw", "3"],
            "--data.text.windw of WikiText2: did you mean --data.text.window?",
        ),
        (
            ["evaluate", "--trainer.logger.save_dr", "3"],
            "--trainer.logger.save_dr of TensorBoardLogger: did you mean --trainer.logger.save_dir?",
        ),
    ],
)
def test_an_unknown_option_of_a_class_suggests_the_nearest_on_the_command_line(capsys, args, said):
    assert refused(capsys, *args) == f"unrecognized option {said}"


def test_an_option_of_a_class_needs_the_class_first(capsys):
    known = "classes: NoSamples, C4, IOI, ToxicPrompts"
    said = f"--data must be the name of a class, before --data.num_samples; {known}."
    assert refused(capsys, "attribute", "--model.checkpoint", "x", "--data.num_samples", "3") == said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["evaluate", "--data.text", "Nonsense"],
            "--data.text must be the name of a class, got Nonsense; classes: WikiText2.",
        ),
        (
            ["attribute", "--data", "C5"],
            "--data must be the name of a class or null, got C5; classes: NoSamples, C4, IOI, ToxicPrompts.",
        ),
        (
            ["attribute", "--data.source.x", "3"],
            "--data must be the name of a class, before --data.source.x; classes: NoSamples, C4, IOI, ToxicPrompts.",
        ),
        (
            ["evaluate", "--model.neurons.x", "3"],
            "unrecognized option --model.neurons.x: --model.neurons is one value, with no options in it.",
        ),
        (["prune", "--model.behavior.x", "3"], "--model.behavior is one value, with no options in it."),
        (
            ["evaluate", "--model.sampling", "3"],
            "--model.sampling must be a YAML file of options, got 3: or give --model.sampling.<option>, one by one.",
        ),
        (["run", "--config", "demo"], "--config: there is no file demo: did you mean the shipped demo.yaml?"),
        (["run", "-c", "x/demos.yaml"], "--config: there is no file x/demos.yaml: did you mean the shipped demo.yaml?"),
    ],
)
def test_what_a_group_a_class_or_a_file_must_be_is_one_sentence(capsys, args, said):
    assert refused(capsys, *args) == said


def test_a_config_that_is_like_none_is_said_not_to_be_there_and_the_shipped_ones_are_named(capsys):
    said = refused(capsys, "run", "-c", "nowhere.yaml")
    assert said.startswith("--config: there is no file nowhere.yaml: the shipped ones are circuit.yaml, ")
    assert "demo.yaml" in said


def test_a_class_that_is_not_there_is_called_no_class(capsys):
    for data in ("sparc3_lightning.data.C44", "C44"):
        Path("typo.yaml").write_text(yaml.safe_dump({"data": {"class_path": data}}))
        said = refused(capsys, "attribute", "-c", "typo.yaml")
        known = "classes: NoSamples, C4, IOI, ToxicPrompts"
        assert said == f"--data must be the name of a class or null, got {{'class_path': '{data}'}}; {known}."


@pytest.mark.slow
def test_the_completion_for_bash_completes_verbs_options_and_choices(capsys):
    code, script, _ = stops(capsys, "--print_completion", "shtab-bash")
    assert code == 0
    assert len(script) < 1_000_000
    Path("sparc3.bash").write_text(script)
    ask = 'source sparc3.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_sparc3; echo "${COMPREPLY[@]}"'

    def completed(*words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", ask, "bash", "sparc3", *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("e") == ["evaluate", "export"]
    assert completed("run", "--prune.nu") == ["--prune.num_neurons", "--prune.num_ranked"]
    assert completed("attribute", "--data.num") == ["--data.num_samples"]
    assert completed("attribute", "--model.rule", "") == ["attnlrp", "cp_lrp"]
    assert "--trainer.devices" in completed("evaluate", "--trainer.de")
