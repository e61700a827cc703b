"""The sides of a selection: the same scores twice, and sides that are swapped."""

from pathlib import Path
from typing import Any

import pytest
from helpers import provenance, random_scores, save_scores

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.selection.sides import check_are_costs, check_sides, chosen_by

C4 = {"class": "C4", "source": None, "seed": 0}
OWN_FILE = {"class": "C4", "source": "toxic.txt"}
TOXIC = {"class": "ToxicPrompts", "by": "prompt", "min_toxicity": 0.9, "max_toxicity": 1.0}
WORST = {"class": "ToxicPrompts", "by": "continuation", "min_toxicity": None, "max_toxicity": 1.0}
MILD = {"class": "ToxicPrompts", "by": "prompt", "min_toxicity": None, "max_toxicity": 0.1}
BIASED = {"class": "ToxicPrompts", "by": "prompt", "min_toxicity": None, "max_toxicity": 1.0}


def file(name: str, data: dict[str, Any] = C4, **changes: Any) -> ScoreFile:
    return ScoreFile.load(save_scores(name, random_scores(len(name)), provenance(), data=data, **changes))


@pytest.mark.parametrize(
    ("data", "by"),
    [
        (C4, "nothing"),
        (MILD, "nothing"),
        (OWN_FILE, None),
        (BIASED, None),
        ({"class": "IOI"}, None),
        ({}, None),
        ({"class": "ToxicPrompts", "min_toxicity": 0.3}, None),
        (TOXIC, "toxicity"),
        (WORST, "toxicity"),
    ],
)
def test_what_samples_were_chosen_by_follows_from_their_options(data: dict[str, Any], by: str | None) -> None:
    assert chosen_by(data) == by


def test_the_same_samples_are_no_two_seeds_and_no_two_sides() -> None:
    general = [file("a"), file("b"), file("c", data_fingerprint="a")]
    with pytest.raises(
        ValueError, match=r"^a \(--model\.general\) and c \(--model\.general\) are scores of one kind of"
    ):
        check_sides(general, file("d", TOXIC))
    with pytest.raises(ValueError, match=r"a \(--model\.general\) and a \(--model\.general\)"):
        check_sides([general[0], general[0]], file("d", TOXIC))
    with pytest.raises(ValueError, match=r"b \(--model\.general\) and d \(--model\.behavior\) .*the same samples"):
        check_sides(general[:2], file("d", TOXIC, data_fingerprint="b"))
    with pytest.raises(ValueError, match=r"d \(--model\.behavior\) and e \(--model\.harmless\) .*the same samples"):
        check_sides(general[:2], file("d", TOXIC), file("e", MILD, data_fingerprint="d"))


@pytest.mark.filterwarnings("error")
def test_other_scores_of_the_same_samples_and_other_random_scores_are_not_the_same() -> None:
    check_sides([file("a")], file("b", data_fingerprint="a", target="lexicon"))
    check_sides(
        [file("c", data_fingerprint="none", method="random", seed=0)],
        file("d", data_fingerprint="none", method="random", seed=1),
    )


@pytest.mark.parametrize("toxic", [TOXIC, WORST])
@pytest.mark.parametrize("other", [C4, MILD])
def test_swapped_sides_are_refused(toxic: dict[str, Any], other: dict[str, Any]) -> None:
    message = (
        r"general is of toxic prompts and behavior is of others, so that --model\.general and --model\.behavior are"
    )
    with pytest.raises(ValueError, match=message):
        check_sides([file("x"), file("general", toxic)], file("behavior", other))
    with pytest.raises(
        ValueError, match=r"harmless is of toxic prompts .*--model\.harmless and --model\.behavior are swap"
    ):
        check_sides([file("x")], file("behavior", other), file("harmless", toxic))


def test_sides_that_only_seem_to_be_swapped_are_warned_of() -> None:
    for behavior in (OWN_FILE, BIASED):
        with pytest.warns(
            UserWarning, match=r"general is of toxic prompts, but is given as --model\.general: it may be"
        ):
            check_sides([file("general", TOXIC)], file("behavior", behavior))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("general", [C4, OWN_FILE, MILD, BIASED, TOXIC])
def test_sides_in_their_places_pass_in_silence(general: dict[str, Any]) -> None:
    check_sides([file("x"), file("general", general)], file("behavior", TOXIC), file("harmless", MILD))


def test_prune_refuses_the_sides(tmp_path: Path) -> None:
    from sparc3_lightning.stages.prune import Pruning

    paths = [save_scores(name, random_scores(0), data=data) for name, data in (("a", C4), ("b", TOXIC))]
    with pytest.raises(ValueError, match="are swapped: exchange them"):
        Pruning([paths[1]], paths[0], num_neurons=3).prune(tmp_path / "out")
    with pytest.raises(ValueError, match="the same samples"):
        Pruning([paths[0], paths[0]], paths[1], num_neurons=3).prune(tmp_path / "out")
    assert not (tmp_path / "out" / "neurons.json").exists()


COST = {"method": "gradient", "target": "text", "relevance": "absolute"}
BENEFIT = {"method": "gradient", "target": "lexicon_probability", "relevance": "signed"}


FISHER = {"method": "gradient", "target": "sampled", "relevance": "fisher", "chunk": 64}


@pytest.mark.parametrize("cost", [FISHER, COST, {**COST, "relevance": "squared"}, {**COST, "method": "lrp"}])
def test_fisher_information_is_a_cost_and_so_is_the_magnitude_of_what_a_text_loses(cost: dict[str, str]) -> None:
    check_are_costs(*(file(name, **of).provenance.spec for name, of in (("a", cost), ("b", BENEFIT))))


@pytest.mark.parametrize(
    ("cost", "benefit", "said"),
    [
        (
            {},
            BENEFIT,
            r"no costs \(method lrp, target argmax, .* magnitude\): .* target sampled, relevance fisher",
        ),
        ({**COST, "relevance": "signed"}, BENEFIT, "no costs .* relevance signed"),
        ({"method": "wanda", "target": None, "relevance": None}, BENEFIT, r"no costs \(method wanda\)"),
        (BENEFIT, BENEFIT, "no costs .* relevance signed"),
        (FISHER, FISHER, r"do not .* relevance fisher"),
        (COST, COST, r"do not \(method gradient, target text, relevance absolute\): .* relevance signed"),
        (FISHER, {**BENEFIT, "dtype": "bfloat16"}, "of one dtype, and the costs are of float32, but .* of bfloat16"),
        ({**COST, "granularity": "head"}, BENEFIT, "of one granularity, and the costs are of head, but .* of neuron"),
    ],
)
def test_what_is_no_cost_and_no_benefit_is_refused(cost: dict[str, str], benefit: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^--model\.criterion benefit_per_cost .*{said}"):
        check_are_costs(*(file(name, **of).provenance.spec for name, of in (("a", cost), ("b", benefit))))
