"""Quantiles of Student's t, without a package of statistics."""

import functools
import math

import torch


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t.

    Example:
        >>> [round(t_quantile(0.975, degrees), 3) for degrees in (1, 4, 100)]
        [12.706, 2.776, 1.984]
    """
    # t = sqrt(degrees) tan(angle), where the density of the angle is a power of its cosine.
    widest = min(math.pi / 2, 40 / math.sqrt(degrees))
    angles = torch.linspace(-widest, widest, 20_001, dtype=torch.float64)
    density = angles.cos().clamp(min=0) ** (degrees - 1)
    below = torch.cumulative_trapezoid(density, angles)
    sought = probability * below[-1]
    place = int(torch.searchsorted(below, sought))  # the quantile lies between the angles of this number and the next
    step = (angles[place + 1] - angles[place]) / (below[place] - (below[place - 1] if place else 0.0))
    return math.sqrt(degrees) * math.tan(angles[place + 1] - step * (below[place] - sought))
