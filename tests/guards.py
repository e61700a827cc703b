"""Tiny random guards: checkpoints whose tokenizers know labels, the YAMLs for them, and scores of single texts."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from decoders import build
from helpers import WORDS, tokenizer_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

CHAT = (
    "{{ bos_token }}user {{ messages[0].content }} {{ eos_token }}{% if add_generation_prompt %}assistant {% endif %}"
)
LABELS = ["Unsafe", "Controversial", "Safe", "Yes", "No"]
SPOKEN = [*WORDS, *LABELS, "Safety", ":", "?", "user", "assistant", "harm", "profanity"]
TURN = [{"role": "user", "content": "{text}"}]
QWEN: dict[str, Any] = {"messages": TURN, "answer": "Safety: ", "unsafe": LABELS[:2], "safe": ["Safe"]}
ASKING: dict[str, Any] = {"prompt": "is it bad : {text} ?", "unsafe": ["Yes"], "safe": ["No"]}


def save_guard(
    folder: Path, model_type: str = "llama", tokenizer: Any = None, chat: str | None = CHAT, **sizes: Any
) -> str:
    """Write a tiny random guard, by default with a tokenizer of words and a chat template, and return its folder."""
    if tokenizer is None:
        tokenizer = tokenizer_of(SPOKEN)
        tokenizer.chat_template = chat
    build(model_type, **{"vocab_size": len(tokenizer), **sizes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_yaml(path: Path | str, checkpoint: str, **fields: Any) -> str:
    """Write the YAML of a guard, and return the name of its scorer."""
    Path(path).write_text(yaml.safe_dump({"checkpoint": checkpoint, **fields}))
    return f"guard:{path}"


def by_hand(folder: str, context: str, unsafe: list[str], safe: list[str], special: bool = False) -> float:
    """Score one question, as it is read up to the label, by a softmax over all words.

    Args:
        folder: Of the checkpoint.
        context: All that is before the label.
        unsafe: Tokens of the unsafe labels.
        safe: Tokens of the others.
        special: Whether the tokenizer puts its special tokens around the question.
    """
    tokenizer, model = loaded(folder)
    ids = torch.tensor([tokenizer(context, add_special_tokens=special)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    found = (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()
    bad, good = (sum(found[tokenizer.convert_tokens_to_ids(token)].item() for token in of) for of in (unsafe, safe))
    return bad / (bad + good)


@cache
def loaded(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def spoken(text: str) -> str:
    """Return what ``CHAT`` makes of a turn."""
    return f"<s>user {text} </s>assistant "


def byte_tokenizer(corpus: list[str]) -> Any:
    """Return a tokenizer of pieces of words with the blank before them, as that of Qwen, learned from some texts."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    found.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer
