"""How many neurons stay within a budget, a stated rise of perplexity: measured on a text, found by bisection."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.data.base import Batch
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import twins_of
from sparc3_lightning.models.batching import Batching
from sparc3_lightning.models.components import Component, Key, counts_of, in_words, mask
from sparc3_lightning.models.likelihood import last_hidden_state, score_windows
from sparc3_lightning.models.neurons import columns_of
from sparc3_lightning.selection.lowest import lowest_first
from sparc3_lightning.selection.prediction import Prediction

T = TypeVar("T")
FEWEST = 20  # neurons that a round of refinement considers at least
FIRST = 100  # neurons whose rise is measured first, where none is predicted
SLACK = 0.05  # share of the budget that may be left: which side of it a neuron more falls on is noise


@dataclass(frozen=True)
class Budget:
    """How far perplexity may rise on a text, from which the number of neurons follows.

    Args:
        max_perplexity_increase: Largest rise of perplexity, such as 0.01. As many neurons are taken as stay within it,
            and the damping with the highest sum of scores, or of benefits where neurons are ranked by benefit per cost.
            The text is ``--data``, in ``sparc3 run`` ``--budget_text``; its documents that were used to attribute are
            left out. None prunes ``num_neurons``.
        refine: Rounds that measure what each neuron costs among twice as many as were chosen, drop the tenth that gives
            least for it, and fill up; kept if the sum of scores grows.
    """

    max_perplexity_increase: float | None = None
    refine: int = 0

    def check(self, dampings: Sequence[float]) -> None:
        """Raise ValueError if a value makes no sense with the dampings to choose from."""
        if self.max_perplexity_increase is None and (len(dampings) > 1 or self.refine):
            raise OptionError(
                "dampings", "Several --.dampings, and --.budget.refine, need --.budget.max_perplexity_increase."
            )
        if self.max_perplexity_increase is not None and not self.max_perplexity_increase > 0:  # nor NaN
            raise OptionError("budget.max_perplexity_increase", f"must be above 0, got {self.max_perplexity_increase}.")
        if self.refine < 0:
            raise OptionError("budget.refine", f"must be at least 0, got {self.refine}.")


class PerplexityRise:
    """By how much perplexity on a text rises when neurons are off.

    Args:
        model: Causal language model of transformers, in evaluation mode.
        batches: Of the text. Every token but the first of each sample counts.
        batching: How many samples of a batch pass through the model at a time; None for all of them.
        on_read: Called after every batch with the number of its tokens.
        prediction: Of the rise, to be told beside it; None for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch],
        batching: Batching | None = None,
        on_read: Callable[[float], None] = lambda number: None,
        prediction: Prediction | None = None,
    ) -> None:
        self.model = model
        self.batching = batching
        self.prediction = prediction
        self._on_read = on_read
        device = next(model.parameters()).device
        self._batches = [(b["input_ids"].to(device), b["attention_mask"].sum(dim=1)) for b in batches]
        self.num_tokens = sum(int((lengths - 1).sum()) for _, lengths in self._batches)
        self.nats = self._nats()
        self._rises: dict[tuple[Component, ...], float] = {}

    @property
    def perplexity(self) -> float:
        """Perplexity of the model as it is."""
        return math.exp(self.nats)

    @property
    def measured(self) -> list[dict[str, float]]:
        """What was measured, in the order it was: number of neurons, damping and rise, and what was predicted if so."""
        return [
            {"num_neurons": len(neurons), "damping": _damping(neurons), "rise": rise}
            | ({"predicted": self.prediction.rise(neurons)} if self.prediction else {})
            for neurons, rise in self._rises.items()
        ]

    def __call__(self, neurons: Sequence[Component]) -> float:
        """Return perplexity with the neurons off, over that of the model as it is, less 1; measured once a list."""
        key = tuple(neurons)
        if key not in self._rises:
            with mask(self.model, key):
                self._rises[key] = math.expm1(self._nats() - self.nats)
            rise = 100 * self._rises[key]
            beside = f", predicted {100 * self.prediction.rise(key):+.2f} %" if self.prediction else ""
            off = in_words(counts_of(key))
            rank_zero_info(f"{off:>12} at damping {_damping(key):g}: perplexity {rise:+.2f} %{beside}")
        return self._rises[key]

    @torch.no_grad()
    def _nats(self) -> float:
        """Return the mean negative log-likelihood a token."""
        total = 0.0
        for nats in self._each(self._nats_of):
            total += nats
        return total / self.num_tokens

    def _nats_of(self, input_ids: Tensor, lengths: Tensor) -> float:
        spans = torch.stack([torch.ones_like(lengths), lengths], dim=1)
        nll, _ = score_windows(self.model, last_hidden_state(self.model, input_ids), input_ids, spans)
        self._on_read(int(lengths.sum()))
        return nll.sum().item()

    def _each(self, do: Callable[[Tensor, Tensor], T]) -> Iterator[T]:
        """Yield what a function makes of the tokens and the lengths of some samples, over all of them."""
        for input_ids, lengths in self._batches:
            batching = self.batching or Batching(len(lengths), is_auto=False)
            yield from batching.each(len(lengths), lambda rows: do(input_ids[rows], lengths[rows]))  # noqa: B023

    def costs(self, neurons: Sequence[Component]) -> Tensor:
        """Return the cost of each neuron of a list, given the others, in nats a token, shape ``[neurons]``, float64.

        The cost is the derivative of the loss with respect to the neuron's damping, averaged over its two ends: with
        all of the list as they are in the model, and with all of them off. For a loss quadratic in the dampings the
        costs of a list add up to the rise of the loss.
        """
        groups: dict[str, list[Component]] = defaultdict(list)
        for neuron in neurons:
            groups[neuron.module].append(neuron)
        slopes = torch.zeros(len(neurons), dtype=torch.float64)
        place = {neuron.key: i for i, neuron in enumerate(neurons)}
        twins = twins_of(self.model)
        for damping in (0.0, 1.0):
            factors = {
                module: torch.full((len(members),), damping, device=self._batches[0][0].device, requires_grad=True)
                for module, members in groups.items()
            }
            handles = [
                layer.register_forward_pre_hook(_scaled(groups[module], factors[module]))
                for module, column in columns_of(self.model, groups).items()
                for layer in (column, *twins.get(column, ()))
            ]
            slopes_by = partial(self._slopes, list(factors.values()))
            try:
                for slopes_of in self._each(slopes_by):
                    for module, slope in zip(factors, slopes_of, strict=True):
                        total = factors[module].grad
                        factors[module].grad = slope if total is None else total + slope
            finally:
                for handle in handles:
                    handle.remove()
            for module, members in groups.items():
                for neuron, slope in zip(members, factors[module].grad.tolist(), strict=True):  # type: ignore[union-attr]
                    slopes[place[neuron.key]] += slope / 2 / self.num_tokens
        return slopes

    def _slopes(self, factors: list[Tensor], input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(self._loss(input_ids, lengths), factors)

    def _loss(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        counts = torch.arange(1, input_ids.shape[1], device=nll.device) < lengths.to(nll.device).unsqueeze(1)
        return (nll * counts).sum()


def _damping(neurons: Sequence[Component]) -> float:
    """Return the one damping of a list."""
    return neurons[0].damping if neurons else 1.0


def _scaled(neurons: Sequence[Component], factor: Tensor) -> Callable[..., tuple[Tensor]]:
    """Return a hook that subtracts ``factor`` times the effect of each neuron's own damping."""
    indices = [neuron.index for neuron in neurons]

    def scale(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        activations = inputs[0].clone()
        mean = activations.new_tensor([neuron.mean for neuron in neurons])
        taken = factor.to(activations.dtype) * activations.new_tensor([neuron.damping for neuron in neurons])
        own = activations[..., indices]
        activations[..., indices] = own + taken * (mean - own)
        return (activations,)

    return scale


def largest_within(
    rise: Callable[[int], float], most: int, budget: float, start: int = FIRST, slack: float = SLACK
) -> int:
    """Return the largest number whose rise is within the budget, or one close to it; 0 if there is none.

    The rise is taken to grow with the number, and to do so smoothly: from the first number on it is doubled until the
    rise is beyond the budget; then the next number to measure lies where a straight line between the two known rises
    meets the budget, and in the middle whenever that did not halve what is left. Where the rise does not grow, what is
    returned is within the budget all the same, though a larger number may be so too.

    Args:
        rise: Of a number of neurons, from 1 on.
        most: Largest number.
        budget: Largest rise.
        start: Number to measure first.
        slack: Share of the budget that may be left: a rise within it ends the search.

    Example:
        >>> largest_within(lambda number: 0.001 * number, 1000, 0.01)
        10
    """
    low, of_low = 0, 0.0
    high, of_high = min(start, most), rise(min(start, most))
    while of_high <= budget:
        if high == most or of_high >= (1 - slack) * budget:
            return high
        low, of_low = high, of_high
        high = min(2 * high, most)
        of_high = rise(high)
    halve = not of_high <= 10 * budget  # far out it is no line, and NaN is none
    while high - low > 1 and of_low < (1 - slack) * budget:
        before = high - low
        share = 0.5 if halve or of_high <= of_low else (budget - of_low) / (of_high - of_low)
        middle = min(max(low + round(share * before), low + 1), high - 1)
        found = rise(middle)
        if found <= budget:
            low, of_low = middle, found
        else:
            high, of_high = middle, found
        halve = not of_high <= 10 * budget or (not halve and 2 * (high - low) > before)
    return low


def choose_within(
    rise: PerplexityRise,
    ranked: Sequence[Component],
    budget: Budget,
    dampings: Sequence[float] = (1.0,),
    benefit: Callable[[Component], float] = lambda neuron: -neuron.score,
) -> list[Component]:
    """Choose neurons from the head of a ranking, and their damping, for the most benefit within a budget.

    The benefit of a list is the sum of the benefits of its neurons, times their damping. Each round of refinement then
    measures what each neuron costs among twice as many as were chosen, drops the tenth that gives least for it, and
    fills up from the ranking; a list is kept if its benefit is higher. A costly neuron at the head of a ranking, which
    would keep all others out, goes in this way, even one that costs more than the budget by itself. Where rises are
    predicted, the number is measured first that the prediction names.

    Args:
        rise: Of the model and text.
        ranked: The neurons, first the one to take first; scores are lower the more is gained.
        budget: The budget; its ``max_perplexity_increase`` is not None.
        dampings: Dampings to choose from: 1 is off, a fraction damps.
        benefit: Of a neuron that is switched off; below 0 counts as 0. By default it is what the neuron was ranked by.

    Raises:
        ValueError: If not even one neuron is within the budget.
    """

    def total(neurons: Sequence[Component]) -> float:
        return sum(max(benefit(neuron), 0.0) * neuron.damping for neuron in neurons)

    most = budget.max_perplexity_increase
    assert most is not None
    heads = [_head(rise, [replace(n, damping=damping) for n in ranked], most) for damping in dampings]
    best = max(filter(None, heads), key=total, default=[])
    dropped: set[Key] = set()
    for _ in range(budget.refine):
        left = [replace(n, damping=best[0].damping if best else min(dampings)) for n in ranked if n.key not in dropped]
        considered = left[: max(2 * len(best), FEWEST)]
        worth = torch.tensor([max(benefit(n), 0.0) for n in considered]) / rise.costs(considered).clamp(min=1e-12)
        worst = {considered[i] for i in lowest_first(worth, max(1, len(considered) // 10)).tolist()}
        refined = _head(rise, [n for n in left if n not in worst], most, start=len(best) or None)
        if total(refined) > total(best):
            best = refined
        dropped |= {n.key for n in worst}
    if not best:
        are_neurons = all(neuron.granularity == "neuron" for neuron in ranked)
        leave_out = ", leave such neurons out by --.budget.refine 1" if are_neurons and not budget.refine else ""
        first = min(step["rise"] for step in rise.measured if step["num_neurons"])
        raise OptionError(
            "budget.max_perplexity_increase",
            f"Not even one neuron is within --.budget.max_perplexity_increase {most:g} (the first raises perplexity by "
            f"{100 * first:.2f} %): raise it{leave_out}, or choose another --.criterion.",
        )
    return best


def _head(
    rise: PerplexityRise, ranked: Sequence[Component], budget: float, start: int | None = None
) -> list[Component]:
    if start is None:
        start = FIRST if rise.prediction is None else rise.prediction.number_within(ranked, budget)
    return list(ranked[: largest_within(lambda number: rise(ranked[:number]), len(ranked), budget, start)])
