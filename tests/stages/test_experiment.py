"""The whole experiment on the tiny checkpoint: what is written, what is run again and what is not."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import sentence
from safetensors.torch import load_file, save_file
from test_page import made_up

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.c4 import C4
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


@pytest.fixture(autouse=True)
def config(tmp_path, tiny_checkpoint) -> Path:
    """A tiny experiment.yaml, with the files it reads."""
    (tmp_path / "general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(12)) + "\n")
    (tmp_path / "text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(10)) + "\n")
    rows = [{"prompt": {"text": sentence(100 + i, 3 + i % 7), "toxicity": i / 19}} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"checkpoint": tiny_checkpoint, "general_seeds": [0, 1]},
        "general": {
            "class_path": "sparc3_lightning.data.C4",
            "init_args": {"source": "general.txt", "num_samples": 4, "seq_len": 16},
        },
        "behavior": {
            "class_path": "sparc3_lightning.data.ToxicPrompts",
            "init_args": {"source": "prompts.jsonl", "min_toxicity": 0.5, "num_samples": 5},
        },
        "prune": {"num_neurons": 6, "min_strength": -1000.0},
        "evaluate": {"scorer": "small", "max_new_tokens": 5, "temperature": 1.0, "controls": 0},
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
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


@pytest.fixture
def verbs_run(monkeypatch) -> list[str]:
    """The verbs of the stages that were run, in order."""
    seen: list[str] = []
    run_stage = cli._run_stage

    def counting(verb: str, config: Path) -> None:
        seen.append(verb)
        run_stage(verb, config)

    monkeypatch.setattr(cli, "_run_stage", counting)
    return seen


@pytest.fixture
def verbs_pretended(monkeypatch) -> list[str]:
    """The verbs of the stages that were due; nothing is computed, only the file that ends each stage is written."""
    seen: list[str] = []
    outputs = {"attribute": "scores.safetensors", "prune": "neurons.json", "evaluate": "results.json"}

    def pretend(verb: str, config: Path) -> None:
        seen.append(verb)
        where = yaml.safe_load(config.read_text())["trainer"]["logger"]["init_args"]
        folder = Path(where["save_dir"], where["name"], where["version"])
        folder.mkdir(parents=True)
        (folder / outputs[verb]).write_text(made_up()[0].to_json())
        (folder / "report.html").touch()

    monkeypatch.setattr(cli, "_run_stage", pretend)
    return seen


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


def test_one_command_carries_out_the_whole_experiment(verbs_run, tiny_checkpoint):
    results, folder = run()
    assert verbs_run == ALL
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


def test_the_general_seeds_are_attributed_on_different_documents_and_averaged(verbs_run):
    _, folder = run()
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    files = [ScoreFile.load(Path(stages[name], "scores.safetensors")) for name in ("general_0", "general_1")]
    assert [file.provenance.data["seed"] for file in files] == [0, 1]
    assert files[0].provenance.sample_ids != files[1].provenance.sample_ids
    behavior = ScoreFile.load(Path(stages["behavior"], "scores.safetensors"))
    neurons = json.loads(Path(stages["neurons"], "neurons.json").read_text())["neurons"]
    first = neurons[0]
    mean = sum(float(file.scores[first["module"]][first["index"]]) for file in files) / 2
    assert first["score"] == pytest.approx(mean - float(behavior.scores[first["module"]][first["index"]]), abs=1e-6)


def test_prompts_that_were_attributed_on_are_not_evaluated_on():
    results, folder = run()
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


@pytest.fixture
def prompts_as_general_samples(config) -> None:
    options = yaml.safe_load(config.read_text())
    init_args = {"source": "prompts.jsonl", "min_toxicity": 0.3, "num_samples": 4}
    options["general"] = {"class_path": "sparc3_lightning.data.ToxicPrompts", "init_args": init_args}
    config.write_text(yaml.safe_dump(options))


@pytest.mark.usefixtures("prompts_as_general_samples")
def test_prompts_used_as_general_samples_are_not_evaluated_on_either(verbs_run):
    _, folder = run("--model.general_seeds", "[0]", "--data.prompts.init_args.num_prompts", "5")
    assert verbs_run == ["attribute", "attribute", "prune", "evaluate"]
    rows = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    used = [row["text"] for row in rows if row["toxicity"] >= 0.3][:4]
    assert not {row["prompt"] for row in completions(folder)} & set(used)


def test_the_behaviour_can_be_attributed_by_other_options(verbs_run):
    options = ("--model.behavior_attribute", "{target: text, relevance: signed}", "--prune.selection", "ratio")
    _, folder = run("--attribute.method", "gradient", "--attribute.relevance", "squared", *options)
    assert verbs_run == ALL
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    of = [ScoreFile.load(Path(stages[name], "scores.safetensors")).provenance for name in ("general_0", "behavior")]
    assert [(p.method, p.target, p.relevance) for p in of] == [
        ("gradient", "argmax", "squared"),
        ("gradient", "text", "signed"),
    ]


@pytest.mark.parametrize("options", ["{tarqet: text}", "{target: texts}", "{save_every: some}"])
def test_an_unknown_option_for_the_behaviour_is_refused_before_any_stage(verbs_run, options):
    with pytest.raises(ValueError, match=r"--model\.behavior_attribute: "):
        run("--model.behavior_attribute", options)
    assert not verbs_run


def test_scores_that_cannot_be_pruned_are_refused_before_any_stage(verbs_run):
    with pytest.raises(ValueError, match=r"--attribute\.granularity must be neuron or weight"):
        run("--attribute.granularity", "head", "--attribute.targets", "[o_proj]")
    with pytest.raises(ValueError, match=r"--prune\.granularity weight .*--attribute\.granularity weight"):
        run("--prune.granularity", "weight")
    assert not verbs_run


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--attribute.method", "wanda", "--attribute.target", "text"], r"--attribute\.method wanda has no target"),
        (
            ["--model.behavior_attribute", "{method: wanda, target: text}"],
            r"--attribute\.method wanda has no target: .* \(with --model\.behavior_attribute\)$",
        ),
        (["--evaluate.num_seeds", "7"], r"--evaluate\.num_seeds must divide 1 continuations, got 7"),
        (["--evaluate.scorer", "orignal"], r"--evaluate\.scorer: 'orignal' is neither"),
        (["--evaluate.second_scorer", "orignal"], r"--evaluate\.second_scorer: 'orignal' is neither"),
        (["--evaluate.top_p", "2"], r"--evaluate\.top_p must be above 0"),
        (["--evaluate.controls", "-1"], r"--evaluate\.controls must be at least 0"),
        (["--evaluate.doses", "[3, 11]", "--prune.num_ranked", "10"], r"--evaluate\.doses .* --prune\.num_ranked 11\."),
        (["--evaluate.doses", "[3, 3]"], r"--evaluate\.doses must be different"),
        (["--evaluate.doses", "[3]", "--evaluate.strengths", "[2]"], r"--evaluate\.strengths must be above 0"),
        (["--evaluate.strengths", "[0.5]"], r"--evaluate\.strengths \[0.5\] is for --evaluate\.doses"),
        (
            ["--evaluate.lm_eval_tasks", "[mine]", "--evaluate.lm_eval_folder", "nowhere"],
            r"--evaluate\.lm_eval_folder: nowhere is no folder",
        ),
        (["--prune.strengths", "[0.5, 1]"], r"Several --prune\.strengths.* need --prune\.max_perplexity_increase"),
        (["--prune.export", "general.txt"], r"--prune\.export: general.txt exists already"),
        (["--prune.max_perplexity_increase", "0.1"], r"--prune\.max_perplexity_increase needs a text: .*'budget'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_later_stage_would_refuse_is_refused_before_any_stage_and_by_the_plan(verbs_run, options, error):
    for more in ([], ["--plan", "plan.txt"]):
        with pytest.raises(ValueError, match=error):
            run(*options, *more)
    assert not verbs_run
    assert not Path("plan.txt").exists()


def test_doses_and_strengths_that_the_pruning_will_list_are_planned(verbs_pretended):
    run("--evaluate.doses", "[10]", "--evaluate.strengths", "[1, 0.5]", "--prune.num_ranked", "10")
    assert verbs_pretended == ALL
    run("--evaluate.doses", "[12]", "--prune.num_neurons", "12", "--prune.num_ranked", "10")


def test_an_exported_checkpoint_of_a_stage_that_is_done_is_no_obstacle(verbs_pretended):
    run("--prune.export", "exported")
    Path("exported").mkdir()
    verbs_pretended.clear()
    run("--prune.export", "exported")
    assert verbs_pretended == []


@pytest.mark.usefixtures("prompts_as_general_samples")
def test_several_seeds_of_samples_that_no_seed_changes_are_refused_before_any_stage(verbs_run):
    with pytest.raises(
        ValueError, match=r"--general: .*ToxicPrompts .*--model.general_seeds must be one seed, got \[0, 1\]"
    ):
        run()
    assert verbs_run == []


def test_a_second_run_repeats_no_stage_and_gives_the_same_numbers(verbs_run, caplog):
    first, folder = run()
    verbs_run.clear()
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


def test_the_whole_experiment_run_again_from_nothing_gives_the_same_numbers():
    first, folder = run()
    lines = completions(folder)
    shutil.rmtree(LOGS)
    second, folder = run()
    assert figures(second) == figures(first)
    assert completions(folder) == lines


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--prune.num_neurons", "7"], ["prune", "evaluate"]),
        (["--evaluate.max_new_tokens", "6"], ["evaluate"]),
        (["--evaluate.controls", "1"], ["evaluate"]),
        (["--evaluate.doses", "[3]"], ["evaluate"]),
        (["--evaluate.protocol", "rtp"], ["evaluate"]),
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
def test_a_changed_option_reruns_what_depends_on_it_and_nothing_else(verbs_pretended, change, expected):
    run()
    verbs_pretended.clear()
    run(*change)
    assert verbs_pretended == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("general.txt", ["attribute", "attribute", "prune", "evaluate"]),
        ("text.txt", ["evaluate"]),
        ("prompts.jsonl", ["attribute", "prune", "evaluate"]),
    ],
)
def test_changed_content_of_a_file_reruns_what_reads_it(verbs_pretended, name, expected):
    run()
    verbs_pretended.clear()
    lines = Path(name).read_text().splitlines()
    Path(name).write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
    run()
    assert verbs_pretended == expected


@pytest.fixture
def more_inputs(tmp_path) -> None:
    """Another file of prompts, and another scorer: a folder of Detoxify's format."""
    shutil.copy("prompts.jsonl", "mild.jsonl")
    shutil.copytree(SHIPPED, tmp_path / "other")


MORE = ["--evaluate.second_scorer", "other", "--data.prompts.init_args.num_nontoxic", "2"]
MORE += ["--data.prompts.init_args.nontoxic_source", "mild.jsonl", "--data.prompts.init_args.min_toxicity", "0.5"]


@pytest.mark.usefixtures("more_inputs")
def test_changed_content_of_the_second_scorer_or_of_the_non_toxic_prompts_reruns_the_evaluation(verbs_pretended):
    run(*MORE)
    for name in ("mild.jsonl", "other/config.json"):
        verbs_pretended.clear()
        run(*MORE)
        assert verbs_pretended == []
        Path(name).write_text(Path(name).read_text() + "\n")
        run(*MORE)
        assert verbs_pretended == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_the_label_of_a_local_scorer_leaves_its_content_in_sight(verbs_pretended):
    Path("other/toxicity.ckpt").rename("other/model.safetensors")  # a label is for a text-classification checkpoint
    options = ["--evaluate.second_scorer", "other#toxic"]
    run(*options)
    verbs_pretended.clear()
    Path("other/config.json").write_text(Path("other/config.json").read_text() + "\n")
    run(*options)
    assert verbs_pretended == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_changed_content_of_the_lexicon_s_scorer_reruns_the_attribution_whose_target_it_is(verbs_pretended):
    Path("other/toxicity.ckpt").rename("other/model.safetensors")  # a label is for a text-classification checkpoint
    options = ["--attribute.lexicon", "other#toxic", "--model.behavior_attribute", '{"target": "lexicon"}']
    run(*options)
    verbs_pretended.clear()
    Path("other/config.json").write_text(Path("other/config.json").read_text() + "\n")
    run(*options)
    assert verbs_pretended == ["attribute", "prune", "evaluate"]


def test_a_changed_tokenizer_of_ones_own_reruns_what_it_reads(verbs_pretended, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, "words")
    options = ["--general.init_args.tokenizer", "words"]
    run(*options)
    verbs_pretended.clear()
    Path("words/model.safetensors").unlink()
    run(*options)
    assert verbs_pretended == []
    Path("words/tokenizer.json").write_text(Path("words/tokenizer.json").read_text() + "\n")
    run(*options)
    assert verbs_pretended == ["attribute", "attribute", "prune", "evaluate"]


def test_a_changed_task_of_ones_own_reruns_the_evaluation(verbs_pretended):
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text("task: mine\n")
    run("--evaluate.lm_eval_folder", "tasks")
    verbs_pretended.clear()
    Path("tasks/mine.yaml").write_text("task: mine\ntest_split: test\n")
    run("--evaluate.lm_eval_folder", "tasks")
    assert verbs_pretended == ["evaluate"]


def test_changed_weights_of_a_local_checkpoint_rerun_everything(verbs_pretended, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, "mine")
    run("--model.checkpoint", "mine")
    verbs_pretended.clear()
    weights = load_file("mine/model.safetensors")
    weights["lm_head.weight"] = torch.roll(weights["lm_head.weight"], 1)
    save_file(weights, "mine/model.safetensors", {"format": "pt"})
    run("--model.checkpoint", "mine")
    assert verbs_pretended == ALL


def test_a_stage_that_broke_off_is_run_again(verbs_run):
    first, folder = run()
    verbs_run.clear()
    stage = Path(json.loads((folder / "experiment.json").read_text())["stages"]["evaluation"])
    (stage / "results.json").unlink()
    assert (stage / "config.yaml").is_file()
    second, _ = run()
    assert verbs_run == ["evaluate"]
    assert figures(second) == figures(first)
    assert (stage / "results.json").is_file()


@pytest.mark.parametrize(("number", "verb"), list(enumerate(ALL)))
def test_a_run_that_fails_goes_on_where_it_broke_off(verbs_pretended, monkeypatch, number, verb):
    pretend = cli._run_stage

    def failing(verb: str, config: Path) -> None:
        if len(verbs_pretended) == number:
            raise OSError("No space left on device")
        pretend(verb, config)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_run_stage", failing)
        with pytest.raises(OSError, match="No space left"):
            run()
    assert verbs_pretended == ALL[:number]
    verbs_pretended.clear()
    run()
    assert verbs_pretended == ALL[number:]


def test_an_evaluation_whose_change_is_not_known_can_be_gathered(verbs_pretended):
    """Toxicity that was 0 before has no change in percent; in JSON that is null."""
    _, folder = run()
    stage = Path(json.loads((folder / "experiment.json").read_text())["stages"]["evaluation"])
    results = json.loads((stage / "results.json").read_text())
    interval = {"value": None, "low": None, "high": None}
    results["change"] = {"perplexity_percent": 1.5, "behavior_percent": None}
    for name in ("baseline", "pruned"):
        results[name]["perplexity"] = {"sliding": interval}
    results["perplexity_change"] = {"sliding": interval}
    (stage / "results.json").write_text(json.dumps(results))
    verbs_pretended.clear()
    assert run()[0] == results
    assert verbs_pretended == []


def test_a_stage_that_writes_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(cli, "_run_stage", lambda verb, config: None)
    with pytest.raises(RuntimeError, match=r"'general_0' ended without writing .*scores.safetensors"):
        run()


def test_the_config_of_each_stage_repeats_that_stage_alone():
    _, folder = run()
    names = sorted(path.name for path in (folder / "stages").iterdir())
    assert names == ["1_general_0.yaml", "2_general_1.yaml", "3_behavior.yaml", "4_neurons.yaml", "5_evaluation.yaml"]
    stage = Path(json.loads((folder / "experiment.json").read_text())["stages"]["general_1"])
    again = ["--trainer.logger.init_args.name", "again", "--trainer.logger.init_args.version", "0"]
    cli.main(["attribute", "--config", str(stage / "config.yaml"), *again])
    first = ScoreFile.load(stage / "scores.safetensors")
    second = ScoreFile.load(LOGS / "again/version_0/scores.safetensors")
    assert second.provenance == first.provenance
    assert all(torch.equal(second.scores[name], score) for name, score in first.scores.items())


def test_the_saved_config_of_a_run_repeats_the_run(verbs_run):
    first, folder = run()
    verbs_run.clear()
    done = cli.main(["run", "--config", str(folder / "config.yaml"), "--trainer.logger.init_args.version", "7"])
    assert Path(done.trainer.log_dir) == LOGS / "run/version_7"
    assert json.loads(Path(done.trainer.log_dir, "results.json").read_text()) == first
    assert verbs_run == []


def test_the_stages_can_be_kept_in_another_folder():
    _, folder = run("--model.logs", "elsewhere")
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
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

    def fetch_tasks(*of: Any) -> list[Path]:
        asked.append(of)
        return [Path("text.txt")]

    monkeypatch.setattr(experiment, "fetch_tasks", fetch_tasks)
    options = ["--evaluate.lm_eval_tasks", "[mine]", "--evaluate.lm_eval_folder", "tasks"]
    done = cli.main(["prepare", "--config", "experiment.yaml", *options])
    files = json.loads(Path(done.trainer.log_dir, MANIFEST).read_text())["files"]
    assert asked == [(["mine"], Path("tasks"))]
    assert [file["path"] for file in files if file["purpose"] == "lm_eval_tasks"] == ["text.txt"]


def test_prepare_keeps_the_documents_that_the_stages_of_a_revision_look_for(monkeypatch, verbs_run):
    monkeypatch.setenv("SPARC3_CACHE", "cache")
    monkeypatch.setattr(C4, "_stream", lambda self: ((i, sentence(i, 20 + i)) for i in range(12)))
    options = ["--model.revision", "v1", "--general.init_args.source", "null"]
    options += ["--budget", "C4", "--budget.init_args.num_samples", "8", "--budget.init_args.seq_len", "16"]
    options += ["--prune.max_perplexity_increase", "0.5"]
    cli.main(["prepare", "--config", "experiment.yaml", *options])
    monkeypatch.setattr(C4, "_stream", lambda self: pytest.fail("the stream was opened again"))
    run(*options)
    assert verbs_run == ALL


def test_prepare_says_what_cannot_be_had():
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt"):
        cli.main(["prepare", "--config", "experiment.yaml", "--general.init_args.source", "nowhere.txt"])


@pytest.mark.parametrize("seeds", [(), (0, 0), (1, 2, 1)])
def test_general_seeds_must_be_different_and_at_least_one(seeds):
    with pytest.raises(ValueError, match=r"--model.general_seeds must be different seeds, at least one"):
        Experiment("tiny", general_seeds=seeds)


def test_a_stage_with_an_impossible_option_is_named_by_it(verbs_run):
    with pytest.raises(ValueError, match=r"--model.num_neurons must be between 1 and 48"):
        run("--prune.num_neurons", "49")
    assert verbs_run == ["attribute", "attribute", "attribute", "prune"]
