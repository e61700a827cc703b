"""What tests of relevance need: tiny models, and all of their arithmetic in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Two kinds of layer, and a window that is shorter than the input.
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}


class _Float64(TorchFunctionMode):
    """Puts float64 in place of float32, to which norms, rotations and softmax cast whatever the dtype of the model."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Compute all of a float64 model in float64, so that an oracle can be met to more than six digits."""
    with _Float64():
        yield


@pytest.fixture
def make(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of tiny models as ``make_model``, Gemma3 with both kinds of attention layer."""

    def make(family: str = "llama", **changes: Any) -> Any:
        return make_model(family, **{**(GEMMA3 if family == "gemma3_text" else {}), **changes})

    return make


@pytest.fixture
def layer() -> dict[str, Tensor]:
    """Random weight, input, output and gradient of a small layer, float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W": (4, 3), "A": (2, 5, 3), "Z": (2, 5, 4), "G": (2, 5, 4)}
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
