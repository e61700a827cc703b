"""The rules of layer-wise relevance propagation (LRP), one for each operation that a model may carry out.

They are lxt's (Achtibat et al. 2024, AttnLRP, ICML 2024). lxt gives them to classes of transformers, one adapter for
each family; here they belong to operations of torch, so that a model of any decoder architecture has them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparc3_lightning.errors import OptionError

Rule = Literal["attnlrp", "cp_lrp"]
# What an operation of torch is, and takes and gives: tensors, numbers, and lists of these.
Function = Callable[..., Any]
Given = Any

# Attributes of tensors. A tensor that requires a gradient is a function of the tokens. One below the first target layer
# requires none, but is one as well: it has this mark, so that the rules do not depend on which layers are targets.
_OF_TOKENS = "_sparc3_of_tokens"
_GATE = "_sparc3_gate"  # what an activation gives, which lets through or not what it is multiplied with
_FACTOR_OF = "_sparc3_factor_of"  # a weak reference to the tensor of which this one is a multiple, or the sigmoid


class Rules(TorchFunctionMode):
    """Gives every operation on what depends on the tokens its rule, while autograd records; no value changes.

    Args:
        attention: The rule of attention: ``cp_lrp`` passes nothing through a softmax.
        gates: The rule of products with an activation: ``cp_lrp`` passes nothing through the activation.
    """

    def __init__(self, attention: Rule, gates: Rule) -> None:
        super().__init__()
        self.lxt = import_lxt_rules()
        self.softmax_passes = attention == "attnlrp"
        self.gates_pass = gates == "attnlrp"
        self.are_trained = False  # whether some weight of the model requires a gradient

    def __torch_function__(self, func: Function, types: object, args: Given = (), kwargs: Given = None) -> Given:
        """Carry out an operation under its rule."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        handler = OPERATIONS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        result = func(*args, **kwargs)
        self.mark(result, (args, kwargs))
        return result

    def depends(self, value: object) -> bool:
        """Tell whether a value is a tensor that depends on the tokens."""
        if not isinstance(value, Tensor):
            return False
        if hasattr(value, _OF_TOKENS):
            return True
        # Of trained weights, 1 + weight requires a gradient too: all that depends on the tokens has the mark then.
        return value.requires_grad and (not self.are_trained or (value.is_leaf and not isinstance(value, nn.Parameter)))

    def mark(self, result: object, origin: object) -> None:
        """Mark what requires no gradient, but comes from something marked."""
        is_in_graph = isinstance(result, Tensor) and result.requires_grad
        if type(result) is torch.Size or (is_in_graph and not self.are_trained):
            return
        fresh = [x for x in _tensors(result) if x.is_floating_point() and (self.are_trained or not x.requires_grad)]
        # What requires none, but comes from what requires one, does not depend on the values of it.
        is_marked = self.depends if self.are_trained else lambda x: hasattr(x, _OF_TOKENS)
        if fresh and any(map(is_marked, _tensors(origin))):
            for x in fresh:
                mark(x)

    def activation(self, function: Callable[..., Tensor], x: Tensor, *rest: Given, **options: Given) -> Tensor:
        """Apply an elementwise function under the identity rule: its gradient is f(x) / x."""
        if not torch.is_grad_enabled() or not self.depends(x):
            return function(x, *rest, **options)
        if x.requires_grad:
            result = self.lxt.identity_rule_implicit(lambda x: function(x, *rest, **options), x)
        else:
            result = function(x, *rest, **options)
        mark(result)
        setattr(result, _GATE, True)
        return result

    def divided(self, x: Tensor, factor: float) -> Tensor:
        """Return a tensor that passes a part of its gradient."""
        return self.lxt.divide_gradient(x, factor) if x.requires_grad else x


# The rules. Each takes the mode, the operation and its arguments.


def _stop(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """No gradient."""
    result = rules.lxt.stop_gradient(func(*args, **kwargs))
    if func in _SIGMOIDS and args:
        setattr(result, _FACTOR_OF, getattr(args[0], _FACTOR_OF, None) or weakref.ref(args[0]))
    return result


def _identity(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    if not args:
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    if not kwargs.get("inplace"):
        return rules.activation(func, *args, **kwargs)
    return _put(args[0], rules.activation(func, *args, **{**kwargs, "inplace": False}))


def _no_gate(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """The identity rule for what is no activation: a product with it is not one with a gate."""
    result = _identity(rules, func, args, kwargs)
    if hasattr(result, _GATE):
        delattr(result, _GATE)
    return result


def _in_place(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """The rule of the same operation out of place, into a copy."""
    target = args[0]
    if not any(map(rules.depends, args)):
        return func(*args, **kwargs)
    copy = target.clone()
    _be_as(copy, target)
    return _put(target, rules.__torch_function__(_OUT_OF_PLACE[func], (), (copy, *args[1:]), kwargs))


def _put(target: Tensor, result: Tensor) -> Tensor:
    target.copy_(result)
    _be_as(target, result)
    return target


def _be_as(x: Tensor, other: Tensor) -> None:
    """Give a tensor the marks of another one."""
    if hasattr(other, _OF_TOKENS):
        mark(x)
    if hasattr(other, _GATE):
        setattr(x, _GATE, True)
    elif hasattr(x, _GATE):
        delattr(x, _GATE)


def _power(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    base, exponent = args if len(args) > 1 else (args[0], kwargs.get("exponent", 2))
    if not rules.depends(base):
        return _stop(rules, func, args, kwargs) if rules.depends(exponent) else func(*args, **kwargs)
    if isinstance(exponent, Tensor):
        fixed = rules.lxt.stop_gradient(exponent)
        return rules.activation(lambda x: func(x, fixed), base)
    if exponent < 1:
        return _stop(rules, func, args, kwargs)
    options = {name: value for name, value in kwargs.items() if name != "input"}
    return _plain(rules, func, (rules.divided(base, exponent), *args[1:]), options, base)


def _quotient(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """Of the denominator no gradient."""
    fixed = [x if not rules.depends(x) else rules.lxt.stop_gradient(x) for x in args[1:]]
    fixed_options = {name: rules.lxt.stop_gradient(x) if rules.depends(x) else x for name, x in kwargs.items()}
    return _plain(rules, func, (args[0], *fixed), fixed_options, args[0])


def _solution(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """Of the system no gradient: it is a denominator."""
    return _plain(rules, func, (rules.lxt.stop_gradient(args[0]), *args[1:]), kwargs, args[1:2])


def _product(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """To each of n factors an nth part; none to a gate where gates pass none."""
    given = (args, kwargs)
    if func is F.linear and not rules.depends(args[1] if len(args) > 1 else kwargs["weight"]):
        return _plain(rules, func, args, kwargs, given)
    if func is torch.einsum and len(args) == 2 and isinstance(args[1], tuple | list):
        args = (args[0], *args[1])
    named = {**dict(enumerate(args)), **kwargs}
    left_out = _TERMS if func in _SUMS_OF_PRODUCTS else ()
    factors = [name for name, value in named.items() if name not in left_out and rules.depends(value)]
    gates = [] if rules.gates_pass or func not in _ELEMENTWISE else [n for n in factors if hasattr(named[n], _GATE)]
    if 0 < len(gates) < len(factors):
        for name in gates:
            named[name] = rules.lxt.stop_gradient(named[name])
    elif len(factors) > 1:
        for name in factors:
            named[name] = rules.divided(named[name], len(factors))
    positional = [named.pop(i) for i in range(len(args))]
    result = _plain(rules, func, positional, named, given)
    if not rules.gates_pass and len(factors) == 1 and func in _ELEMENTWISE:
        _mark_gate(result, named, args, factors[0])
    return result


def _mark_gate(result: Tensor, kwargs: Mapping[str, object], args: Sequence[object], name: Given) -> None:
    """Mark x times sigmoid(a x) as an activation, and remember of which tensor a scalar multiple is one."""
    own = kwargs[name] if isinstance(name, str) else args[name]
    others = [x for x in (*args, *kwargs.values()) if x is not own]
    if any(getattr(x, _FACTOR_OF, lambda: None)() is own for x in others):
        setattr(result, _GATE, True)
    elif all(isinstance(x, int | float) for x in others):
        setattr(result, _FACTOR_OF, weakref.ref(own))
        if hasattr(own, _GATE):
            setattr(result, _GATE, True)


def _attention(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    value = named["value"]
    of_values = (value, named["query"] if rules.softmax_passes else ())
    scores = [name for name in ("query", "key", "attn_mask") if rules.depends(named.get(name))]
    for name in scores:
        if rules.softmax_passes:
            named[name] = rules.divided(named[name], 2 if name == "attn_mask" else 4)
        else:
            named[name] = rules.lxt.stop_gradient(named[name])
    if scores and rules.softmax_passes:
        named["value"] = rules.divided(value, 2)
    return _plain(rules, func, (), named, of_values)


def _softmax(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    return _plain(rules, func, args, kwargs, args) if rules.softmax_passes else _stop(rules, func, args, kwargs)


def _layer_norm(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    def norm(
        input: Tensor, normalized_shape: Given, weight: Given = None, bias: Given = None, eps: float = 1e-5, *_: Given
    ) -> Tensor:
        return _LayerNorm.apply(input, tuple(normalized_shape), weight, bias, eps)

    return _plain(rules, norm, args, kwargs, args[:1])


def _rms_norm(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    def norm(input: Tensor, normalized_shape: Given, weight: Given = None, eps: float | None = None) -> Tensor:
        return _RmsNorm.apply(func, input, tuple(normalized_shape), weight, eps)

    return _plain(rules, norm, args, kwargs, args[:1])


def _embedding(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    result = func(*args, **kwargs)
    mark(result)
    return result


def _cast(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    result = _plain(rules, func, args, kwargs, args[:1])
    if hasattr(args[0], _GATE):
        setattr(result, _GATE, True)
    return result


def _of_first(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    return _plain(rules, func, args, kwargs, args[:1])


def _constant(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    return func(*args, **kwargs)


def _written(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    """Write into a part: x[i] = y."""
    func(*args, **kwargs)
    rules.mark(args[0], args[2])


def _refused(rules: Rules, func: Function, args: Given, kwargs: Given) -> Given:
    if any(map(rules.depends, _tensors((args, kwargs)))):
        raise OptionError(
            "method",
            f"There is no LRP rule for the operation {func.__name__}, which this model carries out: use --.method "
            "gradient or wanda, which need no rules.",
        )
    return func(*args, **kwargs)


def _plain(rules: Rules, func: Function, args: Given, kwargs: Given, origin: object) -> Given:
    """Carry out an operation whose result depends on the tokens if one of some values does."""
    result = func(*args, **kwargs)
    rules.mark(result, origin)
    return result


def mark(x: Tensor) -> None:
    """Say of a tensor that it depends on the tokens, though it requires no gradient."""
    setattr(x, _OF_TOKENS, True)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


class _LayerNorm(torch.autograd.Function):
    """torch's layer norm, with the standard deviation as a constant."""

    @staticmethod
    def forward(ctx: Given, x: Tensor, shape: tuple[int, ...], weight: Given, bias: Given, eps: float) -> Tensor:
        result, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        # The input is only needed for the gradient of the weight.
        ctx.save_for_backward(*((x, mean) if ctx.needs_input_grad[2] else (None, None)), weight, scale)
        ctx.number = len(shape)
        return result

    @staticmethod
    def backward(ctx: Given, gradient: Tensor) -> Given:
        x, mean, weight, scale = ctx.saved_tensors
        inner = tuple(range(-ctx.number, 0))
        outer = tuple(range(gradient.dim() - ctx.number))
        of_normed = gradient if weight is None else gradient * weight
        of_input = ((of_normed - of_normed.mean(inner, keepdim=True)) * scale).to(gradient.dtype)
        of_weight = ((x - mean) * scale * gradient).sum(outer) if ctx.needs_input_grad[2] else None
        return of_input, None, of_weight, gradient.sum(outer) if ctx.needs_input_grad[3] else None, None


class _RmsNorm(torch.autograd.Function):
    """torch's norm by the root mean square, with that as a constant."""

    @staticmethod
    def forward(
        ctx: Given, func: Function, x: Tensor, shape: tuple[int, ...], weight: Given, eps: float | None
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
        scale = torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, scale)
        ctx.number = len(shape)
        return func(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Given, gradient: Tensor) -> Given:
        x, weight, scale = ctx.saved_tensors
        of_normed = gradient if weight is None else gradient * weight
        outer = tuple(range(gradient.dim() - ctx.number))
        of_weight = (x * scale * gradient).sum(outer).to(weight.dtype) if ctx.needs_input_grad[3] else None
        return None, (of_normed * scale).to(gradient.dtype), None, of_weight, None


def import_lxt_rules() -> ModuleType:
    """Import lxt's rules without its list of models.

    That list imports lxt's BERT, which asks transformers for what 5.0 and 5.24 removed; nothing of it is used here. Who
    asks lxt for it later, as ``monkey_patch`` does, gets what importing it gives.
    """
    import sys
    from importlib import import_module

    models = "lxt.efficient.models"
    if "lxt.efficient" not in sys.modules:
        placeholder: Any = ModuleType(models)
        placeholder.get_default_map = lambda module: import_module(models).get_default_map(module)
        sys.modules[models] = placeholder
        try:
            import_module("lxt.efficient")
        finally:
            del sys.modules[models]
    from lxt.efficient import rules

    return rules


def _named(*names: str) -> list[Function]:
    """Return the functions that torch has by these names, in all the places where it keeps them."""
    places = (torch, Tensor, F, torch.special, torch.linalg, getattr(torch._C, "_nn"))  # noqa: B009
    return [getattr(place, name) for name in names for place in places if hasattr(place, name)]


_SIGMOIDS = set(_named("sigmoid", "expit"))
_ELEMENTWISE = set(_named("mul", "multiply", "__mul__", "__rmul__"))
_SUMS_OF_PRODUCTS = set(_named("addmm", "baddbmm", "addbmm", "addmv", "addr", "addcmul"))
_TERMS = (0, "input", "self")  # of these the first argument, which is added to the product
OPERATIONS: dict[Function, Function] = {}
_BY_NAME: dict[Function, str] = {
    _stop: "rsqrt sqrt exp exp2 sigmoid expit softplus log log2 log10 logsumexp logsigmoid hardsigmoid reciprocal inv "
    "inverse __rpow__ __rdiv__ __rtruediv__",
    _identity: "silu gelu relu relu6 leaky_relu prelu elu celu selu mish hardswish softsign tanhshrink softshrink "
    "hardshrink hardtanh threshold tanh",
    _no_gate: "clamp clip clamp_min clamp_max normalize erf sin expm1 log1p atan arctan asinh arcsinh",
    _power: "pow __pow__ square float_power",
    _quotient: "div divide true_divide __div__ __truediv__ div_ divide_ true_divide_ __itruediv__ __idiv__",
    _solution: "solve_triangular solve",
    _product: "mul multiply __mul__ __rmul__ matmul __matmul__ __rmatmul__ bmm mm mv dot inner outer ger vdot vecdot "
    "tensordot einsum kron linear addmm baddbmm addbmm addmv addr addcmul grouped_mm _grouped_mm",
    _attention: "scaled_dot_product_attention",
    _softmax: "softmax",
    _layer_norm: "layer_norm",
    _rms_norm: "rms_norm",
    _embedding: "embedding",
    _cast: "to float double half bfloat16 type type_as contiguous",
    _of_first: "expand_as view_as reshape_as",
    _constant: "detach zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full "
    "new_empty new_tensor",
    _written: "__setitem__",
    _refused: "group_norm batch_norm instance_norm local_response_norm glu bilinear multi_head_attention_forward prod "
    "cumprod log_softmax logcumsumexp rrelu gumbel_softmax softmin chain_matmul multi_dot rnn_tanh "
    "rnn_relu lstm gru",
}
for _rule, _names in _BY_NAME.items():
    OPERATIONS.update(dict.fromkeys(_named(*_names.split()), _rule))
# Of operations in place the same ones out of place, except for quotients, whose rule is that of both.
_OUT_OF_PLACE: dict[Function, Function] = {
    getattr(place, f"{name}_"): getattr(place, name)
    for place in (torch, Tensor, F)
    for rule in (_stop, _identity, _no_gate, _power, _product)
    for name in _BY_NAME[rule].split()
    if hasattr(place, f"{name}_") and hasattr(place, name)
}
_OUT_OF_PLACE |= {Tensor.__imul__: Tensor.mul, Tensor.__ipow__: Tensor.pow}
OPERATIONS.update(dict.fromkeys(_OUT_OF_PLACE, _in_place))
