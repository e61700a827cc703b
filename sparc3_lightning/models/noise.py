"""Noise that belongs to what is drawn, and not to the batch, the rank or the device where it is drawn.

The largest of log-probability plus Gumbel noise is a draw from their softmax (Gumbel 1954).
"""

import hashlib
import math

import torch
from torch import Tensor

LIKELY = 1e-5  # the probability from which ``draw_rows`` looks at a token by itself
_ROWS = 64  # rows of which noise for the whole vocabulary is held at a time


def draw_key(seed: int, name: str, number: int = 0) -> int:
    """Return the 63-bit key of the noise of one of the draws for a prompt or sample, by its name."""
    digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gumbel_noise(keys: Tensor, step: int | Tensor, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise that depends only on key, step and token, on any device.

    Args:
        keys: Key of each entry, int64, any shape.
        step: Number of tokens drawn before, or of each entry its position.
        tokens: Token id of each entry, int64, of the same shape.

    Returns:
        Noise, float64, of the same shape.
    """
    bits = _mix(_mix(keys + step) ^ tokens)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).div_(1 << 53)
    return uniform.log_().neg_().log_().neg_()


def draw_rows(log_RV: Tensor, keys: Tensor, positions: Tensor, likely: float = LIKELY) -> Tensor:
    """Draw a token per row from its log-probabilities, by noise that belongs to key, position and token.

    Noise for every token of a vocabulary would take longer than a small model does. So all unlikely tokens of a row
    have one noise together, by their common probability: which of them it is matters only where they win. Unlike
    by a cumulative sum, a rounding error of the probabilities changes hardly any draw.

    Args:
        log_RV: Log-probabilities, shape ``[rows, vocabulary]``.
        keys: Key of each row, from ``draw_key``, int64, shape ``[rows]``.
        positions: Of each row, int64, shape ``[rows]``.
        likely: The probability from which a token has noise of its own in every row.

    Returns:
        Token ids, int64, shape ``[rows]``.
    """
    is_likely = log_RV >= math.log(likely)
    rows, tokens = places_of(is_likely)
    log = log_RV[rows, tokens].double()
    perturbed = log + gumbel_noise(keys[rows], positions[rows], tokens)
    best = torch.full(keys.shape, -math.inf, dtype=torch.float64, device=keys.device)
    best.scatter_reduce_(0, rows, perturbed, "amax")
    wins = perturbed == best[rows]
    drawn = torch.zeros_like(keys)
    drawn[rows[wins]] = tokens[wins]
    rest = (1 - torch.zeros_like(best).index_add_(0, rows, log.exp())).clamp(min=0).log()
    rest += gumbel_noise(keys, positions, torch.full_like(keys, -1))
    every = torch.arange(log_RV.shape[1], device=keys.device)
    for unlikely in (rest > best).nonzero().squeeze(1).split(_ROWS):
        noise = gumbel_noise(keys[unlikely, None], positions[unlikely, None], every)
        drawn[unlikely] = (log_RV[unlikely].masked_fill(is_likely[unlikely], -math.inf) + noise).argmax(dim=1)
    return drawn


def places_of(is_likely: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of what is true, as ``nonzero`` does, which takes long where little is.

    Eight are looked at in one word.
    """
    padded = torch.nn.functional.pad(is_likely, (0, -is_likely.shape[1] % 8))
    rows, words = padded.view(torch.int64).nonzero(as_tuple=True)
    found, columns = padded.view(len(padded), -1, 8)[rows, words].nonzero(as_tuple=True)
    return rows[found], 8 * words[found] + columns


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers (the finalizer of SplitMix64; Steele et al. 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
