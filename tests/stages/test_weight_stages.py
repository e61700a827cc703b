"""Single weights: drawn as controls, evaluated, swept, and in the whole experiment."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from evaluations import evaluation, perplexity_of, run, save_neurons, write_inputs
from helpers import mlp_of, sentence
from weights import OUT, both_families, chosen_of

from sparc3_lightning import cli
from sparc3_lightning.attribution.scores import INDEX
from sparc3_lightning.evaluation.controls import Controls, random_like
from sparc3_lightning.evaluation.variants import list_variants, neurons_of, of_kind
from sparc3_lightning.models.architectures import weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import Component, check
from sparc3_lightning.models.export import export_pruned
from sparc3_lightning.selection.criteria import POOL
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.prune import NEURONS
from sparc3_lightning.stages.sweep import Sweep


def test_random_weights_are_as_many_in_each_layer_none_of_the_pruned_and_each_is_drawn_equally_often():
    pruned = [
        Component("a", 0, 0.0, granularity="weight", input=1),
        Component("a", 2, 0.0, granularity="weight", input=3),
        Component("b", 1, 0.0, granularity="weight", input=0),
    ]
    sizes, drawn = {"a": (3, 4), "b": (2, 2)}, Counter()
    shapes = {("weight", name): shape for name, shape in sizes.items()}
    for seed in range(3000):
        of_seed = random_like(pruned, shapes, seed)
        assert Counter(n.module for n in of_seed) == {"a": 2, "b": 1}
        drawn.update(n.key for n in of_seed)
        assert len({n.key for n in of_seed}) == 3
    free = {(name, o, i) for name, (rows, columns) in sizes.items() for o in range(rows) for i in range(columns)}
    assert set(drawn) == free - {n.key for n in pruned}
    # 600 and 1,000 draws are expected of each; 4.5 standard deviations are 100 and 116.
    assert all(abs(count - (600 if key[0] == "a" else 1000)) < 116 for key, count in drawn.items())
    assert random_like(pruned, shapes, 5) == random_like(pruned, shapes, 5)
    nearly_all = [Component("b", o, 0.0, granularity="weight", input=i) for o, i in ((0, 0), (0, 1), (1, 1))]
    assert [n.key for n in random_like(nearly_all, shapes, 0)] == [("b", 1, 0)], "no more are left"


@both_families
def test_controls_of_weights_are_other_weights_of_the_same_layers(make_model, family):
    model = make_model(family)
    first, second = mlp_of(family, 0)[0][0], mlp_of(family, 1)[1]
    weights = [Component(first, o, -1.0, granularity="weight", input=2 * o) for o in range(3)] + [
        Component(second, 1, -1.0, granularity="weight", input=5)
    ]
    least = [Component(first, 7, 0.0, granularity="weight", input=i) for i in range(9)] + [
        Component(second, 0, 0.0, granularity="weight", input=i) for i in range(9)
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


@pytest.mark.slow
@pytest.mark.usefixtures("inputs")
def test_evaluate_measures_the_model_that_is_exported_and_speaks_of_weights(tiny_checkpoint, weights):
    path = save_neurons(tiny_checkpoint, weights, {"sample_ids": []})
    model = evaluation(tiny_checkpoint, path, controls=Controls(1))
    both = run(model, folder="both")
    export_pruned(Checkpoint(tiny_checkpoint), weights, Path("pruned"), dtype=torch.float32)
    alone = run(evaluation("pruned"), folder="alone")
    assert alone["baseline"] == both["pruned"] | {"kl": None}
    assert perplexity_of(both, "pruned") != pytest.approx(perplexity_of(both, "baseline"), rel=1e-3)
    assert both["kinds"] == {"weight": len(weights)}
    page = Path("both/report.html").read_text()
    for text in (both["verdict"], page, " ".join(model.summary().split()), Path("both/model_card.md").read_text()):
        assert f"{len(weights)} weights" in text
    assert "As many largest weights (1 draw)" in both["verdict"]
    assert "Random weights" in page
    body = page.partition("<h2>Settings</h2>")[0]
    assert "neurons" not in body.replace("neurons.json", "")


@pytest.mark.slow
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


@pytest.mark.slow
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
            "scorers": ["repetition"],
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
    assert (results["kinds"], results["num_neurons"]) == ({"weight": 70}, 70)
    assert "70 weights" in (folder / "report.html").read_text()
    stages = json.loads((folder / "experiment.json").read_text())["stages"]
    assert Path(stages["general_0"], INDEX).is_file()
    assert len({n.module for n in NeuronList.load(Path(stages["neurons"], NEURONS)).neurons}) == 2
