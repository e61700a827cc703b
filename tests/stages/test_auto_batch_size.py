"""Batch size auto in the stages: where memory runs out the same samples go in halves, and no number changes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluations import PRUNED, completions, data, evaluation, flat, run, save_neurons
from helpers import sentence, trainer

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.models.batching import Batching
from sparc3_lightning.models.sharding import FSDP2, check_batch_size
from sparc3_lightning.stages.attribute import SCORES, Attribution
from sparc3_lightning.stages.evaluate import Evaluation

pytestmark = pytest.mark.usefixtures("seed_of_the_run")


def with_memory_for(kind: type[Any], rows: int, where: str = "") -> type[Any]:
    """Return a stage whose model runs out of memory on more rows: in its forward or, by name, somewhere inside."""

    class Small(kind):
        def configure_model(self) -> None:
            super().configure_model()

            def check(module: Any, inputs: Any, kwargs: Any = None) -> None:
                ids = (kwargs or {}).get("input_ids")
                if len(inputs[0] if ids is None else ids) > rows:
                    raise torch.OutOfMemoryError("CUDA out of memory.")

            if where != "backward":
                self.model.get_submodule(where).register_forward_pre_hook(check, with_kwargs=True)
                return

            def check_gradient(module: Any, inputs: Any, output: Any) -> None:
                if len(inputs[0]) > rows:  # the gradient of the layer above has arrived by then
                    output.register_hook(lambda gradient: check(None, [gradient]))

            self.model.model.layers[0].mlp.up_proj.register_forward_hook(check_gradient)

    Small.__name__ = kind.__name__
    return Small


@pytest.fixture
def prompts() -> str:
    rows = [{"text": sentence(100 + i, 2 + i), "toxicity": 0.95} for i in range(13)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return "rows.jsonl"


def attributed(module: Attribution, source: str, batch_size: Any, folder: str) -> ScoreFile:
    samples = ToxicPrompts(source, num_samples=13, batch_size=batch_size)
    trainer(folder).predict(module, datamodule=samples, return_predictions=False)
    return ScoreFile.load(Path(folder, SCORES))


@pytest.mark.parametrize(
    ("where", "rows", "options"),
    [
        pytest.param("", 100, {}, marks=pytest.mark.slow),
        ("", 3, {}),
        pytest.param("model.layers.1", 1, {"method": "wanda", "activations": True}, marks=pytest.mark.slow),
        ("model.layers.1.mlp.up_proj", 4, {"method": "gradient", "activations": True, "nonfinite": "zero"}),
        ("backward", 2, {"method": "gradient", "target": "text", "relevance": "absolute"}),
    ],
)
@pytest.mark.few(1)
def test_scores_are_those_of_single_samples_wherever_memory_runs_out(tiny_checkpoint, prompts, where, rows, options):
    module = with_memory_for(Attribution, rows, where)(tiny_checkpoint, dtype="float64", **options)
    found = attributed(module, prompts, "auto", "auto")
    single = attributed(Attribution(tiny_checkpoint, dtype="float64", **options), prompts, 1, "single")
    for name, scores in single.scores.items():
        assert torch.allclose(found.scores[name], scores, rtol=1e-6, atol=1e-9)
    assert found.provenance.num_samples == 13
    assert found.provenance.data["batch_size"] == "auto"
    assert found.provenance.data["auto_batch_size"] == {100: 64, 3: 3, 1: 1, 4: 3, 2: 1}[rows]


def everything(checkpoint: str, kind: type[Any], batch_size: Any, folder: str) -> dict[str, Any]:
    of = data(batch_size)
    of.text.batch_size = of.prompts.batch_size = batch_size
    neurons = save_neurons(checkpoint, PRUNED)
    options = {"num_continuations": 2, "controls": Controls(0), "dtype": "float64"}
    return run(evaluation(checkpoint, neurons, kind, **options), of, folder)


@pytest.mark.slow
@pytest.mark.usefixtures("input_files")
@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_continuations_and_perplexity_are_those_of_batch_size_1_wherever_memory_runs_out(tiny_checkpoint, rows):
    single = everything(tiny_checkpoint, Evaluation, 1, "single")
    found = everything(tiny_checkpoint, with_memory_for(Evaluation, rows), "auto", "auto")
    drawn = [
        [(row["model"], row["prompt_id"], row["token_ids"]) for row in completions(of)] for of in ("auto", "single")
    ]
    assert drawn[0] == drawn[1]
    sizes = found.pop("auto_batch_sizes")
    assert sizes.keys() == {"text", "prompts"}
    if rows == 2:
        assert sizes == {"text": 2, "prompts": 1}  # two continuations of one prompt grow together
    ours, theirs = flat(found), flat(single)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        if path != "/sha256" and not path.endswith("/batch_size"):
            assert ours[path] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), path


def test_not_even_one_sample_that_fits_is_a_sentence(tiny_checkpoint, prompts):
    with pytest.raises(OptionError, match=r"^--data.batch_size auto: memory ran out with a single one"):
        attributed(with_memory_for(Attribution, 0)(tiny_checkpoint), prompts, "auto", "out")


def test_a_given_size_that_does_not_fit_is_a_sentence(tiny_checkpoint, prompts):
    with pytest.raises(OptionError, match=r"Memory ran out with --data.batch_size 8 .*give auto"):
        attributed(with_memory_for(Attribution, 3)(tiny_checkpoint), prompts, 8, "out")


def test_sums_of_weights_cannot_be_taken_back(tiny_checkpoint, prompts):
    with pytest.raises(OptionError, match=r"^--data.batch_size auto is not for scores of weights"):
        attributed(Attribution(tiny_checkpoint, granularity="weight"), prompts, "auto", "out")


def test_a_sharded_model_needs_a_number():
    module: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=FSDP2()))
    check_batch_size(module, Batching(4, is_auto=False))
    with pytest.raises(OptionError, match=r"^--data.text.batch_size auto cannot be had with --trainer.strategy fsdp2"):
        check_batch_size(module, Batching(4, is_auto=True, group="data.text"))


def test_both_parts_of_an_evaluation_take_auto(tiny_checkpoint):
    parts = WikiText2("text.txt", batch_size="auto"), RealToxicityPrompts("prompts.jsonl", batch_size="auto")
    assert [part.hparams["batch_size"] for part in (EvaluationData(*parts).text, parts[1])] == ["auto", "auto"]
