"""Single weights: chosen by prune, exported, and what lists of them share."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weights import OUT, PROVENANCE, SHAPES, both_families, in_memory, logits, scores_of, write

from sparc3_lightning.models.architectures import find_layers, weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import mask
from sparc3_lightning.selection.budget import Budget
from sparc3_lightning.selection.criteria import differential_strength, lowest_of_modules, select_neurons
from sparc3_lightning.selection.neuron_list import NeuronList, histogram
from sparc3_lightning.stages.compare import Comparison
from sparc3_lightning.stages.prune import NEURONS, SELECTION, Pruning


@pytest.fixture
def files() -> tuple[list[Path], Path]:
    """Two indexes of general scores and one of the behaviour, which is weaker."""
    general = [write(f"general_{i}", scores_of(i), sample_ids=[f"document-{i}"]) for i in range(2)]
    return general, write("behavior", scores_of(9, 0.5), sample_ids=["p1"])


def differences() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    general = {name: torch.stack([scores_of(i)[name] for i in range(2)]).mean(dim=0) for name in SHAPES}
    return general, {name: general[name] - scores_of(9, 0.5)[name] for name in SHAPES}


def test_prune_selects_the_weights_of_the_most_negative_difference_over_all_layers(files):
    found = Pruning(*files, num_neurons=20, num_ranked=50, granularity="weight", dampings=[0.5]).prune(OUT)
    general, difference = differences()
    expected = [dataclasses.replace(n, damping=0.5) for n in in_memory(difference, 50)]
    assert found.neurons + found.next == expected
    assert len(found.neurons) == 20
    assert NeuronList.load(OUT / NEURONS) == found
    pool = lowest_of_modules(found.neurons, [(name, score.abs()) for name, score in general.items()])
    assert sorted(found.least_relevant, key=lambda n: n.key) == sorted(pool, key=lambda n: n.key)
    assert found.provenance["behavior"]["spec"]["granularity"] == "weight"
    assert found.provenance["sample_ids"] == ["document-0", "document-1", "p1"]


def test_selection_json_of_weights_has_the_figures_of_all_of_them_and_the_pictures_are_there(files, caplog):
    caplog.set_level("INFO")
    found = Pruning(*files, num_neurons=20, granularity="weight").prune(OUT)
    general, difference = differences()
    every = torch.cat([score.flatten() for score in difference.values()])
    selection = json.loads((OUT / SELECTION).read_text())
    assert selection["granularity"] == "weight"
    assert selection["num_neurons"] == 20
    assert selection["num_candidates"] == 2 * 24 * 16
    assert selection["num_negative"] == int((every < 0).sum())
    assert selection["threshold"] == found.neurons[-1].score
    assert selection["neurons_per_module"] == dict(Counter(n.module for n in found.neurons))
    assert selection["histogram"]["counts"] == histogram(every)["counts"]
    assert selection["histogram"]["edges"] == pytest.approx(histogram(every)["edges"])
    damping = differential_strength(general, scores_of(9, 0.5))
    assert selection["differential_strength_percent"] == pytest.approx(damping)
    assert found.provenance["differential_strength_percent"] == pytest.approx(damping)
    assert all((OUT / name).is_file() for name in ("layers.png", "differential.png"))
    assert "20 weights of 768 in 2 layers" in caplog.text


def test_by_default_indexes_still_stand_for_the_neurons_their_weights_are_of(files):
    found = Pruning(*files, num_neurons=5).prune(OUT)
    assert found.granularity == "neuron"
    _, difference = differences()
    expected = select_neurons({name: score.sum(dim=1) for name, score in difference.items()}, 5)
    assert {n.key for n in found.neurons} == {n.key for n in expected}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"criterion": "auroc"}, r"cannot be combined with --model\.criterion auroc\."),
        ({"harmless": "x", "ablation": "mean"}, r"cannot be combined with --model\.harmless, --model\.ablation mean\."),
        ({"budget": Budget(0.01, 2)}, r"cannot be combined with --model\.budget\.max_perplexity_increase"),
        ({"budget": Budget(refine=2)}, r"--model\.budget\.refine"),
    ],
)
def test_what_is_not_of_weights_is_refused_before_a_file_is_read(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Pruning([Path("missing")], Path("missing"), granularity="weight", **options)


def test_weights_need_indexes_of_the_same_kind_and_no_more_of_them_than_there_are(files):
    general, behavior = files
    Path("scores.safetensors").touch()
    for sides, option in (
        ((general, "scores.safetensors"), "behavior"),
        ((["scores.safetensors"], behavior), "general"),
    ):
        with pytest.raises(
            ValueError, match=rf"--model\.{option}: expected weight_scores.* --model\.granularity weight"
        ):
            Pruning(*sides, granularity="weight").prune(OUT)
    with pytest.raises(FileNotFoundError, match=r"--model\.general: gone does not exist"):
        Pruning([Path("gone")], behavior, granularity="weight").prune(OUT)
    with pytest.raises(ValueError, match=r"between 1 and 768 \(all weights that were scored\), got 769"):
        Pruning(general, behavior, num_neurons=769, granularity="weight").prune(OUT)
    other = write("other", scores_of(9), target="text")
    with pytest.raises(ValueError, match="do not belong together: target"):
        Pruning(general, other, granularity="weight").prune(OUT)
    with pytest.raises(ValueError, match=r"below --model\.min_differential_strength .*Nothing was written"):
        Pruning(general, behavior, granularity="weight", min_differential_strength=90, weak="error").prune(OUT)
    assert not (OUT / NEURONS).exists()


@both_families
def test_the_exported_checkpoint_gives_what_the_masked_model_gives(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    model = load_model(checkpoint, torch.float32)
    scored = {name: weight_of(layer).shape for name, layer in find_layers(model, ["all"]).items()}
    of = dataclasses.replace(
        PROVENANCE, checkpoint=checkpoint, checkpoint_fingerprint=Checkpoint(checkpoint).fingerprint
    )
    sides = [write(f"{family}-{i}", scores_of(i, 1 - 0.4 * i, scored), of) for i in range(2)]
    found = Pruning(sides[:1], sides[1], num_neurons=150, granularity="weight", export=Path("pruned")).prune(OUT)
    assert len({n.module for n in found.neurons}) == len(scored), "every kind of layer"
    exported = load_model("pruned", torch.float32)
    with mask(model, found.neurons):
        assert torch.equal(logits(exported), logits(model))
    zeros = {n.key for n in found.neurons}
    for name, layer in find_layers(exported, ["all"]).items():
        off = {(name, *place) for place in (weight_of(layer) == 0).nonzero().tolist()}
        assert off == {key for key in zeros if key[0] == name}


@pytest.mark.slow
def test_compare_finds_what_lists_of_weights_share(files):
    general, behavior = files
    other = write("other", scores_of(11, 0.5))
    for name, of in (("a", behavior), ("b", other)):
        Pruning(general, of, num_neurons=60, granularity="weight").prune(Path(name))
    paths = [Path(name, NEURONS) for name in ("a", "b")]
    with pytest.warns(UserWarning, match="without scores: there are no correlations"):
        said = Comparison(paths).compare(OUT)
    first, second = ({n.key for n in NeuronList.load(path).neurons} for path in paths)
    found = json.loads((OUT / "compare.json").read_text())
    both = next(row for row in found["overlaps"] if len(row["lists"]) == 2)
    assert both["inclusive"] == len(first & second) > 0
    assert both["random"]["expected"] == pytest.approx(60 * 60 / 768)
    assert "768 weights" in said
    assert "pruned weights" in said
    rows = (OUT / "neurons.csv").read_text().splitlines()
    assert rows[0].startswith("module,index,input,num_lists,")
    assert len(rows) == 1 + len(first | second)
    with pytest.raises(ValueError, match="weights are compared without scores"):
        Comparison(paths, general=general).compare(Path("given"))
    Pruning(general, behavior, num_neurons=5).prune(Path("c"))
    with pytest.raises(ValueError, match=r"granularity is 'weight' in a/neurons\.json but 'neuron' in c/neurons\.json"):
        Comparison([paths[0], Path("c", NEURONS)], num_candidates=768).compare(Path("mixed"))
