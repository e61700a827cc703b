"""Comparing behaviours from their files: what is found, what is written, and what is refused."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODULES, provenance, random_scores, save_scores, write_sealed

from sparc3_lightning.cli import main
from sparc3_lightning.models.components import Component
from sparc3_lightning.report.comparison import ComparisonResults
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.compare import COMPARISON, Comparison
from sparc3_lightning.stages.prune import Pruning

NAMES = ["one", "two", "three"]
OUT = Path("out")


@pytest.fixture
def pruned(shared_lists: Path, tmp_path: Path) -> list[Path]:
    """The neurons.json of three behaviours that share general text; the first two are alike."""
    shutil.copytree(shared_lists, tmp_path, dirs_exist_ok=True)
    return [Path(name) / "neurons.json" for name in NAMES]


@pytest.fixture(scope="module")
def shared_lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_lists()
    return folder


def write_lists() -> None:
    general = [save_scores(f"general_{i}.safetensors", random_scores(i, 2.0)) for i in range(2)]
    alike = random_scores(7)
    for i, name in enumerate(NAMES):
        own = random_scores(20 + i)
        scores = {key: own[key] if name == "three" else 0.2 * own[key] + alike[key] for key in own}
        behavior = save_scores(f"{name}.safetensors", scores)
        Pruning(general, behavior, num_neurons=8, min_differential_strength=-1e9).prune(Path(name))


def compare(*args: Any, **options: Any) -> dict[str, Any]:
    Comparison(*args, **options).compare(OUT)
    return json.loads((OUT / COMPARISON).read_text())


def by_lists(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    return {tuple(row["lists"]): row for row in rows}


def keys_of(path: Path) -> set[tuple[str, int]]:
    return {(row["module"], row["index"]) for row in json.loads(path.read_text())["neurons"]}


def differential(name: str) -> dict[tuple[str, int], float]:
    """Read the score files, average, and subtract, one neuron at a time."""
    from safetensors.torch import load_file

    general, behavior = [load_file(f"general_{i}.safetensors") for i in range(2)], load_file(f"{name}.safetensors")
    return {
        (module, i): sum(float(side[module][i]) for side in general) / 2 - float(behavior[module][i])
        for module in MODULES
        for i in range(len(behavior[module]))
    }


def test_the_overlaps_are_those_of_the_lists(pruned):
    found = by_lists(compare(pruned)["overlaps"])
    keys = dict(zip(NAMES, map(keys_of, pruned), strict=True))
    assert len(found) == 7
    for lists, row in found.items():
        inside = set.intersection(*(keys[name] for name in lists))
        assert row["inclusive"] == len(inside)
        assert row["exclusive"] == len(inside.difference(*(keys[name] for name in NAMES if name not in lists)))
    pair, alone = found["one", "two"], found["one",]
    assert "random" not in alone
    assert pair["inclusive"] > 3
    chance = pair["random"]
    assert chance["expected"] == pytest.approx(8 * 8 / 48)
    assert chance["enrichment"] == pytest.approx(pair["inclusive"] / chance["expected"])
    ways = [math.comb(8, x) * math.comb(40, 8 - x) / math.comb(48, 8) for x in range(9)]
    assert chance["p_value"] == pytest.approx(sum(ways[pair["inclusive"] :]))
    assert chance["log10_p_value"] == pytest.approx(math.log10(chance["p_value"]))
    counts = [[sum(key[0] == module for key in keys[name]) for module in MODULES] for name in ("one", "two")]
    within = sum(a * b / 24 for a, b in zip(*counts, strict=True))
    assert pair["random_within_layers"]["expected"] == pytest.approx(within)


def test_correlations_and_classes_are_of_the_differential_relevance_of_all_neurons(pruned):
    results = compare(pruned)
    values = {name: differential(name) for name in NAMES}
    table = torch.tensor([list(values[name].values()) for name in NAMES], dtype=torch.float64)
    assert torch.tensor(results["correlation"]["pearson"]) == pytest.approx(torch.corrcoef(table).float(), abs=1e-5)
    order = table.argsort(dim=1).argsort(dim=1).double()  # no ties
    assert torch.tensor(results["correlation"]["spearman"]) == pytest.approx(torch.corrcoef(order).float(), abs=1e-5)
    # Given the general text, what is left of the two that are alike is alike, and the third is not.
    partial = results["correlation"]["partial"]
    assert partial[0][1] > 0.9
    assert abs(partial[0][2]) < 0.4 < results["correlation"]["pearson"][0][2]
    union = set().union(*map(keys_of, pruned))
    for name, of in (("all", set(values["one"])), ("pruned", union)):
        classes = results["classes"][name]
        signs = [tuple(n for n in NAMES if values[n][key] < 0) for key in of]
        assert classes["neurons"] == len(of)
        assert classes["general"] == signs.count(())
        assert classes["neutral"] == 0
        for row in classes["specific"] + classes["shared"]:
            assert row["neurons"] == signs.count(tuple(row["lists"]))
        assert [len(row["lists"]) for row in classes["specific"]] == [1, 1, 1]
        assert [len(row["lists"]) for row in classes["shared"]] == [2, 2, 2, 3]


def test_the_layer_profile_counts_the_neurons_of_each_list_and_those_it_shares(pruned):
    layers = compare(pruned)["layers"]
    keys = dict(zip(NAMES, map(keys_of, pruned), strict=True))
    for name in NAMES:
        others = set().union(*(keys[other] for other in NAMES if other != name))
        for i, module in enumerate(MODULES):
            assert layers["pruned"][name][i] == sum(key[0] == module for key in keys[name])
            assert layers["shared"][name][i] == sum(key[0] == module for key in keys[name] & others)


def test_json_csv_and_pictures_are_written_and_the_tables_returned(pruned):
    text = Comparison(pruned).compare(OUT)
    expected = {"overlap", "layers", "correlation"}
    assert {path.name for path in OUT.iterdir()} == {
        COMPARISON, "overlap.csv", "neurons.csv", *(f"{name}.png" for name in expected)
    }  # fmt: skip
    assert all((OUT / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in expected)
    assert ComparisonResults.load(OUT / COMPARISON).lists[0].name == "one"
    results = json.loads((OUT / COMPARISON).read_text())
    assert results["checkpoint_fingerprint"] == "files:abc"
    assert results["num_candidates"] == 48
    assert [row["behavior"] for row in results["lists"]] == [f"{name}.safetensors" for name in NAMES]
    rows = list(csv.DictReader((OUT / "overlap.csv").open()))
    assert [row["lists"] for row in rows][2:4] == ["three", "one & two"]
    for row, found in zip(rows, results["overlaps"], strict=True):
        assert int(row["exclusive"]) == found["exclusive"]
        chance = found.get("random", {}).get("expected")
        assert row["random_expected"] == ("" if chance is None else str(chance))
    neurons = list(csv.DictReader((OUT / "neurons.csv").open()))
    assert {(row["module"], int(row["index"])) for row in neurons} == set().union(*map(keys_of, pruned))
    first = json.loads(pruned[0].read_text())["neurons"][0]
    row = next(row for row in neurons if row["rank_one"] == "1")
    assert (row["module"], int(row["index"])) == (first["module"], first["index"])
    assert float(row["differential_one"]) == pytest.approx(first["score"], abs=1e-6)
    for words in ("one & two & three", "Spearman", "specific to two", "enrichment", str(OUT / COMPARISON)):
        assert words in text
    with pytest.raises(FileExistsError, match=r"compare.json exists already"):
        Comparison(pruned).compare(OUT)


def test_without_score_files_the_lists_alone_are_compared_with_a_warning(pruned):
    Path("two.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"no correlations and no classes. The score file two.safetensors does not"):
        results = compare(pruned)
    assert not {"correlation", "classes"} & set(results)
    assert results["num_candidates"] == 48, "from selection.json"
    pair = by_lists(results["overlaps"])["one", "two"]
    assert "random_within_layers" not in pair
    assert pair["random"]["expected"] == pytest.approx(8 * 8 / 48)
    assert not (OUT / "correlation.png").exists()
    assert (OUT / "overlap.png").is_file()
    assert "differential_one" not in (OUT / "neurons.csv").read_text()


@pytest.mark.filterwarnings("ignore:Without score files")
def test_lists_by_hand_need_the_number_of_candidates(pruned):
    for name in ("a", "b"):
        NeuronList([Component(MODULES[0], 1, -1.0), Component(MODULES[1], len(name), -1.0)]).save(
            Path(name, "neurons.json")
        )
    paths = [Path("a/neurons.json"), Path("b/neurons.json")]
    with pytest.raises(ValueError, match=r"not known.*give --model.num_candidates"):
        compare(paths)
    with pytest.raises(ValueError, match=r"--model.num_candidates is 1, but the lists hold 2 neurons"):
        compare(paths, num_candidates=1)
    with pytest.raises(FileNotFoundError, match=r"The neurons.json of 'a' names none: give --model.general"):
        compare(paths, behaviors=[Path("one.safetensors")] * 2)
    found = by_lists(compare(paths, num_candidates=100)["overlaps"])
    assert found["a", "b"]["random"]["expected"] == pytest.approx(4 / 100)


def test_score_files_that_are_given_are_taken_in_place_of_those_that_neurons_json_names(pruned):
    other = save_scores("other.safetensors", random_scores(50))
    options = {"general": [Path("general_0.safetensors")], "behaviors": [Path("one.safetensors"), other]}
    results = compare(pruned[:2], **options)
    assert results["lists"][1]["behavior"] == "other.safetensors"
    assert results["lists"][0]["general"] == ["general_0.safetensors"]
    general, one, two = random_scores(0, 2.0), dict(random_scores(7)), random_scores(50)
    one = {name: 0.2 * random_scores(20)[name] + one[name] for name in one}
    rows = [torch.cat([general[name] - scores[name] for name in MODULES]) for scores in (one, two)]
    expected = torch.corrcoef(torch.stack(rows))[0, 1].item()
    assert results["correlation"]["pearson"][0][1] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(FileNotFoundError, match="The score file nowhere does not exist"):
        Comparison(pruned[:2], general=[Path("nowhere")]).compare(Path("again"))


def test_sides_of_another_target_are_compared_by_their_shares_alone(pruned):
    for name in NAMES[:2]:
        save_scores(f"{name}.safetensors", random_scores(60), target="lexicon")
        content = json.loads(Path(name, "neurons.json").read_text())
        content["provenance"]["behavior"]["spec"]["target"] = "lexicon"
        write_sealed(Path(name, "neurons.json"), content)
    with pytest.raises(ValueError, match=r"target is 'argmax'.*--model.normalize true compares the shares"):
        compare(pruned[:2])
    results = compare(pruned[:2], normalize=True)
    assert results["correlation"]["pearson"][0][1] == pytest.approx(1)
    general = {name: (random_scores(0)[name] + random_scores(1)[name]) / 2 for name in MODULES}
    shares = [torch.cat([scores[name] for name in MODULES]) for scores in (general, random_scores(60))]
    negative = (shares[0] / shares[0].sum() < shares[1] / shares[1].sum()).sum().item()
    both = by_lists(results["classes"]["all"]["shared"])["one", "two"]
    assert both["neurons"] == negative


def test_a_score_file_that_was_written_over_is_refused(pruned):
    save_scores("two.safetensors", random_scores(70), data_fingerprint="another")
    with pytest.raises(ValueError, match=r"two.safetensors is no longer the score file that two/neurons.json was"):
        compare(pruned)
    assert not (OUT / COMPARISON).exists()


@pytest.mark.parametrize(("change", "other"), [("checkpoint_fingerprint", "other"), ("layers", ["other"])])
def test_lists_of_another_checkpoint_or_layer_are_refused(pruned, change, other):
    general = [save_scores("general.safetensors", random_scores(0), **{change: other})]
    behavior = save_scores("behavior.safetensors", random_scores(1), **{change: other})
    Pruning(general, behavior, num_neurons=8, min_differential_strength=-1e9).prune(Path("other"))
    with pytest.raises(
        ValueError, match=rf"the lists cannot be compared: {change} is .* in one/neurons.json but .*'other'.* in"
    ):
        compare([pruned[0], Path("other/neurons.json")])


def test_score_files_of_another_checkpoint_than_the_lists_are_refused(pruned):
    of = dataclasses.replace(provenance(), checkpoint_fingerprint="files:other")
    files = [save_scores(f"{name}.other", random_scores(0), of) for name in ("general", "a", "b")]
    with pytest.raises(ValueError, match=r"a.other belongs to another checkpoint than one/neurons.json"):
        compare(pruned[:2], general=files[:1], behaviors=files[1:])


def test_score_files_that_lack_a_neuron_of_a_list_are_refused(pruned):
    files = [save_scores(f"{name}.fewer", random_scores(i, shape=2)) for i, name in enumerate(("general", "a", "b"))]
    with pytest.raises(ValueError, match=r"The score files hold no neuron \d+ of model.layers.0.mlp.up_proj"):
        compare(pruned[:2], general=files[:1], behaviors=files[1:])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/neurons.json", "b/neurons.json"], ["a", "b"]),
        (["x/a/neurons.json", "y/a/neurons.json"], ["x/a", "y/a"]),
        (["x/toxic.json", "x/gender.json"], ["toxic", "gender"]),
        (["logs/version_0/neurons.json", "/logs/version_1/neurons.json"], ["version_0", "version_1"]),
    ],
)
def test_lists_are_named_after_what_tells_their_paths_apart(paths, names):
    assert Comparison(list(map(Path, paths))).names == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neurons": ["a"]}, r"--model.neurons must name from 2 to 10 files.*got 1"),
        ({"neurons": [f"{i}" for i in range(11)]}, r"--model.neurons must name from 2 to 10 files.*got 11"),
        ({"names": ["a"]}, r"--model.names must have one entry for each of the 2 files.*got 1"),
        ({"names": ["a", "a"]}, r"a name of its own, got \['a', 'a'\]: give --model.names"),
        ({"names": ["a", ""]}, r"a name of its own"),
        ({"neurons": ["a/neurons.json", "a/neurons.json"]}, r"a name of its own"),
        ({"behaviors": ["a", "b", "c"]}, r"--model.behaviors must have one entry for each of the 2 files.*got 3"),
        ({"general": []}, r"--model.general must name at least one"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**{"neurons": ["a", "b"], **options})


def test_a_list_that_is_missing_is_refused_by_name(pruned):
    with pytest.raises(FileNotFoundError, match=r"--model.neurons: nowhere does not exist"):
        compare([pruned[0], Path("nowhere")])


def test_the_verb_writes_to_a_folder_of_its_own_and_its_saved_config_repeats_it(pruned, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["sparc3"])
    lists = f"[{', '.join(map(str, pruned))}]"
    main(["compare", "--trainer.accelerator", "cpu", "--model.neurons", lists, "--model.names", "[A, B, C]"])
    folder = Path("lightning_logs/compare/version_0")
    first = json.loads((folder / COMPARISON).read_text())
    assert [row["name"] for row in first["lists"]] == ["A", "B", "C"]
    main(["compare", "--config", str(folder / "config.yaml")])
    assert json.loads((folder.parent / "version_1" / COMPARISON).read_text()) == first
