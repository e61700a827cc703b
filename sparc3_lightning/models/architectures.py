"""What transformers calls the parts of a model: linear layers, MLPs, attentions."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.experts import ExpertLinear, routers_of

Linear = nn.Linear | Conv1D

ALL = "all"  # as a target: every linear layer but the head and the routers of experts
# What the layers of an MLP are called below the module that holds them: those whose row i, and the one whose column i,
# make up neuron i. The first of the rows is the one that is scored; of a gated MLP it is the one beside the gate. Where
# there is but one layer of rows and it has twice as many as the last layer has columns, its first half is the gate.
MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("up_proj", "gate_proj"), "down_proj"),  # LLaMA and most others
    (("w3", "w1"), "w2"),  # LFM2
    (("proj_up", "proj_up_gate"), "proj_down"),  # xLSTM
    (("w_in.w_1", "w_in.w_0"), "w_out"),  # CPM-Ant
    (("up_proj",), "down_proj"),  # Nemotron, Arcee, MPT
    (("gate_up_proj",), "down_proj"),  # Phi-3, GLM-4
    (("input_linear",), "output_linear"),  # Granite 4
    (("Wi",), "Wo"),  # ModernBERT
    (("fc1",), "fc2"),  # OPT, Phi
    (("c_fc",), "c_proj"),  # GPT-2, StarCoder 2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom, Falcon
    (("fc_in",), "fc_out"),  # GPT-J
    (("intermediate.dense",), "output.dense"),  # BERT
    (("feed_forward.intermediate",), "feed_forward.output"),  # ProphetNet
    (("feed_forward.key",), "feed_forward.value"),  # RWKV
    (("ffn.0",), "ffn.2"),  # CTRL
    (("lin1",), "lin2"),  # XLM
    (("ff.layer_1",), "ff.layer_2"),  # XLNet
)
KNOWN_MLPS = ", ".join(f"{' or '.join(rows)} beside {column}" for rows, column in MLPS)
_BY_END: dict[str, list[tuple[str, tuple[str, ...], str]]] = {}  # by the last part of a row's name: that name, and MLPS
for _rows, _column in MLPS:
    for _row in _rows:
        _BY_END.setdefault(_row.rpartition(".")[2], []).append((_row, _rows, _column))
# An MLP inside a part of a block that is called so does not write into the stream: it makes up the factor of a norm
# (A.X K2), or chooses among experts (Zaya).
_NO_MLPS = re.compile("norm|router")
_BLOCK = re.compile(r"\.\d+\.")
# The last layer of an attention, a layer beside it that makes its values, and of which kind both are if the last rows
# of that layer are the values, in the order of the heads. None stands for rows of another order.
ATTENTIONS: tuple[tuple[str, str, type[Linear] | None], ...] = (
    ("o_proj", "v_proj", nn.Linear),  # LLaMA and most others
    ("out_proj", "v_proj", nn.Linear),  # OPT, GPT-J
    ("self_attn.dense", "v_proj", nn.Linear),  # Phi
    ("attn.Wo", "v_proj", nn.Linear),  # ModernBERT's decoder
    ("attn.c_proj", "c_attn", Conv1D),  # GPT-2
    ("attn.c_proj", "c_attn", None),  # GPT-BigCode
    ("o_proj", "qkv_proj", None),  # Phi-3
    ("o_proj", "kv_b_proj", None),  # DeepSeek
    ("attention.dense", "query_key_value", None),  # GPT-NeoX
    ("self_attention.dense", "query_key_value", None),  # Bloom, Falcon
    ("self_attn.dense", "query_key_value", None),  # Persimmon
    ("out_proj", "Wqkv", None),  # MPT, DBRX
    ("out_proj", "qkv_proj", None),  # CodeGen
)
KNOWN_ATTENTIONS = ", ".join(dict.fromkeys(f"{output} beside {values}" for output, values, _ in ATTENTIONS))
ATTENTION_OUTPUTS = list(dict.fromkeys(output for output, _, _ in ATTENTIONS))
_HEAD_DIMS = ("v_head_dim", "head_dim", "head_size")  # attributes of an attention; DeepSeek has one more of its keys


def weight_of(layer: Linear) -> Tensor:
    """Return the weight of a linear layer, shape ``[out_features, in_features]``: not a copy, so it can be written to.

    A weight that is sharded is so too; that of an expert is made whole, for which all ranks must ask together.
    """
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def shape_of(layer: Linear) -> tuple[int, int]:
    """Return the numbers of outputs and of inputs of a linear layer, without a look at its weight."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def stored(layer: Linear) -> Tensor:
    """Return the parameter that holds the weight of a linear layer, in whatever shape, for its device and its dtype."""
    return layer.fused if isinstance(layer, ExpertLinear) else layer.weight


def whole_weights(layers: Mapping[str, Linear]) -> Iterator[tuple[str, Tensor]]:
    """Yield each layer's name and its whole weight, shape ``[out_features, in_features]``; all ranks ask together.

    What the experts of a block are held in is put together once for those that come one after the other.
    """
    held: Tensor | None = None
    fused = torch.empty(0)
    for name, layer in layers.items():
        if not isinstance(layer, ExpertLinear):
            yield name, whole(weight_of(layer))
            continue
        if layer.fused is not held:
            held = layer.fused
            fused = whole(held)
        yield name, layer.view.of(fused)


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

    A layer that shares its weight with one before it is left out, see ``twins_of``.

    Args:
        model: Any model.
        layers: Such as ``up_proj`` or ``attn.c_proj``; ``all`` stands for every linear layer but the head
            and the routers of experts.

    Raises:
        ValueError: If a name matches no linear layer; the names there are are listed.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for _, name in _ties(model):
        linear.pop(name, None)
    unknown = [end for end in layers if end != ALL and not any(ends_in(name, end) for name in linear)]
    if unknown:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise OptionError("layers", f": the model has no linear layer {unknown[0]!r}; it has {kinds}.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {head, *(routers_of(model) if ALL in layers else ())}
    return {
        name: module
        for name, module in linear.items()
        if any(ends_in(name, end) for end in layers) or (ALL in layers and module not in left_out)
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


@dataclass(frozen=True)
class Rows:
    """Rows of a linear layer: the i-th of them belongs to the i-th neuron of an MLP.

    Args:
        layer: Fully qualified name.
        part: Which of the layer's rows.
    """

    layer: str
    part: slice


@dataclass(frozen=True)
class Mlp:
    """Where the neurons of an MLP are, all by fully qualified names.

    Args:
        name: Of the module that holds the layers.
        rows: Those before the activation; the scored ones first.
        column: The layer whose column i, and input i, belong to the i-th neuron.
    """

    name: str
    rows: tuple[Rows, ...]
    column: str

    @property
    def num_neurons(self) -> int:
        """Number of neurons."""
        return self.rows[0].part.stop - self.rows[0].part.start

    @property
    def is_fused(self) -> bool:
        """Whether one layer holds both the rows of the gate and those beside it."""
        return len(self.layers) == 2 and len(self.rows) == 2

    @property
    def layers(self) -> list[str]:
        """All layers that hold the neurons' weights."""
        return [*dict.fromkeys(rows.layer for rows in self.rows), self.column]

    def part_of(self, layer: str) -> slice:
        """Return which rows of a layer are scored, the layer being one of ``rows``."""
        return next(rows.part for rows in self.rows if rows.layer == layer)


def mlps_of(model: nn.Module) -> list[Mlp]:
    """Return the MLPs of a model in the order of its modules: several of a block, and experts, are each one of them.

    Args:
        model: Any model; one on the meta device suffices, and no weight is looked at.
    """
    modules = dict(model.named_modules())
    shared = {name for _, name in _ties(model)}
    names = [name for name, module in modules.items() if isinstance(module, Linear) and name not in shared]
    found = [find_mlp(name, modules.get) for name in names]
    return list({mlp.column: mlp for mlp in found if mlp is not None}.values())


def mlp_of(model: nn.Module, scored_layer: str) -> Mlp:
    """Return the MLP that a layer before its activation belongs to.

    Args:
        model: Any model; one on the meta device suffices.
        scored_layer: Fully qualified name of one of the MLP's ``rows``.

    Raises:
        ValueError: If it is none.
    """
    mlp = mlp_at(model, scored_layer)
    if mlp is None:
        raise ValueError(
            f"{scored_layer!r} is not a layer of MLP neurons of this model: expected {KNOWN_MLPS}. Is neurons.json of "
            "another model?"
        )
    return mlp


def mlp_at(model: nn.Module, layer: str) -> Mlp | None:
    """Return the MLP that a layer before its activation belongs to; None if it is none. Looks at no other MLP."""
    if any(layer == name for _, name in _ties(model)):
        return None

    def module_at(name: str) -> nn.Module | None:
        try:
            return model.get_submodule(name)
        except AttributeError:
            return None

    return find_mlp(layer, module_at)


def find_mlp(layer: str, module_at: Callable[[str], nn.Module | None]) -> Mlp | None:
    """Return the MLP that a layer before its activation belongs to; None if there is none.

    A name alone decides nothing: all layers of the MLP must be there, be linear, and have shapes that fit.

    Args:
        layer: Fully qualified name.
        module_at: Returns the module of a name, if there is one.
    """
    for end, rows, column in _BY_END.get(layer.rpartition(".")[2], ()):
        block = _BLOCK.search(layer)
        if not ends_in(layer, end) or _NO_MLPS.search(layer, block.end() if block else 0):
            continue
        above = layer.removesuffix(end)  # ends in a dot, or is empty
        modules = [module_at(above + name) for name in (*rows, column)]
        *of_rows, of_column = [shape_of(module) if isinstance(module, Linear) else None for module in modules]
        if of_column is None or None in of_rows:
            continue
        number, heights = of_column[1], {shape[0] for shape in of_rows if shape is not None}
        first = Rows(above + rows[0], slice(0, number))
        if heights == {number}:
            parts = [first, *(Rows(above + name, slice(0, number)) for name in rows[1:])]
        elif len(rows) == 1 and heights == {2 * number}:
            parts = [Rows(first.layer, slice(number, 2 * number)), first]
        else:
            return None
        return Mlp(above.rstrip("."), tuple(parts), above + column)
    return None


def twins_of(model: nn.Module) -> dict[Linear, list[Linear]]:
    """Return the linear layers that have the weight of another one, by that one, which is the first.

    Few models have any: Zamba has one MLP, and one attention, in several of its blocks. They are the same components.
    """
    twins: dict[Linear, list[Linear]] = {}
    for first, name in _ties(model):
        twins.setdefault(linear_at(model, first), []).append(linear_at(model, name))
    return twins


def _ties(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of linear layers with one weight: the first, and another."""
    found = []
    for other, first in getattr(model, "all_tied_weights_keys", {}).items():
        (one, _, kind), (another, _, same) = first.rpartition("."), other.rpartition(".")
        is_weight = kind == same == "weight"
        if is_weight and all(isinstance(model.get_submodule(name), Linear) for name in (one, another)):
            found.append((one, another))
    return found


def neuron_layers(model: nn.Module) -> list[str]:
    """Return the names at the end of the layers that are scored in the MLPs of a model, such as ``up_proj``.

    Raises:
        ValueError: If the model has no MLP of a known kind.
    """
    ends = [mlp.rows[0].layer.removeprefix(f"{mlp.name}.") for mlp in mlps_of(model)]
    if not ends:
        linear = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear)})
        raise OptionError(
            "layers",
            f"{type(model).__name__} has no MLP whose neurons could be scored, and its linear layers are {linear}: "
            "score their single weights, with --.granularity weight and --.layers '[all]'.",
        )
    return list(dict.fromkeys(ends))


@dataclass(frozen=True)
class Attention:
    """Where the heads of an attention are.

    Args:
        output: The last layer.
        values: Name of the layer whose last rows are the values, below the attention; None if there is none such.
        head_dim: The dimensions of a head.
    """

    output: Linear
    values: str | None
    head_dim: int


def is_heads(module: str) -> bool:
    """Tell whether the components of a layer, by its fully qualified name, are heads."""
    return any(ends_in(module, output) for output in ATTENTION_OUTPUTS)


def head_layers(model: nn.Module, named: Sequence[str] | None = None) -> list[str]:
    """Return the name that the last layer of an attention has in each block of a model, such as ``o_proj``.

    Args:
        model: Any model.
        named: Names that are returned in its place, if the model has such layers.

    Raises:
        ValueError: If the model has no attention of a known kind, or a name is not of the last layer of one.
    """
    found = [name for name, _ in model.named_modules() if find_attention(model, name) is not None]
    layers = [output for output in ATTENTION_OUTPUTS if any(ends_in(name, output) for name in found)]
    if found and not set(find_layers(model, layers)) <= set(found):  # a gated convolution ends in such a name too
        layers = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in found))
        if not set(find_layers(model, layers)) <= set(found):
            layers = found
    if not layers:
        linear = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear)})
        raise OptionError(
            "granularity",
            f"The model has no attention of a known kind ({KNOWN_ATTENTIONS}); its linear layers are {linear}: score "
            "its neurons, with --.granularity neuron.",
        )
    for end in named or ():
        if not any(ends_in(name, end) for name in found) or not set(find_layers(model, [end])) <= set(found):
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
    if not is_heads(module) or any(module == name for _, name in _ties(model)):
        return None
    for end, values, kind in ATTENTIONS:
        if not ends_in(module, end):
            continue
        try:
            attention, output = model.get_submodule(module.rpartition(".")[0]), linear_at(model, module)
            beside = linear_at(attention, values)
        except AttributeError:
            continue
        size = next((getattr(attention, name) for name in _HEAD_DIMS if hasattr(attention, name)), None)
        if size is not None and _fits(output, beside, size, kind):
            return Attention(output, None if kind is None else values, size)
    return None


def _fits(output: Linear, values: Linear, head_dim: int, kind: type[Linear] | None) -> bool:
    """Tell whether the layers of an attention are of a kind, and their sizes are whole numbers of heads."""
    if not (isinstance(output, kind or Linear) and isinstance(values, kind or Linear)):
        return False
    inputs, rows = shape_of(output)[1], shape_of(values)[0]
    if kind is None:
        return inputs % head_dim == 0
    return inputs % head_dim == rows % head_dim == 0 and (kind is Conv1D or inputs % rows == 0)


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
            f"{name!r} ({config.model_type}) is {kind}, and its decoder of text cannot be taken by itself: give a "
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
    return [module for module in model.modules() if is_block(module)]


def is_block(module: nn.Module) -> bool:
    """Tell whether a module is a block of a model of transformers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def check_indices(granularity: str, name: str, indices: Iterable[int], number: int) -> None:
    """Raise ValueError unless a layer, which has a number of neurons or heads, has all these."""
    for index in indices:
        if not 0 <= index < number:
            raise ValueError(
                f"{granularity.capitalize()} {index} of {name} does not exist: the layer has {number} {granularity}s. "
                "Is neurons.json of another model?"
            )
