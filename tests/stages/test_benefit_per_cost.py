"""Neurons by benefit per cost: what is predicted beside what is measured, and costs of two kinds, which are refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers import MODULES, provenance, random_scores, save_scores, sentence

from sparc3_lightning.cli import main
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.selection.neuron_list import NeuronList, SelectionResults
from sparc3_lightning.selection.prediction import Prediction
from sparc3_lightning.stages.prune import Pruning

COST = {"method": "gradient", "target": "sampled", "relevance": "fisher", "chunk": 64}
COST["num_tokens"] = 5120  # so many that the floor is a tenth of the mean
BENEFIT = {"method": "gradient", "target": "lexicon_probability", "relevance": "signed"}


@pytest.fixture
def files(tiny_checkpoint) -> tuple[Path, Path, Path]:
    """Costs, benefits of both signs, and documents."""
    of = provenance(tiny_checkpoint, Checkpoint(tiny_checkpoint).fingerprint)
    documents = Path("documents.jsonl")
    documents.write_text("\n".join(json.dumps({"text": sentence(i, 14)}) for i in range(8)))
    benefits = {name: score - 0.3 for name, score in random_scores(9).items()}
    costs = save_scores("costs.safetensors", random_scores(0, 0.01), of, **COST)
    return costs, save_scores("benefits.safetensors", benefits, of, **BENEFIT), documents


def prune(costs: Path, benefits: Path, documents: Path, *options: str) -> Path:
    args = ["prune", f"--model.general=[{costs}]", f"--model.behavior={benefits}", "--trainer.accelerator=cpu"]
    args += ["--model.criterion=benefit_per_cost", "--model.budget.max_perplexity_increase=0.02", "--data=C4"]
    args += [f"--data.source={documents}", "--data.seq_len=12", "--data.num_samples=8"]
    return Path(main([*args, *options]).trainer.log_dir)


def test_a_list_within_a_budget_says_what_was_predicted_beside_what_was_measured(files, caplog):
    with caplog.at_level("INFO"):
        folder = prune(*files)
    found = NeuronList.load(folder / "neurons.json")
    budget, prediction = found.provenance["budget"], Prediction(random_scores(0, 0.01), 0.1)
    assert budget["predicted"] == pytest.approx(prediction.rise(found.neurons))
    ranked = found.neurons + found.next
    first = budget["measured"][0]
    assert first["num_neurons"] == prediction.number_within(ranked, 0.02)
    assert first["predicted"] == pytest.approx(prediction.rise(ranked[: first["num_neurons"]]))
    assert first["predicted"] <= 0.02
    assert f"perplexity {100 * first['rise']:+.2f} %, predicted {100 * first['predicted']:+.2f} %" in caplog.text
    assert f" % ({100 * budget['predicted']:+.2f} % predicted): " in caplog.text
    assert SelectionResults.load(folder / "selection.json").budget.predicted == budget["predicted"]
    assert all(neuron.score < 0 for neuron in ranked), "what has no benefit is not listed"


def test_costs_of_another_chunk_and_of_text_of_another_kind_are_refused(files):
    _, benefits, _ = files
    other = save_scores("other.safetensors", random_scores(1), **{**COST, "chunk": 32})
    one = save_scores("one.safetensors", random_scores(2), **COST)
    with pytest.raises(ValueError, match=r"do not belong together: chunk is 64 in one.* but 32 in other"):
        Pruning([one, other], benefits, criterion="benefit_per_cost").prune(Path("out"))
    nothing = save_scores("nothing.safetensors", {name: torch.zeros(24) for name in MODULES}, **COST)
    unsure = save_scores("unsure.safetensors", random_scores(3), **BENEFIT)
    with pytest.raises(ValueError, match=r"--model\.general holds a cost of 0 for every component"):
        Pruning([nothing], unsure, criterion="benefit_per_cost").prune(Path("out"))
    assert not Path("out", "neurons.json").exists()


def test_neurons_and_channels_are_ranked_and_measured_together(files, tiny_checkpoint):
    _, _, documents = files
    of = provenance(tiny_checkpoint, Checkpoint(tiny_checkpoint).fingerprint)
    attentions = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    draw = torch.Generator().manual_seed(1)
    sizes = {**dict.fromkeys(MODULES, 24), **dict.fromkeys(attentions, 16)}
    costs = {name: torch.rand(number, generator=draw) / 100 for name, number in sizes.items()}
    benefits = {name: torch.randn(number, generator=draw) for name, number in sizes.items()}
    both = {"granularity": "neuron+channel", "layers": ["up_proj", "o_proj"]}
    general = save_scores("both_costs.safetensors", costs, of, **COST, **both)
    behavior = save_scores("both_benefits.safetensors", benefits, of, **BENEFIT, **both)
    found = NeuronList.load(prune(general, behavior, documents) / "neurons.json")
    floor = 0.1 * torch.cat(list(costs.values())).mean().item()
    rows = [
        (-b / (costs[n][i].item() + floor), n, i) for n, of_n in benefits.items() for i, b in enumerate(of_n.tolist())
    ]
    expected = [(n, i, "channel" if n in attentions else "neuron") for score, n, i in sorted(rows) if score < 0]
    assert [(c.module, c.index, c.granularity) for c in found.neurons + found.next] == expected
    assert {c.granularity for c in found.neurons} == {"neuron", "channel"}
    assert found.provenance["budget"]["predicted"] == pytest.approx(Prediction(costs, 0.1).rise(found.neurons))
    for option in ("--model.budget.refine=1", "--model.ablation=mean"):
        with pytest.raises(ValueError, match=r"is for neurons, and these are scores of neurons and channels: leave it"):
            prune(general, behavior, documents, option)
