"""lxt's own way to the rules, by classes of transformers: an oracle for the families that lxt has forwards for."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparc3_lightning.attribution.rules import import_lxt_rules

import_lxt_rules()  # without lxt's list of models, which cannot be imported
from lxt.efficient import patches  # noqa: E402

# By the model_type of transformers: the class of the norms, the class of a gated MLP, and else the activation's name.
FAMILIES = {
    "gemma3_text": ("Gemma3RMSNorm", "Gemma3MLP", None),
    "gpt2": ("LayerNorm", None, "act"),
    "llama": ("LlamaRMSNorm", "LlamaMLP", None),
    "opt": ("LayerNorm", None, "activation_fn"),
    "qwen2": ("Qwen2RMSNorm", "Qwen2MLP", None),
    "qwen3": ("Qwen3RMSNorm", "Qwen3MLP", None),
}


@contextmanager
def lxt_lrp(model: Any, rule: str) -> Iterator[None]:
    """Bind lxt's forwards to the modules of a model, and its attention to lxt's."""
    norm, gated_mlp, activation = FAMILIES[model.config.model_type]
    is_cp = rule == "cp_lrp"
    mlp_forward = patches.cp_gated_mlp_forward if is_cp else patches.gated_mlp_forward
    wrap = patches.cp_wrap_attention_forward if is_cp else patches.wrap_attention_forward
    norms = {"LayerNorm": ("forward", layer_norm), "Gemma3RMSNorm": ("_norm", gemma3_norm)}
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if type(module).__name__ == gated_mlp:
                undo.enter_context(bound(module, "forward", mlp_forward))
            elif name.rpartition(".")[2] == activation:
                undo.enter_context(bound(module, "forward", identity(module.forward)))
            elif type(module).__name__ == norm:
                undo.enter_context(bound(module, *norms.get(norm, ("forward", patches.rms_norm_forward))))
        undo.enter_context(attention(model, wrap))
        yield


def identity(forward: Callable) -> Callable:
    return lambda _, x: patches.identity_rule_implicit(forward, x)


def gemma3_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()


def layer_norm(self: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    ruled = patches.layer_norm_forward(self, x)
    # lxt's has other roundings than torch's, and the logits are to stay what they are.
    exact = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).detach()
    return exact + (ruled - ruled.detach())


@contextmanager
def bound(module: nn.Module, method: str, function: Callable) -> Iterator[None]:
    setattr(module, method, MethodType(function, module))
    try:
        yield
    finally:
        delattr(module, method)


@contextmanager
def attention(model: Any, wrap: Callable) -> Iterator[None]:
    """Route the model's attention through ``wrap``, by a name in transformers' two registries."""
    before = model.config._attn_implementation
    module = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    ALL_ATTENTION_FUNCTIONS["oracle"] = wrap(ALL_ATTENTION_FUNCTIONS.get_interface(before, eager))
    ALL_MASK_ATTENTION_FUNCTIONS.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation = "oracle"
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["oracle"], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["oracle"]
