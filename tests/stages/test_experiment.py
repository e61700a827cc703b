"""The whole experiment on the tiny checkpoint: what is written, what is run again and what is not."""

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from helpers import Unshuffled, sentence
from made_up import made_up
from safetensors.torch import load_file, save_file

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.base import HubDataset
from sparc3_lightning.evaluation.zero_shot import ZeroShot
from sparc3_lightning.scorers.detoxify import SHIPPED
from sparc3_lightning.stages import experiment
from sparc3_lightning.stages.experiment import MANIFEST, Experiment

LOGS = Path("lightning_logs")
ALL = ["attribute", "attribute", "attribute", "prune", "evaluate"]


@pytest.fixture(autouse=True)
def as_if_from_python(monkeypatch):
    """Restore the seed that a run sets, and keep pytest's own arguments out of LightningCLI's sight."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


def write_inputs(folder: Path, checkpoint: str) -> Path:
    """A tiny experiment.yaml, with the files it reads."""
    (folder / "general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(12)) + "\n")
    (folder / "text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(10)) + "\n")
    rows = [{"prompt": {"text": sentence(100 + i, 3 + i % 7), "toxicity": i / 19}} for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"checkpoint": checkpoint, "general_seeds": [0, 1]},
        "general": {
            "class_path": "sparc3_lightning.data.C4",
            "init_args": {"source": "general.txt", "num_samples": 4, "seq_len": 16},
        },
        "behavior": {
            "class_path": "sparc3_lightning.data.ToxicPrompts",
            "init_args": {"source": "prompts.jsonl", "min_toxicity": 0.5, "num_samples": 5},
        },
        "prune": {"num_neurons": 6, "min_differential_strength": -1000.0},
        "evaluate": {
            "scorer": "small",
            "sampling": {"max_new_tokens": 5, "temperature": 1.0},
            "controls": {"num_draws": 0},
        },
        "data": {
            "text": {
                "class_path": "sparc3_lightning.data.WikiText2",
                "init_args": {"source": "text.txt", "window": 32, "stride": 16},
            },
            "prompts": {
                "class_path": "sparc3_lightning.data.RealToxicityPrompts",
                "init_args": {"source": "prompts.jsonl", "num_prompts": 6, "min_toxicity": 0.3},
            },
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def config(tmp_path, tiny_checkpoint) -> Path:
    return write_inputs(tmp_path, tiny_checkpoint)


@pytest.fixture
def verbs_run(monkeypatch) -> list[str]:
    """The verbs of the stages that were run, in order."""
    return remember_verbs(monkeypatch)


def remember_verbs(patch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    main = cli.main

    def remembering(args: list[str]) -> Any:
        if args[0] not in ("run", "prepare"):
            seen.append(args[0])
        return main(args)

    patch.setattr(cli, "main", remembering)
    return seen


@pytest.fixture(scope="module")
def options(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All options of the experiment, as the command line hands them on."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("options")
    write_inputs(folder, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["sparc3"])
        patch.setattr(Experiment, "write_plan", lambda _, options, *__: found.update(options))
        cli.main(["run", "--config", "experiment.yaml", "--plan", "plan.txt"])
    return found


def changed(options: dict[str, Any], changes: tuple[str, ...]) -> dict[str, Any]:
    """Return the options with others in place, which are written as on the command line."""
    options = copy.deepcopy(options)
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        *groups, last = name.removeprefix("--").split(".")
        of = options
        for group in groups:
            of = of[group]
        of[last] = yaml.safe_load(value)
    return options


def pretend(verb: str, config: Path) -> None:
    """Compute nothing, but write the file that ends a stage."""
    outputs = {"attribute": "scores.safetensors", "prune": "neurons.json", "evaluate": "results.json"}
    where = yaml.safe_load(config.read_text())["trainer"]["logger"]["init_args"]
    folder = Path(where["save_dir"], where["name"], where["version"])
    folder.mkdir(parents=True)
    (folder / outputs[verb]).write_text(made_up()[0].to_json())
    (folder / "report.html").touch()


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


class Done(NamedTuple):
    """The experiment as it stands in experiment.yaml, run from the command line."""

    home: Path
    verbs: list[str]
    results: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def shared_run(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    home = tmp_path_factory.mktemp("done")
    write_inputs(home, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["sparc3"])
        verbs = remember_verbs(patch)
        yield Done(home, verbs, *run())


@pytest.fixture
def done(shared_run: Done, tmp_path: Path) -> Done:
    """The experiment after it was run, in the folder of the test: what the test writes there is its own."""
    shutil.copytree(shared_run.home, tmp_path, dirs_exist_ok=True)
    return shared_run


def run(*changes: str) -> tuple[dict[str, Any], Path]:
    """Run the experiment, and return its results and the folder they are in."""
    done = cli.main(["run", "--config", "experiment.yaml", *changes])
    folder = Path(done.trainer.log_dir)
    return json.loads((folder / "results.json").read_text()), folder


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("baseline", "pruned", "change", "num_failed")}


def completions(folder: Path) -> list[dict[str, Any]]:
    evaluation = json.loads((folder / "experiment.json").read_text())["stages"]["evaluation"]
    return [json.loads(line) for line in Path(evaluation, "completions.jsonl").read_text().splitlines()]


def test_one_command_carries_out_the_whole_experiment(done, tiny_checkpoint):
    results, folder = done.results, done.folder
    assert done.verbs == ALL
    assert folder == LOGS / "run/version_0"
    assert results["num_neurons"] == 6
    assert results["checkpoint"] == tiny_checkpoint
    assert results["num_failed"] == 0
    for model in ("baseline", "pruned"):
        assert math.isfinite(results[model]["perplexity"]["sliding"]["value"])
        assert 0 <= results[model]["groups"]["toxic"]["behavior_mean"] <= 1
    assert set(results["change"]) == {"perplexity_percent", "behavior_percent"}
    assert "<html" in (folder / "report.html").read_text()
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    assert list(stages) == ["general_0", "general_1", "behavior", "neurons", "evaluation"]
    for name, output in [
        ("general_0", "scores.safetensors"),
        ("neurons", "neurons.json"),
        ("evaluation", "results.json"),
    ]:
        assert Path(stages[name], output).is_file()
        assert Path(stages[name], "config.yaml").is_file()


def test_the_general_seeds_are_attributed_on_different_documents_and_averaged(done):
    stages = json.loads((done.folder / "experiment.json").read_text())["stages"]
    files = [ScoreFile.load(Path(stages[name], "scores.safetensors")) for name in ("general_0", "general_1")]
    assert [file.provenance.data["seed"] for file in files] == [0, 1]
    assert files[0].provenance.sample_ids != files[1].provenance.sample_ids
    behavior = ScoreFile.load(Path(stages["behavior"], "scores.safetensors"))
    neurons = json.loads(Path(stages["neurons"], "neurons.json").read_text())["neurons"]
    first = neurons[0]
    mean = sum(float(file.scores[first["module"]][first["index"]]) for file in files) / 2
    assert first["score"] == pytest.approx(mean - float(behavior.scores[first["module"]][first["index"]]), abs=1e-6)


def test_prompts_that_were_attributed_on_are_not_evaluated_on(done):
    results, folder = done.results, done.folder
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    attributed = set(ScoreFile.load(Path(stages["behavior"], "scores.safetensors")).provenance.sample_ids)
    rows = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows if row["toxicity"] >= 0.5][:5]
    evaluated = {row["prompt"] for row in completions(folder)}
    assert len(evaluated) == 6
    assert len(attributed) == 5
    assert not evaluated & set(texts)
    assert not {row["prompt_id"] for row in completions(folder)} & attributed
    assert results["protocol"]["prompts"]["excluded"] == 5


GENERAL_PROMPTS = """
class_path: sparc3_lightning.data.ToxicPrompts
init_args: {source: prompts.jsonl, min_toxicity: 0.3, num_samples: 4}
"""


@pytest.fixture
def prompts_as_general_samples(config) -> None:
    options = yaml.safe_load(config.read_text())
    options["general"] = yaml.safe_load(GENERAL_PROMPTS)
    config.write_text(yaml.safe_dump(options))


@pytest.mark.usefixtures("prompts_as_general_samples")
def test_prompts_used_as_general_samples_are_not_evaluated_on_either(verbs_run):
    _, folder = run("--model.general_seeds", "[0]", "--data.prompts.init_args.num_prompts", "5")
    assert verbs_run == ["attribute", "attribute", "prune", "evaluate"]
    rows = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    used = [row["text"] for row in rows if row["toxicity"] >= 0.3][:4]
    assert not {row["prompt"] for row in completions(folder)} & set(used)


def test_the_behaviour_can_be_attributed_by_other_options(verbs_run):
    options = ("--model.behavior_attribute", "{target: text, relevance: signed}", "--prune.criterion", "ratio")
    _, folder = run("--attribute.method", "gradient", "--attribute.relevance", "squared", *options)
    assert verbs_run == ALL
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    of = [
        ScoreFile.load(Path(stages[name], "scores.safetensors")).provenance.spec for name in ("general_0", "behavior")
    ]
    assert [(spec.method, spec.target, spec.relevance) for spec in of] == [
        ("gradient", "argmax", "squared"),
        ("gradient", "text", "signed"),
    ]


def must_not_run(verb: str, config: Path) -> None:
    pytest.fail(f"{verb} was run")


@pytest.mark.parametrize("given", ["{tarqet: text}", "{target: texts}", "{save_every: some}"])
def test_an_unknown_option_for_the_behaviour_is_refused_before_any_stage(due, given):
    with pytest.raises(ValueError, match=r"--model\.behavior_attribute: "):
        due("--model.behavior_attribute", given, run_stage=must_not_run)


def test_scores_that_cannot_be_pruned_are_refused_before_any_stage(due):
    with pytest.raises(ValueError, match=r"--attribute\.granularity must be neuron or weight"):
        due("--attribute.granularity", "head", "--attribute.layers", "[o_proj]", run_stage=must_not_run)
    with pytest.raises(ValueError, match=r"--prune\.granularity weight .*--attribute\.granularity weight"):
        due("--prune.granularity", "weight", run_stage=must_not_run)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["--attribute.method", "wanda", "--attribute.target", "text"], r"--attribute\.method wanda has no target"),
        (
            ["--model.behavior_attribute", "{method: wanda, target: text}"],
            r"--attribute\.method wanda has no target: .* \(with --model\.behavior_attribute\)$",
        ),
        (["--evaluate.sampling.num_seeds", "7"], r"--evaluate\.sampling\.num_seeds must divide 1 continuations, got 7"),
        (["--evaluate.scorer", "orignal"], r"--evaluate\.scorer: 'orignal' is neither"),
        (["--evaluate.second_scorer", "orignal"], r"--evaluate\.second_scorer: 'orignal' is neither"),
        (["--evaluate.sampling.top_p", "2"], r"--evaluate\.sampling\.top_p must be above 0"),
        (["--evaluate.controls.num_draws", "-1"], r"--evaluate\.controls\.num_draws must be at least 0"),
        (["--evaluate.doses", "[3, 11]", "--prune.num_ranked", "10"], r"--evaluate\.doses .* --prune\.num_ranked 11\."),
        (["--evaluate.doses", "[3, 3]"], r"--evaluate\.doses must be different"),
        (["--evaluate.doses", "[3]", "--evaluate.dampings", "[2]"], r"--evaluate\.dampings must be above 0"),
        (["--evaluate.dampings", "[0.5]"], r"--evaluate\.dampings \[0.5\] is for --evaluate\.doses"),
        (
            ["--evaluate.zero_shot.tasks", "[mine]", "--evaluate.zero_shot.folder", "nowhere"],
            r"--evaluate\.zero_shot\.folder: nowhere is no folder",
        ),
        (
            ["--prune.dampings", "[0.5, 1]"],
            r"Several --prune\.dampings.* need --prune\.budget\.max_perplexity_increase",
        ),
        (["--prune.export", "general.txt"], r"--prune\.export: general.txt exists already"),
        (
            ["--prune.budget.max_perplexity_increase", "0.1"],
            r"--prune\.budget\.max_perplexity_increase needs a text: .*'budget_text'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_later_stage_would_refuse_is_refused_before_any_stage_and_by_the_plan(due, plan, changes, error):
    with pytest.raises(ValueError, match=error):
        due(*changes, run_stage=must_not_run)
    with pytest.raises(ValueError, match=error):
        plan(*changes)
    assert not Path("plan.txt").exists()


def test_doses_and_strengths_that_the_pruning_will_list_are_planned(due):
    assert due("--evaluate.doses", "[10]", "--evaluate.dampings", "[1, 0.5]", "--prune.num_ranked", "10") == ALL
    due("--evaluate.doses", "[12]", "--prune.num_neurons", "12", "--prune.num_ranked", "10")


def test_an_exported_checkpoint_of_a_stage_that_is_done_is_no_obstacle(due):
    due("--prune.export", "exported")
    Path("exported").mkdir()
    assert due("--prune.export", "exported") == []


def test_several_seeds_of_samples_that_no_seed_changes_are_refused_before_any_stage(due):
    with pytest.raises(
        ValueError, match=r"--general: .*ToxicPrompts .*--model.general_seeds must be one seed, got \[0, 1\]"
    ):
        due("--general", GENERAL_PROMPTS, run_stage=must_not_run)


def test_a_second_run_repeats_no_stage_and_gives_the_same_numbers(done, verbs_run, caplog):
    first, folder = done.results, done.folder
    stages = [path for verb in ("attribute", "prune", "evaluate") for path in (LOGS / verb).rglob("*")]
    written = {path: path.stat().st_mtime_ns for path in stages if path.is_file()}
    with caplog.at_level("INFO"):
        second, other = run()
    assert verbs_run == []
    assert second == first
    assert other != folder
    assert (other / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    assert caplog.text.count("done before") == 5


def test_the_whole_experiment_run_again_from_nothing_gives_the_same_numbers(done):
    lines = completions(done.folder)
    shutil.rmtree(LOGS)
    second, folder = run()
    assert figures(second) == figures(done.results)
    assert completions(folder) == lines


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--prune.num_neurons", "7"], ["prune", "evaluate"]),
        (["--evaluate.sampling.max_new_tokens", "6"], ["evaluate"]),
        (["--evaluate.controls.num_draws", "1"], ["evaluate"]),
        (["--evaluate.doses", "[3]"], ["evaluate"]),
        (["--evaluate.sampling.protocol", "rtp"], ["evaluate"]),
        (["--prune.num_ranked", "7"], ["prune", "evaluate"]),
        (["--data.prompts.init_args.num_prompts", "5"], ["evaluate"]),
        (["--behavior.init_args.num_samples", "4"], ["attribute", "prune", "evaluate"]),
        (["--attribute.relevance", "signed"], ALL),
        (["--seed_everything", "1"], ALL),
        (["--model.general_seeds", "[0,1,2]"], ["attribute", "prune", "evaluate"]),
        (["--trainer.enable_progress_bar", "true"], []),
        (["--trainer.log_every_n_steps", "7"], []),
        (["--model.dtype", "float64"], ALL),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_changed_option_reruns_what_depends_on_it_and_nothing_else(due, change, expected):
    due()
    assert due(*change) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("general.txt", ["attribute", "attribute", "prune", "evaluate"]),
        ("text.txt", ["evaluate"]),
        ("prompts.jsonl", ["attribute", "prune", "evaluate"]),
    ],
)
def test_changed_content_of_a_file_reruns_what_reads_it(due, name, expected):
    due()
    lines = Path(name).read_text().splitlines()
    Path(name).write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
    assert due() == expected


@pytest.fixture
def more_inputs(tmp_path) -> None:
    """Another file of prompts, and another scorer: a folder of Detoxify's format."""
    shutil.copy("prompts.jsonl", "mild.jsonl")
    shutil.copytree(SHIPPED, tmp_path / "other")


MORE = ["--evaluate.second_scorer", "other", "--data.prompts.init_args.num_nontoxic", "2"]
MORE += ["--data.prompts.init_args.nontoxic_source", "mild.jsonl", "--data.prompts.init_args.min_toxicity", "0.5"]


@pytest.mark.usefixtures("more_inputs")
def test_changed_content_of_the_second_scorer_or_of_the_non_toxic_prompts_reruns_the_evaluation(due):
    due(*MORE)
    for name in ("mild.jsonl", "other/config.json"):
        assert due(*MORE) == []
        Path(name).write_text(Path(name).read_text() + "\n")
        assert due(*MORE) == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_the_label_of_a_local_scorer_leaves_its_content_in_sight(due):
    Path("other/toxicity.ckpt").rename("other/model.safetensors")  # a label is for a text-classification checkpoint
    options = ["--evaluate.second_scorer", "other#toxic"]
    due(*options)
    Path("other/config.json").write_text(Path("other/config.json").read_text() + "\n")
    assert due(*options) == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_changed_content_of_the_lexicon_s_scorer_reruns_the_attribution_whose_target_it_is(due):
    Path("other/toxicity.ckpt").rename("other/model.safetensors")  # a label is for a text-classification checkpoint
    options = ["--attribute.lexicon", "other#toxic", "--model.behavior_attribute", '{"target": "lexicon"}']
    due(*options)
    Path("other/config.json").write_text(Path("other/config.json").read_text() + "\n")
    assert due(*options) == ["attribute", "prune", "evaluate"]


def test_a_changed_tokenizer_of_ones_own_reruns_what_it_reads(due, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, "words")
    options = ["--general.init_args.tokenizer", "words"]
    due(*options)
    Path("words/model.safetensors").unlink()
    assert due(*options) == []
    Path("words/tokenizer.json").write_text(Path("words/tokenizer.json").read_text() + "\n")
    assert due(*options) == ["attribute", "attribute", "prune", "evaluate"]


def test_a_changed_task_of_ones_own_reruns_the_evaluation(due):
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text("task: mine\n")
    due("--evaluate.zero_shot.folder", "tasks")
    Path("tasks/mine.yaml").write_text("task: mine\ntest_split: test\n")
    assert due("--evaluate.zero_shot.folder", "tasks") == ["evaluate"]


def test_changed_weights_of_a_local_checkpoint_rerun_everything(due, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, "mine")
    due("--model.checkpoint", "mine")
    weights = load_file("mine/model.safetensors")
    weights["lm_head.weight"] = torch.roll(weights["lm_head.weight"], 1)
    save_file(weights, "mine/model.safetensors", {"format": "pt"})
    assert due("--model.checkpoint", "mine") == ALL


def test_a_stage_that_broke_off_is_run_again(done, verbs_run):
    stage = Path(json.loads((done.folder / "experiment.json").read_text())["stages"]["evaluation"])
    (stage / "results.json").unlink()
    assert (stage / "config.yaml").is_file()
    second, _ = run()
    assert verbs_run == ["evaluate"]
    assert figures(second) == figures(done.results)
    assert (stage / "results.json").is_file()


@pytest.mark.parametrize(("number", "verb"), list(enumerate(ALL)))
def test_a_run_that_fails_goes_on_where_it_broke_off(due, number, verb):
    begun: list[str] = []

    def failing(verb: str, config: Path) -> None:
        if len(begun) == number:
            raise OSError("No space left on device")
        begun.append(verb)
        pretend(verb, config)

    with pytest.raises(OSError, match="No space left"):
        due(run_stage=failing)
    assert begun == ALL[:number]
    assert due() == ALL[number:]


def test_an_evaluation_whose_change_is_not_known_can_be_gathered(done, verbs_run):
    """Toxicity that was 0 before has no change in percent; in JSON that is null."""
    stage = Path(json.loads((done.folder / "experiment.json").read_text())["stages"]["evaluation"])
    results = json.loads((stage / "results.json").read_text())
    interval = {"value": None, "low": None, "high": None}
    results["change"] = {"perplexity_percent": 1.5, "behavior_percent": None}
    for name in ("baseline", "pruned"):
        results[name]["perplexity"] = {"sliding": interval}
    results["perplexity_change"] = {"sliding": interval}
    (stage / "results.json").write_text(json.dumps(results))
    assert run()[0] == results
    assert verbs_run == []


def test_a_stage_that_writes_nothing_is_an_error(due):
    with pytest.raises(RuntimeError, match=r"'general_0' ended without writing .*scores.safetensors"):
        due(run_stage=lambda verb, config: None)


def test_the_config_of_each_stage_repeats_that_stage_alone(done):
    folder = done.folder
    names = sorted(path.name for path in (folder / "stages").iterdir())
    assert names == ["1_general_0.yaml", "2_general_1.yaml", "3_behavior.yaml", "4_neurons.yaml", "5_evaluation.yaml"]
    stage = Path(json.loads((folder / "experiment.json").read_text())["stages"]["general_1"])
    again = ["--trainer.logger.init_args.name", "again", "--trainer.logger.init_args.version", "0"]
    cli.main(["attribute", "--config", str(stage / "config.yaml"), *again])
    first = ScoreFile.load(stage / "scores.safetensors")
    second = ScoreFile.load(LOGS / "again/version_0/scores.safetensors")
    assert second.provenance == first.provenance
    assert all(torch.equal(second.scores[name], score) for name, score in first.scores.items())


def test_the_saved_config_of_a_run_repeats_the_run(done, verbs_run):
    again = cli.main(["run", "--config", str(done.folder / "config.yaml"), "--trainer.logger.init_args.version", "7"])
    assert Path(again.trainer.log_dir) == LOGS / "run/version_7"
    assert json.loads(Path(again.trainer.log_dir, "results.json").read_text()) == done.results
    assert verbs_run == []


def test_the_stages_can_be_kept_in_another_folder(due):
    due("--model.logs", "elsewhere")
    stages = json.loads(Path("out/experiment.json").read_text())["stages"]
    assert all(path.startswith("elsewhere/") for path in stages.values())


def test_prepare_writes_a_manifest_of_every_file_with_its_size_and_sha256(tiny_checkpoint):
    done = cli.main(["prepare", "--config", "experiment.yaml"])
    manifest = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())
    files = manifest["files"]
    for file in files:
        content = Path(file["path"]).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    found = {(file["purpose"], Path(file["path"]).name) for file in files}
    assert {
        ("checkpoint", "model.safetensors"),
        ("checkpoint", "tokenizer.json"),
        ("checkpoint", "config.json"),
        ("scorer", "toxicity.ckpt"),
        ("general_0", "general.txt"),
        ("general_1", "general.txt"),
        ("behavior", "prompts.jsonl"),
        ("text", "text.txt"),
        ("prompts", "prompts.jsonl"),
    } <= found
    assert not (LOGS / "attribute").exists()


@pytest.mark.usefixtures("more_inputs")
def test_prepare_fetches_the_second_scorer_and_the_non_toxic_prompts_too():
    done = cli.main(["prepare", "--config", "experiment.yaml", *MORE])
    files = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())["files"]
    found = {(file["purpose"], Path(file["path"]).name) for file in files}
    assert {("scorer", "toxicity.ckpt"), ("second_scorer", "toxicity.ckpt"), ("prompts", "mild.jsonl")} <= found
    assert {Path(file["path"]).parent.name for file in files if file["purpose"] == "second_scorer"} == {"other"}


def test_prepare_fetches_the_data_of_the_zero_shot_tasks_too(monkeypatch):
    asked = []

    def fetch_tasks(zero_shot: ZeroShot) -> list[Path]:
        asked.append(zero_shot)
        return [Path("text.txt")]

    monkeypatch.setattr(experiment, "fetch_tasks", fetch_tasks)
    options = ["--evaluate.zero_shot.tasks", "[mine]", "--evaluate.zero_shot.folder", "tasks"]
    done = cli.main(["prepare", "--config", "experiment.yaml", *options])
    files = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())["files"]
    assert asked == [ZeroShot(["mine"], Path("tasks"))]
    assert [file["path"] for file in files if file["purpose"] == "zero_shot"] == ["text.txt"]


def test_prepare_keeps_the_documents_that_the_stages_of_a_revision_look_for(monkeypatch, verbs_run):
    monkeypatch.setenv("SPARC3_CACHE", "cache")
    rows = Unshuffled({"text": sentence(i, 20 + i)} for i in range(12))
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: rows)
    options = ["--model.revision", "v1", "--general.init_args.source", "null"]
    options += [
        "--budget_text",
        "C4",
        "--budget_text.init_args.num_samples",
        "8",
        "--budget_text.init_args.seq_len",
        "16",
    ]
    options += ["--prune.budget.max_perplexity_increase", "0.5"]
    cli.main(["prepare", "--config", "experiment.yaml", *options])
    monkeypatch.setattr(HubDataset, "rows", lambda self, *, streaming: pytest.fail("the stream was opened again"))
    run(*options)
    assert verbs_run == ALL


def test_prepare_says_what_cannot_be_had():
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt"):
        cli.main(["prepare", "--config", "experiment.yaml", "--general.init_args.source", "nowhere.txt"])


@pytest.mark.parametrize("seeds", [(), (0, 0), (1, 2, 1)])
def test_general_seeds_must_be_different_and_at_least_one(seeds):
    with pytest.raises(ValueError, match=r"--model.general_seeds must be different seeds, at least one"):
        Experiment("tiny", general_seeds=seeds)


def test_a_stage_with_an_impossible_option_is_named_by_it(done, verbs_run):
    with pytest.raises(ValueError, match=r"--model.num_neurons must be between 1 and 48"):
        run("--prune.num_neurons", "49")
    assert verbs_run == ["prune"]
