"""Whether the LRP rules are right for a model, measured on a short sample of it: it is refused where they are not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparc3_lightning.attribution.lrp import check_can_have_rules, lrp, under_rules
from sparc3_lightning.attribution.rules import Function, Given, Rule, Rules
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import Linear, layer_of
from sparc3_lightning.models.experts import ExpertLinear, is_expert

# How much of the logit may be lost, by the dtype of the weights, before a model is refused.
TOLERANCES = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: 0.1}
OTHER_METHODS = "use --.method gradient or wanda, which need no rules."
# Functions of autograd that are no operations of a model: of checkpointed blocks, of FSDP2, and the rules themselves.
_KNOWN_FUNCTIONS = ("lxt.", "sparc3_lightning.", "torch.utils.checkpoint", "torch.distributed.")


class NonfiniteLogitsError(OptionError):
    """A logit of the sample on which the rules are to be checked is NaN or infinite."""


@dataclass(frozen=True)
class LrpCheck:
    """What a short sample shows about the rules on a model.

    Args:
        logits_unchanged: Whether the logits under the rules are those without.
        conserved: Part of the target logit that arrives at the tokens, with the CP rule on the attention.
        kept: Part that constants keep: biases, learned positions, and whatever is added to an activation.
        layers_reached: Blocks with a target layer at which relevance arrives.
        num_layers: Blocks with a target layer.
    """

    logits_unchanged: bool
    conserved: float
    kept: float
    layers_reached: int
    num_layers: int

    def __str__(self) -> str:
        kept = f", {self.kept:.1%} kept by biases and other constants" if f"{self.kept:.1%}" not in _NOTHING else ""
        return (
            f"LRP: logits {'un' if self.logits_unchanged else ''}changed; {self.conserved:.1%} of the relevance "
            f"conserved under CP attention{kept}; {self.layers_reached} of {self.num_layers} layers reached"
        ).replace("%", " %")


_NOTHING = ("0.0%", "-0.0%")


def check_lrp(model: PreTrainedModel, rule: Rule, layers: Mapping[str, Linear], input_ids: Tensor) -> LrpCheck:
    """Measure on a short sample whether the rules are right for a model.

    Of a model whose weights are sharded all ranks must ask together, with the same sample.

    Args:
        model: As of ``lrp``.
        rule: The set of rules.
        layers: The target layers by their fully qualified names.
        input_ids: Shape ``[1, tokens]``, at least two tokens.

    Raises:
        NonfiniteLogitsError: If a logit of the sample is NaN or infinite without the rules too.
        OptionError: If the logits change, less or more than the logit arrives at the tokens and at constants
            (``TOLERANCES``), no relevance arrives at a target layer, or the model has an operation that is hidden from
            the rules: a fused kernel or a function of autograd of its own.
    """
    check_can_have_rules(model.config, model.dtype)
    plain = _pass(model, input_ids, {})
    if not plain.logits.isfinite().all():
        what = "The logits of the first samples are NaN or infinite, and show nothing about LRP: try --.dtype float32."
        raise NonfiniteLogitsError("dtype", what)
    with lrp(model, rule):
        ruled = _pass(model, input_ids, layers)
    if ruled.hidden:
        raise OptionError(
            "method",
            f"--.method lrp cannot look into {ruled.hidden[0]}, which {model.config.model_type!r} carries out: "
            f"uninstall or disable the package of this kernel, or {OTHER_METHODS}",
        )
    with under_rules(model, counting := _Counting("cp_lrp", rule)):
        counted = _pass(model, input_ids, {})
    reached = {layer_of(name) for name in ruled.reached}
    # Of the experts those to which a token was routed.
    called = [name for name, layer in layers.items() if name in ruled.called or not is_expert(layer)]
    check = LrpCheck(
        logits_unchanged=_are_unchanged(model, input_ids, plain.logits, ruled.logits),
        conserved=counted.on_tokens / counted.target,
        kept=float(counting.kept) / counted.target,
        layers_reached=len(reached),
        num_layers=len({layer_of(name) for name in called}),
    )
    if not check.logits_unchanged:
        difference = (ruled.logits - plain.logits).abs().max().item()
        what = f"--.method lrp changes the logits of {model.config.model_type!r} by {difference:.1e}: {OTHER_METHODS}"
        raise OptionError("method", what)
    tolerance = TOLERANCES[model.dtype]
    if not abs(check.conserved + check.kept - 1) <= tolerance:  # nor NaN
        raise OptionError(
            "method",
            f"--.method lrp conserves {100 * (check.conserved + check.kept):.1f} % of the target logit of "
            f"{model.config.model_type!r}, which is not within {100 * tolerance:.0f} % of all: it has an operation "
            f"whose rule is not right; {OTHER_METHODS}",
        )
    missed = [name for name in ruled.called if name not in ruled.reached]
    if missed or check.layers_reached < check.num_layers:
        missed = missed or [name for name in called if layer_of(name) not in reached]
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in missed}))
        way = "" if rule == "attnlrp" else ", or --.rule attnlrp"
        what = f"--.rule {rule} passes no relevance through {missed[0]}: give --.layers without {kinds}{way}."
        raise OptionError("rule", what)
    return check


class _Counting(Rules):
    """The rules, and the relevance that constants keep."""

    kept: Tensor | float = 0.0

    def __torch_function__(self, func: Function, types: object, args: Given = (), kwargs: Given = None) -> Given:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _ADDENDS and isinstance(result, Tensor) and result.requires_grad and torch.is_grad_enabled():
            constant = _ADDENDS[func](*args, **(kwargs or {}))
            if constant is not None:
                result.register_hook(lambda gradient: self._keep(gradient, constant))
        return result

    def _keep(self, gradient: Tensor, constant: Tensor | float) -> None:
        # A mask is minus infinity where nothing arrives.
        kept = (gradient * constant).masked_fill(gradient == 0, 0)
        self.kept = self.kept + kept.sum(dtype=torch.float64).item()


def _of_sum(x: Given, y: Given = None, other: Given = None, alpha: float = 1) -> Given:
    y = other if y is None else y
    return _constant(x, y, 1, alpha)


def _of_difference(x: Given, y: Given = None, other: Given = None, alpha: float = 1) -> Given:
    y = other if y is None else y
    return _constant(x, y, 1, -alpha)


def _of_reversed_difference(x: Given, y: Given = None, other: Given = None, alpha: float = 1) -> Given:
    y = other if y is None else y
    return _constant(x, y, -alpha, 1)


def _constant(x: Given, y: Given, of_x: float, of_y: float) -> Given:
    """Return the constant of two that are added, times its sign; None if both depend on the tokens."""
    constant, factor = (y, of_y) if isinstance(x, Tensor) and x.requires_grad else (x, of_x)
    is_constant = not (isinstance(constant, Tensor) and constant.requires_grad)
    return constant * factor if is_constant else None


def _of_linear(input: Given, weight: Given, bias: Given = None) -> Given:
    return None if bias is None else bias.detach()


def _of_convolution(input: Given, weight: Given, bias: Given = None, *_: Given, **__: Given) -> Given:
    return None if bias is None else bias.detach().view(-1, *[1] * (weight.dim() - 2))


def _of_product(term: Given, *_: Given, beta: float = 1, **__: Given) -> Given:
    return None if term.requires_grad else term * beta


def _of_norm(input: Given, shape: Given, weight: Given = None, bias: Given = None, *_: Given, **__: Given) -> Given:
    return None if bias is None else bias.detach()


def _functions(*names: str) -> list[Function]:
    return [getattr(place, name) for name in names for place in (torch, Tensor, nn.functional) if hasattr(place, name)]


# The constant that an operation adds to what depends on the tokens.
_ADDENDS: dict[Function, Function] = {
    **dict.fromkeys(_functions("add", "add_", "__add__", "__radd__", "__iadd__"), _of_sum),
    **dict.fromkeys(_functions("sub", "sub_", "subtract", "__sub__", "__isub__"), _of_difference),
    **dict.fromkeys(_functions("rsub", "__rsub__"), _of_reversed_difference),
    **dict.fromkeys(_functions("linear"), _of_linear),
    **dict.fromkeys(_functions("conv1d"), _of_convolution),
    **dict.fromkeys(_functions("addmm", "baddbmm", "addbmm", "addcmul"), _of_product),
    **dict.fromkeys(_functions("layer_norm"), _of_norm),
}


@dataclass(frozen=True)
class _Pass:
    """What a forward and a backward pass from the embeddings on shows."""

    logits: Tensor
    target: float
    on_tokens: float
    called: list[str]
    reached: set[str]
    hidden: list[str]


def _pass(model: PreTrainedModel, input_ids: Tensor, layers: Mapping[str, Linear]) -> _Pass:
    """Propagate the logit of the last token that is largest in size."""
    embeddings: list[Tensor] = []
    called: list[str] = []
    reached: set[str] = set()

    def begin(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # which may be changed in place

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if not isinstance(output, Tensor):  # a router that gives several: no layer of neurons
                return
            seen = module.tokens if isinstance(module, ExpertLinear) else None
            # In the last block nothing comes back to an expert that the last token was not routed to.
            if seen is None or seen[-1] == input_ids.shape[1] - 1:
                called.append(name)
            output.requires_grad_().register_hook(lambda gradient: reached.add(name) if gradient.any() else None)

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(begin)]
    handles += [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits
            target = logits[0, -1, logits[0, -1].abs().argmax()]
            hidden = _hidden_functions(target)
            target.backward()
    finally:
        for handle in handles:
            handle.remove()
    found = sum((leaf.double() * leaf.grad.double()).sum().item() for leaf in embeddings if leaf.grad is not None)
    return _Pass(logits.detach(), target.item(), found, called, reached, hidden)


def _are_unchanged(model: PreTrainedModel, input_ids: Tensor, plain: Tensor, ruled: Tensor) -> bool:
    """Tell whether logits are the same, or differ by no more than they do from one pass to the next (atomic sums)."""
    if torch.equal(plain, ruled):
        return True
    with torch.no_grad():  # where a mask needs a gradient, scaled_dot_product_attention takes another kernel
        if torch.equal(model(input_ids=input_ids, use_cache=False).logits, ruled):
            return True
    again = _pass(model, input_ids, {}).logits
    return bool((ruled - plain).abs().max() <= 4 * (again - plain).abs().max()) and not torch.equal(again, plain)


def _hidden_functions(target: Tensor) -> list[str]:
    """Name the functions in a graph whose operations no rule sees: of autograd's own extensions, and in C++."""
    found: dict[str, None] = {}
    seen: set[object] = set()
    left = [target.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [source for source, _ in node.next_functions]
        function = getattr(type(node), "_forward_cls", None)
        if function is not None:
            name = f"{function.__module__}.{function.__name__}"
            # The custom operations of transformers are products with the weights of experts.
            if not name.startswith(_KNOWN_FUNCTIONS) and "_transformers_grouped_mm" not in name:
                found[name.removeprefix("torch._library.autograd.GeneratedBackwardFor_")] = None
        elif "CppNode" in node.name():
            found[node.name()] = None
    return list(found)
