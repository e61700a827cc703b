"""Values of prompts drawn from populations whose true means are known, and a slow interval of their mean."""

import math
import random

import torch
from torch import Tensor


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toxicities(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Draw skewed values before and after, alike within a prompt, and return the true mean change as well."""
    level = torch.rand(number, generator=generator).square()  # mean 1/3
    noise = torch.rand(2, number, generator=generator) - 0.5
    return level + 0.2 * noise[0], 0.7 * level + 0.2 * noise[1], -0.1


def slow_ends(values: list[float], student: float, num_resamples: int = 4000) -> tuple[float, float]:
    """Resample with Python's own generator, and go a third of the way from Student's interval to the bootstrap-t."""

    def mean_and_error(of: list[float]) -> tuple[float, float]:
        mean = sum(of) / len(of)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in of) / len(of) / (len(of) - 1))

    draw, (mean, error), found = random.Random(0), mean_and_error(values), []
    for _ in range(num_resamples):
        moved, its = mean_and_error(draw.choices(values, k=len(values)))
        found.append((moved - mean) / its if its else math.copysign(math.inf, moved - mean))
    found.sort()
    low, high = found[int(0.025 * num_resamples) - 1], found[int(0.975 * num_resamples)]
    return mean - (high + 2 * student) / 3 * error, mean - (low - 2 * student) / 3 * error
