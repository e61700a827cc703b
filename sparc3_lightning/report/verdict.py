"""What was found, in words that a reader can hold us to: an effect only where the interval leaves 0 out."""

import math

from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.intervals import MIN_CHANGED, Difference, Interval
from sparc3_lightning.evaluation.results import Findings, Preference


def verdict(
    found: Findings,
    num_neurons: int,
    behavior: str = "toxicity",
    granularity: str = "neuron",
    ablation: str = "switched off",
) -> str:
    """Describe the effect of switching the neurons off, with intervals of 95 %.

    Args:
        found: From ``findings``.
        num_neurons: How many neurons are off.
        behavior: What was scored.
        granularity: What was switched off: ``neuron``, ``head`` or ``weight``.
        ablation: What was done to them in its place, such as ``damped by 50 %``.
    """
    if found.pruned is None:
        return "The model was measured as it is; no neurons were given to switch off."
    effect = found.main_effect
    if effect is None:
        return "No continuation of both models could be scored, so nothing is known of the effect."
    neurons = f"{num_neurons} {granularity}{'s' if num_neurons != 1 else ''}"
    price = f"perplexity {moved(next(iter(found.perplexity_change.values())))}"
    if effect.evidence:
        sentences = [f"With {neurons} {ablation}, mean {behavior} {moved(effect.percent)}, and {price}."]
    else:
        changed = effect.num_better + effect.num_worse
        why = (
            "that interval holds 0"
            if changed >= MIN_CHANGED
            else f"only {changed} prompt{'s' if changed != 1 else ''} changed"
        )
        what = f"switching {neurons} off" if ablation == "switched off" else f"having {neurons} {ablation}"
        sentences = [
            f"No evidence that {what} changes {behavior}: its mean {moved(effect.percent)}, and {why}; {price}."
        ]
    sentences += _controls(found, effect, num_neurons, granularity)
    sentences += [zeroed] if (zeroed := zero_ablated_controls(found, ablation, granularity)) else []
    sentences += _second(found, effect)
    return " ".join(sentences + _preference(found.preference))


def _controls(found: Findings, effect: Difference, num_neurons: int, granularity: str) -> list[str]:
    sentences = []
    for kind, control_kind in CONTROLS.items():
        control = found.controls.get(kind)
        if control is None or control.outcome is None:
            continue
        draws, number, name = len(control.draws), control.draws[0].num_neurons, control_kind.name(granularity)
        as_many = f"As many {name}" if number == num_neurons else f"Only {number} {name}, all there are to draw from,"
        percent, further = control.outcome.effect_percent, control.outcome.pruned_less_control
        sentence = f"{as_many} ({draws} draw{'s' if draws != 1 else ''}): {_signed(percent)}"
        fell = effect.difference.value < 0
        if effect.evidence and not (further.high < 0 if fell else further.low > 0):
            sentence += f", which is no evidence that the chosen {granularity}s do more"
        sentences.append(sentence + ".")
    return sentences


def zero_ablated_controls(found: Findings, ablation: str, granularity: str = "neuron") -> str:
    """Name the controls that are zeroed although the chosen neurons are ablated to their mean; "" if none.

    Args:
        found: From ``findings``, or results.json.
        ablation: What was done to the chosen ones, such as ``held at their mean activation``.
        granularity: What they are.
    """
    zeroed = [kind for kind, control in found.controls.items() if control.zero_ablated]
    if not zeroed:
        return ""
    names = [f"the {CONTROLS[kind].name(granularity)}" for kind in zeroed]
    who = "The controls" if len(zeroed) == len(found.controls) else " and ".join(names).capitalize()
    damped, towards, _ = ablation.partition(" towards")
    edits = f"{damped} towards 0, not towards" if towards else "switched off, not held at"
    return f"{who} are {edits} their mean."


def _second(found: Findings, first: Difference) -> list[str]:
    if found.second_scorer is None:
        return []
    name, effect = found.second_scorer.name, found.second_scorer.effects[found.headline].behavior_mean
    if effect is None:
        return [f"The second scorer, {name}, scored nothing."]
    if not effect.evidence:
        return [f"The second scorer, {name}, gives no evidence: {_signed(effect.percent)}."]
    agrees = first.evidence and (effect.difference.value < 0) == (first.difference.value < 0)
    return [f"The second scorer, {name}, {'agrees' if agrees else 'differs'}: {_signed(effect.percent)}."]


def _preference(found: Preference | None) -> list[str]:
    if found is None or found.effect is None:
        return []
    effect, points = found.effect, found.effect.difference
    change = f"{100 * points.value:+.1f} points ({100 * points.low:+.1f} to {100 * points.high:+.1f})"
    return [
        f"The more stereotypical sentence of a pair is the likelier one in {100 * effect.before:.1f} % before and "
        f"{100 * effect.after:.1f} % after, {change}{'' if effect.evidence else ', which is no evidence'}."
    ]


def moved(percent: Interval) -> str:
    """Return a change in percent in words, with its interval if there is one: a text of one window has none."""
    value = percent.value
    if not math.isfinite(value):
        return "cannot be compared with 0"
    words = f"{'fell' if value < 0 else 'rose'} by {abs(value):.1f} %" if value else "did not change"
    return words if math.isnan(percent.low) else f"{words} (95 % interval {_range(percent)})"


def _signed(percent: Interval) -> str:
    if not math.isfinite(percent.value):
        return "cannot be compared with 0"
    return f"{percent.value:+.1f} % ({_range(percent)})"


def _range(percent: Interval) -> str:
    return f"{percent.low:+.1f} to {percent.high:+.1f} %"
