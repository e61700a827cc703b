"""What an evaluation found: from continuations and windows to figures, differences with intervals, and a verdict."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparc3_lightning.data.prompts import TOXIC_FROM
from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.intervals import (
    Difference,
    bootstrap_of_draws,
    interval,
    paired_difference,
    perplexity_change,
    perplexity_interval,
    variance_factor,
)
from sparc3_lightning.evaluation.metrics import distinct, toxicity_by_prompt
from sparc3_lightning.evaluation.variants import Variant, of_kind
from sparc3_lightning.selection.overlap import correlation, ranks

MEASURES = ("toxicity_mean", "expected_maximum_toxicity", "toxicity_probability")
Row = dict[str, Any]


class Continuations:
    """The rows of completions.jsonl, by model and prompt; every prompt was continued by every model.

    Args:
        rows: Per continuation its ``model``, ``prompt_id``, ``continuation_index``, ``prompt_toxicity``,
            ``continuation``, ``num_tokens``, ``num_unique_tokens``, and under each scorer its toxicity or None.
        per_seed: Continuations of a prompt that one seed drew; None for all.
    """

    def __init__(self, rows: Sequence[Row], per_seed: int | None = None) -> None:
        self.per_seed = per_seed
        self._rows: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in sorted(rows, key=lambda row: (row["prompt_id"], row["continuation_index"])):
            self._rows[row["model"]][row["prompt_id"]].append(row)
        self.groups: dict[str, list[str]] = {"toxic": [], "nontoxic": []}
        for prompt, found in self._rows["baseline"].items():
            toxic = (found[0]["prompt_toxicity"] or 0.0) >= TOXIC_FROM
            self.groups["toxic" if toxic else "nontoxic"].append(prompt)
        if all(found[0]["prompt_toxicity"] is None for found in self._rows["baseline"].values()):
            self.groups = {"all": self.groups["nontoxic"]}
        self.groups = {name: prompts for name, prompts in self.groups.items() if prompts}
        self.headline = next(iter(self.groups))

    def of(self, model: str, group: str, first: int | None = None) -> list[list[Row]]:
        """Return, per prompt of a group, its continuations by a model, or the first few of them."""
        return [self._rows[model][prompt][:first] for prompt in self.groups[group]]

    def values(self, model: str, group: str, measure: str, score: str = "toxicity", first: int | None = None) -> Tensor:
        """Return a measure of toxicity per prompt, float64; NaN where nothing was scored."""
        rows = self.of(model, group, first)
        return torch.tensor([toxicity_by_prompt(_scores(found, score))[measure] for found in rows], dtype=torch.float64)

    def by_seed(self, model: str, group: str) -> list[float]:
        """Return the mean toxicity of a group of prompts for each seed that continuations were drawn by."""
        prompts = self.of(model, group)
        number = len(prompts[0])
        per_seed = self.per_seed or number
        return [
            _mean([value for found in prompts for value in _scores(found[first : first + per_seed], "toxicity")])
            for first in range(0, number, per_seed)
        ]

    def compare(
        self, before: str, after: str, group: str, measure: str, score: str = "toxicity", first: int | None = None
    ) -> Difference | None:
        """Compare two models over the prompts that both have a score for; None if there is none."""
        pair = [self.values(model, group, measure, score, first) for model in (before, after)]
        valid = torch.isfinite(pair[0] + pair[1])
        return paired_difference(pair[0][valid], pair[1][valid]) if valid.any() else None


def _scores(rows: Sequence[Row], score: str) -> list[float]:
    return [math.nan if row.get(score) is None else row[score] for row in rows]


def figures(continuations: Continuations, model: str, group: str) -> dict[str, float | int]:
    """Return what was measured of one model's continuations of one group of prompts."""
    prompts = continuations.of(model, group)
    rows = [row for found in prompts for row in found]
    texts = [[row["continuation"] for row in found] for found in prompts]
    empty = sum(not row["continuation"].strip() for row in rows)
    measures = {name: _mean(continuations.values(model, group, name).tolist()) for name in MEASURES}
    return {
        **measures,
        "num_prompts": len(prompts),
        "num_continuations": len(rows),
        "num_failed": sum(row["toxicity"] is None for row in rows),
        "num_empty": empty,
        "share_empty": empty / len(rows),
        "mean_length": _mean([row["num_tokens"] for row in rows]),
        "uniqueness": _mean([_uniqueness(row) for row in rows]),
        "distinct_1": _mean([distinct(found, 1) for found in texts]),
        "distinct_2": _mean([distinct(found, 2) for found in texts]),
    }


def _uniqueness(row: Row) -> float:
    # The continuations that an earlier version left unfinished do not say it.
    number = row.get("num_unique_tokens", math.nan)
    return number / row["num_tokens"] if row["num_tokens"] else math.nan


def _mean(values: Sequence[float]) -> float:
    valid = [value for value in values if math.isfinite(value)]
    return sum(valid) / len(valid) if valid else math.nan


def findings(
    rows: Sequence[Row],
    windows: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    variants: Sequence[Variant],
    scorers: Sequence[str],
    per_seed: int | None = None,
) -> dict[str, Any]:
    """Return everything that was found, as plain values for results.json.

    Args:
        rows: See ``Continuations``.
        windows: Per model and convention, what ``Perplexity.compute`` returns.
        variants: The models that were measured.
        scorers: Names of the scorers; one, or two.
        per_seed: Continuations of a prompt that one seed drew; None for all.
    """
    found = Continuations(rows, per_seed)
    names = [variant.name for variant in variants]
    conventions = list(windows["baseline"])
    results: dict[str, Any] = {}
    for name in (name for name in ("baseline", "pruned") if name in names):
        results[name] = {
            **{
                f"{key}{_suffix(convention, conventions)}": windows[name][convention][source].item()
                for convention in conventions
                for key, source in (("perplexity", "perplexity"), ("tokens_counted", "num_tokens"))
            },
            **({} if name == "baseline" else {"kl": windows[name][conventions[0]]["divergence"].item()}),
            **figures(found, name, found.headline),
        }
    results["perplexity_interval"] = {
        name: {c: asdict(perplexity_interval(windows[name][c])) for c in conventions} for name in results
    }
    results["groups"] = {
        group: {name: figures(found, name, group) for name in ("baseline", "pruned") if name in names}
        for group in found.groups
    }
    results["headline"] = found.headline
    results["toxicity_by_seed"] = {name: found.by_seed(name, found.headline) for name in results["perplexity_interval"]}
    if "pruned" in names:
        results |= _effects(found, windows, variants, scorers)
    if len(scorers) > 1:
        results["second_scorer"] = _second_scorer(found, names, scorers[1])
    results["num_failed"] = sum(row["toxicity"] is None for row in rows)
    return results


def _suffix(convention: str, conventions: Sequence[str]) -> str:
    return "" if convention == conventions[0] else f"_{convention}"


def _effects(
    found: Continuations,
    windows: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    variants: Sequence[Variant],
    scorers: Sequence[str],
) -> dict[str, Any]:
    conventions = list(windows["baseline"])
    change = {c: perplexity_change(windows["baseline"][c], windows["pruned"][c]) for c in conventions}
    effect = {
        group: {measure: _plain(found.compare("baseline", "pruned", group, measure)) for measure in MEASURES}
        for group in found.groups
    }
    tables = [_table(found, name) for name in ("baseline", "pruned")]
    toxicity = effect[found.headline]["toxicity_mean"]
    draws = {kind: list(of_kind(variants, kind)) for kind in CONTROLS}
    held = any(variant.held for variant in of_kind(variants, "pruned"))
    return {
        "change": {
            "perplexity_percent": change[conventions[0]].value,
            "toxicity_percent": toxicity["percent"]["value"] if toxicity else math.nan,
        },
        "perplexity_change": {name: asdict(value) for name, value in change.items()},
        "effect": effect,
        "common_random_numbers_variance_factor": variance_factor(*tables),
        # A control that is zeroed where the chosen neurons are held at their mean is not like for like.
        "controls": {kind: {**_control(found, windows, of), "zeroed": held and not any(v.held for v in of)}
                     for kind, of in draws.items() if of},
        "doses": (doses := [_point(found, windows, v) for v in variants if v.kind in ("pruned", "dose")]),
        "fronts": {selection: front([dose for dose in doses if dose["selection"] == selection])
                   for selection in dict.fromkeys(dose["selection"] for dose in doses)},
    }  # fmt: skip


def _table(found: Continuations, model: str) -> Tensor:
    """Return the scores of the headline's continuations, shape ``[prompts, continuations]``."""
    return torch.tensor([_scores(rows, "toxicity") for rows in found.of(model, found.headline)], dtype=torch.float64)


def _plain(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else {**asdict(difference), "evidence": difference.evidence}


def _point(
    found: Continuations, windows: Mapping[str, Mapping[str, Mapping[str, Tensor]]], variant: Variant
) -> dict[str, Any]:
    """Return what one model gives for its perplexity: a point of the dose curve, or one draw of a control."""
    convention = next(iter(windows["baseline"]))
    before, after = windows["baseline"][convention], windows[variant.name][convention]
    of = ("baseline", variant.name, found.headline, "toxicity_mean")
    effect = found.compare(*of, first=variant.num_continuations)
    second = found.compare(*of, "second_toxicity", first=variant.num_continuations)
    return {
        "name": variant.name,
        "selection": variant.selection,
        "num_neurons": variant.num_neurons,
        "strength": variant.strength,
        "perplexity": after["perplexity"].item(),
        "perplexity_percent": asdict(perplexity_change(before, after)),
        "kl": after["divergence"].item(),
        "toxicity_mean": effect.after if effect else math.nan,
        "toxicity_percent": asdict(effect.percent) if effect else None,
        "effect": _plain(effect),
        "toxicity_by_seed": found.by_seed(variant.name, found.headline),
        "second_effect": _plain(second),
    }


PRICES = (1.0, 5.0, 10.0)  # rises of perplexity, in percent, up to which a front is read


def front(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the most that one selection achieves for its price in perplexity.

    Args:
        points: Its doses, each with ``perplexity_percent`` and ``toxicity_percent``.

    Returns:
        ``area``: the fall of toxicity in percent that is reached at a price, averaged over all prices from 0 to the
        last of ``PRICES``; the original model is a point too. ``best``: for each of ``PRICES`` the name of the point of
        least toxicity within it, or None if the original is better.
    """
    known = [(0.0, 0.0, None)]
    for point in points:
        if point["toxicity_percent"] and math.isfinite(point["perplexity_percent"]["value"]):
            known.append((point["perplexity_percent"]["value"], point["toxicity_percent"]["value"], point["name"]))
    area, most = 0.0, PRICES[-1]
    prices = sorted({min(max(price, 0.0), most) for price, *_ in known} | {most})
    for start, end in pairwise(prices):
        area -= (end - start) * min(toxicity for price, toxicity, _ in known if price <= start)
    best = {f"{of:g}": min((p for p in known if p[0] <= of), key=lambda p: p[1])[2] for of in PRICES}
    return {"area": area / most, "best": best}


def _control(
    found: Continuations, windows: Mapping[str, Mapping[str, Mapping[str, Tensor]]], draws: Sequence[Variant]
) -> dict[str, Any]:
    """Return each draw of a control, their means, and how much further the pruned model went."""
    points = [_point(found, windows, variant) for variant in draws]
    first = draws[0].num_continuations
    values = [found.values(v.name, found.headline, "toxicity_mean", first=first) for v in draws]
    before, pruned = (found.values(m, found.headline, "toxicity_mean", first=first) for m in ("baseline", "pruned"))
    against = torch.stack([pruned - value for value in values])
    own = torch.stack([value - before for value in values])
    valid = torch.isfinite(against + own).all(dim=0)
    if not valid.any():
        return {"draws": points}
    own, against = own[:, valid], against[:, valid]
    scale = 100 / before[valid].mean()
    return {
        "draws": points,
        "num_continuations": first,
        "effect": asdict(interval(own.mean().item(), bootstrap_of_draws(own))),
        "effect_percent": asdict(interval((own.mean() * scale).item(), bootstrap_of_draws(own) * scale)),
        "pruned_less_control": asdict(interval(against.mean().item(), bootstrap_of_draws(against))),
        "perplexity_percent": _mean([point["perplexity_percent"]["value"] for point in points]),
        "num_draws_with_evidence": sum(bool(point["effect"] and point["effect"]["evidence"]) for point in points),
    }


def _second_scorer(found: Continuations, names: Sequence[str], scorer: str) -> dict[str, Any]:
    models = [name for name in ("baseline", "pruned") if name in names]
    both = [
        (row["toxicity"], row["second_toxicity"])
        for model in models
        for group in found.groups
        for rows in found.of(model, group)
        for row in rows
        if row["toxicity"] is not None and row["second_toxicity"] is not None
    ]
    first, second = torch.tensor(both, dtype=torch.float64).reshape(-1, 2).T
    results: dict[str, Any] = {"name": scorer, "num_scored": len(both)}
    if both:
        results |= {"pearson": correlation(first, second), "spearman": correlation(first, second, ranks)}
    if "pruned" in models:
        results["effect"] = {
            group: {
                measure: _plain(found.compare("baseline", "pruned", group, measure, "second_toxicity"))
                for measure in MEASURES
            }
            for group in found.groups
        }
    return results


def preference(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of pairs in which the more stereotypical sentence is the likelier one.

    A share of one half is no preference. A pair of equal likelihoods counts as not preferred, as in lm-eval-harness.

    Args:
        rows: From ``pair_rows``, of ``baseline`` and, where there is one, of ``pruned``.

    Returns:
        ``num_pairs``; ``num_failed``, pairs whose likelihoods were not finite; per model ``share`` in [0, 1] and mean
        ``margin`` in nats; and with both models ``effect`` and ``margin_effect``, the paired differences.
    """
    margins: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        margins[row["model"]][row["pair_id"]] = row["margin"]
    known = [pair for pair in sorted(margins["baseline"]) if all(math.isfinite(of[pair]) for of in margins.values())]
    found: dict[str, Any] = {"num_pairs": len(known), "num_failed": len(margins["baseline"]) - len(known)}
    if not known:
        return found
    of = {name: torch.tensor([values[pair] for pair in known]).double() for name, values in margins.items()}
    preferred = {name: (margin > 0).double() for name, margin in of.items()}
    found |= {name: {"share": preferred[name].mean().item(), "margin": of[name].mean().item()} for name in of}
    if "pruned" in of:
        for key, values in (("effect", preferred), ("margin_effect", of)):
            difference = paired_difference(values["baseline"], values["pruned"])
            found[key] = {**asdict(difference), "evidence": difference.evidence}
    return found
