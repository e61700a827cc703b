"""From gradients to scores: the pure functions, and the accumulator that turns a stream of samples into one result.

Shape letters: B samples, T tokens, I inputs and O outputs (neurons) of one linear layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Relevance = Literal["magnitude", "signed"]


def largest_logit(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the largest logit at the last token of each sample, with a graph down to the embeddings.

    The head is applied to the positions where a sample of the batch ends, so that no other logits are formed.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape.

    Returns:
        Shape ``[samples]``.
    """
    last = attention_mask.sum(dim=1) - 1
    positions, which = last.unique(return_inverse=True)
    # The weights are frozen, so the graph starts at the embeddings. The model is called as a whole, since that is what
    # gathers the weights of a sharded one.
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=positions
        ).logits
    finally:
        handle.remove()
    return logits[torch.arange(len(last), device=last.device), which].max(dim=-1).values


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose own name is one of ``targets``, by fully qualified name.

    Raises:
        ValueError: If a name matches no linear layer; the names there are are listed.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = {name.rpartition(".")[2] for name in linear}
    unknown = [target for target in targets if target not in kinds]
    if unknown:
        raise ValueError(f"--model.targets: the model has no linear layer {unknown[0]!r}; it has {sorted(kinds)}.")
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in targets}


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
    rows = []
    for A_TI, G_TO in zip(A_BTI, G_BTO, strict=True):
        rows.append((G_TO.T @ A_TI).mul_(W_OI).abs_().sum(dim=1, dtype=wide))
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


def squared_norms(A_BTI: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum the squares of a layer's input over the tokens, per sample.

    Args:
        A_BTI: Input of the layer, shape ``[samples, tokens, in_features]``.
        mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``.

    Returns:
        Sums, shape ``[samples, in_features]``, float32 or wider.
    """
    wide = torch.promote_types(A_BTI.dtype, torch.float32)
    return (A_BTI.to(wide).square() * mask_BT.unsqueeze(-1)).sum(dim=1)


def wanda_score(W_OI: Tensor, squares_I: Tensor) -> Tensor:
    """Sum the Wanda score of each neuron's incoming weights, sum_i |W_oi| ||X_i||_2.

    Source: Sun et al. 2023, arXiv:2306.11695, equation 1; Hatefi et al. 2025, equation 10.

    Args:
        W_OI: Weight, shape ``[out_features, in_features]``.
        squares_I: Sum of the squared inputs over all tokens of all samples, shape ``[in_features]``.

    Returns:
        Score per neuron, shape ``[out_features]``.
    """
    return W_OI.to(squares_I.dtype).abs() @ squares_I.sqrt()


def differential_relevance(general: Mapping[str, Tensor], behavior: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract the relevance for the behaviour from the general one: what is most negative serves the behaviour.

    Source: Hatefi et al. 2025, arXiv:2506.13727, equation 7.

    Args:
        general: Scores per module, each of shape ``[out_features]``, on general reference samples.
        behavior: The same on reference samples of the behaviour.

    Returns:
        The difference per module.

    Raises:
        ValueError: If the modules or shapes of the two differ.
    """
    if {name: score.shape for name, score in general.items()} != {n: s.shape for n, s in behavior.items()}:
        raise ValueError("The general scores and those of the behaviour are not of the same modules and shapes.")
    return {name: score - behavior[name] for name, score in general.items()}


def differential_strength(general: Mapping[str, Tensor], behavior: Mapping[str, Tensor]) -> float:
    """Return (sum R_general - sum R_behavior) / sum R_general, in percent.

    A reproduction of SparC3 asks for at least 15 % before it goes on. It partly measures the length of the samples.
    """
    total = sum(float(score.double().sum()) for score in general.values())
    difference = sum(float(score.double().sum()) for score in differential_relevance(general, behavior).values())
    return 100 * difference / total if total else float("nan")


class NonfiniteRelevanceError(ValueError):
    """A relevance is NaN or infinite."""


class ScoreAccumulator:
    """Collects the scores of linear layers over a stream of samples; hooks in, one frozen result out.

    For relevance, run the model inside ``with lrp(model), accumulator.recording(...)`` and call ``backward`` there:
    each layer's score is formed as its gradient arrives, so that neither gradients nor activations are kept. For Wanda
    a forward pass suffices.

    Args:
        modules: The target layers by their fully qualified name.
        score: ``magnitude`` or ``signed`` relevance, or ``wanda``.
        nonfinite: On NaN or infinity ``error`` names the module and the sample and stops; ``zero`` puts 0 in place of
            the value and counts it in ``num_nonfinite``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Linear],
        score: Literal["magnitude", "signed", "wanda"],
        nonfinite: Literal["error", "zero"] = "error",
    ) -> None:
        self.modules = dict(modules)
        self.score = score
        self.nonfinite = nonfinite
        self.sums: dict[str, Tensor] = {}
        self.num_samples = 0
        self.num_nonfinite = 0
        self._batch: dict[str, Tensor] = {}

    @contextmanager
    def recording(self, mask_BT: Tensor, sample_ids: list[str], weights_B: Tensor | None = None) -> Iterator[None]:
        """Record one batch, and add it to the sums on leaving the block.

        Args:
            mask_BT: 1 at tokens, 0 at padding, shape ``[samples, tokens]``.
            sample_ids: Names of the samples, for errors.
            weights_B: 1 for a sample, 0 for one that only fills the batch, shape ``[samples]``; by default all 1.

        Raises:
            NonfiniteRelevanceError: If a score is NaN or infinite and ``nonfinite`` is ``error``. Nothing of the batch
                is added then.
        """
        self._batch = {}
        handles = [
            module.register_forward_hook(self._hook(name, mask_BT), prepend=True)
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missing = self.modules.keys() - self._batch.keys()
        if missing:
            raise RuntimeError(f"No score arrived for {len(missing)} module(s), e.g. {sorted(missing)[0]}.")
        weights = torch.ones(len(mask_BT), device=mask_BT.device) if weights_B is None else weights_B
        self._check_finite(sample_ids, weights)
        for name, score in self._batch.items():
            # Not weights @ score: 0 times NaN is NaN. In double: the order of batches and ranks leaves no trace.
            total = score[weights > 0].sum(dim=0, dtype=torch.float64)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.num_samples += int(weights.sum())
        self._batch = {}

    def reduce_(self) -> None:
        """Add up the sums of all ranks, on each of them. Only sums cross ranks, never means or weights."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        flat = torch.cat([self.sums[name] for name in self.modules])
        counts = torch.tensor([self.num_samples, self.num_nonfinite], device=flat.device)
        torch.distributed.all_reduce(flat)
        torch.distributed.all_reduce(counts)
        sizes = [len(self.sums[name]) for name in self.modules]
        self.sums = dict(zip(self.modules, flat.split(sizes), strict=True))
        self.num_samples, self.num_nonfinite = counts.tolist()

    def compute(self) -> dict[str, Tensor]:
        """Return the scores: per module, shape ``[out_features]``, float32, on the CPU.

        Relevance is the mean over the samples; Wanda's norm is over all tokens of all samples.

        Raises:
            ValueError: If no sample was recorded.
        """
        if not self.num_samples:
            raise ValueError("No sample was recorded, so there is no score.")
        if self.score == "wanda":
            scores = {name: wanda_score(whole(self.modules[name].weight), s) for name, s in self.sums.items()}
        else:
            scores = {name: total / self.num_samples for name, total in self.sums.items()}
        return {name: scores[name].float().cpu() for name in self.modules}

    def _hook(self, name: str, mask_BT: Tensor):
        def record(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            A_BTI = inputs[0].detach()
            if self.score == "wanda":
                self._batch[name] = squared_norms(A_BTI, mask_BT)
            elif self.score == "magnitude":
                output.register_hook(lambda G: self._set(name, magnitude_relevance(module.weight.detach(), A_BTI, G)))
            else:
                Z_BTO = output.detach() if module.bias is None else output.detach() - module.bias.detach()
                output.register_hook(lambda G: self._set(name, signed_relevance(Z_BTO, G)))

        return record

    def _set(self, name: str, score: Tensor) -> None:
        self._batch[name] = score.detach()

    def _check_finite(self, sample_ids: list[str], weights_B: Tensor) -> None:
        finite = torch.stack([torch.isfinite(score).all(dim=1) for score in self._batch.values()])
        bad = (~finite & (weights_B > 0)).nonzero().tolist()
        if not bad:
            return
        if self.nonfinite == "error":
            names = list(self._batch)
            raise NonfiniteRelevanceError(
                f"The score of {names[bad[0][0]]} for sample {sample_ids[bad[0][1]]!r} is NaN or infinite (and "
                f"{len(bad) - 1} more module-sample pairs of this batch). Try --model.dtype float32; or put 0 in place "
                "of such values and count them, with --model.nonfinite zero."
            )
        for name, score in self._batch.items():
            self.num_nonfinite += int((~torch.isfinite(score[weights_B > 0])).sum())
            self._batch[name] = torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; then all ranks must ask for it together."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
