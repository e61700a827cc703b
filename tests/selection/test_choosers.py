"""Which scorers had a part in choosing the neurons of a list, as its provenance says."""

from pathlib import Path
from typing import Any

import pytest
from helpers import provenance

from sparc3_lightning.attribution.scores import Provenance, ScoreFile
from sparc3_lightning.models.components import Component
from sparc3_lightning.report.escaping import public_name
from sparc3_lightning.selection.neuron_list import NeuronList, by_name, origin

UP = "model.layers.0.mlp.up_proj"


def listed(**of: Any) -> NeuronList:
    """Return a list that was written and read again."""
    NeuronList([Component(UP, 0, -1.0)], of).save("neurons.json")
    return NeuronList.load("neurons.json")


def scored(lexicon: str | None = None, choosers: dict[str, str | None] | None = None) -> dict[str, Any]:
    of = {"path": "scores.safetensors", "spec": {"lexicon": lexicon}}
    return of if choosers is None else {**of, "choosers": choosers}


def test_a_list_that_was_attributed_without_a_lexicon_was_chosen_by_no_scorer():
    assert listed().choosers() == []
    assert listed(general=[scored()], behavior=scored(choosers={}), harmless=None, budget=None).choosers() == []


def test_the_lexicon_of_every_side_is_known_by_its_name_at_least():
    found = listed(general=[scored("a"), scored("a")], behavior=scored("small"), harmless=scored("b")).choosers()
    assert sorted(found) == [("a", None), ("b", None), ("small", None)]


def test_what_tells_a_scorer_from_others_is_kept_beside_its_name():
    of = scored("small", {"small": "abc 0.5", "./screening": None})
    assert listed(general=[scored()], behavior=of).choosers() == [("small", "abc 0.5"), ("./screening", None)]


def test_the_judge_of_the_sweep_that_chose_a_list_had_a_part_too():
    chosen = {"num_neurons": 3, "choosers": {"small": "abc"}}
    assert listed(behavior=scored(), chosen=chosen).choosers() == [("small", "abc")]
    assert listed(behavior=scored(), chosen={"num_neurons": 3}).choosers() == []


def test_a_list_of_an_export_and_of_a_circuit_say_it_too():
    assert listed(choosers={"small": "abc"}).choosers() == [("small", "abc")]
    assert listed(scores=[scored(choosers={"small": "abc"})]).choosers() == [("small", "abc")]


def test_choosers_come_through_the_score_file_to_the_list():
    of: Provenance = provenance()
    files = [ScoreFile({}, of, Path("a")), ScoreFile({}, Provenance(**{**vars(of), "choosers": {"x": "1"}}), Path("b"))]
    assert listed(**origin(files[:1], files[1:])).choosers() == [("x", "1")]
    assert Provenance.from_json(files[1].provenance.to_json()).choosers == {"x": "1"}


@pytest.mark.parametrize("wrong", [["small"], {"small": 1}, "small"])
def test_choosers_of_another_form_are_refused_by_their_place(wrong):
    with pytest.raises(ValueError, match=r"neurons.json is not a neurons.json .*: provenance.behavior.choosers"):
        listed(behavior=scored(choosers=wrong))


def test_choosers_that_are_called_alike_are_all_kept():
    choosers = [("/a/scorer", "1"), ("/b/scorer", "2"), ("small", "3"), ("small", None), ("/c/scorer", "1")]
    found = by_name(choosers, public_name)
    assert found == {"small": None, "scorer": "1", "scorer (2)": "2", "small (2)": "3"}
    assert sorted(listed(choosers=found).choosers(), key=str) == sorted(found.items(), key=str)
