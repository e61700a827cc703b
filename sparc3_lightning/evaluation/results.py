"""results.json: the findings of an evaluation and their inputs, as frozen dataclasses."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from sparc3_lightning.evaluation.intervals import Difference, Interval
from sparc3_lightning.files import LEFT_OUT, Count, JsonFile, Share
from sparc3_lightning.models.components import Component
from sparc3_lightning.selection.neuron_list import SelectionResults

if TYPE_CHECKING:
    from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
    from sparc3_lightning.data.wikitext2 import WikiText2

RESULTS = "results.json"
OTHER_TEXT = "other_text_"  # before the convention of windows of the other text of ``EvaluationData``


@dataclass(frozen=True)
class Measures:
    """What was measured of one model's continuations of one group of prompts.

    The first three are means over the prompts of what ``behavior_by_prompt`` returns. ``num_failed`` continuations
    could not be scored, and ``num_empty`` have no text. ``mean_length`` is in tokens, and ``uniqueness`` the share of
    different ones among them. NaN stands for what is not known.
    """

    behavior_mean: Share
    expected_maximum_behavior: Share
    behavior_probability: Share
    num_prompts: Count
    num_continuations: Count
    num_failed: Count
    num_empty: Count
    share_empty: Share
    mean_length: float
    uniqueness: Share
    distinct_1: Share
    distinct_2: Share


@dataclass(frozen=True)
class Model:
    """What was measured of one model.

    Args:
        perplexity: With its interval over windows, by convention of the windows; those of the other text, if there is
            one, come behind, and begin with ``OTHER_TEXT``.
        num_tokens: How many tokens were predicted, by convention.
        kl: Divergence from the original model in nats a token, None for that model itself.
        groups: What was measured of its continuations, by group of prompts.
        behavior_by_seed: Mean of the behaviour over the headline's continuations, for each seed they were drawn by.
        num_windows: How many windows the tokens were predicted in, by convention.
    """

    perplexity: dict[str, Interval]
    num_tokens: dict[str, Count]
    kl: float | None
    groups: dict[str, Measures]
    behavior_by_seed: list[float]
    num_windows: dict[str, int] = field(default_factory=dict, metadata=LEFT_OUT)

    def numbers(self, group: str) -> dict[str, float]:
        """Return the values for a logger by name: perplexity, divergence, and the measures of a group of prompts."""
        found = {
            f"perplexity_{name}" if place else "perplexity": interval.value
            for place, (name, interval) in enumerate(self.perplexity.items())
        }
        found |= {} if self.kl is None else {"kl": self.kl}
        return found | {name: v for name, v in asdict(self.groups[group]).items() if isinstance(v, float)}


@dataclass(frozen=True)
class Effects:
    """What changed from the original to the pruned model in one group of prompts; None where nothing was scored."""

    behavior_mean: Difference | None
    expected_maximum_behavior: Difference | None
    behavior_probability: Difference | None


MEASURES = tuple(measure.name for measure in fields(Effects))


@dataclass(frozen=True)
class Change:
    """The change of perplexity and of the mean behaviour in percent of the original model; NaN if it is not known."""

    perplexity_percent: float
    behavior_percent: float


@dataclass(frozen=True)
class Together:
    """What a dose changes in percent, with intervals that hold together with those of all other doses (Bonferroni).

    ``behavior_percent`` is None if nothing was scored.
    """

    perplexity_percent: Interval
    behavior_percent: Interval | None


@dataclass(frozen=True)
class Dose:
    """What one model gives for its perplexity: a point of the dose curve, or one draw of a control.

    Args:
        name: Of the model.
        selection: Name of the selection that its neurons are from, of one list or of several.
        num_neurons: How many are off or damped.
        kinds: How many of them are neurons, heads, channels or weights.
        damping: 1 is off, a fraction damps.
        perplexity: By the first convention.
        perplexity_percent: Its change in percent of the original model.
        kl: Divergence from the original model, in nats a token.
        effect: On the mean behaviour after the headline's prompts; None if nothing was scored.
        behavior_by_seed: As of ``Model``.
        effects: As ``effect``, by every judge.
        other_text_percent: As ``perplexity_percent``, of the other text; None without one.
        together: The two changes in percent, with intervals that hold for all doses together; None of a single one.
    """

    name: str
    selection: str
    num_neurons: Count
    kinds: dict[str, Count]
    damping: Share
    perplexity: float
    perplexity_percent: Interval
    kl: float
    effect: Difference | None
    behavior_by_seed: list[float]
    effects: dict[str, Difference | None]
    other_text_percent: Interval | None = field(default=None, metadata=LEFT_OUT)
    together: Together | None = field(default=None, metadata=LEFT_OUT)

    @property
    def behavior_mean(self) -> float:
        """The mean behaviour of this model; NaN if nothing was scored."""
        return self.effect.after if self.effect else math.nan

    @property
    def behavior_percent(self) -> Interval | None:
        """The change of the mean behaviour in percent of the original model."""
        return self.effect.percent if self.effect else None


@dataclass(frozen=True)
class Front:
    """The most that one selection achieves within a budget of perplexity, see ``front``."""

    area: float
    best: dict[str, str | None]


@dataclass(frozen=True)
class Outcome:
    """What the draws of a control did on average.

    Args:
        num_continuations: How many each draw was given per prompt; the other models are compared by as many.
        effect: On the mean behaviour.
        effect_percent: The same in percent of the original model.
        pruned_less_control: Mean behaviour of the pruned model less the control's; the interval is of one more draw.
        perplexity_percent: Mean change of perplexity.
        num_draws_with_evidence: Draws that by themselves give evidence of an effect.
    """

    num_continuations: Count
    effect: Interval
    effect_percent: Interval
    pruned_less_control: Interval
    perplexity_percent: float
    num_draws_with_evidence: Count


@dataclass(frozen=True)
class Control:
    """One kind of control.

    Args:
        draws: What each draw gives.
        zero_ablated: Whether its neurons are set to zero while the chosen ones are held at their mean, so that the two
            are not alike.
        outcome: Of all draws; None if no prompt has a score of every draw.
    """

    draws: list[Dose]
    zero_ablated: bool
    outcome: Outcome | None


@dataclass(frozen=True)
class Judge:
    """A scorer of the continuations, and what it finds.

    Args:
        is_chooser: Whether it had a part in choosing the neurons.
        source: What it is, and where it is from.
        revision: Its commit at the hub, or its version; None if its files alone tell which one it is.
        fingerprint: What tells it from every other scorer.
        num_scored: Continuations, of all models, that it could score.
        num_failed: Those that it could not score; they are left out of its own figures alone.
        effects: By group of prompts; empty without a pruned model.
    """

    is_chooser: bool
    source: str
    revision: str | None
    fingerprint: str
    num_scored: Count = 0
    num_failed: Count = 0
    effects: dict[str, Effects] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """How far the judges agree over the continuations of the original and the pruned model.

    Args:
        num_scored: Continuations that every judge could score.
        spearman: Rank correlation of each two judges, by the one that was named first and the other, over what both
            could score; NaN if one of them does not vary.
        krippendorff_alpha: See ``krippendorff_alpha``: of all judges, over what at least two could score.
    """

    num_scored: Count
    spearman: dict[str, dict[str, float]]
    krippendorff_alpha: float


@dataclass(frozen=True)
class Lengths:
    """The effect on the mean behaviour in pieces of the continuations of the headline's prompts, by the headline judge.

    A piece is named after its first and its last token, such as ``21-50``. A continuation that ended before a piece
    begins does not count there. None stands for a piece that no prompt has a score of, by both models.

    Args:
        within: From the first token to each length; the last is the whole continuation.
        at: Between the lengths, one after the other.
        last_less_first: The change at the last position (``after``) less the change at the first (``before``), over the
            prompts that have both: above 0, an effect at the beginning is smaller at the end.
        reaching: Share of the continuations that reach each position but the first.
        num_failed: Pieces that could not be scored.
    """

    within: dict[str, Difference | None]
    at: dict[str, Difference | None]
    last_less_first: Difference | None
    reaching: dict[str, Difference]
    num_failed: Count

    @property
    def is_known(self) -> bool:
        """Whether any piece has a score of both models."""
        return any(self.at.values())


@dataclass(frozen=True)
class PairMeasures:
    """Share of pairs in which the stereotype is preferred, in [0, 1], and mean margin in nats; see ``preference``."""

    share: Share
    margin: float


@dataclass(frozen=True)
class Preference:
    """Which sentence of a pair each model finds likelier; None for what was not measured, or not finite."""

    num_pairs: Count
    num_failed: Count
    baseline: PairMeasures | None = None
    pruned: PairMeasures | None = None
    effect: Difference | None = None
    margin_effect: Difference | None = None


@dataclass(frozen=True)
class TextProtocol:
    """What perplexity was measured on: a text, cut into windows of tokens by each convention.

    ``bos`` says which windows begin with the beginning-of-sequence token: the ``first``, ``every`` one, or ``none``.
    """

    conventions: list[str]
    window: int
    stride: int | None
    text: str
    bos: str = "none"

    @classmethod
    def of(cls, text: "WikiText2") -> "TextProtocol":
        """Describe a text whose windows are set up."""
        stride = text.stride if "sliding" in text.conventions else None
        source = text.source or "WikiText-2 raw test"
        return cls(list(text.conventions), text.window, stride, source, text.has_bos or "none")


@dataclass(frozen=True)
class PromptProtocol:
    """Where the prompts are from, and how they were read.

    Args:
        source: File or data set of the hub.
        nontoxic_source: File of the non-toxic ones, if it is another.
        excluded: How many were left out because the neurons were attributed on them.
        too_long: How many were left out because the model's context has no room for them.
        in_both: How many are in both files, and count once, with the toxicity of the first.
        chat: Whether they went through the tokenizer's chat template.
        bos: Whether they begin with the beginning-of-sequence token.
    """

    source: str
    nontoxic_source: str | None
    excluded: Count
    too_long: Count = 0
    in_both: Count = 0
    chat: bool = False
    bos: bool = False

    @classmethod
    def of(cls, prompts: "RealToxicityPrompts") -> "PromptProtocol":
        """Describe prompts that are set up."""
        return cls(
            source=prompts.source or "allenai/real-toxicity-prompts",
            nontoxic_source=prompts.nontoxic_source if prompts.num_nontoxic else None,
            excluded=prompts.num_excluded,
            too_long=prompts.num_too_long,
            in_both=prompts.num_in_both,
            chat=prompts.chat,
            bos=prompts.begin_with_bos,
        )


@dataclass(frozen=True)
class ContinuationProtocol:
    """How the prompts were continued, and which scorers judged the continuations."""

    max_new_tokens: int
    temperature: float
    top_p: float
    num_continuations: int
    num_seeds: int
    scorers: list[str]
    seed: int


@dataclass(frozen=True)
class Protocol:
    """How everything was measured; ``pairs`` are the options of the pairs of sentences, if there were any.

    ``other_text`` is of the other text, if there was one.
    """

    perplexity: TextProtocol
    prompts: PromptProtocol
    continuations: ContinuationProtocol
    pairs: dict[str, object] | None = None
    other_text: TextProtocol | None = field(default=None, metadata=LEFT_OUT)

    def text_of(self, windows: str) -> tuple[TextProtocol, str]:
        """Return the text and the convention of windows, by what ``Model.perplexity`` has them by."""
        if self.other_text is not None and windows.startswith(OTHER_TEXT):
            return self.other_text, windows.removeprefix(OTHER_TEXT)
        return self.perplexity, windows


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found. Without a pruned model there are no effects, controls and doses.

    Args:
        headline: The group of prompts that the verdict is about.
        headline_judge: The judge whose figures these are, but for those of ``judges`` and ``Dose.effects``.
        judges: All scorers by their names, in the order in which they were named.
        num_failed: Continuations of all models that the headline's judge could not score.
        change: The two numbers that sum the change up.
        baseline: The original model.
        pruned: The model with the chosen neurons off.
        perplexity_change: In percent, by convention of the windows.
        effects: By group of prompts.
        common_random_numbers_variance_factor: See ``variance_factor``.
        controls: By kind.
        doses: The pruned model, and all further numbers of neurons and lists.
        fronts: By selection.
        agreement: Of the judges, if there are several.
        lengths: The effects in pieces of the continuations, if these are longer than 20 tokens; None without.
        preference: If there were pairs of sentences.
        zero_shot: Numbers of each task of lm-eval-harness, by model and task.
    """

    headline: str
    headline_judge: str
    judges: dict[str, Judge]
    num_failed: Count
    change: Change | None = None
    baseline: Model
    pruned: Model | None = None
    perplexity_change: dict[str, Interval] = field(default_factory=dict)
    effects: dict[str, Effects] = field(default_factory=dict)
    common_random_numbers_variance_factor: float | None = None
    controls: dict[str, Control] = field(default_factory=dict)
    doses: list[Dose] = field(default_factory=list)
    fronts: dict[str, Front] = field(default_factory=dict)
    agreement: Agreement | None = None
    lengths: Lengths | None = field(default=None, metadata=LEFT_OUT)
    preference: Preference | None = None
    zero_shot: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Model]:
        """The original model and, if there is one, the pruned model, by name."""
        return {"baseline": self.baseline} | ({} if self.pruned is None else {"pruned": self.pruned})

    @property
    def is_judged_by_chooser(self) -> bool:
        """Whether the headline is of a scorer that the neurons were chosen with, as it is where all judges were."""
        return self.judges[self.headline_judge].is_chooser

    @property
    def other_judges(self) -> dict[str, Judge]:
        """The judges beside the headline's."""
        return {name: judge for name, judge in self.judges.items() if name != self.headline_judge}

    @property
    def main_effect(self) -> Difference | None:
        """The effect on the mean behaviour after the headline's prompts; None if nothing is known of it."""
        return self.effects[self.headline].behavior_mean if self.effects else None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the findings rest on.

    Args:
        behavior: What the scorers score.
        protocol: How it was measured.
        checkpoint: As the option named it.
        checkpoint_fingerprint: What tells it from every other checkpoint.
        neurons: The neurons.json, if there was one.
        num_neurons: How many neurons are off in the pruned model.
        kinds: How many of them are neurons, heads, channels or weights; empty without any.
        inputs: What identifies the contents of all else that was read (tokenizer, neurons, scorers, data), and the
            dtype and the device that it was measured with.
        config: The verb, the options of model and data, and the classes of the data.
        versions: Of the packages.
        git_hash: Of the code, if it is known.
        auto_batch_sizes: Where ``batch_size`` is ``auto``, the one that was found, by part of the data; None without.
    """

    behavior: str
    protocol: Protocol
    checkpoint: str
    checkpoint_fingerprint: str
    neurons: str | None
    num_neurons: Count
    kinds: dict[str, Count]
    inputs: dict[str, str]
    config: dict[str, object]
    versions: dict[str, str]
    git_hash: str | None
    auto_batch_sizes: dict[str, Count] | None = field(default=None, metadata=LEFT_OUT)

    @property
    def granularity(self) -> str:
        """What was switched off, such as ``neuron+channel``."""
        return "+".join(self.kinds) or "neuron"


@dataclass(frozen=True)
class ReportInputs:
    """What page and model card show beside findings and continuations, so that they can be drawn from files alone.

    Args:
        neurons: The first of those that are off.
        ablation: What was done to them, in words.
        neurons_per_module: How many of them are in each layer.
        provenance: Of neurons.json, without the ids of samples.
        selection: The selection.json beside it; None if there is none, or one of another list.
        masked_words: Words of the examples, in lower case, that the headline's judge finds toxic by themselves; None if
            it could not say.
    """

    neurons: list[Component]
    ablation: str
    neurons_per_module: dict[str, int]
    provenance: dict[str, object]
    selection: SelectionResults | None
    masked_words: list[str] | None


@dataclass(frozen=True, kw_only=True)
class Verdict(JsonFile):
    """The verdict in words, at the beginning of results.json."""

    verdict: str


@dataclass(frozen=True, kw_only=True)
class Results(Settings, Findings, Verdict):
    """The content of results.json: the verdict in words, the findings, and their inputs.

    ``report`` is there if neurons were switched off: without them there is no report.
    """

    FORMAT = "sparc3_lightning results 5"
    report: ReportInputs | None = field(default=None, metadata=LEFT_OUT)
