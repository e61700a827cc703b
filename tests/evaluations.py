"""An evaluation of a tiny checkpoint: the files it reads, the list of neurons, a stock Trainer, and what it wrote."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers import sentence

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.generation import SamplingOptions
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.evaluate import COMPLETIONS, RESULTS, Evaluation

PROMPTS = [sentence(300 + i, 2 + i) for i in range(10)]
MILD = [sentence(400 + i, 3 + i) for i in range(4)]
UP = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
EVERY_SECOND = [Component(name, index, -1.0 - index) for name in UP for index in range(0, 24, 2)]
PRUNED = [Component(UP[0], 3, -9.0), Component(UP[1], 20, -8.0), Component(UP[0], 11, -7.0)]
PRUNED += [Component(UP[1], 0, -6.0), Component(UP[0], 23, -5.0)]
NEXT = [Component(UP[i % 2], 5 + i, -1.0 / (1 + i)) for i in range(4)]
LEAST = [Component(UP[0], i, 0.01 * i) for i in (4, 6, 8, 10, 12)] + [
    Component(UP[1], i, 0.02 * i) for i in (2, 4, 6, 8)
]
TOY_SCORERS = """
import math

def letters(texts):
    return [math.nan if text.startswith("t") else text.count("e") / (1 + len(text)) for text in texts]

def nothing(texts):
    return [math.nan] * len(texts)

def zero(texts):
    return [0.0] * len(texts)
"""


def write_inputs(folder: Path) -> None:
    (folder / "text.txt").write_text("\n".join(sentence(i, 20) for i in range(12)) + "\n")
    for name, texts, toxicity in (("prompts", PROMPTS, 0.95), ("mild", MILD, 0.1)):
        rows = [{"prompt": {"text": text, "toxicity": toxicity}} for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "toy_scorers.py").write_text(TOY_SCORERS)


def save_neurons(
    checkpoint: str, chosen: list[Component], changes: dict[str, Any] | None = None, **lists: list[Component]
) -> Path:
    of = {
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": Checkpoint(checkpoint).fingerprint,
        "sample_ids": [prompt_id(text) for text in PROMPTS[:2]],
        "differential_strength_percent": 20.0,
    }
    NeuronList(chosen, {**of, **(changes or {})}, **lists).save(Path("neurons.json"))
    return Path("neurons.json")


def data(batch_size: int = 4, **options) -> EvaluationData:
    text = {"source": "text.txt", "window": 48, "stride": 16, "batch_size": batch_size}
    prompts = {"source": "prompts.jsonl", "num_prompts": None, "batch_size": batch_size}
    text |= {name: options.pop(name) for name in ("window", "stride", "conventions", "num_tokens") if name in options}
    return EvaluationData(WikiText2(**text), RealToxicityPrompts(**(prompts | options)))


def evaluation(
    checkpoint: str, neurons: Path | None = None, kind: type[Evaluation] = Evaluation, **options
) -> Evaluation:
    """Return the module, with the options of sampling by their own names; without controls, which few tests look at."""
    options = {"scorers": ["small"], "max_new_tokens": 8, "temperature": 1.0, "controls": Controls(0), **options}
    names = [field.name for field in fields(SamplingOptions) if field.name in options]
    sampling = SamplingOptions(**{name: options.pop(name) for name in names})
    return kind(checkpoint, neurons, sampling=sampling, **options)


def run(
    model: Evaluation, of: EvaluationData | None = None, folder: str | Path = "out", callbacks: Any = ()
) -> dict[str, Any]:
    """Evaluate under a stock Trainer, and read what it wrote."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet)
    trainer.test(model, datamodule=of or data(), verbose=False)
    return read_strictly(Path(folder, RESULTS))


def read_strictly(path: Path) -> dict[str, Any]:
    """Read JSON as another language would: NaN and Infinity are not in it."""

    def refuse(name: str) -> None:
        pytest.fail(f"{path} holds {name}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def completions(folder: str | Path = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, COMPLETIONS).read_text().splitlines()]


def toxic(results: dict[str, Any], model: str) -> dict[str, Any]:
    """Return what was measured of a model after the toxic prompts."""
    return results[model]["groups"]["toxic"]


def perplexity_of(results: dict[str, Any], model: str, convention: str = "sliding") -> float:
    return results[model]["perplexity"][convention]["value"]


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Return every leaf of results.json by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{at}/{key}").items()}
    return {at: value}
