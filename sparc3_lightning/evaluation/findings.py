"""What an evaluation found: from continuations and windows to measures, and to differences with intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from sparc3_lightning.data.prompts import TOXIC_FROM
from sparc3_lightning.evaluation.completions import Completion
from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.draws import interval_of_draws
from sparc3_lightning.evaluation.intervals import (
    Difference,
    in_percent,
    paired_difference,
    perplexity_change,
    perplexity_interval,
    variance_factor,
)
from sparc3_lightning.evaluation.metrics import CONTINUATION_METRICS, PairRow, behavior_by_prompt, mean, num_empty
from sparc3_lightning.evaluation.results import (
    MEASURES,
    Change,
    Control,
    Dose,
    Effects,
    Findings,
    Front,
    Measures,
    Model,
    Outcome,
    PairMeasures,
    Preference,
    SecondScorer,
)
from sparc3_lightning.evaluation.variants import Variant, of_kind
from sparc3_lightning.selection.overlap import correlation, ranks

SCORES = ("toxicity", "second_toxicity")  # the field of a row, by scorer
Windows = Mapping[str, Mapping[str, Mapping[str, Tensor]]]  # per model and convention, what Perplexity.compute returns


class Continuations:
    """The rows of completions.jsonl, by model and prompt; every prompt was continued by every model.

    Args:
        rows: A row per continuation.
        per_seed: Continuations of a prompt that one seed drew; None for all.
    """

    def __init__(self, rows: Sequence[Completion], per_seed: int | None = None) -> None:
        self.per_seed = per_seed
        self._rows: dict[str, dict[str, list[Completion]]] = defaultdict(lambda: defaultdict(list))
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

    def of(self, model: str, group: str, first: int | None = None) -> list[list[Completion]]:
        """Return, per prompt of a group, its continuations by a model, or the first few of them."""
        return [self._rows[model][prompt][:first] for prompt in self.groups[group]]

    def values(self, model: str, group: str, measure: str, score: str = "toxicity", first: int | None = None) -> Tensor:
        """Return a measure of the behavior per prompt, float64; NaN where nothing was scored."""
        rows = self.of(model, group, first)
        return torch.tensor([behavior_by_prompt(_scores(found, score))[measure] for found in rows], dtype=torch.float64)

    def by_seed(self, model: str, group: str) -> list[float]:
        """Return the mean score of a group of prompts for each seed that continuations were drawn by."""
        prompts = self.of(model, group)
        number = len(prompts[0])
        per_seed = self.per_seed or number
        return [
            mean([value for found in prompts for value in _scores(found[first : first + per_seed], "toxicity")])
            for first in range(0, number, per_seed)
        ]

    def compare(
        self, before: str, after: str, group: str, measure: str, score: str = "toxicity", first: int | None = None
    ) -> Difference | None:
        """Compare two models over the prompts that both have a score for; None if there is none."""
        pair = [self.values(model, group, measure, score, first) for model in (before, after)]
        valid = torch.isfinite(pair[0] + pair[1])
        return paired_difference(pair[0][valid], pair[1][valid], most=1.0) if valid.any() else None


def _scores(rows: Sequence[Completion], score: str) -> list[float]:
    values = [row["toxicity"] if score == SCORES[0] else row.get("second_toxicity") for row in rows]
    return [math.nan if value is None else value for value in values]


def measure(continuations: Continuations, model: str, group: str) -> Measures:
    """Return the measures of one model's continuations of one group of prompts."""
    prompts = continuations.of(model, group)
    rows = [row for found in prompts for row in found]
    return Measures(
        **{name: mean(continuations.values(model, group, name).tolist()) for name in MEASURES},
        num_prompts=len(prompts),
        num_continuations=len(rows),
        num_failed=sum(row["toxicity"] is None for row in rows),
        num_empty=num_empty(prompts),
        **{name: metric.measure(prompts) for name, metric in CONTINUATION_METRICS.items()},
    )


def findings(
    rows: Sequence[Completion],
    windows: Windows,
    variants: Sequence[Variant],
    scorers: Sequence[str],
    per_seed: int | None = None,
) -> Findings:
    """Return everything that was found, but for pairs of sentences and tasks.

    Args:
        rows: See ``Continuations``.
        windows: Per model and convention, what ``Perplexity.compute`` returns.
        variants: The models that were measured.
        scorers: Names of the scorers; one, or two.
        per_seed: Continuations of a prompt that one seed drew; None for all.
    """
    continuations = Continuations(rows, per_seed)
    names = [variant.name for variant in variants]
    found = Findings(
        headline=continuations.headline,
        num_failed=sum(row["toxicity"] is None for row in rows),
        baseline=_model(continuations, windows, "baseline"),
        second_scorer=_second_scorer(continuations, names, scorers[1]) if len(scorers) > 1 else None,
    )
    return _with_effects(found, continuations, windows, variants) if "pruned" in names else found


def _model(continuations: Continuations, windows: Windows, name: str) -> Model:
    conventions = windows[name]
    divergence = next(iter(conventions.values()))["divergence"].item()
    return Model(
        perplexity={convention: perplexity_interval(values) for convention, values in conventions.items()},
        num_tokens={convention: int(values["num_tokens"]) for convention, values in conventions.items()},
        kl=None if name == "baseline" else divergence,
        groups={group: measure(continuations, name, group) for group in continuations.groups},
        behavior_by_seed=continuations.by_seed(name, continuations.headline),
        num_windows={convention: values["tokens"].numel() for convention, values in conventions.items()},
    )


def _with_effects(
    found: Findings, continuations: Continuations, windows: Windows, variants: Sequence[Variant]
) -> Findings:
    """Add the pruned model, its effects, the controls and the doses."""
    change = {c: perplexity_change(values, windows["pruned"][c]) for c, values in windows["baseline"].items()}
    effects = _effects(continuations)
    main = effects[found.headline].behavior_mean
    held = any(variant.mean_ablated for variant in of_kind(variants, "pruned"))
    draws = {kind: list(of_kind(variants, kind)) for kind in CONTROLS}
    doses = [_dose(continuations, windows, v) for v in variants if v.kind in ("pruned", "dose")]
    return replace(
        found,
        pruned=_model(continuations, windows, "pruned"),
        change=Change(next(iter(change.values())).value, main.percent.value if main else math.nan),
        perplexity_change=change,
        effects=effects,
        common_random_numbers_variance_factor=variance_factor(
            *(_table(continuations, name) for name in ("baseline", "pruned"))
        ),
        controls={
            kind: _control(continuations, windows, variants, held) for kind, variants in draws.items() if variants
        },
        doses=doses,
        fronts={
            selection: front([dose for dose in doses if dose.selection == selection])
            for selection in dict.fromkeys(dose.selection for dose in doses)
        },
    )


def _effects(continuations: Continuations, score: str = "toxicity") -> dict[str, Effects]:
    """Return the changes by pruning in each group of prompts."""
    return {
        group: Effects(*(continuations.compare("baseline", "pruned", group, name, score) for name in MEASURES))
        for group in continuations.groups
    }


def _table(continuations: Continuations, model: str) -> Tensor:
    """Return the scores of the headline's continuations, shape ``[prompts, continuations]``."""
    prompts = continuations.of(model, continuations.headline)
    return torch.tensor([_scores(rows, "toxicity") for rows in prompts], dtype=torch.float64)


def _dose(continuations: Continuations, windows: Windows, variant: Variant) -> Dose:
    """Return the changes of behaviour and perplexity of one model."""
    convention = next(iter(windows["baseline"]))
    before, after = windows["baseline"][convention], windows[variant.name][convention]
    headline = continuations.headline
    effect, second_effect = (
        continuations.compare(
            "baseline", variant.name, headline, "behavior_mean", score, first=variant.num_continuations
        )
        for score in SCORES
    )
    return Dose(
        name=variant.name,
        selection=variant.selection,
        num_neurons=variant.num_neurons,
        damping=variant.damping,
        perplexity=after["perplexity"].item(),
        perplexity_percent=perplexity_change(before, after),
        kl=after["divergence"].item(),
        effect=effect,
        behavior_by_seed=continuations.by_seed(variant.name, headline),
        second_effect=second_effect,
    )


BUDGETS = (1.0, 5.0, 10.0)  # rises of perplexity, in percent, up to which a front is read


def front(doses: Sequence[Dose]) -> Front:
    """Return the most that one selection achieves within a budget of perplexity.

    Args:
        doses: Of the selection.

    Returns:
        ``area``: the fall of the behavior in percent that is reached within a budget, averaged over all budgets from 0
        to the last of ``BUDGETS``; the original model is a point too. ``best``: for each of ``BUDGETS`` the name of the
        dose of least behavior within it, or None if the original is better.
    """
    known: list[tuple[float, float, str | None]] = [(0.0, 0.0, None)]
    for dose in doses:
        if dose.behavior_percent and math.isfinite(dose.perplexity_percent.value):
            known.append((dose.perplexity_percent.value, dose.behavior_percent.value, dose.name))
    area, most = 0.0, BUDGETS[-1]
    budgets = sorted({min(max(rise, 0.0), most) for rise, *_ in known} | {most})
    for start, end in pairwise(budgets):
        area -= (end - start) * min(behavior for rise, behavior, _ in known if rise <= start)
    best = {f"{budget:g}": min((p for p in known if p[0] <= budget), key=lambda p: p[1])[2] for budget in BUDGETS}
    return Front(area / most, best)


def _control(continuations: Continuations, windows: Windows, draws: Sequence[Variant], held: bool) -> Control:
    """Return each draw of a control, their means, and how much further the pruned model went.

    Args:
        continuations: Of all models.
        windows: Of all models.
        draws: Of the control.
        held: Whether the chosen neurons are held at their mean: a control that is zeroed is then not like for like.
    """
    doses = [_dose(continuations, windows, variant) for variant in draws]
    zeroed = held and not any(variant.mean_ablated for variant in draws)
    first = draws[0].num_continuations
    names = ["baseline", "pruned", *(variant.name for variant in draws)]
    before, pruned, *values = (
        continuations.values(name, continuations.headline, "behavior_mean", first=first) for name in names
    )
    drawn = torch.stack(values)
    valid = torch.isfinite(drawn + pruned + before).all(dim=0)
    if not valid.any():
        return Control(doses, zeroed, None)
    drawn, pruned, before = drawn[:, valid], pruned[valid], before[valid]
    own = drawn - before
    outcome = Outcome(
        num_continuations=first,
        effect=interval_of_draws(own),
        effect_percent=in_percent(
            (own.mean() * (100 / before.mean())).item() if before.any() else math.nan,
            interval_of_draws(own, before),
            least=min(before.min().item(), drawn.min().item()),
        ),
        pruned_less_control=interval_of_draws(pruned - drawn, one_more=True),
        perplexity_percent=mean([dose.perplexity_percent.value for dose in doses]),
        num_draws_with_evidence=sum(bool(dose.effect and dose.effect.evidence) for dose in doses),
    )
    return Control(doses, zeroed, outcome)


def _second_scorer(continuations: Continuations, names: Sequence[str], scorer: str) -> SecondScorer:
    models = [name for name in ("baseline", "pruned") if name in names]
    both = [
        (row["toxicity"], row["second_toxicity"])
        for model in models
        for group in continuations.groups
        for rows in continuations.of(model, group)
        for row in rows
        if row["toxicity"] is not None and row["second_toxicity"] is not None
    ]
    first, second = torch.tensor(both, dtype=torch.float64).reshape(-1, 2).T
    return SecondScorer(
        name=scorer,
        num_scored=len(both),
        pearson=correlation(first, second) if both else math.nan,
        spearman=correlation(first, second, ranks) if both else math.nan,
        effects=_effects(continuations, "second_toxicity") if "pruned" in models else {},
    )


def preference(rows: Iterable[PairRow]) -> Preference:
    """Return the share of pairs in which the more stereotypical sentence is the likelier one.

    A share of one half is no preference. A pair of equal likelihoods counts as not preferred, as in lm-eval-harness.

    Args:
        rows: From ``pair_rows``, of ``baseline`` and, where there is one, of ``pruned``.

    Returns:
        Pairs whose likelihoods were not finite are ``num_failed``, and left out of the rest.
    """
    margins: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        margins[row["model"]][row["pair_id"]] = row["margin"]
    known = [
        pair
        for pair in sorted(margins["baseline"])
        if all(math.isfinite(by_pair[pair]) for by_pair in margins.values())
    ]
    found = Preference(num_pairs=len(known), num_failed=len(margins["baseline"]) - len(known))
    if not known:
        return found
    known_margins = {name: torch.tensor([values[pair] for pair in known]).double() for name, values in margins.items()}
    preferred = {name: (margin > 0).double() for name, margin in known_margins.items()}
    models = {
        name: PairMeasures(preferred[name].mean().item(), known_margins[name].mean().item()) for name in known_margins
    }
    if "pruned" not in known_margins:
        return replace(found, baseline=models["baseline"])
    return replace(
        found,
        baseline=models["baseline"],
        pruned=models["pruned"],
        effect=paired_difference(preferred["baseline"], preferred["pruned"], most=1.0),
        margin_effect=paired_difference(known_margins["baseline"], known_margins["pruned"]),
    )
