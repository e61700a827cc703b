"""The whole experiment: what is refused before any stage, and by the plan."""

from pathlib import Path

import pytest
from experiments import ALL, GENERAL_PROMPTS

from sparc3_lightning.stages.experiment import Experiment
from sparc3_lightning.stages.plan import check_granularities

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")


def must_not_run(verb: str, config: Path) -> None:
    pytest.fail(f"{verb} was run")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{tarqet: text}", ": unrecognized option --tarqet: did you mean --target\\?"),
        ("{target: texts}", "\\.target must be one of argmax, .*"),
        ("{save_every: some}", "\\.save_every must be a whole number, got some\\."),
    ],
)
def test_an_unknown_option_for_the_behaviour_is_refused_before_any_stage(due, given, said):
    with pytest.raises(ValueError, match=rf"^--model\.behavior_attribute{said}$"):
        due("--model.behavior_attribute", given, run_stage=must_not_run)


def test_scores_that_cannot_be_pruned_are_refused_before_any_stage(due):
    with pytest.raises(ValueError, match=r"--attribute\.granularity must be neuron, .* or weight: no heads are"):
        due("--attribute.granularity", "head", "--attribute.layers", "[o_proj]", run_stage=must_not_run)
    with pytest.raises(ValueError, match=r"--prune\.granularity weight .*--attribute\.granularity weight"):
        due("--prune.granularity", "weight", run_stage=must_not_run)


def test_sides_of_other_components_and_what_is_no_cost_or_no_benefit_are_refused_before_any_stage(due):
    costs = ["--attribute.method", "gradient", "--attribute.target", "text", "--attribute.relevance", "absolute"]
    behavior = "--model.behavior_attribute"
    with pytest.raises(ValueError, match=r"is neuron\+channel, and neuron with --model\.behavior_attribute: leave it"):
        check_granularities("neuron", "neuron+channel", "neuron")
    criterion = ["--prune.criterion", "benefit_per_cost"]
    with pytest.raises(ValueError, match=r"^--prune\.criterion benefit_per_cost .* no costs .*relevance magnitude"):
        due(*criterion, run_stage=must_not_run)
    with pytest.raises(ValueError, match=r"^--prune\.criterion benefit_per_cost .* tell a benefit from a harm"):
        due(*criterion, *costs, run_stage=must_not_run)
    assert due(*criterion, *costs, behavior, "{target: argmax, relevance: signed}") == ALL


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["--attribute.method", "wanda", "--attribute.target", "text"], r"--attribute\.method wanda has no target"),
        (
            ["--model.behavior_attribute", "{method: wanda, target: text}"],
            r"--attribute\.method wanda has no target: .* \(with --model\.behavior_attribute\)$",
        ),
        (["--evaluate.sampling.num_seeds", "7"], r"--evaluate\.sampling\.num_seeds must divide 1 continuations, got 7"),
        (["--evaluate.scorers", "[orignal]"], r"--evaluate\.scorers: 'orignal' is neither"),
        (["--evaluate.scorers", "[small, orignal]"], r"--evaluate\.scorers: 'orignal' is neither"),
        (["--evaluate.scorers", "[]"], r"--evaluate\.scorers must name at least one scorer, got an empty list"),
        (["--evaluate.scorers", "[small, small]"], r"--evaluate\.scorers names 'small' twice"),
        (["--evaluate.sampling.top_p", "2"], r"--evaluate\.sampling\.top_p must be above 0"),
        (["--evaluate.controls.num_draws", "-1"], r"--evaluate\.controls\.num_draws must be at least 0"),
        (["--evaluate.doses", "[3, 11]", "--prune.num_ranked", "10"], r"--evaluate\.doses .* --prune\.num_ranked 11\."),
        (["--evaluate.doses", "[3, 3]"], r"--evaluate\.doses must be different"),
        (["--evaluate.doses", "[3]", "--evaluate.dampings", "[2]"], r"--evaluate\.dampings must be above 0"),
        (["--evaluate.dampings", "[0.5]"], r"--evaluate\.dampings \[0.5\] has no effect without --evaluate\.doses"),
        (
            ["--evaluate.zero_shot.tasks", "[mine]", "--evaluate.zero_shot.folder", "nowhere"],
            r"--evaluate\.zero_shot\.folder: nowhere is no folder",
        ),
        (
            ["--prune.dampings", "[0.5, 1]"],
            r"Several --prune\.dampings.* need --prune\.budget\.max_perplexity_increase",
        ),
        (
            ["--behavior.init_args.chat", "true"],
            r"--behavior\.chat needs a chat template, and the tokenizer of .* has none",
        ),
        (["--data.prompts.init_args.chat", "true"], r"--data\.prompts\.chat needs a chat template"),
        (["--prune.export", "general.txt"], r"--prune\.export: general.txt exists already"),
        (
            ["--prune.budget.max_perplexity_increase", "0.1"],
            r"--prune\.budget\.max_perplexity_increase needs a text: .*'budget_text'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.few(3)
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


@pytest.mark.parametrize("seeds", [(), (0, 0), (1, 2, 1)])
def test_general_seeds_must_be_different_and_at_least_one(seeds):
    with pytest.raises(ValueError, match=r"--model.general_seeds must be different seeds, at least one"):
        Experiment("tiny", general_seeds=seeds)
