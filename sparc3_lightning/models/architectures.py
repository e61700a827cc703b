"""What transformers calls the parts of a model: linear layers, MLPs, attentions, families with LRP rules."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.errors import OptionError

Linear = nn.Linear | Conv1D

ALL = "all"  # as a target: every linear layer but the head
# The layers whose row i, and the layer whose column i, make up neuron i: of a gated MLP (LLaMA, Qwen, Gemma3), and of
# the plain ones of OPT and GPT-2. The first is the one that is scored.
MLPS = ((("up_proj", "gate_proj"), "down_proj"), (("fc1",), "fc2"), (("c_fc",), "c_proj"))
KNOWN_MLPS = ", ".join(f"{' or '.join(rows)} beside {column}" for rows, column in MLPS)
# The last layer of an attention, the layer of its values beside it, and of which kind both are: of LLaMA, Qwen and
# Gemma, of OPT, and of GPT-2, whose c_attn holds queries, keys and values side by side. The kind tells GPT-2 from
# GPT-BigCode, which has the same names, but another order of rows.
ATTENTIONS: dict[str, tuple[str, type[Linear]]] = {
    "o_proj": ("v_proj", nn.Linear),
    "out_proj": ("v_proj", nn.Linear),
    "attn.c_proj": ("c_attn", Conv1D),
}
KNOWN_ATTENTIONS = ", ".join(f"{output} beside {values}" for output, (values, _) in ATTENTIONS.items())


@dataclass(frozen=True)
class Family:
    """What the modules are called that need a rule.

    Args:
        norm: Class of the norms: LayerNorm, or one that divides by the root mean square.
        gated_mlp: Class of the MLPs, if they have a gate.
        activation: Name of the activation in a block, if they have none.
    """

    norm: str
    gated_mlp: str | None = None
    activation: str | None = None


# By the model_type of transformers.
FAMILIES = {
    "gemma3_text": Family("Gemma3RMSNorm", gated_mlp="Gemma3MLP"),
    "gpt2": Family("LayerNorm", activation="act"),
    "llama": Family("LlamaRMSNorm", gated_mlp="LlamaMLP"),
    "opt": Family("LayerNorm", activation="activation_fn"),
    "qwen2": Family("Qwen2RMSNorm", gated_mlp="Qwen2MLP"),
    "qwen3": Family("Qwen3RMSNorm", gated_mlp="Qwen3MLP"),
}


def weight_of(layer: Linear) -> Tensor:
    """Return the weight of a linear layer, shape ``[out_features, in_features]``: not a copy, so it can be written to.

    A weight that is sharded is so too.
    """
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def linear_at(model: nn.Module, name: str) -> Linear:
    """Return the linear layer of a model that has a fully qualified name."""
    return cast(Linear, model.get_submodule(name))


def parameters_of(model: nn.Module, layer: str) -> dict[str, str]:
    """Return the fully qualified names of the parameters that hold a layer's weights, by what the layer calls them.

    They are its own, such as ``weight``; or the layer is one of an expert, and a view of fused parameters.
    """
    module = model.get_submodule(layer)
    held: dict[str, str] | None = getattr(module, "parameters_held", None)
    return held or {name: f"{layer}.{name}" for name, _ in module.named_parameters(recurse=False)}


def find_layers(model: nn.Module, layers: Sequence[str]) -> dict[str, Linear]:
    """Return the linear layers whose name is, or ends in, one of ``layers``, by fully qualified name.

    Args:
        model: Any model.
        layers: Such as ``up_proj`` or ``attn.c_proj``; ``all`` stands for every linear layer but the head.

    Raises:
        ValueError: If a name matches no linear layer; the names there are are listed.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    unknown = [end for end in layers if end != ALL and not any(ends_in(name, end) for name in linear)]
    if unknown:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise OptionError("layers", f": the model has no linear layer {unknown[0]!r}; it has {kinds}.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in linear.items()
        if any(ends_in(name, end) for end in layers) or (ALL in layers and module is not head)
    }


def ends_in(name: str, end: str) -> bool:
    """Tell whether a fully qualified name ends in a name, or in several joined by dots, such as ``attn.c_proj``."""
    return f".{name}".endswith(f".{end}")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; then all ranks must ask for it together."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def layer_of(module: str) -> int:
    """Return the number of the layer that a fully qualified name speaks of."""
    match = re.search(r"\.(\d+)\.", module)
    return int(match.group(1)) if match else 0


def neuron_layers(model: nn.Module) -> list[str]:
    """Return the name that the scored layer of an MLP has in each block of a model, such as ``up_proj``.

    Raises:
        ValueError: If the model has no MLP of a known kind.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [rows[0] for rows, column in MLPS if {*rows, column} <= names]
    if not found:
        raise OptionError(
            "layers", f"The model has no MLP of a known kind ({KNOWN_MLPS}): name the layers to score with --.layers."
        )
    return found


@dataclass(frozen=True)
class Attention:
    """The last layer of an attention, the layer whose last rows are its values, and the dimensions of a head."""

    output: Linear
    values: Linear
    head_dim: int


def is_heads(module: str) -> bool:
    """Tell whether the components of a layer, by its fully qualified name, are heads."""
    return any(ends_in(module, output) for output in ATTENTIONS)


def head_layers(model: nn.Module, named: Sequence[str] | None = None) -> list[str]:
    """Return the name that the last layer of an attention has in each block of a model, such as ``o_proj``.

    Args:
        model: Any model.
        named: Names that are returned in its place, if the model has such layers.

    Raises:
        ValueError: If the model has no attention of a known kind, or a name is not of the last layer of one.
    """
    found = [name for name, _ in model.named_modules() if find_attention(model, name) is not None]
    layers = [output for output in ATTENTIONS if any(ends_in(name, output) for name in found)]
    if not layers:
        linear = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear)})
        raise OptionError(
            "granularity",
            f"head: the model has no attention of a known kind ({KNOWN_ATTENTIONS}); its linear layers are {linear}.",
        )
    for end in named or ():
        if not any(ends_in(name, end) for name in found):
            raise OptionError(
                "layers",
                f"--.layers: {end!r} is no layer of attention heads of this model, which has {layers}: leave "
                "out --.layers for all heads.",
            )
    return list(named or layers)


def attention_of(model: nn.Module, module: str) -> Attention:
    """Return the attention that ends in a module, by the module's fully qualified name.

    Raises:
        ValueError: If it is not the last layer of an attention of a known kind.
    """
    attention = find_attention(model, module)
    if attention is None:
        raise ValueError(
            f"{module!r} is not a layer of attention heads of this model: expected the last layer of an attention with "
            f"a head_dim ({KNOWN_ATTENTIONS}). Is neurons.json of another model?"
        )
    return attention


def find_attention(model: nn.Module, module: str) -> Attention | None:
    """Return the attention that ends in a module, by the module's fully qualified name; None if none does."""
    for output, (values, kind) in ATTENTIONS.items():
        if ends_in(module, output):
            try:
                attention = model.get_submodule(module.rpartition(".")[0])
                size = cast(int, attention.head_dim)
                found = Attention(linear_at(model, module), linear_at(attention, values), size)
            except AttributeError:
                return None
            return found if isinstance(found.output, kind) and isinstance(found.values, kind) else None
    return None


def family_of(config: PreTrainedConfig) -> Family:
    """Return the entry of ``FAMILIES`` for the config of a model.

    Raises:
        ValueError: If there is none.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise OptionError(
            "method",
            f"There are no LRP rules for the architecture {model_type!r}. Covered are: {', '.join(sorted(FAMILIES))}. "
            "For another one use --.method wanda, which needs no rules.",
        )
    return FAMILIES[model_type]


def check_is_text(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError if a checkpoint has parts beside a decoder of text, such as a vision tower or an encoder.

    Its causal language model has other names than the files, or lacks the parts: an export would lose them.

    Args:
        name: Of the checkpoint.
        config: As ``AutoConfig`` reads it.
    """
    parts = [key for key in config.sub_configs if re.search("vision|image|audio|video|speech|text|vq|depth", key)]
    if parts or config.is_encoder_decoder:
        kind = f"multimodal (it has {' and '.join(parts)})" if parts else "an encoder and a decoder"
        raise ValueError(
            f"{name!r} ({config.model_type}) is {kind}, and its decoder of text cannot be pruned by itself: give a "
            "checkpoint of that alone."
        )


def is_recurrent(model: PreTrainedModel) -> bool:
    """Tell whether a model keeps a state of the text read so far: padding would go into it, and it is not repeated.

    So do state space models, gated convolutions and linear attention, also where there is attention besides. A model on
    the meta device suffices.
    """
    from transformers import DynamicCache

    layers = DynamicCache(config=model.config).layers
    return model._is_stateful or any(hasattr(layer, "conv_states") for layer in layers)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model of transformers, whatever it calls the list of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_indices(granularity: str, name: str, indices: Iterable[int], number: int) -> None:
    """Raise ValueError unless a layer, which has a number of neurons or heads, has all these."""
    for index in indices:
        if not 0 <= index < number:
            raise ValueError(
                f"{granularity.capitalize()} {index} of {name} does not exist: the layer has {number} {granularity}s. "
                "Is neurons.json of another model?"
            )
