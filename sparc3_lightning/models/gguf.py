"""A GGUF file as a checkpoint: dequantized once by transformers, and kept as a safetensors folder in the cache.

transformers passes over what it does not know, so the model and the tokenizer that come out are compared with what the
file says before they are kept.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

from sparc3_lightning.files import cache_folder, kept_sha256, temporary_folder
from sparc3_lightning.models.gguf_config import ROPE_FACTORS, WAY_OUT, Refused, complete, of_model, refusal
from sparc3_lightning.models.gguf_header import Header
from sparc3_lightning.sources import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 2  # of a folder in the cache: counted up when something else comes out of the same file
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf")
# Tokenizers of this kind begin a text with BOS, though few of their files say so.
_WITH_BOS = ("llama3", "llama-v3", "llama-bpe")


def dequantized(gguf: Path) -> Path:
    """Return the safetensors folder of a GGUF file, which is written to the cache when it is first asked for.

    Raises:
        OSError: If the cache cannot be written to.
        ValueError: If the file is damaged, is a part of a split one, or holds what would not come out as it is.
    """
    folder = cache_folder() / "gguf" / f"{kept_sha256(gguf)[:16]}-{FORMAT}"
    if folder.exists():
        return folder
    header = Header.read(gguf)
    _check_header(header)
    with temporary_folder(folder) as temporary:
        # In a folder of its own: transformers would read a tokenizer or an adapter that lies beside the file.
        source = temporary / "source"
        source.mkdir()
        (source / "model.gguf").symlink_to(gguf.resolve())
        _load_model(header, source).save_pretrained(temporary)
        _save_tokenizer(header, source, temporary)
        shutil.rmtree(source)
        try:
            temporary.replace(folder)
        except OSError:
            if not folder.exists():  # unless another process was first
                raise
    return folder


def described(gguf: Path) -> "PretrainedConfig":
    """Return the config of a GGUF file by its header alone: nothing is dequantized, nor written to the cache.

    Raises:
        ValueError: As ``dequantized``, but that its tensors and its tokenizer are not read.
    """
    header = Header.read(gguf)
    _check_header(header)
    with TemporaryDirectory() as source, _explained(header):
        Path(source, "model.gguf").symlink_to(gguf.resolve())
        return _config(header, Path(source))


def _config(header: Header, source: Path) -> "PretrainedConfig":
    """Return the config of a file that a folder holds, with all that the file says."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source), gguf_file="model.gguf", trust_remote_code=False)
    complete(config, header)
    return config


def _check_header(header: Header) -> None:
    """Raise ValueError for a part of a model, for what is none, and for sizes that no model has."""
    named = _PART.search(header.path.name)
    num_parts = header.metadata.get("split.count", int(named[2]) if named else 1)
    if num_parts != 1:
        raise ValueError(
            f"{header.path} is one of {num_parts} parts of a split GGUF file: join them with 'llama-gguf-split --merge "
            "<first part> <whole file>', and name the whole file."
        )
    kind = header.metadata.get("general.type", "model")
    if not header.architecture or kind != "model":
        raise ValueError(f"{header.path} holds no language model, but {kind!r} {header.architecture!r}: {WAY_OUT}.")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise refusal(header, "holds no tokenizer")
    if not isinstance(header.metadata.get("tokenizer.chat_template", ""), str):
        raise refusal(header, "has a tokenizer.chat_template that is no text")
    said, width = of_model(header), max((max(tensor.shape) for tensor in header.tensors.values()), default=0)
    most = {"block_count": len(header.tensors), "attention.head_count": width, "expert_count": width}
    for key, largest in most.items():
        value = said.get(key, 0)
        if not isinstance(value, int) or not 0 <= value <= largest:
            raise refusal(
                header, f"says {header.architecture}.{key} = {value!r:.80}, which its tensors do not bear out"
            )


@contextmanager
def _explained(header: Header) -> Iterator[None]:
    """Turn whatever transformers raises for a file into one sentence."""
    try:
        yield
    except (OSError, MemoryError, Refused):
        raise
    except Exception as error:  # of any kind: a key, an index, a shape, a type that the file gets wrong
        reason = f"{type(error).__name__}: {first_line(error).split('. ')[0].rstrip('.'):.200}"
        raise refusal(header, f"is not a GGUF file that transformers can read ({reason})") from None


def _load_model(header: Header, source: Path) -> "PreTrainedModel":
    """Load the model in float32, with a config that says all that the file says.

    Args:
        header: Of the file.
        source: The folder that holds it, under the name model.gguf, and nothing else.

    Raises:
        ValueError: If a tensor of the file is not used, or a weight of the model is not in the file.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # typed as if it returned the model alone
    options: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False}
    with _explained(header):
        config = _config(header, source)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        _check_tensors(header, skeleton)
        model, loaded = auto.from_pretrained(
            str(source), config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if names := sorted(map(str, loaded.get(problem) or ())):
            raise refusal(header, f"gives {config.model_type} {problem.replace('_', ' ')}, such as {names[0]:.80}")
    # save_pretrained refuses a model that says it is quantized, and so does transformers when it loads it again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _check_tensors(header: Header, skeleton: "PreTrainedModel") -> None:
    """Raise ValueError unless the tensors of a file hold as many numbers as its model.

    transformers fills a weight with numbers of the file or says that it is missing; so, if none is missing and the
    counts are equal, every tensor of the file is used.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = skeleton.config
    weights: dict[int, tuple[str, int]] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        weights.setdefault(id(tensor), (name, tensor.numel()))  # a tied one once
    in_model = sum(count for _, count in weights.values())
    stored = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
    if sum(stored.values()) == in_model:
        return
    architecture = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    if architecture is not None:
        names = get_tensor_name_map(architecture, config.num_hidden_layers)
        stems = [name.rpartition(".") for name, _ in weights.values()]
        expected = [f"{names.get_name(stem)}.{suffix}" for stem, _, suffix in stems]
        if unused := [name for name in stored if name not in expected]:
            what = f"holds tensors that {config.model_type} has no place for ({unused[0]}, {len(unused)} in all)"
            raise refusal(header, what)
        if lacking := [name for name in expected if name not in stored]:
            what = f"lacks tensors that {config.model_type} needs ({lacking[0]}, {len(lacking)} in all)"
            raise refusal(header, what)
    raise refusal(
        header,
        f"holds {sum(stored.values())} numbers in its tensors, and the {config.model_type} of its metadata {in_model}",
    )


def _save_tokenizer(header: Header, source: Path, folder: Path) -> None:
    """Save the tokenizer of a file, and compare what is read again with what the file says.

    Raises:
        ValueError: If a token differs, the number of a special one, or what a text begins and ends with.
    """
    from transformers import AutoTokenizer

    tokens = cast(list[str], header.metadata["tokenizer.ggml.tokens"])
    begins, ends = (_adds(header, which) for which in ("bos", "eos"))
    with _explained(header):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source), gguf_file="model.gguf", trust_remote_code=False)
        if begins is not None and _added(tokenizer)[0] != begins:
            tokenizer.add_bos_token = begins
        if ends is not None and _added(tokenizer)[1] != ends:
            tokenizer.add_eos_token = ends
        for name, token in dict(tokenizer.special_tokens_map).items():
            if token not in tokens:  # such as the <mask> of every Gemma
                setattr(tokenizer, name, None)
        tokenizer.save_pretrained(folder)
        _leave_out_tokens(folder / "tokenizer.json", len(tokens))
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    rows = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else len(tokens)
    if len(tokens) > rows or len(tokenizer) != len(tokens):
        raise refusal(
            header, f"has {len(tokens)} tokens and {rows} embeddings, and the tokenizer comes out with {len(tokenizer)}"
        )
    found_tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    for place, (token, found) in enumerate(zip(tokens, found_tokens, strict=True)):
        if found != token and found not in (token.replace(" ", "\u2581"), _in_bytes(token)):
            raise refusal(
                header, f"has the token {place} {token!r:.80}, and the tokenizer comes out with {found!r:.80}"
            )
    for which, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        said, number = header.metadata.get(f"tokenizer.ggml.{which}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if said is not None and said != number:
            raise refusal(
                header, f"says tokenizer.ggml.{which}_token_id = {said}, and the tokenizer comes out with {number}"
            )
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        blank, has_blank = header.metadata.get("tokenizer.ggml.add_space_prefix"), _begins_with_blank(tokenizer)
        if blank not in (None, has_blank):
            raise refusal(header, f"says tokenizer.ggml.add_space_prefix = {blank}, and the tokenizer does not do so")
    for which, adds, does in zip(("bos", "eos"), (begins, ends), _added(tokenizer), strict=True):
        if adds not in (None, does):
            raise refusal(header, f"says tokenizer.ggml.add_{which}_token = {adds}, and the tokenizer does not do so")


def _leave_out_tokens(path: Path, count: int) -> None:
    """Leave out the special tokens behind the last one of the file, which transformers adds and no model has."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] < count]
    if kept != content["added_tokens"]:
        path.write_text(json.dumps(content | {"added_tokens": kept}, ensure_ascii=False), encoding="utf-8")


def _in_bytes(token: str) -> str:
    """Spell a token byte by byte, as the vocabularies of GPT-2 are spelled."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    return "".join(spelling[byte] for byte in token.encode())


def _adds(header: Header, which: str) -> bool | None:
    """Tell whether a text begins with BOS, or ends with EOS; None if the file leaves it open."""
    said = header.metadata.get(f"tokenizer.ggml.add_{which}_token")
    if said is None and which == "bos" and header.metadata.get("tokenizer.ggml.pre") in _WITH_BOS:
        said = True
    if said is None or header.metadata.get(f"tokenizer.ggml.{which}_token_id") is None:
        return None
    return bool(said)


def _begins_with_blank(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Tell whether a tokenizer puts a blank before a text, as those of SentencePiece do."""
    return tokenizer.tokenize("a")[0].startswith("\u2581")


def _added(tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool]:
    """Tell whether a tokenizer puts BOS before a text, and EOS behind it."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    more = len(whole) - len(plain)
    begins = more > 0 and whole[0] == tokenizer.bos_token_id
    return begins, more > int(begins) and whole[-1] == tokenizer.eos_token_id
