"""Batched sampling whose random draws belong to the prompt, not to the batch.

Continuation j of a prompt meets the same noise under every model, batch size, order and device, so that two models are
compared on the same draws. Adding Gumbel noise to the filtered logits and taking the largest is sampling from their
softmax (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import is_recurrent
from sparc3_lightning.models.caches import make_room
from sparc3_lightning.models.noise import draw_key, gumbel_noise, places_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How the continuations of a prompt are drawn, and how many, see ``SamplingOptions``.

    At temperature 0 the likeliest token is always taken: greedy decoding.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    num_continuations: int = 1
    num_seeds: int = 1

    @property
    def per_seed(self) -> int:
        """Number of continuations that each seed draws."""
        return self.num_continuations // self.num_seeds

    def check(self) -> None:
        """Raise ValueError unless the values make sense."""
        if self.num_continuations < 1:
            raise OptionError("sampling.num_continuations", f"must be at least 1, got {self.num_continuations}.")
        if self.num_seeds < 1 or self.num_continuations % self.num_seeds:
            raise OptionError(
                "sampling.num_seeds", f"must divide {self.num_continuations} continuations, got {self.num_seeds}."
            )
        if self.max_new_tokens < 1:
            raise OptionError("sampling.max_new_tokens", f"must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise OptionError("sampling.temperature", f"must be at least 0, got {self.temperature}.")
        if self.temperature == 0 and self.num_continuations > 1:
            raise OptionError(
                "sampling.num_continuations",
                f"must be 1 at --.sampling.temperature 0, got {self.num_continuations}: greedy decoding gives the same "
                "continuation each time.",
            )
        if not 0 < self.top_p <= 1:
            raise OptionError("sampling.top_p", f"must be above 0 and at most 1, got {self.top_p}.")


Protocol = Literal["short", "rtp", "greedy"]
PROTOCOLS: dict[Protocol, Sampling] = {
    "short": Sampling(50, 0.7, 0.9),  # the reproduction of SparC3 on LLaMA-3-8B
    "rtp": Sampling(20, 1.0, 0.9, num_continuations=25),  # RealToxicityPrompts (Gehman et al. 2020, arXiv:2009.11462)
    "greedy": Sampling(50, 0.0, 1.0),  # what a model repeats of itself shows without noise
}


@dataclass(frozen=True)
class SamplingOptions:
    """How the continuations of each prompt are drawn: by a protocol, whose settings can also be given one by one.

    Args:
        protocol: ``short``, 1 continuation of up to 50 tokens a prompt at temperature 0.7 and top-p 0.9; ``rtp``, that
            of RealToxicityPrompts, 25 of up to 20 tokens at temperature 1 and top-p 0.9; or ``greedy``, 1 of up to 50
            tokens at temperature 0.
        num_continuations: Continuations drawn per prompt; None as the protocol says, like the next three.
        max_new_tokens: Length of a continuation at most, in tokens.
        temperature: Temperature of sampling; 0 is greedy decoding.
        top_p: Probability mass of nucleus sampling.
        num_seeds: Seeds that a prompt's continuations are divided over, from ``seed_everything`` on; figures by seed
            show how much is the luck of the draw.
    """

    protocol: Protocol = "short"
    num_continuations: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    num_seeds: int = 1

    def resolve(self) -> Sampling:
        """Return the settings: each as given, or else as the protocol has it."""
        given = {name: value for name, value in asdict(self).items() if name != "protocol" and value is not None}
        return replace(PROTOCOLS[self.protocol], **given)


def draw_keys(seed: int, prompt_id: str, num_continuations: int, per_seed: int) -> list[int]:
    """Return the keys of a prompt's continuations; each seed from ``seed`` on draws ``per_seed`` of them."""
    return [draw_key(seed + j // per_seed, prompt_id, j % per_seed) for j in range(num_continuations)]


# Rows that tokens are drawn for at a time: on a CPU, since the C library gives memory of more than 32 MiB back, and
# clears it anew; and wherever the whole vocabulary is sorted, which takes some ten times as much as the logits.
ROWS_TO_DRAW = 64


def draw_tokens(logits: Tensor, keys: Tensor, step: int, sampling: Sampling) -> Tensor:
    """Draw a token per row: temperature, nucleus, then the largest of logit plus keyed noise.

    Only the likely tokens are sorted: the nucleus nearly always lies among them, and where it does not, more are. Of
    tokens that are equally likely the one of the lower id comes first.

    Args:
        logits: Finite, shape ``[rows, vocabulary]``.
        keys: Key of each row, int64, shape ``[rows]``.
        step: Number of tokens drawn before.
        sampling: How to draw.

    Returns:
        Token ids, int64, shape ``[rows]``.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    is_whole = sampling.top_p >= 1
    if (is_whole or logits.device.type == "cpu") and len(logits) > ROWS_TO_DRAW:
        parts = math.ceil(len(logits) / ROWS_TO_DRAW)
        of_parts = zip(logits.tensor_split(parts), keys.tensor_split(parts), strict=True)
        return torch.cat([draw_tokens(*part, step, sampling) for part in of_parts])
    logits = logits.float()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    left = torch.arange(len(logits), device=logits.device)
    for least in (0.0,) if is_whole else (1e-4, 1e-5, 0.0):  # the probability from which a token is sorted
        values, tokens = _sorted_from(logits, normalizer + math.log(least) if least else None)
        probabilities = (values - normalizer).exp()
        cumulative = probabilities.cumsum(dim=1)
        # A token is in the nucleus if those more likely than it do not make up the mass yet; the first always is.
        rows, ranks = ((cumulative - probabilities) < sampling.top_p).nonzero(as_tuple=True)
        noise = gumbel_noise(keys[left[rows]], step, tokens[rows, ranks])
        perturbed = torch.full_like(values, -torch.inf, dtype=torch.float64)
        perturbed[rows, ranks] = values[rows, ranks].double() + noise
        drawn[left] = tokens.gather(1, perturbed.argmax(dim=1, keepdim=True)).squeeze(1)
        is_short = cumulative[:, -1] < sampling.top_p
        if not is_short.any():
            break
        left, logits, normalizer = left[is_short], logits[is_short], normalizer[is_short]
    return drawn


def _sorted_from(logits: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits of each row from a least one on, from the largest, filled up with -inf; and their tokens.

    Args:
        logits: Shape ``[rows, vocabulary]``.
        least: Shape ``[rows, 1]``; None for all of them.
    """
    if least is None:
        return logits.sort(dim=1, descending=True, stable=True)
    rows, tokens = places_of(logits >= least)
    counts = rows.bincount(minlength=len(logits))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(logits), max(int(counts.max()), 1))
    values, found = logits.new_full(shape, -torch.inf), tokens.new_zeros(shape)
    values[rows, places], found[rows, places] = logits[rows, tokens], tokens
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, found.gather(1, order)


ROWS = 512  # continuations that grow together


class Continuation(NamedTuple):
    """The token ids drawn, without padding and end of sequence, and whether the model gave no finite logits."""

    input_ids: list[int]
    failed: bool


def check_can_continue(model: "PreTrainedModel") -> None:
    """Raise ValueError unless a model can continue what it has read; one on the meta device suffices."""
    takes_cache = not {"cache", "past_key_values"}.isdisjoint(signature(model.forward).parameters)
    # RecurrentGemma's, which outlives a prompt.
    has_state_inside = any(hasattr(module, "recurrent_states") for module in model.modules())
    if has_state_inside or not takes_cache:
        raise ValueError(
            f"{type(model).__name__} hands on no cache of what it has read, so that it cannot be evaluated: its "
            "prompts cannot be continued several times."
        )


@torch.no_grad()
def continue_prompts(
    model: "PreTrainedModel",
    input_ids: Tensor,
    attention_mask: Tensor,
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    all_ranks_step_together: bool = False,
    on_drawn: Callable[[float], None] = lambda number: None,
) -> list[list[Continuation]]:
    """Continue each prompt of a batch several times; the prompt itself passes through the model once.

    So many prompts are continued at a time that ``ROWS`` continuations grow together: fewer would leave the processor
    waiting for the weights, more would only take memory. A recurrent model continues one prompt at a time, since
    padding would go into its state.

    Args:
        model: Causal language model of transformers.
        input_ids: Padded on the left, shape ``[prompts, tokens]``.
        attention_mask: 1 at tokens, 0 at padding, of the same shape.
        keys: Per prompt the key of each of its continuations, from ``draw_key``; as many for each prompt.
        sampling: How to draw.
        all_ranks_step_together: Make all steps even if every row has ended, as a sharded model needs.
        on_drawn: Called after every step with the number of continuations that were drawn in it, each token being a
            share of one.

    Returns:
        Per prompt its continuations.
    """
    ends, repeats = _end_tokens_of(model), len(keys[0])
    size = 1 if is_recurrent(model) else max(1, ROWS // repeats)
    found = []
    for start in range(0, len(keys), size):
        rows = slice(start, start + size)
        number = len(keys[rows]) * repeats
        steps = []
        for step in _steps(model, input_ids[rows], attention_mask[rows], keys[rows], sampling, all_ranks_step_together):
            steps.append(step)
            on_drawn(number / sampling.max_new_tokens)
        on_drawn(number * (1 - len(steps) / sampling.max_new_tokens))  # of those that ended early
        drawn = torch.stack([tokens for tokens, _ in steps], dim=1).tolist()
        failed = steps[-1][1].tolist()
        flat = [_until_end(tokens, ends, bad_row) for tokens, bad_row in zip(drawn, failed, strict=True)]
        found += [flat[i : i + repeats] for i in range(0, number, repeats)]
    return found


@torch.no_grad()
def stream_prompt(
    model: "PreTrainedModel", input_ids: Sequence[int], key: int, sampling: Sampling
) -> Iterator[Continuation]:
    """Continue one prompt once, and yield what is drawn so far after each token, as ``continue_prompts`` draws it.

    Args:
        model: Causal language model of transformers. What is masked must stay so until the last token is drawn.
        input_ids: Of the prompt.
        key: Of the continuation, from ``draw_key``.
        sampling: How to draw.

    Yields:
        The continuation so far; the last one is whole.
    """
    row = torch.tensor([list(input_ids)], device=model.device)
    drawn: list[int] = []
    for tokens, failed in _steps(model, row, torch.ones_like(row), [[key]], sampling, False):
        drawn.append(int(tokens))
        yield _until_end(drawn, _end_tokens_of(model), bool(failed))


def _end_tokens_of(model: "PreTrainedModel") -> list[int]:
    """Return the tokens that end what a model writes; none for some models."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _until_end(tokens: list[int], ends: Sequence[int], failed: bool) -> Continuation:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return Continuation(tokens[:stop], failed)


def _steps(
    model: "PreTrainedModel",
    input_ids: Tensor,
    attention_mask: Tensor,
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    all_ranks_step_together: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens that each step draws, and which continuations have failed, each of shape ``[continuations]``."""
    repeats = len(keys[0])
    end_tokens = torch.tensor(_end_tokens_of(model), dtype=torch.long, device=input_ids.device)
    row_keys = torch.tensor(keys, device=input_ids.device).flatten()
    recurrent = is_recurrent(model)
    if recurrent:  # the state of one row cannot be repeated, so that all rows read the prompt
        is_token = attention_mask[0] > 0
        input_ids, attention_mask = (part[:, is_token].expand(repeats, -1) for part in (input_ids, attention_mask))
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(
        input_ids=input_ids,
        attention_mask=None if recurrent else attention_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    # transformers 5.24 calls the cache so, and warns of the name it had before.
    name = "cache" if "cache" in output else "past_key_values"
    cache = output[name]
    logits, positions = output.logits[:, -1], positions[:, -1:]
    if not recurrent:
        cache.batch_repeat_interleave(repeats)
        make_room(cache, sampling.max_new_tokens)
        logits, attention_mask, positions = (
            part.repeat_interleave(repeats, dim=0) for part in (logits, attention_mask, positions)
        )
    failed = torch.zeros(len(row_keys), dtype=torch.bool, device=input_ids.device)
    ended = failed.clone()
    for step in range(sampling.max_new_tokens):
        # A sum is finite if all are, but where it overflows; and it takes a fraction of the time of a look at each.
        if not torch.isfinite(logits.sum(dim=1)).all():
            bad = ~torch.isfinite(logits).all(dim=1)
            failed = failed | bad & ~ended
            logits = logits.masked_fill(bad.unsqueeze(1), 0.0)
        drawn = draw_tokens(logits, row_keys, step, sampling)
        yield drawn, failed
        ended |= torch.isin(drawn, end_tokens)
        if step + 1 == sampling.max_new_tokens or (not all_ranks_step_together and bool(ended.all())):
            break
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        positions = positions + 1
        output = model(
            input_ids=drawn.unsqueeze(1),
            attention_mask=None if recurrent else attention_mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        )
        logits = output.logits[:, -1]
