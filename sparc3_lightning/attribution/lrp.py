"""The rules of layer-wise relevance propagation (LRP), put on one model for the length of a ``with`` block.

The rules belong to operations (``rules.py``), so that any decoder has them. Relevance is then gradient times input,
with the gradient that autograd computes inside the block. ``lrp_check.py`` measures whether it is right for a
model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import MethodType
from typing import get_args
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.attribution.rules import Given, Rule, Rules, mark
from sparc3_lightning.errors import OptionError

# Layers through which CP-LRP passes no relevance: what they put out goes into a gate, or into the softmax.
_NONE_BY_CP_LRP = {"gate_proj", "q_proj", "k_proj"}
_models_under_rules: WeakSet[nn.Module] = WeakSet()
_activations: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def lrp(model: PreTrainedModel, rule: Rule = "attnlrp") -> Iterator[None]:
    """Apply the LRP rules to a model, and take them off on leaving the block.

    Inside the block the logits are the same as outside, and the gradient of a logit, times the input of a linear layer
    or times one of its weights, is the relevance of that input or weight. The rules hold inside the forward pass of the
    model, and where a block is computed again in the backward pass, and nowhere else.

    =================  ==========================================  =======================================
    part               ``attnlrp``                                 ``cp_lrp``
    =================  ==========================================  =======================================
    attention          half to the values, a quarter each to the   all to the values, none through softmax
                       queries and the keys
    activation         identity rule                               identity rule; none through a gate
    gate times up      half to each                                all to up_proj
    norm               identity rule                               identity rule
    router of experts  half, where it has a softmax; none where    none
                       it has a sigmoid
    other products     half to each factor                         half to each factor
    =================  ==========================================  =======================================

    The relevance of the input tokens does not sum to the logit: a bias keeps its part of it, and so do learned
    positions (GPT-2, OPT). Under ``attnlrp`` the softmax of the attention keeps a part as well: in a random LLaMA
    without biases a quarter to a half. Under ``cp_lrp`` nothing else is lost; ``check_lrp`` measures it.

    Source: Achtibat et al. 2024, arXiv:2402.05602, equations 5 to 9; CP-LRP: Ali et al. 2022, arXiv:2202.07304.

    Args:
        model: A causal language model, in evaluation mode, in float32, float64 or bfloat16.
        rule: The set of rules.

    Raises:
        ValueError: If the model cannot have rules (``check_can_have_rules``), is compiled, or has them already.
        OptionError: In the forward pass, if the model carries out an operation that has no rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"Unknown rule {rule!r}; expected 'attnlrp' or 'cp_lrp'.")
    with under_rules(model, Rules(rule, rule)):
        yield


def check_have_relevance(modules: Iterable[str], rule: Rule) -> None:
    """Raise ValueError if a rule passes no relevance through one of the layers, by their fully qualified names."""
    names = {name.rpartition(".")[2] for name in modules}
    none = names & _NONE_BY_CP_LRP if rule == "cp_lrp" else set()
    if none:
        others = f"'[{', '.join(sorted(names - none))}]'" if names - none else "of other layers"
        raise OptionError(
            "rule",
            f"--.rule {rule} passes no relevance through {', '.join(sorted(none))}: give --.layers "
            f"{others}, or --.rule attnlrp.",
        )


def check_can_have_rules(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Raise OptionError if a model cannot have the rules, by what is known before its weights are loaded.

    Args:
        config: Of the model.
        dtype: Of its weights: not float16, in which the 1e-10 that the identity rule adds to its input is 0.
    """
    if dtype == torch.float16:
        raise OptionError(
            "dtype", "LRP is not defined in float16 (1e-10 is 0 there): use --.dtype bfloat16 or float32."
        )
    if config.is_encoder_decoder:
        what = f"lrp explains decoders alone, and {config.model_type!r} has an encoder: give another --.checkpoint."
        raise OptionError("method", what)
    if getattr(config, "quantization_config", None) is not None:
        what = "lrp has no rules for quantized weights: give a --.checkpoint whose weights are not quantized."
        raise OptionError("method", what)


@contextmanager
def under_rules(model: PreTrainedModel, rules: Rules) -> Iterator[None]:
    """Have the forward pass of a model run under rules, and its activations under the identity rule; see ``lrp``."""
    _check_applicable(model)
    with ExitStack() as undo:
        for module in model.modules():
            if _is_activation(module):
                undo.enter_context(_bound(module, _activation(rules, module.forward)))
        undo.enter_context(_bound(model, _forward(rules, model)))
        _models_under_rules.add(model)
        undo.callback(_models_under_rules.discard, model)
        yield


def _forward(rules: Rules, model: PreTrainedModel) -> Callable:
    own = model.__dict__.get("forward")

    @wraps(type(model).forward)  # generate looks at what arguments it takes
    def forward(self: PreTrainedModel, *args: Given, **kwargs: Given) -> Given:
        rules.are_trained = any(parameter.requires_grad for parameter in self.parameters())
        if kwargs.get("inputs_embeds") is not None:
            mark(kwargs["inputs_embeds"])
        with rules:
            return own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)

    return forward


def _activation(rules: Rules, function: Callable[..., Tensor]) -> Callable:
    return lambda _, *args, **kwargs: rules.activation(function, *args, **kwargs)


@contextmanager
def _bound(module: nn.Module, function: Callable) -> Iterator[None]:
    """Give one module a forward of its own in place of its class's."""
    before = module.__dict__.get("forward")
    module.forward = MethodType(function, module)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _is_activation(module: nn.Module) -> bool:
    """Tell whether a module applies a nonlinear function, 0 at 0, to each element by itself."""
    if isinstance(module, nn.Linear | Conv1D) or module._modules or module._buffers or module._parameters:
        # Those of transformers that have parameters are for elements too (xIELU).
        return type(module).__module__ == "transformers.activations"
    if module not in _activations:
        _activations[module] = _acts_on_elements(module.forward)
    return _activations[module]


@torch.no_grad()
def _acts_on_elements(function: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-3.0, 3.0, 24).view(1, 3, 8)
    other = x.clone()
    other[0, 1, 2] = 2.5
    try:
        y, of_other, of_double, of_negative, at_0 = map(function, (x.clone(), other, 2 * x, -x, torch.zeros(1, 3, 8)))
        changed = (y != of_other).nonzero().tolist()
        is_linear = torch.allclose(of_double, 2 * y) and torch.allclose(of_negative, -y)
        is_even_shape = y.shape == x.shape and y.is_floating_point()
    except Exception:  # it takes other arguments, whatever it says of these
        return False
    return is_even_shape and changed in ([], [[0, 1, 2]]) and not is_linear and not at_0.any()


def _check_applicable(model: PreTrainedModel) -> None:
    if model in _models_under_rules:
        raise ValueError("The LRP rules are applied to this model already: `with lrp(model)` does not nest.")
    if model.training:
        raise ValueError("LRP explains the model as it predicts: call model.eval() first.")
    check_can_have_rules(model.config, model.dtype)
    for name, module in model.named_modules():
        is_compiled = module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        if is_compiled or isinstance(module, torch.jit.ScriptModule):
            what = f"{name or 'The model'} is compiled, and its operations are hidden from LRP: load it without."
            raise OptionError("method", what)
