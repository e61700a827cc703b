"""What a neuron is; how neurons are selected from scores, masked for a while, or pruned for good; and neurons.json."""

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparc3_lightning.files import write_atomically
from sparc3_lightning.linear import Linear, weight_of

# The layers whose row i, and the layer whose column i, make up neuron i: of a gated MLP (LLaMA, Qwen, Gemma3), and of
# the plain ones of OPT and GPT-2. The first is the one that is scored.
MLPS = ((("up_proj", "gate_proj"), "down_proj"), (("fc1",), "fc2"), (("c_fc",), "c_proj"))
_KNOWN = ", ".join(f"{' or '.join(rows)} beside {column}" for rows, column in MLPS)
FORMAT = "sparc3_lightning neurons 1"


@dataclass(frozen=True, slots=True)
class Neuron:
    """A neuron, and what is done to it.

    Args:
        module: Fully qualified name of its layer.
        index: Its row there.
        score: The one it was selected by.
        strength: 1 switches it off; a fraction leaves ``1 - strength`` of its activation.
        constant: What takes the place of what is taken away, times ``strength``: 0 for pruning, the neuron's mean
            activation for mean ablation.
    """

    module: str
    index: int
    score: float
    strength: float = 1.0
    constant: float = 0.0


@dataclass(frozen=True)
class _Mlp:
    """The layers of an MLP, and neurons of it."""

    rows: list[Any]
    column: Any
    neurons: list[Neuron]


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
        >>> chosen = select({"a": torch.tensor([0.0, -2.0]), "b": torch.tensor([-1.0, 3.0])}, 2)
        >>> [(neuron.module, neuron.index, neuron.score) for neuron in chosen]
        [('a', 1, -2.0), ('b', 0, -1.0)]
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
    """Switch neurons off, or damp them, for the length of a ``with`` block, without touching a weight.

    Args:
        model: A causal language model whose MLPs are in ``MLPS``.
        neurons: The neurons, each with its own strength and constant.
        strength: Times the strength of each.

    Raises:
        ValueError: If the model has no such neuron.
    """
    with ExitStack() as undo:
        for mlp in _by_mlp(model, neurons):
            factor, constant = _edit(mlp, strength)

            def damp(
                module: nn.Module, inputs: tuple[Tensor], factor: Tensor = factor, constant: Tensor | None = constant
            ) -> tuple[Tensor]:
                # Not a product alone: what is off is 0 even where the activation is infinite.
                damped = torch.where(factor == 0, 0, inputs[0] * factor)
                return (damped if constant is None else damped + constant,)

            undo.callback(mlp.column.register_forward_pre_hook(damp).remove)
        yield


def _edit(mlp: _Mlp, strength: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Return the factor of each activation, and what is added to it; None if nothing is."""
    weight = weight_of(mlp.column)
    like: Any = {"device": weight.device, "dtype": weight.dtype}
    indices = [neuron.index for neuron in mlp.neurons]
    taken = [strength * neuron.strength for neuron in mlp.neurons]
    factor = torch.ones(weight.shape[1], **like)
    factor[indices] = torch.tensor([1 - part for part in taken], **like)
    if not any(neuron.constant for neuron in mlp.neurons):
        return factor, None
    constant = torch.zeros(weight.shape[1], **like)
    constant[indices] = torch.tensor([p * n.constant for p, n in zip(taken, mlp.neurons, strict=True)], **like)
    return factor, constant


def prune_(model: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Write what ``mask`` does into the weights, in place.

    The rows and the column of a neuron that is off become zero; a damped one keeps its rows, and its column becomes
    smaller. What takes the place of a neuron is constant, and goes into the bias of the layer after it.

    Args:
        model: A causal language model whose MLPs are in ``MLPS``.
        neurons: The neurons.

    Raises:
        ValueError: If the model has no such neuron, or its architecture has no bias to put a constant in. Nothing is
            changed then.
    """
    mlps = _by_mlp(model, neurons)
    if any(neuron.constant for mlp in mlps for neuron in mlp.neurons):
        _add_biases(model, mlps)
    with torch.no_grad():
        for mlp in mlps:
            off = [neuron.index for neuron in mlp.neurons if neuron.strength == 1]
            factor, constant = _edit(mlp)
            column = weight_of(mlp.column)
            if constant is not None:
                mlp.column.bias += column @ constant
            for row in mlp.rows:
                weight_of(row)[off] = 0
                if row.bias is not None:
                    row.bias[off] = 0
            column *= factor
            column[:, off] = 0  # where a weight is infinite


def _add_biases(model: Any, mlps: Iterable[_Mlp]) -> None:
    """Give the layers of all MLPs a bias of 0, where they have none and the architecture has one to switch on.

    Raises:
        ValueError: If it has none.
    """
    if all(mlp.column.bias is not None for mlp in mlps):
        return
    if getattr(model.config, "mlp_bias", None) is None:
        raise ValueError(
            f"The architecture {model.config.model_type!r} has no bias in its MLPs, so that a checkpoint of it has no "
            "place for the mean of a neuron: export with --model.edit off or damp. (LLaMA has the config's mlp_bias.)"
        )
    model.config.mlp_bias = True
    names = {name for rows, column in MLPS for name in (*rows, column)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is None and name.rpartition(".")[2] in names:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)


def neuron_layers(model: nn.Module) -> list[str]:
    """Return the name that the scored layer of an MLP has in each block of a model, such as ``up_proj``.

    Raises:
        ValueError: If the model has no MLP of a known kind.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [rows[0] for rows, column in MLPS if {*rows, column} <= names]
    if not found:
        raise ValueError(
            f"The model has no MLP of a known kind ({_KNOWN}): name the layers to score with --model.targets."
        )
    return found


def columns_of(model: nn.Module, modules: Iterable[str]) -> dict[str, Linear]:
    """Return the layer whose input is the activations of a module's neurons, by the name of the module.

    Raises:
        ValueError: If one of the modules is not a layer of MLP neurons.
    """
    return {name: _by_mlp(model, [Neuron(name, 0, 0.0)])[0].column for name in modules}


def check_neurons(model: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Raise ValueError unless the model has all these neurons. A model on the meta device suffices."""
    _by_mlp(model, neurons)


def _by_mlp(model: nn.Module, neurons: Iterable[Neuron]) -> list[_Mlp]:
    """Group neurons by the MLP they belong to."""
    groups: dict[str, _Mlp] = {}
    modules = dict(model.named_modules())
    for neuron in neurons:
        parent, _, layer = neuron.module.rpartition(".")
        rows, column = next(((rows, column) for rows, column in MLPS if layer in rows), ((), ""))
        if not rows or not all(f"{parent}.{name}" in modules for name in (*rows, column)):
            raise ValueError(
                f"{neuron.module!r} is not a layer of MLP neurons of this model: expected {_KNOWN}. Is neurons.json "
                "of another model?"
            )
        num_neurons = len(weight_of(modules[neuron.module]))
        if not 0 <= neuron.index < num_neurons:
            raise ValueError(
                f"Neuron {neuron.index} of {neuron.module} does not exist: the layer has {num_neurons} neurons. "
                "Is neurons.json of another model?"
            )
        if parent not in groups:
            groups[parent] = _Mlp([modules[f"{parent}.{row}"] for row in rows], modules[f"{parent}.{column}"], [])
        groups[parent].neurons.append(neuron)
    return list(groups.values())


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
        """Return a hash of which neurons are in which list, in which order, and what is done to them."""
        lists = [[(n.module, n.index, n.strength, n.constant) for n in getattr(self, name)] for name in _LISTS]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write neurons.json, under a temporary name first."""
        content: dict[str, Any] = {"format": FORMAT}
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
            if not all(math.isfinite(neuron.score) and math.isfinite(neuron.constant) for neuron in neurons):
                raise ValueError(f"{path} holds a score or a constant that is NaN or infinite.")
            if not all(0 < neuron.strength <= 1 for neuron in neurons):
                raise ValueError(f"{path} holds a strength that is not above 0 and at most 1.")
        return cls(provenance=provenance, **lists)


_LISTS = ("neurons", "next", "least_relevant")
_PRUNED = {"strength": 1.0, "constant": 0.0}


def _row(neuron: Neuron) -> dict[str, Any]:
    """Return the fields of a neuron, without those that every pruned one shares."""
    return {name: value for name, value in asdict(neuron).items() if value != _PRUNED.get(name)}


def _read(row: dict[str, Any]) -> Neuron:
    edit = {name: float(row.get(name, value)) for name, value in _PRUNED.items()}
    return Neuron(str(row["module"]), operator.index(row["index"]), float(row["score"]), **edit)
