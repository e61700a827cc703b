"""Evaluation: what is refused, before the model is loaded."""

from pathlib import Path

import lightning as L
import pytest
from evaluations import LEAST, NEXT, PRUNED, UP, data, evaluation, run, save_neurons

from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.zero_shot import ZeroShot
from sparc3_lightning.models.components import Component
from sparc3_lightning.stages import evaluate
from sparc3_lightning.stages.evaluate import RESULTS

pytestmark = pytest.mark.usefixtures("seed_of_the_run", "input_files")


def test_too_few_prompts_after_leaving_some_out_is_an_error_that_says_so(tiny_checkpoint, neurons):
    with pytest.raises(ValueError, match=r"Only 8 prompts.*2 were used to attribute.*--data.prompts.num_prompts is 9"):
        run(evaluation(tiny_checkpoint, neurons), data(num_prompts=9))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_neurons_of_another_checkpoint_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    one = [Component("model.layers.0.mlp.up_proj", 3, -1.0)]
    changes = {"checkpoint": "another/model", "checkpoint_fingerprint": "files:other"}
    other = save_neurons(tiny_checkpoint, one, changes)
    with pytest.raises(ValueError, match=r"neurons.json is for the checkpoint 'another/model' \(files:other\), but"):
        run(evaluation(tiny_checkpoint, other))


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (Component("model.layers.0.mlp.up_proj", 24, -1.0), "Neuron 24 of model.layers.0.mlp.up_proj does not exist"),
        (
            Component("model.layers.0.mlp.up_proj", -1, -1.0),
            "neurons.0.index must be at least 0, and is -1",
        ),
        (
            Component("model.layers.7.mlp.up_proj", 0, -1.0),
            "'model.layers.7.mlp.up_proj' is not a layer of MLP neurons",
        ),
        (Component("model.layers.0.self_attn.q_proj", 0, -1.0), "is not a layer of MLP neurons"),
    ],
)
def test_neurons_that_the_model_does_not_have_are_refused_before_it_is_loaded(tiny_checkpoint, neuron, message):
    with pytest.raises(ValueError, match=message):
        run(evaluation(tiny_checkpoint, save_neurons(tiny_checkpoint, [neuron])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_windows_and_prompts_longer_than_the_context_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"65 tokens, the model's context 64: lower --data.text.window"):
        run(evaluation(tiny_checkpoint), data(window=65))
    with pytest.raises(ValueError, match=r"--model.sampling.max_new_tokens"):
        run(evaluation(tiny_checkpoint, max_new_tokens=60))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_existing_results_are_not_overwritten(tiny_checkpoint):
    Path("out").mkdir()
    Path("out", RESULTS).write_text("precious")
    with pytest.raises(FileExistsError, match=r"nothing was overwritten.*--trainer.logger.init_args.version"):
        run(evaluation(tiny_checkpoint))
    assert Path("out", RESULTS).read_text() == "precious"


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_prompt_of_white_space_and_an_empty_file_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    Path("blank.jsonl").write_text('{"text": "  \\n", "toxicity": 0.95}\n')
    with pytest.raises(ValueError, match="only white space"):
        run(evaluation(tiny_checkpoint), data(source="blank.jsonl"))
    Path("empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        run(evaluation(tiny_checkpoint), data(source="empty.jsonl"))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_data_module_of_another_kind_is_refused(tiny_checkpoint):
    with pytest.raises(TypeError, match="EvaluationData"):
        run(evaluation(tiny_checkpoint), WikiText2("text.txt", window=32, stride=32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_continuations": 0}, "--model.sampling.num_continuations must be at least 1, got 0"),
        ({"num_continuations": 6, "num_seeds": 4}, "--model.sampling.num_seeds must divide 6 continuations, got 4"),
        ({"num_continuations": 6, "num_seeds": 0}, "--model.sampling.num_seeds must divide 6 continuations, got 0"),
        ({"num_continuations": 2, "num_seeds": -1}, "--model.sampling.num_seeds must divide 2 continuations, got -1"),
        ({"max_new_tokens": 0}, "--model.sampling.max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "--model.sampling.temperature must be at least 0"),
        ({"top_p": 1.5}, "--model.sampling.top_p must be above 0 and at most 1"),
        ({"scorers": ["perspective"]}, r"--model.scorers: 'perspective' is neither 'small', original"),
        ({"scorers": ["small", "perspective"]}, r"--model.scorers: 'perspective' is neither 'small', original"),
        ({"scorers": ["no_such_package:score"]}, r"--model.scorers.*'no_such_package', which is not installed"),
        ({"scorers": []}, r"--model.scorers must name at least one scorer, got an empty list"),
        ({"scorers": ["small", "repetition", "small"]}, r"--model.scorers names 'small' twice: give each scorer once"),
        ({"scorers": "small"}, r"--model.scorers must be a list, such as \[small\], got 'small'"),
        ({"controls": Controls(-1)}, "--model.controls.num_draws must be at least 0, got -1"),
        ({"controls": Controls(1, 0)}, "--model.controls.num_continuations must be at least 1, got 0"),
        ({"doses": [3]}, "--model.doses needs --model.neurons"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(tiny_checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(tiny_checkpoint, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"doses": [2, 10]},
            r"--model.doses asks for 10 neurons, but --model.neurons lists 9: .*--model.num_ranked 10",
        ),
        ({"doses": [0, 3]}, r"--model.doses must be different numbers above 0, got \[0, 3\]"),
        ({"doses": [3, 3]}, r"--model.doses must be different numbers above 0, got \[3, 3\]"),
        ({"doses": [3], "dampings": [0.0]}, r"--model.dampings must be above 0 and at most 1, got \[0.0\]"),
        ({"doses": [3], "dampings": [0.5, 1.5]}, r"--model.dampings must be above 0 and at most 1"),
        ({"doses": [3], "dampings": []}, r"--model.dampings must be above 0 and at most 1, got \[\]"),
        ({"controls": Controls(1, 0)}, r"--model.controls.num_continuations must be at least 1, got 0"),
    ],
)
def test_doses_strengths_and_controls_that_cannot_be_are_refused_at_once(tiny_checkpoint, options, message):
    neurons = save_neurons(tiny_checkpoint, PRUNED, next=NEXT, least_relevant=LEAST)
    with pytest.raises(ValueError, match=message):
        evaluation(tiny_checkpoint, neurons, **options)


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize("which", ["next", "least_relevant"])
def test_listed_neurons_that_the_model_does_not_have_are_refused_before_it_is_loaded(tiny_checkpoint, which):
    neurons = save_neurons(tiny_checkpoint, PRUNED, **{which: [Component(UP[0], 24, 0.0)]})
    with pytest.raises(ValueError, match=r"Neuron 24 of model.layers.0.mlp.up_proj does not exist"):
        run(evaluation(tiny_checkpoint, neurons, controls=Controls(1)))


@pytest.mark.parametrize("name", ["math:no_such_function", "json.no_such_module:loads", "toy_scorers.inner:zero"])
def test_a_function_scorer_that_does_not_exist_is_refused_before_the_model_is_loaded(
    tiny_checkpoint, monkeypatch, tmp_path, name
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(evaluate, "load_for", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=f"'{name}'"):
        run(evaluation(tiny_checkpoint, scorers=[name]))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_data_of_zero_shot_tasks_that_cannot_be_had_stop_the_run_before_the_model_is_loaded(
    tiny_checkpoint, monkeypatch
):
    def fetch_tasks(asked: ZeroShot) -> None:
        raise ConnectionError(f"no data of {asked.tasks}")

    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluate, "fetch_tasks", fetch_tasks)
    with pytest.raises(ConnectionError, match=r"no data of \['piqa'\]"):
        run(evaluation(tiny_checkpoint, zero_shot=ZeroShot(["piqa"])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_zero_shot_accuracy_on_several_devices_is_refused_before_the_model_is_loaded(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"--model.zero_shot.tasks needs one device"):
        run(evaluation(tiny_checkpoint, zero_shot=ZeroShot(["piqa"])))


@pytest.mark.usefixtures("no_model_is_loaded")
def test_too_few_non_toxic_prompts_are_refused_before_the_model_is_loaded(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"Only 4 prompts of toxicity below 0.5.*--data.prompts.num_nontoxic is 5"):
        run(evaluation(tiny_checkpoint), data(num_nontoxic=5, nontoxic_source="mild.jsonl"))


def test_a_neurons_json_that_is_missing_or_foreign_is_refused_at_once(tiny_checkpoint):
    with pytest.raises(
        FileNotFoundError, match=r"--model.neurons: nowhere.json does not exist; 'sparc3 prune' writes it"
    ):
        evaluation(tiny_checkpoint, Path("nowhere.json"))
    Path("foreign.json").write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match=r"foreign.json is not a neurons.json"):
        evaluation(tiny_checkpoint, Path("foreign.json"))
