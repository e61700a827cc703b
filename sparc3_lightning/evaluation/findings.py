"""What an evaluation found: from continuations and windows to measures, and to differences with intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import torch
from torch import Tensor

from sparc3_lightning.data.prompts import TOXIC_FROM
from sparc3_lightning.evaluation.agreement import krippendorff_alpha
from sparc3_lightning.evaluation.completions import Completion, score_of
from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.draws import interval_of_draws
from sparc3_lightning.evaluation.intervals import (
    Difference,
    Interval,
    in_percent,
    level_of_each,
    paired_difference,
    percent_change,
    perplexity_change,
    perplexity_interval,
    variance_factor,
)
from sparc3_lightning.evaluation.judges import headline_of
from sparc3_lightning.evaluation.metrics import CONTINUATION_METRICS, PairRow, behavior_by_prompt, mean, num_empty
from sparc3_lightning.evaluation.results import (
    MEASURES,
    OTHER_TEXT,
    Agreement,
    Change,
    Control,
    Dose,
    Effects,
    Findings,
    Front,
    Judge,
    Measures,
    Model,
    Outcome,
    PairMeasures,
    Preference,
    Together,
)
from sparc3_lightning.evaluation.variants import Variant, of_kind
from sparc3_lightning.selection.overlap import correlation, ranks

Conventions = Mapping[str, Mapping[str, Tensor]]  # per convention, what Perplexity.compute returns
Windows = Mapping[str, Conventions]  # of each model


class Continuations:
    """The rows of completions.jsonl, by model and prompt; every prompt was continued by every model.

    Args:
        rows: A row per continuation.
        judge: Whose scores count, where no other judge is named.
        per_seed: Continuations of a prompt that one seed drew; None for all.
    """

    def __init__(self, rows: Sequence[Completion], judge: str, per_seed: int | None = None) -> None:
        self.judge = judge
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

    def scores(self, rows: Sequence[Completion], judge: str | None = None) -> list[float]:
        """Return the scores of some rows; NaN where there is none."""
        return [score_of(row, judge or self.judge) for row in rows]

    def values(
        self, model: str, group: str, measure: str, judge: str | None = None, first: int | None = None
    ) -> Tensor:
        """Return a measure of the behavior per prompt, float64; NaN where nothing was scored."""
        scores = [self.scores(rows, judge) for rows in self.of(model, group, first)]
        return torch.tensor([behavior_by_prompt(of_prompt)[measure] for of_prompt in scores], dtype=torch.float64)

    def by_seed(self, model: str, group: str) -> list[float]:
        """Return the mean score of a group of prompts for each seed that continuations were drawn by."""
        prompts = self.of(model, group)
        number = len(prompts[0])
        per_seed = self.per_seed or number
        return [
            mean([value for found in prompts for value in self.scores(found[first : first + per_seed])])
            for first in range(0, number, per_seed)
        ]

    def changes(self, before: str, after: str, group: str, judge: str | None = None) -> Tensor:
        """Return how far the mean score of each prompt of a group changes from one model to another, float64.

        It is NaN where one of them has no score.
        """
        first, second = (self.values(model, group, "behavior_mean", judge) for model in (before, after))
        return second - first

    def compare(
        self, before: str, after: str, group: str, measure: str, judge: str | None = None, first: int | None = None
    ) -> Difference | None:
        """Compare two models over the prompts that both have a score for; None if there is none."""
        pair = self.pair(before, after, group, measure, judge, first)
        return paired_difference(*pair, most=1.0) if len(pair[0]) else None

    def pair(
        self, before: str, after: str, group: str, measure: str, judge: str | None = None, first: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a measure of two models for each prompt that both have a score for, float64."""
        values = [self.values(model, group, measure, judge, first) for model in (before, after)]
        valid = torch.isfinite(values[0] + values[1])
        return values[0][valid], values[1][valid]


def measure(continuations: Continuations, model: str, group: str) -> Measures:
    """Return the measures of one model's continuations of one group of prompts."""
    prompts = continuations.of(model, group)
    rows = [row for found in prompts for row in found]
    return Measures(
        **{name: mean(continuations.values(model, group, name).tolist()) for name in MEASURES},
        num_prompts=len(prompts),
        num_continuations=len(rows),
        num_failed=sum(map(math.isnan, continuations.scores(rows))),
        num_empty=num_empty(prompts),
        **{name: metric.measure(prompts) for name, metric in CONTINUATION_METRICS.items()},
    )


def findings(
    rows: Sequence[Completion],
    windows: Windows,
    variants: Sequence[Variant],
    judges: Mapping[str, Judge],
    per_seed: int | None = None,
) -> Findings:
    """Return everything that was found, but for pairs of sentences and tasks.

    Args:
        rows: See ``Continuations``.
        windows: Per model and convention, what ``Perplexity.compute`` returns.
        variants: The models that were measured.
        judges: The scorers by name, in the order in which they were named, before anything is found by them.
        per_seed: Continuations of a prompt that one seed drew; None for all.
    """
    continuations = Continuations(rows, headline_of(judges), per_seed)
    names = [variant.name for variant in variants]
    judged = {name: _judged(judge, continuations.scores(rows, name)) for name, judge in judges.items()}
    found = Findings(
        headline=continuations.headline,
        headline_judge=continuations.judge,
        judges=judged,
        num_failed=judged[continuations.judge].num_failed,
        baseline=_model(continuations, windows, "baseline"),
        agreement=_agreement(continuations, names, list(judges)) if len(judges) > 1 else None,
    )
    return _with_effects(found, continuations, windows, variants) if "pruned" in names else found


def _judged(judge: Judge, scores: Sequence[float]) -> Judge:
    num_failed = sum(map(math.isnan, scores))
    return replace(judge, num_scored=len(scores) - num_failed, num_failed=num_failed)


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
    by_judge = {name: _effects(continuations, name) for name in found.judges}
    effects = by_judge[found.headline_judge]
    main = effects[found.headline].behavior_mean
    held = any(variant.mean_ablated for variant in of_kind(variants, "pruned"))
    draws = {kind: list(of_kind(variants, kind)) for kind in CONTROLS}
    of_doses = [variant for variant in variants if variant.kind in ("pruned", "dose")]
    doses = [_dose(continuations, windows, variant, by_judge, len(of_doses)) for variant in of_doses]
    return replace(
        found,
        pruned=_model(continuations, windows, "pruned"),
        change=Change(next(iter(change.values())).value, main.percent.value if main else math.nan),
        perplexity_change=change,
        effects=effects,
        judges={name: replace(judge, effects=by_judge[name]) for name, judge in found.judges.items()},
        common_random_numbers_variance_factor=variance_factor(
            *(_table(continuations, name) for name in ("baseline", "pruned"))
        ),
        controls={
            kind: _control(continuations, windows, variants, by_judge, held)
            for kind, variants in draws.items()
            if variants
        },
        doses=doses,
        fronts={
            selection: front([dose for dose in doses if dose.selection == selection])
            for selection in dict.fromkeys(dose.selection for dose in doses)
        },
    )


def _effects(continuations: Continuations, judge: str) -> dict[str, Effects]:
    """Return the changes by pruning in each group of prompts."""
    return {
        group: Effects(*(continuations.compare("baseline", "pruned", group, name, judge) for name in MEASURES))
        for group in continuations.groups
    }


def _table(continuations: Continuations, model: str) -> Tensor:
    """Return the scores of the headline's continuations, shape ``[prompts, continuations]``."""
    prompts = continuations.of(model, continuations.headline)
    return torch.tensor([continuations.scores(rows) for rows in prompts], dtype=torch.float64)


def _dose(
    continuations: Continuations, windows: Windows, variant: Variant, judges: Iterable[str], among: int = 1
) -> Dose:
    """Return the changes of behaviour and perplexity of one model, among several of which something is to hold."""
    convention = next(iter(windows["baseline"]))
    before, after = windows["baseline"][convention], windows[variant.name][convention]
    headline = continuations.headline
    effects = {
        judge: continuations.compare(
            "baseline", variant.name, headline, "behavior_mean", judge, first=variant.num_continuations
        )
        for judge in judges
    }
    return Dose(
        name=variant.name,
        selection=variant.selection,
        num_neurons=variant.num_neurons,
        kinds=dict(variant.kinds),
        damping=variant.strength,
        perplexity=after["perplexity"].item(),
        perplexity_percent=perplexity_change(before, after),
        kl=after["divergence"].item(),
        effect=effects[continuations.judge],
        behavior_by_seed=continuations.by_seed(variant.name, headline),
        effects=effects,
        together=_together(continuations, before, after, variant, among) if among > 1 else None,
        other_text_percent=_change_of_other(windows["baseline"], windows[variant.name]),
    )


def _change_of_other(before: Conventions, after: Conventions) -> Interval | None:
    """Return by how much perplexity changed on the other text, by its first convention; None without one."""
    name = next((name for name in after if name.startswith(OTHER_TEXT)), None)
    return None if name is None else perplexity_change(before[name], after[name])


def _together(
    continuations: Continuations,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    variant: Variant,
    among: int,
) -> Together:
    """Return the changes of one of several models, with intervals that hold for all of them together."""
    pair = continuations.pair(
        "baseline", variant.name, continuations.headline, "behavior_mean", first=variant.num_continuations
    )
    level = level_of_each(among)
    return Together(perplexity_change(before, after, level), percent_change(*pair, level) if len(pair[0]) else None)


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


def _control(
    continuations: Continuations, windows: Windows, draws: Sequence[Variant], judges: Iterable[str], held: bool
) -> Control:
    """Return each draw of a control, their means, and how much further the pruned model went.

    Args:
        continuations: Of all models.
        windows: Of all models.
        draws: Of the control.
        judges: Names of all judges.
        held: Whether the chosen neurons are held at their mean: a control that is zeroed is then not like for like.
    """
    doses = [_dose(continuations, windows, variant, judges) for variant in draws]
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


def _agreement(continuations: Continuations, names: Sequence[str], judges: Sequence[str]) -> Agreement:
    rows = [
        row
        for model in ("baseline", "pruned")
        if model in names
        for group in continuations.groups
        for found in continuations.of(model, group)
        for row in found
    ]
    scores = {judge: torch.tensor(continuations.scores(rows, judge), dtype=torch.float64) for judge in judges}
    of_all = torch.stack(list(scores.values()))
    spearman: dict[str, dict[str, float]] = defaultdict(dict)
    for one, other in combinations(judges, 2):
        both = (scores[one] + scores[other]).isfinite()
        spearman[one][other] = correlation(scores[one][both], scores[other][both], ranks) if both.any() else math.nan
    return Agreement(int(of_all.isfinite().all(dim=0).sum()), dict(spearman), krippendorff_alpha(of_all))


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
