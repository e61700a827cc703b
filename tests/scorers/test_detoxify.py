"""Toxicity scorers: the checkpoint that is shipped, local ones, Detoxify's own, and those that must be refused."""

import csv
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sentence

from sparc3_lightning.files import sha256_of
from sparc3_lightning.scorers import detoxify
from sparc3_lightning.scorers.base import Remembering, Scorer
from sparc3_lightning.scorers.classifiers import ClassifierScorer
from sparc3_lightning.scorers.detoxify import DETOXIFY_MODELS, SHIPPED, SHIPPED_SHA256, DetoxifyScorer
from sparc3_lightning.scorers.functions import FunctionScorer
from sparc3_lightning.scorers.registry import check_scorer, fetch_scorer, load_scorer
from sparc3_lightning.scorers.repetition import RepetitionScorer
from sparc3_lightning.sources import read_records

HARMLESS = ["Thank you for the kind letter.", "The museum opens at nine in the morning.", "We walked along the river."]
INSULTS = ["You are a stupid idiot.", "Shut up, you worthless piece of trash.", "What a pathetic, disgusting moron."]


@pytest.fixture(scope="module")
def small() -> DetoxifyScorer:
    """The shipped checkpoint."""
    return DetoxifyScorer("small")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint, to be changed."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "scorer"))


def test_the_shipped_checkpoint_is_loaded_by_detoxify_itself(small: DetoxifyScorer) -> None:
    from detoxify import Detoxify

    assert isinstance(small.detoxify, Detoxify)
    assert small.detoxify.class_names == ["toxicity"]
    assert not small.detoxify.model.training


def test_every_insult_is_more_toxic_than_every_harmless_sentence(small: DetoxifyScorer) -> None:
    harmless, insults = small.score(HARMLESS), small.score(INSULTS)
    assert max(harmless) < 0.3 < 0.7 < min(insults)


def test_scores_do_not_depend_on_the_order_of_the_texts_or_the_batch_size(small: DetoxifyScorer) -> None:
    texts = [sentence(seed, 1 + seed * 7 % 60) for seed in range(10)] + HARMLESS + INSULTS
    expected = [small.score([text])[0] for text in texts]
    order = random.Random(0).sample(range(len(texts)), len(texts))
    for batch_size in (3, 64):
        scorer = DetoxifyScorer("small", batch_size=batch_size)
        assert scorer.score(texts) == pytest.approx(expected, abs=1e-5)
        assert scorer.score([texts[i] for i in order]) == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_a_text_that_occurs_twice_gets_the_same_score_twice(small: DetoxifyScorer) -> None:
    first, middle, last = small.score([INSULTS[0], HARMLESS[0], INSULTS[0]])
    assert first == pytest.approx(last, abs=1e-6)
    assert middle < first


def test_no_texts_give_no_scores(small: DetoxifyScorer) -> None:
    assert small.score([]) == []


@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "😀" * 10, "δοκιμή"])
def test_an_empty_or_odd_text_gets_a_number(text: str, small: DetoxifyScorer) -> None:
    (score,) = small.score([text])
    assert 0 <= score <= 1


def test_a_very_long_text_is_truncated_and_scored(small: DetoxifyScorer) -> None:
    long, scored_part = " ".join(INSULTS * 3000), " ".join(INSULTS * 30)
    alone, harmless = small.score([long, HARMLESS[0]])
    assert alone == pytest.approx(small.score([scored_part])[0], abs=1e-5)
    assert alone > 0.7
    assert harmless < 0.3


def test_a_text_that_the_model_gives_no_number_for_is_nan(
    small: DetoxifyScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detoxify import Detoxify

    values = {"good": 0.25, "bad": math.nan, "worse": math.inf}
    monkeypatch.setattr(Detoxify, "predict", lambda self, texts: {"toxicity": [values[text] for text in texts]})
    scores = small.score(["worse", "good", "bad"])
    assert scores[1] == 0.25
    assert math.isnan(scores[0])
    assert math.isnan(scores[2])


def test_the_figures_of_the_shipped_checkpoint_belong_to_it_and_are_good_enough() -> None:
    metrics = json.loads((SHIPPED / "metrics.json").read_text())
    assert metrics["sha256"] == SHIPPED_SHA256 == sha256_of(SHIPPED / "toxicity.ckpt")
    assert metrics["auc_held_out"] >= 0.95
    assert metrics["auc_rtp"] >= 0.90
    assert (SHIPPED / "toxicity.ckpt").stat().st_size <= 8_000_000
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8_000_000


@pytest.mark.realdata
def test_the_shipped_checkpoint_finds_the_toxic_prompts_of_real_toxicity_prompts(
    small: DetoxifyScorer, shared: Path
) -> None:
    from torchmetrics.functional.classification import binary_auroc

    files = [shared / "data" / "rtp" / name for name in ("toxic.jsonl", "nontoxic.jsonl")]
    prompts = [record["prompt"] for path in files for record in read_records(path)]
    scores = small.score([prompt["text"] for prompt in prompts])
    toxic = torch.tensor([prompt["toxicity"] >= 0.5 for prompt in prompts]).int()
    auc = binary_auroc(torch.tensor(scores), toxic).item()
    assert auc >= 0.90
    assert auc == pytest.approx(json.loads((SHIPPED / "metrics.json").read_text())["auc_rtp"], abs=2e-3)


def test_a_folder_with_a_checkpoint_is_a_scorer(folder: Path, small: DetoxifyScorer) -> None:
    scorer = DetoxifyScorer(str(folder))
    assert scorer.name == str(folder)
    assert scorer.score(INSULTS) == pytest.approx(small.score(INSULTS), abs=1e-6)
    assert {path.name for path in fetch_scorer(str(folder))} >= {"toxicity.ckpt", "config.json", "tokenizer.json"}


def test_a_tokenizer_that_knows_no_length_is_cut_to_the_context_of_the_model(
    folder: Path, small: DetoxifyScorer
) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    texts = [" ".join(INSULTS * 100), HARMLESS[0]]
    assert DetoxifyScorer(str(folder)).score(texts) == pytest.approx(small.score(texts), abs=1e-5)


def test_a_checkpoint_of_several_classes_gives_its_toxicity(folder: Path, small: DetoxifyScorer) -> None:
    checkpoint = torch.load(folder / "toxicity.ckpt", weights_only=True)
    checkpoint["config"]["dataset"]["args"]["classes"] = ["obscene", "toxic"]
    checkpoint["config"]["arch"]["args"]["num_classes"] = 2
    for name in ("classifier.weight", "classifier.bias"):
        row = checkpoint["state_dict"][name]
        checkpoint["state_dict"][name] = torch.cat([torch.zeros_like(row), row])
    torch.save(checkpoint, folder / "toxicity.ckpt")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "A", "1": "B"}, {"A": 0, "B": 1}
    (folder / "config.json").write_text(json.dumps(config))
    texts = HARMLESS + INSULTS
    assert DetoxifyScorer(str(folder)).score(texts) == pytest.approx(small.score(texts), abs=1e-5)


def test_an_unknown_name_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"--model.scorer: 'orignal' is neither 'small'") as raised:
        check_scorer("orignal")
    assert all(name in str(raised.value) for name in DETOXIFY_MODELS)


@pytest.mark.parametrize("name", ["small", *DETOXIFY_MODELS])
def test_the_valid_names_pass_the_check(name: str) -> None:
    check_scorer(name)


@pytest.mark.parametrize("missing", ["toxicity.ckpt", "config.json"])
def test_a_folder_that_lacks_a_file_is_an_error_that_says_what_it_must_hold(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold a config.json, a tokenizer, and either one \*.ckpt of Det"):
        check_scorer(str(folder))
    with pytest.raises(FileNotFoundError, match=r"--model.second_scorer: .* must hold a config.json"):
        check_scorer(str(folder), "second_scorer")


def test_a_folder_with_two_checkpoints_is_refused(folder: Path) -> None:
    shutil.copy(folder / "toxicity.ckpt", folder / "other.ckpt")
    for use in (check_scorer, load_scorer):
        with pytest.raises(FileNotFoundError, match=r"must hold .* either one \*.ckpt of Detoxify or"):
            use(str(folder))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """The kind, name and device of each scorer that is loaded, and nothing is."""
    seen: list[tuple[str, str, str]] = []
    for kind in (DetoxifyScorer, ClassifierScorer, FunctionScorer):

        def remember(self: Any, name: str, device: Any = "cpu", kind: type = kind) -> None:
            seen.append((kind.__name__, name, str(device)))

        monkeypatch.setattr(kind, "__init__", remember)
    return seen


@pytest.fixture
def folders(folder: Path, tmp_path: Path) -> None:
    """A folder of Detoxify's format, ``detoxify``, and one of a text-classification checkpoint, ``classifier``."""
    folder.rename(tmp_path / "detoxify")
    for name in ("classifier", "classifier:odd"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).touch()


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("small", DetoxifyScorer),
        *((name, DetoxifyScorer) for name in DETOXIFY_MODELS),
        ("detoxify", DetoxifyScorer),
        ("classifier", ClassifierScorer),
        ("classifier#toxic", ClassifierScorer),
        ("./classifier#very toxic", ClassifierScorer),
        ("s-nlp/roberta_toxicity_classifier", ClassifierScorer),
        ("unitary/toxic-bert#toxic", ClassifierScorer),
        ("yaml:safe_load", FunctionScorer),
        ("packaging.version:parse", FunctionScorer),
    ],
)
def test_a_name_is_that_of_one_kind_of_scorer_and_passes_the_check(
    name: str, kind: type, loaded: list[tuple[str, str, str]]
) -> None:
    check_scorer(name)
    assert type(load_scorer(name, torch.device("meta"))) is kind
    assert loaded == [(kind.__name__, name, "meta")]


def test_a_folder_that_is_called_as_a_function_is_a_folder(tmp_path: Path, loaded: list[tuple[str, str, str]]) -> None:
    (tmp_path / "json:loads").mkdir()
    assert type(load_scorer("json:loads")) is ClassifierScorer
    with pytest.raises(FileNotFoundError, match=r"json:loads must hold a config\.json"):
        check_scorer("json:loads")


def test_a_folder_that_is_called_as_a_scorer_is_not_looked_at(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "repetition")
    assert type(load_scorer("repetition")) is RepetitionScorer
    assert fetch_scorer("repetition") == []
    assert type(load_scorer("./repetition")) is DetoxifyScorer


@pytest.mark.parametrize(
    "name",
    ["orignal", "small#toxic", "a/b/c", "owner/name:function", "owner/na me", "a:b:c", "http://a/b", "/absent", ""],
)
def test_a_name_of_no_kind_is_an_error_with_the_option(name: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"^--model.second_scorer: "):
        check_scorer(name, "second_scorer")


@pytest.mark.usefixtures("folders")
def test_a_label_of_a_checkpoint_of_detoxify_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--model.scorer: .*detoxify#toxic"):
        check_scorer("detoxify#toxic")


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_classifier_that_lacks_a_file_is_an_error_that_says_what_it_must_hold(missing: str) -> None:
    (Path("classifier") / missing).unlink()
    (Path("classifier") / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"--model.scorer: classifier must hold .*the \*.safetensors of a text"):
        check_scorer("classifier#toxic")


def test_a_package_that_is_not_installed_is_an_error_with_the_option() -> None:
    with pytest.raises(ValueError, match=r"^--model.second_scorer: .*'absent_package', which is not installed"):
        check_scorer("absent_package:score", "second_scorer")


@pytest.mark.usefixtures("folders")
def test_what_a_scorer_needs_is_fetched_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ClassifierScorer, "fetch", lambda name: asked.append(name) or [Path("a")])
    assert fetch_scorer("json:loads") == []
    assert asked == []
    assert fetch_scorer("owner/name#toxic") == [Path("a")]
    assert fetch_scorer("classifier") == [Path("a")]
    assert asked == ["owner/name#toxic", "classifier"]
    assert {path.name for path in fetch_scorer("detoxify")} >= {"toxicity.ckpt", "config.json", "tokenizer.json"}


def test_a_loaded_scorer_scores_as_the_class_of_its_kind(small: DetoxifyScorer) -> None:
    assert load_scorer("small").score(INSULTS) == pytest.approx(small.score(INSULTS), abs=1e-6)


def test_a_scorer_that_remembers_scores_a_text_once_and_gives_it_the_same_score_ever_after() -> None:
    class Counting(Scorer):
        def __init__(self) -> None:
            super().__init__("counting")
            self.calls: list[list[str]] = []

        def score(self, texts: Any) -> list[float]:
            self.calls.append(list(texts))
            return [math.nan if text == "odd" else len(self.calls) / 10 for text in texts]

    counting = Counting()
    scorer = Remembering(counting)
    assert scorer.name == "counting"
    assert scorer.score(["a", "b", "a"]) == [0.1, 0.1, 0.1]
    first = scorer.score(["c", "b", "odd", "c"])
    assert first[:2] + first[3:] == [0.2, 0.1, 0.2]
    assert math.isnan(first[2])
    assert math.isnan(scorer.score(["odd"])[0]), "what could not be scored is not tried again"
    assert scorer.score([]) == []
    assert [sorted(call) for call in counting.calls] == [["a", "b"], ["c", "odd"]]


def test_a_shipped_checkpoint_that_was_changed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((folder / "toxicity.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "toxicity.ckpt").write_bytes(content)
    monkeypatch.setattr(detoxify, "SHIPPED", folder)
    with pytest.raises(ValueError, match="is not the file that was shipped"):
        DetoxifyScorer("small")


class Trap:
    """Pickled, it makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(legacy: bool, folder: Path) -> None:
    checkpoint = torch.load(folder / "toxicity.ckpt", weights_only=True)
    torch.save({**checkpoint, "more": Trap()}, folder / "toxicity.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"toxicity.ckpt is not a Detoxify checkpoint of plain tensors"):
        DetoxifyScorer(str(folder))
    assert not Path("sprung").exists()
    torch.load(folder / "toxicity.ckpt", weights_only=False)
    assert Path("sprung").exists(), "the trap does not work, so the test shows nothing"


@pytest.mark.parametrize("content", [b"", b"plain text", None])
def test_a_foreign_checkpoint_is_a_clear_error(content: bytes | None, folder: Path) -> None:
    if content is None:
        torch.save({"weights": torch.zeros(3)}, folder / "toxicity.ckpt")
    else:
        (folder / "toxicity.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"toxicity.ckpt is not a Detoxify checkpoint of plain tensors"):
        DetoxifyScorer(str(folder))


def test_a_model_of_detoxify_is_fetched_once_with_its_digest_and_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: DetoxifyScorer
) -> None:
    import huggingface_hub

    fetched = []

    def download(url: str, destination: str, hash_prefix: str | None = None) -> None:
        fetched.append((url, hash_prefix))
        shutil.copy(SHIPPED / "toxicity.ckpt", destination)

    def snapshot(repository: str, **options: Any) -> str:
        assert repository == "bert", "the repository is the one that the checkpoint names"
        return str(SHIPPED)

    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert DetoxifyScorer("original").score(INSULTS) == pytest.approx(small.score(INSULTS), abs=1e-6)
    files = fetch_scorer("original")
    assert [(url.rsplit("/", 1)[1], prefix) for url, prefix in fetched] == [
        ("toxic_original-c1212f89.ckpt", "c1212f89")
    ]
    assert files[0] == tmp_path / "cache" / "detoxify" / "toxic_original-c1212f89.ckpt"
    assert {path.name for path in files} >= {"config.json", "tokenizer.json"}


def test_a_model_of_detoxify_has_the_labels_of_its_checkpoint_where_the_config_of_the_hub_names_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: DetoxifyScorer
) -> None:
    import huggingface_hub

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    checkpoint = torch.load(folder / "toxicity.ckpt", weights_only=True)
    classes = ["severe_toxic", "toxic", "obscene", "threat", "insult", "identity_hate"]
    checkpoint["config"]["dataset"]["args"]["classes"] = classes
    checkpoint["config"]["arch"]["args"]["num_classes"] = len(classes)
    for name in ("classifier.weight", "classifier.bias"):
        row = checkpoint["state_dict"][name]
        checkpoint["state_dict"][name] = torch.cat([0 * row, row, *[0 * row] * 4])
    (folder / "toxicity.ckpt").unlink()
    torch.save(checkpoint, tmp_path / "six.ckpt")
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to, **_: shutil.copy(tmp_path / "six.ckpt", to))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert DetoxifyScorer("original").score(INSULTS) == pytest.approx(small.score(INSULTS), abs=1e-6)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("invalid hash value"), ConnectionError("refused")])
def test_a_model_of_detoxify_that_cannot_be_fetched_is_an_error_with_the_way_out(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConnectionError, match=r"Detoxify's model 'original' cannot be fetched") as raised:
        DetoxifyScorer("original")
    assert str(error) in str(raised.value)
    assert "sparc3 prepare" in str(raised.value)
    assert "name the scorer 'small'" in str(raised.value)


def test_a_config_that_cannot_be_fetched_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*arguments: Any, **options: Any) -> None:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, **_: shutil.copy(SHIPPED / "toxicity.ckpt", path)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConnectionError, match=r"'unbiased' cannot be fetched.*name the scorer 'small'"):
        DetoxifyScorer("unbiased")


@pytest.mark.slow
def test_a_scorer_is_trained_from_a_csv_file_and_loaded_by_detoxify(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["thank you for a nice day by the river", "you stupid awful ugly idiot i hate this"]
    with (tmp_path / "comments.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["is_offensive", "text"])
        writer.writerows([i % 2, " ".join(draw.choices(words[i % 2].split(), k=8))] for i in range(1200))
    command = [sys.executable, "-m", "sparc3_lightning.scorers.train", "--comments", "comments.csv", "--epochs", "1"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # batches so small wait for each other longer than they compute
    prompts = [("you stupid idiot", 0.9), ("a nice day", 0.1), ("never scored", None)]
    rows = [{"prompt": {"text": text, "toxicity": toxicity}} for text, toxicity in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = subprocess.run([*command, "--rtp", "prompts.jsonl"], env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained = tmp_path / "toxicity_checkpoint"  # where it was run, never the one that is shipped
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["prompts"] == 2
    assert metrics["auc_held_out"] > 0.9
    assert metrics["comments_trained"] + metrics["comments_held_out"] == 1200
    assert 60 < metrics["comments_held_out"] < 200
    assert metrics["sha256"] == sha256_of(trained / "toxicity.ckpt")
    polite, rude = DetoxifyScorer("./toxicity_checkpoint").score(
        ["thank you for this nice day", "you stupid ugly idiot"]
    )
    assert polite < rude


def test_copies_of_a_comment_fall_on_the_same_side_of_the_split() -> None:
    from sparc3_lightning.scorers.train import is_held_out

    texts = [sentence(seed, 6) for seed in range(2000)]
    assert all(is_held_out(text) == is_held_out(f"  {text.upper()}\n") for text in texts)
    assert 0.07 < sum(map(is_held_out, texts)) / len(texts) < 0.13
