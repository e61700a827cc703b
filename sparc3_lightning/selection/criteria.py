"""From scores to an order of neurons: each function ranks by another criterion.

All take scores per module, shape ``[out_features]``, on general reference samples and on samples of the behaviour, and
return scores of the same shapes: what is lowest is pruned first, and infinity is never pruned.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.components import Component, Scored, plural
from sparc3_lightning.selection.lowest import Lowest

Scores = Mapping[str, Tensor]
FLOOR_TOKENS = 512  # see ``floor_of``
POOL = 5  # candidates per component and layer, of which each draw takes one


def normalized_difference(general: Scores, behavior: Scores) -> dict[str, Tensor]:
    """Rank by the difference of shares: each side is first divided by its own total of magnitudes.

    Longer samples, or another target, change the scale of a side and not the share of a neuron in it.

    Raises:
        ValueError: If the modules or shapes of the two differ, or a side is 0 throughout.
    """
    return differential_relevance(_shares(general, "general"), _shares(behavior, "behaviour's"))


def set_difference(
    general: Scores, behavior: Scores, top_behavior: float = 0.1, top_general: float = 0.1
) -> dict[str, Tensor]:
    """Rank by the behaviour, among the neurons in its top share that are not in the top share of general text.

    With ``top_behavior`` 1 this is the behaviour's own order under a mask. A share of N neurons is round(share * N) of
    them, whatever their scores: neurons of one score, such as those that are never active, go by the order of the
    modules, then by index.

    Source: Wei et al. 2024, arXiv:2402.05162, section 3.2, there of weights.

    Args:
        general: General scores.
        behavior: Scores of the behaviour.
        top_behavior: Share of all neurons, by the behaviour, in (0, 1].
        top_general: Share of all neurons, by general text, that is left out, in [0, 1).

    Raises:
        ValueError: If the modules or shapes of the two differ.
    """
    check_same_modules(general, behavior)
    behavior = {name: behavior[name] for name in general}
    of_behavior, of_general = _top(behavior, top_behavior), _top(general, top_general)
    return {
        name: torch.where(of_behavior[name] & ~of_general[name], -score.double(), torch.inf)
        for name, score in behavior.items()
    }


def benefit_per_cost(general: Scores, behavior: Scores, floor: float) -> dict[str, Tensor]:
    """Rank by benefit over cost, among the components that the behaviour has a benefit of at all.

    The order is that of a knapsack: the most benefit for a sum of costs, wherever it is cut.

    Args:
        general: General scores, not negative: what switching a component off costs.
        behavior: Scores of the behaviour, signed: what it gains.
        floor: Of the costs, see ``with_floor``.

    Raises:
        ValueError: If the modules or shapes of the two differ, every cost is 0, or no benefit is above 0.
    """
    check_same_modules(general, behavior)
    if not any((cost > 0).any() for cost in general.values()):
        raise OptionError(
            "general", "holds a cost of 0 for every component, so that nothing can be ranked by it: attribute again."
        )
    if not any((score > 0).any() for score in behavior.values()):
        raise OptionError(
            "behavior",
            "holds no benefit above 0: whatever is switched off, there is no less of the behaviour. Attribute on "
            "samples that have more of it, or with another --.target.",
        )
    return {
        name: torch.where(behavior[name] > 0, -behavior[name].double() / cost, torch.inf)
        for name, cost in with_floor(general, floor).items()
    }


def floor_of(num_tokens: int) -> float:
    """Return the floor of costs that were measured on so many tokens, as a share of their mean.

    It is as if ``FLOOR_TOKENS`` more had been read, and every component had cost the mean there. Their number is by
    experiment, on prompts for choices alone: of neurons and channels of SmolLM2 within 1 % of perplexity, with costs of
    16,384 tokens, those by floors of 0.01, 0.02, 0.03, 0.05, 0.1, 0.2 and 0.4 took 60, 60, 58, 53, 53, 56 and 50 % off
    mean toxicity under a judge that did not choose (tests/benchmarks/RESULTS.md). Without a floor, neurons that were
    ranked by the costs of 64 to 192 chunks of C4 and charged those of 192 others gain up to 5 % less than with 0.02.

    Args:
        num_tokens: Of all general samples; 0 where none were read, which gives no floor.
    """
    return FLOOR_TOKENS / num_tokens if num_tokens else 0.0


def with_floor(costs: Scores, floor: float) -> dict[str, Tensor]:
    """Add a share of the mean cost to every cost, float64: what is chosen for a low cost has it by luck, too.

    A cost is a mean over some text. That of a component which fires seldom rests on few tokens, or is 0 since it did
    not fire at all, and without a floor it comes first whatever it costs on other text.

    Args:
        costs: Per module, not negative.
        floor: In units of the mean cost over all modules, see ``floor_of``.
    """
    mean = torch.cat([cost.double().flatten() for cost in costs.values()]).mean()
    return {name: cost.double() + floor * mean for name, cost in costs.items()}


def by_auroc(general: Scores, behavior: Scores) -> dict[str, Tensor]:
    """Rank by how well each neuron's activation tells the behaviour's samples from general ones, see ``auroc``.

    Args:
        general: Mean activation in each general sample, per module, shape ``[samples, neurons]``.
        behavior: The same of the behaviour's samples.
    """
    return {name: -auroc(rows, behavior[name]) for name, rows in general.items()}


def weighted_difference(general: Scores, behavior: Scores, weight: Scores) -> dict[str, Tensor]:
    """Rank by the difference times 2 AUROC - 1: how well an activation predicts the behaviour, beyond chance.

    Source: the weight is AurA's (Suau et al. 2024, arXiv:2407.12824, section 3.2: 1 - Gini coefficient damps a neuron),
    the difference is SparC3's.

    Args:
        general: General scores.
        behavior: Scores of the behaviour.
        weight: AUROC per module, shape ``[neurons]``; below 0.5 counts as 0.5.

    Raises:
        ValueError: If the modules or shapes of the scores differ.
    """
    return {
        name: score * (2 * weight[name] - 1).clamp(min=0)
        for name, score in differential_relevance(general, behavior).items()
    }


def auroc(general_SN: Tensor, behavior_SN: Tensor) -> Tensor:
    """Return how well each neuron's activation tells the behaviour's samples from general ones.

    Source: Suau et al. 2024, AurA, arXiv:2407.12824, section 3.1.

    Args:
        general_SN: One value a sample and neuron, such as its mean activation, shape ``[samples, neurons]``.
        behavior_SN: The same of the behaviour's samples; there may be another number of them.

    Returns:
        Area under the ROC curve, shape ``[neurons]``: 1 if the behaviour's are all higher, 0.5 if they are alike.
    """
    ordered = general_SN.T.contiguous().sort(dim=1).values
    values = behavior_SN.T.contiguous()
    # The number of pairs in which the behaviour's sample is higher; a tie counts half.
    below, not_above = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + not_above).double().mean(dim=1) / (2 * ordered.shape[1])


def _shares(scores: Scores, whose: str) -> dict[str, Tensor]:
    total = sum(score.double().abs().sum() for score in scores.values())
    if not total > 0:
        raise ValueError(f"The {whose} scores are 0 throughout, so no neuron has a share in them.")
    return {name: score.double() / total for name, score in scores.items()}


def _top(scores: Scores, share: float) -> dict[str, Tensor]:
    """Return for each score whether it is in the top share of all; of equal ones the first are."""
    flat = torch.cat([score.double().flatten() for score in scores.values()])
    is_top = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    is_top[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
    parts = is_top.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def differential_relevance(general: Mapping[str, Tensor], behavior: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract the relevance for the behaviour from the general one: the most negative neurons serve the behaviour.

    Source: Hatefi et al. 2025, arXiv:2506.13727, equation 7.

    Args:
        general: Scores per module, each of shape ``[out_features]``, on general reference samples.
        behavior: The same on reference samples of the behaviour.

    Returns:
        The difference per module.

    Raises:
        ValueError: If the modules or shapes of the two differ.
    """
    check_same_modules(general, behavior)
    return {name: score - behavior[name] for name, score in general.items()}


def check_same_modules(general: Mapping[str, Tensor], behavior: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the modules or shapes of two sets of scores differ."""
    if {name: score.shape for name, score in general.items()} != {n: s.shape for n, s in behavior.items()}:
        raise ValueError("The general scores and the behaviour's scores differ in their modules or shapes.")


def differential_strength(general: Mapping[str, Tensor], behavior: Mapping[str, Tensor]) -> float:
    """Return (sum R_general - sum R_behavior) / sum R_general, in percent.

    A reproduction of SparC3 asks for at least 15 % before it goes on. It partly measures the length of the samples.
    """
    total = sum(float(score.double().sum()) for score in general.values())
    difference = sum(float(score.double().sum()) for score in differential_relevance(general, behavior).values())
    return 100 * difference / total if total else float("nan")


def select_neurons(scores: Mapping[str, Tensor], num_neurons: int, granularity: Scored = "neuron") -> list[Component]:
    """Select the neurons with the lowest scores over all modules, lowest first.

    Ties are broken by the order of the modules, then by index, so that the selection is reproducible.

    Args:
        scores: Per module, shape ``[out_features]``; for the published selection the differential relevance.
        num_neurons: How many to select.
        granularity: What the scores are of.

    Raises:
        ValueError: If ``num_neurons`` is not between 1 and the number of neurons whose score is below infinity, or a
            score is NaN.

    Example:
        >>> chosen = select_neurons({"a": torch.tensor([0.0, -2.0]), "b": torch.tensor([-1.0, 3.0])}, 2)
        >>> [(neuron.module, neuron.index, neuron.score) for neuron in chosen]
        [('a', 1, -2.0), ('b', 0, -1.0)]
    """
    flat = torch.cat(list(scores.values()))
    if not 1 <= num_neurons <= len(flat):
        raise OptionError(
            "num_neurons", f"must be between 1 and {len(flat):,} (all {plural(granularity)}), got {num_neurons}."
        )
    if torch.isnan(flat).any():
        raise ValueError("The scores hold NaN, so neurons cannot be ranked.")
    eligible = int((flat < math.inf).sum())
    if num_neurons > eligible:
        raise OptionError(
            "num_neurons",
            f"asks for {num_neurons} {plural(granularity)}, but --.criterion leaves only {eligible} of "
            f"{len(flat):,}: ask for fewer, or with set_difference raise --.top_behavior or lower --.top_general.",
        )
    chosen = Lowest(num_neurons, granularity)
    for name, score in scores.items():
        chosen.add(name, score)
    return chosen.components


def lowest_of_modules(pruned: Sequence[Component], scores: Iterable[tuple[str, Tensor]]) -> list[Component]:
    """Return, per module, the components with the lowest scores, ``POOL`` times as many as were pruned there.

    Args:
        pruned: The pruned components; those of one module are of one kind.
        scores: Name and scores of each module, of the shape that ``Kind`` says, one module in memory at a time; the
            magnitude of the relevance, or the negative norm of weights.
    """
    taken, numbers = {component.key for component in pruned}, per_module(pruned)
    kinds = {component.module: component.granularity for component in pruned}
    pool: dict[str, list[Component]] = {module: [] for module in numbers}
    for module, score in scores:
        if number := numbers[module]:
            candidates = Lowest((1 + POOL) * number, kinds[module])
            candidates.add(module, score)
            pool[module] = [c for c in candidates.components if c.key not in taken][: POOL * number]
    return [component for of_module in pool.values() for component in of_module]


def per_module(pruned: Iterable[Component]) -> Counter[str]:
    """Count the pruned components of each module."""
    return Counter(component.module for component in pruned)
