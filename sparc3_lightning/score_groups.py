"""Score files of several methods, granularities and seeds, sorted into groups: a method, with its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparc3_lightning.attribution.scores import INDEX, MUST_MATCH, Provenance, ScoreFile, WeightScores


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
    def granularity(self) -> str:
        """``neuron``, ``head`` or ``weight``."""
        return self.provenances[0].granularity

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
    groups: dict[tuple[Any, ...], Group] = {}
    for path in paths:
        provenance = _provenance(path)
        key = tuple(str(getattr(provenance, name)) for name in MUST_MATCH)
        of = groups.setdefault(key, Group(provenance.method, [], []))
        for other, theirs in zip(of.paths, of.provenances, strict=True):
            # The seed of the run is in nothing but random scores.
            is_other = provenance.method == "random" and provenance.seed != theirs.seed
            if provenance.data_fingerprint == theirs.data_fingerprint and not is_other:
                raise ValueError(
                    f"--model.scores: {path} and {other} are by the same method on the same samples, so they are "
                    "not two seeds: leave one out, or attribute with another --data.init_args.seed."
                )
        of.paths.append(path)
        of.provenances.append(provenance)
    for of in groups.values():
        of.name = _name(of, [other for other in groups.values() if other.granularity == of.granularity])
    return list(groups.values())


def _provenance(path: Path) -> Provenance:
    if path.name == INDEX and path.is_file():
        return replace(WeightScores(path).provenance, granularity="weight")
    return ScoreFile.load(path).provenance


def _name(of: Group, among: Sequence[Group]) -> str:
    """Return the method, and the fields in which it differs from other groups of the same method."""
    same = [other.provenances[0] for other in among if other.provenances[0].method == of.provenances[0].method]
    values = [
        getattr(of.provenances[0], name)
        for name in MUST_MATCH
        if len({str(getattr(provenance, name)) for provenance in same}) > 1
    ]
    words = [of.provenances[0].method]
    for value in values:
        words += value if isinstance(value, list) else [str(value)]
    return " ".join(words)
