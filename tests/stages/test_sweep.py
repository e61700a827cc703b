"""The verb sweep: one model load, one baseline, a point for each number of neurons and damping."""

import base64
import csv
import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import sentence

from sparc3_lightning.attribution.scores import Provenance, ScoreFile
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.cli import main
from sparc3_lightning.data.prompts import prompt_id
from sparc3_lightning.evaluation.findings import front
from sparc3_lightning.evaluation.intervals import Difference, Interval
from sparc3_lightning.evaluation.results import Dose, Findings, Judge, Model, Results
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.components import Component
from sparc3_lightning.models.sharding import load_for
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages import evaluate
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.prune import Pruning
from sparc3_lightning.stages.sweep import Sweep

MODULES = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
LOGS = Path("lightning_logs/sweep")
COLUMNS = ["selection", "num_neurons", "damping", "perplexity", "behavior_mean", "kl"]
COLUMNS += [f"{of}_percent{end}" for of in ("perplexity", "behavior") for end in ("", "_low", "_high")]
COLUMNS += [f"{of}_percent_together_{end}" for of in ("perplexity", "behavior") for end in ("low", "high")]


@pytest.fixture(autouse=True)
def as_if_from_a_shell(monkeypatch):
    """Restore the seed that a run sets, and keep pytest's own arguments out of LightningCLI's sight."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])


@pytest.fixture(autouse=True)
def input_files(shared_inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_inputs, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def shared_inputs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: str) -> Path:
    """Two neurons.json, as sparc3 prune writes them, that rank 12; a text, prompts and a config."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs(tiny_checkpoint)
    return folder


def write_inputs(tiny_checkpoint: str) -> None:
    of = {
        "checkpoint": tiny_checkpoint,
        "checkpoint_fingerprint": Checkpoint(tiny_checkpoint).fingerprint,
        "seq_len": 10,
    }
    of |= {"spec": ScoreSpec("lrp", "attnlrp", "magnitude", layers=["up_proj"], dtype="float32")}
    of |= {"data": {}, "num_samples": 1, "num_tokens": 9, "seed": 0, "sample_ids": ["p"]}
    for seed, name in enumerate(("general", "behavior")):
        draw = torch.Generator().manual_seed(seed)
        scores = {module: torch.rand(24, generator=draw) / (1 + seed) for module in MODULES}
        ScoreFile(scores, Provenance(**of | {"data_fingerprint": name})).save(Path(f"{name}.safetensors"))
    scores = [Path("general.safetensors")], Path("behavior.safetensors")
    Pruning(*scores, num_neurons=5, num_ranked=12).prune(Path("pruned"))
    Pruning(*scores, criterion="set_difference", top_behavior=1.0, num_neurons=7, num_ranked=12).prune(Path("other"))
    Path("text.txt").write_text("\n".join(sentence(i, 20) for i in range(6)) + "\n")
    rows = [{"text": sentence(100 + i, 3 + i % 7), "toxicity": 0.95} for i in range(8)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    model = {
        "checkpoint": tiny_checkpoint,
        "neurons": "pruned/neurons.json",
        "scorers": ["small"],
        "sampling": {"max_new_tokens": 5},
    }
    data = {
        "text": {"class_path": "WikiText2", "init_args": {"source": "text.txt", "window": 32, "stride": 16}},
        "prompts": {"class_path": "RealToxicityPrompts", "init_args": {"source": "prompts.jsonl", "num_prompts": 6}},
    }
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    config = {"trainer": trainer, "model": model, "data": data}
    Path("sweep.yaml").write_text(yaml.safe_dump(config))


def sweep(*options: str) -> tuple[dict[str, Any], Path]:
    """Sweep from the command line, and return the results and the folder they are in."""
    folder = Path(main(["sweep", "--config", "sweep.yaml", *options]).trainer.log_dir)
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail), folder


def test_a_sweep_loads_one_model_and_measures_one_baseline_and_a_point_per_dose_and_strength(monkeypatch, caplog):
    loads = []
    monkeypatch.setattr(evaluate, "load_for", lambda *of: loads.append(of) or load_for(*of))
    with caplog.at_level("INFO"):
        results, folder = sweep("--model.doses", "[2, 5, 12]", "--model.dampings", "[1.0, 0.5]")
    assert folder == LOGS / "version_0"
    assert len(loads) == 1
    grid = [(dose, damping) for damping in (1.0, 0.5) for dose in (2, 5, 12)]
    assert sorted((point["num_neurons"], point["damping"]) for point in results["doses"]) == sorted(grid)
    lines = (folder / "completions.jsonl").read_text().splitlines()
    times = Counter(json.loads(line)["model"] for line in lines)
    models = {"baseline", "pruned", "top_2_1", "top_12_1", "top_2_0.5", "top_5_0.5", "top_12_0.5"}
    assert times == dict.fromkeys(models, 6), "the pruned model is the point of its own number of neurons"
    assert results["controls"] == {}
    rows = list(csv.DictReader((folder / "doses.csv").read_text().splitlines()))
    assert list(rows[0]) == COLUMNS
    assert [(int(row["num_neurons"]), float(row["damping"])) for row in rows] == grid
    by_place = {(point["num_neurons"], point["damping"]): point for point in results["doses"]}
    for row in rows:
        point = by_place[int(row["num_neurons"]), float(row["damping"])]
        for column in ("perplexity", "kl"):
            assert float(row[column]) == point[column]
        assert float(row["behavior_mean"]) == point["effect"]["after"]
        changes = {"perplexity_percent": point["perplexity_percent"], "behavior_percent": point["effect"]["percent"]}
        for column, of in changes.items():
            cells = [row[f"{column}{end}"] for end in ("", "_low", "_high")]
            found = [float(cell) if cell else None for cell in cells]  # of an interval that cannot be said
            assert found == [of[key] for key in ("value", "low", "high")]
    assert len({point["perplexity"] for point in results["doses"]}) == 6
    picture = (folder / "doses.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert base64.b64encode(picture).decode() in (folder / "report.html").read_text()
    assert (folder / "config.yaml").is_file()
    assert "7 model(s): 1 baseline, 1 pruned, 5 dose" in caplog.text


def test_the_points_are_those_of_evaluations_of_their_own(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    results, _ = sweep("--model.doses", "[9]", "--model.dampings", "[1.0]")
    listed = NeuronList.load(Path("pruned/neurons.json"))
    nine = listed.neurons + listed.next[:4]
    NeuronList(nine, listed.provenance).save(Path("nine.json"))
    options = ["--config", "sweep.yaml", "--model.neurons", "nine.json", "--model.controls.num_draws", "0"]
    folder = Path(main(["evaluate", *options]).trainer.log_dir)
    alone = json.loads((folder / "results.json").read_text())
    point = next(point for point in results["doses"] if point["num_neurons"] == 9)
    assert point == next(iter(alone["doses"])) | {"name": "top_9_1", "together": point["together"]}
    assert alone["baseline"] == results["baseline"]


@pytest.mark.slow
def test_the_saved_config_of_a_sweep_repeats_it_and_names_every_option(monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    first, folder = sweep(
        "--model.doses", "[3]", "--model.dampings", "[0.5]", "--model.sampling.num_continuations", "2"
    )
    saved = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert (saved["doses"], saved["dampings"], saved["controls"]["num_draws"]) == ([3], [0.5], 0)
    assert (saved["sampling"]["num_continuations"], saved["sampling"]["protocol"]) == (2, "short")
    config = first["config"]["model"]
    assert {"doses", "dampings", "controls", "sampling", "scorers", "neurons", "checkpoint"} <= set(config)
    done = main(["sweep", "--config", str(folder / "config.yaml"), "--trainer.logger.init_args.version", "9"])
    assert json.loads(Path(done.trainer.log_dir, "results.json").read_text()) == first


@pytest.mark.slow
def test_controls_can_be_measured_beside_the_doses(monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    results, _ = sweep("--model.doses", "[2]", "--model.dampings", "[1.0]", "--model.controls.num_draws", "1")
    assert list(results["controls"]) == ["random", "least_relevant", "largest_weights"]
    assert [point["name"] for point in results["doses"]] == ["pruned", "top_2_1"]


def test_a_control_has_the_number_of_neurons_that_are_left_where_most_are_pruned(monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    listed = NeuronList.load(Path("pruned/neurons.json"))
    most = [Component(module, i, 0.0) for module in MODULES for i in range(20)]
    NeuronList(most, listed.provenance).save(Path("most.json"))
    results, _ = sweep("--model.neurons", "most.json", "--model.doses", "[]", "--model.controls.num_draws", "1")
    assert [draw["num_neurons"] for draw in results["controls"]["random"]["draws"]] == [8]
    assert "Only 8 random neurons, all there are to draw from, (1 draw):" in results["verdict"]


@pytest.mark.parametrize("doses", ["[13]", "[2, 1000]"])
def test_a_dose_larger_than_neurons_json_lists_is_an_error_that_says_how_to_list_more(doses, monkeypatch):
    monkeypatch.setattr(evaluate, "load_for", lambda *_: pytest.fail("the model was loaded"))
    largest = json.loads(doses)[-1]
    with pytest.raises(
        ValueError, match=rf"--model.doses asks for {largest} neurons, but --model.neurons lists 12: "
    ) as of:
        sweep("--model.doses", doses)
    assert f"run 'sparc3 prune' with --model.num_ranked {largest}" in str(of.value)
    assert not list(Path("lightning_logs").rglob("results.json"))


def test_the_largest_dose_that_is_listed_is_measured(monkeypatch):
    model = Sweep("tiny", Path("pruned/neurons.json"), doses=[12], dampings=[1.0], scorers=["small"])
    assert isinstance(model, Evaluation)
    assert [variant.name for variant in model.variants] == ["baseline", "pruned", "top_12_1"]


def test_by_default_ten_to_a_thousand_neurons_are_switched_off_and_damped_without_controls():
    listed = NeuronList.load(Path("pruned/neurons.json"))
    more = [neuron for name in MODULES for neuron in [type(listed.next[0])(name, i, 0.0) for i in range(24, 1024)]]
    NeuronList(listed.neurons, listed.provenance, more).save(Path("long.json"))
    model = Sweep("tiny", Path("long.json"), scorers=["small"])
    grid = [(variant.num_neurons, variant.damping) for variant in model.variants if variant.kind == "dose"]
    assert grid == [(dose, damping) for damping in (1.0, 0.5) for dose in (10, 30, 100, 300, 1000)]
    assert {variant.kind for variant in model.variants} == {"baseline", "pruned", "dose"}


# Several lists.


LISTS = "[pruned/neurons.json, other/neurons.json]"  # the second by another selection, of another number of neurons


def test_every_list_is_measured_as_it_stands_and_compared_by_its_front(monkeypatch):
    results, folder = sweep("--model.neurons", LISTS, "--model.doses", "[]")
    points = {point["selection"]: point for point in results["doses"]}
    assert [(of["name"], of["num_neurons"]) for of in points.values()] == [("pruned", 5), ("set_difference", 7)]
    assert list(points) == ["difference", "set_difference"] == list(results["fronts"])
    doses = Results.load(folder / "results.json").doses
    assert results["fronts"] == {dose.selection: asdict(front([dose])) for dose in doses}
    models = Counter(json.loads(line)["model"] for line in (folder / "completions.jsonl").read_text().splitlines())
    assert models == {"baseline": 6, "pruned": 6, "set_difference": 6}
    rows = list(csv.DictReader((folder / "doses.csv").read_text().splitlines()))
    assert [(row["selection"], row["num_neurons"]) for row in rows] == [
        ("difference", "5"),
        ("set_difference", "7"),
    ]
    assert results["config"]["model"]["neurons"] == ["pruned/neurons.json", "other/neurons.json"]
    assert (folder / "report.html").read_text().count("set_difference</th>") == 2, (
        "in the tables of doses and of fronts"
    )
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    alone, _ = sweep("--model.neurons", "other/neurons.json", "--model.doses", "[]")
    expected = points["set_difference"] | {"name": "pruned", "selection": ""}
    assert alone["doses"] == [{name: of for name, of in expected.items() if name != "together"}]
    assert alone["pruned"]["groups"]["toxic"]["behavior_mean"] == points["set_difference"]["effect"]["after"]


def named(of: list[Path], **options: Any) -> dict[str, str]:
    """Return the selection that each list is from, by the name of the list."""
    return Sweep("tiny", of, doses=[], scorers=["small"], **options).selections


def test_lists_are_named_as_asked_or_by_selection_and_folder_and_never_alike():
    paths = [Path("pruned/neurons.json"), Path("other/neurons.json")]
    assert named(paths) == {name: name for name in ("difference", "set_difference")}
    assert named(paths, names=["a", "b"]) == {"a": "a", "b": "b"}
    NeuronList(NeuronList.load(paths[1]).neurons, {"criterion": "difference"}).save(Path("third/neurons.json"))
    assert list(named([paths[0], Path("third/neurons.json")])) == ["difference (pruned)", "difference (third)"]
    shutil.copytree("pruned", "again/pruned")
    for wrong in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"--model.names must be 2 names, one a list, got \['a'"):
            named(paths, names=wrong)
    with pytest.raises(
        ValueError, match=r"--model.names must tell the lists apart.*5 neurons \(pruned\)', 'difference"
    ):
        named([paths[0], Path("again/pruned/neurons.json")])
    with pytest.raises(ValueError, match=r"--model.names must tell the lists apart"):
        named([*paths, paths[0]], names=["a", "a", "a, 5 neurons"])


def test_lists_of_one_order_are_one_selection_and_so_are_lists_of_one_name():
    listed = NeuronList.load(Path("pruned/neurons.json"))
    order = listed.neurons + listed.next
    for number, budget in ((3, 0.01), (8, 0.02)):
        provenance = listed.provenance | {"budget": {"max_perplexity_increase": budget}}
        NeuronList(order[:number], provenance, order[number:11]).save(Path(f"at_{budget}/neurons.json"))
    paths = [Path(folder, "neurons.json") for folder in ("at_0.01", "at_0.02", "pruned", "other")]
    assert named(paths) == {
        "difference at 1 %": "difference",
        "difference at 2 %": "difference",
        "difference, 5 neurons": "difference",
        "set_difference": "set_difference",
    }
    assert named(paths[:1] + paths[3:]) == {name: name for name in ("difference at 1 %", "set_difference")}
    assert named(paths[1:], names=["a", "b", "a"]) == {"a at 2 %": "a", "b": "b", "a, 7 neurons": "a"}
    # Another order, other constants in place of the activations, and other dampings are other selections.
    turned = NeuronList(order[:2], listed.provenance, [*order[3:], order[2]])
    held = NeuronList([replace(neuron, mean=0.5) for neuron in order[:2]], listed.provenance)
    damped = NeuronList([replace(neuron, damping=0.5) for neuron in order[:2]], listed.provenance)
    for number, one in enumerate((turned, held, damped)):
        one.save(Path(f"{number}/neurons.json"))
        assert named([paths[2], Path(f"{number}/neurons.json")]) == {
            name: name for name in ("difference (pruned)", f"difference ({number})")
        }


def test_lists_of_one_selection_are_rows_of_it_and_one_front_from_one_baseline(monkeypatch):
    listed = NeuronList.load(Path("pruned/neurons.json"))
    order = listed.neurons + listed.next
    NeuronList(order[:9], listed.provenance, order[9:]).save(Path("nine/neurons.json"))
    lists = "[pruned/neurons.json, other/neurons.json, nine/neurons.json]"
    results, folder = sweep("--model.neurons", lists, "--model.doses", "[]", "--model.max_perplexity_increase", "9")
    found = {point["name"]: (point["selection"], point["num_neurons"]) for point in results["doses"]}
    assert found == {
        "pruned": ("difference", 5),
        "difference, 9 neurons": ("difference", 9),
        "set_difference": ("set_difference", 7),
    }
    doses = Results.load(folder / "results.json").doses
    assert results["fronts"] == {
        "difference": asdict(front(doses[:2])),
        "set_difference": asdict(front(doses[2:])),
    }
    rows = list(csv.DictReader((folder / "doses.csv").read_text().splitlines()))
    assert [(row["selection"], int(row["num_neurons"])) for row in rows] == list(found.values())
    assert all(point["together"] for point in results["doses"])
    page = (folder / "report.html").read_text()
    assert [page.count(f'">{name}</th>') for name in ("difference", "set_difference")] == [2 + 1, 1 + 1]
    best = min(results["doses"], key=lambda point: point["effect"]["after"])
    source = NeuronList.load(Path("other/neurons.json")) if best["selection"] == "set_difference" else listed
    chosen = NeuronList.load(folder / "chosen/neurons.json")
    assert [n.key for n in chosen.neurons] == [n.key for n in source.neurons + source.next][: best["num_neurons"]]


def test_the_damping_of_a_point_is_that_of_its_list_times_its_own(monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    listed = NeuronList.load(Path("pruned/neurons.json"))
    every = [replace(neuron, damping=0.5) for neuron in listed.neurons + listed.next]
    NeuronList(every[:5], listed.provenance, every[5:]).save(Path("damped.json"))
    results, _ = sweep("--model.neurons", "damped.json", "--model.doses", "[2]", "--model.dampings", "[1, 0.5]")
    found = {point["name"]: point["damping"] for point in results["doses"]}
    assert found == {"pruned": 0.5, "top_2_1": 0.5, "top_2_0.5": 0.25}
    with pytest.raises(ValueError, match=r"--model\.max_perplexity_increase must be a number such as 0\.01, got nan"):
        Sweep("tiny", Path("damped.json"), max_perplexity_increase=math.nan, scorers=["small"])


@pytest.mark.slow
def test_the_least_toxic_list_within_the_budget_is_written_and_evaluated_on_other_prompts(monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    grid = ["--model.neurons", LISTS, "--model.doses", "[2, 12]", "--model.dampings", "[1, 0.5]"]
    results, _ = sweep(*grid)
    rises = sorted(point["perplexity_percent"]["value"] / 100 for point in results["doses"])
    budget = rises[len(rises) // 2]
    results, folder = sweep(*grid, "--model.max_perplexity_increase", str(budget))
    within = [point for point in results["doses"] if point["perplexity_percent"]["value"] <= 100 * budget]
    assert 1 < len(within) < len(rises)
    best = min(within, key=lambda point: point["effect"]["after"])
    chosen = NeuronList.load(folder / "chosen/neurons.json")
    source = NeuronList.load(
        Path({"difference": "pruned", "set_difference": "other"}[best["selection"]], "neurons.json")
    )
    places = [(neuron.module, neuron.index) for neuron in source.neurons + source.next]
    assert [(neuron.module, neuron.index) for neuron in chosen.neurons + chosen.next] == places
    off = chosen.neurons
    assert len(off) == best["num_neurons"]
    assert {neuron.damping for neuron in off} == {best["damping"]}
    assert chosen.least_relevant == [n for n in source.least_relevant if (n.module, n.index) not in places[: len(off)]]
    assert chosen.provenance["chosen"]["name"] == best["name"]
    rows = [json.loads(line)["text"] for line in Path("prompts.jsonl").read_text().splitlines()]
    lines = (folder / "completions.jsonl").read_text().splitlines()
    used = {json.loads(line)["prompt_id"] for line in lines}
    assert set(chosen.provenance["sample_ids"]) == used | {"p"}
    model = ["--model.neurons", str(folder / "chosen/neurons.json"), "--model.controls.num_draws", "0"]
    done = main(["evaluate", "--config", "sweep.yaml", *model, "--data.prompts.init_args.num_prompts", "2"])
    lines = Path(done.trainer.log_dir, "completions.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt_id"] for line in lines} == {prompt_id(text) for text in rows} - used


def test_the_neurons_that_follow_a_chosen_damped_list_are_damped_alike(tmp_path):
    listed = NeuronList.load(Path("pruned/neurons.json"))
    every = [replace(neuron, damping=0.5) for neuron in listed.neurons + listed.next]
    NeuronList(every[:5], listed.provenance, every[5:]).save(Path("damped.json"))
    module = Sweep("tiny", Path("damped.json"), doses=[2], dampings=[0.25], scorers=["small"])
    change = Interval(-1.0, -2.0, -0.5)
    effect = Difference(0.2, 0.1, change, change, 9, 0, 0, 0.0, 0.0)
    best = Dose("top_2_0.25", "", 2, {"neuron": 2}, 0.25, 9.0, change, 0.1, effect, [], {})
    baseline = Model({}, {}, None, {}, [])
    judges = {"small": Judge(False, "a scorer", None, "abc")}
    module.results = Findings(
        headline="toxic", headline_judge="small", judges=judges, num_failed=0, baseline=baseline, doses=[best]
    )
    assert best.name in [variant.name for variant in module.variants]
    module.off, module.completions, module.folder = {best.name: every[:2]}, [], tmp_path
    module.choose(0.01)
    chosen = NeuronList.load(tmp_path / "chosen/neurons.json")
    assert [n.key for n in chosen.neurons + chosen.next] == [n.key for n in every]
    assert len(chosen.neurons) == 2
    assert {neuron.damping for neuron in chosen.neurons + chosen.next} == {0.125}
    assert ("small", "abc") in chosen.choosers()


def test_nothing_is_chosen_where_nothing_is_within_the_budget(caplog, monkeypatch):
    monkeypatch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
    with caplog.at_level("INFO"):
        _, folder = sweep("--model.neurons", LISTS, "--model.doses", "[]", "--model.max_perplexity_increase", "-0.99")
    assert "Nothing was measured whose perplexity rises by at most -99 %" in caplog.text
    assert not (folder / "chosen").exists()
