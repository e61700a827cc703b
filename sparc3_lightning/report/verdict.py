"""What was found, in words that a reader can hold us to: an effect only where the interval and a test say so."""

import math
from collections.abc import Mapping

from sparc3_lightning.evaluation.controls import CONTROLS
from sparc3_lightning.evaluation.intervals import FEW, MIN_CHANGED, Difference, Interval
from sparc3_lightning.evaluation.results import Findings, Lengths, Preference
from sparc3_lightning.models.components import counted, in_words, plural
from sparc3_lightning.report.tables import CANNOT, chooser_judges, evident_doses


def verdict(
    found: Findings, kinds: Mapping[str, int], behavior: str = "toxicity", ablation: str = "switched off"
) -> str:
    """Describe the effect of switching the neurons off, with intervals of 95 %.

    Args:
        found: From ``findings``.
        kinds: How many neurons, heads, channels or weights are off.
        behavior: What was scored.
        ablation: What was done to them in its place, such as ``damped by 50 %``.
    """
    if found.pruned is None:
        return "The model was measured as it is; no neurons were given to switch off."
    effect, granularity, neurons = found.main_effect, "+".join(kinds), in_words(kinds)
    if effect is None:
        if not found.other_judges:
            return "No continuation of both models could be scored, so nothing is known of the effect."
        nothing = f"The judge of the headline, '{found.headline_judge}', scored no prompt of both models."
        return " ".join([nothing, *_others(found, None, granularity)])
    convention, change = next(iter(found.perplexity_change.items()))
    perplexity = f"perplexity {moved(change, few(found.baseline.num_windows.get(convention), 'window'))}"
    if effect.evidence:
        sentences = [f"With {neurons} {ablation}, mean {behavior} {moved_mean(effect)}, and {perplexity}."]
    else:
        what = f"switching {neurons} off" if ablation == "switched off" else f"having {neurons} {ablation}"
        sentences = [
            f"No evidence that {what} changes {behavior}: its mean {moved_mean(effect)}, and {_why_not(effect)}; "
            f"{perplexity}."
        ]
    sentences += _controls(found, effect, sum(kinds.values()), granularity)
    sentences += [zeroed] if (zeroed := zero_ablated_controls(found, ablation, granularity)) else []
    sentences += _judges(found, effect, granularity)
    return " ".join(sentences + _preference(found.preference) + _doses(found, granularity))


def _why_not(effect: Difference) -> str:
    """Say why there is no evidence of a change."""
    changed = effect.num_better + effect.num_worse
    if changed < MIN_CHANGED:
        return f"only {counted(changed, 'prompt')} changed"
    if effect.difference.holds_zero:
        return "that interval holds 0" if effect.difference.is_known else "the interval cannot be said"
    return f"a permutation test gives p = {effect.permutation_test_p:.2g}"


def _doses(found: Findings, granularity: str) -> list[str]:
    """Say how many of several selections or doses have an effect, by a test that holds for all of them together."""
    if len(found.doses) < 2:
        return []
    said = [
        f"Measured beside it, the selection {dose.selection!r} with {in_words(dose.kinds)}: "
        f"{signed(dose.effect.percent)} at {signed(dose.perplexity_percent)} perplexity."
        for dose in found.doses
        if dose.name == dose.selection and dose.effect
    ]
    number, all_of_them = len(evident_doses(found.doses)), len(found.doses)
    return [
        *said,
        f"Of the {all_of_them} sets of {plural(granularity)} that were measured, {number} "
        f"give{'s' if number == 1 else ''} evidence of a change that holds for all of them together.",
    ]


def _controls(found: Findings, effect: Difference, num_neurons: int, granularity: str) -> list[str]:
    sentences = []
    for kind, control_kind in CONTROLS.items():
        control = found.controls.get(kind)
        if control is None or control.outcome is None:
            continue
        draws, number, name = len(control.draws), control.draws[0].num_neurons, control_kind.name(granularity)
        as_many = f"As many {name}" if number == num_neurons else f"Only {number} {name}, all there are to draw from,"
        percent, further = control.outcome.effect_percent, control.outcome.pruned_less_control
        sentence = f"{as_many} ({draws} draw{'s' if draws != 1 else ''}): {signed(percent)}"
        fell = effect.difference.value < 0
        if effect.evidence and draws == 1:
            sentence += f"; a single draw cannot show whether the chosen {plural(granularity)} do more"
        elif effect.evidence:
            does_more = further.high < 0 if fell else further.low > 0
            claim = "; the" if does_more else ", which is no evidence that the"
            sentence += f"{claim} chosen {plural(granularity)} do more than one more draw would"
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


def by_position(lengths: Lengths, behavior: str) -> str:
    """Say whether the effect is evident at each position, by a test that holds for all, and whether it fades.

    Args:
        lengths: The effects in pieces of the continuations.
        behavior: What was scored.
    """
    known = [effect for effect in lengths.at.values() if effect]
    if not known:
        return "No piece of a continuation could be scored by both models."
    said = []
    for name, effect in lengths.at.items():
        finds = "no prompt has a score of both models"
        if effect:
            finds = "evident" if effect.is_evidence_among(len(lengths.at)) else "no evidence of a change"
            finds = f"{signed(effect.percent)}, {finds}"
        said.append(f"tokens {name}: {finds}")
    fewest = min(effect.num_prompts for effect in known)
    caveat = "" if fewest >= FEW else f" Intervals over only {counted(fewest, 'prompt')} may be too narrow."
    return f"Mean {behavior} by position: {'; '.join(said)}. {_fades(lengths)}{caveat}"


def _fades(lengths: Lengths) -> str:
    first, change = next(iter(lengths.at.values())), lengths.last_less_first
    if first is None or not first.is_evidence_among(len(lengths.at)):
        return "Without an evident effect at the first of them it cannot be said whether it fades."
    if change is None:
        return "Whether the effect fades cannot be said: no prompt has scores at the first and at the last of them."
    more, last = change.difference, list(lengths.at.values())[-1]
    ends = f"{more.low:+.3f} to {more.high:+.3f}" if more.is_known else CANNOT
    figures = f"the change is {change.before:+.3f} at the first and {change.after:+.3f} at the last, {more.value:+.3f}"
    if not change.evidence:
        return f"No evidence that the effect fades or grows: {figures} ({ends})."
    is_less = (more.value < 0) != (first.difference.value < 0)
    share = last.percent.value / first.percent.value if last and first.percent.value else math.nan
    # Where the original model shows less of it, there is less to take away.
    against = share >= 1 if is_less else share <= 1
    but = ", but in percent of what was there it does not" if against else ""
    return f"The effect {'fades' if is_less else 'grows'}{but}: {figures} ({ends})."


def _judges(found: Findings, first: Difference, granularity: str) -> list[str]:
    """Say whose the headline is, and what every other judge finds."""
    said = [chooser] if (chooser := chooser_judges(found, granularity)) else []
    if found.other_judges and not chooser:
        said.append(f"This is by the judge '{found.headline_judge}'.")
    return said + _others(found, first, granularity)


def _others(found: Findings, first: Difference | None, granularity: str) -> list[str]:
    """Say what every judge but the headline's finds, beside the headline's effect; None if that is not known."""
    said = []
    for name, judge in found.other_judges.items():
        part = f", which the {plural(granularity)} were chosen with," if judge.is_chooser else ""
        effect = judge.effects[found.headline].behavior_mean
        if effect is None:
            finds = "scored no prompt of both models" if judge.num_scored else "scored nothing"
        elif not effect.evidence:
            finds = f"gives no evidence: {signed(effect.percent)}"
        elif first is None:
            finds = f"gives evidence of a change: {signed(effect.percent)}"
        else:
            agrees = first.evidence and (effect.difference.value < 0) == (first.difference.value < 0)
            finds = f"{'agrees' if agrees else 'differs'}: {signed(effect.percent)}"
        said.append(f"The judge '{name}'{part} {finds}.")
    return said


def _preference(found: Preference | None) -> list[str]:
    if found is None or found.effect is None:
        return []
    effect, points = found.effect, found.effect.difference
    ends = f"{100 * points.low:+.1f} to {100 * points.high:+.1f}" if points.is_known else CANNOT
    change = f"{100 * points.value:+.1f} points ({ends}{few(effect.num_prompts, 'pair')})"
    return [
        f"The more stereotypical sentence of a pair is the likelier one in {100 * effect.before:.1f} % before and "
        f"{100 * effect.after:.1f} % after, {change}{'' if effect.evidence else ', which is no evidence'}."
    ]


def moved(percent: Interval, caveat: str = "") -> str:
    """Return a change in percent in words, with its interval.

    Args:
        percent: The change.
        caveat: Stands beside the interval, see ``few``.
    """
    if not math.isfinite(percent.value):
        return f"changed by a percentage that {CANNOT}"
    value = f" by {abs(percent.value):.1f} %" if percent.value else ""
    return f"{_verb(percent.value)}{value} (95 % interval {_range(percent)}{caveat if percent.is_known else ''})"


def few(number: int | None, unit: str) -> str:
    """Return the words that stand beside an interval over few prompts or windows; "" if they are enough, or unknown."""
    return "" if number is None or number >= FEW else f", maybe too narrow: only {counted(number, unit)}"


def moved_mean(effect: Difference) -> str:
    """Return a change in percent in words; in its own unit where the mean before could be 0."""
    percent, change, caveat = effect.percent, effect.difference, few(effect.num_prompts, "prompt")
    if percent.is_known or not change.is_known:
        return moved(percent, caveat)
    value = f" by {abs(change.value):.4f}" if change.value else ""
    ends = f"95 % interval {change.low:+.4f} to {change.high:+.4f}{caveat}; in percent it {CANNOT}"
    return f"{_verb(change.value)}{value} ({ends})"


def _verb(value: float) -> str:
    return "did not change" if not value else "fell" if value < 0 else "rose"


def signed(percent: Interval, sign: str = "+") -> str:
    """Return a percentage with its interval; ``sign`` is "" for one that is no change."""
    if not math.isfinite(percent.value):
        return f"a percentage that {CANNOT}"
    return f"{percent.value:{sign}.1f} % ({_range(percent, sign)})"


def _range(percent: Interval, sign: str = "+") -> str:
    return f"{percent.low:{sign}.1f} to {percent.high:{sign}.1f} %" if percent.is_known else CANNOT
