"""From score files to neurons.json, its pictures and the pruned checkpoint; and what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import MODULES, provenance, random_scores, save_scores
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparc3_lightning.attribution.activations import ACTIVATIONS, Activations
from sparc3_lightning.models.checkpoints import Checkpoint, load_model
from sparc3_lightning.models.components import mask
from sparc3_lightning.selection import criteria as selections
from sparc3_lightning.selection.criteria import select_neurons
from sparc3_lightning.selection.neuron_list import NeuronList, histogram
from sparc3_lightning.stages.prune import NEURONS, SELECTION, Pruning

OUT = Path("out")


@pytest.fixture
def files() -> tuple[list[Path], Path]:
    """Two files of general scores and one of the behaviour, which is weaker: a differential strength of some 50 %."""
    general = [
        save_scores(f"general_{i}.safetensors", random_scores(i), sample_ids=[f"document-{i}"]) for i in range(2)
    ]
    return general, save_scores("behavior.safetensors", random_scores(9, 0.5))


@pytest.fixture
def real_files(tiny_checkpoint) -> tuple[list[Path], Path]:
    """The same for the tiny checkpoint, which can then be exported."""
    of = provenance(tiny_checkpoint, Checkpoint(tiny_checkpoint).fingerprint)
    return [save_scores("general.safetensors", random_scores(0), of)], save_scores(
        "behavior.safetensors", random_scores(9, 0.5), of
    )


def strongest_by_hand(general: list[dict[str, torch.Tensor]], behavior: dict[str, torch.Tensor], number: int):
    """Average, subtract, sort: one neuron at a time."""
    rows = []
    for name in MODULES:
        for i in range(len(behavior[name])):
            mean = sum(float(scores[name][i]) for scores in general) / len(general)
            rows.append((mean - float(behavior[name][i]), name, i))
    return sorted(rows)[:number]


def test_seeds_are_averaged_and_the_most_negative_differences_over_all_layers_are_taken(files):
    general, behavior = files
    found = Pruning(general, behavior, num_neurons=10).prune(OUT)
    expected = strongest_by_hand([random_scores(0), random_scores(1)], random_scores(9, 0.5), 10)
    assert [(neuron.module, neuron.index) for neuron in found.neurons] == [(name, i) for _, name, i in expected]
    assert [neuron.score for neuron in found.neurons] == pytest.approx([score for score, _, _ in expected], abs=1e-6)
    assert len({neuron.module for neuron in found.neurons}) == 2


def test_the_order_of_the_seeds_does_not_matter(files):
    general, behavior = files
    one = Pruning(general, behavior, num_neurons=48).prune(Path("a"))
    other = Pruning(general[::-1], behavior, num_neurons=48).prune(Path("b"))
    assert one.neurons == other.neurons


def test_neurons_json_holds_the_neurons_and_where_they_come_from(files):
    general, behavior = files
    found = Pruning(general, behavior, num_neurons=5).prune(OUT)
    assert NeuronList.load(OUT / NEURONS) == found
    content = json.loads((OUT / NEURONS).read_text())
    assert len(content["neurons"]) == 5
    assert all(set(row) == {"module", "index", "score"} for row in content["neurons"])
    source = content["provenance"]
    assert source["checkpoint_fingerprint"] == "files:abc"
    assert [file["path"] for file in source["general"]] == [str(path) for path in general]
    assert source["behavior"]["path"] == str(behavior)
    assert source["behavior"]["spec"]["rule"] == "attnlrp"
    # Evaluation leaves out every prompt that any score was computed on, general ones too.
    assert set(source["sample_ids"]) == {"p1", "p2", "document-0", "document-1"}
    assert "torch" in source["versions"]
    assert source["export"] is None
    total = sum(float(random_scores(seed)[name].sum()) / 2 for seed in (0, 1) for name in MODULES)
    theirs = sum(float(random_scores(9, 0.5)[name].sum()) for name in MODULES)
    assert source["differential_strength_percent"] == pytest.approx(100 * (total - theirs) / total)


def test_the_neurons_that_come_next_follow_in_the_same_order_up_to_the_number_ranked(files):
    general, behavior = files
    expected = strongest_by_hand([random_scores(0), random_scores(1)], random_scores(9, 0.5), 48)
    expected = [(name, i) for _, name, i in expected]
    for number, ranked, listed in ((5, 12, 12), (5, 5, 5), (5, 3, 5), (48, 1000, 48), (5, 1000, 48), (5, 48, 48)):
        folder = Path(f"out_{number}_{ranked}")
        found = Pruning(general, behavior, num_neurons=number, num_ranked=ranked).prune(folder)
        assert len(found.neurons) == number
        assert [(neuron.module, neuron.index) for neuron in found.neurons + found.next] == expected[:listed]
        scores = [neuron.score for neuron in found.neurons + found.next]
        assert scores == sorted(scores)
        assert NeuronList.load(folder / NEURONS) == found
    assert Pruning(general, behavior).num_ranked == 1000


def test_the_least_relevant_neurons_are_those_of_the_smallest_general_score_that_are_not_pruned(files):
    # Signed scores, so that the smallest in magnitude are not the lowest.
    general = [
        save_scores(f"signed_{i}.safetensors", {name: score - 0.4 for name, score in random_scores(i).items()})
        for i in range(2)
    ]
    behavior = save_scores("signed.safetensors", {name: score - 0.6 for name, score in random_scores(9).items()})
    found = Pruning(general, behavior, num_neurons=4, min_differential_strength=-1e9).prune(OUT)
    pruned = {(neuron.module, neuron.index) for neuron in found.neurons}
    expected = []
    for module in dict.fromkeys(neuron.module for neuron in found.neurons):
        means = [abs(sum(float(random_scores(k)[module][i]) - 0.4 for k in range(2)) / 2) for i in range(24)]
        free = sorted((mean, i) for i, mean in enumerate(means) if (module, i) not in pruned)
        number = 5 * sum(neuron.module == module for neuron in found.neurons)
        expected += [(module, i, mean) for mean, i in free[:number]]
    assert [(neuron.module, neuron.index) for neuron in found.least_relevant] == [row[:2] for row in expected]
    assert [neuron.score for neuron in found.least_relevant] == pytest.approx([row[2] for row in expected], abs=1e-6)
    assert NeuronList.load(OUT / NEURONS).least_relevant == found.least_relevant


def test_selection_json_counts_and_bins_every_neuron(files):
    general, behavior = files
    found = Pruning(general, behavior, num_neurons=7).prune(OUT)
    selection = json.loads((OUT / SELECTION).read_text())
    every = [s for s, _, _ in strongest_by_hand([random_scores(0), random_scores(1)], random_scores(9, 0.5), 48)]
    assert selection["num_neurons"] == 7
    assert selection["num_candidates"] == 48
    assert selection["num_negative"] == sum(score < 0 for score in every)
    assert selection["threshold"] == pytest.approx(every[6], abs=1e-6)
    assert selection["threshold"] == found.neurons[-1].score
    per_module = {name: sum(neuron.module == name for neuron in found.neurons) for name in MODULES}
    assert selection["neurons_per_module"] == per_module
    assert sum(selection["histogram"]["counts"]) == 48
    assert len(selection["histogram"]["edges"]) == len(selection["histogram"]["counts"]) + 1


@pytest.mark.parametrize("selection", ["normalized_difference", "set_difference"])
def test_other_selections_take_sides_of_another_target_and_need_no_strength(files, selection):
    general, _ = files
    behavior = save_scores("other.safetensors", random_scores(9, 2.0), target="lexicon", relevance="signed")
    options = {"top_behavior": 0.5, "top_general": 0.25, "num_neurons": 5, "num_ranked": 9}
    neurons = Pruning(general, behavior, criterion=selection, **options).prune(Path("out"))
    mean = {name: (random_scores(0)[name] + random_scores(1)[name]) / 2 for name in MODULES}
    shares = (0.5, 0.25) if selection == "set_difference" else ()
    ranked = getattr(selections, selection)(mean, random_scores(9, 2.0), *shares)
    assert [(n.module, n.index) for n in neurons.neurons] == [(n.module, n.index) for n in select_neurons(ranked, 5)]
    assert len(neurons.next) == 4
    assert neurons.provenance["criterion"] == selection
    found = json.loads(Path("out/selection.json").read_text())
    assert found["differential_strength_percent"] is None
    assert found["num_candidates"] == 48
    assert sum(found["histogram"]["counts"]) <= 48
    with pytest.raises(ValueError, match=r"do not belong together: (relevance|target)"):
        Pruning(general, behavior, num_neurons=5).prune(Path("difference"))


def test_neurons_are_ranked_by_benefit_per_cost_and_magnitudes_are_refused(files):
    cost = {"method": "gradient", "target": "text", "relevance": "absolute", "num_tokens": 2560}
    general = [save_scores(f"cost_{i}.safetensors", random_scores(i), **cost) for i in range(2)]
    benefits = {name: score - 0.5 for name, score in random_scores(9).items()}
    behavior = save_scores("benefit.safetensors", benefits, **{**cost, "target": "lexicon", "relevance": "signed"})
    found = Pruning(general, behavior, criterion="benefit_per_cost", num_neurons=5, num_ranked=100).prune(OUT)
    costs = {name: (random_scores(0)[name] + random_scores(1)[name]) / 2 for name in MODULES}
    floor = 512 / 5120 * sum(float(cost.sum()) for cost in costs.values()) / 48
    rows = [(-b / (float(costs[n][i]) + floor), n, i) for n in MODULES for i, b in enumerate(benefits[n].tolist())]
    expected = [(name, i) for score, name, i in sorted(rows) if score < 0]
    assert [(n.module, n.index) for n in found.neurons + found.next] == expected
    assert len(found.neurons) == 5
    with pytest.raises(ValueError, match=r"^--model\.criterion benefit_per_cost .* the general scores are no costs"):
        Pruning(files[0], behavior, criterion="benefit_per_cost", num_neurons=5).prune(Path("other"))
    assert not Path("other", NEURONS).exists()


@pytest.mark.parametrize("split_half", [0.03, None, 0.9])
def test_costs_that_are_noisy_are_said_to_be_so_where_neurons_are_ranked_by_them(split_half):
    of = {"method": "gradient", "num_tokens": 2560}
    costs = {**of, "target": "sampled", "relevance": "fisher", "chunk": 64, "split_half": split_half}
    general = save_scores("cost.safetensors", random_scores(0), **costs)
    behavior = save_scores("benefit.safetensors", random_scores(9), **of, target="lexicon", relevance="signed")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Pruning([general], behavior, criterion="benefit_per_cost", num_neurons=5).prune(OUT)
    told = [str(of.message) for of in said if "noisy" in str(of.message)]
    assert [".03" in of or "single" in of for of in told] == ([] if split_half == 0.9 else [True])


def save_side(folder: str, seed: int, num_samples: int, scale: float = 1.0, **changes) -> Path:
    """Save scores in a folder of their own, with the activations of as many samples of 3, 4, ... tokens beside them."""
    Path(folder).mkdir()
    draw = torch.Generator().manual_seed(100 + seed)
    rows = {name: torch.randint(6, (num_samples, 24), generator=draw).float() for name in MODULES}
    ids = [f"{folder}-{i}" for i in range(num_samples)]
    Activations(rows, ids, list(range(3, 3 + num_samples))).save(Path(folder, ACTIVATIONS))
    return save_scores(f"{folder}/scores.safetensors", random_scores(seed, scale), sample_ids=ids, **changes)


@pytest.fixture
def sides() -> tuple[list[Path], Path]:
    """Two folders of general scores and one of the behaviour's, with activations."""
    return [save_side("general_0", 0, 7), save_side("general_1", 1, 5)], save_side("behavior", 9, 6, 0.5)


@pytest.mark.parametrize("selection", ["auroc", "weighted_difference"])
def test_selections_by_activation_read_those_of_all_seeds_beside_their_scores(sides, selection):
    general, behavior = sides
    found = Pruning(general, behavior, criterion=selection, num_neurons=6, num_ranked=9).prune(OUT)
    parts = [Activations.load(path.parent / ACTIVATIONS).rows for path in (*general, behavior)]
    ours = {name: torch.cat([part[name] for part in parts[:2]]) for name in MODULES}
    area = {name: selections.auroc(ours[name], parts[2][name]) for name in MODULES}
    ranked = {name: -area[name] for name in MODULES}
    if selection == "weighted_difference":
        mean = {name: (random_scores(0)[name] + random_scores(1)[name]) / 2 for name in MODULES}
        ranked = selections.weighted_difference(mean, random_scores(9, 0.5), area)
    expected = select_neurons(ranked, 9)
    assert [(n.module, n.index) for n in found.neurons + found.next] == [(n.module, n.index) for n in expected]
    assert [n.score for n in found.neurons + found.next] == pytest.approx([n.score for n in expected])
    assert found.provenance["criterion"] == selection
    (behavior.parent / ACTIVATIONS).unlink()
    with pytest.raises(FileNotFoundError, match=r"behavior/activations\.safetensors .*--model\.activations true"):
        Pruning(general, behavior, criterion=selection, num_neurons=6).prune(Path("without"))


def test_neurons_can_be_held_at_their_mean_over_the_tokens_of_each_seed_averaged_over_the_seeds(sides):
    general, behavior = sides
    found = Pruning(general, behavior, ablation="mean", num_neurons=4, num_ranked=8).prune(OUT)
    for neuron in found.neurons + found.next + found.least_relevant:  # the last are for control, so like for like
        means = []
        for path in general:
            activations = Activations.load(path.parent / ACTIVATIONS)
            of_samples = activations.rows[neuron.module][:, neuron.index].tolist()
            total = sum(n * value for n, value in zip(activations.num_tokens, of_samples, strict=True))
            means.append(total / sum(activations.num_tokens))
        assert neuron.mean == pytest.approx(sum(means) / 2)
    assert found.provenance["ablation"] == "mean"
    assert NeuronList.load(OUT / NEURONS) == found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text"])
def test_means_that_a_checkpoint_has_no_place_for_are_refused_before_neurons_are_selected(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    of = {"checkpoint": checkpoint, "checkpoint_fingerprint": Checkpoint(checkpoint).fingerprint}
    sides = save_side("general", 0, 7, **of), save_side("behavior", 9, 6, 0.5, **of)
    # There are 48 neurons, so that to select 49 is refused too, but only after they are ranked.
    pruning = Pruning(sides[:1], sides[1], ablation="mean", num_neurons=49, export=Path("pruned"))
    with pytest.raises(ValueError, match=rf"'{family}' has no bias .* --model\.ablation zero"):
        pruning.prune(OUT)


def test_means_are_exported_where_a_checkpoint_has_a_place_for_them(tiny_checkpoint):
    of = {"checkpoint": tiny_checkpoint, "checkpoint_fingerprint": Checkpoint(tiny_checkpoint).fingerprint}
    sides = save_side("general", 0, 7, **of), save_side("behavior", 9, 6, 0.5, **of)
    Pruning(sides[:1], sides[1], ablation="mean", num_neurons=4, export=Path("pruned")).prune(OUT)
    assert (OUT / NEURONS).is_file()
    assert AutoModelForCausalLM.from_pretrained("pruned").config.mlp_bias


def test_what_the_behaviour_shares_with_samples_without_it_is_subtracted_first(files):
    general, behavior = files
    harmless = save_scores("harmless.safetensors", random_scores(5, 0.3), sample_ids=["harmless"])
    found = Pruning(general, behavior, harmless=harmless, num_neurons=7).prune(OUT)
    less = {name: random_scores(9, 0.5)[name] - random_scores(5, 0.3)[name] for name in MODULES}
    expected = strongest_by_hand([random_scores(0), random_scores(1)], less, 7)
    assert [(neuron.module, neuron.index) for neuron in found.neurons] == [(name, i) for _, name, i in expected]
    assert [neuron.score for neuron in found.neurons] == pytest.approx([score for score, _, _ in expected], abs=1e-6)
    assert found.provenance["harmless"]["path"] == str(harmless)
    assert set(found.provenance["sample_ids"]) == {"p1", "p2", "document-0", "document-1", "harmless"}


def test_a_contrast_of_another_target_or_without_a_place_in_the_selection_is_refused(files):
    general, behavior = files
    harmless = save_scores("harmless.safetensors", random_scores(5), target="lexicon")
    with pytest.raises(ValueError, match=r"do not belong together: target .*harmless\.safetensors"):
        Pruning(general, behavior, harmless=harmless, criterion="normalized_difference", num_neurons=5).prune(OUT)
    with pytest.raises(ValueError, match=r"--model\.harmless .*--model\.criterion auroc"):
        Pruning(general, behavior, harmless=harmless, criterion="auroc")


def test_a_selection_that_leaves_too_few_neurons_is_refused_and_nothing_is_written(files):
    general, behavior = files
    with pytest.raises(ValueError, match=r"leaves only \d+ of 48: .* with set_difference raise --model\.top_behavior"):
        Pruning(general, behavior, criterion="set_difference", num_neurons=5).prune(Path("out"))
    assert not Path("out", "neurons.json").exists()
    for shares in ({"top_behavior": 0.0}, {"top_behavior": 1.1}, {"top_general": 1.0}, {"top_general": -0.1}):
        with pytest.raises(ValueError, match=r"--model.top_behavior must be in \(0, 1\]"):
            Pruning(general, behavior, **shares)


def test_histogram_counts_values_between_the_smallest_and_the_largest():
    bins = histogram(torch.tensor([0.0, 0.1, 0.9, 1.0, 1.0]), 2)
    assert bins == {"edges": [0.0, 0.5, 1.0], "counts": [2.0, 3.0]}


def test_pictures_of_the_layers_and_of_the_differential_are_png(files):
    Pruning(*files, num_neurons=5).prune(OUT)
    for name in ("layers.png", "differential.png"):
        content = (OUT / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert content.endswith(b"IEND\xaeB`\x82")
    assert {path.name for path in OUT.iterdir()} == {NEURONS, SELECTION, "layers.png", "differential.png"}


@pytest.mark.parametrize("number", [1, 48])
def test_one_neuron_and_all_neurons_can_be_pruned(files, number):
    assert len(Pruning(*files, num_neurons=number).prune(OUT).neurons) == number


def weak_files() -> tuple[list[Path], Path]:
    """Behaviour scores that sum to 95 % of the general ones."""
    general = random_scores(0)
    behavior = {name: score.flip(0) * 0.95 for name, score in general.items()}
    return [save_scores("general.safetensors", general)], save_scores("behavior.safetensors", behavior)


def test_a_weak_differential_is_a_warning_by_default():
    with pytest.warns(
        UserWarning, match=r"differential strength is 5\.0 %, below --model.min_differential_strength 15\.0 %"
    ):
        Pruning(*weak_files(), num_neurons=3).prune(OUT)
    assert (OUT / NEURONS).is_file()


def test_a_weak_differential_can_be_an_error_and_then_nothing_is_written():
    with pytest.raises(ValueError, match=r"5\.0 %.*Nothing was written \(--model.weak error\)"):
        Pruning(*weak_files(), num_neurons=3, weak="error").prune(OUT)
    assert not list(OUT.iterdir())


@pytest.mark.filterwarnings("error")
def test_the_least_strength_is_an_option_and_no_warning_comes_above_it():
    general, behavior = weak_files()
    Pruning(general, behavior, num_neurons=3, min_differential_strength=4.9, weak="error").prune(OUT)


def test_general_scores_that_sum_to_zero_are_weak_rather_than_a_crash():
    zeros = {name: torch.zeros(24) for name in MODULES}
    general = save_scores("general.safetensors", zeros)
    behavior = save_scores("behavior.safetensors", random_scores(1))
    with pytest.raises(ValueError, match="Nothing was written"):
        Pruning([general], behavior, num_neurons=3, weak="error").prune(OUT)


@pytest.mark.parametrize("number", [0, -5])
def test_no_neurons_or_fewer_are_refused_at_once(files, number):
    with pytest.raises(ValueError, match=f"--model.num_neurons must be at least 1, got {number}"):
        Pruning(*files, num_neurons=number)
    with pytest.raises(ValueError, match=f"--model.num_ranked must be at least 1, got {number}"):
        Pruning(*files, num_ranked=number)


def test_more_neurons_than_there_are_is_refused_and_nothing_is_written(files):
    with pytest.raises(ValueError, match=r"--model.num_neurons must be between 1 and 48.*got 49"):
        Pruning(*files, num_neurons=49).prune(OUT)
    assert not list(OUT.iterdir())


def test_no_general_file_is_refused(files):
    with pytest.raises(ValueError, match=r"--model.general must name at least one"):
        Pruning([], files[1])


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_fingerprint": "files:other"},
        {"method": "wanda"},
        {"rule": "cp_lrp"},
        {"relevance": "signed"},
        {"layers": ["gate_proj"]},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("which", ["behavior", "second seed"])
def test_score_files_that_differ_in_what_they_are_of_are_refused(change, which):
    one = save_scores("one.safetensors", random_scores(0))
    other = save_scores("other.safetensors", random_scores(1), **change)
    arguments = ([one], other) if which == "behavior" else ([one, other], one)
    with pytest.raises(ValueError, match=rf"do not belong together: {next(iter(change))} .*one.*other"):
        Pruning(*arguments, num_neurons=3).prune(OUT)
    assert not list(OUT.iterdir())


def test_score_files_of_other_shapes_or_modules_are_refused(files):
    general, _ = files
    wider = save_scores("wider.safetensors", random_scores(1, shape=25))
    with pytest.raises(ValueError, match=r"do not belong together: model.layers.0.mlp.up_proj has shape \[24\]"):
        Pruning(general, wider, num_neurons=3).prune(OUT)
    fewer = save_scores("fewer.safetensors", {MODULES[0]: torch.rand(24)})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj has shape .*None"):
        Pruning(general, fewer, num_neurons=3).prune(OUT)


@pytest.mark.parametrize("layer", ["self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj"])
def test_scores_of_rows_that_are_no_neurons_are_refused(layer):
    names = (MODULES[0], f"model.layers.1.{layer}")
    one, other = (save_scores(f"{i}.safetensors", {name: torch.rand(24) for name in names}) for i in range(2))
    with pytest.raises(ValueError, match=rf"The rows of {layer.rpartition('.')[2]} are no neurons .*granularity head"):
        Pruning([one], other, num_neurons=3, min_differential_strength=-100).prune(OUT)
    assert not list(OUT.iterdir())


def test_neurons_that_are_scored_by_two_of_their_rows_are_refused():
    names = [f"model.layers.{i}.mlp.{layer}" for i in range(2) for layer in ("gate_proj", "up_proj")]
    one, other = (save_scores(f"{i}.safetensors", {name: torch.rand(24) for name in names}) for i in range(2))
    with pytest.raises(ValueError, match=r"The neurons of model.layers.0.mlp are scored twice"):
        Pruning([one], other, num_neurons=3, min_differential_strength=-100).prune(OUT)
    assert not list(OUT.iterdir())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_score_file_with_a_nan_or_infinity_is_refused_by_name(files, value):
    scores = random_scores(1)
    scores[MODULES[1]][3] = value
    spoiled = save_scores("spoiled.safetensors", scores)
    with pytest.raises(ValueError, match=rf"spoiled.safetensors: the scores of {MODULES[1]} hold NaN or infinity"):
        Pruning([spoiled], files[1], num_neurons=3).prune(OUT)
    assert not list(OUT.iterdir())


def test_a_missing_truncated_or_foreign_score_file_is_refused(files):
    general, behavior = files
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors does not exist; 'sparc3 attribute' writes it"):
        Pruning(general, Path("nowhere.safetensors"), num_neurons=3).prune(OUT)
    Path("half.safetensors").write_bytes(behavior.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"half.safetensors .*truncated"):
        Pruning(general, Path("half.safetensors"), num_neurons=3).prune(OUT)
    Path("foreign.safetensors").write_text("no tensors here, only words")
    with pytest.raises(ValueError, match=r"foreign.safetensors"):
        Pruning(general, Path("foreign.safetensors"), num_neurons=3).prune(OUT)
    assert not list(OUT.iterdir())


def test_existing_neurons_are_not_overwritten(files):
    OUT.mkdir()
    (OUT / NEURONS).write_text("precious")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        Pruning(*files, num_neurons=3).prune(OUT)
    assert [path.read_text() for path in OUT.iterdir()] == ["precious"]


def test_a_folder_that_cannot_be_written_is_refused(files):
    OUT.write_text("a file, not a folder")
    with pytest.raises(OSError, match="Cannot write to the output folder out"):
        Pruning(*files, num_neurons=3).prune(OUT)


def test_the_exported_checkpoint_loads_with_transformers_and_equals_the_masked_model(tiny_checkpoint, real_files):
    found = Pruning(*real_files, num_neurons=12, export=Path("pruned")).prune(OUT)
    assert json.loads((OUT / NEURONS).read_text())["provenance"]["export"] == "pruned"
    assert not Path("pruned", "README.md").exists(), "the model card comes with the evaluation"
    pruned = AutoModelForCausalLM.from_pretrained("pruned")
    original = load_model(tiny_checkpoint, torch.float32)
    input_ids = torch.tensor([[1, 10, 20, 30, 40]])
    with torch.no_grad():
        with mask(original, found.neurons):
            masked = original(input_ids).logits
        assert torch.allclose(pruned(input_ids).logits, masked, atol=1e-6)
        assert not torch.allclose(original(input_ids).logits, masked, atol=1e-3)
    text = "the dog and the cat"
    assert AutoTokenizer.from_pretrained("pruned")(text) == Checkpoint(tiny_checkpoint).tokenizer()(text)
    assert pruned.dtype == torch.float32
    for neuron in found.neurons:
        assert not pruned.get_submodule(neuron.module).weight[neuron.index].any()


def test_the_export_can_be_of_another_dtype(real_files):
    Pruning(*real_files, num_neurons=3, export=Path("pruned"), export_dtype="bfloat16").prune(OUT)
    assert AutoModelForCausalLM.from_pretrained("pruned", dtype="auto").dtype == torch.bfloat16


def test_an_existing_export_folder_is_refused_before_any_work(files):
    Path("pruned").mkdir()
    Path("pruned/precious").write_text("precious")
    with pytest.raises(FileExistsError, match=r"--model.export: pruned exists already; nothing was overwritten"):
        Pruning(*files, export=Path("pruned")).prune(OUT)
    assert Path("pruned/precious").read_text() == "precious"
    assert not OUT.exists()


def test_a_checkpoint_that_changed_since_it_was_attributed_is_not_exported(tiny_checkpoint):
    of = provenance(tiny_checkpoint, "files:of-another-day")
    general = save_scores("general.safetensors", random_scores(0), of)
    behavior = save_scores("behavior.safetensors", random_scores(9, 0.5), of)
    with pytest.raises(ValueError, match=r"no longer the one that was attributed"):
        Pruning([general], behavior, num_neurons=3, export=Path("pruned")).prune(OUT)
    assert not Path("pruned").exists()
