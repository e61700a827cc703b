"""Keyed sampling: the noise, the distribution it draws from, and that a draw belongs to its prompt alone."""

import itertools
import math

import pytest
import torch

from sparc3_lightning.generation import Continuation, KeyedSampling, Sampling, continue_prompts, draw_key, gumbel_noise

PROMPTS = [[1, 10, 20, 30], [1, 40], [1, 7, 50, 60, 70, 80, 90], [1, 33, 44]]


def keys(number: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([draw_key(seed, f"prompt {i}", 0) for i in range(number)])


def nucleus_probabilities(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Softmax after temperature, of the fewest likeliest tokens that hold the mass top_p: slow and obvious."""
    weights = [math.exp(logit / temperature) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, mass = [], 0.0
    for token in sorted(range(len(logits)), key=lambda i: -probabilities[i]):
        kept.append(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    return [probabilities[i] / mass if i in kept else 0.0 for i in range(len(logits))]


def continue_rows(model, prompts, sampling, seed=0, ids=None, continuation=0):
    """Continue prompts given as token lists, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    names = ids or [str(prompt) for prompt in prompts]
    return continue_prompts(model, input_ids, mask, [draw_key(seed, n, continuation) for n in names], sampling, 0)


def test_noise_depends_on_key_step_and_token_only():
    some_keys, tokens = keys(5), torch.arange(5) * 7
    together = gumbel_noise(some_keys, 3, tokens)
    alone = torch.stack([gumbel_noise(some_keys[i : i + 1], 3, tokens[i : i + 1])[0] for i in range(5)])
    assert torch.equal(together, alone)
    torch.manual_seed(99)
    assert torch.equal(gumbel_noise(some_keys.flip(0), 3, tokens.flip(0)).flip(0), together)
    assert not torch.isclose(gumbel_noise(some_keys, 4, tokens), together).any()
    assert not torch.isclose(gumbel_noise(some_keys, 3, tokens + 1), together).any()
    assert not torch.isclose(gumbel_noise(some_keys + 1, 3, tokens), together).any()


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(keys(400).unsqueeze(1).expand(-1, 500), 0, torch.arange(500).expand(400, -1)).flatten()
    assert noise.dtype == torch.float64
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert (noise <= x).double().mean().item() == pytest.approx(math.exp(-math.exp(-x)), abs=0.005)


def test_noise_of_neighbouring_keys_steps_and_tokens_is_uncorrelated():
    number = 100_000
    consecutive = torch.arange(number) + draw_key(0, "prompt", 0) // 2
    zeros = torch.zeros(number, dtype=torch.long)
    tokens = torch.arange(number)
    one_key = consecutive[:1].expand(number)
    pairs = {
        "neighbouring keys": (gumbel_noise(consecutive, 0, zeros), gumbel_noise(consecutive + 2, 0, zeros)),
        "neighbouring tokens": (gumbel_noise(one_key, 0, tokens), gumbel_noise(one_key, 0, tokens + 1)),
        "neighbouring steps": (gumbel_noise(one_key, 0, tokens), gumbel_noise(one_key, 1, tokens)),
        "small keys": (gumbel_noise(tokens, 0, zeros), gumbel_noise(tokens, 0, zeros + 1)),
    }
    for name, pair in pairs.items():
        assert torch.corrcoef(torch.stack(pair))[0, 1].abs().item() < 5 / math.sqrt(number), name


def test_keys_of_different_seeds_prompts_and_continuations_differ():
    every = [draw_key(s, p, j) for s, p, j in itertools.product(range(3), ("a", "b", "1"), range(12))]
    assert len(set(every)) == len(every)
    assert all(0 <= key < 2**63 for key in every)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.6), (0.5, 1.0)])
def test_frequencies_of_draws_equal_the_probabilities_after_temperature_and_nucleus(temperature, top_p):
    logits = [2.0, 1.5, 0.3, 0.0, -0.7, -1.0, 1.1]
    number = 20_000
    draw = KeyedSampling(keys(number), 4, Sampling(1, temperature, top_p))
    rows = draw(torch.ones(number, 4, dtype=torch.long), torch.tensor(logits).expand(number, -1))
    counts = rows.argmax(dim=1).bincount(minlength=len(logits)).tolist()
    expected = [number * p for p in nucleus_probabilities(logits, temperature, top_p)]
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    statistic = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True) if e)
    assert statistic < 22.5, "chi-square of 6 degrees of freedom is above 22.5 once in a thousand times"
    assert not draw.failed.any()


def test_draws_at_two_steps_are_independent():
    number = 20_000
    logits = torch.tensor([0.5, 0.0, -0.5]).expand(number, -1)
    draw = KeyedSampling(keys(number), 4, Sampling(2, 1.0, 1.0))
    first, second = (draw(torch.ones(number, n, dtype=torch.long), logits).argmax(dim=1) for n in (4, 5))
    one = nucleus_probabilities([0.5, 0.0, -0.5], 1.0, 1.0)
    for a, b in itertools.product(range(3), repeat=2):
        share = ((first == a) & (second == b)).double().mean().item()
        assert share == pytest.approx(one[a] * one[b], abs=0.015)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_continuations_depend_neither_on_batch_size_nor_on_the_order_of_the_prompts(make_model, family, dtype):
    model = make_model(family, dtype)
    sampling = Sampling(12, 1.0, 0.9)
    together = continue_rows(model, PROMPTS, sampling)
    assert [continue_rows(model, [prompt], sampling)[0] for prompt in PROMPTS] == together
    assert continue_rows(model, PROMPTS[::-1], sampling)[::-1] == together
    assert continue_rows(model, PROMPTS[:2], sampling) + continue_rows(model, PROMPTS[2:], sampling) == together


def test_continuations_do_not_depend_on_how_many_are_drawn(make_model):
    model = make_model()
    sampling = Sampling(8, 1.0, 1.0)
    one = [continue_rows(model, PROMPTS, sampling, continuation=j) for j in range(3)]
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    row_keys = [draw_key(0, str(p), j) for p in PROMPTS for j in range(3)]
    all_at_once = continue_prompts(model, input_ids, mask, row_keys, sampling, 0)
    assert all_at_once == [one[j][i] for i in range(len(PROMPTS)) for j in range(3)]
    assert one[0] != one[1]


def test_the_same_seed_draws_the_same_and_another_seed_draws_something_else(make_model):
    model = make_model()
    sampling = Sampling(8, 1.0, 0.9)
    torch.manual_seed(1)
    first = continue_rows(model, PROMPTS, sampling)
    torch.manual_seed(2)
    assert continue_rows(model, PROMPTS, sampling) == first
    assert continue_rows(model, PROMPTS, sampling, seed=1) != first


def test_generation_equals_the_obvious_loop_over_tokens(make_model):
    model = make_model()
    sampling = Sampling(10, 0.8, 1.0)
    for prompt in PROMPTS:
        key = torch.tensor([draw_key(0, str(prompt), 0)])
        tokens = list(prompt)
        for step in range(10):
            logits = model(torch.tensor([tokens])).logits[0, -1].float() / 0.8
            noise = gumbel_noise(key.expand(len(logits)), step, torch.arange(len(logits)))
            token = int((logits + noise).argmax())
            if token == 2:
                break
            tokens.append(token)
        assert continue_rows(model, [prompt], sampling) == [Continuation(tokens[len(prompt) :], False)]


def test_a_very_low_temperature_is_greedy(make_model):
    model = make_model()
    (drawn,) = continue_rows(model, [[1, 10, 20]], Sampling(6, 1e-4, 1.0))
    tokens = [1, 10, 20]
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert drawn.input_ids == tokens[3 : 3 + len(drawn.input_ids)]


def test_a_row_with_nan_logits_is_marked_failed_and_the_others_are_untouched(make_model):
    model = make_model()
    sampling = Sampling(6, 1.0, 0.9)
    clean = continue_rows(model, PROMPTS, sampling)
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: out.index_fill(0, torch.tensor([2]), math.nan))
    spoiled = continue_rows(model, PROMPTS, sampling)
    handle.remove()
    assert [row.failed for row in spoiled] == [False, False, True, False]
    assert [spoiled[i] for i in (0, 1, 3)] == [clean[i] for i in (0, 1, 3)]
    assert not any(row.failed for row in clean)


def test_a_row_with_one_infinite_logit_is_marked_failed():
    scores = torch.zeros(3, 5)
    scores[1, 2] = math.inf
    draw = KeyedSampling(keys(3), 1, Sampling(1, 1.0, 0.9))
    assert torch.isfinite(draw(torch.ones(3, 1, dtype=torch.long), scores).max(dim=1).values).all()
    assert draw.failed.tolist() == [False, True, False]


def test_a_continuation_ends_before_the_end_of_sequence_token(make_model):
    model = make_model()
    free = Sampling(30, 1.5, 1.0)
    rows = continue_rows(model, PROMPTS * 10, free, ids=[f"prompt {i}" for i in range(40)])
    assert any(len(row.input_ids) < 30 for row in rows)
    assert all(2 not in row.input_ids for row in rows)
    model.lm_head.weight.data.zero_()
    model.generation_config.eos_token_id = list(range(2, model.config.vocab_size))
    assert max(len(row.input_ids) for row in continue_rows(model, PROMPTS, free)) < 10
    model.generation_config.eos_token_id = None
    assert [len(row.input_ids) for row in continue_rows(model, PROMPTS, free)] == [30] * len(PROMPTS)


def test_a_model_without_an_end_of_sequence_token_runs_to_the_limit(make_model):
    model = make_model()
    model.generation_config.eos_token_id = None
    rows = continue_rows(model, PROMPTS, Sampling(7, 2.0, 1.0))
    assert [len(row.input_ids) for row in rows] == [7] * len(PROMPTS)


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(4, 40))},
        {"min_new_tokens": 8},
        {"do_sample": True, "temperature": 0.1, "top_k": 1},
        {"num_beams": 2},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_a_checkpoint_ships_as_its_generation_config_does_not_change_the_draws(make_model, option):
    model = make_model()
    sampling = Sampling(8, 1.0, 0.9)
    plain = continue_rows(model, PROMPTS, sampling)
    for name, value in option.items():
        setattr(model.generation_config, name, value)
    shipped = model.generation_config
    assert continue_rows(model, PROMPTS, sampling) == plain
    assert model.generation_config is shipped


@pytest.mark.parametrize(
    ("sampling", "option"),
    [
        (Sampling(0, 1.0, 0.9), "--model.max_new_tokens"),
        (Sampling(-1, 1.0, 0.9), "--model.max_new_tokens"),
        (Sampling(5, 0.0, 0.9), "--model.temperature"),
        (Sampling(5, -1.0, 0.9), "--model.temperature"),
        (Sampling(5, math.nan, 0.9), "--model.temperature"),
        (Sampling(5, 1.0, 0.0), "--model.top_p"),
        (Sampling(5, 1.0, 1.01), "--model.top_p"),
        (Sampling(5, 1.0, math.nan), "--model.top_p"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_the_name_of_their_option(sampling, option):
    with pytest.raises(ValueError, match=option):
        sampling.check()


def test_values_at_the_edge_of_sense_are_taken():
    Sampling(1, 1e-3, 1.0).check()
    Sampling(1, 10.0, 1e-3).check()
