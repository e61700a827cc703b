"""What a component of a model is, a neuron, a head, a channel or a weight; how it is masked, or pruned for good."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.models.architectures import is_heads
from sparc3_lightning.models.heads import (
    channel_norms,
    check_channels,
    check_heads,
    head_norms,
    layers_of_heads,
    mask_channels,
    mask_heads,
    num_channels,
    num_heads,
    prune_channels_,
    prune_heads_,
)
from sparc3_lightning.models.neurons import (
    Ablation,
    check_have_place,
    check_neurons,
    layers_of_neurons,
    mask_neurons,
    neuron_norms,
    num_neurons,
    prune_neurons_,
)
from sparc3_lightning.models.weights import check_weights, mask_weights, prune_weights_, weight_magnitudes, weight_shape

Granularity = Literal["neuron", "head", "channel", "weight"]
# What an attribution scores: components of one kind, or the neurons of MLPs and the channels of attentions together.
Scored = Literal["neuron", "head", "channel", "weight", "neuron+channel"]
Key = tuple[str, int] | tuple[str, int, int] | tuple[str, int, str]  # module and index; see ``Component.key``


def kind_of(granularity: Scored, module: str) -> Granularity:
    """Return of which kind the components of a scored layer are, by its fully qualified name."""
    if granularity == "neuron+channel":
        return "channel" if is_heads(module) else "neuron"
    return granularity


@dataclass(frozen=True, slots=True)
class Component:
    """A neuron, a head, a channel or a single weight, and its ablation.

    A channel is one input of the last layer of an attention: a dimension of the output of one head.

    Args:
        module: Fully qualified name of its layer; of a head or a channel the last one of its attention, of a weight any
            linear one.
        index: Its row there; of a head its number, of a channel its column.
        score: The one it was selected by.
        damping: 1 switches it off; a fraction leaves ``1 - damping`` of its activation.
        mean: What takes the place of what is taken away, times ``damping``: 0 for pruning, the neuron's mean
            activation for mean ablation. Of other components always 0.
        input: Of a weight its column, the layer's weight being ``[out_features, in_features]``; else None.
        granularity: Which kind of component it is.

    Raises:
        ValueError: If a weight has no input, or another component has one.
    """

    module: str
    index: int
    score: float
    damping: float = 1.0
    mean: float = 0.0
    input: int | None = None
    granularity: Granularity = "neuron"

    def __post_init__(self) -> None:
        if (self.input is None) == (self.granularity == "weight"):
            raise ValueError(
                f"{self.granularity.capitalize()} {self.index} of {self.module} cannot have the input {self.input}: a "
                "weight has one, and no other component."
            )

    @classmethod
    def at(
        cls,
        place: int,
        module: str,
        shape: Sequence[int],
        granularity: Granularity,
        score: float = 0.0,
        damping: float = 1.0,
    ) -> Self:
        """Return the component at a place of the flattened scores of a layer.

        Args:
            place: From 0.
            module: Fully qualified name of the layer.
            shape: Of its scores: ``[components]``, or of weights ``[out_features, in_features]``.
            granularity: Which kind of component it is.
            score: Of the component.
            damping: How far it is switched off.
        """
        index, column = divmod(place, shape[1]) if granularity == "weight" else (place, None)
        return cls(module, index, score, damping, input=column, granularity=granularity)

    def place(self, shape: Sequence[int]) -> int:
        """Return its place in the flattened scores of its layer, see ``at``."""
        return self.index if self.input is None else self.index * shape[1] + self.input

    @property
    def key(self) -> Key:
        """What tells it from any other of its model, whatever is done to it."""
        if self.input is not None:
            return self.module, self.index, self.input
        # A head of the same layer may have the same number.
        return (self.module, self.index, "channel") if self.granularity == "channel" else (self.module, self.index)


def by_layer(components: Iterable[Component]) -> dict[tuple[Granularity, str], list[Component]]:
    """Return the components of each kind in each layer: a layer may hold several kinds."""
    found: dict[tuple[Granularity, str], list[Component]] = defaultdict(list)
    for component in components:
        found[component.granularity, component.module].append(component)
    return found


def counts_of(components: Iterable[Component]) -> dict[str, int]:
    """Return the number of components of each kind, in one order, whatever theirs is."""
    found = Counter(component.granularity for component in components)
    return {kind: found[kind] for kind in get_args(Granularity) if found[kind]}


def in_words(counts: Mapping[str, int]) -> str:
    """Return the numbers of components of several kinds in words.

    Example:
        >>> in_words({"neuron": 1250, "head": 1, "channel": 63})
        '1,250 neurons, 1 head and 63 channels'
    """
    return _listed([counted(number, kind) for kind, number in counts.items()])


def counted(number: int, unit: str) -> str:
    """Return a number of things in words, such as ``1 neuron``."""
    return f"{number:,} {unit}{'s' if number != 1 else ''}"


def plural(granularity: str) -> str:
    """Return what components are called, of one kind or of several, such as ``neuron+channel``.

    Example:
        >>> plural("weight"), plural("neuron+channel")
        ('weights', 'neurons and channels')
    """
    return _listed([f"{kind}s" for kind in granularity.split("+")])


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


# What is done to components of one kind, by the name of their layer and by their index there, of weights row and
# column: the damping, of neurons an ``Ablation``.
Ablations = dict[str, dict[Any, Any]]


@dataclass(frozen=True)
class Kind:
    """What a model knows of one kind of components.

    Args:
        shape: Of the scores of a layer: ``[components]``, or of weights ``[out_features, in_features]``.
        norms: Norms of the weights of each component of a layer, of that shape, float32 on the CPU; all ranks ask
            together if the model is sharded.
        mask: Switches components off for the length of a ``with`` block, their dampings times a number.
        prune_: Writes what that does into the weights.
        check: Raises ValueError unless the model has all of the components; one on the meta device suffices.
        layers: Names of the layers of a model whose weights ``prune_`` changes, by the name of the components' layer.
    """

    shape: Callable[[nn.Module, str], tuple[int, ...]]
    norms: Callable[[nn.Module, str], Tensor]
    mask: Callable[[nn.Module, Ablations, float], AbstractContextManager[None]]
    prune_: Callable[[PreTrainedModel, Ablations], None]
    check: Callable[[nn.Module, Ablations], None]
    layers: Callable[[nn.Module, str], list[str]]


# In the order in which they are pruned: a neuron's constant goes through the weights that are left.
KINDS: dict[Granularity, Kind] = {
    "head": Kind(
        lambda *layer: (num_heads(*layer),), head_norms, mask_heads, prune_heads_, check_heads, layers_of_heads
    ),
    "channel": Kind(
        lambda *layer: (num_channels(*layer),),
        channel_norms,
        mask_channels,
        prune_channels_,
        check_channels,
        lambda _, module: [module],
    ),
    "weight": Kind(
        weight_shape, weight_magnitudes, mask_weights, prune_weights_, check_weights, lambda _, module: [module]
    ),
    "neuron": Kind(
        lambda *layer: (num_neurons(*layer),),
        neuron_norms,
        mask_neurons,
        prune_neurons_,
        check_neurons,
        layers_of_neurons,
    ),
}


@contextmanager
def mask(model: nn.Module, components: Iterable[Component], damping: float = 1.0) -> Iterator[None]:
    """Switch components off, or damp them, for the length of a ``with`` block.

    Of neurons, heads and channels no weight is touched; single weights are what they were after the block.

    Args:
        model: A causal language model.
        components: Of any kinds, each with its own damping and constant.
        damping: Times the damping of each.

    Raises:
        ValueError: If the model has no such component.
    """
    with ExitStack() as undo:
        for kind, ablations in _by_kind(components).items():
            undo.enter_context(KINDS[kind].mask(model, ablations, damping))
        yield


def prune_(model: PreTrainedModel, components: Iterable[Component]) -> None:
    """Write the effect of ``mask`` into the weights, in place.

    Args:
        model: A causal language model.
        components: Of any kinds.

    Raises:
        ValueError: If the model has no such component, or its architecture has no bias to put a constant in. Nothing is
            changed then.
    """
    by_kind = _by_kind(components)
    for kind, ablations in by_kind.items():
        KINDS[kind].check(model, ablations)
    check_have_place(model, by_kind["neuron"])
    for kind, ablations in by_kind.items():
        KINDS[kind].prune_(model, ablations)


def check(model: nn.Module, components: Iterable[Component]) -> None:
    """Raise ValueError unless the model has all these components. A model on the meta device suffices."""
    for kind, ablations in _by_kind(components).items():
        KINDS[kind].check(model, ablations)


def _by_kind(components: Iterable[Component]) -> dict[Granularity, Ablations]:
    """Return the ablations of each kind of component, in the order of ``KINDS``."""
    by_kind: dict[Granularity, Ablations] = {kind: defaultdict(dict) for kind in KINDS}
    for c in components:
        if c.mean and c.granularity != "neuron":
            what = "A weight of neuron" if c.granularity == "weight" else c.granularity.capitalize()
            raise ValueError(f"{what} {c.index} of {c.module} has a constant, which only a neuron can have.")
        index = c.index if c.input is None else (c.index, c.input)
        ablation = Ablation(c.damping, c.mean) if c.granularity == "neuron" else c.damping
        by_kind[c.granularity][c.module][index] = ablation
    return by_kind
