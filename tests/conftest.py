"""Tiny models of every family, a tokenizer and a checkpoint made on the spot; nothing is downloaded."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Tiny models are fastest on one core, and two cores that wait for each other are slow when others use them too.
torch.set_num_threads(1)
SHARED = Path(__file__).parents[2] / "shared"
TEXT = (
    "the a of to and in is was it for on as with his he be at by had this that are they from not have or an which "
    "you one we were all her she there would their will when who him been has more if no out so said what up its "
    "about than into dog cat house tree river stone bird fish horse sun moon star rain wind snow fire good bad nice "
    "awful stupid idiot hate love like run walk eat sleep see hear speak write read think know make take give find "
    "leave call ask need feel become "
)
WORDS = TEXT.split()
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


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def classes_stay_unpatched() -> Iterator[None]:
    """Fail a test that leaves a class of transformers, or its attention registries, changed."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    def state() -> tuple[Any, ...]:
        registries = (sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS))
        return (LlamaMLP.forward, LlamaRMSNorm.forward, torch.nn.LayerNorm.forward, torch.nn.ReLU.forward, *registries)

    before = state()
    yield
    assert state() == before


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Tear down what a distributed test set up."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Use every core, for a test of a real model."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden scores; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder 'shared' with real data and golden scores is not beside the checkout")
    return SHARED


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


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Return a factory of tiny random float64 models: ``make_model("llama", num_hidden_layers=1)``."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        model = FAMILIES[family][1](make_config(family, **changes)).to(dtype).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            # transformers starts with norms of 1 and tiny weights: make every parameter matter.
            scale = 0.3 if "norm" in name else 0.4
            parameter.data.add_(scale * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a maker of folders with a tiny random model in float32 and a word-level tokenizer, one of each family."""

    @cache
    def make(family: str) -> str:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("checkpoint") / f"tiny-{family}"
        torch.manual_seed(0)
        model = FAMILIES[family][1](make_config(family))
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[[str], str]) -> str:
    """A folder with a tiny random LLaMA, as save_pretrained writes it."""
    return make_checkpoint("llama")


def sentence(seed: int, num_words: int) -> str:
    """Return random words, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num_words,), generator=draw).tolist())


def fail_if_masked(model: Any, neurons: list[Any]) -> None:
    """Mask neurons that are not there, which must be refused before the block is entered."""
    from sparc3_lightning.models.components import mask

    with mask(model, neurons):
        pytest.fail("the block was entered")
