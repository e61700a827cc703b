"""Is it an effect or luck: paired differences with their intervals and tests, from one value per prompt (or window).

Prompts are the unit: continuations of one prompt are alike, so they are averaged first and prompts are resampled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_RESAMPLES = 10_000
LEVEL = 0.95
MIN_CHANGED = 6  # fewer prompts that all move one way cannot bring a two-sided sign test below 5 %: 2 / 2^5 = 6 %
ROUNDING = 1e-6  # what a scorer gives the same text in another batch differs by some 1e-7: that is no change
_CHUNK = 500  # resamples held at a time: memory grows with the number of prompts alone


@dataclass(frozen=True)
class Interval:
    """A measure and its interval at the level 95 %."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies in the interval; so it does if the interval is not a number."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Difference:
    """What changed from before to after, over the same prompts.

    ``percent`` is the difference in percent of the mean before. The p-values are two-sided.
    """

    WRITTEN_TOO = ("evidence",)
    before: float
    after: float
    difference: Interval
    percent: Interval
    num_better: int
    num_worse: int
    num_equal: int
    sign_test_p: float
    permutation_test_p: float

    @property
    def evidence(self) -> bool:
        """Whether there is evidence of a change: 0 lies outside the interval, and enough prompts changed to say so."""
        return not self.difference.holds_zero and self.num_better + self.num_worse >= MIN_CHANGED


def paired_difference(before: Tensor, after: Tensor, seed: int = 0) -> Difference:
    """Compare the values of the same prompts before and after.

    Args:
        before: One value per prompt, shape ``[prompts]``, in any unit; lower is better.
        after: The same prompts in the same order.
        seed: Of the resampling.

    Raises:
        ValueError: If there is no prompt, the shapes differ, or a value is not finite.
    """
    before, after = before.double(), after.double()
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise ValueError(f"Expected as many values before as after, got {list(before.shape)} and {list(after.shape)}.")
    change = after - before
    if not torch.isfinite(change).all():
        raise ValueError("A value before or after is not finite.")
    change = torch.where(change.abs() < ROUNDING, 0.0, change)
    means = bootstrap(torch.stack([before, before + change], dim=1), seed)
    differences = means[:, 1] - means[:, 0]
    mean_before, mean_after = before.mean().item(), after.mean().item()
    return Difference(
        before=mean_before,
        after=mean_after,
        difference=interval(change.mean().item(), differences),
        percent=interval(_percent(mean_before, mean_after), 100 * differences / means[:, 0]),
        num_better=int((change < 0).sum()),
        num_worse=int((change > 0).sum()),
        num_equal=int((change == 0).sum()),
        sign_test_p=sign_test(int((change < 0).sum()), int((change > 0).sum())),
        permutation_test_p=permutation_test(change, seed),
    )


def bootstrap(values: Tensor, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Tensor:
    """Return the means of resamples of the rows, drawn with replacement (Efron 1979).

    Args:
        values: One row per prompt, shape ``[prompts, columns]``; the columns of a row stay together.
        seed: Of the resampling.
        num_resamples: How many.

    Returns:
        Shape ``[num_resamples, columns]``, float64.
    """
    counts = _Resampling(len(values), seed)
    return torch.cat([counts(n) @ values.double() for n in _chunks(num_resamples)]) / len(values)


def bootstrap_ratio(numerator: Tensor, denominator: Tensor, seed: int = 0) -> Tensor:
    """Return sum(numerator) / sum(denominator) over resamples of the rows, such as nats per token over windows.

    Args:
        numerator: Shape ``[rows, columns]``.
        denominator: Shape ``[rows]``.
        seed: Of the resampling.

    Returns:
        Shape ``[resamples, columns]``, float64.
    """
    means = bootstrap(torch.cat([numerator, denominator.unsqueeze(1)], dim=1), seed)
    return means[:, :-1] / means[:, -1:]


def bootstrap_of_draws(values: Tensor, seed: int = 0) -> Tensor:
    """Return the means of resamples of prompts and, independently, of draws, since both could have been others.

    Args:
        values: Shape ``[draws, prompts]``.
        seed: Of the resampling.

    Returns:
        Shape ``[resamples]``, float64.
    """
    draws, prompts = values.shape
    counts_d, counts_p = _Resampling(draws, seed + 1), _Resampling(prompts, seed)
    means = [((counts_d(n) @ values.double()) * counts_p(n)).sum(dim=1) for n in _chunks(NUM_RESAMPLES)]
    return torch.cat(means) / (draws * prompts)


class _Resampling:
    """How often each of ``number`` rows is drawn in a resample, shape ``[resamples, number]``."""

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, num_resamples: int) -> Tensor:
        drawn = torch.randint(self.number, (num_resamples, self.number), generator=self.generator)
        counts = torch.zeros(num_resamples, self.number, dtype=torch.float64)
        return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def _chunks(number: int) -> list[int]:
    return [min(_CHUNK, number - start) for start in range(0, number, _CHUNK)]


def interval(value: float, resampled: Tensor) -> Interval:
    """Return a measure with the percentiles 2.5 and 97.5 of its resamples; a resample of 0 / 0 is left out."""
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = resampled.double().nanquantile(edges, interpolation="nearest").tolist()
    return Interval(value, low, high)


def sign_test(num_better: int, num_worse: int) -> float:
    """Return the two-sided p-value of as uneven a split if better and worse were equally likely; ties are left out.

    Example:
        >>> round(sign_test(51, 42), 2)  # a reproduction of SparC3 with 93 prompts and one continuation each
        0.41
    """
    number, most = num_better + num_worse, max(num_better, num_worse)
    tail = sum(math.comb(number, k) for k in range(most, number + 1))
    return min(1.0, 2 * tail / 2**number)


def permutation_test(change: Tensor, seed: int = 0, num_permutations: int = NUM_RESAMPLES) -> float:
    """Return the two-sided p-value of as large a mean change if before and after were exchanged at random.

    Args:
        change: After less before, shape ``[prompts]``.
        seed: Of the exchanges.
        num_permutations: Random ones, beside the one that was seen.
    """
    generator = torch.Generator().manual_seed(seed)
    change = change.double()
    observed = (change.sum().abs() - 1e-12 * change.abs().sum()).item()  # sums in another order differ by rounding
    extreme = 1
    for number in _chunks(num_permutations):
        signs = torch.randint(2, (number, len(change)), generator=generator).double() * 2 - 1
        extreme += int(((signs @ change).abs() >= observed).sum())
    return extreme / (num_permutations + 1)


def variance_factor(before: Tensor, after: Tensor) -> float:
    """Return by how much common random numbers cut the sampling variance of the difference.

    Continuation j before and continuation j after of a prompt meet the same noise; any two others are independent. So
    the variance that independent draws would give is read off the same table: var(before) + var(after), against
    var(after - before), each within prompts.

    Args:
        before: Shape ``[prompts, continuations]``; NaN where one was not scored.
        after: The same draws of the other model.

    Returns:
        The ratio; NaN if no prompt has two pairs, infinite if the draws of the two models are all alike.
    """
    valid = ~torch.isnan(before + after)
    enough = valid.sum(dim=1) >= 2
    if not enough.any():
        return math.nan

    def within(values: Tensor) -> float:
        values, mask = values[enough].double(), valid[enough]
        number = mask.sum(dim=1)
        mean = torch.where(mask, values, 0.0).sum(dim=1) / number
        squares = torch.where(mask, (values - mean.unsqueeze(1)).square(), 0.0).sum(dim=1)
        return (squares / (number - 1)).mean().item()

    paired = within(after - before)
    return (within(before) + within(after)) / paired if paired else math.inf


def _percent(before: float, after: float) -> float:
    return 100 * (after - before) / before if before else math.nan


def perplexity_interval(windows: Mapping[str, Tensor]) -> Interval:
    """Return the perplexity of one model with its interval over windows; a single window has none, NaN."""
    value = windows["perplexity"].item()
    if windows["tokens"].numel() < 2:
        return Interval(value, math.nan, math.nan)
    return interval(value, bootstrap_ratio(windows["nll"].unsqueeze(1), windows["tokens"])[:, 0].exp())


def perplexity_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Interval:
    """Return by how much perplexity changed, in percent, with its interval over the same windows, as above."""
    value = 100 * ((after["perplexity"] / before["perplexity"]).item() - 1)
    if before["tokens"].numel() < 2:
        return Interval(value, math.nan, math.nan)
    resampled = bootstrap_ratio((after["nll"] - before["nll"]).unsqueeze(1), before["tokens"])[:, 0]
    return interval(value, 100 * (resampled.exp() - 1))
