"""The public names: they resolve, the README lists them, and the package alone imports nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import NEURONS, random_scores, save_scores
from made_up import made_up

import sparc3_lightning
from sparc3_lightning import NeuronList, Results, ScoreFile

README = (Path(__file__).parents[1] / "README.md").read_text()
TIMED = """
import sys, time
start = time.perf_counter()
import sparc3_lightning
print(time.perf_counter() - start, "torch" in sys.modules)
"""


@pytest.mark.parametrize("name", sparc3_lightning.__all__)
def test_a_public_name_can_be_imported_and_the_readme_lists_it(name):
    assert getattr(sparc3_lightning, name).__class__ is not type(sys)
    assert name in dir(sparc3_lightning)
    section = README.partition("## From Python\n")[2].partition("\n## ")[0]
    assert f"`{name}`" in section


def test_the_public_files_are_saved_and_loaded_by_a_path_that_is_a_text():
    results, _ = made_up()
    for kind, of in ((NeuronList, NeuronList(NEURONS, {})), (Results, results)):
        of.save("file.json")
        assert kind.load("file.json").to_json() == of.to_json()
    save_scores("scores.safetensors", random_scores(0))
    ScoreFile.load("scores.safetensors").save("again.safetensors")
    assert ScoreFile.load("again.safetensors").provenance == ScoreFile.load("scores.safetensors").provenance


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match=r"'sparc3_lightning' has no attribute 'Imagenet'"):
        _ = sparc3_lightning.Imagenet


@pytest.mark.slow
def test_the_package_alone_is_imported_in_no_time_and_without_torch():
    turns = [subprocess.run([sys.executable, "-c", TIMED], check=True, capture_output=True, text=True) for _ in "abc"]
    said = [turn.stdout.split() for turn in turns]
    assert min(float(seconds) for seconds, _ in said) < 0.3
    assert {torch for _, torch in said} == {"False"}
