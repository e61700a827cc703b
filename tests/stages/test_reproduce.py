"""`sparc3 reproduce results.json` measures an evaluation again, says what changed, and compares figure by figure."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import stops
from evaluations import LEAST, NEXT, PRUNED, data, evaluation, flat, read_strictly, run, save_neurons, write_inputs
from helpers import replaced_at, write_sealed

from sparc3_lightning.cli import main
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.reproduction import Changed, Figure, ReproductionResults
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.stages.reproduce import HEADLINE, Reproduction, said_of_changes, said_of_figures
from sparc3_lightning.stages.sweep import Sweep

pytestmark = pytest.mark.usefixtures("as_if_from_python")
THERE = Path("out/results.json")
FOLDER = Path("lightning_logs/reproduce/version_0")
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a copy of the tiny checkpoint was evaluated."""
    home = tmp_path_factory.mktemp("measured")
    write_inputs(home)
    shutil.copytree(tiny_checkpoint, home / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("PL_GLOBAL_SEED", "3")
        patch.syspath_prepend(home)
        patch.setattr("sparc3_lightning.report.page.write_report", lambda *_: None)
        neurons = save_neurons("./model", PRUNED, next=NEXT, least_relevant=LEAST)
        of = data(num_nontoxic=2, nontoxic_source="mild.jsonl", conventions=["disjoint"])
        run(evaluation("./model", neurons, max_new_tokens=2, scorers=["toy_scorers:letters"]), of)
    return home


@pytest.fixture
def there(measured, tmp_path, monkeypatch) -> dict[str, Any]:
    """The results of that folder, which is copied to the one of the test."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    return read_strictly(THERE)


def reproduce(path: str | Path = THERE, *options: str) -> ReproductionResults:
    main(["reproduce", str(path), *QUIET, *options])
    return ReproductionResults.load(FOLDER / "reproduction.json")


@pytest.mark.few(1)
def test_the_same_machine_gives_the_same_figures(there, caplog):
    before = THERE.read_bytes()
    with caplog.at_level("INFO"):
        found = reproduce()
    assert (found.changed, found.num_differing) == ([], 0)
    assert {figure.outcome for figure in found.figures} == {"equal"}
    assert found.results == str(THERE.absolute())
    assert read_strictly(FOLDER / "results.json")["protocol"] == there["protocol"], "with its seed"
    assert (FOLDER / "completions.jsonl").read_bytes() == Path("out/completions.jsonl").read_bytes()
    assert THERE.read_bytes() == before
    assert "versions, checkpoint, data and scorers are the same here" in caplog.text
    assert re.search(r"\nbaseline.perplexity.disjoint +[\d.]+ +[\d.]+ +[\d.]+ to [\d.]+ +equal\n", caplog.text)
    assert f"All {len(found.figures)} figures are reproduced." in caplog.text


@pytest.mark.slow
def test_a_figure_that_was_changed_is_found_and_the_exit_code_is_1(there, capsys, caplog):
    write_sealed(THERE, replaced_at(there, "pruned/kl", 5.0))
    with caplog.at_level("INFO"):
        code, *_ = stops(capsys, "reproduce", str(THERE), *QUIET)
    assert code == 1
    found = ReproductionResults.load(FOLDER / "reproduction.json")
    assert [row.name for row in found.figures if row.outcome == "differs"] == ["pruned.kl"]
    assert f"1 of {len(found.figures)} figures differ." in caplog.text


def append(path: str, text: str) -> None:
    with Path(path).open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("path", "text", "name"),
    [
        ("text.txt", "\n", "text"),
        ("prompts.jsonl", "\n", "prompts"),
        ("mild.jsonl", "\n", "prompts"),
        ("toy_scorers.py", "# changed\n", "scorer toy_scorers:letters"),
    ],
)
@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.few(2)
def test_data_or_a_scorer_of_other_contents_is_said(there, path, text, name):
    append(path, text)
    changed = Reproduction(THERE).changed(torch.device("cpu"))
    assert [change.name for change in changed] == [name]
    assert f"\n  {name}: {there['inputs'][name]} there, {changed[0].here} here" in said_of_changes(THERE, changed)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_another_checkpoint_list_version_or_device_is_said(there):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "note": "another"}))
    save_neurons("./model", PRUNED[:3])
    write_sealed(THERE, replaced_at(replaced_at(there, "versions/torch", "1.0"), "inputs/device", "NVIDIA H200"))
    changed = Reproduction(THERE).changed(torch.device("cpu"))
    assert {change.name: change.there for change in changed} == {
        "torch": "1.0",
        "checkpoint": there["checkpoint_fingerprint"],
        "tokenizer": there["inputs"]["tokenizer"],
        "neurons": there["inputs"]["neurons"],
        "device": "NVIDIA H200",
    }


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize("gone", ["neurons.json", "text.txt", "prompts.jsonl", "mild.jsonl", "model"])
@pytest.mark.few(2)
def test_what_is_gone_is_named_before_anything_is_loaded(there, gone):
    Path(gone).rename("moved")
    named = "./model" if gone == "model" else gone
    with pytest.raises(FileNotFoundError, match=f"was measured from what does not exist here: {named} \\(seen from"):
        reproduce()
    assert not Path("lightning_logs/reproduce").exists() or not list(Path("lightning_logs/reproduce").iterdir())


@pytest.mark.usefixtures("no_model_is_loaded")
def test_all_that_is_gone_is_named_at_once(there):
    for name in ("text.txt", "neurons.json"):
        Path(name).unlink()
    with pytest.raises(FileNotFoundError, match=r"here: neurons.json, text.txt \("):
        reproduce()


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", "sparc3_lightning results 2", "its format is 'sparc3_lightning results 2'"),
        ("config/verb", "train", "was not written by evaluate or sweep but by 'train'"),
        ("config/classes", {}, "does not say how it was measured|describes no evaluation"),
        ("config/model/doses", "many", "describes no evaluation of this version"),
        ("config/classes/text", "os.path", "describes no evaluation of this version"),
        ("config/model", [], "does not say how it was measured"),
        ("inputs", {}, "does not say how it was measured: its config lacks 'dtype'"),
    ],
)
@pytest.mark.few(3)
def test_a_file_that_describes_no_evaluation_is_refused_in_a_sentence(there, path, value, said):
    write_sealed(THERE, replaced_at({k: v for k, v in there.items() if k != "sha256"}, path, value))
    with pytest.raises(ValueError, match=said):
        reproduce()


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_file_that_is_not_there_or_a_folder_is_refused(there):
    for path in ("nowhere.json", "out"):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a file: give the results.json of evaluate"):
            main(["reproduce", path, *QUIET])


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_folder_that_holds_results_is_not_written_to(there):
    FOLDER.mkdir(parents=True)
    shutil.copy(THERE, FOLDER)
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        reproduce(THERE, "--trainer.logger.init_args.version", "0")


@pytest.mark.slow
def test_the_table_of_figures_has_at_most_100_columns_whatever_their_names():
    name = "zero_shot.baseline." + "a_task_of_a_long_name" * 9 + ".accuracy"
    figures = [Figure(name, -1.234567e-05, 1 / 3, -1.234567e-300, 1.234567e300, "differs")]
    figures.append(Figure("kl", 0.0, math.nan, 0.0, 1.0, "within the interval"))
    said = said_of_figures(
        ReproductionResults(results="there.json", num_differing=1, changed=[], figures=figures), Path("out")
    )
    rows = said.splitlines()[3:5]
    assert max(map(len, said.splitlines())) <= 100
    assert rows[0].startswith("zero_shot.")
    assert "e.accuracy  " in rows[0]
    assert "…" in rows[0]
    assert rows[1].startswith("kl  ")


def test_a_headline_of_another_judge_is_told_beside_the_figures():
    def said(*changed: Changed) -> str:
        found = ReproductionResults(results="there.json", num_differing=0, changed=list(changed), figures=[])
        return said_of_figures(found, Path("out"))

    assert "headline" not in said(Changed("torch", "1", "2"))
    assert "The headline is of 'small' there and of 'other' here:\nits figures are not of one judge.\n" in said(
        Changed(HEADLINE, "small", "other")
    )


@pytest.mark.slow
def test_a_sweep_is_reproduced_too(there):
    options = {"names": ["one"], "doses": [2], "dampings": [1.0, 0.5], "max_new_tokens": 2}
    model = evaluation("./model", Path("neurons.json"), Sweep, max_perplexity_increase=9.0, **options)
    run(model, folder="swept")
    found = reproduce("swept/results.json")
    assert (found.changed, found.num_differing) == ([], 0)
    theirs, mine = flat(read_strictly(Path("swept/results.json"))), flat(read_strictly(FOLDER / "results.json"))
    unlike = {name for name in theirs.keys() | mine.keys() if theirs.get(name) != mine.get(name)}
    assert unlike <= {"/sha256", "/config/model/dtype"}
    assert (FOLDER / "chosen/neurons.json").is_file()


@pytest.mark.slow
def test_an_evaluation_with_controls_doses_and_two_judges_is_reproduced(there):
    options = {"controls": Controls(1), "doses": [3], "scorers": ["small", "toy_scorers:letters"]}
    run(evaluation("./model", Path("neurons.json"), max_new_tokens=3, **options), folder="more")
    found = reproduce("more/results.json")
    assert {figure.outcome for figure in found.figures} == {"equal"}


@pytest.mark.slow
def test_the_results_of_an_experiment_are_reproduced(done):
    found = reproduce(done.folder / "results.json")
    assert (found.changed, found.num_differing) == ([], 0)


@pytest.mark.slow
def test_an_evaluation_without_neurons_is_reproduced(there):
    run(evaluation("./model", max_new_tokens=2, scorers=["toy_scorers:letters"]), folder="alone")
    found = reproduce("alone/results.json")
    assert {figure.outcome for figure in found.figures} == {"equal"}
    assert Results.load(FOLDER / "results.json").neurons is None
