"""Loading by transformers: what comes out is what the folder holds, and no code of a checkpoint runs."""

import copy
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparc3_lightning.models.conversion import Source, Sources
from sparc3_lightning.models.experts import open_experts_
from sparc3_lightning.models.weight_files import FLOATS, Weight, weights_of
from sparc3_lightning.sources import explain_hub_error

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Buffers that older files hold, and that a model computes by itself.
_COMPUTED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"
_MASK = r"(attn|attention)\.(bias|masked_bias|causal_mask)$"  # of causal attention, if it has the shape of one
ATTENTIONS = (None, "eager", "sdpa", "flex_attention")  # those that need no other package


class Task(NamedTuple):
    """What a checkpoint is loaded for.

    Args:
        kind: In words.
        auto_class: Class of transformers that loads such models.
        mapping: Its table of models, in ``transformers.models.auto.modeling_auto``.
        unused: Pattern of tensors that may be left over, since nothing of such a model could use them.
    """

    kind: str
    auto_class: str
    mapping: str
    unused: str | None = None


CAUSAL_LM = Task("causal language model", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING")
CLASSIFIER = Task(
    "text-classification model",
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    r"(^|\.)pooler\.",  # RoBERTa is trained with one, which its classifier does without
)


def read_config(name: str, location: str, revision: str | None, task: Task) -> "PreTrainedConfig":
    """Read the config of a checkpoint.

    Args:
        name: Of the checkpoint, for errors.
        location: Hub id or local folder.
        revision: Branch, tag or commit of a hub repository.
        task: What it is loaded for.

    Raises:
        OSError: If it cannot be had: no network, no such repository, or gated without a token.
        ValueError: If transformers does not know the architecture, it is no model for this task, or what it describes
            would not be loaded as it is: quantized weights, code of its own, an attention of another package.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    try:
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
        content = config.to_dict()
        method = _quantization(content)
    except OSError as error:
        raise OSError(explain_hub_error(name, error)) from None
    except Exception as error:  # a config may hold anything, and transformers raises what it meets
        if "custom code" in str(error):
            raise ValueError(_own_code(name, "config.json")) from None
        if isinstance(error, KeyError) or "recogni" in str(error):
            raise ValueError(
                f"transformers {transformers.__version__} does not know the architecture of {name!r}: upgrade it, "
                f"or check the model_type in its config.json ({in_short(error).split('; ')[0]})."
            ) from None
        raise ValueError(f"The config.json of {name!r} cannot be read: correct it ({in_short(error)}).") from None
    mapping = getattr(modeling_auto, task.mapping)
    if type(config) not in mapping:
        raise ValueError(f"{name!r} ({config.model_type}) is not a {task.kind}.")
    known = {"AutoConfig": type(config).__name__, task.auto_class: getattr(mapping[type(config)], "__name__", "")}
    if _has_own_code(content.get("auto_map"), known):
        raise ValueError(_own_code(name, "config.json"))
    if method is not None:
        raise ValueError(
            f"{name!r} is quantized ({method}), and its codes are not the weights: give a copy that is not quantized, "
            "or was dequantized and saved with save_pretrained."
        )
    if content.get("transformers_weights") is not None:
        raise ValueError(
            f"The config.json of {name!r} names a weight file of its own (transformers_weights): rename that file to "
            "model.safetensors, and remove the entry."
        )
    for part in (config, config.get_text_config()):
        attention = getattr(part, "_attn_implementation", None)
        if attention not in ATTENTIONS:
            raise ValueError(
                f"The config.json of {name!r} asks for the attention {attention!r}, which needs another package: "
                "remove attn_implementation from it."
            )
    return config


def read_generation_config(name: str, folder: Path) -> "GenerationConfig | None":
    """Read what a checkpoint folder says of drawing tokens, such as further end tokens; None if it says nothing.

    Raises:
        ValueError: If it cannot be read. (transformers would go on without it.)
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return None
    try:
        config = GenerationConfig.from_pretrained(folder)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(config, key)
            if not all(
                type(one) is int for one in (ids if isinstance(ids, list) else [ids] if ids is not None else [])
            ):
                raise ValueError(f"{key} is {ids!r}")
    except Exception as error:  # it may hold anything, as a config
        raise ValueError(
            f"The {GENERATION_CONFIG_NAME} of {name!r} cannot be read: correct it ({in_short(error)})."
        ) from None
    return config


def build_skeleton(
    name: str, config: "PreTrainedConfig", weights: Mapping[str, Weight] | None, task: Task, dtype: torch.dtype
) -> "PreTrainedModel":
    """Build a model on the meta device: its modules and their shapes, without weights.

    Args:
        name: Of the checkpoint, for errors.
        config: Of the model.
        weights: Tensors of its files, by name; None if they are not on this machine yet.
        task: What it is loaded for.
        dtype: Of the weights.

    Raises:
        ValueError: If the config describes no model that can be built, or more layers than there are tensors.
    """
    import transformers

    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if weights is not None and isinstance(layers, int) and layers > len(weights):
        raise ValueError(
            f"The config.json of {name!r} says {layers:,} layers, but its files hold {len(weights)} tensors: correct "
            "num_hidden_layers, or fetch the files again."
        )
    try:
        with torch.device("meta"):
            model = getattr(transformers, task.auto_class).from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # of numbers that do not fit, whatever torch or the model's class raises
        raise ValueError(
            f"The config.json of {name!r} describes no model that can be built: correct it ({in_short(error)})."
        ) from None
    if task is CAUSAL_LM:
        open_experts_(model)
    return model


def load_strictly(name: str, folder: Path, config: "PreTrainedConfig", task: Task, dtype: torch.dtype) -> Any:
    """Load a model on the CPU, in evaluation mode, with frozen weights.

    Args:
        name: Of the checkpoint, for errors.
        folder: With its files.
        config: As ``read_config`` gives it.
        task: What it is loaded for.
        dtype: Of the weights.

    Returns:
        The model of transformers.

    Raises:
        OSError: If a weight file is missing or damaged.
        ValueError: If the files hold other tensors than the model has.
    """
    import transformers

    weights = weights_of(folder)
    check_are_weights(name, weights)
    read_generation_config(name, folder)
    # Before gigabytes are read; what came of them is compared afterwards.
    sources_of(name, build_skeleton(name, config, weights, task, dtype), weights, task)
    try:
        model, info = getattr(transformers, task.auto_class).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except OSError as error:
        raise OSError(explain_hub_error(name, error)) from None
    except RuntimeError as error:  # where several tensors become one, and they do not fit
        raise ValueError(
            f"The weights of {name!r} are not those of its config.json ({in_short(error)}): fetch the files again."
        ) from None
    check_complete(
        name,
        info["missing_keys"],
        [key for key in info["unexpected_keys"] if not is_unused(key, weights.get(key), task)],
        [f"{key} {list(found)} for {list(wanted)}" for key, found, wanted in info["mismatched_keys"]],
        task,
    )
    if task is CAUSAL_LM:
        open_experts_(model)
    return model.eval().requires_grad_(False)


def sources_of(name: str, model: "PreTrainedModel", weights: Mapping[str, Weight], task: Task) -> dict[str, Source]:
    """Return what each tensor of a model is made of, as transformers finds it.

    Args:
        name: Of the checkpoint, for errors.
        model: On the meta device.
        weights: Tensors of its files, by name.
        task: What it is loaded for.

    Raises:
        ValueError: If the files hold other tensors than the model is made of.
    """
    sources = Sources(model, {key: weight.shape for key, weight in weights.items()})
    found = dict(sources.found)
    missing: list[str] = []
    unexpected: list[str] = [*sources.left]
    mismatched: list[str] = []
    for source in {source.parameters: source for source in found.values()}.values():
        differences = sources.differences(source)
        missing += differences.missing
        unexpected += differences.unexpected
        mismatched += differences.mismatched
    for one, other in ties_of(model):
        if one not in found and other in found:
            found[one] = found[other]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unexpected = [
        key
        for key in unexpected
        if not is_unused(key, weights[key], task) and not any(re.search(one, key) for one in ignored)
    ]
    check_complete(name, [*missing, *(sources.wanted.keys() - found.keys())], unexpected, mismatched, task)
    return found


def ties_of(model: "PreTrainedModel") -> list[tuple[str, str]]:
    """Return the pairs of tensors that a model's config ties, in both orders."""
    ties = dict(model.all_tied_weights_keys).items()
    return [*ties, *((source, target) for target, source in ties)]


def load_tokenizer(name: str, location: str, revision: str | None) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; one without a padding token pads with its end-of-sequence token.

    Args:
        name: Of the checkpoint, for errors.
        location: Hub id or local folder.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        OSError: If it cannot be had.
        ValueError: If it cannot be read, or is code of the checkpoint.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise OSError(explain_hub_error(name, error)) from None
    except Exception as error:  # of a damaged file, whatever the tokenizer's class raises
        if "custom code" in str(error):
            raise ValueError(_own_code(name, "tokenizer_config.json")) from None
        raise ValueError(
            f"The tokenizer of {name!r} cannot be read: fetch or copy its files again ({in_short(error)})."
        ) from None
    if tokenizer.init_kwargs.get("auto_map"):
        raise ValueError(_own_code(name, "tokenizer_config.json"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(name: str, tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> None:
    """Raise ValueError if a tokenizer can make a text into ids for which a model with this config has no embedding.

    Tokens that were added to a vocabulary are left out: a padding token has no embedding in many a checkpoint, and
    needs none.
    """
    num_embeddings = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder), default=0)
    if num_embeddings is not None and largest >= num_embeddings:
        raise ValueError(
            f"The tokenizer of {name!r} gives ids up to {largest:,}, but the model has embeddings for "
            f"{num_embeddings:,} tokens: give the tokenizer of this model."
        )


def check_are_weights(name: str, weights: Mapping[str, Weight]) -> None:
    """Raise ValueError if tensors hold codes of a quantization, and not numbers that can be used as they are."""
    codes = {
        tensor: weight.dtype
        for tensor, weight in weights.items()
        if weight.dtype not in FLOATS and (weight.dtype.startswith("F") or tensor.endswith("weight"))
    }
    if codes:
        first, dtype = next(iter(codes.items()))
        raise ValueError(
            f"{name!r} holds {len(codes)} quantized tensors ({first} is {dtype}), and their codes are not the weights: "
            "give a copy that is not quantized, or was dequantized and saved with save_pretrained."
        )


def check_complete(
    name: str, missing: Collection[str], unexpected: Collection[str], mismatched: Collection[str], task: Task
) -> None:
    """Raise ValueError, with their number and the first names, unless the files hold exactly the tensors of the model.

    Args:
        name: Of the checkpoint.
        missing: Names of the model's tensors that the files lack.
        unexpected: Names of tensors that the model does not have.
        mismatched: Tensors of other shapes, with both.
        task: What it is loaded for.
    """
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in groups.items()
        if names
    ]
    if found:
        raise ValueError(
            f"The weight files of {name!r} do not hold the {task.kind} that its config.json describes, so nothing was "
            f"loaded: tensors are {', '.join(found)}; correct the config.json, or fetch the files again."
        )


def is_unused(tensor: str, weight: Weight | None, task: Task) -> bool:
    """Tell whether a tensor that a model does not have may be left over: it is no weight, or of no use for the task."""
    if re.search(_COMPUTED, tensor) or (task.unused is not None and re.search(task.unused, tensor)):
        return True
    is_mask = weight is not None and (weight.shape == () or (len(weight.shape) == 4 and weight.shape[:2] == (1, 1)))
    return is_mask and re.search(_MASK, tensor) is not None


def in_short(error: Exception) -> str:
    """Return the message of an error as a part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text:.160}".rstrip(". ").replace(". ", "; ")


def _quantization(content: Mapping[str, object]) -> object:
    for key, value in content.items():
        if key in ("quantization_config", "compression_config") and value is not None:
            return value.get("quant_method", "unnamed method") if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and (method := _quantization(value)) is not None:
            return method
    return None


def _has_own_code(auto_map: object, known: Mapping[str, str]) -> bool:
    """Tell whether a config names a class of its own where transformers would take another one.

    Many a model that is in transformers now still names the code that it came with, by the same name.
    """
    if not auto_map:
        return False
    if not isinstance(auto_map, Mapping):
        return True
    named = {auto: str(auto_map[auto]).rpartition(".")[2] for auto in known if auto in auto_map}
    return any(theirs.lower() != known[auto].lower() for auto, theirs in named.items())


def _own_code(name: str, file: str) -> str:
    return (
        f"{name!r} needs Python code of its own (auto_map in its {file}), which is never run: give a checkpoint of an "
        "architecture that transformers knows."
    )
