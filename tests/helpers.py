"""What tests of several rooms share: tiny models by their configs, names of layers, sentences, and score files."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparc3_lightning.attribution.scores import Provenance, ScoreFile
from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.data.ioi import NAMES, OBJECTS, PLACES, TEMPLATES
from sparc3_lightning.files import sealed
from sparc3_lightning.models.components import Component

TEXT = (
    "the a of to and in is was it for on as with his he be at by had this that are they from not have or an which "
    "you one we were all her she there would their will when who him been has more if no out so said what up its "
    "about than into dog cat house tree river stone bird fish horse sun moon star rain wind snow fire good bad nice "
    "awful stupid idiot hate love like run walk eat sleep see hear speak write read think know make take give find "
    "leave call ask need feel become "
)
WORDS = TEXT.split()
IDS = {word: number for number, word in enumerate(WORDS, start=4)}
MODULES = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
NEURONS = [
    Component("model.layers.0.mlp.up_proj", 3, -2.0),
    Component("model.layers.1.mlp.up_proj", 0, -1.5),
    Component("model.layers.0.mlp.up_proj", 23, -1.0),
    Component("model.layers.0.mlp.up_proj", 7, 0.5),
]
EDITED = [
    Component("model.layers.0.mlp.up_proj", 3, -2.0, damping=0.5, mean=0.7),
    Component("model.layers.0.mlp.up_proj", 5, -1.5, mean=-0.2),
    Component("model.layers.1.mlp.up_proj", 0, -1.0, damping=0.25),
]
# Of each family the classes, what its config calls otherwise than LLaMA's or lacks, and what it adds.
FAMILIES: dict[str, tuple[Any, Any, dict[str, str | None], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, {"head_dim": 4}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, {}, {"head_dim": 4, "sliding_window": 32}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"intermediate_size": "n_inner", "num_key_value_heads": None}, {}),
    "opt": (OPTConfig, OPTForCausalLM, {"intermediate_size": "ffn_dim", "num_key_value_heads": None}, {}),
}
# The MLP of a block, the layers that hold its neurons' rows, of which the first is scored, and the one of the columns.
MLPS = {
    "gpt2": ("transformer.h.{}.mlp", ["c_fc"], "c_proj"),
    "opt": ("model.decoder.layers.{}", ["fc1"], "fc2"),
}
GATED_MLP = ("model.layers.{}.mlp", ["up_proj", "gate_proj"], "down_proj")


def make_config(family: str, **changes: Any) -> Any:
    """Return the config of a tiny model of a family."""
    sizes = {
        "vocab_size": len(WORDS) + 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config, _, names, extra = FAMILIES[family]
    options = {names.get(name, name): value for name, value in {**sizes, **extra, **changes}.items()}
    return config(**{name: value for name, value in options.items() if name is not None})


def mlp_of(family: str, block: int) -> tuple[list[str], str]:
    """Return the names of the layers with the rows of a block's neurons, the scored one first, and with the columns."""
    mlp, rows, column = MLPS.get(family, GATED_MLP)
    return [f"{mlp.format(block)}.{row}" for row in rows], f"{mlp.format(block)}.{column}"


def sentence(seed: int, num_words: int) -> str:
    """Return random words, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num_words,), generator=draw).tolist())


def random_scores(seed: int, scale: float = 1.0, shape: int = 24) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.rand(shape, generator=draw) for name in MODULES}


def provenance(checkpoint: str = "tiny", print_: str = "files:abc", ids: tuple[str, ...] = ("p1", "p2")) -> Provenance:
    return Provenance(
        checkpoint=checkpoint,
        checkpoint_fingerprint=print_,
        spec=ScoreSpec("lrp", "attnlrp", "magnitude", "argmax", layers=["up_proj"], dtype="float32"),
        data={"class": "C4"},
        data_fingerprint="d",
        num_samples=2,
        num_tokens=20,
        seq_len=10,
        seed=0,
        sample_ids=list(ids),
    )


def save_scores(path: str, scores: dict[str, torch.Tensor], of: Provenance | None = None, **changes) -> Path:
    """Save scores, by default on samples of their own."""
    changes = {"data_fingerprint": path, **changes}
    ScoreFile(scores, changed(of or provenance(), **changes)).save(Path(path))
    return Path(path)


def trainer(folder: str = "out", **options) -> L.Trainer:
    """A stock Trainer, as a user of Lightning would write it."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "inference_mode": False}
    return L.Trainer(**{"accelerator": "cpu", "default_root_dir": folder, **quiet, **options})


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words_tokenizer(names: tuple[str, ...] = NAMES) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of indirect object identification and of some names."""
    text = " ".join([*TEMPLATES, *PLACES, *OBJECTS]).replace("{", "").replace("}", "")
    return tokenizer_of(sorted({*re.findall(r"\w+|[^\w\s]", text), "they", "others", "one", *names}))


def changed(provenance: Provenance, **changes: Any) -> Provenance:
    """Return a provenance with other values of some of its fields, or of those of its spec."""
    names = {item.name for item in fields(ScoreSpec)}
    spec = replace(provenance.spec, **{name: value for name, value in changes.items() if name in names})
    return replace(provenance, spec=spec, **{name: value for name, value in changes.items() if name not in names})


class Unshuffled(list):
    """Rows of a data set of the hub that come in the order in which they were given."""

    def shuffle(self, **_: Any) -> "Unshuffled":
        return self


def fail_if_masked(model: Any, neurons: list[Any]) -> None:
    """Mask neurons that are not there, which must be refused before the block is entered."""
    from sparc3_lightning.models.components import mask

    with mask(model, neurons):
        pytest.fail("the block was entered")


def replaced_at(value: Any, path: str, to: Any) -> Any:
    """Return a copy of dataclasses, dicts and lists in which something else lies at a path such as ``doses/0/kl``."""
    key, _, rest = path.partition("/")
    if is_dataclass(value):
        return replace(value, **{key: replaced_at(getattr(value, key), rest, to) if rest else to})
    place: Any = int(key) if isinstance(value, list) else key
    copy = value.copy()
    copy[place] = replaced_at(value[place], rest, to) if rest else to
    return copy


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_sealed(path: Path, content: dict[str, Any]) -> Path:
    """Write JSON with its checksum, whatever it is."""
    path.write_text(json.dumps(sealed(content)))
    return path


def write_completions(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as those of a completions.jsonl, each with its checksum."""
    return write_jsonl(path, [sealed(row) for row in rows])


def ids_of(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def set_up(data: Any) -> Any:
    data.prepare_data()
    data.setup("predict")
    return data


def write_choice_task(folder: Path, name: str, questions: Sequence[dict[str, Any]]) -> Path:
    """Write a multiple-choice task of lm-eval, and its questions, and return the folder of the task.

    Args:
        folder: Where to write ``documents.jsonl`` and the folder ``tasks``.
        name: Of the task.
        questions: Each with a ``question``, its ``choices``, and the ``label`` of the right one.
    """
    documents = folder / "documents.jsonl"
    write_jsonl(documents, list(questions))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder / "tasks"
