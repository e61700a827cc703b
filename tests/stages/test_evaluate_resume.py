"""Evaluation after a break: what is taken over from the run that broke off, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from evaluations import LEAST, NEXT, PRUNED, completions, data, evaluation, run, save_neurons, write_inputs

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.generation import continue_prompts
from sparc3_lightning.stages import evaluate
from sparc3_lightning.stages.evaluate import RESULTS, Evaluation

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")


class Noting(Evaluation):
    """Notes the prompts of a batch each time that a model continues them."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 1:
            self.prompts = [prompt.id for prompt in batch["prompts"]]
        super().test_step(batch, batch_idx, dataloader_idx)

    def note(self, patch: pytest.MonkeyPatch, break_at: int | None = None) -> None:
        """Begin to take notes, and break off at a batch."""
        self.continued: list[list[str]] = []

        def noting(*args: Any, **options: Any) -> Any:
            if len(self.continued) == break_at:
                raise KeyboardInterrupt
            self.continued.append(self.prompts)
            return continue_prompts(*args, **options)

        patch.setattr(evaluate, "continue_prompts", noting)


def break_off(model: Noting, of: EvaluationData, at: int, patch: pytest.MonkeyPatch) -> None:
    model.note(patch, at)
    with pytest.raises(SystemExit):  # what Lightning makes of an interrupt
        run(model, of)
    assert not Path("out", RESULTS).exists()
    assert list(Path("out").glob("unfinished-*"))


@pytest.mark.slow
def test_an_evaluation_of_several_models_that_broke_off_keeps_what_every_model_has_continued(
    tiny_checkpoint, monkeypatch
):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    options = {"kind": Noting, "controls": Controls(1, 1), "doses": [2], "num_continuations": 2}
    whole = evaluation(tiny_checkpoint, neurons, **options)
    whole.note(monkeypatch)
    expected = run(whole, data(2), "whole")
    assert len(whole.continued) == 6 * 4
    # In the middle of the third batch, after the fourth of the six models.
    break_off(evaluation(tiny_checkpoint, neurons, **options), data(2), 6 * 2 + 4, monkeypatch)
    again = evaluation(tiny_checkpoint, neurons, **options)
    again.note(monkeypatch)
    assert run(again, data(2)) == expected
    assert completions() == completions("whole")
    kept = {prompt for prompts in whole.continued[:12] for prompt in prompts}
    assert again.continued == [prompts for prompts in whole.continued if not kept & set(prompts)]
    assert len(again.continued) == 12
    assert not list(Path("out").glob("unfinished-*"))


OPTIONS = {"controls": Controls(1, 1), "doses": [2], "num_continuations": 2}


@pytest.fixture(scope="module")
def left_over(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an evaluation with OPTIONS that broke off leaves in its folder."""
    folder = tmp_path_factory.mktemp("broken")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
        break_off(evaluation(tiny_checkpoint, neurons, kind=Noting, **OPTIONS), data(2), 7, patch)
        return Path("out/unfinished-0.jsonl").read_text()


@pytest.fixture
def in_a_folder_with_the_left_over(left_over: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished-0.jsonl").write_text(left_over)


@pytest.mark.usefixtures("in_a_folder_with_the_left_over")
@pytest.mark.few(1)
def test_continuations_of_the_same_run_are_taken_over(tiny_checkpoint, caplog):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with caplog.at_level("INFO"):
        run(evaluation(tiny_checkpoint, neurons, **OPTIONS), data(2))
    assert "Keeping the continuations of 2 prompts" in caplog.text


@pytest.mark.usefixtures("in_a_folder_with_the_left_over")
def test_continuations_of_a_run_that_told_toxic_prompts_apart_are_of_the_one_group_of_this_run(tiny_checkpoint, caplog):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with caplog.at_level("INFO"):
        results = run(evaluation(tiny_checkpoint, neurons, **OPTIONS), data(2, min_toxicity=None))
    assert "Keeping the continuations of 2 prompts" in caplog.text
    assert {group: of["num_prompts"] for group, of in results["baseline"]["groups"].items()} == {"all": 8}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"controls": Controls(2, 1)}, "models"),
        ({"controls": Controls(1, 2)}, "models"),
        ({"doses": [3]}, "models"),
        ({"dampings": [0.5]}, "models"),
        ({"scorers": ["small", "repetition"]}, "scorers"),
        ({"temperature": 0.9}, "sampling"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_model_is_loaded", "in_a_folder_with_the_left_over")
def test_continuations_of_a_run_with_other_models_are_refused(tiny_checkpoint, changes, field):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with pytest.raises(ValueError, match=rf"out holds continuations of another run: its {field} is "):
        run(evaluation(tiny_checkpoint, neurons, **{**OPTIONS, **changes}), data(2))


@pytest.mark.parametrize("other", ["order", "next", "least_relevant"])
@pytest.mark.usefixtures("no_model_is_loaded", "in_a_folder_with_the_left_over")
def test_continuations_of_other_doses_or_controls_from_another_neurons_json_are_refused(tiny_checkpoint, other):
    lists = {"chosen": PRUNED, "next": NEXT, "least_relevant": LEAST}
    name = "chosen" if other == "order" else other
    neurons = save_neurons(tiny_checkpoint, **{**lists, name: lists[name][::-1]})
    with pytest.raises(ValueError, match=r"out holds continuations of another run: its neurons "):
        run(evaluation(tiny_checkpoint, neurons, **OPTIONS), data(2))
