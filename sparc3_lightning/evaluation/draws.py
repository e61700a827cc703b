"""Intervals of a control: what is known from a few draws of it, each measured over the same prompts."""

import math

import torch
from torch import Tensor

from sparc3_lightning.evaluation.intervals import LEVEL, Interval, known, unknown
from sparc3_lightning.evaluation.student import t_quantile


def interval_of_draws(values: Tensor, base: Tensor | None = None, *, one_more: bool = False) -> Interval:
    """Return the mean over prompts and draws with its interval, since both could have been others.

    The variance of the draws is known with one degree of freedom less than there are draws, hence Student's t; the part
    of the prompts comes on top, less what the draws' scatter holds of it. Of a ratio it is Fieller's interval.

    Source: Graybill and Wang 1980, JASA 75:869 (of sums of variances); Fieller 1954.

    Args:
        values: Shape ``[draws, prompts]``.
        base: What the mean is divided by the mean of, shape ``[prompts]``; None for no ratio.
        one_more: Whether it is to hold the mean of one more draw, in place of the mean of all that could be drawn. Of
            a difference to the draws it then leaves 0 out in at most 5 % where what differs is one more of them.

    Returns:
        The ends are NaN where they cannot be said: of one prompt, of one more draw after a single one, or if the mean
        of ``base`` could be 0.
    """
    values = values.double()
    num_draws, num_prompts = values.shape
    base = torch.ones(num_prompts, dtype=torch.float64) if base is None else base.double()
    of_draws, of_prompts = values.mean(dim=1), values.mean(dim=0)
    mean, mean_base = values.mean().item(), base.mean().item()
    value = mean / mean_base if mean_base else math.nan
    if not values.any() and mean_base:
        return Interval(0.0, 0.0, 0.0)
    if num_prompts < 2 or (num_draws < 2 and one_more):
        return unknown(value)
    centred, centred_base = of_prompts - mean, base - mean_base
    squares, product, squares_base = (
        (one @ other).item() / (num_prompts - 1)
        for one, other in ((centred, centred), (centred, centred_base), (centred_base, centred_base))
    )
    scatter = 0.0
    if num_draws > 1:
        share = 1 / num_draws + one_more
        rest = (values - of_draws.unsqueeze(1) - centred).square().sum().item()
        # What prompts and draws do together is in the scatter of the draws' means: it counts once.
        together = share * rest / ((num_draws - 1) * (num_prompts - 1))
        squares -= min(together, squares - (product**2 / squares_base if squares_base else 0.0))
        scatter = share * of_draws.var().item() * t_quantile((1 + LEVEL) / 2, num_draws - 1) ** 2
    factor = t_quantile((1 + LEVEL) / 2, num_prompts - 1) ** 2 / num_prompts
    # All r with (mean - r mean_base)^2 <= scatter + factor * variance of (of_prompts - r base)
    a = mean_base**2 - factor * squares_base
    b = mean * mean_base - factor * product
    c = mean**2 - factor * squares - scatter
    if a <= 0:
        return unknown(value)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return known(value, (b - root) / a, (b + root) / a)
