"""Targets of relevance: for each sample the one number that is propagated.

Shape letters: B samples, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Target = Literal["argmax", "text", "lexicon", "lexicon_probability", "logit_difference"]
LEXICAL = ("lexicon", "lexicon_probability")  # those that speak of a lexicon


def last_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the logits at the last token of each sample.

    The head is applied to the last token of each sample, so that no other logits are formed. All weights are frozen, so
    there is a graph only above an output that somebody asks the gradient of, as the accumulator does of its layers'.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding, which spares
            transformers a look at it.

    Returns:
        Shape ``[samples, vocabulary]``.
    """
    rows = torch.arange(len(input_ids), device=input_ids.device)
    last = -torch.ones_like(rows) if attention_mask is None else attention_mask.sum(dim=1) - 1
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows, last].unsqueeze(1),))
    try:
        # The model is called as a whole, since that is what gathers the weights of a sharded one.
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        handle.remove()
    return logits[:, 0]


def largest_logit(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the largest logit at the last token of each sample, shape ``[samples]``; see ``last_logits``."""
    return last_logits(model, input_ids, attention_mask).max(dim=-1).values


def logit_difference(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, contrast: Tensor
) -> Tensor:
    """Return the logit of one token less the logit of another, at the last token of each sample.

    Source: Wang et al. 2022, arXiv:2211.00593, section 2.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        contrast: The two tokens, shape ``[samples, 2]``.

    Returns:
        Shape ``[samples]``, float32 or wider.
    """
    logits_BV = last_logits(model, input_ids, attention_mask)
    first, second = logits_BV.gather(1, contrast).to(torch.promote_types(logits_BV.dtype, torch.float32)).unbind(dim=1)
    return first - second


def text_log_probability(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, start: Tensor
) -> Tensor:
    """Return the mean log-probability of each sample's own tokens, from one on.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        start: Per sample the first token that counts, such as the first one of a continuation, shape ``[samples]``. The
            first token of all is not predicted and never counts.

    Returns:
        Shape ``[samples]``, float32 or wider, in nats a token; 0 for a sample of which no token counts.
    """
    logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    nll_BT = torch.nn.functional.cross_entropy(logits_BTV.to(wide).transpose(1, 2), input_ids[:, 1:], reduction="none")
    positions = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    counts_BT = positions >= start.unsqueeze(1)
    if attention_mask is not None:
        counts_BT = counts_BT & (attention_mask[:, 1:] > 0)
    return -(nll_BT * counts_BT).sum(dim=1) / counts_BT.sum(dim=1).clamp(min=1)


def lexicon_log_probability(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, lexicon: Tensor
) -> Tensor:
    """Return the log-probability that the next token is one of a lexicon, averaged over all positions of each sample.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        lexicon: Token ids, shape ``[words]``.

    Returns:
        Shape ``[samples]``, float32 or wider, in nats.
    """
    log_BT = _log_of_lexicon(model, input_ids, attention_mask, lexicon)
    if attention_mask is None:
        return log_BT.mean(dim=1)
    return (log_BT * attention_mask).sum(dim=1) / attention_mask.sum(dim=1)


def lexicon_probability(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, start: Tensor, lexicon: Tensor
) -> Tensor:
    """Return the probability that the next token is one of a lexicon, averaged over the positions that count.

    Unlike its logarithm it weighs a position by how likely such a token is there at all, as sampling does. The position
    of the last token counts too, though what it predicts is no longer in the sample: on continuations of n tokens that
    the model itself drew it is the share of such tokens expected among n + 1, those and the one after them.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        start: Per sample the first token that counts: the position before it, which predicts it, is the first one
            averaged over, shape ``[samples]``.
        lexicon: Token ids, shape ``[words]``.

    Returns:
        Shape ``[samples]``, float32 or wider, in [0, 1].
    """
    probability_BT = _log_of_lexicon(model, input_ids, attention_mask, lexicon).exp()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    counts_BT = positions >= start.unsqueeze(1) - 1
    if attention_mask is not None:
        counts_BT = counts_BT & (attention_mask > 0)
    return (probability_BT * counts_BT).sum(dim=1) / counts_BT.sum(dim=1)


def _log_of_lexicon(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, lexicon: Tensor
) -> Tensor:
    """Return the log-probability of the lexicon after each position, shape ``[samples, tokens]``."""
    logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return logits_BTV[:, :, lexicon].logsumexp(dim=-1) - logits_BTV.logsumexp(dim=-1)


class Explained(TypedDict):
    """What a target needs of a batch: token ids, the first token that counts, and the tokens to compare."""

    input_ids: Tensor
    start: Tensor
    contrast: Tensor


def target_of(
    model: PreTrainedModel, target: Target, batch: Explained, attention_mask: Tensor | None, lexicon: Tensor
) -> Tensor:
    """Return the target of a name for each sample of a padded batch, shape ``[samples]``; see the functions above."""
    input_ids = batch["input_ids"]
    if target == "text":
        return text_log_probability(model, input_ids, attention_mask, batch["start"])
    if target == "lexicon_probability":
        return lexicon_probability(model, input_ids, attention_mask, batch["start"], lexicon)
    if target == "lexicon":
        return lexicon_log_probability(model, input_ids, attention_mask, lexicon)
    if target == "logit_difference":
        return logit_difference(model, input_ids, attention_mask, batch["contrast"])
    return largest_logit(model, input_ids, attention_mask)


def lexicon_of(
    tokenizer: PreTrainedTokenizerBase, score: Callable[[list[str]], Sequence[float]], threshold: float = 0.5
) -> list[int]:
    """Return the tokens that a scorer finds toxic by themselves.

    Args:
        tokenizer: Of the model.
        score: The toxicity of texts, in [0, 1].
        threshold: Least toxicity of a token.

    Raises:
        ValueError: If no token is that toxic.
    """
    special = set(tokenizer.all_special_ids)
    words = {i: str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special}
    # A scorer knows words: what is no letter, or half of one, tells it nothing.
    words = {i: word for i, word in words.items() if any(map(str.isalpha, word)) and "\ufffd" not in word}
    scores = dict(zip(words, score(list(words.values())), strict=True))
    lexicon = [i for i, value in scores.items() if value >= threshold]  # not where it is NaN
    if not lexicon:
        raise ValueError(f"The scorer finds none of the {len(words):,} words of the tokenizer toxic.")
    return lexicon
