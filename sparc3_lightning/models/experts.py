"""Experts of a mixture of experts: opened, each of them is an MLP of linear layers like any other.

transformers keeps the weights of all experts of a block in fused parameters, and calls no layer. ``open_experts_`` puts
a linear layer for each part of each expert beside them: a view, without parameters of its own. So the model's
parameters, files and devices are what they were, and what is written into a layer's weight is written into the model.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparc3_lightning.errors import OptionError

ROUTERS = ("gate", "router", "shared_expert_gate")  # what stands beside experts and says how much each of them counts
_EMBEDDED = ("DogeCDMoE",)  # classes whose experts are rows of embeddings, of one neuron each


@dataclass(frozen=True)
class Form:
    """How a class of experts keeps its weights, in the words of transformers' ``use_experts_implementation``.

    Args:
        has_gate: Whether gate and up are one fused parameter, ``gate_up_proj``, or there is no gate.
        has_bias: Whether the fused parameters have biases beside them.
        has_post_expert_norm: Whether a norm follows each expert.
        is_transposed: Whether a weight is kept as ``[in_features, out_features]``.
        is_concatenated: Whether the rows of the gate come before those of up, or in turn with them.
        activation: Name of the activation, from the experts' module on, if the class has no _apply_gate.
    """

    has_gate: bool = True
    has_bias: bool = False
    has_post_expert_norm: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    activation: str = "act_fn"


# Of the classes that are not decorated with it.
FORMS = {
    "DbrxExperts": Form(activation="mlp.activation_fn"),
    "Llama4TextExperts": Form(is_transposed=True),
    "LongcatFlashExperts": Form(),
    "Step3p7Experts": Form(),
}


@dataclass(frozen=True)
class View:
    """Where the weight of a layer lies in the fused parameters.

    Args:
        weight: Name of the fused weight, from the experts' module on.
        bias: Name of the fused bias, shape ``[experts, rows]``, if there is one.
        expert: What of the fused parameters belongs to the expert.
        rows: What of the expert's rows, of shape ``[out_features, in_features]``, belongs to the layer.
        is_transposed: Whether the expert's weight is kept the other way round.
    """

    weight: str
    bias: str | None
    expert: int | slice
    rows: slice
    is_transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """Return the layer's part of the fused weight, shape ``[out_features, in_features]``: not a copy."""
        of_expert = fused[self.expert]
        return (of_expert.T if self.is_transposed else of_expert)[self.rows]


class ExpertLinear(nn.Linear):
    """A linear layer of one expert, whose weight and bias are views of fused parameters.

    It gets the tokens that were routed to the expert, as rows of shape ``[tokens of this expert, in_features]``, in the
    order of ``tokens``.

    Args:
        experts: The module with the fused parameters.
        view: Where its weight lies in them.
        name: Fully qualified name of that module.
    """

    experts: nn.Module

    def __init__(self, experts: nn.Module, view: View, name: str) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which makes parameters
        self.__dict__["experts"] = experts  # not a child: the experts are above it
        self.view = view
        self.parameters_held = {"weight": f"{name}.{view.weight}"}
        if view.bias is not None:
            self.parameters_held["bias"] = f"{name}.{view.bias}"
        self.out_features, self.in_features = self.weight.shape
        # While it is called: the token of each row, ascending, as the place in all tokens of all samples, one sample
        # after the other; and the number of all these tokens.
        self.tokens: Tensor | None = None
        self.num_tokens = 0

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, shape ``[out_features, in_features]``: not a copy, so it can be written to.

        Outside of a forward and a backward pass of a sharded model it is one: all ranks must ask for it together.
        """
        return self.view.of(self.fused)

    @property
    def fused(self) -> Tensor:
        """The fused parameter that holds the weight."""
        return cast(Tensor, attrgetter(self.view.weight)(self.experts))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias, shape ``[out_features]``: not a copy."""
        if self.view.bias is None:
            return None
        return attrgetter(self.view.bias)(self.experts)[self.view.expert][self.view.rows]


class Routing(NamedTuple):
    """Where the tokens of one call of experts went: ``experts`` and ``tokens`` have one entry for each pair of them.

    Args:
        experts: Numbers of experts, ascending; one beyond the last is none.
        tokens: Places of tokens in all tokens of all samples.
        num_tokens: Number of all these tokens.
    """

    experts: Tensor
    tokens: Tensor
    num_tokens: int


class Expert(nn.Module):
    """One expert: an MLP of linear layers."""


@dataclass(frozen=True)
class TokensSeen:
    """How many tokens the experts of a model saw, and how many of the experts saw none."""

    num_experts: int
    fewest: int
    median: int
    most: int
    num_unseen: int

    @classmethod
    def of(cls, counts: Iterable[Tensor]) -> "TokensSeen | None":
        """Return the numbers; None of a model without experts.

        Args:
            counts: Of each module of experts, the number of tokens of each expert, shape ``[experts]``.
        """
        seen = [int(number) for count in counts for number in count.tolist()]
        if not seen:
            return None
        return cls(len(seen), min(seen), round(median(seen)), max(seen), seen.count(0))

    def in_words(self) -> str:
        """Return a sentence."""
        none = f"{self.num_unseen:,} of {self.num_experts:,} saw none"
        return f"An expert saw {self.fewest:,} to {self.most:,} tokens, {self.median:,} in the median; {none}."


def open_experts_(model: nn.Module) -> None:
    """Give each expert of a model linear layers: ``<experts>.<number>.gate_proj``, ``up_proj`` and ``down_proj``.

    From then on the experts of a block are computed one after the other, through these layers, so that their hooks are
    called. A model without experts is left as it is, and so are experts of no known kind, see ``check_are_open``.

    Args:
        model: Any model, also on the meta device.
    """
    for name, module in list(model.named_modules()):
        form = _form_of(module)
        if form is None or is_open(module):
            continue
        views = _views_of_dbrx(module) if type(module).__name__ == "DbrxExperts" else _views_of(module, form)
        for number, of_expert in enumerate(views):
            expert = Expert()
            for layer, view in of_expert.items():
                expert.add_module(layer, ExpertLinear(module, view, name))
            module.add_module(str(number), expert)
        if views:
            run = _every_expert if type(module).__name__ == "Llama4TextExperts" else _routed
            # On the module, and not on its class; a partial is copied with it.
            module.forward = partial(run, module, form)


def is_expert(layer: nn.Module) -> bool:
    """Tell whether a layer belongs to an expert."""
    return isinstance(layer, ExpertLinear)


def is_open(module: nn.Module) -> bool:
    """Tell whether a module is one of experts, and each of them has its layers."""
    return isinstance(module._modules.get("0"), Expert)


def check_are_open(model: nn.Module) -> None:
    """Raise ValueError if a model has experts whose neurons cannot be told apart: none is left out silently."""
    for name, module in model.named_modules():
        fused = [key for key, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
        kind = type(module).__name__
        is_closed = "Expert" in kind and fused and not isinstance(module, nn.Linear) and not is_open(module)
        if is_closed or kind in _EMBEDDED:
            if any(is_open(parent) for parent in _parents_of(model, name)):
                continue
            raise OptionError(
                "checkpoint",
                f"The experts of class {kind} ({name}) of --.checkpoint are of no known kind, so that "
                "their neurons would be left out: give another one, or score attention heads (--.granularity head).",
            )


def expert_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of experts of each module of experts, by its fully qualified name."""
    return {name: num_experts(module) for name, module in model.named_modules() if is_open(module)}


def num_experts(experts: nn.Module) -> int:
    """Return the number of experts of a module of experts."""
    return sum(isinstance(child, Expert) for child in experts.children())


def routing_of(experts: nn.Module) -> Routing:
    """Return where the tokens went when a module of experts was called last."""
    return cast(Routing, experts.routing)


def routers_of(model: nn.Module) -> set[nn.Module]:
    """Return the modules that route tokens to experts, and the modules in them."""
    return {
        part
        for parent in model.modules()
        if any(is_open(child) for child in parent.children())
        for name, child in parent.named_children()
        if name in ROUTERS
        for part in child.modules()
    }


# The next three functions alone depend on a router's numbers: footprint.py puts equal shares in place of them.
def rows_of(X_TH: Tensor, num_tokens: int) -> Tensor:
    """Return the rows that are routed to the experts of Llama 4: what is 0 stays 0, since these have no bias.

    Args:
        X_TH: All tokens for one expert after the other, shape ``[experts * tokens, hidden]``.
        num_tokens: Of one expert.
    """
    return (X_TH != 0).any(dim=1).nonzero(as_tuple=True)[0]


def runs_of(numbers: Tensor, num_experts: int) -> tuple[list[int], list[int]]:
    """Return which experts get tokens, and how many each of them gets.

    Args:
        numbers: Of the expert of each row, ascending, shape ``[rows]``.
        num_experts: Of the module.
    """
    hit, counts = numbers.unique_consecutive(return_counts=True)
    return hit.tolist(), counts.tolist()


def most_rows(ends: Tensor, num_rows: int) -> int:
    """Return the number of rows of the group that has most.

    Args:
        ends: Where each group begins, and the last one ends, shape ``[groups + 1]``.
        num_rows: Of all groups.
    """
    return int(ends.diff().max())


def count_in_words(model: nn.Module, neurons: Mapping[str, int]) -> str:
    """Return a number of neurons such as ``46,080 dense, 1,179,648 in 128 x 48 experts``, or ``46,080`` of no experts.

    Args:
        model: Any model.
        neurons: The number of neurons of each scored layer, by the layer's fully qualified name.
    """
    layers = {name: model.get_submodule(name) for name in neurons}
    blocks = Counter(id(layer.experts) for layer in layers.values() if isinstance(layer, ExpertLinear))
    if not blocks:
        return f"{sum(neurons.values()):,}"
    inside = sum(number for name, number in neurons.items() if is_expert(layers[name]))
    sizes = set(blocks.values())
    experts = f"{sizes.pop()} x {len(blocks)}" if len(sizes) == 1 else f"{blocks.total():,}"
    dense = sum(neurons.values()) - inside
    return (f"{dense:,} dense, " if dense else "") + f"{inside:,} in {experts} experts"


def _form_of(module: nn.Module) -> Form | None:
    """Return the form of experts; None of any other module, or of experts that have another form."""
    flags = {name: value for name, value in vars(module).items() if name in Form.__dataclass_fields__}
    return Form(**flags) if "is_transposed" in flags else FORMS.get(type(module).__name__)


def _views_of(experts: nn.Module, form: Form) -> list[dict[str, View]]:
    """Return for each expert the views of its layers, in the order in which they are called."""
    if experts.down_proj is None:
        return []
    number, *shape = cast(Tensor, experts.down_proj).shape
    size = shape[0 if form.is_transposed else 1]
    rows = {"up_proj": slice(None)}
    if form.has_gate:
        halves = (slice(size), slice(size, None)) if form.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        rows = dict(zip(("gate_proj", "up_proj"), halves, strict=True))
    fused = "gate_up_proj" if form.has_gate else "up_proj"
    parts = {**{layer: (fused, part) for layer, part in rows.items()}, "down_proj": ("down_proj", slice(None))}
    return [
        {
            layer: View(weight, f"{weight}_bias" if form.has_bias else None, expert, part, form.is_transposed)
            for layer, (weight, part) in parts.items()
        }
        for expert in range(number)
    ]


def _views_of_dbrx(experts: nn.Module) -> list[dict[str, View]]:
    """Return the views of DBRX, whose fused parameters hold the experts one below the other."""
    size, number = cast(int, experts.ffn_hidden_size), cast(int, experts.num_experts)
    parts = {"gate_proj": ("mlp.w1", False), "up_proj": ("mlp.v1", False), "down_proj": ("mlp.w2", True)}
    return [
        {
            layer: View(weight, None, slice(expert * size, (expert + 1) * size), slice(None), is_transposed)
            for layer, (weight, is_transposed) in parts.items()
        }
        for expert in range(number)
    ]


def _routed(
    experts: nn.Module, form: Form, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute experts for the tokens that are routed to them; takes the place of their ``forward``.

    Args:
        experts: Their module.
        form: How it keeps its weights.
        hidden_states: Shape ``[tokens, hidden]``; of DBRX ``[samples, tokens, hidden]``.
        top_k_index: Experts of each token, shape ``[tokens, k]``. A number beyond the last expert adds nothing, but of
            LongCat the token itself.
        top_k_weights: Weight of each of them, of the same shape.
    """
    X_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    number, k = num_experts(experts), top_k_index.shape[-1]
    weights, identity = top_k_weights.reshape(-1), getattr(experts, "identity_expert", None)
    with torch.no_grad():
        of_slots, slots = top_k_index.reshape(-1).sort(stable=True)  # so that the tokens of an expert are ascending
        experts.__dict__["routing"] = Routing(of_slots, slots // k, len(X_TH))
        hit, counts = runs_of(of_slots, number)
    # As the weights of the router are, if they are wider.
    final = torch.zeros_like(X_TH, dtype=torch.promote_types(X_TH.dtype, weights.dtype))
    for expert, slots_R in zip(hit, slots.split(counts), strict=True):
        tokens = slots_R // k
        if expert < number:
            Y_RH = _run(experts, form, expert, X_TH[tokens], tokens, len(X_TH))
        elif identity is not None:
            Y_RH = identity(X_TH[tokens])
        else:
            continue
        final.index_add_(0, tokens, (Y_RH * weights[slots_R, None]).to(final.dtype))
    return final.to(hidden_states.dtype).view(hidden_states.shape)


def _every_expert(experts: nn.Module, form: Form, hidden_states: Tensor) -> Tensor:
    """Compute the experts of Llama 4, which get all tokens; takes the place of their ``forward``.

    Args:
        experts: Their module.
        form: How it keeps its weights.
        hidden_states: All tokens for one expert after the other, times the router's weight, which is 0 where a token is
            not routed to the expert; shape ``[experts * tokens, hidden]``.
    """
    X_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    number = num_experts(experts)
    num_tokens = len(X_TH) // number
    with torch.no_grad():
        rows = rows_of(X_TH, num_tokens)
        numbers = rows // num_tokens
        experts.__dict__["routing"] = Routing(numbers, rows % num_tokens, num_tokens)
        hit, counts = runs_of(numbers, number)
    final = torch.zeros_like(X_TH)
    for expert, rows_R in zip(hit, rows.split(counts), strict=True):
        final.index_add_(0, rows_R, _run(experts, form, expert, X_TH[rows_R], rows_R % num_tokens, num_tokens))
    return final


def _run(experts: Any, form: Form, number: int, X_RH: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Compute one expert.

    Args:
        experts: The module of experts.
        form: How it keeps its weights.
        number: Of the expert.
        X_RH: Its tokens, shape ``[rows, hidden]``.
        tokens: Which ones they are, shape ``[rows]``.
        num_tokens: All tokens.
    """
    expert: Any = experts.get_submodule(str(number))
    layers = list(expert.children())
    for layer in layers:
        layer.tokens, layer.num_tokens = tokens, num_tokens
    up = expert.up_proj(X_RH)
    if not form.has_gate:
        Z_RI = attrgetter(form.activation)(experts)(up)
    elif (apply := getattr(experts, "_apply_gate", None)) is None:
        Z_RI = attrgetter(form.activation)(experts)(expert.gate_proj(X_RH)) * up
    else:
        both = (expert.gate_proj(X_RH), up)
        Z_RI = apply(torch.cat(both, dim=-1) if form.is_concatenated else torch.stack(both, dim=-1).flatten(-2))
    Y_RH = expert.down_proj(Z_RI)
    for layer in layers:
        layer.tokens = None
    return experts.post_expert_norm(Y_RH) if form.has_post_expert_norm else Y_RH


def _parents_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that a module lies in."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
