"""Targets of relevance: for each sample the one number that is propagated.

Shape letters: B samples, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3_lightning.attribution.lexicon import Kept, Lexicon
from sparc3_lightning.models.noise import draw_key, draw_rows

Target = Literal["argmax", "text", "lexicon", "lexicon_probability", "logit_difference", "sampled"]
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
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, lexicon: Lexicon
) -> Tensor:
    """Return the log-probability that the next token is one of a lexicon, averaged over all positions of each sample.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        lexicon: Whose ``tokens`` alone count.

    Returns:
        Shape ``[samples]``, float32 or wider, in nats.
    """
    logits_BTV = _logits(model, input_ids, attention_mask)
    log_BT = _log_of(lexicon.tokens, logits_BTV, logits_BTV.logsumexp(dim=-1))
    if attention_mask is None:
        return log_BT.mean(dim=1)
    return (log_BT * attention_mask).sum(dim=1) / attention_mask.sum(dim=1)


def lexicon_probability(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    start: Tensor,
    lexicon: Lexicon,
    kept: Kept | None = None,
) -> Tensor:
    """Return the probability that the next token completes a word of a lexicon, averaged over the positions that count.

    Unlike its logarithm it weighs a position by how likely such a token is there at all, as sampling does. The position
    of the last token counts too, though what it predicts is no longer in the sample: on continuations of n tokens that
    the model itself drew it is the share of such tokens expected among n + 1, those and the one after them.

    A word of one token is completed by it anywhere, or where no word is going on, see ``spell``. A word that the
    tokenizer splits is completed by its last token, at the positions where the sample's own tokens before are its
    first ones: the first token alone is that of other words as well. So the target is the expected number of words a
    token, of split ones too. Its gradient is that of the probability of all tokens of a word: at such a position the
    probability of the last token is multiplied by those of the first ones, each divided by its own value. A word that
    ends another one of the list, as the tokenizer splits them, counts beside it.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        start: Per sample the first token that counts: the position before it, which predicts it, is the first one
            averaged over, shape ``[samples]``.
        lexicon: The words as tokens.
        kept: Words whose probability is subtracted.

    Returns:
        Shape ``[samples]``, float32 or wider; in [0, 1], unless words end each other or some are subtracted.
    """
    logits_BTV = _logits(model, input_ids, attention_mask)
    all_BT = logits_BTV.logsumexp(dim=-1)

    def completing(words: Lexicon) -> Tensor:
        probability_BT = torch.zeros_like(all_BT)
        if len(words.tokens):
            probability_BT = _log_of(words.tokens, logits_BTV, all_BT).exp()
        if len(words.firsts):
            first_BT = _log_of(words.firsts, logits_BTV, all_BT).exp()
            probability_BT = probability_BT + first_BT * ~words.is_inside[input_ids]
        if words.split:
            probability_BT = probability_BT + _of_split(logits_BTV, all_BT, input_ids, attention_mask, start, words)
        return probability_BT

    probability_BT = completing(lexicon)
    if kept is not None:
        probability_BT = probability_BT - kept.weight * completing(kept.words)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    counts_BT = positions >= start.unsqueeze(1) - 1
    if attention_mask is not None:
        counts_BT = counts_BT & (attention_mask > 0)
    return (probability_BT * counts_BT).sum(dim=1) / counts_BT.sum(dim=1)


def sampled_log_probability(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, keys: Tensor
) -> Tensor:
    """Return the log-probability of next tokens that the model itself draws, added up over all positions of a sample.

    At each position one token is drawn that could follow there, at the last one too; the text goes on as it is. So the
    gradient is 0 in the mean over the draws, and its square is the Fisher information. No gradient passes through the
    draw.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the right, shape ``[samples, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape; None if there is no padding.
        keys: Key of the noise of each sample, from ``draw_key``, int64, shape ``[samples]``.

    Returns:
        Shape ``[samples]``, float32 or wider, in nats.
    """
    log_BTV = _logits(model, input_ids, attention_mask).log_softmax(dim=-1)
    positions_BT = torch.arange(input_ids.shape[1], device=keys.device).expand_as(input_ids)
    keys_BT = keys.unsqueeze(1).expand_as(input_ids)
    drawn = draw_rows(log_BTV.detach().flatten(0, 1), keys_BT.flatten(), positions_BT.flatten())
    log_BT = log_BTV.gather(2, drawn.view_as(input_ids).unsqueeze(2)).squeeze(2)
    return (log_BT if attention_mask is None else log_BT * attention_mask).sum(dim=1)


def _log_of(tokens: Tensor, logits_BTV: Tensor, all_BT: Tensor) -> Tensor:
    """Return the log-probability that the next token is one of some, shape ``[samples, tokens]``; see ``_of_split``."""
    return logits_BTV[:, :, tokens].logsumexp(dim=-1) - all_BT


def _of_split(
    logits_BTV: Tensor,
    all_BT: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    start: Tensor,
    lexicon: Lexicon,
) -> Tensor:
    """Return the probability that the next token completes a word of several tokens, shape ``[samples, tokens]``.

    Args:
        logits_BTV: Of the model.
        all_BT: Logarithm of the sum of their exponentials.
        input_ids: See ``lexicon_probability``, for the others too.
        attention_mask: The same.
        start: The same.
        lexicon: The same.
    """
    lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(dim=1).tolist()
    rows = zip(input_ids.tolist(), start.tolist(), lengths, strict=True)
    places = [
        (row, position, position - len(spelling.ids) + 2, spelling.ids[-1])
        for row, (ids, begin, length) in enumerate(rows)
        for position, spelling in lexicon.places(ids[:length], begin)
    ]
    if not places:
        return torch.zeros_like(all_BT)
    row, position, first, last = torch.tensor(places, device=all_BT.device).unbind(dim=1)
    own_BT = logits_BTV[:, :-1].gather(2, input_ids[:, 1:, None]).squeeze(2) - all_BT[:, :-1]
    # Of the tokens before each one; nothing predicts the first of all.
    before_BT = torch.nn.functional.pad(own_BT, (2, 0)).cumsum(dim=1)
    firsts = before_BT[row, position + 1] - before_BT[row, first]
    log = logits_BTV[row, position, last] - all_BT[row, position] + firsts - firsts.detach()
    return torch.zeros_like(all_BT).index_put((row, position), log.exp(), accumulate=True)


def _logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the logits after each position, float32 or wider, shape ``[samples, tokens, vocabulary]``."""
    logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))


class Explained(TypedDict):
    """What a target needs of a batch: token ids, names, the first token that counts, and the tokens to compare."""

    input_ids: Tensor
    sample_ids: list[str]
    start: Tensor
    contrast: Tensor


def target_of(
    model: PreTrainedModel,
    target: Target,
    batch: Explained,
    attention_mask: Tensor | None,
    lexicon: Lexicon,
    seed: int = 0,
    kept: Kept | None = None,
) -> Tensor:
    """Return the target of a name for each sample of a padded batch, shape ``[samples]``; see the functions above."""
    input_ids = batch["input_ids"]
    if target == "sampled":
        keys = torch.tensor([draw_key(seed, name) for name in batch["sample_ids"]], device=input_ids.device)
        return sampled_log_probability(model, input_ids, attention_mask, keys)
    if target == "text":
        return text_log_probability(model, input_ids, attention_mask, batch["start"])
    if target == "lexicon_probability":
        return lexicon_probability(model, input_ids, attention_mask, batch["start"], lexicon, kept)
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
