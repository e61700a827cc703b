"""Single weights: how they are set to zero or made smaller for a while, or for good.

A weight is an entry of the ``[out_features, in_features]`` matrix of a linear layer, whichever way the layer keeps it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparc3_lightning.models.architectures import ALL, find_layers, linear_at, shape_of, weight_of, whole

Dampings = Mapping[tuple[int, int], float]  # by row and column


@contextmanager
def mask_weights(model: nn.Module, weights: Mapping[str, Dampings], damping: float = 1.0) -> Iterator[None]:
    """Set weights to zero, or damp them, inside a ``with`` block; their old values return after it.

    Args:
        model: A causal language model, which is not sharded.
        weights: Damping for each weight, by the name of its layer and its row and column: 1 makes it zero, a fraction
            leaves ``1 - damping`` of it.
        damping: Times the damping of each.

    Raises:
        ValueError: If the model has no such weight.
    """
    check_weights(model, weights)
    kept: list[tuple[Tensor, tuple[Tensor, Tensor], Tensor]] = []
    try:
        for name, dampings in weights.items():
            W_OI = weight_of(linear_at(model, name)).data
            place = _place(dampings, W_OI)
            kept.append((W_OI, place, W_OI[place]))
            W_OI[place] = _damped(W_OI[place], dampings, damping)
        yield
    finally:
        for W_OI, place, values in kept:
            W_OI[place] = values


def prune_weights_(model: nn.Module, weights: Mapping[str, Dampings]) -> None:
    """Write the effect of ``mask_weights`` into the weights, in place.

    Args:
        model: A causal language model, which is not sharded.
        weights: Damping for each weight, by the name of its layer and its row and column.

    Raises:
        ValueError: If the model has no such weight. Nothing is changed then.
    """
    check_weights(model, weights)
    for name, dampings in weights.items():
        W_OI = weight_of(linear_at(model, name)).data
        place = _place(dampings, W_OI)
        W_OI[place] = _damped(W_OI[place], dampings)


def check_weights(model: nn.Module, weights: Mapping[str, Iterable[tuple[int, int]]]) -> None:
    """Raise ValueError unless the model has all these weights. A model on the meta device suffices."""
    layers = find_layers(model, [ALL]) if weights else {}
    for name, places in weights.items():
        if name not in layers:
            raise ValueError(
                f"{name!r} is not a layer whose single weights can be pruned: expected a linear layer of this model "
                "other than its head. Is neurons.json of another model?"
            )
        rows, columns = shape_of(layers[name])
        for row, column in places:
            if not (0 <= row < rows and 0 <= column < columns):
                raise ValueError(
                    f"Weight [{row}, {column}] of {name} does not exist: the layer has {rows} x {columns} weights. Is "
                    "neurons.json of another model?"
                )


def weight_shape(model: nn.Module, module: str) -> tuple[int, ...]:
    """Return the numbers of rows and columns of a layer's weights."""
    return shape_of(linear_at(model, module))


def weight_magnitudes(model: nn.Module, module: str) -> Tensor:
    """Return the magnitude of each weight of a layer, shape ``[out_features, in_features]``, float32 on the CPU."""
    return whole(weight_of(linear_at(model, module))).float().abs().cpu()


def _place(dampings: Dampings, W_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of weights, as an index of their matrix."""
    rows, columns = torch.tensor(list(dampings), device=W_OI.device).T
    return rows, columns


def _damped(values: Tensor, dampings: Dampings, damping: float = 1.0) -> Tensor:
    """Return the damped values of weights, shape ``[weights]``."""
    taken = torch.tensor([damping * of_one for of_one in dampings.values()], dtype=torch.float64)
    factor = (1 - taken).to(values)
    # Not a product alone: what is off is 0 even where the weight is infinite.
    return torch.where(factor == 0, 0, values * factor)
