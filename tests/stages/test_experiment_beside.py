"""The whole experiment with further selections beside the first: one baseline, and attributions that are shared."""

import json
from pathlib import Path

import pytest
from experiments import LOGS, run

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.experiment import Experiment

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")
BESIDE = "--model.beside"


def must_not_run(verb: str, config: Path) -> None:
    pytest.fail(f"{verb} was run")


@pytest.mark.slow
def test_a_selection_beside_the_first_is_measured_against_the_same_baseline(verbs_run):
    _, folder = run(BESIDE, "{wanda: {attribute: {method: wanda}, prune: {num_neurons: 3}}}", "--model.dtype", "fast")
    attributions = ["attribute"] * 3
    assert verbs_run == [*attributions, "prune", *attributions, "prune", "sweep"]
    stages = {k: Path(v) for k, v in json.loads((folder / "experiment.json").read_text())["stages"].items()}
    assert list(stages)[4:] == ["wanda_general_0", "wanda_general_1", "wanda_behavior", "wanda_neurons", "evaluation"]
    specs = [ScoreFile.load(stages[n] / "scores.safetensors").provenance.spec for n in ("behavior", "wanda_behavior")]
    assert [spec.method for spec in specs] == ["lrp", "wanda"]
    assert {spec.dtype for spec in specs} == {"float32"}
    results = Results.load(folder / "results.json")
    assert [(dose.selection, dose.num_neurons) for dose in results.doses] == [("difference", 6), ("wanda", 3)]
    assert results.num_neurons == 6
    assert "Measured beside it, the selection 'wanda' with 3 neurons: " in results.verdict
    assert not (LOGS / "evaluate").exists()
    lists = [NeuronList.load(stages[name] / "neurons.json") for name in ("neurons", "wanda_neurons")]
    assert [len(one.neurons) for one in lists] == [6, 3]
    assert run(BESIDE, "{wanda: {attribute: {method: wanda}, prune: {num_neurons: 3}}}", "--model.dtype", "fast")
    assert len(verbs_run) == 9, "nothing is done twice"


def test_attributions_are_shared_by_selections_that_differ_in_their_pruning_alone(due):
    beside = {"shares": {"prune": {"criterion": "normalized_difference"}}, "few": {"prune": {"num_neurons": 2}}}
    assert due(BESIDE, json.dumps(beside)) == [*["attribute"] * 3, "prune", "prune", "prune", "sweep"]


def test_the_general_samples_are_shared_where_the_behaviour_alone_is_attributed_otherwise(due):
    beside = {"text": {"behavior_attribute": {"target": "text"}}}
    assert due(BESIDE, json.dumps(beside)) == [*["attribute"] * 3, "prune", "attribute", "prune", "sweep"]


def test_the_plan_of_a_cluster_has_the_stages_of_every_selection(plan):
    plan(BESIDE, "{few: {prune: {num_neurons: 2}}}")
    fields = Path("plan.txt").read_bytes().decode().split("\0")
    assert fields[:-1:3] == [*["attribute"] * 3, "prune", "prune", "sweep"]


def test_a_pruned_checkpoint_is_exported_of_the_first_selection_alone(options):
    beside = {"few": {"prune": {"num_neurons": 2}}}
    options = {**options, "prune": {**options["prune"], "export": "pruned"}}
    experiment = Experiment(**{**options["model"], "beside": beside})
    exports = [stage.config["model"]["export"] for stage in experiment.plan.stages(options) if stage.verb == "prune"]
    assert exports == ["pruned", None]


@pytest.mark.parametrize(
    ("beside", "error"),
    [
        ({"few": {"prune": {"num_neuron": 2}}}, r"^--model\.beside\.few\.prune"),
        ({"few": {"prune": {"num_neurons": "many"}}}, r"^--model\.beside\.few\.prune\.num_neurons must be"),
        ({"few": {"prune": {"num_neurons": 0}}}, r"num_neurons must be at least 1, got 0"),
        ({"few": {"prune": {"budget": {"max_perplexity_increase": 0.01}}}}, r"needs a text: add the group"),
        ({"few": {"attribute": {"methods": "wanda"}}}, r"^--model\.beside\.few\.attribute"),
        ({"few": {"attribute": {"granularity": "head"}}}, r"must be neuron, .* or weight: no heads are pruned here"),
        (
            {"few": {"general": {}}},
            r"^--model\.beside\.few has the groups attribute, behavior_attribute, prune, got gen",
        ),
        ({"few": {"prune": 3}}, r"^--model\.beside\.few has the groups .*, got prune: 3"),
        ({"a/b": {}}, r"^--model\.beside: a name is of letters, digits and -, and no model's, got 'a/b'"),
        ({"pruned": {}}, r"^--model\.beside: a name is of letters"),
        ({"difference": {}}, r"^--model\.beside: the first selection is called difference too"),
        ({"few": {"behavior_attribute": {"target": "texts"}}}, r"target"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_before_any_stage(due, beside, error):
    with pytest.raises(ValueError, match=error):
        due(BESIDE, json.dumps(beside), run_stage=must_not_run)
