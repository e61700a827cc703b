"""Batched sampling whose random draws belong to the prompt, not to the batch.

Continuation j of a prompt meets the same noise under every model, batch size, order and device, so that two models are
compared on the same draws. Adding Gumbel noise to the filtered logits and taking the largest is sampling from their
softmax (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030).
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


class Sampling(NamedTuple):
    """How continuations are drawn: new tokens at most, temperature, and the probability mass of nucleus sampling."""

    max_new_tokens: int
    temperature: float
    top_p: float

    def check(self) -> None:
        """Raise ValueError unless the values make sense."""
        if self.max_new_tokens < 1:
            raise ValueError(f"--model.max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise ValueError(f"--model.temperature must be above 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--model.top_p must be above 0 and at most 1, got {self.top_p}.")


def draw_key(seed: int, prompt_id: str, continuation: int) -> int:
    """Return the 63-bit key of the noise of one continuation."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{continuation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gumbel_noise(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise that depends only on key, step and token, on any device.

    Args:
        keys: Key of each entry, int64, any shape.
        step: Number of tokens drawn before.
        tokens: Token id of each entry, int64, of the same shape.

    Returns:
        Noise, float64, of the same shape.
    """
    bits = _mix(_mix(keys + step) ^ tokens)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).div_(1 << 53)
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers (the finalizer of SplitMix64; Steele et al. 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


class KeyedSampling(LogitsProcessor):
    """Temperature, nucleus and keyed noise, for a generate() that takes the largest logit.

    Args:
        keys: Key of each row, int64, shape ``[rows]``.
        prompt_len: Length of the padded prompts.
        sampling: How to draw.
    """

    def __init__(self, keys: Tensor, prompt_len: int, sampling: Sampling) -> None:
        self.keys = keys
        self.prompt_len = prompt_len
        self.temperature = TemperatureLogitsWarper(float(sampling.temperature))
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.failed = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits whose arg max is the draw."""
        bad = ~torch.isfinite(scores).all(dim=1)
        self.failed |= bad
        scores = self.temperature(input_ids, scores.float().masked_fill(bad.unsqueeze(1), 0.0))
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        rows, tokens = torch.isfinite(scores).nonzero(as_tuple=True)
        noise = gumbel_noise(self.keys[rows], input_ids.shape[1] - self.prompt_len, tokens)
        return scores.index_put((rows, tokens), noise.to(scores.dtype), accumulate=True)


class Continuation(NamedTuple):
    """The token ids drawn, without padding and end of sequence, and whether the model gave no finite logits."""

    input_ids: list[int]
    failed: bool


def continue_prompts(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    keys: Sequence[int],
    sampling: Sampling,
    pad_token_id: int,
    all_ranks_step_together: bool = False,
) -> list[Continuation]:
    """Continue a batch of prompts.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the left, shape ``[rows, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape.
        keys: Key of each row, from ``draw_key``.
        sampling: How to draw.
        pad_token_id: Token that fills a row once it has ended.
        all_ranks_step_together: Go on until the rows of every rank have ended, as a sharded model needs.

    Returns:
        One continuation per row.
    """
    draw = KeyedSampling(torch.tensor(keys, device=input_ids.device), input_ids.shape[1], sampling)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    # generate() fills what a config leaves open from the model's own, which may bring a repetition penalty or beams.
    shipped, model.generation_config = model.generation_config, config
    try:
        rows = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([draw]),
            synced_gpus=all_ranks_step_together,
        )
    finally:
        model.generation_config = shipped
    continuations = []
    for row, failed in zip(rows[:, input_ids.shape[1] :].tolist(), draw.failed.tolist(), strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        continuations.append(Continuation(row[:stop], failed))
    return continuations
