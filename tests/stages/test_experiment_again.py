"""The whole experiment run again: which stages are due, and which are kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from experiments import ALL, LOGS, MORE, completions, figures, pretend, run
from safetensors.torch import load_file, save_file

from sparc3_lightning.provenance import versions

pytestmark = pytest.mark.usefixtures("as_if_from_python", "config")


@pytest.mark.few(1)
def test_a_second_run_repeats_no_stage_and_gives_the_same_numbers(done, verbs_run, caplog):
    first, folder = done.results, done.folder
    stages = [path for verb in ("attribute", "prune", "evaluate") for path in (LOGS / verb).rglob("*")]
    written = {path: path.stat().st_mtime_ns for path in stages if path.is_file()}
    with caplog.at_level("INFO"):
        second, other = run()
    assert verbs_run == []
    assert second == first
    assert other != folder
    assert (other / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    assert caplog.text.count("done before") == 5


@pytest.mark.slow
def test_the_whole_experiment_run_again_from_nothing_gives_the_same_numbers(done):
    lines = completions(done.folder)
    shutil.rmtree(LOGS)
    second, folder = run()
    assert figures(second) == figures(done.results)
    assert completions(folder) == lines


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--prune.num_neurons", "7"], ["prune", "evaluate"]),
        (["--evaluate.sampling.max_new_tokens", "6"], ["evaluate"]),
        (["--evaluate.controls.num_draws", "1"], ["evaluate"]),
        pytest.param(["--evaluate.doses", "[3]"], ["evaluate"], marks=pytest.mark.slow),
        pytest.param(["--evaluate.sampling.protocol", "rtp"], ["evaluate"], marks=pytest.mark.slow),
        pytest.param(["--prune.num_ranked", "7"], ["prune", "evaluate"], marks=pytest.mark.slow),
        (["--data.prompts.init_args.num_prompts", "5"], ["evaluate"]),
        (["--behavior.init_args.num_samples", "4"], ["attribute", "prune", "evaluate"]),
        (["--attribute.relevance", "signed"], ALL),
        pytest.param(["--seed_everything", "1"], ALL, marks=pytest.mark.slow),
        (["--model.general_seeds", "[0,1,2]"], ["attribute", "prune", "evaluate"]),
        (["--trainer.enable_progress_bar", "true"], []),
        pytest.param(["--trainer.log_every_n_steps", "7"], [], marks=pytest.mark.slow),
        pytest.param(["--model.dtype", "float64"], ALL, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.few(2)
def test_a_changed_option_reruns_what_depends_on_it_and_nothing_else(due, change, expected):
    due()
    assert due(*change) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("general.txt", ["attribute", "attribute", "prune", "evaluate"]),
        ("text.txt", ["evaluate"]),
        ("prompts.jsonl", ["attribute", "prune", "evaluate"]),
    ],
)
@pytest.mark.few(1)
def test_changed_content_of_a_file_reruns_what_reads_it(due, name, expected):
    due()
    lines = Path(name).read_text().splitlines()
    Path(name).write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
    assert due() == expected


def test_another_text_reruns_the_evaluation_as_its_content_does_and_none_is_as_if_there_were_no_such_option(due):
    of = "{class_path: sparc3_lightning.data.WikiText2, init_args: {source: other.txt, window: 32}}"
    Path("other.txt").write_text("a text\n")
    due()
    assert due("--data.other_text", "null") == []
    assert due("--data.other_text", of) == ["evaluate"]
    Path("other.txt").write_text("another text\n")
    assert due("--data.other_text", of) == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_changed_content_of_a_second_judge_or_of_the_non_toxic_prompts_reruns_the_evaluation(due):
    due(*MORE)
    for name in ("mild.jsonl", "other/config.json"):
        assert due(*MORE) == []
        Path(name).write_text(Path(name).read_text() + "\n")
        assert due(*MORE) == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_the_label_of_a_local_scorer_leaves_its_content_in_sight(due):
    Path("other/toxicity.ckpt").rename("other/model.safetensors")  # a label is for a text-classification checkpoint
    options = ["--evaluate.scorers", "[small, other#toxic]"]
    due(*options)
    Path("other/config.json").write_text(Path("other/config.json").read_text() + "\n")
    assert due(*options) == ["evaluate"]


@pytest.mark.usefixtures("more_inputs")
def test_changed_content_of_the_lexicon_s_scorer_reruns_the_attribution_whose_target_it_is(due):
    Path("other/toxicity.ckpt").rename("other/model.safetensors")  # a label is for a text-classification checkpoint
    options = ["--attribute.lexicon", "other#toxic", "--model.behavior_attribute", '{"target": "lexicon"}']
    due(*options)
    Path("other/config.json").write_text(Path("other/config.json").read_text() + "\n")
    assert due(*options) == ["attribute", "prune", "evaluate"]


@pytest.mark.slow
def test_changed_source_of_a_function_that_scores_reruns_the_evaluation(due, monkeypatch):
    monkeypatch.syspath_prepend(str(Path().absolute()))
    Path("my_scorer.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    options = ["--evaluate.scorers", "[small, my_scorer:score]"]
    due(*options)
    assert due(*options) == []
    Path("my_scorer.py").write_text("def score(texts):\n    return [0.25] * len(texts)\n")
    assert due(*options) == ["evaluate"]


@pytest.mark.parametrize("package", ["sparc3_lightning", "torch", "transformers", "lxt"])
@pytest.mark.few(1)
def test_another_version_of_what_the_numbers_come_from_reruns_everything(due, monkeypatch, package):
    due()
    monkeypatch.setitem(versions(), package, "0.0.1")
    assert due() == ALL


def test_a_changed_tokenizer_of_ones_own_reruns_what_it_reads(due, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, "words")
    options = ["--general.init_args.tokenizer", "words"]
    due(*options)
    Path("words/model.safetensors").unlink()
    assert due(*options) == []
    Path("words/tokenizer.json").write_text(Path("words/tokenizer.json").read_text() + "\n")
    assert due(*options) == ["attribute", "attribute", "prune", "evaluate"]


def test_a_changed_task_of_ones_own_reruns_the_evaluation(due):
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text("task: mine\n")
    due("--evaluate.zero_shot.folder", "tasks")
    Path("tasks/mine.yaml").write_text("task: mine\ntest_split: test\n")
    assert due("--evaluate.zero_shot.folder", "tasks") == ["evaluate"]


def test_changed_weights_of_a_local_checkpoint_rerun_everything(due, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, "mine")
    due("--model.checkpoint", "mine")
    weights = load_file("mine/model.safetensors")
    weights["lm_head.weight"] = torch.roll(weights["lm_head.weight"], 1)
    save_file(weights, "mine/model.safetensors", {"format": "pt"})
    assert due("--model.checkpoint", "mine") == ALL


@pytest.mark.slow
def test_a_stage_that_broke_off_is_run_again(done, verbs_run):
    stage = Path(json.loads((done.folder / "experiment.json").read_text())["stages"]["evaluation"])
    (stage / "results.json").unlink()
    assert (stage / "config.yaml").is_file()
    second, _ = run()
    assert verbs_run == ["evaluate"]
    assert figures(second) == figures(done.results)
    assert (stage / "results.json").is_file()


@pytest.mark.parametrize(("number", "verb"), list(enumerate(ALL)))
@pytest.mark.few(2)
def test_a_run_that_fails_goes_on_where_it_broke_off(due, number, verb):
    begun: list[str] = []

    def failing(verb: str, config: Path) -> None:
        if len(begun) == number:
            raise OSError("No space left on device")
        begun.append(verb)
        pretend(verb, config)

    with pytest.raises(OSError, match="No space left"):
        due(run_stage=failing)
    assert begun == ALL[:number]
    assert due() == ALL[number:]
