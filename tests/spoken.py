"""Tokenizers that put something before or behind a text, or have a chat template, and checkpoints with them."""

import shutil
from pathlib import Path

from helpers import WORDS, tokenizer_of
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 1, 2
CHAT = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role }} {{ turn.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def adding(before: str = "", behind: str = "", words: list[str] | None = None, chat: str | None = None) -> "Tokenizer":
    """Return a tokenizer of words that puts special tokens before and behind every text."""
    tokenizer = tokenizer_of(words or [*WORDS, "user", "assistant"])
    names = {"<s>": BOS, "</s>": EOS, "<unk>": 3}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {behind}".strip(), special_tokens=list(names.items())
    )
    tokenizer.chat_template = chat
    return tokenizer


def checkpoint_with(tokenizer: "Tokenizer", checkpoint: str, folder: Path) -> str:
    """Return a copy of a checkpoint that has another tokenizer."""
    shutil.copytree(checkpoint, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    return str(folder)


Tokenizer = PreTrainedTokenizerFast
