"""What a neuron is; how neurons are selected from scores, masked for a while, or pruned for good; and neurons.json."""

import hashlib
import json
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_lightning.files import write_atomically
from sparc3_lightning.heads import check_heads, is_heads, mask_heads, prune_heads_

# Of a gated MLP (LLaMA, Qwen2, Gemma3): the layers whose row i, and the layer whose column i, make up neuron i.
ROWS = ("up_proj", "gate_proj")
COLUMN = "down_proj"
FORMAT = "sparc3_lightning neurons 1"


@dataclass(frozen=True, slots=True)
class Neuron:
    """Neuron ``index`` of the layer ``module`` (a fully qualified name), with the score it was selected by.

    Where ``module`` is the o_proj of an attention it is the head of that number.
    """

    module: str
    index: int
    score: float


def select(scores: Mapping[str, Tensor], num_neurons: int) -> list[Neuron]:
    """Select the neurons with the lowest scores over all modules, lowest first.

    Ties are broken by the order of the modules, then by index, so that the selection is reproducible.

    Args:
        scores: Per module, shape ``[out_features]``; for the published selection the differential relevance.
        num_neurons: How many to select.

    Raises:
        ValueError: If ``num_neurons`` is not between 1 and the number of neurons whose score is below infinity, or a
            score is NaN.

    Example:
        >>> select({"a": torch.tensor([0.0, -2.0]), "b": torch.tensor([-1.0, 3.0])}, 2)
        [Neuron(module='a', index=1, score=-2.0), Neuron(module='b', index=0, score=-1.0)]
    """
    names = list(scores)
    flat = torch.cat([scores[name] for name in names])
    if not 1 <= num_neurons <= len(flat):
        raise ValueError(f"--model.num_neurons must be between 1 and {len(flat):,} (all neurons), got {num_neurons}.")
    if torch.isnan(flat).any():
        raise ValueError("The scores hold NaN, so neurons cannot be ranked.")
    eligible = int((flat < math.inf).sum())
    if num_neurons > eligible:
        raise ValueError(
            f"--model.num_neurons asks for {num_neurons} neurons, but --model.selection leaves only {eligible} of "
            f"{len(flat):,}: raise --model.top_behavior, or lower --model.top_general."
        )
    order = flat.argsort(stable=True)[:num_neurons]
    modules = [(name, i) for name in names for i in range(len(scores[name]))]
    return [Neuron(name, i, flat[k].item()) for k in order.tolist() for name, i in [modules[k]]]


@contextmanager
def mask(model: nn.Module, neurons: Iterable[Neuron], strength: float = 1.0) -> Iterator[None]:
    """Switch neurons or heads off, or damp them, for the length of a ``with`` block, without touching a weight.

    Args:
        model: A causal language model with gated MLPs.
        neurons: The neurons and heads.
        strength: 1 is off; a fraction leaves ``1 - strength`` of each neuron's activation.

    Raises:
        ValueError: If the model has no such neuron.
    """
    heads, neurons = _apart(neurons)
    with ExitStack() as undo:
        undo.enter_context(mask_heads(model, heads, strength))
        for parent, indices in _by_mlp(model, neurons).items():
            column: Any = model.get_submodule(f"{parent}.{COLUMN}")
            factor = torch.ones(column.in_features, device=column.weight.device, dtype=column.weight.dtype)
            factor[indices] = 1 - strength

            def damp(module: nn.Module, inputs: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
                # Not a product alone: what is off is 0 even where the activation is infinite.
                return (torch.where(factor == 0, 0, inputs[0] * factor),)

            undo.callback(column.register_forward_pre_hook(damp).remove)
        yield


def prune_(model: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Set the rows and the column that make up each neuron to zero, in place, and the weights of heads.

    Args:
        model: A causal language model with gated MLPs.
        neurons: The neurons and heads.

    Raises:
        ValueError: If the model has no such neuron. Nothing is changed then.
    """
    heads, neurons = _apart(neurons)
    by_mlp = _by_mlp(model, neurons)  # before anything is changed
    prune_heads_(model, heads)
    with torch.no_grad():
        for parent, indices in by_mlp.items():
            for name in ROWS:
                row: Any = model.get_submodule(f"{parent}.{name}")
                row.weight[indices] = 0
                if row.bias is not None:
                    row.bias[indices] = 0
            column: Any = model.get_submodule(f"{parent}.{COLUMN}")
            column.weight[:, indices] = 0


def check_neurons(model: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Raise ValueError unless the model has all these neurons. A model on the meta device suffices."""
    heads, neurons = _apart(neurons)
    check_heads(model, heads)
    _by_mlp(model, neurons)


def _apart(neurons: Iterable[Neuron]) -> tuple[dict[str, list[int]], list[Neuron]]:
    """Return the numbers of the heads by the name of their layer, and the neurons of MLPs."""
    heads: dict[str, list[int]] = defaultdict(list)
    others = []
    for neuron in neurons:
        if is_heads(neuron.module):
            heads[neuron.module].append(neuron.index)
        else:
            others.append(neuron)
    return dict(heads), others


def _by_mlp(model: nn.Module, neurons: Iterable[Neuron]) -> dict[str, list[int]]:
    """Group the indices by the name of the MLP they belong to."""
    groups: dict[str, list[int]] = defaultdict(list)
    modules = dict(model.named_modules())
    for neuron in neurons:
        parent, _, layer = neuron.module.rpartition(".")
        if layer not in ROWS or not all(f"{parent}.{name}" in modules for name in (*ROWS, COLUMN)):
            raise ValueError(
                f"{neuron.module!r} is not a layer of MLP neurons of this model: expected the name of an up_proj or "
                "gate_proj beside a down_proj. Is neurons.json of another model?"
            )
        out_features = modules[neuron.module].out_features
        if not 0 <= neuron.index < out_features:
            raise ValueError(
                f"Neuron {neuron.index} of {neuron.module} does not exist: the layer has {out_features} neurons. "
                "Is neurons.json of another model?"
            )
        groups[parent].append(neuron.index)
    return dict(groups)


@dataclass(frozen=True)
class NeuronList:
    """The content of neurons.json: the neurons, and where they come from.

    Args:
        neurons: The pruned ones, first the one that serves the behaviour most.
        provenance: Checkpoint, score files, versions.
        next: The neurons that follow in the same order, for a larger dose.
        least_relevant: Neurons of little relevance for general text, for control.
    """

    neurons: list[Neuron]
    provenance: dict[str, Any] = field(default_factory=dict)
    next: list[Neuron] = field(default_factory=list)
    least_relevant: list[Neuron] = field(default_factory=list)

    def all(self) -> list[Neuron]:
        """Return the neurons of all lists."""
        return [*self.neurons, *self.next, *self.least_relevant]

    def digest(self) -> str:
        """Return a hash of which neurons are in which list, and in which order."""
        lists = [[(neuron.module, neuron.index) for neuron in getattr(self, name)] for name in _LISTS]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write neurons.json, under a temporary name first."""
        content: dict[str, Any] = {"format": FORMAT}
        content |= {name: [asdict(neuron) for neuron in getattr(self, name)] for name in _LISTS}
        write_atomically(path, json.dumps({**content, "provenance": self.provenance}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "NeuronList":
        """Read neurons.json.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a list of neurons, is empty, or names a neuron twice.
        """
        if not path.is_file():
            raise FileNotFoundError(f"--model.neurons: {path} does not exist; 'sparc3 prune' writes it.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            if "neurons" not in content:
                raise ValueError("it has no field 'neurons'")
            lists = {name: [_read(row) for row in content.get(name, ())] for name in _LISTS}
            provenance = dict(content["provenance"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a neurons.json of format {FORMAT!r}: {error!s:.200}") from None
        if not lists["neurons"]:
            raise ValueError(f"{path} holds no neurons.")
        for neurons in (lists["neurons"] + lists["next"], lists["least_relevant"]):
            if len({(neuron.module, neuron.index) for neuron in neurons}) != len(neurons):
                raise ValueError(f"{path} names a neuron more than once.")
            if not all(math.isfinite(neuron.score) for neuron in neurons):
                raise ValueError(f"{path} holds a score that is NaN or infinite.")
        return cls(provenance=provenance, **lists)


_LISTS = ("neurons", "next", "least_relevant")


def _read(row: dict[str, Any]) -> Neuron:
    return Neuron(str(row["module"]), operator.index(row["index"]), float(row["score"]))
