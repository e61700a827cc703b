"""neurons.json: the components that ``sparc3 prune`` selected, their ablation, and their origin."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Annotated, TypedDict, cast

import torch
from torch import Tensor

from sparc3_lightning.attribution.scores import ScoreFile, WeightScores
from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.files import LEFT_OUT, Count, JsonFile, Range, parse_sealed, read_as, sealed, write_atomically
from sparc3_lightning.models.checkpoints import Checkpoint, Dtype
from sparc3_lightning.models.components import Component, Granularity, Scored, counts_of
from sparc3_lightning.provenance import git_hash, revision_of, versions

FORMAT = "sparc3_lightning neurons 4"
NEURONS = "neurons.json"
SELECTION = "selection.json"
CHOSEN = "chosen/neurons.json"  # in the folder of a sweep


class ChosenBy(TypedDict, total=False):
    """What is read of whatever had a part in choosing: a sweep, or scores and what was computed for them."""

    spec: dict[str, object]
    choosers: dict[str, str | None]


class ScoredIn(ChosenBy):
    """What is read of the provenance of a score file that neurons were selected by."""

    path: str


class Priced(TypedDict):
    """What is read of a budget that neurons were selected within."""

    max_perplexity_increase: float | None


class Origin(TypedDict, total=False):
    """What is read of the provenance in neurons.json; what else it holds is for people."""

    checkpoint: str | None
    checkpoint_fingerprint: str | None
    general: list[ScoredIn]
    behavior: ScoredIn | None
    harmless: ScoredIn | None
    sample_ids: list[str]
    criterion: str
    budget: Priced | None
    chosen: ChosenBy | None
    differential_strength_percent: float | None
    export: str | None
    export_dtype: Dtype | None
    export_fingerprint: str | None
    scores: list[ScoredIn]
    choosers: dict[str, str | None]
    versions: dict[str, str]
    git_hash: str | None


@dataclass(frozen=True)
class NeuronList:
    """The content of neurons.json: the neurons, and where they come from.

    ``save`` is how a list of one's own is written too: the file carries a checksum.

    Args:
        neurons: The pruned ones, first the one that serves the behaviour most.
        provenance: Checkpoint, score files, versions.
        next: The neurons that follow in the same order, for a larger dose.
        least_relevant: Neurons of little relevance for general text, for control.
    """

    neurons: list[Component]
    provenance: dict[str, object] = field(default_factory=dict)
    next: list[Component] = field(default_factory=list)
    least_relevant: list[Component] = field(default_factory=list)

    @property
    def origin(self) -> Origin:
        """The provenance, as it is read."""
        return cast(Origin, self.provenance)

    @property
    def granularity(self) -> str:
        """What was pruned: ``neuron``, ``head``, ``channel`` or ``weight``, or several of them joined by ``+``."""
        return "+".join(counts_of(self.neurons))

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

    def checkpoint(self, path: Path, name: str | None = None) -> Checkpoint:
        """Return the checkpoint that the list is for.

        Args:
            path: Of the list, for the message.
            name: Where the checkpoint lies; None takes what the list says.

        Raises:
            OptionError: If the list does not say which one it is for.
        """
        fingerprint, name = self.origin.get("checkpoint_fingerprint"), name or self.origin.get("checkpoint")
        if not fingerprint or not name:
            raise OptionError("neurons", f": {path} does not say which checkpoint it is for: prune again.")
        return Checkpoint(name, revision_of(fingerprint))

    def check_checkpoint(self, checkpoint: Checkpoint, place: object) -> None:
        """Raise OptionError unless a checkpoint is the one that the list is for.

        Args:
            checkpoint: Any.
            place: Path or name of the list, for the message.
        """
        origin = self.origin
        checkpoint.check_is_of(place, origin.get("checkpoint"), origin.get("checkpoint_fingerprint"))

    def choosers(self) -> list[tuple[str, str | None]]:
        """Return the scorers that had a part in choosing the neurons.

        They are those of the lexicon that was attributed, of the continuations that samples were chosen by, and of the
        sweep that chose among several lists.

        Returns:
            Of each its name, and what tells it from every other; None if the list does not say that.
        """
        origin = self.origin
        sides: list[ChosenBy | None] = [{"choosers": origin.get("choosers") or {}}]
        sides += [origin.get("behavior"), origin.get("harmless"), origin.get("chosen")]
        sides += [*(origin.get("general") or ()), *(origin.get("scores") or ())]
        found: list[tuple[str, str | None]] = []
        for side in sides:
            if side is None:
                continue
            lexicon, of_side = (side.get("spec") or {}).get("lexicon"), side.get("choosers") or {}
            found += of_side.items()
            found += [(lexicon, None)] if isinstance(lexicon, str) and lexicon not in of_side else []
        return list(dict.fromkeys(found))

    @property
    def order(self) -> list[Component]:
        """The neurons in the order in which they are switched off: those that are, and the next ones."""
        return self.neurons + self.next

    def all(self) -> list[Component]:
        """Return the neurons of all lists."""
        return [*self.neurons, *self.next, *self.least_relevant]

    def digest(self) -> str:
        """Return a hash of the lists: their neurons, in order, with their ablation."""
        lists = [[(*n.key, n.damping, n.mean) for n in getattr(self, name)] for name in _LISTS]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the text of neurons.json."""
        content: dict[str, object] = {"format": FORMAT}
        content |= {name: [_row(neuron) for neuron in getattr(self, name)] for name in _LISTS}
        return json.dumps(sealed({**content, "provenance": self.provenance}), indent=1) + "\n"

    def save(self, path: Path | str) -> None:
        """Write neurons.json, under a temporary name first."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "NeuronList":
        """Read neurons.json.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a list of neurons or was changed, is empty, or names a neuron twice.
        """
        path = Path(path)
        if not path.is_file():
            raise OptionFileNotFoundError("neurons", f": {path} does not exist; 'sparc3 prune' writes it.")
        try:
            content = parse_sealed(path.read_bytes(), FORMAT)
            lists = {name: _components(content.get(name), name) for name in _LISTS}
            provenance = content.get("provenance")
            read_as(Origin, provenance, "provenance")
        except ValueError as error:
            raise ValueError(f"{path} is not a neurons.json of format {FORMAT!r}: {error!s:.200}") from None
        if not lists["neurons"]:
            raise ValueError(f"{path} holds no neurons.")
        for neurons in (lists["neurons"] + lists["next"], lists["least_relevant"]):
            if len({neuron.key for neuron in neurons}) != len(neurons):
                raise ValueError(f"{path} names a neuron more than once.")
            if not all(neuron.damping > 0 for neuron in neurons):
                raise ValueError(f"{path} holds a damping that is not above 0.")
        return cls(provenance=cast("dict[str, object]", provenance), **lists)


_LISTS = ("neurons", "next", "least_relevant")


class _Row(TypedDict):
    """A neuron as neurons.json has it, see ``Component``."""

    module: str
    index: Count
    score: float
    damping: Annotated[float, Range(0, 1)]
    mean: float
    input: Count | None
    granularity: Granularity


def _row(neuron: Component) -> dict[str, str | float | None]:
    """Return the fields of a neuron, without those that every pruned one shares."""
    defaults = _defaults(neuron.input)
    return {name: value for name, value in asdict(neuron).items() if value != defaults.get(name)}


def _defaults(input_: object) -> dict[str, object]:
    """Return the fields that a row leaves out where they say nothing: what has an input is a weight."""
    return {"damping": 1.0, "mean": 0.0, "input": None, "granularity": "neuron" if input_ is None else "weight"}


def _components(rows: object, place: str) -> list[Component]:
    """Return the neurons of a list in neurons.json.

    Raises:
        ValueError: If this is no list of neurons.
    """
    found = []
    for i, row in enumerate(read_as(list[dict[str, object]], rows, place)):
        if missing := [name for name in ("score", "damping", "mean") if row.get(name, 0.0) is None]:
            raise ValueError(f"{place}.{i}.{missing[0]} cannot be None")
        found.append(Component(**read_as(_Row, {**_defaults(row.get("input")), **row}, f"{place}.{i}")))
    return found


NUM_BINS = 81


@dataclass(frozen=True)
class BudgetUse:
    """What was measured to stay within a budget: ``rise`` belongs to the chosen neurons; see ``PerplexityRise``.

    ``predicted`` is the rise that their costs predict, see ``Prediction``; None where nothing is predicted.
    """

    max_perplexity_increase: float | None
    rise: float
    perplexity: float
    num_tokens: Count
    num_documents: Count
    data: dict[str, object]
    measured: list[dict[str, float]]
    predicted: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class SelectionResults(JsonFile):
    """The content of selection.json: figures of the selected neurons, and of all candidates.

    ``granularity`` is what was ranked, and ``threshold`` the score of the last one that was chosen. The rest is as in
    ``Selected``.
    """

    FORMAT = "sparc3_lightning selection 2"
    criterion: str
    granularity: Scored
    num_neurons: Count
    num_candidates: Count
    differential_strength_percent: float | None
    num_negative: Count
    threshold: float
    neurons_per_module: dict[str, Count]
    histogram: dict[str, list[float]]
    budget: BudgetUse | None


@dataclass(frozen=True)
class Selected:
    """Neurons, or single weights, that were selected, and figures of all that they were selected from.

    Args:
        chosen: Those to prune, first the one that serves the behaviour most.
        next: Those that follow in the same order.
        least_relevant: Those of little relevance for general text.
        modules: Names of all layers that were ranked.
        num_candidates: How many were ranked.
        granularity: What they are.
        num_negative: How many of them have a score below 0.
        histogram: Of their scores, see ``histogram``.
        differential_strength: In percent, for the selection ``difference``.
        budget: What was measured to stay within the budget, if there was one.
    """

    chosen: list[Component]
    next: list[Component]
    least_relevant: list[Component]
    modules: list[str]
    num_candidates: int
    granularity: Scored
    num_negative: int
    histogram: dict[str, list[float]]
    differential_strength: float | None = None
    budget: BudgetUse | None = None

    def results(self, criterion: str) -> SelectionResults:
        """Return the content of selection.json."""
        return SelectionResults(
            criterion=criterion,
            granularity=self.granularity,
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


def by_name(choosers: Iterable[tuple[str, str | None]], named: Callable[[str], str] = str) -> dict[str, str | None]:
    """Return what tells each chooser from other scorers, by a name of its own; see ``NeuronList.choosers``.

    Args:
        choosers: Of each its name, and what tells it from others. Of two that are called alike one gets a number, but
            for one of which only the name is known.
        named: What a chooser is called.
    """
    found: dict[str, str | None] = {}
    for name, of in sorted(choosers, key=lambda chooser: chooser[1] is not None):
        names = chain([named(name)], (f"{named(name)} ({number})" for number in count(2)))
        found[next(short for short in names if found.get(short, of) == of)] = of
    return found


def origin(
    general: Sequence[ScoreFile | WeightScores], behavior: Sequence[ScoreFile | WeightScores]
) -> dict[str, object]:
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
