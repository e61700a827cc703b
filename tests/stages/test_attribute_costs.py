"""The predict loop that scores costs: neurons and channels in one pass, how noisy they are, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sentence, trainer
from safetensors import safe_open

from sparc3_lightning.attribution.progress import Progress
from sparc3_lightning.attribution.scores import ScoreFile, check_match
from sparc3_lightning.cli import main
from sparc3_lightning.data.c4 import C4
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.stages.attribute import SCORES, Attribution

pytestmark = pytest.mark.usefixtures("as_if_from_a_shell")
FISHER: dict[str, Any] = {"method": "gradient", "target": "sampled", "relevance": "fisher"}
UP, OUT = ([f"model.layers.{i}.{name}" for i in range(2)] for name in ("mlp.up_proj", "self_attn.o_proj"))


@pytest.fixture
def documents(tmp_path) -> str:
    path = tmp_path / "documents.txt"
    path.write_text("\n".join(sentence(i, 30) for i in range(12)) + "\n")
    return str(path)


def attribute(
    checkpoint: str, documents: str, folder: str, num_samples: int = 6, size: int = 2, **options: Any
) -> tuple[ScoreFile, Attribution]:
    model = Attribution(checkpoint, **{**FISHER, **options})
    data = C4(documents, num_samples=num_samples, seq_len=24, batch_size=size)
    trainer(folder).predict(model, datamodule=data, return_predictions=False)
    return ScoreFile.load(Path(folder, SCORES)), model


def test_one_pass_scores_neurons_and_channels_as_two_passes_do(tiny_checkpoint, documents, caplog):
    argv = [f"--model.checkpoint={tiny_checkpoint}", "--model.method=gradient", "--model.target=sampled"]
    argv += ["--model.relevance=fisher", "--model.granularity=neuron+channel", "--model.chunk=8"]
    argv += ["--data=C4", f"--data.source={documents}", "--data.num_samples=6", "--data.seq_len=24"]
    main(["attribute", *argv, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    (path,) = Path().glob(f"lightning_logs/attribute/*/{SCORES}")
    both = ScoreFile.load(path)
    assert {name: len(score) for name, score in both.scores.items()} == {
        **dict.fromkeys(UP, 24),
        **dict.fromkeys(OUT, 16),
    }
    spec, alike = both.provenance.spec, both.provenance.split_half
    assert (spec.granularity, spec.chunk, spec.layers) == ("neuron+channel", 8, ["up_proj", "o_proj"])
    assert alike is not None
    assert 0 < alike < 1
    said = caplog.text
    assert f"Costs of two halves of the text correlate by {alike:.2f} (Spearman)" in said
    assert "Scored 100 % of the MLP neurons: 48, and 32 attention channels\n" in said
    found: dict[str, torch.Tensor] = {}
    for granularity in ("neuron", "channel"):
        alone, _ = attribute(tiny_checkpoint, documents, granularity, 6, 3, granularity=granularity, chunk=8)
        found |= alone.scores
    for name, score in both.scores.items():
        torch.testing.assert_close(score, found[name], rtol=1e-4, atol=0)
        assert score.min() >= 0
    signed, _ = attribute(
        tiny_checkpoint, documents, "signed", granularity="neuron+channel", relevance="signed", target="text"
    )
    assert signed.shapes == both.shapes
    assert signed.provenance.split_half is signed.provenance.spec.chunk is None


def test_costs_of_other_chunks_are_not_averaged_and_those_of_other_seeds_are(tiny_checkpoint, documents, monkeypatch):
    files = [attribute(tiny_checkpoint, documents, f"chunk {chunk}", chunk=chunk)[0] for chunk in (4, 8)]
    with pytest.raises(ValueError, match=r"do not belong together: chunk is 4 in .* but 8 in"):
        check_match(files)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    other, module = attribute(tiny_checkpoint, documents, "seed", chunk=8)
    check_match([files[1], other])
    assert not any(torch.equal(score, files[1].scores[name]) for name, score in other.scores.items())
    assert module.identity["seed"] == 1


def test_costs_that_broke_off_go_on_with_both_halves(tiny_checkpoint, documents):
    whole, module = attribute(tiny_checkpoint, documents, "whole")
    first = {sample.id for sample in module.reference_samples.samples[:3]}

    class Stopping(Attribution):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise KeyError("stop")
            super().predict_step(batch, batch_idx)

    data = C4(documents, num_samples=6, seq_len=24, batch_size=3)
    with pytest.raises(KeyError):
        trainer("broken").predict(Stopping(tiny_checkpoint, save_every=1, **FISHER), datamodule=data)
    (state,) = Path("broken").glob("state-*")
    with safe_open(state, framework="pt") as file:
        assert {f"{half}{name}" for half in ("", "odd/") for name in UP} == set(file.keys())
    again, module = attribute(tiny_checkpoint, documents, "broken")
    assert isinstance(module.progress, Progress)
    assert set(module.progress.sample_ids) == first
    for name, score in again.scores.items():
        torch.testing.assert_close(score, whole.scores[name], rtol=1e-4, atol=0)
    assert again.provenance.split_half == pytest.approx(whole.provenance.split_half, abs=0.01)


def test_how_noisy_costs_are_is_said_with_the_way_to_better_ones(tiny_checkpoint, documents):
    _, few = attribute(tiny_checkpoint, documents, "few", num_samples=2)
    assert re.search(
        r"correlate by 0\.\d\d \(Spearman\), less than 0.7: .* give more --data.num_samples", few.summary()
    )
    one, module = attribute(tiny_checkpoint, documents, "one", num_samples=1)
    assert one.provenance.split_half is None
    assert "cannot be said of a single sample: give more --data.num_samples" in module.summary()


def test_a_cost_of_0_for_every_neuron_is_refused(tiny_checkpoint, documents):
    model = load_model(tiny_checkpoint, torch.float32)
    model.lm_head.weight.zero_()
    model.save_pretrained("silent")
    Checkpoint(tiny_checkpoint).tokenizer().save_pretrained("silent")
    with pytest.raises(ValueError, match=r"--model.relevance fisher: the cost of every component is 0.*--data"):
        attribute("silent", documents, "out")
    assert not Path("out", SCORES).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonfinite": "zero"}, "--model.nonfinite zero would make a component cheap .*--model.dtype float32"),
        ({"target": "text"}, "--model.relevance fisher needs .*--model.target sampled, got gradient and text"),
        ({"method": "lrp"}, "fisher needs --model.method gradient"),
        ({"relevance": "signed"}, "--model.target sampled needs --model.relevance fisher, got signed"),
        ({"method": "wanda"}, "wanda has no target"),
        ({"chunk": 0}, "--model.chunk must be at least 1, got 0"),
        ({"granularity": "weight"}, "--model.relevance fisher is not defined for weights"),
        ({"layers": ["q_proj"]}, r"fisher is defined for MLP neurons only: .*--model.layers .*got \['q_proj'\]"),
        ({"granularity": "channel", "layers": ["up_proj"]}, "channel scores attention channels, at the last layer"),
        ({"granularity": "neuron+channel", "layers": ["up_proj"]}, "--model.layers to name both, such as up_proj and"),
        ({"granularity": "neuron+channel", "layers": ["q_proj", "o_proj"]}, "MLP neurons only"),
        ({"granularity": "neuron+channel", "activations": True}, "neurons, not for neurons and channels"),
    ],
)
def test_costs_that_make_no_sense_are_refused_before_anything_is_loaded(changes, words):
    with pytest.raises(ValueError, match=words):
        Attribution("nothing", **{**FISHER, **changes})
