"""Which rows of what a linear layer gets and gives belong to which sample, of a dense layer and of one of an expert."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparc3_lightning.models import experts
from sparc3_lightning.models.architectures import Linear
from sparc3_lightning.models.experts import ExpertLinear, num_experts, routing_of


class Unfolding:
    """Gives each sample, or each chunk of it, its rows of one call of a layer.

    A dense layer gets all tokens. A layer of an expert gets those that were routed to it: a sample has so many rows as
    the sample with most of them, and what is beyond its own is 0 and counts as padding does. So do the last rows of the
    last chunk, if the tokens are no whole number of chunks.

    Args:
        layer: That is being called.
        mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``; None if there is no padding.
        num_samples: Samples of the batch.
        chunk: Tokens of a chunk, from the first token of each sample on; None for whole samples.
    """

    def __init__(self, layer: Linear, mask_BT: Tensor | None, num_samples: int, chunk: int | None = None) -> None:
        self.num_samples = num_samples
        self.chunk = chunk
        self.mask_BT = mask_BT
        self.num_tokens: Tensor | None = None  # of each sample, whichever the expert saw; shape [samples, 1]
        self._place: tuple[Tensor, Tensor] | None = None
        if not isinstance(layer, ExpertLinear) or layer.tokens is None:
            return
        tokens, length = layer.tokens, layer.num_tokens // num_samples
        size = length if chunk is None else chunk
        chunks = -(-length // size)
        group_R = tokens // length * chunks + tokens % length // size
        # The tokens are ascending, so that the rows of a group lie side by side.
        ends = torch.searchsorted(group_R, torch.arange(num_samples * chunks + 1, device=tokens.device))
        self._shape = (num_samples * chunks, experts.most_rows(ends, len(tokens)))
        self._place = (group_R, torch.arange(len(tokens), device=tokens.device) - ends[group_R])
        real_R = torch.ones(len(tokens), 1, device=tokens.device)
        if mask_BT is None:
            self.num_tokens = torch.full((num_samples, 1), float(length), device=tokens.device)
        else:
            real_R = mask_BT.reshape(-1, 1)[tokens].to(real_R)
            self.num_tokens = mask_BT.sum(dim=1, keepdim=True)
        self.mask_BT = self(real_R).squeeze(-1)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return rows by sample, shape ``[samples, rows, features]``, without a gradient.

        Of chunks the shape is ``[samples * chunks, rows, features]``, the chunks of a sample one after the other.
        """
        rows = tensor.detach()
        if self._place is None:
            # OPT's MLP gets the tokens of all samples as one row after the other.
            by_sample = rows.reshape(self.num_samples, -1, rows.shape[-1])
            if self.chunk is None:
                return by_sample
            size = min(self.chunk, by_sample.shape[1])
            missing = -by_sample.shape[1] % size
            return torch.nn.functional.pad(by_sample, (0, 0, 0, missing)).reshape(-1, size, rows.shape[-1])
        unfolded = rows.new_zeros(*self._shape, rows.shape[-1])
        unfolded[self._place] = rows
        return unfolded


def tokens_seen(module: nn.Module, mask_BT: Tensor | None, real: Sequence[int], num_samples: int) -> Tensor:
    """Return how many tokens each expert saw when a module of experts was called last, shape ``[experts]``, float64.

    Args:
        module: Of the experts.
        mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``; None if there is no padding.
        real: The samples that count: another one only fills the batch.
        num_samples: Samples of the batch.
    """
    routing, number = routing_of(module), num_experts(module)
    tokens = routing.tokens
    counted_BT = torch.zeros(num_samples, routing.num_tokens // num_samples, dtype=torch.float64, device=tokens.device)
    counted_BT[list(real)] = 1.0
    if mask_BT is not None:
        counted_BT *= mask_BT
    # What is beyond the last expert is none.
    seen = counted_BT.new_zeros(number + 1)
    return seen.index_add_(0, routing.experts.clamp(max=number), counted_BT.flatten()[tokens])[:number]
