"""From gradients to scores: the relevance of neurons, heads and weights, and Wanda's score, as pure functions.

Shape letters: B samples, T tokens, I inputs and O outputs (neurons) of one linear layer.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from sparc3_lightning.models.heads import sum_heads

Relevance = Literal["magnitude", "signed", "absolute", "squared", "fisher"]
TILE = 4096  # rows of a weight whose relevance is held at a time


def weight_relevance(W_OI: Tensor, A_TI: Tensor, G_TO: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the relevance of each weight for one sample, W * (G^T A), in tiles of rows.

    Source: Hatefi et al. 2025, arXiv:2506.13727, equation 8.

    Args:
        W_OI: Weight, shape ``[out_features, in_features]``.
        A_TI: Input of the layer, shape ``[tokens, in_features]``.
        G_TO: Gradient of the target with respect to the layer's output under LRP, shape ``[tokens, out_features]``;
            zero at padding.

    Yields:
        The rows, and their relevance, shape ``[rows, in_features]``, in logits; the caller may change it in place.
    """
    for start in range(0, len(W_OI), TILE):
        rows = slice(start, start + TILE)
        yield rows, (G_TO[:, rows].T @ A_TI).mul_(W_OI[rows])


def magnitude_relevance(W_OI: Tensor, A_BTI: Tensor, G_BTO: Tensor) -> Tensor:
    """Sum the magnitude of the relevance of each neuron's incoming weights, per sample: sum_i |W_oi (G^T A)_oi|.

    The product is formed one sample at a time, since the magnitude of a mean is not the mean of the magnitudes.

    Source: Hatefi et al. 2025, arXiv:2506.13727, equation 8, with the magnitude taken per sample.

    Args:
        W_OI: Weight, shape ``[out_features, in_features]``.
        A_BTI: Input of the layer, shape ``[samples, tokens, in_features]``.
        G_BTO: Gradient of the target with respect to the layer's output under LRP, shape
            ``[samples, tokens, out_features]``; zero at padding.

    Returns:
        Relevance per sample and neuron, shape ``[samples, out_features]``, float32 or wider, in logits.
    """
    wide = torch.promote_types(W_OI.dtype, torch.float32)
    rows = [
        torch.cat([R_OI.abs_().sum(dim=1, dtype=wide) for _, R_OI in weight_relevance(W_OI, A_TI, G_TO)])
        for A_TI, G_TO in zip(A_BTI, G_BTO, strict=True)
    ]
    return torch.stack(rows)


def signed_relevance(Z_BTO: Tensor, G_BTO: Tensor) -> Tensor:
    """Sum the signed relevance of each neuron's incoming weights, per sample: sum_t z_to g_to.

    This equals the row sum of weight times weight gradient, and needs neither.

    Source: Hatefi et al. 2025, arXiv:2506.13727, equation 8.

    Args:
        Z_BTO: Output of the layer less its bias, shape ``[samples, tokens, out_features]``.
        G_BTO: Gradient of the target with respect to that output under LRP, of the same shape; zero at padding.

    Returns:
        Relevance per sample and neuron, shape ``[samples, out_features]``, float32 or wider, in logits.
    """
    wide = torch.promote_types(Z_BTO.dtype, torch.float32)
    return (Z_BTO.to(wide) * G_BTO.to(wide)).sum(dim=1)


def absolute_relevance(Z_BTO: Tensor, G_BTO: Tensor) -> Tensor:
    """Return the magnitude of each neuron's signed relevance, per sample: |sum_t z_to g_to|.

    Unlike the sum of the magnitudes over a neuron's weights, what cancels within a sample does not count; unlike the
    signed relevance, what cancels between samples does.

    Args:
        Z_BTO: Output of the layer less its bias, shape ``[samples, tokens, out_features]``.
        G_BTO: Gradient of the target with respect to that output, of the same shape; zero at padding.

    Returns:
        Shape ``[samples, out_features]``, float32 or wider, in logits.
    """
    return signed_relevance(Z_BTO, G_BTO).abs()


def squared_relevance(Z_BTO: Tensor, G_BTO: Tensor) -> Tensor:
    """Sum the squares of each neuron's relevance over the tokens, per sample: sum_t (z_to g_to)^2.

    With the plain gradient of a text's log-probability this estimates what switching the neuron off costs: half the
    diagonal of the Fisher information of a factor on the neuron, token by token.

    Source: Theis et al. 2018, arXiv:1801.05787, equation 6, with each token for a sample.

    Args:
        Z_BTO: Output of the layer less its bias, shape ``[samples, tokens, out_features]``.
        G_BTO: Gradient of the target with respect to that output, of the same shape; zero at padding.

    Returns:
        Shape ``[samples, out_features]``, float32 or wider.
    """
    wide = torch.promote_types(Z_BTO.dtype, torch.float32)
    return (Z_BTO.to(wide) * G_BTO.to(wide)).square().sum(dim=1)


def fisher_information(S_GI: Tensor, num_samples: int) -> Tensor:
    """Sum the squares of each input's signed relevance over the chunks of each sample: sum_c (sum_t in c a_ti g_ti)^2.

    Each sum is the derivative of the target by a factor on the input at the tokens of a chunk. Where the target is the
    log-probability of next tokens that the model draws, its square is the Fisher information of that factor in the
    mean over the draws, in nats squared; half of it is the Kullback-Leibler divergence, in nats and to second order,
    that switching the input off costs at these tokens.

    Source: Kullback and Leibler 1951, Annals of Mathematical Statistics 22:79, section 6; as a cost of pruning Theis
    et al. 2018, arXiv:1801.05787, equation 6.

    Args:
        S_GI: Signed relevance of the inputs of a layer in each chunk, see ``signed_relevance``, shape
            ``[samples * chunks, in_features]``, the chunks of a sample one after the other.
        num_samples: Number of samples.

    Returns:
        Shape ``[samples, in_features]``.
    """
    return S_GI.unflatten(0, (num_samples, -1)).square().sum(dim=1)


def squared_norms(A_BTI: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Sum the squares of a layer's input over the tokens, per sample.

    Args:
        A_BTI: Input of the layer, shape ``[samples, tokens, in_features]``.
        mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``; None if there is no padding.

    Returns:
        Sums, shape ``[samples, in_features]``, float32 or wider.
    """
    wide = torch.promote_types(A_BTI.dtype, torch.float32)
    squares = A_BTI.to(wide).square()
    return (squares if mask_BT is None else squares * mask_BT.unsqueeze(-1)).sum(dim=1)


def wanda_score(W_OI: Tensor, squares_I: Tensor, of_neurons: bool = True) -> Tensor:
    """Return the Wanda score of each weight, |W_oi| ||X_i||_2, or its sum over each neuron's incoming weights.

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1; Hatefi et al. 2025, equation 10.

    Args:
        W_OI: Weight, shape ``[out_features, in_features]``.
        squares_I: Sum of the squared inputs over all tokens of all samples, shape ``[in_features]``.
        of_neurons: Whether to sum.

    Returns:
        Score per neuron, shape ``[out_features]``, or per weight, shape ``[out_features, in_features]``.
    """
    W_OI = W_OI.to(squares_I.dtype).abs()
    return W_OI @ squares_I.sqrt() if of_neurons else W_OI * squares_I.sqrt()


def head_relevance(W_OI: Tensor, A_BTI: Tensor, G_BTO: Tensor, head_dim: int, form: Relevance) -> Tensor:
    """Return the relevance of each head, per sample.

    ``signed`` is the sum of z * dtarget/dz over the tokens and the head's dimensions, z being the input of the
    attention's last layer; it equals the sum of the signed relevance of the head's weights there. ``magnitude`` sums
    |relevance| over these weights, as for a neuron over its incoming ones. ``squared`` sums the square of the head's
    share at each token, and ``absolute`` is the magnitude of what is signed.

    Args:
        W_OI: Weight of the attention's last layer, shape ``[out_features, in_features]``.
        A_BTI: Input of that layer, shape ``[samples, tokens, in_features]``.
        G_BTO: Gradient of the target with respect to its output under LRP, shape ``[samples, tokens, out_features]``;
            zero at padding.
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
