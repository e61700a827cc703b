"""The whole experiment on the tiny checkpoint: what it does, and what it writes."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from experiments import ALL, GENERAL_PROMPTS, LOGS, completions, run
from helpers import write_sealed

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.files import sealed
from sparc3_lightning.selection.neuron_list import NeuronList

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")


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


@pytest.fixture
def prompts_as_general_samples(config) -> None:
    options = yaml.safe_load(config.read_text())
    options["general"] = yaml.safe_load(GENERAL_PROMPTS)
    config.write_text(yaml.safe_dump(options))


@pytest.mark.slow
@pytest.mark.usefixtures("prompts_as_general_samples")
def test_prompts_used_as_general_samples_are_not_evaluated_on_either(verbs_run):
    _, folder = run("--model.general_seeds", "[0]", "--data.prompts.init_args.num_prompts", "5")
    assert verbs_run == ["attribute", "attribute", "prune", "evaluate"]
    rows = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    used = [row["text"] for row in rows if row["toxicity"] >= 0.3][:4]
    assert not {row["prompt"] for row in completions(folder)} & set(used)


@pytest.mark.slow
def test_the_behaviour_can_be_attributed_by_other_options(verbs_run):
    options = ["--attribute.method", "gradient", "--attribute.target", "text", "--attribute.relevance", "squared"]
    options += ["--model.behavior_attribute", "{target: argmax, relevance: signed}"]
    _, folder = run(*options, "--prune.criterion", "benefit_per_cost")
    assert verbs_run == ALL
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    of = [
        ScoreFile.load(Path(stages[name], "scores.safetensors")).provenance.spec for name in ("general_0", "behavior")
    ]
    assert [(spec.method, spec.target, spec.relevance) for spec in of] == [
        ("gradient", "text", "squared"),
        ("gradient", "argmax", "signed"),
    ]


@pytest.mark.slow
def test_neurons_and_channels_are_pruned_together_by_benefit_per_cost(verbs_run, config):
    options = yaml.safe_load(config.read_text())
    options["budget_text"] = {**options["general"], "init_args": {**options["general"]["init_args"], "num_samples": 8}}
    options["prune"] = {"criterion": "benefit_per_cost", "budget": {"max_perplexity_increase": 0.02}}
    options["attribute"] = {"method": "gradient", "target": "sampled", "relevance": "fisher"}
    options["attribute"]["granularity"] = "neuron+channel"
    options["model"]["behavior_attribute"] = {"target": "argmax", "relevance": "signed"}
    config.write_text(yaml.safe_dump(options))
    results, folder = run()
    assert verbs_run == ALL
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    found = NeuronList.load(Path(stages["neurons"], "neurons.json"))
    assert {component.granularity for component in found.neurons + found.next} == {"neuron", "channel"}
    assert found.provenance["budget"]["rise"] <= 0.02
    assert found.provenance["budget"]["predicted"] > 0
    assert results["num_neurons"] == len(found.neurons)


def test_an_evaluation_whose_change_is_not_known_can_be_gathered(done, verbs_run):
    """Toxicity that was 0 before has no change in percent; in JSON that is null."""
    stage = Path(json.loads((done.folder / "experiment.json").read_text())["stages"]["evaluation"])
    results = json.loads((stage / "results.json").read_text())
    interval = {"value": None, "low": None, "high": None}
    results["change"] = {"perplexity_percent": 1.5, "behavior_percent": None}
    for name in ("baseline", "pruned"):
        results[name]["perplexity"] = {"sliding": interval}
    results["perplexity_change"] = {"sliding": interval}
    write_sealed(stage / "results.json", results)
    assert run()[0] == sealed(results)
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


def test_a_stage_with_an_impossible_option_is_named_by_it(done, verbs_run):
    with pytest.raises(ValueError, match=r"--prune.num_neurons must be between 1 and 48"):
        run("--prune.num_neurons", "49")
    assert verbs_run == []
