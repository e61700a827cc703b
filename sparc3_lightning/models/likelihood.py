"""How likely a model finds a text: the hidden states that its head gets, and sums over windows in nats."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]  # from hidden states to what logits are made of
MOST_KEPT = 1 << 28  # bytes of what an original model predicts that are kept for the models compared with it


def last_hidden_state(model: "PreTrainedModel", input_ids: Tensor) -> Tensor:
    """Return the input of the head, shape ``[windows, tokens, hidden]``.

    The model is called as a whole, since that gathers the weights of a sharded one.

    Raises:
        ValueError: If the model makes more of its head's output than is known here, such as scaling it.
    """
    captured: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(
        lambda module, inputs, output: captured.append(output.last_hidden_state)
    )
    try:
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    finally:
        handle.remove()
    hidden = captured[0]
    _check_logits(model, hidden[:, -1], logits)
    return hidden


def _check_logits(model: "PreTrainedModel", hidden: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless logits are what ``_logits`` makes of hidden states."""
    off = (_logits(model, hidden) - logits).abs().amax()
    if off > 0.02 * logits.abs().amax():  # bfloat16 rounds to 0.004
        raise ValueError(
            f"The logits of {type(model).__name__} are not the output of its head, scaled or capped: there is no "
            "perplexity of this architecture."
        )


class Reference:
    """What the original model predicts for some windows: formed once for all models, as far as ``MOST_KEPT`` goes.

    Args:
        hidden: From ``last_hidden_state``, shape ``[windows, tokens, hidden]``.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self._kept: dict[tuple[int, int, int], Tensor] = {}
        self._left = MOST_KEPT

    def log_probabilities(
        self, model: "PreTrainedModel", row: int, start: int, end: int, head: Head | None = None
    ) -> Tensor:
        """Return those after the tokens at ``[start, end)`` of a window, shape ``[tokens, vocabulary]``.

        Args:
            model: Any of the models that are compared.
            row: Number of the window.
            start: First position.
            end: Position after the last one.
            head: Of the original model; None if it is the model's.
        """
        key = row, start, end
        if key in self._kept:
            return self._kept[key]
        found = _log_probabilities(model, self.hidden[row, start:end], head)
        if found.nbytes <= self._left:
            self._kept[key] = found
            self._left -= found.nbytes
        return found


def score_windows(
    model: "PreTrainedModel",
    hidden: Tensor,
    input_ids: Tensor,
    spans: Tensor,
    reference: Reference | None = None,
    chunk: int = 64,
    reference_head: Head | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of the last tokens of each window, and their divergence from another model.

    The head is applied to at most ``chunk`` positions at a time, and only to those that are scored.

    Args:
        model: Causal language model of transformers.
        hidden: From ``last_hidden_state``, shape ``[windows, tokens, hidden]``.
        input_ids: Windows padded on the right, shape ``[windows, tokens]``.
        spans: Slice of positions per window as ``[start, end)``, int64, shape ``[windows, 2]``: the tokens at these
            positions are predicted, each from all before it. ``start`` is at least 1.
        reference: Of the original model on the same windows; None for no divergence.
        chunk: Positions for which logits are held at a time.
        reference_head: Head of the original model; None if both have the same.

    Returns:
        Two sums over the scored tokens of each window, in nats, float64, shape ``[windows]``: the negative
        log-likelihood, and KL(original || model) between the predicted distributions (0 without a reference).
    """
    nll, divergence = torch.zeros(2, len(input_ids), dtype=torch.float64, device=input_ids.device)
    for row, (start, end) in enumerate(spans.tolist()):
        for low in range(start, end, chunk):
            high = min(low + chunk, end)
            logs = _log_probabilities(model, hidden[row, low - 1 : high - 1])
            nll[row] -= logs.gather(1, input_ids[row, low:high].unsqueeze(1)).double().sum()
            if reference is not None:
                theirs = reference.log_probabilities(model, row, low - 1, high - 1, reference_head)
                divergence[row] += (theirs - logs).mul_(theirs.exp()).sum(dim=1).double().sum()
    return nll, divergence


def _log_probabilities(model: "PreTrainedModel", hidden: Tensor, head: Head | None = None) -> Tensor:
    return _logits(model, hidden, head).log_softmax(dim=1)


def _logits(model: "PreTrainedModel", hidden: Tensor, head: Head | None = None) -> Tensor:
    config = model.config
    logits = (head or model.get_output_embeddings())(hidden).float()
    # What each family calls the number that it multiplies the output of its head by.
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if scale := getattr(config, name, None):
            logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite divides by it, HyperCLOVA X multiplies
        logits = logits / scale if config.model_type.startswith("granite") else logits * scale
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def check_logits(model: "PreTrainedModel") -> None:
    """Raise ValueError if ``last_hidden_state`` would refuse a model, which is on the meta device and is used up.

    Its decoder and its head are replaced by tiny ones: what the architecture makes of the head's output shows without
    any weights.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if head is None or head is decoder:
        raise ValueError(f"{type(model).__name__} has no decoder before its head: there is no perplexity of it.")
    width = head.weight.shape[1]
    hidden, weight = torch.linspace(-1, 1, 2 * width).view(1, 2, -1), torch.linspace(-1, 1, 4 * width).view(4, -1)
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    head.forward = lambda hidden: hidden @ weight.T
    with torch.no_grad():
        try:
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, logits_to_keep=1).logits
        except Exception:  # its forward needs more of a decoder: then the loaded model tells
            return
        _check_logits(model, hidden[:, -1], logits[:, -1].float())


def log_likelihoods(model: "PreTrainedModel", input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the log-likelihood of each text, sum over t >= 1 of log P(token t | tokens before it).

    Args:
        model: Causal language model of transformers.
        input_ids: Texts padded on the right, shape ``[texts, tokens]``; the first token is only read from.
        lengths: Tokens of each text without padding, int64, shape ``[texts]``.

    Returns:
        Shape ``[texts]``, float64, in nats.
    """
    spans = torch.stack([torch.ones_like(lengths), lengths], dim=1)
    nll, _ = score_windows(model, last_hidden_state(model, input_ids), input_ids, spans)
    return -nll
