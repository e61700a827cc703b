"""What a component of a model is, a neuron, a head or a weight; how it is masked for a while, or pruned for good."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import KNOWN_MLPS, MLPS, Linear, is_heads, weight_of
from sparc3_lightning.models.heads import check_heads, mask_heads, prune_heads_
from sparc3_lightning.models.weights import check_weights, mask_weights, prune_weights_

Granularity = Literal["neuron", "head", "weight"]
Key = tuple[str, int] | tuple[str, int, int]  # module and index, and of a weight its input


@dataclass(frozen=True, slots=True)
class Component:
    """A neuron, a head or a single weight, and what is done to it.

    Args:
        module: Fully qualified name of its layer; of a head the last one of its attention, of a weight any linear one.
        index: Its row there; of a head its number.
        score: The one it was selected by.
        strength: 1 switches it off; a fraction leaves ``1 - strength`` of its activation.
        constant: What takes the place of what is taken away, times ``strength``: 0 for pruning, the neuron's mean
            activation for mean ablation. Of a head or a weight always 0.
        input: Of a weight its column, the layer's weight being ``[out_features, in_features]``; else None.
    """

    module: str
    index: int
    score: float
    strength: float = 1.0
    constant: float = 0.0
    input: int | None = None

    @property
    def key(self) -> Key:
        """What tells it from any other of its model, whatever is done to it."""
        return (self.module, self.index) if self.input is None else (self.module, self.index, self.input)

    @property
    def granularity(self) -> Granularity:
        """Which kind of component it is."""
        if self.input is not None:
            return "weight"
        return "head" if is_heads(self.module) else "neuron"


@dataclass(frozen=True)
class _Mlp:
    """The layers of an MLP, and neurons of it."""

    rows: list[Any]
    column: Any
    neurons: list[Component]


@contextmanager
def mask(model: nn.Module, neurons: Iterable[Component], strength: float = 1.0) -> Iterator[None]:
    """Switch neurons, heads or weights off, or damp them, for the length of a ``with`` block.

    Of neurons and heads no weight is touched; single weights are what they were after the block.

    Args:
        model: A causal language model whose MLPs are in ``MLPS``.
        neurons: The neurons, heads and weights, each with its own strength and constant.
        strength: Times the strength of each.

    Raises:
        ValueError: If the model has no such neuron.
    """
    weights, heads, neurons = _apart(neurons)
    with ExitStack() as undo:
        undo.enter_context(mask_heads(model, heads, strength))
        undo.enter_context(mask_weights(model, weights, strength))
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


def prune_(model: nn.Module, neurons: Iterable[Component]) -> None:
    """Write what ``mask`` does into the weights, in place.

    The rows and the column of a neuron that is off become zero; a damped one keeps its rows, and its column becomes
    smaller. What takes the place of a neuron is constant, and goes into the bias of the layer after it.

    Args:
        model: A causal language model whose MLPs are in ``MLPS``.
        neurons: The neurons, heads and weights.

    Raises:
        ValueError: If the model has no such neuron, or its architecture has no bias to put a constant in. Nothing is
            changed then.
    """
    weights, heads, neurons = _apart(neurons)
    mlps = _by_mlp(model, neurons)
    check_heads(model, heads)
    check_weights(model, weights)
    if any(neuron.constant for mlp in mlps for neuron in mlp.neurons):
        _add_biases(model, mlps)
    prune_heads_(model, heads)
    prune_weights_(model, weights)
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


def check_have_biases(model: Any, columns: Iterable[Linear]) -> None:
    """Raise ValueError unless layers have a bias, or their architecture has one to switch on, to put constants in.

    A model on the meta device suffices.
    """
    if any(column.bias is None for column in columns) and getattr(model.config, "mlp_bias", None) is None:
        raise OptionError(
            "replacement",
            f"The architecture {model.config.model_type!r} has no bias in its MLPs, so that a checkpoint of it has no "
            "place for the mean of a neuron: choose --.replacement zero. (LLaMA has the config's mlp_bias.)",
        )


def _add_biases(model: Any, mlps: Iterable[_Mlp]) -> None:
    """Give the layers of all MLPs a bias of 0, where they have none and the architecture has one to switch on.

    Raises:
        ValueError: If it has none.
    """
    columns = [mlp.column for mlp in mlps]
    check_have_biases(model, columns)
    if all(column.bias is not None for column in columns):
        return
    model.config.mlp_bias = True
    names = {name for rows, column in MLPS for name in (*rows, column)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is None and name.rpartition(".")[2] in names:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)


def columns_of(model: nn.Module, modules: Iterable[str]) -> dict[str, Linear]:
    """Return the layer whose input is the activations of a module's neurons, by the name of the module.

    Raises:
        ValueError: If one of the modules is not a layer of MLP neurons.
    """
    return {name: _by_mlp(model, [Component(name, 0, 0.0)])[0].column for name in modules}


def check_are_neurons(modules: Collection[str]) -> None:
    """Raise ValueError unless the rows of layers, by their fully qualified names, are MLP neurons, each once.

    The rows of other layers have scores too, but there is nothing to switch off: what a row of an attention writes is
    a sum over its heads. Needs no model.
    """
    known = {row for rows, _ in MLPS for row in rows}
    others = sorted({name.rpartition(".")[2] for name in modules} - known)
    if others:
        raise OptionError(
            "granularity",
            f"The rows of {', '.join(others)} are no neurons that could be switched off: expected {KNOWN_MLPS}. For an "
            "attention score its heads (sparc3 attribute --.granularity head), for other layers their weights "
            "(--.granularity weight of attribute and prune).",
        )
    mlps = Counter(name.rpartition(".")[0] for name in modules)
    if max(mlps.values()) > 1:
        raise OptionError(
            "targets",
            f"The neurons of {mlps.most_common(1)[0][0]} are scored twice, by their row in up_proj and in gate_proj: "
            "attribute one of the two (--.targets '[up_proj]').",
        )


def check_neurons(model: nn.Module, neurons: Iterable[Component]) -> None:
    """Raise ValueError unless the model has all these neurons. A model on the meta device suffices."""
    weights, heads, neurons = _apart(neurons)
    check_weights(model, weights)
    check_heads(model, heads)
    _by_mlp(model, neurons)


def _apart(
    neurons: Iterable[Component],
) -> tuple[dict[str, dict[tuple[int, int], float]], dict[str, dict[int, float]], list[Component]]:
    """Return the strength of each weight and each head, by the name of its layer and its place; and the others."""
    weights: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    heads: dict[str, dict[int, float]] = defaultdict(dict)
    others = []
    for neuron in neurons:
        if neuron.constant and neuron.granularity != "neuron":
            what = "Head" if neuron.input is None else "A weight of neuron"
            raise ValueError(f"{what} {neuron.index} of {neuron.module} has a constant, which only a neuron can have.")
        if neuron.input is not None:
            weights[neuron.module][neuron.index, neuron.input] = neuron.strength
        elif neuron.granularity == "head":
            heads[neuron.module][neuron.index] = neuron.strength
        else:
            others.append(neuron)
    return dict(weights), dict(heads), others


def _by_mlp(model: nn.Module, neurons: Iterable[Component]) -> list[_Mlp]:
    """Group neurons by the MLP they belong to."""
    groups: dict[str, _Mlp] = {}
    modules = dict(model.named_modules())
    for neuron in neurons:
        parent, _, layer = neuron.module.rpartition(".")
        rows, column = next(((rows, column) for rows, column in MLPS if layer in rows), ((), ""))
        if not rows or not all(f"{parent}.{name}" in modules for name in (*rows, column)):
            raise ValueError(
                f"{neuron.module!r} is not a layer of MLP neurons of this model: expected {KNOWN_MLPS}. Is "
                "neurons.json of another model?"
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
