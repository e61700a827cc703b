"""Keyed sampling: the noise, the distribution it draws from, and that a draw belongs to its prompt alone."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from sparc3_lightning.evaluation.generation import (
    PROTOCOLS,
    Continuation,
    Sampling,
    continue_prompts,
    draw_tokens,
    stream_prompt,
)
from sparc3_lightning.models.noise import draw_key, gumbel_noise

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


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts given as token lists, padded on the left, and their mask."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return input_ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def continue_each(model, prompts, sampling, continuations=(0,), seed=0, ids=None, **options):
    """Continue each prompt by the continuations of these numbers."""
    names = ids or [str(prompt) for prompt in prompts]
    row_keys = [[draw_key(seed, name, j) for j in continuations] for name in names]
    return continue_prompts(model, *padded(prompts), row_keys, sampling, **options)


def continue_rows(model, prompts, sampling, **options):
    """Continue each prompt once."""
    return [found[0] for found in continue_each(model, prompts, sampling, **options)]


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature and nucleus as transformers' own generate applies them, in float64."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.double())
    return TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores


def oracle(logits: torch.Tensor, row_keys: torch.Tensor, step: int, sampling: Sampling) -> torch.Tensor:
    """Draw as ``draw_tokens``, from the whole vocabulary."""
    tokens = torch.arange(logits.shape[1]).expand_as(logits)
    noise = gumbel_noise(row_keys.unsqueeze(1).expand_as(tokens), step, tokens)
    return (warped(logits, sampling) + noise).argmax(dim=1)


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
    drawn = draw_tokens(torch.tensor(logits).expand(number, -1), keys(number), 0, Sampling(1, temperature, top_p))
    counts = drawn.bincount(minlength=len(logits)).tolist()
    expected = [number * p for p in nucleus_probabilities(logits, temperature, top_p)]
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    statistic = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True) if e)
    assert statistic < 22.5, "chi-square of 6 degrees of freedom is above 22.5 once in a thousand times"


def test_draws_at_two_steps_are_independent():
    number = 20_000
    logits = torch.tensor([0.5, 0.0, -0.5]).expand(number, -1)
    first, second = (draw_tokens(logits, keys(number), step, Sampling(2, 1.0, 1.0)) for step in (0, 1))
    one = nucleus_probabilities([0.5, 0.0, -0.5], 1.0, 1.0)
    for a, b in itertools.product(range(3), repeat=2):
        share = ((first == a) & (second == b)).double().mean().item()
        assert share == pytest.approx(one[a] * one[b], abs=0.015)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "opt"])
@pytest.mark.few(2)
def test_continuations_depend_neither_on_batch_size_nor_on_the_order_of_the_prompts(make_model, family, dtype):
    model = make_model(family, dtype)
    sampling = Sampling(12, 1.0, 0.9)
    together = continue_rows(model, PROMPTS, sampling)
    assert [continue_rows(model, [prompt], sampling)[0] for prompt in PROMPTS] == together
    assert continue_rows(model, PROMPTS[::-1], sampling)[::-1] == together
    assert continue_rows(model, PROMPTS[:2], sampling) + continue_rows(model, PROMPTS[2:], sampling) == together


def test_continuations_do_not_depend_on_how_many_are_drawn(make_model):
    for family in ("llama", "gemma3_text"):
        model = make_model(family)
        sampling = Sampling(8, 1.0, 1.0)
        one = [continue_rows(model, PROMPTS, sampling, continuations=[j]) for j in range(3)]
        together = continue_each(model, PROMPTS, sampling, range(3))
        assert together == [[one[j][i] for j in range(3)] for i in range(len(PROMPTS))]
        assert continue_each(model, PROMPTS, sampling, range(2)) == [found[:2] for found in together]
        assert continue_each(model, PROMPTS, sampling, [2, 0]) == [[found[2], found[0]] for found in together]
        assert len({str(found[j]) for found in together for j in range(3)}) == 12


def test_a_prompt_passes_through_the_model_once_however_many_continuations_are_drawn(make_model):
    model = make_model()
    model.generation_config.eos_token_id = None
    shapes = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape))
    )
    continue_each(model, PROMPTS, Sampling(4, 1.0, 0.9), range(5))
    handle.remove()
    assert shapes == [(4, 7), (20, 1), (20, 1), (20, 1)]


@pytest.mark.parametrize(("rows", "prompts"), [(1, 1), (3, 1), (5, 1), (6, 2), (11, 3), (12, 4), (512, 4)])
def test_however_many_continuations_grow_together_they_are_the_same(make_model, monkeypatch, rows, prompts):
    model = make_model()
    model.generation_config.eos_token_id = list(range(2, model.config.vocab_size))  # nearly every token ends
    expected = [
        found for prompt in PROMPTS for found in continue_each(model, [prompt], Sampling(3, 1.0, 0.9), range(3))
    ]
    monkeypatch.setattr("sparc3_lightning.evaluation.generation.ROWS", rows)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    found = continue_each(model, PROMPTS, Sampling(3, 1.0, 0.9), range(3), all_ranks_step_together=True)
    handle.remove()
    assert found == expected
    parts = [min(prompts, 4 - start) for start in range(0, 4, prompts)]
    assert sizes == [size for part in parts for size in (part, 3 * part, 3 * part)]


def test_positions_count_the_tokens_of_the_prompt_and_not_its_padding(make_model):
    model = make_model()
    model.generation_config.eos_token_id = None
    found = []
    handle = model.register_forward_pre_hook(
        lambda _m, _i, options: found.append(options["position_ids"].tolist()), with_kwargs=True
    )
    continue_each(model, PROMPTS[:2], Sampling(3, 1.0, 0.9), range(2))
    handle.remove()
    assert found == [[[0, 1, 2, 3], [0, 0, 0, 1]], [[4], [4], [2], [2]], [[5], [5], [3], [3]]]


def test_ranks_that_step_together_make_all_steps_and_draw_the_same(make_model):
    model = make_model()
    model.generation_config.eos_token_id = list(range(2, model.config.vocab_size))  # nearly every token ends
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    alone = continue_each(model, PROMPTS, Sampling(9, 1.0, 1.0), range(2))
    num_alone = len(calls)
    together = continue_each(model, PROMPTS, Sampling(9, 1.0, 1.0), range(2), all_ranks_step_together=True)
    handle.remove()
    assert num_alone < 9
    assert len(calls) - num_alone == 9
    assert together == alone


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.float64, 0.7), (torch.float32, 1.5)])
@pytest.mark.few(1)
def test_draws_from_a_large_vocabulary_equal_those_of_the_warpers_of_transformers(dtype, temperature):
    # By row in turn, the nucleus ends among the 1,024 likeliest of 20,000 tokens, among the 8,192, and beyond.
    spread = temperature * torch.tensor([4.0, 2.0, 0.3] * 8).unsqueeze(1)
    logits = (spread * torch.randn(24, 20_000, generator=torch.Generator().manual_seed(5))).to(dtype)
    sampling = Sampling(1, temperature, 0.9)
    sizes = torch.isfinite(warped(logits, sampling)).sum(dim=1)
    assert sizes[0::3].max() < 1024
    assert 1024 < sizes[1::3].min() <= sizes[1::3].max() < 8192
    assert sizes[2::3].min() > 8192
    drawn = torch.stack([draw_tokens(logits, keys(24), step, sampling) for step in range(4)])
    expected = torch.stack([oracle(logits, keys(24), step, sampling) for step in range(4)])
    assert torch.equal(drawn, expected)
    # Many of them come from far down, where a shorter list would have ended.
    places = (logits.unsqueeze(0) > logits.gather(1, drawn.T).T.unsqueeze(-1)).sum(dim=2)
    assert places[:, 1::3].max() > 1024
    assert places[:, 2::3].max() > 8192


@pytest.mark.parametrize("vocabulary", [1, 2, 50, 1023, 1024, 1025, 8191, 8192, 8193])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_draws_equal_those_of_the_warpers_at_every_size_of_the_vocabulary(vocabulary, top_p):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.tensor([0.1, 1.0, 5.0, 0.01]).unsqueeze(1) * torch.randn(4, vocabulary, generator=generator)
    sampling = Sampling(1, 0.8, top_p)
    assert torch.equal(draw_tokens(logits, keys(4), 2, sampling), oracle(logits, keys(4), 2, sampling))


@pytest.mark.parametrize("vocabulary", [10, 20_000])
def test_of_equally_likely_tokens_the_lower_ids_are_in_the_nucleus(vocabulary):
    # In bfloat16 many logits are equal; here those of 10 tokens, of which each has a tenth of the probability.
    logits = torch.full((200, vocabulary), -30.0, dtype=torch.bfloat16)
    likely = torch.arange(0, vocabulary, vocabulary // 10)[:10]
    logits[:, likely] = 5.0
    drawn = draw_tokens(logits, keys(200), 0, Sampling(1, 1.0, 0.45))
    assert set(drawn.tolist()) == set(likely[:5].tolist())


def test_the_rows_of_a_draw_do_not_depend_on_each_other():
    spread = torch.tensor([0.3, 4.0, 2.0, 0.3, 2.0, 4.0]).unsqueeze(1)
    logits = spread * torch.randn(6, 10_000, generator=torch.Generator().manual_seed(6))
    sampling = Sampling(1, 1.0, 0.9)
    together = draw_tokens(logits, keys(6), 0, sampling)
    alone = [draw_tokens(logits[i : i + 1], keys(6)[i : i + 1], 0, sampling).item() for i in range(6)]
    assert together.tolist() == alone
    assert torch.equal(draw_tokens(logits.flip(0), keys(6).flip(0), 0, sampling).flip(0), together)


def test_a_row_draws_the_same_among_few_and_among_many():
    logits = 3 * torch.randn(200, 1_001, generator=torch.Generator().manual_seed(8))
    drawn = draw_tokens(logits, keys(200), 2, PROTOCOLS["rtp"])
    assert torch.equal(drawn, oracle(logits, keys(200), 2, PROTOCOLS["rtp"]))
    assert torch.equal(drawn[150:153], draw_tokens(logits[150:153], keys(200)[150:153], 2, PROTOCOLS["rtp"]))


def test_draws_are_those_of_the_wide_logits_whatever_is_added_to_all_of_them():
    logits = 2 * torch.randn(50, 300, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    sampling = Sampling(1, 0.7, 0.9)
    assert torch.equal(draw_tokens(logits + 64, keys(50), 0, sampling), draw_tokens(logits, keys(50), 0, sampling))


def test_the_same_seed_draws_the_same_and_another_seed_draws_something_else(make_model):
    model = make_model()
    sampling = Sampling(8, 1.0, 0.9)
    torch.manual_seed(1)
    first = continue_rows(model, PROMPTS, sampling)
    torch.manual_seed(2)
    assert continue_rows(model, PROMPTS, sampling) == first
    assert continue_rows(model, PROMPTS, sampling, seed=1) != first


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_equals_the_obvious_loop_over_tokens(make_model, family):
    model = make_model(family)
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


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_temperature_0_and_a_very_low_one_are_greedy(make_model, temperature):
    model = make_model()
    (drawn,) = continue_rows(model, [[1, 10, 20]], Sampling(6, temperature, 1.0))
    tokens = [1, 10, 20]
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert drawn.input_ids == tokens[3 : 3 + len(drawn.input_ids)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_logit_that_is_not_finite_is_marked_failed_and_the_others_are_untouched(make_model, value):
    model = make_model()
    sampling = Sampling(6, 1.0, 0.9)
    clean = continue_each(model, PROMPTS, sampling, range(2))
    for spoil_all in (True, False):

        def spoil(_module, _inputs, logits, spoil_all=spoil_all):
            rows = [2] if len(logits) == len(PROMPTS) else [4, 5]  # both continuations of the third prompt
            logits = logits.clone()
            logits[rows, :, slice(None) if spoil_all else 17] = value
            return logits

        handle = model.lm_head.register_forward_hook(spoil)
        spoiled = continue_each(model, PROMPTS, sampling, range(2))
        handle.remove()
        assert [[row.failed for row in rows] for rows in spoiled] == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
        assert [spoiled[i] for i in (0, 1, 3)] == [clean[i] for i in (0, 1, 3)]
    assert not any(row.failed for rows in clean for row in rows)


def test_a_row_fails_even_if_only_a_later_token_had_no_finite_logits_but_not_after_its_end(make_model):
    model = make_model()
    model.generation_config.eos_token_id = list(range(2, 70))
    steps = []

    def spoil(_module, _inputs, logits):
        steps.append(len(logits))
        return logits if len(steps) == 1 else torch.full_like(logits, math.nan)

    handle = model.lm_head.register_forward_hook(spoil)
    rows = [row for found in continue_each(model, PROMPTS, Sampling(3, 1.5, 1.0), range(8)) for row in found]
    handle.remove()
    at_once = [row for row in rows if not row.input_ids]
    assert 0 < len(at_once) < len(rows)
    assert not any(row.failed for row in at_once), "they had ended before"
    assert all(row.failed for row in rows if row.input_ids)


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
        (Sampling(0, 1.0, 0.9), "--model.sampling.max_new_tokens"),
        (Sampling(-1, 1.0, 0.9), "--model.sampling.max_new_tokens"),
        (Sampling(5, -0.1, 0.9), "--model.sampling.temperature"),
        (Sampling(5, -1.0, 0.9), "--model.sampling.temperature"),
        (Sampling(5, math.nan, 0.9), "--model.sampling.temperature"),
        (Sampling(5, 1.0, 0.0), "--model.sampling.top_p"),
        (Sampling(5, 1.0, 1.01), "--model.sampling.top_p"),
        (Sampling(5, 1.0, math.nan), "--model.sampling.top_p"),
        (Sampling(5, 1.0, 0.9, 0), "--model.sampling.num_continuations must be at least 1, got 0"),
        (Sampling(5, 1.0, 0.9, 6, 4), "--model.sampling.num_seeds must divide 6 continuations, got 4"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_the_name_of_their_option(sampling, option):
    with pytest.raises(ValueError, match=option):
        sampling.check()


def test_values_at_the_edge_of_sense_are_taken():
    Sampling(1, 1e-3, 1.0).check()
    Sampling(1, 10.0, 1e-3).check()


def test_protocols_are_those_that_were_published():
    assert PROTOCOLS["short"] == Sampling(50, 0.7, 0.9, 1)
    assert PROTOCOLS["rtp"] == Sampling(20, 1.0, 0.9, 25)
    for sampling in PROTOCOLS.values():
        sampling.check()


def test_greedy_decoding_gives_one_continuation_and_more_are_refused():
    sampling = PROTOCOLS["greedy"]
    assert (sampling.num_continuations, sampling.temperature) == (1, 0.0)
    sampling.check()
    message = r"--model.sampling.num_continuations must be 1 at --model.sampling.temperature 0, got 4"
    with pytest.raises(ValueError, match=message):
        replace(sampling, num_continuations=4).check()


def test_a_streamed_continuation_grows_by_a_token_to_the_one_of_a_batch(make_model):
    model, sampling = make_model(), Sampling(8, 0.7, 0.9)
    whole = continue_rows(model, PROMPTS, sampling)
    for prompt, continuation in zip(PROMPTS, whole, strict=True):
        grown = [found.input_ids for found in stream_prompt(model, prompt, draw_key(0, str(prompt), 0), sampling)]
        assert grown[-1] == continuation.input_ids
        assert all(ids == continuation.input_ids[: i + 1] for i, ids in enumerate(grown))
