"""What a selection found: the lists of neurons.json, and the figures of selection.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparc3_lightning.attribution.scores import ScoreFile, WeightScores
from sparc3_lightning.models.components import Neuron
from sparc3_lightning.provenance import git_hash, versions

NUM_BINS = 81


@dataclass(frozen=True)
class Selected:
    """Neurons, or single weights, that were selected, and figures of all that they were selected from.

    Args:
        chosen: Those to prune, first the one that serves the behaviour most.
        next: Those that follow in the same order.
        least_relevant: Those of little relevance for general text.
        modules: Names of all layers that were ranked.
        num_candidates: How many were ranked.
        num_negative: How many of them have a score below 0.
        histogram: Of their scores, see ``histogram``.
        strength: Differential strength in percent, for the selection ``difference``.
        budget: What was measured to stay within a price, if there was one.
    """

    chosen: list[Neuron]
    next: list[Neuron]
    least_relevant: list[Neuron]
    modules: list[str]
    num_candidates: int
    num_negative: int
    histogram: dict[str, list[float]]
    strength: float | None = None
    budget: dict[str, Any] | None = None

    def figures(self) -> dict[str, Any]:
        """Return the figures, as selection.json holds them."""
        return {
            "num_neurons": len(self.chosen),
            "num_candidates": self.num_candidates,
            "differential_strength_percent": self.strength,
            "num_negative": self.num_negative,
            "threshold": self.chosen[-1].score,
            "neurons_per_module": {name: sum(n.module == name for n in self.chosen) for name in self.modules},
            "histogram": self.histogram,
            "budget": self.budget,
        }


def histogram(values: Tensor, num_bins: int = NUM_BINS) -> dict[str, list[float]]:
    """Count values in bins of equal width, between the smallest and the largest.

    Returns:
        ``edges``, one more than there are bins, and ``counts``.
    """
    counts, edges = torch.histogram(values.double(), bins=num_bins)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


Scored = Sequence[ScoreFile | WeightScores]


def origin(general: Scored, behavior: Scored) -> dict[str, Any]:
    """Return where a selection comes from: the first fields of the provenance in neurons.json.

    Args:
        general: The score files of general reference samples.
        behavior: That of the behaviour, and that of the contrast if there is one.
    """
    of_general, (of_behavior, *of_contrast) = (
        [{"path": str(file.path), **file.provenance.summary()} for file in files] for files in (general, behavior)
    )
    shared = behavior[0].provenance
    return {
        "checkpoint": shared.checkpoint,
        "checkpoint_fingerprint": shared.checkpoint_fingerprint,
        "general": of_general,
        "behavior": of_behavior,
        **({"contrast": of_contrast[0]} if of_contrast else {}),
        "sample_ids": sorted({id_ for file in (*general, *behavior) for id_ in file.provenance.sample_ids}),
        "versions": versions(),
        "git_hash": git_hash(),
    }
