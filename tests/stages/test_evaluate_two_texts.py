"""Perplexity on two texts: the figures of the second are those of an evaluation of its own, and the first stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import LEAST, PRUNED, data, evaluation, run, save_neurons, write_inputs
from helpers import sentence

from sparc3_lightning.cli import main
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.wikitext2 import WikiText2
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.reproduction import ReproductionResults
from sparc3_lightning.stages.reproduce import Reproduction

OTHER = {"source": "other.txt", "window": 24, "stride": 24, "batch_size": 3}


@pytest.fixture(autouse=True)
def neurons(tiny_checkpoint: str, tmp_path: Path) -> Path:
    """A list of neurons, beside two texts and prompts."""
    write_inputs(tmp_path)
    (tmp_path / "other.txt").write_text("\n".join(sentence(50 + i, 9) for i in range(15)) + "\n")
    return save_neurons(tiny_checkpoint, PRUNED, least_relevant=LEAST)


def texts(first: WikiText2 | None = None, **other: Any) -> EvaluationData:
    of = data(num_prompts=3)
    return EvaluationData(first or of.text, of.prompts, other_text=WikiText2(**(OTHER | other)))


def test_each_text_has_the_figures_that_it_has_by_itself(tiny_checkpoint: str, neurons: Path) -> None:
    def measured(of: EvaluationData, folder: str) -> dict[str, Any]:
        options = {"controls": Controls(1), "max_new_tokens": 2}
        return run(evaluation(tiny_checkpoint, neurons, **options), of, folder)

    both, first = measured(texts(), "both"), measured(data(num_prompts=3), "first")
    second = measured(EvaluationData(WikiText2(**OTHER), data(num_prompts=3).prompts), "second")
    for place in ("perplexity", "num_tokens", "num_windows"):
        for model in ("baseline", "pruned"):
            of_second = {f"other_text_{name}": value for name, value in second[model][place].items()}
            assert both[model].pop(place) == first[model].pop(place) | of_second
    change = {f"other_text_{name}": value for name, value in second["perplexity_change"].items()}
    assert both.pop("perplexity_change") == first.pop("perplexity_change") | change
    doses = [
        [*of["doses"], *(draw for kind in of["controls"].values() for draw in kind["draws"])] for of in (both, second)
    ]
    for one, alone in zip(*doses, strict=True):
        assert one.pop("other_text_percent") == alone["perplexity_percent"]
    protocol = both["protocol"].pop("other_text")
    assert protocol == second["protocol"]["perplexity"]
    assert both["inputs"].pop("other_text") == second["inputs"]["text"]
    assert both["config"].pop("other_text") == second["config"]["text"]
    assert both["config"]["classes"].pop("other_text") == "sparc3_lightning.data.wikitext2.WikiText2"
    assert {**both, "sha256": ""} == {**first, "sha256": ""}


def test_an_option_of_the_other_text_is_named_in_its_error(tiny_checkpoint: str) -> None:
    for options, said in (
        ({"window": 4000}, r"--data\.other_text\.window"),
        (
            {"window": 4000, "source": "text.txt", "num_tokens": 30},
            r"30 tokens, fewer than --data\.other_text\.window 4000",
        ),
        ({"source": "prompts.jsonl", "text_field": "words"}, r"--data\.other_text\.text_field"),
    ):
        with pytest.raises(ValueError, match=said):
            run(evaluation(tiny_checkpoint), texts(**options))
    with pytest.raises(FileNotFoundError, match=r"'gone\.txt' does not exist"):
        run(evaluation(tiny_checkpoint), texts(source="gone.txt"))


@pytest.mark.slow
@pytest.mark.usefixtures("as_if_from_python")
def test_an_evaluation_on_two_texts_is_reproduced(tiny_checkpoint: str, neurons: Path) -> None:
    run(evaluation(tiny_checkpoint, neurons, controls=Controls(1), max_new_tokens=2, doses=[2]), texts())
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["reproduce", "out/results.json", *quiet])
    found = ReproductionResults.load(Path("lightning_logs/reproduce/version_0/reproduction.json"))
    assert (found.changed, found.num_differing) == ([], 0)
    names = {figure.name for figure in found.figures}
    assert {"pruned.perplexity.other_text_sliding", "doses.pruned.other_text_percent"} <= names
    Path("other.txt").write_text(sentence(1, 200))
    changed = Reproduction(Path("out/results.json")).changed(torch.device("cpu"))
    assert [change.name for change in changed] == ["other_text"]
