"""Attention heads: their relevance at the input of o_proj, and how they are masked for a while or pruned for good.

A head is a block of ``head_dim`` inputs of its layer's o_proj. Shape letters: B samples, T tokens, H heads, I inputs
and O outputs of o_proj.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparc3_lightning.relevance import weight_relevance, whole

OUTPUT, VALUE = "o_proj", "v_proj"


def is_heads(module: str) -> bool:
    """Tell whether the components of a layer, by its fully qualified name, are heads."""
    return module.rpartition(".")[2] == OUTPUT


def head_dim(model: Any, module: str) -> int:
    """Return how many inputs of an o_proj belong to one head.

    Raises:
        ValueError: If ``module`` is not the o_proj of an attention that says so.
    """
    parent = module.rpartition(".")[0]
    try:
        size = model.get_submodule(parent).head_dim if is_heads(module) else None
        model.get_submodule(module)
    except AttributeError:
        size = None
    if size is None:
        raise ValueError(
            f"{module!r} is not a layer of attention heads of this model: expected the name of an {OUTPUT} of an "
            "attention with a head_dim. Is neurons.json of another model?"
        )
    return size


def head_dims(model: Any, modules: Iterable[str]) -> dict[str, int]:
    """Return the ``head_dim`` of each of several o_proj."""
    return {module: head_dim(model, module) for module in modules}


def num_heads(model: Any, module: str) -> int:
    """Return the number of heads before an o_proj; see ``head_dim``."""
    size = head_dim(model, module)  # first, since it says what is wrong
    return model.get_submodule(module).in_features // size


def sum_heads(values: Tensor, head_dim: int) -> Tensor:
    """Sum over the dimensions of each head, shape ``[..., inputs]`` to ``[..., heads]``."""
    return values.unflatten(-1, (-1, head_dim)).sum(dim=-1)


def head_relevance(
    W_OI: Tensor,
    A_BTI: Tensor,
    G_BTO: Tensor,
    head_dim: int,
    form: Literal["magnitude", "signed", "absolute", "squared"],
) -> Tensor:
    """Return the relevance of each head, per sample.

    ``signed`` is the sum of z * dtarget/dz over the tokens and the head's dimensions, z being the input of o_proj; it
    equals the sum of the signed relevance of the head's weights in o_proj. ``magnitude`` sums |relevance| over these
    weights, as for a neuron over its incoming ones. ``squared`` sums the square of the head's share at each token,
    and ``absolute`` is the magnitude of what is signed.

    Args:
        W_OI: Weight of o_proj, shape ``[out_features, in_features]``.
        A_BTI: Input of o_proj, shape ``[samples, tokens, in_features]``.
        G_BTO: Gradient of the target with respect to o_proj's output under LRP, shape
            ``[samples, tokens, out_features]``; zero at padding.
        head_dim: Inputs that belong to one head.
        form: How relevance is summed.

    Returns:
        Shape ``[samples, heads]``, float32 or wider, in logits (squared: in their square).
    """
    wide = torch.promote_types(W_OI.dtype, torch.float32)
    if form == "magnitude":
        rows = []
        for A_TI, G_TO in zip(A_BTI, G_BTO, strict=True):
            tiles = weight_relevance(W_OI, A_TI, G_TO)
            rows.append(torch.stack([R_OI.abs_().sum(dim=0, dtype=wide) for _, R_OI in tiles]).sum(dim=0))
        return sum_heads(torch.stack(rows), head_dim)
    R_BTH = sum_heads(A_BTI.to(wide) * (G_BTO @ W_OI).to(wide), head_dim)
    if form == "squared":
        return R_BTH.square().sum(dim=1)
    return R_BTH.sum(dim=1) if form == "signed" else R_BTH.sum(dim=1).abs()


def head_norms(model: Any, module: str) -> Tensor:
    """Return the norm of each head's weights in o_proj, shape ``[heads]``; all ranks ask together if it is sharded."""
    W_OI = model.get_submodule(module).weight.float()
    return sum_heads(whole(W_OI.square().sum(dim=0)), head_dim(model, module)).sqrt()


@contextmanager
def mask_heads(model: nn.Module, heads: Mapping[str, Mapping[int, float]], strength: float = 1.0) -> Iterator[None]:
    """Switch heads off, or damp them, for the length of a ``with`` block, without touching a weight.

    Args:
        model: A causal language model whose attention has an o_proj.
        heads: Strength for each head, by the name of its o_proj and its number: 1 is off, a fraction leaves
            ``1 - strength`` of its output.
        strength: Times the strength of each.

    Raises:
        ValueError: If the model has no such head.
    """
    check_heads(model, heads)
    with ExitStack() as undo:
        for name, strengths in heads.items():
            factor = _factor(model, name, strengths, strength)

            def damp(module: nn.Module, inputs: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
                # Not a product alone: what is off is 0 even where the output is infinite.
                return (torch.where(factor == 0, 0, inputs[0] * factor),)

            undo.callback(model.get_submodule(name).register_forward_pre_hook(damp).remove)
        yield


def prune_heads_(model: Any, heads: Mapping[str, Mapping[int, float]]) -> None:
    """Write what ``mask_heads`` does into the weights, in place.

    The columns of a head in o_proj become smaller, or zero where it is off. The rows of v_proj that it reads become
    zero too, unless another head shares them (grouped-query attention) and is not off.

    Args:
        model: A causal language model whose attention has an o_proj and a v_proj.
        heads: Strength for each head, by the name of its o_proj and its number.

    Raises:
        ValueError: If the model has no such head. Nothing is changed then.
    """
    check_heads(model, heads)
    with torch.no_grad():
        for name, strengths in heads.items():
            output, factor = model.get_submodule(name), _factor(model, name, strengths)
            output.weight *= factor
            output.weight[:, factor == 0] = 0  # where a weight is infinite
            size = head_dim(model, name)
            value = model.get_submodule(f"{name.rpartition('.')[0]}.{VALUE}")
            group = num_heads(model, name) // (value.out_features // size)  # heads to a value head
            for k in range(value.out_features // size):
                if all(strengths.get(head) == 1 for head in range(k * group, (k + 1) * group)):
                    value.weight[k * size : (k + 1) * size] = 0
                    if value.bias is not None:
                        value.bias[k * size : (k + 1) * size] = 0


def check_heads(model: Any, heads: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError unless the model has all these heads. A model on the meta device suffices."""
    for name, indices in heads.items():
        number = num_heads(model, name)
        for index in indices:
            if not 0 <= index < number:
                raise ValueError(
                    f"Head {index} of {name} does not exist: the layer has {number} heads. Is neurons.json of another "
                    "model?"
                )


def _factor(model: Any, name: str, strengths: Mapping[int, float], strength: float = 1.0) -> Tensor:
    """Return the factor of each input of an o_proj, shape ``[in_features]``."""
    size, output = head_dim(model, name), model.get_submodule(name)
    factor = torch.ones(output.in_features, device=output.weight.device, dtype=output.weight.dtype)
    for index, of_head in strengths.items():
        factor[index * size : (index + 1) * size] = 1 - strength * of_head
    return factor
