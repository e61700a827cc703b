"""Several judges in one evaluation: whose the headline is, by what chose the neurons, from attribution to verdict."""

import shutil
from pathlib import Path

import pytest
from evaluations import NEXT, PRUNED, completions, data, evaluation, run, save_neurons
from helpers import trainer

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.evaluation.judges import fingerprint_beside
from sparc3_lightning.scorers.detoxify import SHIPPED
from sparc3_lightning.scorers.registry import fingerprint_of
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.attribute import SCORES, Attribution
from sparc3_lightning.stages.sweep import Sweep

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")
LETTERS = "toy_scorers:letters"


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(tmp_path)


def chosen_with(checkpoint: str, name: str | None, fingerprint: str | None = None) -> Path:
    """Write a list whose lexicon was a scorer."""
    behavior = {"path": "scores.safetensors", "spec": {"lexicon": name}}
    of = behavior if fingerprint is None else {**behavior, "choosers": {name: fingerprint}}
    return save_neurons(checkpoint, PRUNED, {"behavior": of}, next=NEXT)


def test_the_headline_is_of_the_judge_that_did_not_choose_the_neurons(tiny_checkpoint):
    neurons = chosen_with(tiny_checkpoint, "small")
    found = run(evaluation(tiny_checkpoint, neurons, scorers=["small", LETTERS], max_new_tokens=4))
    assert found["headline_judge"] == LETTERS
    assert [judge["is_chooser"] for judge in found["judges"].values()] == [True, False]
    assert list(completions()[0]["scores"]) == ["small", LETTERS], "in the order in which they were named"
    assert found["effects"] == found["judges"][LETTERS]["effects"] != found["judges"]["small"]["effects"]
    assert "The judge 'small', which the neurons were chosen with," in found["verdict"]
    alone = run(evaluation(tiny_checkpoint, neurons, scorers=[LETTERS], max_new_tokens=4), folder="alone")
    same = ("effects", "baseline", "pruned", "change", "num_failed", "common_random_numbers_variance_factor")
    assert {name: found[name] for name in same} == {name: alone[name] for name in same}, "to the bit"
    assert found["judges"][LETTERS] == alone["judges"][LETTERS]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.few(1)
def test_a_copy_of_the_chooser_is_the_chooser_if_its_contents_are_kept(tiny_checkpoint, kept):
    shutil.copytree(SHIPPED, "copy")
    neurons = chosen_with(tiny_checkpoint, "somewhere/else", fingerprint_of("small") if kept else None)
    model = evaluation(tiny_checkpoint, neurons, scorers=["copy", LETTERS], max_new_tokens=2)
    found = run(model)
    assert found["judges"]["copy"]["is_chooser"] is kept
    assert found["headline_judge"] == (LETTERS if kept else "copy")


def test_with_the_chooser_alone_verdict_and_report_say_that_it_judges_itself(tiny_checkpoint):
    found = run(evaluation(tiny_checkpoint, chosen_with(tiny_checkpoint, "small"), max_new_tokens=2))
    said = "The scorer that chose the neurons, 'small', judges them: no other judge was asked."
    assert found["verdict"].endswith(said)
    assert found["agreement"] is None
    assert said in " ".join(Path("out/model_card.md").read_text().replace("\\", "").split())
    assert Path("out/report.html").read_text().count("judges them") == 2


def test_an_attribution_writes_which_scorer_it_had_its_lexicon_from(tiny_checkpoint):
    Path("every_word.py").write_text("def all_of_them(texts):\n    return [1.0] * len(texts)\n")
    module = Attribution(tiny_checkpoint, target="lexicon", lexicon="every_word:all_of_them")
    trainer("scored").predict(module, datamodule=ToxicPrompts("prompts.jsonl", num_samples=2))
    found = ScoreFile.load(Path("scored", SCORES)).provenance.choosers
    assert found == {"every_word:all_of_them": fingerprint_of("every_word:all_of_them")}


def test_an_attribution_writes_by_which_scorer_its_prompts_were_chosen(tiny_checkpoint):
    run(evaluation(tiny_checkpoint, scorers=[LETTERS, "small"], max_new_tokens=3), folder="screen")
    source = "screen/completions.jsonl"
    assert fingerprint_beside(source, LETTERS) == fingerprint_of(LETTERS)
    assert fingerprint_beside(source, "nobody") is None
    for number, here in enumerate((True, False)):
        samples = ToxicPrompts(source, by="continuation", min_toxicity=None, num_samples=2)
        trainer(f"scored_{number}").predict(Attribution(tiny_checkpoint), datamodule=samples)
        found = ScoreFile.load(Path(f"scored_{number}", SCORES)).provenance.choosers
        assert found == {LETTERS: fingerprint_of(LETTERS) if here else None}
        Path("screen/results.json").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_list_that_a_sweep_chose_says_by_which_judge(tiny_checkpoint):
    neurons = chosen_with(tiny_checkpoint, "small")
    options = {"doses": [2], "dampings": [1.0], "max_perplexity_increase": 1000.0, "max_new_tokens": 3}
    model = evaluation(tiny_checkpoint, neurons, Sweep, scorers=["small", LETTERS], **options)
    run(model, data(num_prompts=4), folder="swept")
    chosen = Path("swept/chosen/neurons.json")
    assert dict(NeuronList.load(chosen).choosers()) == {"small": None, LETTERS: fingerprint_of(LETTERS)}
    left = data(min_toxicity=0.9)
    found = run(evaluation(tiny_checkpoint, chosen, scorers=["small", LETTERS], max_new_tokens=2), left)
    assert found["headline_judge"] == "small"
    assert "every judge had a part in the choice" in found["verdict"]
