"""The command line: configs and overlays, what is saved, and how errors look."""

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import stops
from experiments import pretend
from helpers import sentence

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.cli import VERBS, entry_point, main
from sparc3_lightning.distributed import usable_accelerator

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")

LOGS = Path("lightning_logs")
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
TEXT = {
    "class_path": "sparc3_lightning.data.WikiText2",
    "init_args": {"source": "text.txt", "window": 32, "stride": 16},
}
PROMPTS = {
    "class_path": "sparc3_lightning.data.RealToxicityPrompts",
    "init_args": {"source": "prompts.jsonl", "num_prompts": 5, "min_toxicity": 0.2},
}


@pytest.fixture(autouse=True)
def input_files(tmp_path) -> None:
    write_inputs(tmp_path)


def write_inputs(folder: Path) -> None:
    (folder / "general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(10)) + "\n")
    (folder / "text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(6)) + "\n")
    rows = [{"prompt": {"text": sentence(100 + i, 3 + i % 7), "toxicity": i / 19}} for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def config_of(capsys, *args: str) -> dict[str, Any]:
    """Return what a command would run with."""
    code, out, err = stops(capsys, *args, "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)


def attribute(checkpoint: str, *changes: str) -> Path:
    """Attribute on four documents, and return the folder of the run."""
    data = ["--data", "C4", "--data.source", "general.txt", "--data.num_samples", "4", "--data.seq_len", "12"]
    done = main(["attribute", *QUIET, "--model.checkpoint", checkpoint, *data, *changes])
    return Path(done.trainer.log_dir)


def attribute_toxic(checkpoint: str) -> Path:
    data = ["--data", "ToxicPrompts", "--data.source", "prompts.jsonl", "--data.min_toxicity", "0.5"]
    done = main(["attribute", *QUIET, "--model.checkpoint", checkpoint, *data, "--data.num_samples", "4"])
    return Path(done.trainer.log_dir)


def prune(checkpoint: str, *changes: str) -> Path:
    general, behavior = attribute(checkpoint), attribute_toxic(checkpoint)
    files = [
        "--model.general",
        f"[{general / 'scores.safetensors'}]",
        "--model.behavior",
        str(behavior / "scores.safetensors"),
    ]
    done = main(
        ["prune", *QUIET, *files, "--model.num_neurons", "5", "--model.min_differential_strength", "-1000", *changes]
    )
    return Path(done.trainer.log_dir)


def evaluate(checkpoint: str, *changes: str) -> Path:
    Path("data.yaml").write_text(yaml.safe_dump({"data": {"text": TEXT, "prompts": PROMPTS}}))
    model = ["--model.checkpoint", checkpoint, "--model.scorers", "[small]", "--model.sampling.max_new_tokens", "5"]
    done = main(["evaluate", "--config", "data.yaml", *QUIET, *model, "--model.controls.num_draws", "0", *changes])
    return Path(done.trainer.log_dir)


@pytest.fixture(scope="module")
def shared_home(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("joined")
    write_inputs(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["sparc3"])
        neurons = prune(tiny_checkpoint) / "neurons.json"
        evaluate(tiny_checkpoint, "--model.neurons", str(neurons), "--seed_everything", "5")
    return home


@pytest.fixture
def joined(shared_home: Path, tmp_path: Path) -> dict[str, Path]:
    """Two attributions, a pruning and an evaluation with seed 5, in the folder of the test; returns their folders."""
    shutil.copytree(shared_home, tmp_path, dirs_exist_ok=True)
    return {f"{path.parent.name} {path.name[-1]}": path for path in LOGS.glob("*/*")}


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("attribute", "lrp.yaml"),
        ("evaluate", "evaluate.yaml"),
        ("run", "demo.yaml"),
        ("prepare", "run.yaml"),
        ("prune", "prune.yaml"),
        ("sweep", "sweep.yaml"),
    ],
)
@pytest.mark.few(2)
def test_a_printed_config_parses_to_itself(capsys, verb, config):
    required = {"prune": ["--model.general", "[a, b]", "--model.behavior", "c"], "sweep": ["--model.neurons", "n.json"]}
    code, out, _ = stops(capsys, verb, "--config", config, *required.get(verb, []), "--print_config")
    assert code == 0
    Path("printed.yaml").write_text(out)
    assert config_of(capsys, verb, "--config", "printed.yaml") == yaml.safe_load(out)


def test_a_bare_name_is_found_among_the_shipped_configs_and_a_local_file_comes_first(capsys):
    assert config_of(capsys, "attribute", "-c", "wanda.yaml")["model"]["method"] == "wanda"
    Path("configs").mkdir()
    Path("configs/wanda.yaml").write_text("model: {checkpoint: mine, method: lrp}\ndata: ToxicPrompts\n")
    assert config_of(capsys, "attribute", "-c", "wanda.yaml")["model"]["checkpoint"] == "mine"
    Path("wanda.yaml").write_text("model: {checkpoint: nearer, method: lrp}\ndata: ToxicPrompts\n")
    assert config_of(capsys, "attribute", "-c", "wanda.yaml")["model"]["checkpoint"] == "nearer"


def test_a_config_that_is_not_there_is_an_error_that_names_it(capsys):
    code, _, err = stops(capsys, "attribute", "--config", "nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml" in err


def test_later_configs_and_options_beat_earlier_ones(capsys):
    Path("first.yaml").write_text(
        "model: {checkpoint: one, rule: cp_lrp, dtype: float32}\ndata: C4\nseed_everything: 1\n"
    )
    Path("second.yaml").write_text("model: {checkpoint: two, dtype: float64}\n")
    both = config_of(capsys, "attribute", "-c", "first.yaml", "-c", "second.yaml")
    assert (both["model"]["checkpoint"], both["model"]["rule"], both["model"]["dtype"]) == ("two", "cp_lrp", "float64")
    assert both["seed_everything"] == 1
    assert config_of(capsys, "attribute", "-c", "second.yaml", "-c", "first.yaml")["model"]["checkpoint"] == "one"
    option = ["--model.checkpoint", "three"]
    assert config_of(capsys, "attribute", "-c", "first.yaml", *option)["model"]["checkpoint"] == "three"
    assert config_of(capsys, "attribute", *option, "-c", "first.yaml")["model"]["checkpoint"] == "one"


def test_an_overlay_of_one_option_keeps_the_rest_of_the_data(capsys):
    Path("small.yaml").write_text("data: {init_args: {num_samples: 3}}\n")
    data = config_of(capsys, "attribute", "-c", "lrp.yaml", "-c", "small.yaml")["data"]
    assert data["class_path"] == "sparc3_lightning.data.C4"
    assert (data["init_args"]["num_samples"], data["init_args"]["seq_len"]) == (3, 2048)


@pytest.mark.parametrize(
    ("verb", "args", "words"),
    [
        ("attribute", ["--model.chekpoint", "x"], ["model.chekpoint"]),
        ("attribute", ["-c", "lrp.yaml", "--model.rule", "epsilon"], ["model.rule", "attnlrp", "cp_lrp", "epsilon"]),
        ("attribute", ["-c", "lrp.yaml", "--model.method", "grad"], ["model.method", "lrp", "wanda", "grad"]),
        ("attribute", ["-c", "lrp.yaml", "--data.num_sampels", "3"], ["num_sampels"]),
        ("attribute", ["-c", "lrp.yaml", "--data", "Imagenet"], ["Imagenet"]),
        ("attribute", [], ["required", "model.checkpoint", "data"]),
        ("prune", [], ["required", "model.general", "model.behavior"]),
        ("prune", ["-c", "prune.yaml", "--model.weak", "ignore"], ["model.weak", "warn", "error", "ignore"]),
        ("evaluate", ["--model.checkpoint", "x"], ["required", "data.text", "data.prompts"]),
        ("evaluate", ["-c", "evaluate.yaml", "--model.sampling.top_p", "much"], ["model.sampling.top_p", "much"]),
        (
            "evaluate",
            ["-c", "evaluate.yaml", "--model.sampling.protocol", "long"],
            ["model.sampling.protocol", "short", "rtp", "long"],
        ),
        ("evaluate", ["-c", "evaluate.yaml", "--model.temperature", "1"], ["model.temperature"]),
        ("evaluate", ["-c", "evaluate.yaml", "--model.controls", "5"], ["model.controls"]),
        ("evaluate", ["-c", "evaluate.yaml", "--model.doses", "[many]"], ["model.doses", "many"]),
        ("sweep", ["-c", "sweep.yaml"], ["required", "model.neurons"]),
        ("sweep", ["-c", "sweep.yaml", "--model.neurons", "n", "--model.dose", "3"], ["model.dose"]),
        ("compare", [], ["required", "model.neurons"]),
        ("compress", [], ["required", "model.general", "model.export"]),
        ("export", [], ["required", "model.neurons", "model.export"]),
        ("chat", [], ["required", "model.neurons"]),
        ("run", [], ["required", "general", "behavior"]),
        ("run", ["-c", "demo.yaml", "--prune.general", "[x]"], ["prune.general"]),
    ],
)
@pytest.mark.few(8)
def test_a_wrong_command_exits_with_2_and_names_what_is_wrong(capsys, verb, args, words):
    code, _, err = stops(capsys, verb, *args)
    assert code == 2
    message = err.partition("error:")[2]
    assert message
    assert all(word in message for word in words), message
    assert "Traceback" not in err
    assert not LOGS.exists()


def test_an_unknown_verb_is_an_error_that_lists_the_verbs(capsys):
    code, _, err = stops(capsys, "explain")
    assert code == 2
    assert all(verb in err for verb in VERBS)


def test_a_typo_in_a_config_file_is_an_error_that_names_it(capsys):
    Path("typo.yaml").write_text("model: {checkpoint: x, rlue: attnlrp}\ndata: C4\n")
    code, _, err = stops(capsys, "attribute", "-c", "typo.yaml")
    assert code == 2
    assert "rlue" in err


def test_the_verbs_joined_by_their_files_carry_out_the_experiment(joined):
    neurons, folder = joined["prune 0"] / "neurons.json", joined["evaluate 0"]
    results = json.loads((folder / "results.json").read_text())
    assert results["num_neurons"] == 5
    assert results["neurons"] == str(neurons)
    assert results["protocol"]["prompts"]["excluded"] == 4
    assert (folder / "report.html").is_file()
    assert sorted(str(path) for path in LOGS.glob("*/*")) == [
        "lightning_logs/attribute/version_0",
        "lightning_logs/attribute/version_1",
        "lightning_logs/evaluate/version_0",
        "lightning_logs/prune/version_0",
    ]
    for saved in LOGS.glob("*/*/config.yaml"):
        assert set(yaml.safe_load(saved.read_text())) <= {"seed_everything", "trainer", "model", "data"}
    assert len(list(LOGS.glob("*/*/config.yaml"))) == 4


def test_the_saved_config_of_an_attribution_gives_the_same_scores(tiny_checkpoint):
    folder = attribute(tiny_checkpoint, "--model.relevance", "signed", "--seed_everything", "3")
    assert folder == LOGS / "attribute/version_0"
    done = main(["attribute", "--config", str(folder / "config.yaml"), "--trainer.logger.init_args.version", "9"])
    again = Path(done.trainer.log_dir)
    assert again == LOGS / "attribute/version_9"
    first, second = (ScoreFile.load(path / "scores.safetensors") for path in (folder, again))
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)
    assert first.provenance == second.provenance
    assert first.provenance.seed == 3
    saved = [yaml.safe_load((path / "config.yaml").read_text()) for path in (folder, again)]
    for config in saved:
        config["trainer"]["logger"]["init_args"].pop("version")
    assert saved[0] == saved[1]


def test_the_saved_configs_of_pruning_and_evaluation_give_the_same_results(joined):
    pruned, evaluated = joined["prune 0"], joined["evaluate 0"]
    main(["prune", "--config", str(pruned / "config.yaml")])
    again = LOGS / "prune/version_1"
    assert (again / "neurons.json").read_text() == (pruned / "neurons.json").read_text()
    assert (again / "selection.json").read_text() == (pruned / "selection.json").read_text()
    main(["evaluate", "--config", str(evaluated / "config.yaml")])
    again = LOGS / "evaluate/version_1"
    assert json.loads((again / "results.json").read_text()) == json.loads((evaluated / "results.json").read_text())
    assert (again / "completions.jsonl").read_text() == (evaluated / "completions.jsonl").read_text()


@pytest.mark.slow
def test_the_saved_config_repeats_a_run_after_which_the_folder_was_removed(tiny_checkpoint):
    folder = attribute(tiny_checkpoint)
    first = ScoreFile.load(folder / "scores.safetensors")
    shutil.copy(folder / "config.yaml", "kept.yaml")
    shutil.rmtree(LOGS)
    main(["attribute", "--config", "kept.yaml"])
    second = ScoreFile.load(folder / "scores.safetensors")
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)


@pytest.mark.slow
def test_prepare_and_run_save_their_config_too(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda args: pretend(args[0], Path(args[2])))
    general = {"class_path": "C4", "init_args": {"source": "general.txt", "num_samples": 3, "seq_len": 12}}
    behavior = {
        "class_path": "ToxicPrompts",
        "init_args": {"source": "prompts.jsonl", "min_toxicity": 0.5, "num_samples": 4},
    }
    options = {
        "model": {"checkpoint": tiny_checkpoint, "general_seeds": [0]},
        "general": general,
        "behavior": behavior,
        "prune": {"num_neurons": 3, "min_differential_strength": -1000.0},
        "evaluate": {"scorers": ["small"], "sampling": {"max_new_tokens": 4}, "controls": {"num_draws": 0}},
        "data": {"text": TEXT, "prompts": PROMPTS},
    }
    Path("all.yaml").write_text(yaml.safe_dump(options))
    for verb in ("prepare", "run"):
        done = main([verb, "--config", "all.yaml", *QUIET])
        saved = yaml.safe_load(Path(done.trainer.log_dir, "config.yaml").read_text())
        assert saved["model"]["checkpoint"] == tiny_checkpoint
        assert saved["general"]["init_args"]["num_samples"] == 3
        assert saved["evaluate"]["sampling"]["max_new_tokens"] == 4
    manifest = json.loads((LOGS / "prepare/version_0/manifest.json").read_text())
    main(["prepare", "--config", str(LOGS / "prepare/version_0/config.yaml")])
    assert json.loads((LOGS / "prepare/version_1/manifest.json").read_text()) == manifest


def scalars(folder: Path) -> dict[str, float]:
    """Read what TensorBoard would show of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_progress_of_an_attribution_and_the_figures_of_the_other_stages(joined):
    assert scalars(joined["attribute 0"])["samples"] == 4
    pruned, evaluated = joined["prune 0"], joined["evaluate 0"]
    results = json.loads((evaluated / "results.json").read_text())
    mean = results["pruned"]["groups"]["toxic"]["behavior_mean"]
    assert scalars(evaluated)["baseline/perplexity"] == pytest.approx(
        results["baseline"]["perplexity"]["sliding"]["value"]
    )
    assert scalars(evaluated)["pruned/behavior_mean"] == pytest.approx(mean)
    selection = json.loads((pruned / "selection.json").read_text())
    expected = pytest.approx(selection["differential_strength_percent"], rel=1e-5)
    assert scalars(pruned)["differential_strength_percent"] == expected


def test_the_seed_is_an_option_and_0_by_default(tiny_checkpoint, capsys):
    assert config_of(capsys, "attribute", "-c", "wanda.yaml", "--seed_everything", "7")["seed_everything"] == 7
    assert ScoreFile.load(attribute(tiny_checkpoint) / "scores.safetensors").provenance.seed == 0


@pytest.mark.slow
def test_a_run_goes_into_a_folder_of_its_own(tiny_checkpoint):
    assert [attribute(tiny_checkpoint).name for _ in range(2)] == ["version_0", "version_1"]
    logger = ["--trainer.logger.init_args.save_dir", "elsewhere", "--trainer.logger.init_args.version", "1234"]
    folder = attribute(tiny_checkpoint, *logger)
    assert folder.parts[:2] == ("elsewhere", "attribute")
    assert (folder / "scores.safetensors").is_file()


def test_on_an_apple_gpu_which_has_no_float64_the_cpu_is_used(monkeypatch, tiny_checkpoint):
    for given in ("auto", "gpu", "cpu"):
        assert usable_accelerator(given) == given
    monkeypatch.setattr("lightning.pytorch.accelerators.MPSAccelerator.is_available", lambda: True)
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", lambda: False)
    assert usable_accelerator("auto") == usable_accelerator("cpu") == "cpu"
    for given in ("gpu", "mps"):
        with pytest.raises(ValueError, match=f"--trainer.accelerator {given}: an Apple GPU has no float64.* Use cpu"):
            usable_accelerator(given)
    folder = attribute(tiny_checkpoint, "--trainer.accelerator", "auto")
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["accelerator"] == "cpu"


def test_an_error_at_the_shell_is_one_sentence_and_exit_code_1(monkeypatch, capsys):
    args = ["sparc3", "prune", "--model.general", "[a]", "--model.behavior", "b", "--model.num_neurons", "0"]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as done:
        entry_point()
    assert str(done.value.code).startswith("sparc3: error: --model.num_neurons must be at least 1, got 0.")
    monkeypatch.setenv("SPARC3_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"--model.num_neurons must be at least 1"):
        entry_point()


@pytest.mark.slow
def test_a_missing_score_file_in_a_real_shell_is_one_sentence_without_a_traceback(tmp_path):
    program = Path(sysconfig.get_path("scripts")) / "sparc3"
    command = [str(program), "prune", "--model.general", "[nowhere.safetensors]", "--model.behavior", "b.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert done.stdout == ""
    # Lightning may warn above it, for example that srun is there but was not used.
    message, hint = done.stderr.strip().splitlines()[-2:]
    assert message == "sparc3: error: The score file nowhere.safetensors does not exist; 'sparc3 attribute' writes it."
    assert hint == "(SPARC3_TRACEBACK=1 shows where it was raised.)"
    assert done.stderr.count("sparc3: error:") == 1
    assert "Traceback" not in done.stderr


def test_what_a_name_could_tell_the_terminal_is_shown_in_an_error(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparc3", "report", "\x1b[31mnowhere\x9b\u202e"])
    with pytest.raises(SystemExit) as done:
        entry_point()
    assert str(done.value.code).startswith(r"sparc3: error: \x1b[31mnowhere\x9b\u202e holds none of experiment.json")
