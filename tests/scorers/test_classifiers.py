"""Scorers of other families: text-classification checkpoints made on the spot, and functions of packages."""

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WORDS, sentence

from sparc3_lightning.scorers.base import split_label
from sparc3_lightning.scorers.classifiers import ClassifierScorer, is_toxic_label, toxic_label
from sparc3_lightning.scorers.functions import FunctionScorer

TEXTS = [sentence(seed, 1 + seed * 5 % 17) for seed in range(12)]
TWO = ("neutral", "toxic")


@pytest.fixture(scope="session")
def make_classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory of folders with a tiny random BERT or RoBERTa that classifies texts into labels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    @cache
    def make(
        labels: tuple[str, ...] = TWO, family: str = "bert", tokenizer_length: int = 10**30, **changes: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("classifier") / "tiny"
        sizes: dict[str, Any] = {
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pad_token_id": 1 if family == "roberta" else 0,
            "max_position_embeddings": 22 if family == "roberta" else 20,
            "type_vocab_size": 2,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            **changes,
        }
        torch.manual_seed(0)
        if family == "bert":
            model: Any = BertForSequenceClassification(BertConfig(**sizes))
        else:
            model = RobertaForSequenceClassification(RobertaConfig(**sizes))
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        special = ["<pad>", "<s>", "</s>", "<unk>"] if family == "bert" else ["<s>", "<pad>", "</s>", "<unk>"]
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=tokenizer_length
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def two(make_classifier: Callable[..., Path]) -> Path:
    """A classifier with the labels neutral and toxic."""
    return make_classifier()


def one_by_one(folder: Path, label: int, texts: list[str], length: int = 20, sigmoid: bool = False) -> list[float]:
    """Score each text alone: no batch, no padding, no order."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        scores.append((1 / (1 + (-logits).exp()) if sigmoid else logits.exp() / logits.exp().sum())[label].item())
    return scores


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.few(3)
def test_scores_are_the_probabilities_of_the_toxic_label_of_each_text_alone(
    make_classifier: Callable[..., Path], family: str, batch_size: int
) -> None:
    folder = make_classifier(family=family)
    expected = one_by_one(folder, 1, TEXTS)
    scorer = ClassifierScorer(str(folder), batch_size=batch_size)
    assert scorer.score(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert scorer.score(TEXTS[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert max(expected) - min(expected) > 0.05
    assert scorer.name == str(folder)
    assert scorer.score([]) == []


@pytest.mark.parametrize("label", ["toxic", "LABEL_1"])  # of s-nlp/roberta_toxicity_classifier and granite-guardian-hap
def test_the_label_of_a_roberta_is_chosen_by_its_name(make_classifier: Callable[..., Path], label: str) -> None:
    folder = make_classifier(("neutral" if label == "toxic" else "LABEL_0", label), "roberta", type_vocab_size=1)
    assert ClassifierScorer(f"{folder}#{label}").score(TEXTS) == pytest.approx(one_by_one(folder, 1, TEXTS), abs=1e-5)


def test_a_label_is_chosen_by_its_name(two: Path) -> None:
    toxic, neutral = (ClassifierScorer(f"{two}#{label}").score(TEXTS) for label in ("toxic", "neutral"))
    assert ClassifierScorer(str(two)).score(TEXTS) == toxic
    assert [a + b for a, b in zip(toxic, neutral, strict=True)] == pytest.approx([1.0] * len(TEXTS))
    assert toxic != neutral


def test_the_place_of_the_label_does_not_matter(make_classifier: Callable[..., Path]) -> None:
    folder = make_classifier(("toxic", "neutral", "other"))
    assert ClassifierScorer(str(folder)).score(TEXTS) == pytest.approx(one_by_one(folder, 0, TEXTS), abs=1e-5)


def test_each_label_of_a_multi_label_checkpoint_has_a_probability_of_its_own(
    make_classifier: Callable[..., Path],
) -> None:
    folder = make_classifier(("obscene", "toxic", "threat"), problem_type="multi_label_classification")
    assert ClassifierScorer(str(folder)).score(TEXTS) == pytest.approx(
        one_by_one(folder, 1, TEXTS, sigmoid=True), abs=1e-5
    )
    threats = ClassifierScorer(f"{folder}#threat").score(TEXTS)
    assert threats == pytest.approx(one_by_one(folder, 2, TEXTS, sigmoid=True), abs=1e-5)


def test_a_single_logit_is_a_probability_whatever_its_label_is_called(make_classifier: Callable[..., Path]) -> None:
    folder = make_classifier(("LABEL_0",))
    scores = ClassifierScorer(str(folder)).score(TEXTS)
    assert scores == pytest.approx(one_by_one(folder, 0, TEXTS, sigmoid=True), abs=1e-5)
    assert max(scores) < 1, "a softmax over one logit would be 1"
    assert ClassifierScorer(f"{folder}#LABEL_0").score(TEXTS) == scores


@pytest.mark.parametrize(
    ("labels", "suffix"),
    [
        (("LABEL_0", "LABEL_1"), ""),
        (("toxic", "severe toxic"), ""),
        (("neutral", "non-toxic"), ""),
        (TWO, "#Toxic"),
        (TWO, "#rude"),
        (("LABEL_0",), "#toxic"),
    ],
)
def test_a_label_that_is_missing_or_not_the_only_one_is_an_error_that_lists_the_labels(
    make_classifier: Callable[..., Path], labels: tuple[str, ...], suffix: str
) -> None:
    folder = make_classifier(labels)
    with pytest.raises(ValueError, match="name the one that means toxic, as in") as raised:
        ClassifierScorer(f"{folder}{suffix}")
    assert f"has the labels {', '.join(labels)}:" in str(raised.value)
    assert f"{folder}#{labels[0]}" in str(raised.value)


@pytest.mark.parametrize(("label", "expected"), [
    ("toxic", True), ("Toxic", True), ("TOXICITY", True), ("severe_toxic", True), ("is toxic", True),
    ("non-toxic", False), ("not_toxic", False), ("no toxicity", False), ("nontoxic", False), ("neutral", False),
    ("intoxicated", False), ("LABEL_1", False), ("", False),
])  # fmt: skip
def test_a_label_is_called_toxic_or_not(label: str, expected: bool) -> None:
    assert is_toxic_label(label) is expected


def test_of_two_labels_the_one_that_is_called_toxic_is_taken() -> None:
    assert toxic_label({0: "non-toxic", 1: "toxic"}, None, "x") == 1
    assert toxic_label({0: "toxicity", 1: "not toxic"}, None, "x") == 0
    assert toxic_label({0: "toxic", 1: "severe_toxic"}, "severe_toxic", "x#severe_toxic") == 1


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_long_text_is_cut_to_the_context_of_the_model_and_scored(
    make_classifier: Callable[..., Path], family: str
) -> None:
    folder = make_classifier(family=family)
    long, longer = sentence(1, 300), f"{sentence(1, 300)} {sentence(2, 300)}"
    scores = ClassifierScorer(str(folder)).score([long, longer, TEXTS[0]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6), "what is cut off does not count"
    assert scores[2] == pytest.approx(one_by_one(folder, 1, TEXTS[:1])[0], abs=1e-5)
    # At most two tokens are given away: RoBERTa's positions begin behind that of padding.
    whole = [one_by_one(folder, 1, [long], length)[0] for length in (18, 19, 20)]
    assert min(abs(scores[0] - score) for score in whole) < 1e-5


def test_a_tokenizer_that_knows_a_shorter_length_is_heard(make_classifier: Callable[..., Path]) -> None:
    folder = make_classifier(tokenizer_length=5)
    text = sentence(1, 15)
    assert ClassifierScorer(str(folder)).score([text]) == pytest.approx(one_by_one(folder, 1, [text], 5), abs=1e-5)


def test_a_padding_token_at_the_end_of_the_vocabulary_leaves_the_context_as_it_is(
    make_classifier: Callable[..., Path],
) -> None:
    """As that of ModernBERT, whose number is larger than the number of positions."""
    from transformers import AutoTokenizer

    last = len(WORDS) + 3
    folder = make_classifier(pad_token_id=last)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = WORDS[-1]
    tokenizer.save_pretrained(folder)
    scores = ClassifierScorer(str(folder)).score([sentence(1, 15), sentence(2, 300)])
    assert scores[0] == pytest.approx(one_by_one(folder, 1, [sentence(1, 15)])[0], abs=1e-5)
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "😀" * 10, "δοκιμή"])
def test_an_empty_or_odd_text_beside_others_gets_a_number(text: str, two: Path) -> None:
    odd, plain = ClassifierScorer(str(two)).score([text, TEXTS[0]])
    assert 0 <= odd <= 1
    assert plain == pytest.approx(one_by_one(two, 1, TEXTS[:1])[0], abs=1e-5)


def test_a_text_that_the_model_gives_no_number_for_is_nan_and_the_others_are_scored(two: Path) -> None:
    scorer = ClassifierScorer(str(two))
    whole = scorer.score(TEXTS[:4])
    model = scorer._model.classifier

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor([0]), math.nan)

    scorer.batch_size = 1
    calls = iter(range(4))
    model.register_forward_hook(lambda *of: spoil(*of) if next(calls) == 1 else None)
    scores = scorer.score(TEXTS[:4])
    spoiled = [i for i, score in enumerate(scores) if math.isnan(score)]
    assert len(spoiled) == 1
    assert [s for i, s in enumerate(scores) if i not in spoiled] == pytest.approx(
        [s for i, s in enumerate(whole) if i not in spoiled], abs=1e-5
    )


def test_weights_of_half_precision_are_read_as_float32_and_need_no_gradient(two: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = Path(shutil.copytree(two, tmp_path / "half"))
    AutoModelForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    model = ClassifierScorer(str(folder))._model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


class Trap:
    """Pickled, it makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_a_checkpoint_of_pickles_is_refused_and_not_loaded(name: str, two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": torch.zeros(2), "more": Trap()}, folder / name)
    with pytest.raises(OSError, match="pickled"):
        ClassifierScorer(str(folder))
    assert not Path("sprung").exists()
    torch.load(folder / name, weights_only=False)
    assert Path("sprung").exists(), "the trap does not work, so the test shows nothing"


def test_beside_safetensors_a_pickle_is_not_looked_at(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "both"))
    torch.save(Trap(), folder / "pytorch_model.bin")
    assert ClassifierScorer(str(folder)).score(TEXTS) == ClassifierScorer(str(two)).score(TEXTS)
    assert not Path("sprung").exists()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("label", ["", "#LABEL_1"])
def test_a_causal_language_model_is_no_scorer(label: str, tiny_checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"do not hold the text-classification model .* 1 missing \(score.weight\)"):
        ClassifierScorer(f"{tiny_checkpoint}{label or '#LABEL_0'}")


LOST: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (
        lambda weights: [weights.pop(f"classifier.{part}") for part in ("weight", "bias")],
        r"2 missing \(classifier.bias",
    ),
    (lambda weights: weights.update({"classifier.weight": torch.ones(3, 16)}), r"1 of another shape \(classifier.we"),
    (lambda weights: weights.update({"bert.encoder.layer.2.output.dense.bias": torch.ones(16)}), "1 unexpected"),
    (lambda weights: weights.update({"classifier.weight": torch.ones(2, 16, dtype=torch.int8)}), "1 quantized tensors"),
]


@pytest.mark.parametrize(("change", "expected"), LOST)
def test_a_classifier_with_other_tensors_than_its_config_says_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object], expected: str, two: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "changed"))
    rewrite(folder, change)
    with pytest.raises(ValueError, match=expected):
        ClassifierScorer(str(folder))


def test_a_pooler_that_a_roberta_was_trained_with_may_be_left_over(
    make_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(make_classifier(family="roberta"), tmp_path / "trained"))
    pooler = {"roberta.pooler.dense.weight": torch.ones(16, 16), "roberta.pooler.dense.bias": torch.ones(16)}
    rewrite(folder, lambda weights: weights.update(pooler, **{"roberta.embeddings.position_ids": torch.arange(22)}))
    assert ClassifierScorer(str(folder)).score(TEXTS) == ClassifierScorer(str(make_classifier(family="roberta"))).score(
        TEXTS
    )


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        (
            "config.json",
            {"auto_map": {"AutoModelForSequenceClassification": "evil.Evil"}},
            "needs Python code",
        ),
        (
            "config.json",
            {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
            "needs Python code",
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "needs Python code"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, r"is quantized \(bitsandbytes\)"),
        ("config.json", {"hidden_size": "sixteen"}, "cannot be read: correct it"),
        ("config.json", {"num_hidden_layers": 10**6}, "says 1,000,000 layers"),
        ("config.json", {"attn_implementation": "flash_attention_2"}, "asks for the attention 'flash_attention_2'"),
        ("config.json", {"vocab_size": 20}, "but the model has embeddings for 20 tokens"),
        ("adapter_config.json", {}, "holds an adapter"),
    ],
)
def test_a_classifier_that_would_not_be_loaded_as_it_is_is_refused_and_asks_nothing(
    file: str, changes: dict[str, Any], expected: str, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked whether code may run"))
    folder = Path(shutil.copytree(two, tmp_path / "hostile"))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('sprung').touch()\nclass Evil: pass\n")
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=expected) as raised:
        ClassifierScorer(str(folder))
    assert "\n" not in str(raised.value)
    assert not Path("sprung").exists()


def test_a_checkpoint_that_cannot_be_had_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(OSError, match=r"'some/classifier' is not on this machine .* run 'sparc3 prepare'"):
        ClassifierScorer("some/classifier#toxic")


def test_the_files_of_a_checkpoint_are_fetched_without_the_label(two: Path) -> None:
    names = {path.name for path in ClassifierScorer.fetch(f"{two}#toxic")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b#c", ("a/b", "c")), ("a/b", ("a/b", None)), ("a#", ("a", None)), ("a#b#c", ("a", "b#c"))],
)
def test_the_label_stands_behind_the_first_number_sign(name: str, expected: tuple[str, str | None]) -> None:
    assert split_label(name) == expected


# Functions.

TOYS = """
import math
import numpy as np

def half(texts):
    assert type(texts) is list
    return [0.5] * len(texts)

def ends(texts):
    return np.array([0.0, 1.0, math.nan, 0.25, math.inf, -math.inf], dtype=np.float32)[: len(texts)]

def short(texts):
    return [0.5]

def above(texts):
    return [0.5, 1.5]

def below(texts):
    return [-0.1, 0.5]

def never(texts):
    raise AssertionError("there is nothing to score")

not_a_function = 3
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with functions that score, or fail to."""
    (tmp_path / "toy_package").mkdir()
    (tmp_path / "toy_package" / "__init__.py").write_text("raise_if_imported = 1\n")
    (tmp_path / "toy_package" / "inner.py").write_text(TOYS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("toys")
def test_a_function_scores_a_list_of_texts_and_what_is_no_number_is_nan() -> None:
    scorer = FunctionScorer("toy_package.inner:half")
    assert scorer.name == "toy_package.inner:half"
    assert scorer.score(("a", "b", "a")) == [0.5, 0.5, 0.5]
    scores = FunctionScorer("toy_package.inner:ends", "cpu").score(list("abcdef"))
    assert [scores[i] for i in (0, 1, 3)] == [0.0, 1.0, 0.25]
    assert all(math.isnan(scores[i]) for i in (2, 4, 5))
    assert all(type(score) is float for score in scores)


@pytest.mark.usefixtures("toys")
def test_a_function_is_not_called_for_no_texts() -> None:
    assert FunctionScorer("toy_package.inner:never").score([]) == []


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "toy_package.inner:short returned 1 values for 2 texts"),
        ("above", r"toy_package.inner:above must return numbers in \[0, 1\], but returned 1.5"),
        ("below", r"toy_package.inner:below must return numbers in \[0, 1\], but returned -0.1"),
    ],
)
def test_a_function_that_returns_something_else_is_a_clear_error(function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionScorer(f"toy_package.inner:{function}").score(["a", "b"])


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    "name", ["toy_package.inner:missing", "toy_package.outer:half", "toy_package.inner:not_a_function"]
)
def test_a_function_that_is_not_there_is_a_clear_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'"):
        FunctionScorer(name)


@pytest.mark.usefixtures("toys")
def test_the_check_finds_a_missing_package_and_imports_none(tmp_path: Path) -> None:
    (tmp_path / "toy_package" / "__init__.py").write_text("raise AssertionError('it was imported')\n")
    FunctionScorer.check("toy_package.inner:half", "scorer")
    with pytest.raises(
        ValueError, match=r"--model.scorer: 'absent_package.inner:half' needs the package 'absent_package'"
    ):
        FunctionScorer.check("absent_package.inner:half", "scorer")


@pytest.mark.parametrize(("name", "expected"), [
    ("profanity_check:predict_prob", True), ("a.b.c:d", True), ("a:b", True),
    ("small", False), ("a.b", False), ("a/b:c", False), (":b", False), ("a:", False), ("a:b:c", False),
    ("a..b:c", False), ("a:b#c", False), ("C:/folder", False), ("a-b:c", False), ("pypi:x==1/y", False), ("", False),
])  # fmt: skip
def test_a_name_is_that_of_a_function_or_not(name: str, expected: bool) -> None:
    assert FunctionScorer.takes(name) is expected


def test_the_scorer_of_profanity_check_tells_insults_from_harmless_sentences() -> None:
    pytest.importorskip("profanity_check")
    scorer = FunctionScorer("profanity_check:predict_prob")
    harmless = scorer.score(["Thank you for the kind letter.", "We walked along the river."])
    insults = scorer.score(["You are a stupid idiot.", "Shut up, you fucking piece of shit."])
    assert 0 <= max(harmless) < 0.3 < 0.7 < min(insults) <= 1
