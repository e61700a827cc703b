"""The picture and the table of circuits, of odd names and of measures that are not finite."""

import csv
import io
import math
from pathlib import Path

import pytest

from sparc3_lightning.report.circuits import (
    CIRCUIT,
    CircuitFound,
    CircuitResults,
    Curve,
    Measured,
    SeedSteps,
    circuit_csv,
    summary,
)
from sparc3_lightning.report.drawing import draw

OUT = Path("out")


def made_up(method: str, value: float = 0.5, num_steps: int = 3) -> CircuitResults:
    steps = [
        SeedSteps((1 + i) / num_steps, [i, i], 0.5, value, [0.5, value], value, value, [value, 1.0])
        for i in range(num_steps)
    ]
    found = CircuitFound(0.5, 3, 0.5, value, 5, None)
    return CircuitResults(
        checkpoint=method,
        checkpoint_fingerprint="files:a",
        data={method: method},
        num_samples=4,
        num_left_out=0,
        whole_model=Measured(0.9, value),
        threshold=0.9,
        curves=[Curve(method, "neuron", 8, 2, steps, [method], found), Curve("random order", "neuron", 8, 2, steps)],
    )


@pytest.mark.parametrize("method", ["$x_1$ {0}", "\x1b[2J\u202e", "=1+1", "名前", "x" * 500, "a\nb", "\ud800"])
@pytest.mark.few(2)
def test_a_hostile_name_of_a_method_is_drawn_and_said_as_it_is(method):
    results = made_up(method)
    results.save(OUT / CIRCUIT)
    draw(OUT)
    assert {path.name for path in OUT.iterdir()} == {CIRCUIT, "circuit.csv", "circuit.png"}
    assert not set(summary(results)) & set("\x1b\u202e\ud800")
    assert len(summary(results).splitlines()) == len(summary(made_up("lrp")).splitlines())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_steps", [1, 200])
@pytest.mark.few(2)
def test_measures_that_are_not_finite_are_drawn_and_empty_in_csv(value, num_steps):
    made_up("lrp", value, num_steps).save(OUT / CIRCUIT)
    draw(OUT)
    rows = list(csv.reader(io.StringIO(circuit_csv(made_up("lrp", value, num_steps).curves))))
    assert len(rows) == 1 + 2 * num_steps
    assert rows[1][6:] == ["0.5", "", "", ""]
