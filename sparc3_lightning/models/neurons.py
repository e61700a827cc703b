"""Neurons of MLPs: the layers they are in, and how they are masked for a while or pruned for good.

A neuron is a row of the first layers of its MLP, and a column of the last one.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import KNOWN_MLPS, MLPS, Linear, check_indices, linear_at, weight_of, whole


class Ablation(NamedTuple):
    """What is done to a neuron.

    Args:
        damping: 1 switches it off; a fraction leaves ``1 - damping`` of its activation.
        mean: What takes the place of what is taken away, times ``damping``.
    """

    damping: float = 1.0
    mean: float = 0.0


Ablations = Mapping[str, Mapping[int, Ablation]]  # by the name of the scored layer and the row there


@dataclass(frozen=True)
class _Mlp:
    """The layers of an MLP, and the ablation of its neurons."""

    rows: list[Linear]
    column: Linear
    ablations: dict[int, Ablation] = field(default_factory=dict)


def num_neurons(model: nn.Module, module: str) -> int:
    """Return the number of neurons of a layer."""
    return len(weight_of(linear_at(model, module)))


def neuron_norms(model: nn.Module, module: str) -> Tensor:
    """Return the norm of each neuron's incoming weights, shape ``[neurons]``; all ranks ask together if sharded."""
    return whole(weight_of(linear_at(model, module)).float().norm(dim=1)).cpu()


@contextmanager
def mask_neurons(model: nn.Module, neurons: Ablations, damping: float = 1.0) -> Iterator[None]:
    """Switch neurons off, or damp them, for the length of a ``with`` block, without touching a weight.

    Args:
        model: A causal language model whose MLPs are in ``MLPS``.
        neurons: What is done to each neuron.
        damping: Times the damping of each.

    Raises:
        ValueError: If the model has no such neuron.
    """
    with ExitStack() as undo:
        for mlp in _by_mlp(model, neurons):
            factor, constant = _ablation(mlp, damping)

            def damp(
                module: nn.Module, inputs: tuple[Tensor], factor: Tensor = factor, constant: Tensor | None = constant
            ) -> tuple[Tensor]:
                # Not a product alone: what is off is 0 even where the activation is infinite.
                damped = torch.where(factor == 0, 0, inputs[0] * factor)
                return (damped if constant is None else damped + constant,)

            undo.callback(mlp.column.register_forward_pre_hook(damp).remove)
        yield


def prune_neurons_(model: PreTrainedModel, neurons: Ablations) -> None:
    """Write the effect of ``mask_neurons`` into the weights, in place.

    The rows and the column of a neuron that is off become zero; a damped one keeps its rows, and its column becomes
    smaller. What takes the place of a neuron is constant, and goes into the bias of the layer after it.

    Args:
        model: A causal language model whose MLPs are in ``MLPS``.
        neurons: What is done to each neuron.

    Raises:
        ValueError: If the model has no such neuron, or its architecture has no bias to put a constant in. Nothing is
            changed then.
    """
    mlps = _by_mlp(model, neurons)
    check_have_place(model, neurons)
    if _have_constants(neurons):
        add_biases_(model, [mlp.column for mlp in mlps])
    with torch.no_grad():
        for mlp in mlps:
            off = [index for index, ablation in mlp.ablations.items() if ablation.damping == 1]
            factor, constant = _ablation(mlp)
            column = weight_of(mlp.column)
            if constant is not None:
                mlp.column.bias.add_(column @ constant)
            for row in mlp.rows:
                weight_of(row)[off] = 0
                if row.bias is not None:
                    row.bias[off] = 0
            column *= factor
            column[:, off] = 0  # where a weight is infinite


def check_neurons(model: nn.Module, neurons: Ablations) -> None:
    """Raise ValueError unless the model has all these neurons. A model on the meta device suffices."""
    _by_mlp(model, neurons)


def check_have_place(model: PreTrainedModel, neurons: Ablations) -> None:
    """Raise ValueError unless the constants of neurons, if they have any, can be written into the weights."""
    if _have_constants(neurons):
        check_have_biases(model, columns_of(model, neurons).values())


def check_have_biases(model: PreTrainedModel, columns: Iterable[Linear]) -> None:
    """Raise ValueError unless layers have a bias, or their architecture has one to switch on, to put constants in.

    A model on the meta device suffices.
    """
    if any(column.bias is None for column in columns) and getattr(model.config, "mlp_bias", None) is None:
        raise OptionError(
            "ablation",
            f"The architecture {model.config.model_type!r} has no bias in its MLPs, so that a checkpoint of it has no "
            "place for the mean of a neuron: choose --.ablation zero. (LLaMA has the config's mlp_bias.)",
        )


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
            "layers",
            f"The neurons of {mlps.most_common(1)[0][0]} are scored twice, by their row in up_proj and in gate_proj: "
            "attribute one of the two (--.layers '[up_proj]').",
        )


def layers_of_neurons(module: str) -> list[str]:
    """Return the layers whose weights hold the neurons of a layer, all by their fully qualified names."""
    parent, _, layer = module.rpartition(".")
    rows, column = next((rows, column) for rows, column in MLPS if layer in rows)
    return [f"{parent}.{part}" for part in (*rows, column)]


def columns_of(model: nn.Module, modules: Iterable[str]) -> dict[str, Linear]:
    """Return the layer whose input is the activations of a module's neurons, by the name of the module.

    Raises:
        ValueError: If one of the modules is not a layer of MLP neurons.
    """
    return {name: _by_mlp(model, {name: {}})[0].column for name in modules}


def _by_mlp(model: nn.Module, neurons: Ablations) -> list[_Mlp]:
    """Return the MLPs that neurons belong to: up_proj and gate_proj name the same ones."""
    mlps: dict[str, _Mlp] = {}
    modules = dict(model.named_modules())
    for name, ablations in neurons.items():
        parent, _, layer = name.rpartition(".")
        rows, column = next(((rows, column) for rows, column in MLPS if layer in rows), ((), ""))
        if not rows or not all(f"{parent}.{part}" in modules for part in (*rows, column)):
            raise ValueError(
                f"{name!r} is not a layer of MLP neurons of this model: expected {KNOWN_MLPS}. Is neurons.json of "
                "another model?"
            )
        check_indices("neuron", name, ablations, num_neurons(model, name))
        if parent not in mlps:
            layers = [linear_at(model, f"{parent}.{row}") for row in rows]
            mlps[parent] = _Mlp(layers, linear_at(model, f"{parent}.{column}"))
        mlps[parent].ablations.update(ablations)
    return list(mlps.values())


def _ablation(mlp: _Mlp, damping: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Return the factor of each activation, and the addend; None if nothing is added."""
    weight, indices = weight_of(mlp.column), list(mlp.ablations)
    taken = [damping * ablation.damping for ablation in mlp.ablations.values()]
    factor = torch.ones(weight.shape[1], device=weight.device, dtype=weight.dtype)
    factor[indices] = factor.new_tensor([1 - part for part in taken])
    if not any(ablation.mean for ablation in mlp.ablations.values()):
        return factor, None
    constant = torch.zeros_like(factor)
    constant[indices] = factor.new_tensor(
        [part * ablation.mean for part, ablation in zip(taken, mlp.ablations.values(), strict=True)]
    )
    return factor, constant


def _have_constants(neurons: Ablations) -> bool:
    return any(ablation.mean for ablations in neurons.values() for ablation in ablations.values())


def add_biases_(model: PreTrainedModel, columns: Iterable[Linear]) -> None:
    """Give the layers of all MLPs a bias of 0 if these columns have none: an architecture has biases in all or none.

    A model on the meta device suffices.
    """
    if all(column.bias is not None for column in columns):
        return
    model.config.mlp_bias = True
    names = {name for rows, column in MLPS for name in (*rows, column)}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is None and name.rpartition(".")[2] in names:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
