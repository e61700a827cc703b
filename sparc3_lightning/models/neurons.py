"""Neurons of MLPs: the layers they are in, and how they are masked for a while or pruned for good.

A neuron is a row of the first layers of its MLP, two rows where one layer holds the gate too, and a column of the last.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import (
    KNOWN_MLPS,
    MLPS,
    Linear,
    Mlp,
    blocks_of,
    check_indices,
    ends_in,
    is_block,
    linear_at,
    mlp_at,
    mlp_of,
    mlps_of,
    shape_of,
    stored,
    twins_of,
    weight_of,
    whole,
)
from sparc3_lightning.models.experts import count_in_words


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
class _Ablated:
    """An MLP, its last layer, and the ablation of its neurons."""

    mlp: Mlp
    column: Linear
    ablations: dict[int, Ablation] = field(default_factory=dict)


def scored_rows(model: nn.Module, modules: Iterable[str]) -> dict[str, slice]:
    """Return which rows of layers are those of their neurons, by the layers' fully qualified names.

    It is so for layers that hold the rows of a gate too; of any other these are all rows, and it is left out.
    """
    mlps = {name: mlp_at(model, name) for name in modules}
    return {name: mlp.part_of(name) for name, mlp in mlps.items() if mlp is not None and mlp.is_fused}


def num_neurons(model: nn.Module, module: str) -> int:
    """Return the number of neurons of a layer; of one that is none of an MLP it is the number of its rows."""
    mlp = mlp_at(model, module)
    return shape_of(linear_at(model, module))[0] if mlp is None else mlp.num_neurons


def neuron_norms(model: nn.Module, module: str) -> Tensor:
    """Return the norm of each neuron's incoming weights, shape ``[neurons]``; all ranks ask together if sharded."""
    norms = whole(weight_of(linear_at(model, module)).float().norm(dim=1))
    return norms[scored_rows(model, [module]).get(module, slice(None))].cpu()


def coverage(model: nn.Module, modules: Collection[str], of_channels: Collection[str] = ()) -> str:
    """Return a sentence on how many of the MLP neurons some layers have, and what else blocks have.

    Args:
        model: A causal language model; one on the meta device suffices.
        modules: The scored layers by their fully qualified names.
        of_channels: Layers beside them whose inputs are scored.
    """
    mlps = mlps_of(model)
    number = {mlp.rows[0].layer: mlp.num_neurons for mlp in mlps}
    scored = {mlp.rows[0].layer: mlp.num_neurons for mlp in mlps if any(rows.layer in modules for rows in mlp.rows)}
    share = f"Scored 100 % of the MLP neurons: {count_in_words(model, number)}"
    if len(scored) < len(number):
        percent = 100 * sum(scored.values()) // sum(number.values())
        share = (
            f"Scored {percent} % of the MLP neurons: {count_in_words(model, scored)} of {count_in_words(model, number)}"
        )
    if of_channels:
        share += f", and {sum(shape_of(linear_at(model, name))[1] for name in of_channels):,} attention channels"
    others = _others(model, mlps, of_channels)
    return share + (f"; left out: {', '.join(others)}" if others else "")


def _others(model: nn.Module, mlps: Iterable[Mlp], of_channels: Collection[str]) -> list[str]:
    """Return the parts of blocks that have weights but no MLP or layer of channels in them, by name in the block."""
    layers = {layer for mlp in mlps for layer in mlp.layers}
    above = {layer[:i] for layer in layers for i, letter in enumerate(layer) if letter == "."}
    others: dict[str, None] = {}
    seen: set[nn.Parameter] = set()  # of the blocks before: some share their weights

    def walk(module: nn.Module, name: str, start: int) -> None:
        for end, child in module.named_children():
            of_child = f"{name}.{end}"
            if of_child in above:
                walk(child, of_child, start)
                continue
            weights = {weight for weight in child.parameters() if weight.dim() > 1} - seen
            if weights and of_child not in layers and not any(name.startswith(f"{of_child}.") for name in of_channels):
                others[of_child[start:]] = None
            seen.update(weights)

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks, outer = set(blocks_of(model) or [block for of_list in lists for block in of_list]), None
    for name, module in model.named_modules():
        if module in blocks and (outer is None or not name.startswith(outer)):
            outer = f"{name}."
            walk(module, name, len(outer))
    return list(others)


@contextmanager
def mask_neurons(model: nn.Module, neurons: Ablations, damping: float = 1.0) -> Iterator[None]:
    """Switch neurons off, or damp them, for the length of a ``with`` block, without touching a weight.

    Args:
        model: A causal language model.
        neurons: What is done to each neuron.
        damping: Times the damping of each.

    Raises:
        ValueError: If the model has no such neuron.
    """
    twins = twins_of(model)
    with ExitStack() as undo:
        for ablated in _by_mlp(model, neurons):
            factor, constant = _ablation(ablated, damping)
            off = (factor == 0).nonzero().squeeze(1)
            only_off = bool((factor == 1).sum() + len(off) == len(factor))

            def damp(
                module: nn.Module,
                inputs: tuple[Tensor],
                factor: Tensor | None = None if only_off else factor,
                off: Tensor = off,
                constant: Tensor | None = constant,
            ) -> tuple[Tensor]:
                # Not a product alone: what is off is 0 even where the activation is infinite.
                damped = (inputs[0] if factor is None else inputs[0] * factor).index_fill(-1, off, 0)
                return (damped if constant is None else damped + constant,)

            for column in (ablated.column, *twins.get(ablated.column, ())):
                undo.callback(column.register_forward_pre_hook(damp).remove)
        yield


def prune_neurons_(model: PreTrainedModel, neurons: Ablations) -> None:
    """Write the effect of ``mask_neurons`` into the weights, in place.

    The rows and the column of a neuron that is off become zero, or the column alone if the MLP has a norm between them;
    a damped one keeps its rows, and its column becomes smaller. What takes the place of a neuron is constant, and goes
    into the bias of the layer after it.

    Args:
        model: A causal language model.
        neurons: What is done to each neuron.

    Raises:
        ValueError: If the model has no such neuron, or its architecture has no bias to put a constant in. Nothing is
            changed then.
    """
    mlps = _by_mlp(model, neurons)
    check_have_place(model, neurons)
    if _have_constants(neurons):
        add_biases_(model, neurons)
    with torch.no_grad():
        for ablated in mlps:
            off = [index for index, ablation in ablated.ablations.items() if ablation.damping == 1]
            factor, constant = _ablation(ablated)
            column = weight_of(ablated.column)
            if constant is not None:
                ablated.column.bias.add_(column @ constant)
            # Where a norm lies between the activations and the column, the rows of one neuron tell on all others.
            for rows in () if _has_norm(model, ablated.mlp) else ablated.mlp.rows:
                layer = linear_at(model, rows.layer)
                weight_of(layer)[rows.part][off] = 0
                if layer.bias is not None:
                    layer.bias[rows.part][off] = 0
            column *= factor
            column[:, off] = 0  # where a weight is infinite


def _has_norm(model: nn.Module, mlp: Mlp) -> bool:
    """Tell whether an MLP, being a module of its own, has a norm of its activations, as BitNet's do.

    Gemma 3n's may have a threshold instead, which the gates of all its neurons make up.
    """
    parent = model.get_submodule(mlp.name)
    if getattr(parent, "activation_sparsity", 0) > 0:
        return True
    return not is_block(parent) and any(
        "norm" in type(child).__name__.lower() and all(len(weight) == mlp.num_neurons for weight in child.parameters())
        for child in parent.children()
    )


def check_neurons(model: nn.Module, neurons: Ablations) -> None:
    """Raise ValueError unless the model has all these neurons. A model on the meta device suffices."""
    _by_mlp(model, neurons)


def check_have_place(model: PreTrainedModel, neurons: Ablations) -> None:
    """Raise ValueError unless the constants of neurons, if they have any, can be written into the weights."""
    if _have_constants(neurons):
        check_have_biases(model, neurons)


def check_have_biases(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Raise ValueError unless the last layers of MLPs have a bias, or one to switch on, to put constants in.

    A model on the meta device suffices.

    Args:
        model: A causal language model.
        modules: Layers of neurons by their fully qualified names.
    """
    missing = _missing_biases(model, modules)
    if missing and not missing <= _biases_to_add(model).keys():
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
    known = [row for rows, _ in MLPS for row in rows]
    ends = {name: next((row for row in known if ends_in(name, row)), None) for name in modules}
    others = sorted({name.rpartition(".")[2] for name, end in ends.items() if end is None})
    if others:
        raise OptionError(
            "granularity",
            f"The rows of {', '.join(others)} are no neurons that could be switched off: expected {KNOWN_MLPS}. For an "
            "attention score its heads (sparc3 attribute --.granularity head), for other layers their weights "
            "(--.granularity weight of attribute and prune).",
        )
    mlps: dict[str, list[str]] = defaultdict(list)
    for name, end in ends.items():
        mlps[name.removesuffix(f".{end}")].append(str(end))
    for mlp, layers in mlps.items():
        if len(layers) > 1:
            first, second = next(rows for rows, _ in MLPS if set(layers) <= set(rows))
            raise OptionError(
                "layers",
                f"The neurons of {mlp} are scored twice, by their row in {first} and in {second}: attribute one of the "
                f"two (--.layers '[{first}]').",
            )


def layers_of_neurons(model: nn.Module, module: str) -> list[str]:
    """Return the layers whose weights hold the neurons of a layer, all by their fully qualified names."""
    return mlp_of(model, module).layers


def columns_of(model: nn.Module, modules: Iterable[str]) -> dict[str, Linear]:
    """Return the layer whose input is the activations of a module's neurons, by the name of the module.

    Raises:
        ValueError: If one of the modules is not a layer of MLP neurons.
    """
    return {name: linear_at(model, mlp_of(model, name).column) for name in modules}


def _by_mlp(model: nn.Module, neurons: Ablations) -> list[_Ablated]:
    """Return the MLPs that neurons belong to: up_proj and gate_proj name the same ones."""
    found: dict[str, _Ablated] = {}
    for name, ablations in neurons.items():
        mlp = mlp_of(model, name)
        check_indices("neuron", name, ablations, mlp.num_neurons)
        if mlp.column not in found:
            found[mlp.column] = _Ablated(mlp, linear_at(model, mlp.column))
        found[mlp.column].ablations.update(ablations)
    return list(found.values())


def _ablation(ablated: _Ablated, damping: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Return the factor of each activation, and the addend; None if nothing is added."""
    weight, indices = stored(ablated.column), list(ablated.ablations)
    taken = [damping * ablation.damping for ablation in ablated.ablations.values()]
    factor = torch.ones(ablated.mlp.num_neurons, device=weight.device, dtype=weight.dtype)
    factor[indices] = factor.new_tensor([1 - part for part in taken])
    if not any(ablation.mean for ablation in ablated.ablations.values()):
        return factor, None
    constant = torch.zeros_like(factor)
    constant[indices] = factor.new_tensor(
        [part * ablation.mean for part, ablation in zip(taken, ablated.ablations.values(), strict=True)]
    )
    return factor, constant


def _have_constants(neurons: Ablations) -> bool:
    return any(ablation.mean for ablations in neurons.values() for ablation in ablations.values())


def add_biases_(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Give the layers of all MLPs a bias of 0 if the last ones of these have none: an architecture has all or none.

    A model on the meta device suffices.

    Args:
        model: A causal language model that passes ``check_have_biases``.
        modules: Layers of neurons by their fully qualified names.
    """
    if not _missing_biases(model, modules):
        return
    for name, size in _biases_to_add(model).items():
        layer = linear_at(model, name.removesuffix(".bias"))
        layer.bias = nn.Parameter(layer.weight.new_zeros(size), requires_grad=False)
    model.config.mlp_bias = True


def _missing_biases(model: nn.Module, modules: Iterable[str]) -> set[str]:
    """Return the names of the biases that the last layers of MLPs lack."""
    columns = {mlp_of(model, name).column for name in modules}
    return {f"{column}.bias" for column in columns if linear_at(model, column).bias is None}


def _biases_to_add(model: PreTrainedModel) -> dict[str, int]:
    """Return the name and the size of each bias that the config's mlp_bias would switch on.

    What the model's class builds tells them: some have the option and do not heed it, or not in every MLP.
    """
    if getattr(model.config, "mlp_bias", None) is None:
        return {}
    config = copy.deepcopy(model.config)
    config.mlp_bias = True
    with torch.device("meta"):
        built = type(model)(config)
    known = {name for name, _ in model.named_parameters()}
    return {name: len(bias) for name, bias in built.named_parameters() if name not in known}
