"""Weights rounded to few bits, as a quantized checkpoint has them; they stay in their dtype."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import ALL, find_layers, weight_of
from sparc3_lightning.models.experts import check_are_open

GROUP = 128  # inputs that share a scale
FEWEST_BITS, MOST_BITS = 2, 8


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round a weight to the nearest of ``2**bits - 1`` numbers, symmetric around 0, of each group of its inputs.

    The largest magnitude of a group, over ``2**(bits - 1) - 1``, is its step, so 0 stays 0. The last group of a row has
    the inputs that are left.

    Args:
        weight: Shape ``[out_features, in_features]``, finite.
        bits: Of a number, 2 to 8.
        group: Inputs in a group.

    Returns:
        The rounded weight, of the same shape and dtype.

    Raises:
        ValueError: If ``bits`` or ``group`` is out of range, or the weight is not finite.

    Example:
        >>> rounded(torch.tensor([[1.0, -0.3, 0.6, 0.0]]), bits=2, group=3).tolist()
        [[1.0, -0.0, 1.0, 0.0]]
    """
    check_bits([bits])
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}.")
    if not torch.isfinite(weight).all():
        raise ValueError("The weight holds NaN or infinity, which cannot be rounded.")
    rows, inputs = weight.shape
    groups = pad(weight.float(), (0, -inputs % group)).view(rows, -1, group)
    largest = 2 ** (bits - 1) - 1
    step = groups.abs().amax(dim=2, keepdim=True) / largest
    whole = torch.where(step > 0, groups / step, 0.0).round()
    return (whole * step).view(rows, -1)[:, :inputs].to(weight.dtype)


@torch.no_grad()
def round_(model: nn.Module, bits: int) -> None:
    """Round the weights of all linear layers of the blocks, in place; those of experts too.

    Embeddings, the head, the routers of experts, biases and norms stay as they are, as quantized checkpoints have them.

    Args:
        model: A causal language model.
        bits: Of a number.

    Raises:
        ValueError: As ``rounded``; the layer is named.
    """
    for name, layer in find_layers(model, [ALL]).items():
        weight = weight_of(layer)
        try:
            weight.copy_(rounded(weight, bits))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_can_be_rounded(skeleton: nn.Module) -> None:
    """Raise OptionError if a model, which may be on the meta device, has experts whose weights would not be rounded."""
    try:
        check_are_open(skeleton)
    except OptionError:
        raise OptionError(
            "bits", "must be []: the model has experts of no known kind, whose weights would not be rounded."
        ) from None


def check_bits(bits: list[int]) -> None:
    """Raise OptionError unless each number of bits can be rounded to, and comes once."""
    if not all(FEWEST_BITS <= number <= MOST_BITS for number in bits) or len(set(bits)) < len(bits):
        raise OptionError("bits", f"must be different numbers from {FEWEST_BITS} to {MOST_BITS}, got {bits}.")
