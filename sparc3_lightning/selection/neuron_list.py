"""neurons.json: the neurons or weights that ``sparc3 prune`` selected, their ablation, and their origin."""

import hashlib
import json
import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc3_lightning.attribution.scores import ScoreFile, WeightScores, check_sample_ids
from sparc3_lightning.errors import OptionFileNotFoundError
from sparc3_lightning.files import JsonFile, write_atomically
from sparc3_lightning.models.components import Component, Granularity
from sparc3_lightning.provenance import git_hash, versions

FORMAT = "sparc3_lightning neurons 2"
SELECTION = "selection.json"


@dataclass(frozen=True)
class NeuronList:
    """The content of neurons.json: the neurons, and where they come from.

    Args:
        neurons: The pruned ones, first the one that serves the behaviour most.
        provenance: Checkpoint, score files, versions.
        next: The neurons that follow in the same order, for a larger dose.
        least_relevant: Neurons of little relevance for general text, for control.
    """

    neurons: list[Component]
    provenance: dict[str, Any] = field(default_factory=dict)
    next: list[Component] = field(default_factory=list)
    least_relevant: list[Component] = field(default_factory=list)

    @property
    def granularity(self) -> Granularity:
        """What was pruned: ``weight``, ``head`` or ``neuron``; neurons and heads together are neurons."""
        kinds = {component.granularity for component in self.neurons}
        return kinds.pop() if len(kinds) == 1 else "neuron"

    @property
    def ablation(self) -> str:
        """What is done to the neurons, in words: they are ``switched off``, or damped, or held at their mean."""
        dampings = {n.damping for n in self.neurons}
        if len(dampings) > 1:
            words = "switched off or damped" if 1 in dampings else "damped"
        else:
            (damping,) = dampings
            words = "switched off" if damping == 1 else f"damped by {100 * damping:g} %"
        if not any(n.mean for n in self.neurons):
            return words
        return "held at their mean activation" if words == "switched off" else f"{words} towards their mean activation"

    def all(self) -> list[Component]:
        """Return the neurons of all lists."""
        return [*self.neurons, *self.next, *self.least_relevant]

    def digest(self) -> str:
        """Return a hash of the lists: their neurons, in order, with their ablation."""
        lists = [[(*n.key, n.damping, n.mean) for n in getattr(self, name)] for name in _LISTS]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write neurons.json, under a temporary name first."""
        content: dict[str, object] = {"format": FORMAT}
        content |= {name: [_row(neuron) for neuron in getattr(self, name)] for name in _LISTS}
        write_atomically(path, json.dumps({**content, "provenance": self.provenance}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "NeuronList":
        """Read neurons.json.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a list of neurons, is empty, or names a neuron twice.
        """
        if not path.is_file():
            raise OptionFileNotFoundError("neurons", f": {path} does not exist; 'sparc3 prune' writes it.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            if "neurons" not in content:
                raise ValueError("it has no field 'neurons'")
            lists = {name: [_read(row) for row in content.get(name, ())] for name in _LISTS}
            provenance = dict(content["provenance"])
            check_sample_ids(provenance.get("sample_ids", []))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a neurons.json of format {FORMAT!r}: {error!s:.200}") from None
        if not lists["neurons"]:
            raise ValueError(f"{path} holds no neurons.")
        if len({neuron.granularity == "weight" for neurons in lists.values() for neuron in neurons}) > 1:
            raise ValueError(f"{path} holds both neurons and single weights: prune them as two lists.")
        for neurons in (lists["neurons"] + lists["next"], lists["least_relevant"]):
            if len({neuron.key for neuron in neurons}) != len(neurons):
                raise ValueError(f"{path} names a neuron more than once.")
            if not all(math.isfinite(neuron.score) and math.isfinite(neuron.mean) for neuron in neurons):
                raise ValueError(f"{path} holds a score or a constant that is NaN or infinite.")
            if not all(0 < neuron.damping <= 1 for neuron in neurons):
                raise ValueError(f"{path} holds a damping that is not above 0 and at most 1.")
        return cls(provenance=provenance, **lists)


_LISTS = ("neurons", "next", "least_relevant")
_DEFAULTS: dict[str, float | None] = {"damping": 1.0, "mean": 0.0, "input": None}


def _row(neuron: Component) -> dict[str, str | float | None]:
    """Return the fields of a neuron, without those that every pruned one shares."""
    return {name: value for name, value in asdict(neuron).items() if value != _DEFAULTS.get(name)}


def _read(row: dict[str, Any]) -> Component:
    damping, mean = float(row.get("damping", 1.0)), float(row.get("mean", 0.0))
    column = None if row.get("input") is None else operator.index(row["input"])
    return Component(str(row["module"]), operator.index(row["index"]), float(row["score"]), damping, mean, column)


NUM_BINS = 81


@dataclass(frozen=True)
class Spent:
    """What was measured to stay within a budget: ``rise`` belongs to the chosen neurons; see ``PerplexityRise``."""

    max_perplexity_increase: float | None
    rise: float
    perplexity: float
    num_tokens: int
    num_documents: int
    data: dict[str, object]
    measured: list[dict[str, float]]


@dataclass(frozen=True)
class SelectionResults(JsonFile):
    """The content of selection.json: figures of the selected neurons, and of all candidates.

    ``threshold`` is the score of the last one that was chosen. The rest is as in ``Selected``.
    """

    FORMAT = "sparc3_lightning selection 1"
    criterion: str
    granularity: str
    num_neurons: int
    num_candidates: int
    differential_strength_percent: float | None
    num_negative: int
    threshold: float
    neurons_per_module: dict[str, int]
    histogram: dict[str, list[float]]
    budget: Spent | None


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
        differential_strength: In percent, for the selection ``difference``.
        budget: What was measured to stay within a price, if there was one.
    """

    chosen: list[Component]
    next: list[Component]
    least_relevant: list[Component]
    modules: list[str]
    num_candidates: int
    num_negative: int
    histogram: dict[str, list[float]]
    differential_strength: float | None = None
    budget: Spent | None = None

    def results(self, criterion: str, granularity: Granularity) -> SelectionResults:
        """Return the content of selection.json."""
        return SelectionResults(
            criterion=criterion,
            granularity=granularity,
            num_neurons=len(self.chosen),
            num_candidates=self.num_candidates,
            differential_strength_percent=self.differential_strength,
            num_negative=self.num_negative,
            threshold=self.chosen[-1].score,
            neurons_per_module={name: sum(n.module == name for n in self.chosen) for name in self.modules},
            histogram=self.histogram,
            budget=self.budget,
        )


def histogram(values: Tensor, num_bins: int = NUM_BINS) -> dict[str, list[float]]:
    """Count values in bins of equal width, between the smallest and the largest.

    Returns:
        ``edges``, one more than there are bins, and ``counts``.
    """
    counts, edges = torch.histogram(values.double(), bins=num_bins)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


Scored = Sequence[ScoreFile | WeightScores]


def origin(general: Scored, behavior: Scored) -> dict[str, object]:
    """Return where a selection comes from: the first fields of the provenance in neurons.json.

    Args:
        general: The score files of general reference samples.
        behavior: The score file of the behaviour, followed by the harmless samples' if there is one.
    """
    of_general, (of_behavior, *of_harmless) = (
        [{"path": str(file.path), **file.provenance.summary()} for file in files] for files in (general, behavior)
    )
    shared = behavior[0].provenance
    return {
        "checkpoint": shared.checkpoint,
        "checkpoint_fingerprint": shared.checkpoint_fingerprint,
        "general": of_general,
        "behavior": of_behavior,
        **({"harmless": of_harmless[0]} if of_harmless else {}),
        "sample_ids": sorted({id_ for file in (*general, *behavior) for id_ in file.provenance.sample_ids}),
        "versions": versions(),
        "git_hash": git_hash(),
    }
