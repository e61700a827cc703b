"""The rules of layer-wise relevance propagation (LRP), put on one model for the length of a ``with`` block.

The rules and the forwards they need are lxt's (Achtibat et al. 2024, AttnLRP, ICML 2024). lxt itself patches the
classes of transformers for the whole process, with no way back; here they are bound to the modules of one model, and
taken off again. Relevance is then gradient times input, with the gradient that autograd computes inside the block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.architectures import Linear, family_of

if TYPE_CHECKING:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

Rule = Literal["attnlrp", "cp_lrp"]
# Layers through which CP-LRP passes no relevance: what they put out goes into a gate, or into the softmax.
_NONE_BY_CP_LRP = {"gate_proj", "q_proj", "k_proj"}
# Modules that are linear in their input, or that relevance does not pass.
_NEED_NO_RULE = (Linear, nn.Embedding, nn.Dropout, nn.Identity)


@contextmanager
def lrp(model: PreTrainedModel, rule: Rule = "attnlrp") -> Iterator[None]:
    """Apply the LRP rules to a model, and take them off on leaving the block.

    Inside the block the logits are the same as outside, and the gradient of a logit, times the input of a linear layer
    or times one of its weights, is the relevance of that input or weight.

    =================  ==========================================  =======================================
    part               ``attnlrp``                                 ``cp_lrp``
    =================  ==========================================  =======================================
    attention          half to the values, a quarter each to the   all to the values, none through softmax
                       queries and the keys
    activation         identity rule                               identity rule; none through a gate
    gate times up      half to each                                all to up_proj
    norm               identity rule                               identity rule
    =================  ==========================================  =======================================

    The relevance of the input tokens does not sum to the logit: a bias keeps its part of it, and so do learned
    positions (GPT-2, OPT). Under ``attnlrp`` the softmax of the attention keeps a part as well: in a random LLaMA
    without biases a quarter to a half. Under ``cp_lrp`` nothing else is lost.

    Source: Achtibat et al. 2024, arXiv:2402.05602, equations 5 to 9; CP-LRP: Ali et al. 2022, arXiv:2202.07304.

    Args:
        model: A causal language model of a family in ``FAMILIES``, in evaluation mode, in float32, float64 or bfloat16.
        rule: The set of rules.

    Raises:
        ValueError: If the model's family has no rules, a module is reached by no rule, the model is in float16 (the
            identity rule divides by its input plus 1e-10, which is 0 there), or the rules are applied already.
    """
    rules = _Rules(rule)
    family = family_of(model.config)
    _check_applicable(model)
    reached: set[str] = set()
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if type(module).__name__ == family.gated_mlp:
                undo.enter_context(_bound(module, "forward", rules.gated_mlp))
                reached |= {name, f"{name}.act_fn"}
            elif name.rpartition(".")[2] == family.activation:
                undo.enter_context(_bound(module, "forward", rules.activation(module.forward)))
                reached.add(name)
            elif type(module).__name__ == family.norm:
                undo.enter_context(_bound(module, *rules.norm(family.norm)))
                reached.add(name)
        _check_reached(model, reached)
        undo.enter_context(_attention(model, rules.name, rules.attention))
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


class _Rules:
    """lxt's forwards for one set of rules."""

    def __init__(self, rule: Rule) -> None:
        patches = _import_lxt()
        if rule not in ("attnlrp", "cp_lrp"):
            raise ValueError(f"Unknown rule {rule!r}; expected 'attnlrp' or 'cp_lrp'.")
        self.name = f"sparc3_{rule}"
        attnlrp = rule == "attnlrp"
        self.gated_mlp = patches.gated_mlp_forward if attnlrp else patches.cp_gated_mlp_forward
        self.attention = patches.wrap_attention_forward if attnlrp else patches.cp_wrap_attention_forward
        self.patches = patches

    def norm(self, kind: str) -> tuple[str, Callable]:
        """Return the method of a norm's class to replace, and its replacement."""
        if kind == "LayerNorm":
            return "forward", _layer_norm(self.patches.layer_norm_forward)
        if kind == "Gemma3RMSNorm":
            return "_norm", _gemma3_norm
        return "forward", self.patches.rms_norm_forward

    def activation(self, forward: Callable) -> Callable:
        """Return the forward of an activation under the identity rule."""
        return lambda _, x: self.patches.identity_rule_implicit(forward, x)


def _import_lxt() -> ModuleType:
    """Import lxt's forwards without its list of models.

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
    from lxt.efficient import patches

    return patches


def _gemma3_norm(self: "Gemma3RMSNorm", x: torch.Tensor) -> torch.Tensor:
    """Normalise by the root mean square, with no gradient through it: the identity rule."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


def _layer_norm(forward: Callable) -> Callable:
    """Return torch's layer norm with lxt's gradient: the mean passes it, the standard deviation does not."""

    def layer_norm(self: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        ruled = forward(self, x)
        # lxt's has other roundings than torch's, and the logits are to stay what they are.
        exact = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).detach()
        return exact + (ruled - ruled.detach())

    return layer_norm


@contextmanager
def _bound(module: nn.Module, method: str, function: Callable) -> Iterator[None]:
    """Give one module its own method in place of its class's."""
    before = module.__dict__.get(method)
    setattr(module, method, MethodType(function, module))
    try:
        yield
    finally:
        if before is None:
            delattr(module, method)
        else:
            setattr(module, method, before)


@contextmanager
def _attention(model: PreTrainedModel, name: str, wrap: Callable) -> Iterator[None]:
    """Route the model's attention through ``wrap``, by a name of this model's own in transformers' two registries."""
    import sys

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    # Of the file that defines the attention's class: the class of the model itself may be one that FSDP2 made.
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    name = f"{name}_{model.config.model_type}_{before}_{id(model):x}"
    ALL_ATTENTION_FUNCTIONS[name] = wrap(ALL_ATTENTION_FUNCTIONS.get_interface(before, eager))
    # transformers forms no mask at all for a name that is only in the registry's local mapping (5.23), and its global
    # mapping has a way in but none out.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def _check_applicable(model: PreTrainedModel) -> None:
    if model.config._attn_implementation.startswith("sparc3_"):
        raise ValueError("The LRP rules are applied to this model already: `with lrp(model)` does not nest.")
    if model.training:
        raise ValueError("LRP explains the model as it predicts: call model.eval() first.")
    if model.dtype == torch.float16:
        raise OptionError(
            "dtype", "LRP is not defined in float16 (1e-10 is 0 there): use --.dtype bfloat16 or float32."
        )
    if getattr(model.config, "final_logit_softcapping", None):
        raise ValueError("There is no LRP rule for final_logit_softcapping; set it to None in the model's config.")


def _check_reached(model: PreTrainedModel, reached: set[str]) -> None:
    def is_reached(name: str, module: nn.Module) -> bool:
        return name in reached or isinstance(module, _NEED_NO_RULE) or "RotaryEmbedding" in type(module).__name__

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    left = [f"{name} ({type(module).__name__})" for name, module in leaves if not is_reached(name, module)]
    if left:
        raise ValueError(f"No LRP rule reaches {len(left)} module(s): {', '.join(left[:5])}.")
