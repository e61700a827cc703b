"""The specification of scores: method and options, which of them can be combined, and what score files must share."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal, cast, get_args

import torch

from sparc3_lightning.attribution.relevance import Relevance
from sparc3_lightning.attribution.rules import Rule
from sparc3_lightning.attribution.targets import LEXICAL, Target
from sparc3_lightning.errors import OptionError
from sparc3_lightning.files import LEFT_OUT
from sparc3_lightning.models.architectures import ATTENTION_OUTPUTS, MLPS, ends_in, is_heads
from sparc3_lightning.models.components import Granularity, Scored, kind_of, plural

Method = Literal["lrp", "gradient", "wanda", "activation", "magnitude", "random"]
Score = Literal["magnitude", "signed", "absolute", "squared", "fisher", "wanda", "activation", "random"]
Nonfinite = Literal["error", "zero"]
_OF_INPUTS: tuple[Score, ...] = (*get_args(Relevance), "wanda")
# The scores that components of each kind have; random ones are drawn by ``StaticScores``.
SCORES: dict[Scored, tuple[Score, ...]] = {
    "neuron": get_args(Score),
    "head": _OF_INPUTS,
    "channel": _OF_INPUTS,
    "neuron+channel": _OF_INPUTS,
    "weight": ("magnitude", "signed", "wanda", "random"),
}
# Methods that read no samples.
STATIC = ("magnitude", "random")
_MAY_DIFFER = {"may_differ": True}


@dataclass(frozen=True)
class ScoreSpec:
    """The options that say which scores are computed.

    Score files can be averaged or subtracted only if they agree in every field that is not marked ``may_differ``.

    Args:
        method: See ``Attribution``, for this and the others.
        rule: For LRP.
        relevance: For LRP and the gradient.
        target: For LRP and the gradient.
        lexicon: For the targets in ``LEXICAL`` the scorer that says which tokens are toxic; of a list of words
            ``words:`` and its file, or how many they are.
        words: What identifies the words of the list; None for a scorer.
        layers: Names of the scored layers; None for the default ones of the model.
        dtype: Dtype of the model.
        granularity: One score for each ``neuron``, ``head``, ``channel`` or ``weight``, or for each neuron and channel.
        nonfinite: What is done about NaN and infinity.
        activations: Whether the mean activations of each sample are kept too.
        chunk: For the relevance ``fisher`` the tokens of a chunk.
        kept: What identifies the words that are kept; None if there are none.
    """

    method: Method
    rule: Rule | None = None
    relevance: Relevance | None = None
    target: Target | None = None
    lexicon: str | None = None
    words: str | None = None
    layers: list[str] | None = None
    dtype: str = "auto"
    granularity: Scored = "neuron"
    nonfinite: Nonfinite = field(default="error", metadata=_MAY_DIFFER)
    activations: bool = field(default=False, metadata=_MAY_DIFFER)
    chunk: int | None = field(default=None, metadata=LEFT_OUT)
    kept: str | None = field(default=None, metadata=LEFT_OUT)

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ValueError: If no layer is named, the score is not defined for the granularity or the layers, or an option
                has no part in the method.
        """
        if self.layers is not None and not self.layers:
            raise OptionError("layers", "must name at least one layer type, for example up_proj.")
        check_granularity(self.granularity, self.score, self.layers or ())
        if self.is_static and self.has_heads:
            what = f"{self.method} is not defined for {plural(self.granularity)}: choose another --.granularity."
            raise OptionError("method", what)
        if self.is_static and self.activations:
            raise OptionError("method", f"{self.method} reads no samples: leave out --.activations.")
        if self.activations or self.method == "activation":
            self._check_are_of_neurons()
        elif (self.is_cost and self.granularity == "neuron") or self.granularity == "neuron+channel":
            option, value = ("relevance", "fisher") if self.is_cost else ("granularity", self.granularity)
            _check_are_rows([name for name in self.layers or () if not is_heads(name)], option, value)
        if not self.has_target and self.target != "argmax":
            raise OptionError("method", f"{self.method} has no target: leave out --.target.")
        if self.is_cost and (self.method, self.target) != ("gradient", "sampled"):
            what = f"fisher needs --.method gradient and --.target sampled, got {self.method} and {self.target}."
            raise OptionError("relevance", what)
        if self.is_cost and self.nonfinite == "zero":
            what = "zero would make a component cheap where it overflows: leave it out, and give --.dtype float32."
            raise OptionError("nonfinite", what)
        if self.target == "sampled" and not self.is_cost:
            what = f"sampled needs --.relevance fisher, got {self.relevance}: its gradient is 0 in the mean."
            raise OptionError("target", what)
        if self.chunk is not None and self.chunk < 1:
            raise OptionError("chunk", f"must be at least 1, got {self.chunk}.")

    @property
    def has_target(self) -> bool:
        """Whether the method explains a target, and so needs gradients."""
        return self.method in ("lrp", "gradient")

    def kind_of(self, module: str) -> Granularity:
        """Return of which kind the components of a scored layer are, by its fully qualified name."""
        return kind_of(self.granularity, module)

    @property
    def has_heads(self) -> bool:
        """Whether the last layers of attentions are scored."""
        return self.granularity in ("head", "channel", "neuron+channel")

    @property
    def is_cost(self) -> bool:
        """Whether a score says what switching its component off costs: the Fisher information of its gain."""
        return self.has_target and self.relevance == "fisher"

    @property
    def is_static(self) -> bool:
        """Whether no samples are read."""
        return self.method in STATIC

    @property
    def is_lexical(self) -> bool:
        """Whether the target speaks of a lexicon."""
        return self.target in LEXICAL

    @property
    def sums_weights(self) -> bool:
        """Whether there is a sum for each weight; every rank then has its own rows of the sums."""
        return self.granularity == "weight" and self.method not in ("wanda", *STATIC)

    @property
    def score(self) -> Score:
        """What the accumulator computes: a kind of relevance, or the method itself."""
        return cast("Score", self.relevance if self.has_target else self.method)

    def resolved(self, layers: list[str], dtype: torch.dtype) -> "ScoreSpec":
        """Return the specification with defaults filled in, and None for options that the method does not use.

        Args:
            layers: Names of the scored layers.
            dtype: Dtype of the model.
        """
        return replace(
            self,
            rule=self.rule if self.method == "lrp" else None,
            relevance=self.relevance if self.has_target else None,
            target=self.target if self.has_target else None,
            lexicon=self.lexicon if self.is_lexical else None,
            words=self.words if self.is_lexical else None,
            chunk=self.chunk if self.is_cost else None,
            kept=self.kept if self.is_lexical else None,
            layers=layers,
            dtype=str(dtype).removeprefix("torch."),
        )

    def shared(self) -> dict[str, object]:
        """Return the fields in which score files that belong together agree."""
        values = asdict(self)
        return {item.name: values[item.name] for item in fields(self) if not item.metadata.get("may_differ")}

    def _check_are_of_neurons(self) -> None:
        option, value = ("activations", "true") if self.activations else ("method", self.method)
        if self.has_heads:
            what = f"{value} is defined for neurons, not for {plural(self.granularity)}: choose another --.granularity."
            raise OptionError(option, what)
        _check_are_rows(self.layers or (), option, value)


def _check_are_rows(layers: Collection[str], option: str, value: str) -> None:
    """Raise ValueError unless all layers are those before the activation of an MLP."""
    rows = list(dict.fromkeys(row for rows, _ in MLPS for row in rows))
    if not all(any(ends_in(target, row) for row in rows) for target in layers):
        raise OptionError(
            option,
            f"{value} is defined for MLP neurons only: expected --.layers to be among {rows}, or left out, got "
            f"{list(layers)}.",
        )


def check_granularity(granularity: Scored, score: Score, layers: Collection[str]) -> None:
    """Raise ValueError if the score is not defined for the granularity, or a target has no heads."""
    option = "relevance" if score in ("absolute", "squared", "fisher") else "method"
    if score not in SCORES[granularity]:
        raise OptionError(option, f"{score} is not defined for {plural(granularity)}: choose another --.granularity.")
    of_heads = [name for name in layers if is_heads(name)]
    if granularity in ("head", "channel") and len(of_heads) < len(layers):
        raise OptionError(
            "granularity",
            f"{granularity} scores attention {granularity}s, at the last layer of each attention: expected "
            f"--.layers to be among {ATTENTION_OUTPUTS}, or left out for all, got {list(layers)}.",
        )
    if granularity == "neuron+channel" and layers and len(of_heads) in (0, len(layers)):
        raise OptionError(
            "granularity",
            f"neuron+channel scores layers of MLPs and of attentions: expected --.layers to name both, such as up_proj "
            f"and o_proj, or left out for all, got {list(layers)}.",
        )
