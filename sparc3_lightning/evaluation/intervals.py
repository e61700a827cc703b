"""Is it an effect or luck: paired differences with their intervals and tests, from one value per prompt (or window).

Prompts are the unit: continuations of one prompt are alike, so they are averaged first and prompts are resampled. What
the intervals and tests promise is shown by simulation, in tests/evaluation/test_coverage.py.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparc3_lightning.evaluation.student import t_quantile

NUM_RESAMPLES = 10_000
LEVEL = 0.95
MIN_CHANGED = 6  # fewer prompts that all move one way cannot bring a two-sided test below 5 %: 2 / 2^5 = 6 %
FEW = 50  # an interval over fewer prompts or windows may hold the truth more rarely than it says
ROUNDING = 1e-6  # what a scorer gives the same text in another batch differs by some 1e-7: that is no change
_CHUNK = 500  # resamples held at a time: memory grows with the number of prompts alone
_HALVINGS = 24  # of the angle in which the end of an interval lies
_KEPT = 1024  # prompts up to which what was drawn is kept, since each model is compared over the same prompts


@dataclass(frozen=True)
class Interval:
    """A measure and its interval; the ends are NaN where it cannot be said how far the interval reaches."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether both ends can be said."""
        return math.isfinite(self.low) and math.isfinite(self.high)

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
    def num_prompts(self) -> int:
        """How many prompts were compared."""
        return self.num_better + self.num_worse + self.num_equal

    @property
    def evidence(self) -> bool:
        """Whether there is evidence of a change: 0 lies outside the interval, and the permutation test says so too.

        The test alone holds its level however few prompts changed; the interval alone does where changes are skewed.
        """
        return self.is_evidence_among(1)

    def is_evidence_among(self, number: int) -> bool:
        """Return whether there is evidence of a change where this is one of a number of models that are compared.

        Under no effect it is found of any of them in at most 5 % (Bonferroni).
        """
        return not self.difference.holds_zero and self.permutation_test_p < (1 - LEVEL) / number


def paired_difference(before: Tensor, after: Tensor, seed: int = 0, most: float = math.inf) -> Difference:
    """Compare the values of the same prompts before and after.

    Args:
        before: One value per prompt, shape ``[prompts]``, in any unit; lower is better.
        after: The same prompts in the same order.
        seed: Of the resampling.
        most: Largest change there can be, 1 of scores and shares; the interval of the difference ends there.

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
    resampled = Resampled(change, before, seed)
    difference = resampled.mean()
    num_better, num_worse = int((change < 0).sum()), int((change > 0).sum())
    return Difference(
        before=before.mean().item(),
        after=after.mean().item(),
        difference=replace(difference, low=max(difference.low, -most), high=min(difference.high, most))
        if difference.is_known
        else difference,
        # Where not even the change can be said, its share of what was there cannot be.
        percent=_percent(before, after, resampled.ratio() if difference.is_known else unknown(math.nan)),
        num_better=num_better,
        num_worse=num_worse,
        num_equal=len(change) - num_better - num_worse,
        sign_test_p=sign_test(num_better, num_worse),
        permutation_test_p=permutation_test(change, seed),
    )


def level_of_each(number: int) -> float:
    """Return the level of each of a number of intervals that hold together as often as ``LEVEL`` says (Bonferroni)."""
    return 1 - (1 - LEVEL) / number


def percent_change(before: Tensor, after: Tensor, level: float) -> Interval:
    """Return the change in percent as ``paired_difference`` does, with an interval of another level."""
    before, after = before.double(), after.double()
    change = after - before
    resampled = Resampled(torch.where(change.abs() < ROUNDING, 0.0, change), before)
    return _percent(before, after, resampled.ratio(level) if resampled.mean(level).is_known else unknown(math.nan))


def _percent(before: Tensor, after: Tensor, ratio: Interval) -> Interval:
    """Return the change of a mean in percent, by the interval of its share of the mean before."""
    mean_before, mean_after = before.mean().item(), after.mean().item()
    return in_percent(
        100 * (mean_after - mean_before) / mean_before if mean_before else math.nan,
        ratio,
        least=min(before.min().item(), after.min().item()),
    )


class Resampled:
    """Rows of two values, and resamples of them: what is known of the first one's mean, and of the ratio of the means.

    An interval lies a third of the way from Student's t to a bootstrap-t, whose resampled means are taken in units of
    their own standard errors. The latter alone is too narrow where tails are heavy, and the former where values are
    skewed; there both hold the truth as often as the level says, from 50 rows on. The interval of the ratio holds every
    r for which the mean of first - r * second could be 0; so it holds 0 where that of the first one's mean does.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5; of a ratio Fieller 1954; the
    third by simulation, see tests/evaluation/test_coverage.py.

    Args:
        first: One value a row, shape ``[rows]``.
        second: As many.
        seed: Of the resampling.
    """

    def __init__(self, first: Tensor, second: Tensor, seed: int = 0) -> None:
        columns = first.double(), second.double()
        rows = torch.stack(columns, dim=1)
        self.number, self.means = len(rows), torch.stack([column.mean() for column in columns])
        self.units = rows.square().mean(dim=0).sqrt()
        rows = (rows - self.means) / torch.where(self.units > 0, self.units, 1.0)
        products = torch.stack([rows[:, 0].square(), -2 * rows.prod(dim=1), rows[:, 1].square()], dim=1)
        self.variances = products.mean(dim=0)
        resamples = bootstrap(torch.cat([rows, products], dim=1), seed).T.contiguous()
        self.deviations_2R, self.squares_3R = resamples[:2], resamples[2:]

    def mean(self, level: float = LEVEL) -> Interval:
        """Return the mean of the first values, with its interval of a level."""
        value = self.means[0].item()
        if not self.units[0]:
            return Interval(0.0, 0.0, 0.0)
        if self._are_too_few(0.0):
            return unknown(value)
        _, (of_resamples,), student = self._studentized(torch.zeros(1, dtype=torch.float64), level)
        low, high = (of_resamples.kthvalue(k).values for k in (_rank(level), NUM_RESAMPLES + 1 - _rank(level)))
        error = self.units[0] * (self.variances[0] / (self.number - 1)).sqrt()
        return known(value, *(value - (error * t).item() for t in ((high + student) / 3, (low - student) / 3)))

    def ratio(self, level: float = LEVEL) -> Interval:
        """Return the mean of the first values over that of the second ones, with its interval of a level.

        The ends are NaN where the mean of the second ones could be 0, and so is the ratio where it is.
        """
        if not self.means[1]:
            return unknown(math.nan)
        value = (self.means[0] / self.means[1]).item()
        if not self.units[0]:
            return Interval(0.0, 0.0, 0.0)
        # A ratio is the tangent of an angle; at a right angle to either side it is infinite.
        unit = (self.units[0] / self.units[1]).item()
        inside = torch.full((2,), math.atan(value / unit), dtype=torch.float64)
        outside = torch.tensor([-math.pi / 2, math.pi / 2], dtype=torch.float64)
        if self._are_too_few(inside[0].item()) or not self._are_outside(outside, level).all():
            return unknown(value)
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            are_outside = self._are_outside(middle, level)
            inside, outside = torch.where(are_outside, inside, middle), torch.where(are_outside, middle, outside)
        return known(value, *(unit * inside.tan()).tolist())

    def _are_too_few(self, angle: float) -> bool:
        """Return whether nothing is known of the scatter: of one row, or of a few that are all alike."""
        variance, least = self._variance(torch.tensor([angle], dtype=torch.float64))
        return self.number < (MIN_CHANGED if variance <= least else 2)

    def _are_outside(self, angles: Tensor, level: float) -> Tensor:
        """Return whether a lower and an upper ratio, as angles, are so low and so high that they lie outside."""
        t, of_resamples, student = self._studentized(angles, level)
        side = torch.tensor([1.0, -1.0], dtype=torch.float64) * (1 if self.means[1] > 0 else -1)
        # Counting the resamples that lie on one side of t takes less time than finding the one of a rank.
        beyond = (side.unsqueeze(1) * of_resamples + student) / 3 < (side * t).unsqueeze(1)
        return beyond.sum(dim=1) > NUM_RESAMPLES - _rank(level)

    def _studentized(self, angles: Tensor, level: float) -> tuple[Tensor, Tensor, float]:
        """Return for some angles, shape ``[angles]``, what the mean of first - r * second is in standard errors.

        Returns:
            The mean itself; of each resample how far it is from that, shape ``[angles, resamples]``; and twice how far
            Student's t lets it be from 0. A resample of rows that are all alike has no scatter: it is infinitely far.
        """
        directions = torch.stack([angles.cos(), -angles.sin()], dim=1)
        variance, least = self._variance(angles)
        spread = _squares(angles) @ self.squares_3R
        moved = directions @ self.deviations_2R
        spread = spread - moved.square()
        means = directions @ torch.where(self.units > 0, self.means / self.units, 0.0)
        t = _over(means, variance, least) * math.sqrt(self.number - 1)
        of_resamples = _over(moved, spread, least.unsqueeze(1)) * math.sqrt(self.number - 1)
        return t, of_resamples, 2 * t_quantile((1 + level) / 2, self.number - 1)

    def _variance(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the variance of first - r * second, and what of it would be rounding."""
        sizes = torch.stack([angles.cos(), angles.sin()], dim=1).abs() @ self.variances[[0, 2]].sqrt()
        return _squares(angles) @ self.variances, 1e-12 * sizes.square() + 1e-24


def _rank(level: float) -> int:
    """Return which resample, counted from either end, the end of an interval of a level lies at."""
    return max(1, round((1 - level) / 2 * NUM_RESAMPLES))


def _squares(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos().square(), angles.cos() * angles.sin(), angles.sin().square()], dim=1)


def _over(values: Tensor, variances: Tensor, least: Tensor) -> Tensor:
    """Return values in units of their deviation: infinite where there is none, and 0 where there is no value either."""
    values = torch.where(values.square() > least, values, 0.0)
    return (values / torch.where(variances > least, variances, 0.0).sqrt()).nan_to_num(0.0, math.inf, -math.inf)


def bootstrap(values: Tensor, seed: int = 0) -> Tensor:
    """Return the means of resamples of the rows, drawn with replacement (Efron 1979).

    Args:
        values: One row per prompt, shape ``[prompts, columns]``; the columns of a row stay together.
        seed: Of the resampling.

    Returns:
        Shape ``[resamples, columns]``, float64.
    """
    resamples = _kept_resamples if len(values) <= _KEPT else _resamples
    return torch.cat([counts @ values.double() for counts in resamples(len(values), seed, NUM_RESAMPLES)]) / len(values)


def _resamples(number: int, seed: int, num_resamples: int) -> Iterator[Tensor]:
    """Yield how often each of ``number`` rows is drawn in each resample, shape ``[_CHUNK, number]``."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_resamples // _CHUNK):
        drawn = torch.randint(number, (_CHUNK, number), generator=generator)
        counts = torch.zeros(_CHUNK, number, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


@functools.lru_cache(maxsize=2)  # of two groups of prompts
def _kept_resamples(number: int, seed: int, num_resamples: int) -> tuple[Tensor, ...]:
    return tuple(_resamples(number, seed, num_resamples))


def in_percent(value: float, ratio: Interval, least: float) -> Interval:
    """Return a change in percent of what was before, with its interval.

    Args:
        value: The change.
        ratio: The interval of the change as a share.
        least: Least value before and after: what is never below 0 cannot fall by more than 100 %.
    """
    if not ratio.is_known:
        return unknown(value)
    low = -1.0 if ratio.low < -1 and least >= 0 else ratio.low
    return Interval(value, 100 * low, 100 * ratio.high)


def unknown(value: float) -> Interval:
    """Return a measure of which no interval can be said."""
    return Interval(value, math.nan, math.nan)


def known(value: float, low: float, high: float) -> Interval:
    """Return an interval, unless one of its ends is infinite: then nothing can be said of it."""
    found = Interval(value, low, high)
    return found if found.is_known else unknown(value)


def sign_test(num_better: int, num_worse: int) -> float:
    """Return the two-sided p-value of as uneven a split if better and worse were equally likely; ties are left out.

    Example:
        >>> round(sign_test(51, 42), 2)  # a reproduction of SparC3 with 93 prompts and one continuation each
        0.41
    """
    number, most = num_better + num_worse, max(num_better, num_worse)
    tail = sum(math.comb(number, k) for k in range(most, number + 1))
    return min(1.0, 2 * tail / 2**number)


def permutation_test(change: Tensor, seed: int = 0) -> float:
    """Return the two-sided p-value of as large a mean change if before and after were exchanged at random.

    All exchanges are gone through where they are fewer than ``NUM_RESAMPLES``; else as many random ones are made, and
    the one that was seen counts as one more.

    Args:
        change: After less before, shape ``[prompts]``.
        seed: Of the exchanges.
    """
    change = change[change != 0].double()
    number = len(change)
    # Sums in another order differ by rounding, and are equal nonetheless.
    observed = (change.sum().abs() - 1e-6 * change.abs().sum()).item()
    if 2**number <= NUM_RESAMPLES:
        every = torch.arange(2**number).unsqueeze(1) >> torch.arange(number) & 1
        return ((every.double() * 2 - 1) @ change).abs().ge(observed).double().mean().item()
    # Of a number that is rounded up, since in each model another number of prompts changed.
    rounded = -(-number // 128) * 128
    kept = number <= _KEPT
    signs = _kept_signs(rounded, seed, NUM_RESAMPLES) if kept else _signs(number, seed, NUM_RESAMPLES)
    extreme = sum(int(((some[:, :number] @ change.float()).abs() >= observed).sum()) for some in signs)
    return (1 + extreme) / (1 + NUM_RESAMPLES)


def _signs(number: int, seed: int, num_exchanges: int) -> Iterator[Tensor]:
    """Yield 1 or -1 at random for each of ``number`` changes in each exchange, shape ``[_CHUNK, number]``, float32."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_exchanges // _CHUNK):
        yield torch.empty(_CHUNK, number, dtype=torch.bool).random_(generator=generator).float() * 2 - 1


@functools.lru_cache(maxsize=2)
def _kept_signs(number: int, seed: int, num_exchanges: int) -> tuple[Tensor, ...]:
    return tuple(_signs(number, seed, num_exchanges))


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


def perplexity_interval(windows: Mapping[str, Tensor]) -> Interval:
    """Return the perplexity of one model with its interval over windows; a single window has none, NaN."""
    log = _log_of_perplexity(windows["nll"], windows["tokens"])
    return known(windows["perplexity"].item(), *log)


def perplexity_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor], level: float = LEVEL) -> Interval:
    """Return by how much perplexity changed, in percent, with its interval over the same windows, as above."""
    value = 100 * ((after["perplexity"] / before["perplexity"]).item() - 1)
    log = _log_of_perplexity(after["nll"] - before["nll"], before["tokens"], level)
    return known(value, *(100 * (end - 1) for end in log))


def _log_of_perplexity(nll: Tensor, tokens: Tensor, level: float = LEVEL) -> list[float]:
    """Return the exponentials of the ends of an interval of nats per token."""
    if tokens.numel() < 2 or not torch.isfinite(nll).all():
        return [math.nan, math.nan]
    log = Resampled(nll, tokens).ratio(level)
    return torch.tensor([log.low, log.high], dtype=torch.float64).exp().tolist()
