"""A circuit that does no better than guessing, or than a model with every component out, is said to."""

import json
import math
import random

import pytest

from sparc3_lightning.report.circuits import (
    CircuitFound,
    CircuitResults,
    Curve,
    Measured,
    SeedSteps,
    chance_level,
    draw_circuit,
    summary,
)


def results(whole: float, circuit: float, emptied: float | None, number: int = 126) -> CircuitResults:
    step = SeedSteps(0.5, [5], circuit, None, [circuit], 0.1, None, [0.1])
    empty = None if emptied is None else Measured(emptied, 0.0)
    curve = Curve("lrp", "neuron", 10, 1, [step], ["a"], CircuitFound(0.5, 5, circuit, 0.1, 5, None), empty)
    random_order = Curve("random order", "neuron", 10, 1, [step])
    return CircuitResults(
        checkpoint="model", checkpoint_fingerprint="files:a", data={}, num_samples=number, num_left_out=0,
        whole_model=Measured(whole, 1.0), threshold=0.9, curves=[curve, random_order],
    )  # fmt: skip


@pytest.mark.parametrize("number", [1, 4, 5, 14, 126, 128, 1000, 5000])
@pytest.mark.few(7)
def test_guessing_is_right_more_often_than_the_chance_level_in_less_than_5_percent(number):
    level = round(chance_level(number) * number)
    of_more = sum(math.comb(number, right) for right in range(level + 1, number + 1)) / 2**number
    assert of_more < 0.05
    assert of_more + math.comb(number, level) / 2**number >= 0.05
    guesses = random.Random(0)
    above = sum(guesses.getrandbits(number).bit_count() > level for _ in range(2000)) / 2000
    assert above <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_a_circuit_well_above_guessing_has_no_warning():
    found = results(0.97, 0.9, 0.52)
    assert found.warnings == []
    assert "Warning" not in summary(found)


def test_a_model_that_may_be_guessing_is_said_to_and_so_is_its_circuit():
    found = results(0.56, 0.52, None)
    model, circuit = found.warnings
    assert model == (
        "The whole model is right on 56.0% of 126 samples, and guessing is right on up to 57.1%: it has no behaviour "
        "that a circuit could keep."
    )
    assert circuit == (
        "The circuit of neurons by lrp is right on 52.0%, and guessing is right on up to 57.1% of 126 samples: it need "
        "not keep anything of the behaviour."
    )
    assert summary(found).endswith(f"Warning: {model}\n\nWarning: {circuit}")


def test_a_circuit_that_is_right_as_often_as_with_everything_removed_is_said_to_be():
    (warning,) = results(0.7, 0.62, 0.63, number=1000).warnings
    assert "right on 62.0%, and so is the model with every neuron out on 63.0%" in warning
    assert results(0.7, 0.64, 0.63, number=1000).warnings == []
    (warning,) = results(0.62, 0.556, 0.556).warnings
    assert "right on 55.6%" in warning


def test_circuit_json_holds_the_warnings_and_comes_back_without_them(tmp_path):
    found = results(0.56, 0.52, 0.5)
    found.save(tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text())
    assert content["warnings"] == found.warnings
    assert content["chance"] == chance_level(126) == pytest.approx(72 / 126)
    assert CircuitResults.load(tmp_path / "circuit.json") == found
    draw_circuit(found, tmp_path / "circuit.png")
    assert (tmp_path / "circuit.png").read_bytes()[:4] == b"\x89PNG"
