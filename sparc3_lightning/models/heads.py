"""Attention heads and channels: the layers they are in, and how they are masked for a while or pruned for good.

A head is a block of ``head_dim`` inputs of its attention's last layer, and a channel is one of these inputs.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparc3_lightning.models.architectures import (
    ALL,
    Linear,
    attention_of,
    check_indices,
    find_attention,
    find_layers,
    is_heads,
    linear_at,
    shape_of,
    twins_of,
    weight_of,
    whole,
)

Dampings = Mapping[int, float]  # by number


def head_dim(model: nn.Module, module: str) -> int:
    """Return how many inputs of an attention's last layer belong to one head.

    Raises:
        ValueError: If ``module`` is not the last layer of an attention of a known kind that has a ``head_dim``.
    """
    return attention_of(model, module).head_dim


def head_dims(model: nn.Module, modules: Iterable[str]) -> dict[str, int]:
    """Return the ``head_dim`` of each of several layers."""
    return {module: head_dim(model, module) for module in modules}


def layers_of_heads(model: nn.Module, module: str) -> list[str]:
    """Return the layers whose weights hold the heads of a layer, all by their fully qualified names."""
    values = attention_of(model, module).values
    return [module] if values is None else [f"{module.rpartition('.')[0]}.{values}", module]


def num_heads(model: nn.Module, module: str) -> int:
    """Return the number of heads before an attention's last layer; see ``head_dim``."""
    return num_channels(model, module) // head_dim(model, module)


def num_channels(model: nn.Module, module: str) -> int:
    """Return the number of inputs of an attention's last layer; see ``head_dim``."""
    return shape_of(attention_of(model, module).output)[1]


def heads_left_out(model: nn.Module) -> str | None:
    """Return a sentence on the layers that are called as the last one of an attention, but have no known heads.

    Some are no attentions; and the last blocks of Gemma 3n and 4 have no values of their own.
    """
    others = [name for name in find_layers(model, [ALL]) if is_heads(name) and find_attention(model, name) is None]
    return f"Left out: {len(others)} layers without known heads, such as {others[0]}" if others else None


def sum_heads(values: Tensor, head_dim: int) -> Tensor:
    """Sum over the dimensions of each head, shape ``[..., inputs]`` to ``[..., heads]``."""
    return values.unflatten(-1, (-1, head_dim)).sum(dim=-1)


def head_norms(model: nn.Module, module: str) -> Tensor:
    """Return the norm of each head's outgoing weights, shape ``[heads]``; all ranks ask together if sharded."""
    return sum_heads(_channel_squares(model, module), head_dim(model, module)).sqrt().cpu()


def channel_norms(model: nn.Module, module: str) -> Tensor:
    """Return the norm of each channel's outgoing weights, shape ``[channels]``; all ranks ask together if sharded."""
    return _channel_squares(model, module).sqrt().cpu()


def _channel_squares(model: nn.Module, module: str) -> Tensor:
    """Return the sum of the squares of each channel's outgoing weights, shape ``[channels]``."""
    return whole(weight_of(attention_of(model, module).output).float().square().sum(dim=0))


def mask_heads(model: nn.Module, heads: Mapping[str, Dampings], damping: float = 1.0) -> AbstractContextManager[None]:
    """Switch heads off, or damp them, for the length of a ``with`` block, without touching a weight.

    Args:
        model: A causal language model whose attentions are in ``ATTENTIONS``.
        heads: Damping for each head, by the name of its layer and its number: 1 is off, a fraction leaves
            ``1 - damping`` of its output.
        damping: Times the damping of each.

    Raises:
        ValueError: If the model has no such head.
    """
    check_heads(model, heads)
    return _masked(model, {name: _factor(model, name, of, damping) for name, of in heads.items()})


def mask_channels(
    model: nn.Module, channels: Mapping[str, Dampings], damping: float = 1.0
) -> AbstractContextManager[None]:
    """Switch channels off, or damp them, for the length of a ``with`` block; see ``mask_heads``."""
    check_channels(model, channels)
    return _masked(model, {name: _factor(model, name, of, damping, 1) for name, of in channels.items()})


@contextmanager
def _masked(model: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the inputs of layers, by their names, for the length of a ``with`` block."""
    twins = twins_of(model)
    with ExitStack() as undo:
        for name, factor in factors.items():

            def damp(module: nn.Module, inputs: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
                # Not a product alone: what is off is 0 even where the output is infinite.
                return (torch.where(factor == 0, 0, inputs[0] * factor),)

            output = linear_at(model, name)
            for layer in (output, *twins.get(output, ())):
                undo.callback(layer.register_forward_pre_hook(damp).remove)
        yield


def prune_heads_(model: nn.Module, heads: Mapping[str, Dampings]) -> None:
    """Write the effect of ``mask_heads`` into the weights, in place.

    The columns of a head in the attention's last layer become smaller, or zero where it is off. The rows of the values
    that it reads become zero too, unless another head shares them (grouped-query attention) and is not off, the
    attention may do more with its values, or it has their rows in an order that is not known.

    Args:
        model: A causal language model whose attentions are in ``ATTENTIONS``.
        heads: Damping for each head, by the name of its layer and its number.

    Raises:
        ValueError: If the model has no such head. Nothing is changed then.
    """
    check_heads(model, heads)
    with torch.no_grad():
        for name, dampings in heads.items():
            attention, factor = attention_of(model, name), _factor(model, name, dampings)
            size = attention.head_dim
            _scale_(attention.output, factor)
            if attention.values is None or not _reads_alone(model, name):
                continue
            # There are no more values than heads' outputs: in v_proj these are all rows, in c_attn the last ones.
            layer = linear_at(model, f"{name.rpartition('.')[0]}.{attention.values}")
            values = [weight_of(layer)[-len(factor) :]]
            if layer.bias is not None:
                values.append(layer.bias[-len(factor) :])
            group = len(factor) // len(values[0])  # heads to a value head
            for k in range(len(values[0]) // size):
                if all(dampings.get(head) == 1 for head in range(k * group, (k + 1) * group)):
                    for of_values in values:
                        of_values[k * size : (k + 1) * size] = 0


def prune_channels_(model: nn.Module, channels: Mapping[str, Dampings]) -> None:
    """Write the effect of ``mask_channels`` into the weights, in place.

    The column of a channel in the attention's last layer becomes smaller, or zero where it is off. The values that it
    is made of stay, since other heads may share them.

    Args:
        model: A causal language model whose attentions are in ``ATTENTIONS``.
        channels: Damping for each channel, by the name of its layer and its column there.

    Raises:
        ValueError: If the model has no such channel. Nothing is changed then.
    """
    check_channels(model, channels)
    with torch.no_grad():
        for name, dampings in channels.items():
            _scale_(attention_of(model, name).output, _factor(model, name, dampings, size=1))


def _scale_(layer: Linear, factor: Tensor) -> None:
    """Multiply each column of a layer's weight by its factor, in place."""
    W_OI = weight_of(layer)
    W_OI *= factor
    W_OI[:, factor == 0] = 0  # where a weight is infinite


def _reads_alone(model: nn.Module, module: str) -> bool:
    """Tell whether no more than the heads of one attention, each its own, reads the values.

    It is not so where blocks share them (Gemma 3n and 4), nor perhaps where there are weights beside those that every
    attention has: Doge makes its mask of the values, and DiffLlama shares them otherwise.
    """
    if getattr(getattr(model, "config", None), "num_kv_shared_layers", 0):
        return False
    parts = {name.partition(".")[0] for name, _ in model.get_submodule(module.rpartition(".")[0]).named_parameters()}
    others = parts - {"q_proj", "k_proj"} - {name.rpartition(".")[2] for name in layers_of_heads(model, module)}
    return all("norm" in name for name in others)


def check_heads(model: nn.Module, heads: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError unless the model has all these heads. A model on the meta device suffices."""
    for name, indices in heads.items():
        check_indices("head", name, indices, num_heads(model, name))


def check_channels(model: nn.Module, channels: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError unless the model has all these channels. A model on the meta device suffices."""
    for name, indices in channels.items():
        check_indices("channel", name, indices, num_channels(model, name))


def _factor(model: nn.Module, name: str, dampings: Dampings, damping: float = 1.0, size: int | None = None) -> Tensor:
    """Return the factor of each input of an attention's last layer, shape ``[in_features]``.

    Args:
        model: A causal language model.
        name: Of the layer.
        dampings: Of components there, by number.
        damping: Times each of them.
        size: Inputs of one component; None for heads.
    """
    attention = attention_of(model, name)
    weight, size = weight_of(attention.output), size or attention.head_dim
    factor = torch.ones(weight.shape[1], device=weight.device, dtype=weight.dtype)
    for index, of_head in dampings.items():
        factor[index * size : (index + 1) * size] = 1 - damping * of_head
    return factor
