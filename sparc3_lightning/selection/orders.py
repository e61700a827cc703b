"""Orders in which the components of a model are taken out, the least relevant first: neurons, channels, weights.

Relevance is the magnitude of the score, whatever its sign: a component that works against the behaviour belongs to the
circuit as one that works for it does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sparc3_lightning.attribution.scores import INDEX, Provenance, ScoreFile, WeightScores
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import linear_at, weight_of
from sparc3_lightning.models.components import Component, Scored, mask
from sparc3_lightning.selection.criteria import select_neurons
from sparc3_lightning.selection.sides import are_of_same_samples

Scores = Mapping[str, Tensor]


class Order(Protocol):
    """Components from the least to the most relevant."""

    def __len__(self) -> int:
        """Return the number of components."""

    def without(self, model: nn.Module, number: int) -> AbstractContextManager[int]:
        """Take the first ``number`` components out of the model for a ``with`` block, and give how many are out."""


class ComponentOrder:
    """Neurons, heads or channels from the least to the most relevant over all layers.

    Args:
        scores: Per module, shape ``[components]``.
        granularity: What they are of.
    """

    def __init__(self, scores: Scores, granularity: Scored = "neuron") -> None:
        magnitudes = {name: score.abs() for name, score in scores.items()}
        number = sum(map(len, magnitudes.values()))
        self.components: list[Component] = select_neurons(magnitudes, number, granularity)

    def __len__(self) -> int:
        return len(self.components)

    @contextmanager
    def without(self, model: nn.Module, number: int) -> Iterator[int]:
        """Mask the first components; see ``Order``."""
        with mask(model, self.components[:number]) if number else nullcontext():
            yield number


class WeightOrder:
    """Single weights from the least to the most relevant over all layers; weights of equal relevance go together.

    Args:
        scores: Per module, shape ``[out_features, in_features]``.
    """

    def __init__(self, scores: Scores) -> None:
        self.magnitudes = {name: score.abs() for name, score in scores.items()}
        self.ordered = torch.cat([score.flatten() for score in self.magnitudes.values()]).sort().values

    def __len__(self) -> int:
        return len(self.ordered)

    @contextmanager
    def without(self, model: nn.Module, number: int) -> Iterator[int]:
        """Set the first weights to zero, and back on leaving the block; see ``Order``."""
        if not number:
            yield 0
            return
        threshold, out, kept = self.ordered[number - 1], 0, {}
        try:
            for name, magnitude in self.magnitudes.items():
                weight = weight_of(linear_at(model, name))
                kept[name] = weight.detach().clone()
                off = magnitude <= threshold
                out += int(off.sum())
                weight.data.masked_fill_(off.to(weight.device), 0)
            yield out
        finally:
            for name, weight in kept.items():
                weight_of(linear_at(model, name)).data.copy_(weight)


def random_scores(like: Scores, seed: int) -> dict[str, Tensor]:
    """Return scores of the same shapes that rank at random."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(score.shape, generator=draw) for name, score in like.items()}


@dataclass
class Group:
    """Score files that differ in their samples alone, one for each seed.

    Args:
        name: Method, and what else tells the group from others of its granularity.
        paths: Of the files.
        provenances: Of each file.
    """

    name: str
    paths: list[Path]
    provenances: list[Provenance]

    @property
    def granularity(self) -> Scored:
        """What was scored."""
        return self.provenances[0].spec.granularity

    def average(self) -> dict[str, Tensor]:
        """Return the mean over the files, each weighing the same, with no more than two of them in memory."""
        total = load_scores(self.paths[0])
        for path in self.paths[1:]:
            total = {name: total[name] + score for name, score in load_scores(path).items()}
        return {name: score / len(self.paths) for name, score in total.items()}


def load_scores(path: Path) -> dict[str, Tensor]:
    """Read the scores of a file, per module: of weights each weight's, shape ``[out_features, in_features]``."""
    return dict(WeightScores(path)) if path.name == INDEX else ScoreFile.load(path).scores


def group_scores(paths: Sequence[Path]) -> list[Group]:
    """Sort score files into groups, in the order of their first files.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or damaged, or two of a group are of the same samples.
    """
    groups: dict[tuple[str, ...], Group] = {}
    for path in paths:
        provenance = _provenance(path)
        key = tuple(map(str, provenance.shared().values()))
        group = groups.setdefault(key, Group(provenance.spec.method, [], []))
        for other, theirs in zip(group.paths, group.provenances, strict=True):
            if are_of_same_samples(provenance, theirs):
                raise OptionError(
                    "scores",
                    f": {path} and {other} are by the same method on the same samples, so they are "
                    "not two seeds: leave one out, or attribute with another --data.init_args.seed.",
                )
        group.paths.append(path)
        group.provenances.append(provenance)
    for group in groups.values():
        group.name = _name(group, [other for other in groups.values() if other.granularity == group.granularity])
    return list(groups.values())


def _provenance(path: Path) -> Provenance:
    if path.name == INDEX and path.is_file():
        return WeightScores(path).provenance
    return ScoreFile.load(path).provenance


def _name(group: Group, among: Sequence[Group]) -> str:
    """Return the method, and the fields in which it differs from other groups of the same method."""
    method = group.provenances[0].spec.method
    same = [other.provenances[0].shared() for other in among if other.provenances[0].spec.method == method]
    words: list[str] = [method]
    for name, value in group.provenances[0].shared().items():
        if len({str(shared[name]) for shared in same}) > 1:
            words += value if isinstance(value, list) else [str(value)]
    return " ".join(words)
