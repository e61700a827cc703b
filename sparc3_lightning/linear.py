"""Linear layers: torch's own, and the Conv1D of GPT-2, which keeps its weight transposed."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def weight_of(layer: Linear) -> Tensor:
    """Return the weight of a linear layer, shape ``[out_features, in_features]``: not a copy, so it can be written to.

    A weight that is sharded is so too.
    """
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
