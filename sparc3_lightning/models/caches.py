"""The cache of what a model has read, for continuations that grow by a token at a time."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for the tokens to come: a step writes its own, and copies no others.

    Args:
        keys: Of the tokens so far, shape ``[rows, heads, tokens, width]``.
        values: The same.
        room: Tokens to come.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._parts = [
            part.new_empty(*part.shape[:-2], part.shape[-2] + room, part.shape[-1]) for part in (keys, values)
        ]
        self._length = 0
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, and return all keys and values."""
        start, number = self._length, key_states.shape[-2]
        self._length += number
        for part, new in zip(self._parts, (key_states, value_states), strict=True):
            part.narrow(-2, start, number).copy_(new)
        keys, values = (part.narrow(-2, 0, self._length) for part in self._parts)
        self.keys, self.values = keys, values
        return keys, values


def make_room(cache: Cache, room: int) -> None:
    """Give the layers of a cache that hold all tokens room for those to come, in place.

    Others, such as those of windows, are left as they are.

    Args:
        cache: Of a model of transformers.
        room: Tokens to come.
    """
    layers = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layers[i] = _Roomy(layer.keys, layer.values, room)
