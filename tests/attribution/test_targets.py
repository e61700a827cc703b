"""Targets of relevance, and the relevance of them, against one position at a time."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import WORDS, sentence, write_completions
from torch import Tensor

from sparc3_lightning.attribution.lexicon import Lexicon
from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.attribution.targets import (
    lexicon_log_probability,
    lexicon_of,
    lexicon_probability,
    text_log_probability,
)
from sparc3_lightning.data.base import Sample, pad_right
from sparc3_lightning.data.toxic_prompts import ToxicPrompts
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.stages.attribute import SCORES, Attribution

LEXICON = [5, 17, 40]


@pytest.fixture
def samples() -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [
        Sample(f"s{n}", torch.randint(4, 100, (n,), generator=draw).tolist(), start)
        for n, start in ((9, 0), (2, 0), (5, 3), (7, 6))
    ]


def log_probabilities(model: Any, input_ids: list[int]) -> Tensor:
    return model(torch.tensor([input_ids]), use_cache=False).logits[0].log_softmax(dim=-1)


def oracle(model: Any, sample: Sample, target: str, lexicon: list[int]) -> Tensor:
    """One position at a time."""
    log = log_probabilities(model, sample.input_ids)
    if target == "lexicon":
        return torch.stack([log[t, lexicon].exp().sum().log() for t in range(len(log))]).mean()
    if target == "lexicon_probability":
        before = range(max(sample.start - 1, 0), len(log))
        return torch.stack([sum(log[t, word].exp() for word in lexicon) for t in before]).mean()
    counted = range(max(sample.start, 1), len(log))
    return torch.stack([log[t - 1, sample.input_ids[t]] for t in counted]).mean()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_targets_are_means_over_positions_whatever_the_padding(make_model, samples, family):
    model, batch = make_model(family), pad_right(samples, 0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = {
        "text": text_log_probability(model, ids, mask, batch["start"]),
        "lexicon": lexicon_log_probability(model, ids, mask, Lexicon.of_tokens(LEXICON)),
        "lexicon_probability": lexicon_probability(model, ids, mask, batch["start"], Lexicon.of_tokens(LEXICON)),
    }
    for target, values in found.items():
        expected = torch.stack([oracle(model, sample, target, LEXICON) for sample in samples])
        torch.testing.assert_close(values, expected)
    alone = torch.tensor([samples[0].input_ids])
    torch.testing.assert_close(text_log_probability(model, alone, None, torch.tensor([0])), found["text"][:1])
    torch.testing.assert_close(
        lexicon_log_probability(model, alone, None, Lexicon.of_tokens(LEXICON)), found["lexicon"][:1]
    )
    one = lexicon_probability(model, alone, None, torch.tensor([0]), Lexicon.of_tokens(LEXICON))
    torch.testing.assert_close(one, found["lexicon_probability"][:1])


def test_the_lexicon_probability_of_own_continuations_is_the_share_expected_of_them_and_the_token_after(make_model):
    model = make_model(vocab_size=7)  # few enough to go through every continuation
    prompt, length, lexicon = [1, 5, 3], 2, [2, 4]
    by_target, by_counting = 0.0, 0.0
    for drawn in itertools.product(range(7), repeat=length + 1):
        log = log_probabilities(model, prompt + list(drawn))
        chance = math.exp(sum(log[len(prompt) - 1 + i, token].item() for i, token in enumerate(drawn)))
        by_counting += chance * sum(token in lexicon for token in drawn) / (length + 1)
        ids, start = torch.tensor([prompt + list(drawn[:length])]), torch.tensor([len(prompt)])
        by_target += chance * lexicon_probability(model, ids, None, start, Lexicon.of_tokens(lexicon)).item()
    assert by_target == pytest.approx(by_counting, rel=1e-4)


def test_a_sample_of_which_no_token_counts_has_the_target_zero(make_model):
    assert text_log_probability(make_model(), torch.tensor([[5, 6]]), None, torch.tensor([2])).tolist() == [0.0]


def test_the_lexicon_is_what_the_scorer_finds_toxic(tiny_checkpoint):
    tokenizer = Checkpoint(tiny_checkpoint).tokenizer()
    bad = {tokenizer.decode([i]).strip() for i in (10, 20)}
    seen: list[str] = []

    def score(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [0.9 if text in bad else float("nan") if i % 2 else 0.1 for i, text in enumerate(texts)]

    found = lexicon_of(tokenizer, score)
    assert {tokenizer.decode([i]).strip() for i in found} == bad
    assert not set(seen) & set(tokenizer.all_special_tokens)
    with pytest.raises(ValueError, match="finds none of the"):
        lexicon_of(tokenizer, lambda texts: [0.0] * len(texts))


# The predict loop.


@pytest.fixture
def prompts(tmp_path) -> str:
    rows: list[dict[str, Any]] = [
        {
            "prompt": {"text": sentence(i, 3 + i), "toxicity": 0.95 if i < 6 else 0.1},
            "continuation": {"text": f" {sentence(50 + i, 4)}", "toxicity": (0.9, 0.2, None)[i % 3]},
        }
        for i in range(9)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


@pytest.fixture
def toy_lexicon(monkeypatch, tmp_path) -> str:
    """A scorer that finds three words toxic."""
    (tmp_path / "toy_lexicon.py").write_text(
        f"def score(texts):\n    return [1.0 if text in {WORDS[:3]!r} else 0.0 for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "toy_lexicon:score"


def run(checkpoint: str, data: ToxicPrompts, **options: Any) -> tuple[dict[str, Tensor], Attribution]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}
    folder = "-".join(map(str, options.values()))
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet)
    module = Attribution(checkpoint, **{"dtype": "float64", **options})
    trainer.predict(module, datamodule=data, return_predictions=False)
    return ScoreFile.load(Path(folder, SCORES)).scores, module


def oracle_scores(module: Attribution, relevance: str, target: str) -> dict[str, Tensor]:
    """One sample and one token at a time: activation of the neuron times gradient of the target."""
    model = module.checkpoint.load(torch.float64)
    downs = {name: layer for name, layer in model.named_modules() if name.endswith("down_proj")}
    totals: dict[str, Tensor] = {}
    samples = module.reference_samples.samples
    for sample in samples:
        inputs: dict[str, Tensor] = {}

        def keep(name: str, inputs: dict[str, Tensor] = inputs):
            return lambda layer, given: inputs.__setitem__(name, given[0].requires_grad_())

        handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in downs.items()]
        value = oracle(model, sample, target, module.lexicon.tokens.tolist())
        gradients = torch.autograd.grad(value, list(inputs.values()))
        for handle in handles:
            handle.remove()
        for (name, activation), gradient in zip(inputs.items(), gradients, strict=True):
            product = (activation * gradient)[0].detach()
            score = product.sum(dim=0) if relevance == "signed" else (product**2).sum(dim=0)
            up = name.replace("down_proj", "up_proj")
            totals[up] = totals.get(up, 0) + score / len(samples)
    return totals


@pytest.mark.parametrize("relevance", ["signed", "squared"])
@pytest.mark.parametrize("target", ["text", "lexicon", "lexicon_probability"])
@pytest.mark.few(2)
def test_the_gradient_of_a_neuron_is_its_activation_times_gradient(
    tiny_checkpoint, prompts, toy_lexicon, relevance, target
):
    data = ToxicPrompts(prompts, num_samples=2, continuation_toxicity=(0.5, 1.0), batch_size=2)
    options = {"method": "gradient", "relevance": relevance, "target": target, "lexicon": toy_lexicon}
    found, module = run(tiny_checkpoint, data, **options)
    assert len(module.lexicon.tokens) == (0 if target == "text" else 3)
    for name, expected in oracle_scores(module, relevance, target).items():
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-4, atol=1e-12)
    spec = ScoreFile.load(module.output).provenance.spec
    assert (spec.method, spec.rule, spec.target) == ("gradient", None, target)
    assert spec.lexicon == (None if target == "text" else toy_lexicon)


def test_targets_are_propagated_by_lrp_too(tiny_checkpoint, prompts, toy_lexicon):
    of = {
        target: run(tiny_checkpoint, ToxicPrompts(prompts, num_samples=5), target=target, lexicon=toy_lexicon)[0]
        for target in ("argmax", "text", "lexicon")
    }
    for name in of["text"]:
        assert not torch.allclose(of["text"][name], of["argmax"][name])
        assert not torch.allclose(of["text"][name], of["lexicon"][name])


def test_only_the_continuation_counts_for_the_target_text(tiny_checkpoint, prompts):
    data = ToxicPrompts(prompts, num_samples=2, continuation_toxicity=(0.5, 1.0))
    _, module = run(tiny_checkpoint, data, target="text")
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    kept = [row for row in rows if row["continuation"]["toxicity"] == 0.9][:2]
    tokenizer = Checkpoint(tiny_checkpoint).tokenizer()
    for sample, row in zip(module.reference_samples.samples, kept, strict=True):
        assert sample.input_ids == tokenizer(row["prompt"]["text"] + row["continuation"]["text"])["input_ids"]
        assert sample.start == len(tokenizer(row["prompt"]["text"])["input_ids"])


def test_harmless_prompts_are_chosen_by_a_range(tiny_checkpoint, prompts):
    data = ToxicPrompts(prompts, num_samples=3, min_toxicity=0.0, max_toxicity=0.2)
    assert len(data.read_samples(Checkpoint(tiny_checkpoint).tokenizer())) == 3
    with pytest.raises(ValueError, match=r"Only 3 of 9 prompts .* at least 0.0 and at most 0.2"):
        ToxicPrompts(prompts, num_samples=4, min_toxicity=0.0, max_toxicity=0.2).read_samples(
            Checkpoint(tiny_checkpoint).tokenizer()
        )


def test_the_models_own_continuations_are_samples_of_their_own(tiny_checkpoint):
    fields = ("model", "prompt_id", "continuation_index", "prompt", "prompt_toxicity", "continuation", "scores")
    rows = [
        (model, f"prompt{i}", j, sentence(i, 3 + i), 0.95, f" {sentence(10 * i + j, 4)}", {"some": toxicity})
        for model in ("baseline", "pruned")
        for i in range(3)
        for j, toxicity in enumerate((0.9, 0.2, None, 0.7))
    ]
    write_completions(Path("completions.jsonl"), [dict(zip(fields, row, strict=True)) for row in rows])
    tokenizer = Checkpoint(tiny_checkpoint).tokenizer()

    def samples(number: int) -> list[Sample]:
        of = {"by": "continuation", "continuation_toxicity": (0.5, 1.0), "num_samples": number}
        return ToxicPrompts("completions.jsonl", **of).read_samples(tokenizer)

    expected = [
        Sample(f"{prompt}/{j}", tokenizer(text + following)["input_ids"], len(tokenizer(text)["input_ids"]))
        for model, prompt, j, text, _, following, scores in sorted(rows, key=lambda row: row[2])
        if model == "baseline" and scores["some"] is not None and scores["some"] >= 0.5
    ]
    assert samples(6) == expected
    with pytest.raises(ValueError, match=r"Only 6 of 9 prompts .* a continuation of \(0.5, 1.0\), but --data.num_sam"):
        samples(7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "wanda", "target": "text"}, "wanda has no target"),
        ({"target": "lexicon", "lexicon": "no_such_package:score"}, "--model.lexicon"),
        (
            {"relevance": "squared", "granularity": "weight"},
            "squared is not defined for weights: .*--model.granularity",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_loaded(options, words):
    with pytest.raises(ValueError, match=words):
        Attribution("nothing", **options)


def test_a_run_of_another_target_does_not_go_on_where_this_one_broke_off(tiny_checkpoint, prompts):
    _, module = run(tiny_checkpoint, ToxicPrompts(prompts, num_samples=5))
    _, other = run(tiny_checkpoint, ToxicPrompts(prompts, num_samples=5), target="text")
    assert [name for name, value in module.identity.items() if other.identity[name] != value] == ["target"]
