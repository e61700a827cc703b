"""The figures of two evaluations are compared by their intervals, and every figure that was changed is found."""

import math
from typing import Any

import pytest
from helpers import replaced_at
from made_up import made_up

from sparc3_lightning.evaluation.reproduction import Changed, Figure, ReproductionResults, changes, compare
from sparc3_lightning.evaluation.results import Results


def compared(*replaced: tuple[str, Any]) -> dict[str, Figure]:
    """Compare a made-up evaluation, with other values there, with itself."""
    here, rows = made_up()
    there: Results = here
    for path, value in replaced:
        there = replaced_at(there, path, value)
    return {figure.name: figure for figure in compare(there, here, rows)}


def test_an_evaluation_is_equal_to_itself_in_every_figure():
    found = compared()
    assert {figure.outcome for figure in found.values()} == {"equal"}
    assert {
        "baseline.perplexity.sliding",
        "baseline.groups.nontoxic.num_prompts",
        "pruned.groups.toxic.behavior_mean",
        "pruned.kl",
        "change.behavior_percent",
        "effects.toxic.behavior_mean.difference",
        "doses.top_3_1.perplexity",
        "controls.random.outcome.effect",
        "controls.random.draws.random_0.effect.percent",
        "judges.other.effects.toxic.behavior_mean.percent",
        "agreement.krippendorff_alpha",
        "doses.top_3_1.effects.other.difference",
    } <= set(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("baseline/perplexity/sliding/value", 9e4),
        ("pruned/groups/toxic/behavior_mean", 0.99),
        ("pruned/groups/toxic/mean_length", 12.0),
        ("pruned/kl", 5.0),
        ("change/behavior_percent", 123.0),
        ("change/perplexity_percent", -50.0),
        ("effects/toxic/behavior_mean/difference/value", 0.9),
        ("doses/1/perplexity", 1e6),
        ("controls/random/outcome/perplexity_percent", 99.0),
        ("agreement/krippendorff_alpha", -1.0),
        ("baseline/groups/toxic/num_prompts", 13),
        ("baseline/num_tokens/sliding", 1),
        ("num_failed", 5),
        ("pruned/kl", math.nan),
        ("agreement", None),
    ],
)
@pytest.mark.few(5)
def test_a_figure_that_was_changed_is_found(path, value):
    found = {name: figure for name, figure in compared((path, value)).items() if figure.outcome != "equal"}
    assert {figure.outcome for figure in found.values()} == {"differs"}
    assert all(name.startswith(path.split("/")[0]) for name in found)
    assert len(found) == 1 or value is None


@pytest.mark.parametrize(
    ("path", "name", "share"),
    [
        ("baseline/perplexity/sliding", "baseline.perplexity.sliding", 0.9),
        ("effects/toxic/behavior_mean/difference", "effects.toxic.behavior_mean.difference", -0.9),
    ],
)
def test_a_figure_is_reproduced_inside_its_interval_there_and_differs_outside(path, name, share):
    here = compared()[name]
    end = here.high if share > 0 else here.low
    inside = here.there + abs(share) * (end - here.there)
    assert compared((f"{path}/value", inside))[name].outcome == "within the interval"
    moved = {"value": here.high + 1, "low": here.there + 1e-3, "high": here.high + 2}
    beyond = compared(*((f"{path}/{field}", value) for field, value in moved.items()))[name]
    assert (beyond.outcome, beyond.low) == ("differs", moved["low"])


def test_a_behaviour_may_differ_by_its_interval_over_prompts_and_what_has_none_by_5_percent():
    name = "pruned.groups.toxic.behavior_mean"
    here = compared()[name]
    assert here.low < here.here < here.high
    path = name.replace(".", "/")
    assert compared((path, (here.here + here.high) / 2))[name].outcome == "within the interval"
    assert compared((path, here.high + 0.01))[name].outcome == "differs"
    kl = compared()["pruned.kl"].here
    for factor, outcome in ((1 + 1e-9, "equal"), (1.04, "within the interval"), (1.06, "differs")):
        assert compared(("pruned/kl", factor * kl))["pruned.kl"].outcome == outcome


def test_a_count_of_texts_that_failed_may_differ_by_one_and_other_counts_not_at_all():
    assert compared(("num_failed", 1))["num_failed"].outcome == "within the interval"
    assert compared(("num_failed", 2))["num_failed"].outcome == "differs"
    name = "baseline.groups.toxic.num_continuations"
    number = int(compared()[name].here)
    assert compared((name.replace(".", "/"), number + 1))[name].outcome == "differs"


def test_where_no_change_in_percent_can_be_said_the_change_itself_is_compared():
    unknown = [(f"effects/toxic/behavior_mean/percent/{end}", math.nan) for end in ("low", "high")]
    found = compared(*unknown)
    assert "effects.toxic.behavior_mean.percent" not in found
    assert found["effects.toxic.behavior_mean.difference"].outcome == "equal"


def test_what_is_not_the_same_is_named_with_what_it_was():
    assert changes({"torch": "1", "lxt": "2"}, {"lxt": "2", "torch": "3"}) == [Changed("torch", "1", "3")]
    assert changes({"neurons": "a"}, {}) == [Changed("neurons", "a", "none")]


def test_a_reproduction_comes_back_from_its_file(tmp_path):
    figures = list(compared(("agreement", None)).values())
    written = ReproductionResults(results="a", num_differing=2, changed=[Changed("a", "b", "c")], figures=figures)
    written.save(tmp_path / "reproduction.json")
    found = ReproductionResults.load(tmp_path / "reproduction.json")
    assert (found.changed, len(found.figures)) == (written.changed, len(figures))
    assert repr(found) == repr(written), "with NaN"
