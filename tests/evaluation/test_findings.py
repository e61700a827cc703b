"""What is found in rows and windows that were written by hand, against answers known in advance."""

import math
import random

import pytest
import torch
from hand_written import CONTROLLED, NEURONS, TOXICITY, difference, judges, means, rows_of, small, windows_of

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import Continuations, findings, measure
from sparc3_lightning.evaluation.results import MEASURES, Effects
from sparc3_lightning.evaluation.variants import list_variants


def test_prompts_are_toxic_from_a_half_and_those_without_a_toxicity_are_not():
    found = Continuations(rows_of(TOXICITY), "some")
    assert found.groups == {"toxic": ["t1", "t2", "t3", "t4", "t5"], "nontoxic": ["n1", "n2"]}
    assert found.headline == "toxic"
    mild = {model: {p: v for p, v in of.items() if p.startswith("n")} for model, of in TOXICITY.items()}
    assert Continuations(rows_of(mild), "some").groups == {"nontoxic": ["n1", "n2"]}
    results = findings(rows_of(mild), windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 3), judges("some"))
    assert results.headline == "nontoxic"
    assert list(results.baseline.groups) == list(results.effects) == ["nontoxic"]
    assert results.baseline.groups["nontoxic"].behavior_mean == pytest.approx(0.2)


def test_measures_of_a_group_are_means_over_its_prompts():
    results = small()
    baseline = results.baseline.groups["toxic"]
    assert baseline.behavior_mean == pytest.approx((0.5 + 0.4 + 0.6 + 0.6) / 4), "t4 was never scored"
    assert baseline.expected_maximum_behavior == pytest.approx((0.8 + 0.5 + 0.9 + 0.8) / 4)
    assert baseline.behavior_probability == 1.0
    assert (baseline.num_prompts, baseline.num_continuations, baseline.num_failed) == (5, 15, 4)
    pruned = results.pruned.groups["toxic"]
    assert pruned.behavior_mean == pytest.approx((0.2 + 0.3 + 0.3 + 0.9) / 4)
    assert pruned.behavior_probability == pytest.approx(2 / 4)
    assert pruned.num_failed == 3
    mild = {name: model.groups["nontoxic"] for name, model in results.models.items()}
    assert mild["baseline"].behavior_mean == pytest.approx((0.2 + 0.2) / 2)
    assert mild["pruned"].expected_maximum_behavior == pytest.approx((0.3 + 0.9) / 2)
    assert results.num_failed == 7


def test_each_model_has_a_perplexity_and_a_number_of_tokens_by_convention():
    results = small()
    assert results.baseline.perplexity["sliding"].value == pytest.approx(math.exp(178 / 88))
    assert results.pruned.perplexity["sliding"].value == pytest.approx(math.exp(184 / 88))
    assert results.baseline.num_tokens["sliding"] == 88
    assert results.baseline.perplexity["disjoint"].value == pytest.approx(math.exp(2))
    assert results.pruned.perplexity["disjoint"].value == pytest.approx(math.exp(9 / 4))
    assert results.pruned.num_tokens["disjoint"] == 4
    assert results.pruned.kl == 0.125
    assert results.baseline.kl is None


def test_a_logger_gets_the_measures_of_the_headline_beside_perplexity():
    results = small()
    for name, model in results.models.items():
        numbers = model.numbers("toxic")
        names = ["perplexity", "perplexity_disjoint", *(["kl"] if name == "pruned" else []), *MEASURES]
        assert list(numbers)[: len(names)] == names
        assert numbers["perplexity"] == model.perplexity["sliding"].value
        assert numbers["behavior_mean"] == model.groups["toxic"].behavior_mean
        assert "num_prompts" not in numbers


def test_empty_continuations_length_and_variety_are_measured():
    rows = rows_of({"baseline": {"t1": [0.1, 0.2], "t2": [0.3, None]}})
    texts = {("t1", 0): "a b a", ("t1", 1): "a b", ("t2", 0): " \n", ("t2", 1): ""}
    for row in rows:
        row["continuation"] = texts[row["prompt_id"], row["continuation_index"]]
        row["num_tokens"] = len(row["continuation"])
    found = measure(Continuations(rows, "some"), "baseline", "toxic")
    assert (found.num_empty, found.share_empty) == (2, 0.5)
    assert found.mean_length == pytest.approx((5 + 3 + 2 + 0) / 4)
    assert found.distinct_1 == pytest.approx(2 / 5), "t2 has no word"
    assert found.distinct_2 == pytest.approx(2 / 3)
    for row in rows:
        row["continuation"] = {"t1": "a b c d", "t2": "a b a b"}[row["prompt_id"]]
    # Within a prompt, then the mean over prompts: the words of different prompts are not thrown together.
    found = measure(Continuations(rows, "some"), "baseline", "toxic")
    assert found.distinct_1 == pytest.approx((4 / 8 + 2 / 8) / 2)
    assert found.distinct_2 == pytest.approx((3 / 6 + 2 / 6) / 2)


def test_an_effect_is_the_paired_difference_over_the_prompts_that_both_models_have_a_score_for():
    results = small()
    both = ["t1", "t2", "t3"]  # t4 failed before, t5 after
    before, after = (means(TOXICITY[model], both) for model in ("baseline", "pruned"))
    assert results.effects["toxic"].behavior_mean == difference(before, after)
    effect = results.effects["toxic"].behavior_mean
    assert effect.before == pytest.approx(0.5)
    assert effect.after == pytest.approx(0.8 / 3)
    assert (effect.num_better, effect.num_worse) == (3, 0)
    assert results.change.behavior_percent == effect.percent.value == pytest.approx(100 * (0.8 / 1.5 - 1))
    assert results.effects["toxic"].expected_maximum_behavior == difference([0.8, 0.5, 0.9], [0.3, 0.4, 0.6])
    assert results.effects["toxic"].behavior_probability == difference([1.0, 1.0, 1.0], [0.0, 0.0, 1.0])
    before, after = (means(TOXICITY[model], ["n1", "n2"]) for model in ("baseline", "pruned"))
    assert results.effects["nontoxic"].behavior_mean == difference(before, after)


def test_evidence_is_said_where_the_interval_leaves_zero_out():
    base = {f"t{i:02}": [0.5 + 0.01 * i] for i in range(20)}
    for shift, evidence in [(-0.2, True), (0.2, True), (0.0, False)]:
        after = {p: [v + shift + (0.1 if i % 2 else -0.1)] for i, (p, (v,)) in enumerate(base.items())}
        rows = rows_of({"baseline": base, "pruned": after})
        effect = findings(
            rows, windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 1), judges("some")
        ).effects["toxic"]
        assert effect.behavior_mean.evidence is evidence


def test_where_nothing_was_scored_there_is_no_effect():
    scores = {"baseline": {"t1": [None, None], "n1": [0.1, 0.2]}, "pruned": {"t1": [None, 0.3], "n1": [0.1, 0.1]}}
    results = findings(
        rows_of(scores), windows_of("baseline", "pruned"), list_variants({"": NEURONS}, 2), judges("some")
    )
    assert results.effects["toxic"] == Effects(None, None, None)
    assert math.isnan(results.baseline.groups["toxic"].behavior_mean)
    assert math.isnan(results.change.behavior_percent)
    assert results.effects["nontoxic"].behavior_mean.difference.value == pytest.approx(-0.05)


def test_the_original_model_alone_has_no_effect_and_no_divergence():
    results = findings(
        rows_of({"baseline": TOXICITY["baseline"]}), windows_of("baseline"), list_variants({}, 3), judges("some")
    )
    assert (results.pruned, results.change, results.main_effect, results.agreement) == (None,) * 4
    for found in (results.effects, results.perplexity_change, results.controls, results.doses, results.fronts):
        assert len(found) == 0
    assert list(results.models) == ["baseline"]


def test_by_how_much_common_noise_cuts_the_variance_is_measured_over_the_headline():
    results = small()
    # Prompts with two pairs at least: t1, t2 (two of three), t3; not t4 and t5, and none that is not toxic.
    pairs = {"t1": 3, "t2": 2, "t3": 3}
    total = {"apart": 0.0, "paired": 0.0}
    for prompt, n in pairs.items():
        before, after = (torch.tensor(TOXICITY[m][prompt][:n], dtype=torch.float64) for m in ("baseline", "pruned"))
        total["apart"] += before.var() + after.var()
        total["paired"] += (after - before).var()
    expected = (total["apart"] / total["paired"]).item()
    assert results.common_random_numbers_variance_factor == pytest.approx(expected)


def test_the_mean_toxicity_by_seed_is_that_of_the_continuations_that_the_seed_drew():
    found = {name: model.behavior_by_seed for name, model in small(per_seed=1).models.items()}
    toxic = [prompt for prompt in TOXICITY["baseline"] if prompt.startswith("t")]
    for model, of_prompts in TOXICITY.items():
        columns = [[of_prompts[prompt][j] for prompt in toxic] for j in range(3)]
        known = [[value for value in column if value is not None] for column in columns]
        assert found[model] == pytest.approx([sum(values) / len(values) for values in known])
    assert [len(model.behavior_by_seed) for model in small().models.values()] == [1, 1]


@pytest.mark.slow
def test_the_order_of_the_rows_does_not_matter():
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    rows = rows_of(CONTROLLED, lambda model, p, j: CONTROLLED[model][p][j])
    windows = windows_of(*(v.name for v in variants))
    expected = findings(rows, windows, variants, judges("some", "other"))
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert findings(shuffled, windows, variants, judges("some", "other")) == expected
