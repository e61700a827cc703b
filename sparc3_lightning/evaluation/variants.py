"""The models that an evaluation measures: the original, the pruned one, controls, and other doses."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from torch import nn

from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.controls import CONTROLS, Controls
from sparc3_lightning.models.components import Component, counts_of, mask, plural
from sparc3_lightning.selection.neuron_list import NeuronList


@dataclass(frozen=True)
class Variant:
    """A model to measure, and its neurons that are off or damped.

    Args:
        name: In results and completions.
        kind: ``baseline``, ``pruned``, ``dose``, or the name of a control.
        num_continuations: Continuations drawn per prompt.
        num_neurons: How many neurons are off.
        damping: 1 is as the list has it, a fraction damps.
        draw: Number of the draw of a control.
        selection: Name of the selection its neurons are from, of one list or of several.
        listed: Name of the list its neurons are from.
        of_list: Damping of the neurons in the list itself, 1 if they have several.
        mean_ablated: Whether something other than 0 takes the place of an activation, such as its mean.
        kinds: How many of what is off are neurons, heads, channels or weights; known once they are chosen.
    """

    name: str
    kind: str
    num_continuations: int
    num_neurons: int = 0
    damping: float = 1.0
    draw: int = 0
    selection: str = ""
    listed: str = ""
    of_list: float = 1.0
    mean_ablated: bool = False
    kinds: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def strength(self) -> float:
        """How far the neurons are off, by the list and the damping together: 1 is off."""
        return self.damping * self.of_list

    def as_context(self, model: nn.Module, neurons: Sequence[Component]) -> AbstractContextManager[None]:
        """Return the context that turns the model in memory into this variant."""
        return mask(model, neurons, self.damping) if neurons else nullcontext()


Lists = Mapping[str, NeuronList]  # by name; the pruned model has the neurons of the first one off


def list_variants(
    lists: Lists,
    num_continuations: int,
    controls: Controls = Controls(num_draws=0),
    doses: Sequence[int] = (),
    dampings: Sequence[float] = (1.0,),
    selections: Mapping[str, str] | None = None,
) -> list[Variant]:
    """List the models to measure.

    Args:
        lists: The neurons to prune; further lists are measured as they stand. Empty for the original model only.
        num_continuations: Continuations drawn per prompt.
        controls: Controls of the first list.
        doses: Numbers of neurons, in the order of each selection: that of its longest list.
        dampings: For each dose: 1 is as the list has it, a fraction damps.
        selections: Name of the selection that each list is from, by the list's name; of those not named their own.

    Raises:
        ValueError: If a number is out of range, or a selection lists fewer neurons than a dose.
    """
    controls.check()
    check_doses(doses, dampings)
    by_selection: dict[str, list[str]] = defaultdict(list)
    for name in lists:
        by_selection[(selections or {}).get(name, name)].append(name)
    longest = {
        selection: max(names, key=lambda name: len(lists[name].order)) for selection, names in by_selection.items()
    }
    _check_listed({selection: lists[name] for selection, name in longest.items()}, doses)
    variants = [Variant("baseline", "baseline", num_continuations)]
    for selection, names in by_selection.items():
        for name in names:
            called, kind = ("pruned", "pruned") if len(variants) == 1 else (name, "dose")
            number = len(lists[name].neurons)
            variants.append(Variant(called, kind, num_continuations, number, selection=selection, listed=name))
        numbers = {len(lists[name].neurons) for name in names}
        variants += [
            Variant(
                f"{selection and f'{selection} '}top_{d}_{s:g}",
                "dose",
                num_continuations,
                d,
                s,
                selection=selection,
                listed=longest[selection],
            )
            for s in dampings
            for d in doses
            if s != 1 or d not in numbers  # else it is a list itself
        ]
    if not lists:
        return variants
    fewer = min(controls.num_continuations or num_continuations, num_continuations)
    first_list = next(iter(lists.values()))
    kinds = [kind for kind, control in CONTROLS.items() if control.is_known(first_list)]
    number = len(first_list.neurons)
    variants += [
        Variant(f"{kind}_{i}", kind, fewer, number, draw=i) for kind in kinds for i in range(controls.num_draws)
    ]
    names = [variant.name for variant in variants]
    if taken := {name for name in names if names.count(name) > 1}:
        raise OptionError("names", f": another model is called {min(taken)!r} too: give that list another name.")
    return variants


def check_doses(doses: Sequence[int], dampings: Sequence[float]) -> None:
    """Raise ValueError if a dose or a damping is out of range, whatever the neurons; see ``list_variants``."""
    if not all(0 < damping <= 1 for damping in dampings) or (doses and not dampings):
        raise OptionError("dampings", f"must be above 0 and at most 1, got {list(dampings)}.")
    if not doses and any(damping != 1 for damping in dampings):
        raise OptionError(
            "dampings",
            f"{list(dampings)} has no effect without --.doses. How far the neurons of a list are switched off "
            "is written in the list, by the option dampings of 'sparc3 prune'.",
        )
    if len(set(dampings)) != len(dampings):
        raise OptionError("dampings", f"must be different, got {list(dampings)}.")
    if len(set(doses)) != len(doses) or not all(dose > 0 for dose in doses):
        raise OptionError("doses", f"must be different numbers above 0, got {list(doses)}.")


def _check_listed(lists: Lists, doses: Sequence[int]) -> None:
    if doses and not lists:
        raise OptionError("doses", "needs --.neurons.")
    for selection, neurons in lists.items():
        known = len(neurons.order)
        if doses and max(doses) > known:
            raise OptionError(
                "doses",
                f"asks for {max(doses)} {plural(neurons.granularity)}, but --.neurons"
                f"{selection and f' ({selection})'} lists {known}: ask for fewer, or, if its criterion leaves as many, "
                f"run 'sparc3 prune' with --.num_ranked {max(doses)}.",
            )


def neurons_of(variants: Sequence[Variant], lists: Lists, model: nn.Module, seed: int) -> dict[str, list[Component]]:
    """Return which neurons each variant switches off.

    Args:
        variants: From ``list_variants``.
        lists: As ``list_variants`` had them.
        model: For the size of its layers and their weights; all ranks ask together if it is sharded.
        seed: Of the draws of the controls.
    """
    if not lists:
        return {variant.name: [] for variant in variants}
    first = next(iter(lists.values()))
    kinds = {variant.kind for variant in variants}
    draw = {kind: control.start(first, model) for kind, control in CONTROLS.items() if kind in kinds}

    def neurons_of(variant: Variant) -> list[Component]:
        if variant.kind == "baseline":
            return []
        if variant.kind in draw:
            return draw[variant.kind](1000 * seed + variant.draw)
        return lists[variant.listed].order[: variant.num_neurons]

    return {variant.name: neurons_of(variant) for variant in variants}


def counted(variants: Sequence[Variant], off: Mapping[str, Sequence[Component]]) -> list[Variant]:
    """Return the variants with the numbers of neurons that are off, and whether any is held at a constant.

    A control may have fewer neurons if its layers hold no more.
    """
    return [
        replace(
            variant,
            num_neurons=len(neurons),
            of_list=neurons[0].damping if len({neuron.damping for neuron in neurons}) == 1 else 1.0,
            mean_ablated=any(neuron.mean for neuron in neurons),
            kinds=counts_of(neurons),
        )
        for variant in variants
        for neurons in (off[variant.name],)
    ]


def describe(variants: Sequence[Variant]) -> str:
    """Say how many models of each kind there are."""
    kinds = [variant.kind for variant in variants]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)).replace("_", " ")


def of_kind(variants: Sequence[Variant], kind: str) -> Iterator[Variant]:
    """Yield the variants of one kind."""
    return (variant for variant in variants if variant.kind == kind)
