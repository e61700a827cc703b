"""Single weights: masked, pruned, selected layer by layer, drawn for comparison, evaluated and compared."""

import copy
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluations import evaluation, perplexity_of, run, save_neurons, write_inputs
from helpers import changed, fail_if_masked, mlp_of, sentence
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import INDEX, Provenance, ShardWriter
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.evaluation.controls import Controls, random_like
from sparc3_lightning.evaluation.variants import list_variants, neurons_of, of_kind
from sparc3_lightning.models.architectures import find_layers, weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, check, mask, prune_
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.models.weights import mask_weights, prune_weights_
from sparc3_lightning.selection.budget import Budget
from sparc3_lightning.selection.criteria import POOL, differential_strength, lowest_of_modules, select_neurons
from sparc3_lightning.selection.lowest import Lowest, lowest_first
from sparc3_lightning.selection.neuron_list import NeuronList, histogram
from sparc3_lightning.stages.compare import Comparison
from sparc3_lightning.stages.prune import NEURONS, SELECTION, Pruning
from sparc3_lightning.stages.sweep import Sweep

INPUT_IDS = torch.tensor([[5, 17, 42, 8, 99, 23, 61]])
FAMILIES = ["llama", "gpt2"]
OUT = Path("out")
both_families = pytest.mark.parametrize("family", FAMILIES)


def logits(model: Any, input_ids: Tensor = INPUT_IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids).logits


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def chosen_of(model: Any, per_layer: int = 3, dampings: tuple[float, ...] = (1.0,)) -> list[Component]:
    """Return weights of every linear layer but the head, among them its last one."""
    draw = torch.Generator().manual_seed(0)
    weights = []
    for name, layer in find_layers(model, ["all"]).items():
        rows, columns = weight_of(layer).shape
        places = [rows * columns - 1, *torch.randperm(rows * columns - 1, generator=draw)[: per_layer - 1].tolist()]
        for place in places:
            damping = dampings[len(weights) % len(dampings)]
            weights.append(Component(name, place // columns, -1.0, damping, input=place % columns))
    return weights


def by_hand(model: Any, weights: list[Component], damping: float = 1.0) -> Any:
    """Return a copy in which each entry is smaller, by the layer's own parameter: Conv1D keeps [inputs, outputs]."""
    other = copy.deepcopy(model)
    for n in weights:
        layer = other.get_submodule(n.module)
        at = (n.input, n.index) if isinstance(layer, Conv1D) else (n.index, n.input)
        layer.weight[at] *= 1 - damping * n.damping
    return other


# Masking and pruning.


@both_families
@pytest.mark.parametrize("damping", [0.25, 1.0])
def test_a_mask_makes_single_entries_smaller_and_puts_them_back_bit_for_bit(make_model, family, damping):
    model = make_model(family)
    weights, before, whole = chosen_of(model, dampings=(1.0, 0.5)), parameters(model), logits(model)
    with mask(model, weights, damping):
        found = logits(model)
    torch.testing.assert_close(found, logits(by_hand(model, weights, damping)), rtol=1e-9, atol=1e-9)
    assert (found - whole).abs().max() > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


@both_families
def test_pruned_weights_are_masked_weights_and_no_other_entry_changes(make_model, family):
    model = make_model(family)
    weights = chosen_of(model)
    with mask(model, weights):
        masked = logits(model)
    expected = parameters(by_hand(model, weights))
    prune_(model, weights)
    assert torch.equal(logits(model), masked)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(model).items())


def test_weights_come_back_after_an_exception_and_masks_can_be_nested(make_model):
    model = make_model()
    weights, before = chosen_of(model), parameters(model)
    with pytest.raises(KeyError), mask(model, weights), mask(model, weights[::2], 0.5):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_a_weight_that_is_off_is_zero_even_where_it_is_infinite(make_model):
    model, name = make_model(dtype=torch.bfloat16), "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    layer.weight[2, 3] = torch.inf
    with mask_weights(model, {name: {(2, 3): 1.0}}):
        assert layer.weight[2, 3] == 0
    assert layer.weight[2, 3] == torch.inf
    prune_weights_(model, {name: {(2, 3): 1.0}})
    assert layer.weight[2, 3] == 0


def test_weights_neurons_and_heads_can_be_off_together(make_model):
    model = make_model()
    weights = chosen_of(model)
    others = [Component("model.layers.0.mlp.up_proj", 3, 0.0), Component("model.layers.1.self_attn.o_proj", 1, 0.0)]
    with mask(model, [*weights, *others]):
        found = logits(model)
    expected = by_hand(model, weights)
    with mask(expected, others):
        torch.testing.assert_close(found, logits(expected), rtol=1e-9, atol=1e-9)
    prune_(model, [*weights, *others])
    torch.testing.assert_close(logits(model), found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use", [fail_if_masked, prune_, check])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (Component("model.layers.0.mlp.up_proj", 24, 0.0, input=0), r"Weight \[24, 0\] of .* has 24 x 16 weights"),
        (Component("model.layers.0.mlp.up_proj", 0, 0.0, input=16), r"Weight \[0, 16\] of "),
        (Component("model.layers.0.mlp.up_proj", 0, 0.0, input=-1), r"Weight \[0, -1\] of "),
        (Component("model.layers.0.mlp.up_proj", -1, 0.0, input=0), r"Weight \[-1, 0\] of "),
        (Component("model.layers.7.mlp.up_proj", 0, 0.0, input=0), "'model.layers.7.mlp.up_proj' is not a layer whose"),
        (Component("model.norm", 0, 0.0, input=0), "'model.norm' is not a layer whose single weights"),
        (Component("lm_head", 0, 0.0, input=0), "'lm_head' is not a layer .* other than its head"),
        (
            Component("model.layers.0.mlp.up_proj", 1, 0.0, mean=0.5, input=0),
            "A weight of neuron 1 of .* a constant",
        ),
    ],
)
def test_a_weight_that_is_not_there_is_refused_and_nothing_is_changed(make_model, use: Callable, bad, complaint):
    model = make_model()
    weights, before = chosen_of(model), parameters(model)
    with pytest.raises(ValueError, match=complaint):
        use(model, [*weights, bad])
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


# neurons.json.


def test_a_list_of_weights_survives_saving_and_loading_and_its_columns_count(tmp_path):
    weights = [Component("a", 1, -2.0, input=0), Component("a", 1, -1.0, 0.5, input=3)]
    saved = NeuronList(weights, {"note": 1}, [Component("b", 1, 0.0, input=3)], [Component("b", 1, 0.0, input=4)])
    saved.save(tmp_path / "neurons.json")
    found = NeuronList.load(tmp_path / "neurons.json")
    assert found == saved
    assert found.granularity == "weight"
    assert len({n.key for n in found.all()}) == 4
    swapped = dataclasses.replace(weights[0], input=1)
    assert NeuronList([swapped, weights[1]]).digest() != NeuronList(weights).digest()
    rows = json.loads((tmp_path / "neurons.json").read_text())["neurons"]
    assert rows == [
        {"module": "a", "index": 1, "score": -2.0, "input": 0},
        {"module": "a", "index": 1, "score": -1.0, "damping": 0.5, "input": 3},
    ]


def test_a_list_without_weights_keeps_its_bytes_and_its_digest(tmp_path):
    neurons = [Component("a", 1, -2.0), Component("b", 3, -1.0, 0.5, 0.25)]
    saved = NeuronList(neurons, {"checkpoint": "tiny"}, least_relevant=[Component("a", 0, 0.5)])
    saved.save(tmp_path / "neurons.json")
    rows = [
        {"module": "a", "index": 1, "score": -2.0},
        {"module": "b", "index": 3, "score": -1.0, "damping": 0.5, "mean": 0.25},
    ]
    content = {
        "format": "sparc3_lightning neurons 2",
        "neurons": rows,
        "next": [],
        "least_relevant": [{"module": "a", "index": 0, "score": 0.5}],
        "provenance": {"checkpoint": "tiny"},
    }
    assert (tmp_path / "neurons.json").read_text() == json.dumps(content, indent=1) + "\n"
    places = [[("a", 1, 1.0, 0.0), ("b", 3, 0.5, 0.25)], [], [("a", 0, 1.0, 0.0)]]
    assert saved.digest() == hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]
    assert (saved.granularity, NeuronList([Component("x.o_proj", 1, 0.0)]).granularity) == ("neuron", "head")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"input": 2}, {"input": 2, "score": 5.0}], "names a neuron more than once"),
        ([{"input": 2}, {}], "holds both neurons and single weights"),
        ([{"input": 1.5}], r"is not a neurons\.json of format"),
        ([{"input": "first"}], r"is not a neurons\.json of format"),
    ],
)
def test_a_list_that_names_a_weight_twice_or_neurons_as_well_is_refused(tmp_path, rows, complaint):
    row = {"module": "a", "index": 1, "score": -1.0}
    content = {"format": "sparc3_lightning neurons 2", "neurons": [row | more for more in rows], "provenance": {}}
    (tmp_path / "neurons.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint):
        NeuronList.load(tmp_path / "neurons.json")


# The selection, layer by layer.


def in_memory(scores: dict[str, Tensor], number: int) -> list[Component]:
    """Select over all weights at once, as neurons are selected."""
    found = select_neurons({name: score.flatten() for name, score in scores.items()}, number)
    columns = {name: score.shape[1] for name, score in scores.items()}
    return [
        Component(n.module, n.index // columns[n.module], n.score, input=n.index % columns[n.module]) for n in found
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [1, 7, 60, 200, 264])
def test_the_lowest_layer_by_layer_are_those_of_a_selection_over_all_with_the_same_order_of_ties(seed, number):
    draw = torch.Generator().manual_seed(seed)
    # Whole numbers, so that many are equal, within a layer and between layers.
    scores = {
        f"layers.{i}.up_proj": torch.randint(-4, 5, shape, generator=draw).float()
        for i, shape in enumerate([(8, 5), (3, 40), (20, 5), (1, 4)])
    }
    found = Lowest(number)
    for name, score in scores.items():
        found.add(name, score)
    assert found.components == in_memory(scores, number)


def test_the_places_of_the_lowest_are_those_of_a_stable_sort():
    for seed in range(20):
        scores = torch.randint(-3, 4, (6, 7), generator=torch.Generator().manual_seed(seed)).float()
        for number in (0, 1, 13, 42, 50):
            assert torch.equal(lowest_first(scores, number), scores.flatten().argsort(stable=True)[:number])


PROVENANCE = Provenance(
    "tiny",
    "files:abc",
    ScoreSpec("lrp", "attnlrp", "magnitude", layers=["up_proj"], dtype="float32", granularity="weight"),
    {},
    "c",
    1,
    2,
    3,
    0,
)
SHAPES = {name: (24, 16) for i in range(2) for name in [f"model.layers.{i}.mlp.up_proj"]}


def scores_of(seed: int, scale: float = 1.0, shapes: dict[str, Any] = SHAPES) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.rand(tuple(shape), generator=draw) for name, shape in shapes.items()}


def write(folder: str, scores: dict[str, Tensor], of: Provenance = PROVENANCE, **changes: Any) -> Path:
    writer = ShardWriter(Path(folder), {name: score.shape for name, score in scores.items()})
    for name, score in scores.items():
        writer.add(name, score)
    writer.close(changed(of, **changes))
    return Path(folder) / INDEX


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
    assert "20 of 768 weights in 2 layers" in caplog.text


def test_by_default_indexes_still_stand_for_the_neurons_their_weights_are_of(files):
    found = Pruning(*files, num_neurons=5).prune(OUT)
    assert found.granularity == "neuron"
    _, difference = differences()
    expected = select_neurons({name: score.sum(dim=1) for name, score in difference.items()}, 5)
    assert {n.key for n in found.neurons} == {n.key for n in expected}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"criterion": "ratio"}, r"none of --model\.criterion ratio: leave"),
        ({"harmless": "x", "ablation": "mean"}, r"none of --model\.harmless, --model\.ablation mean: leave"),
        ({"budget": Budget(0.01, 2)}, r"none of --model\.budget\.max_perplexity_increase"),
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


# As controls of an evaluation.


def test_random_weights_are_as_many_in_each_layer_none_of_the_pruned_and_each_is_drawn_equally_often():
    pruned = [Component("a", 0, 0.0, input=1), Component("a", 2, 0.0, input=3), Component("b", 1, 0.0, input=0)]
    shapes, drawn = {"a": (3, 4), "b": (2, 2)}, Counter()
    for seed in range(3000):
        of_seed = random_like(pruned, shapes, seed)
        assert Counter(n.module for n in of_seed) == {"a": 2, "b": 1}
        drawn.update(n.key for n in of_seed)
        assert len({n.key for n in of_seed}) == 3
    free = {(name, o, i) for name, (rows, columns) in shapes.items() for o in range(rows) for i in range(columns)}
    assert set(drawn) == free - {n.key for n in pruned}
    # 600 and 1,000 draws are expected of each; 4.5 standard deviations are 100 and 116.
    assert all(abs(count - (600 if key[0] == "a" else 1000)) < 116 for key, count in drawn.items())
    assert random_like(pruned, shapes, 5) == random_like(pruned, shapes, 5)
    nearly_all = [Component("b", o, 0.0, input=i) for o, i in ((0, 0), (0, 1), (1, 1))]
    assert [n.key for n in random_like(nearly_all, shapes, 0)] == [("b", 1, 0)], "no more are left"


@both_families
def test_controls_of_weights_are_other_weights_of_the_same_layers(make_model, family):
    model = make_model(family)
    first, second = mlp_of(family, 0)[0][0], mlp_of(family, 1)[1]
    weights = [Component(first, o, -1.0, input=2 * o) for o in range(3)] + [Component(second, 1, -1.0, input=5)]
    least = [Component(first, 7, 0.0, input=i) for i in range(9)] + [
        Component(second, 0, 0.0, input=i) for i in range(9)
    ]
    lists = {"": NeuronList(weights, least_relevant=least)}
    variants = list_variants(lists, 1, controls=Controls(4))
    off = neurons_of(variants, lists, model, seed=0)
    for kind in ("random", "least_relevant", "largest_weights"):
        for variant in of_kind(variants, kind):
            check(model, off[variant.name])
            assert Counter(n.module for n in off[variant.name]) == {first: 3, second: 1}
            assert not {n.key for n in off[variant.name]} & {n.key for n in weights}
    assert {n.key for v in of_kind(variants, "least_relevant") for n in off[v.name]} <= {n.key for n in least}
    for name, number in ((first, 3), (second, 1)):
        magnitude = weight_of(model.get_submodule(name)).abs()
        taken = {n.key for n in weights}
        order = sorted(
            (-magnitude[o, i].item(), o, i) for o in range(len(magnitude)) for i in range(magnitude.shape[1])
        )
        largest = [(name, o, i) for _, o, i in order if (name, o, i) not in taken][: POOL * number]
        drawn = {n.key for v in of_kind(variants, "largest_weights") for n in off[v.name] if n.module == name}
        assert drawn <= set(largest)


# The stages.


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    write_inputs(tmp_path)


@pytest.fixture
def weights(tiny_checkpoint) -> list[Component]:
    return chosen_of(load_model(tiny_checkpoint, torch.float32), 30)


@pytest.mark.usefixtures("inputs")
def test_evaluate_measures_the_model_that_is_exported_and_speaks_of_weights(tiny_checkpoint, weights):
    path = save_neurons(tiny_checkpoint, weights, {"sample_ids": []})
    model = evaluation(tiny_checkpoint, path, controls=Controls(1))
    both = run(model, folder="both")
    export_pruned(Checkpoint(tiny_checkpoint), weights, Path("pruned"), dtype=torch.float32)
    alone = run(evaluation("pruned"), folder="alone")
    assert alone["baseline"] == both["pruned"] | {"kl": None}
    assert perplexity_of(both, "pruned") != pytest.approx(perplexity_of(both, "baseline"), rel=1e-3)
    assert both["granularity"] == "weight"
    page = Path("both/report.html").read_text()
    for text in (both["verdict"], page, model.summary(), Path("both/model_card.md").read_text()):
        assert f"{len(weights)} weights" in text
    assert "As many largest weights (1 draw)" in both["verdict"]
    assert "Random weights" in page
    body = page.partition("<h2>Run it again</h2>")[0]
    assert "neurons" not in body.replace("neurons.json", "")


@pytest.mark.usefixtures("inputs")
def test_sweep_takes_doses_of_weights_and_writes_the_chosen_ones(tiny_checkpoint, weights):
    path = save_neurons(tiny_checkpoint, weights[:20], {"sample_ids": []}, next=weights[20:])
    run(evaluation(tiny_checkpoint, path, kind=Sweep, doses=[10, 60], dampings=[0.5], max_perplexity_increase=1e9))
    chosen = NeuronList.load(OUT / "chosen/neurons.json")
    assert chosen.granularity == "weight"
    assert {n.key for n in chosen.neurons + chosen.next} == {n.key for n in weights}
    with pytest.raises(ValueError, match=rf"asks for 10000 weights, but .* lists {len(weights)}: "):
        evaluation(tiny_checkpoint, path, kind=Sweep, doses=[10_000])


@pytest.mark.usefixtures("inputs")
def test_a_model_that_is_sharded_is_refused_before_it_is_loaded(tiny_checkpoint, weights, monkeypatch):
    path = save_neurons(tiny_checkpoint, weights)
    monkeypatch.setattr("sparc3_lightning.models.sharding.is_sharded", lambda module: True)
    monkeypatch.setattr("sparc3_lightning.stages.evaluate.load_for", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"a whole model only: use --trainer\.devices 1"):
        run(evaluation(tiny_checkpoint, path))


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


def test_the_whole_experiment_prunes_weights_in_all_its_stages(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])
    write_inputs(tmp_path)
    (tmp_path / "general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(8)) + "\n")
    prompts = {"source": "prompts.jsonl", "min_toxicity": None}
    data = "sparc3_lightning.data."
    of_prompts = {"class_path": f"{data}RealToxicityPrompts", "init_args": {**prompts, "num_prompts": 4}}
    text = {"source": "text.txt", "window": 32, "stride": 16}
    options = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"checkpoint": tiny_checkpoint, "general_seeds": [0]},
        "attribute": {"granularity": "weight"},
        "general": {"class_path": f"{data}C4", "init_args": {"source": "general.txt", "num_samples": 3, "seq_len": 16}},
        "behavior": {"class_path": f"{data}ToxicPrompts", "init_args": {**prompts, "num_samples": 3}},
        "prune": {"granularity": "weight", "num_neurons": 70, "min_differential_strength": -1000.0},
        "evaluate": {
            "scorer": "repetition",
            "behavior": "repetition",
            "sampling": {"protocol": "greedy"},
            "controls": {"num_draws": 1},
        },
        "data": {"text": {"class_path": f"{data}WikiText2", "init_args": text}, "prompts": of_prompts},
    }
    Path("experiment.yaml").write_text(yaml.safe_dump(options))
    done = cli.main(["run", "--config", "experiment.yaml"])
    folder = Path(done.trainer.log_dir)
    results = json.loads((folder / "results.json").read_text())
    assert (results["granularity"], results["num_neurons"]) == ("weight", 70)
    assert "70 weights" in (folder / "report.html").read_text()
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    assert Path(stages["general_0"], INDEX).is_file()
    assert len({n.module for n in NeuronList.load(Path(stages["neurons"], NEURONS)).neurons}) == 2
