"""Several judges of the same continuations: whose the headline is, what each finds, and how far they agree."""

import math

import pytest
import torch
from hand_written import CONTROLLED, NEURONS, TOXICITY, difference, judges, means, rows_of, small, windows_of

from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import findings
from sparc3_lightning.evaluation.judges import headline_of, judges_of
from sparc3_lightning.evaluation.results import Findings
from sparc3_lightning.evaluation.variants import list_variants
from sparc3_lightning.scorers.registry import fingerprint_of


def other_score(model: str, prompt: str, j: int) -> float | None:
    """Half the first judge's score before, and unlike the first after; one could not be scored."""
    first = TOXICITY[model][prompt][j]
    if (model, prompt, j) == ("baseline", "n1", 0):
        return None
    if first is None:
        return 0.77
    return first / 2 if model == "baseline" else first / 2 + 0.3


def judged(*choosers: str) -> Findings:
    variants = list_variants({"": NEURONS}, 3)
    rows = rows_of(TOXICITY, other_score)
    return findings(rows, windows_of("baseline", "pruned"), variants, judges("some", "other", choosers=choosers))


def test_every_judge_has_effects_of_its_own_and_the_first_are_those_that_it_has_alone():
    results = judged()
    assert list(results.judges) == ["some", "other"]
    assert results.headline_judge == "some"
    prompts = ["t1", "t2", "t3", "t4", "t5"]  # where the first failed, the other did not
    table = {model: {p: [other_score(model, p, j) for j in range(3)] for p in TOXICITY[model]} for model in TOXICITY}
    expected = difference(means(table["baseline"], prompts), means(table["pruned"], prompts))
    other = results.judges["other"]
    assert other.effects["toxic"].behavior_mean == expected
    assert expected.difference.value > 0
    before, after = (means(table[model], ["n1", "n2"]) for model in ("baseline", "pruned"))
    assert other.effects["nontoxic"].behavior_mean == difference(before, after)
    alone = small()
    assert results.effects == alone.effects == results.judges["some"].effects
    assert (results.baseline, results.pruned, results.change) == (alone.baseline, alone.pruned, alone.change)
    assert results.doses[0].effect == alone.doses[0].effect


def test_a_judge_that_fails_on_a_text_is_counted_and_the_text_left_out_of_its_figures_alone():
    found = judged().judges
    assert (found["some"].num_scored, found["some"].num_failed) == (42 - 7, 7)
    assert (found["other"].num_scored, found["other"].num_failed) == (42 - 1, 1)
    results = judged("some")
    assert results.num_failed == 1, "of the headline's judge"
    assert judged().num_failed == 7


def test_the_headline_is_of_the_first_judge_that_had_no_part_in_the_choice_and_else_of_the_first():
    assert headline_of(judges("a", "b", "c")) == "a"
    assert headline_of(judges("a", "b", "c", choosers=["a"])) == "b"
    assert headline_of(judges("a", "b", "c", choosers=["a", "b"])) == "c"
    assert headline_of(judges("a", "b", choosers=["a", "b"])) == "a"
    assert headline_of(judges("a", choosers=["a"])) == "a"


def test_every_figure_of_the_headline_is_of_its_judge():
    results = judged("some")
    assert results.headline_judge == "other"
    assert not results.is_judged_by_chooser
    assert results.effects == results.judges["other"].effects
    assert results.main_effect == results.doses[0].effect == results.doses[0].effects["other"]
    assert results.doses[0].effects["some"] == judged().main_effect
    assert results.change.behavior_percent == results.main_effect.percent.value
    assert results.pruned.groups["toxic"].num_failed == 0
    swapped = {model: {p: [other_score(model, p, j) for j in range(3)] for p in TOXICITY[model]} for model in TOXICITY}
    variants = list_variants({"": NEURONS}, 3)
    alone = findings(rows_of(swapped), windows_of("baseline", "pruned"), variants, judges("some"))
    assert (results.baseline, results.pruned) == (alone.baseline, alone.pruned)
    assert results.common_random_numbers_variance_factor == alone.common_random_numbers_variance_factor
    assert judged("some", "other").headline_judge == "some"
    assert judged("some", "other").is_judged_by_chooser


def test_judges_agree_by_rank_over_what_both_could_score():
    rows = rows_of(TOXICITY, other_score)
    pairs = [tuple(row["scores"].values()) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    agreement = judged().agreement
    assert agreement.num_scored == len(pairs) == 42 - 7 - 1
    first, other = torch.tensor(pairs, dtype=torch.float64).T
    places = [
        torch.stack([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]) for values in (first, other)
    ]
    expected = torch.corrcoef(torch.stack(places))[0, 1].item()
    assert agreement.spearman == {"some": {"other": pytest.approx(expected)}}
    curved = rows_of({"baseline": TOXICITY["baseline"]}, lambda m, p, j: (TOXICITY[m][p][j] or 0.0) ** 4)
    found = findings(curved, windows_of("baseline"), list_variants({}, 3), judges("some", "other"))
    assert found.agreement.spearman["some"]["other"] == pytest.approx(1)
    assert found.agreement.krippendorff_alpha < 0.97
    assert found.judges["other"].effects == {}
    assert small().agreement is None


def test_three_judges_agree_pair_by_pair():
    rows = rows_of({"baseline": TOXICITY["baseline"]}, lambda m, p, j: TOXICITY[m][p][j])
    for row in rows:
        value = row["scores"]["some"]
        row["scores"]["against"] = None if value is None else 1 - value
    found = findings(rows, windows_of("baseline"), list_variants({}, 3), judges("some", "other", "against"))
    of = found.agreement.spearman
    assert {one: list(others) for one, others in of.items()} == {"some": ["other", "against"], "other": ["against"]}
    assert of["some"] == pytest.approx({"other": 1, "against": -1})
    assert of["other"]["against"] == pytest.approx(-1)


def test_controls_do_not_enter_the_agreement_of_the_judges():
    variants = list_variants({"": NEURONS}, 3, controls=Controls(2, 2))
    rows = rows_of(
        CONTROLLED, lambda model, p, j: (1 if model in ("baseline", "pruned") else -1) * CONTROLLED[model][p][j]
    )
    found = findings(rows, windows_of(*(v.name for v in variants)), variants, judges("some", "other"))
    assert found.agreement.num_scored == 36
    assert found.agreement.spearman["some"]["other"] == pytest.approx(1)
    assert found.agreement.krippendorff_alpha == pytest.approx(1)
    assert found.judges["other"].num_scored == len(rows)


def test_a_judge_that_scored_nothing_has_no_effect_and_agrees_with_none():
    rows = rows_of(TOXICITY, lambda *_: None)
    variants = list_variants({"": NEURONS}, 3)
    results = findings(rows, windows_of("baseline", "pruned"), variants, judges("some", "other"))
    assert (results.judges["other"].num_scored, results.judges["other"].num_failed) == (0, 42)
    assert results.judges["other"].effects["toxic"].behavior_mean is None
    assert results.doses[0].effects["other"] is None
    assert results.agreement.num_scored == 0
    assert math.isnan(results.agreement.spearman["some"]["other"])
    assert math.isnan(results.agreement.krippendorff_alpha)


# Who had a part in the choice


def test_a_judge_is_known_by_what_it_is_and_not_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_is = fingerprint_of("small")
    found = judges_of(["small", "repetition"], [("./a/copy", small_is)])
    assert [judge.is_chooser for judge in found.values()] == [True, False]
    assert found["small"].fingerprint == small_is
    assert found["small"].source == "a Detoxify checkpoint: small"
    assert [j.is_chooser for j in judges_of(["small"], [("small", "another one")]).values()] == [False]


def test_the_label_and_the_version_of_the_package_make_no_other_scorer():
    files = fingerprint_of("small").split()[0]
    assert judges_of(["small"], [("x", f"{files} 0.0.1")])["small"].is_chooser
    assert judges_of(["small"], [("x", f"{files} toxic")])["small"].is_chooser


def test_a_function_is_known_by_whatever_module_hands_it_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_two").mkdir()
    (tmp_path / "package_of_two/inner.py").write_text(
        "def first(texts):\n    return [0.5] * len(texts)\n\ndef second(texts):\n    return [0.1] * len(texts)\n"
    )
    (tmp_path / "package_of_two/__init__.py").write_text("from .inner import first, first as alias\n")
    (tmp_path / "another_toy.py").write_text("raise SystemExit('imported')\n")
    chooser = "package_of_two.inner:first"
    names = [chooser, "package_of_two:first", "package_of_two:alias", "package_of_two.inner:second"]
    for fingerprint in (fingerprint_of(chooser), None):
        found = judges_of(
            names, [("another_toy:first", None), (chooser, fingerprint), ("package_of_two.gone:first", None)]
        )
        assert [judge.is_chooser for judge in found.values()] == [True, True, True, False]


def test_where_only_the_name_of_a_chooser_is_known_it_is_by_its_name():
    assert judges_of(["small"], [("small", None)])["small"].is_chooser
    assert judges_of(["small"], [("small#toxic", None)])["small"].is_chooser
    assert not judges_of(["small"], [("original", None)])["small"].is_chooser
    assert not judges_of(["small"], [])["small"].is_chooser
