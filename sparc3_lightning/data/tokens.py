"""How text becomes token ids, for every reader: one place for what stands before and behind a text, and for padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from sparc3_lightning.errors import OptionError
from sparc3_lightning.sources import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = 0  # padding is masked, so that any id does, and this one is in every vocabulary
PROBES = ("a", "the", "0")
# Characters beyond what is kept of a text that is not encoded to its end, and the most that a word of it may have.
BEYOND, LONGEST_WORD = 4096, 1024


@dataclass(frozen=True)
class Tokens:
    """A tokenizer as all data uses it.

    Before a text stands what the tokenizer puts there, with the beginning-of-sequence token (BOS) once, also where the
    text brings one of its own. Behind a text stands nothing, whatever the tokenizer would put there: a model is to go
    on from where a prompt ends. A tokenizer that adds nothing is used as it is.

    Args:
        tokenizer: Of the model.
        chat: A prompt is the one turn of a user in the tokenizer's chat template, and the assistant's turn has begun.
        vocab_size: Number of tokens that the model has embeddings of; None if no model is known.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat: bool = False
    vocab_size: int | None = None

    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token; None if the tokenizer has none."""
        return self.tokenizer.bos_token_id

    @cached_property
    def prefix(self) -> list[int]:
        """What stands before every text; nothing for many tokenizers."""
        for probe in PROBES:
            bare, whole = self._bare([probe])[0], self.tokenizer(probe, verbose=False)["input_ids"]
            for start in range(len(whole) - len(bare) + 1):
                if bare and whole[start : start + len(bare)] == bare:
                    return [t for i, t in enumerate(whole[:start]) if t != self.bos or t not in whole[:i]]
        return []

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before a text."""
        return self.bos is not None and self.bos in self.prefix

    def check_chat(self, group: str) -> None:
        """Raise OptionError if prompts are to go through a chat template, and the tokenizer has none.

        Args:
            group: Where the option stands on the command line.
        """
        if self.chat and not self.tokenizer.chat_template:
            raise OptionError(
                "chat",
                f"needs a chat template, and the tokenizer of {self.tokenizer.name_or_path!r} has none: leave it out.",
                group,
            )

    def begin_with_bos(self, samples: Sequence[Sequence[int]]) -> bool:
        """Tell whether all samples begin with BOS."""
        return self.bos is not None and all(list(ids[:1]) == [self.bos] for ids in samples)

    def without_bos(self, ids: list[int]) -> list[int]:
        """Return token ids from the first on that is not BOS."""
        return ids[next((i for i, token in enumerate(ids) if token != self.bos), len(ids)) :]

    def encode_bare(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts, with nothing before and behind them.

        Raises:
            ValueError: If the model has no embedding of a token.
        """
        found = self._bare(texts) if texts else []
        for text, ids in zip(texts, found, strict=True):
            self.check(text, ids)
        return found

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts; see the class for what stands before and behind them.

        Raises:
            ValueError: If the model has no embedding of a token.
        """
        found = self.encode_bare(texts)
        return [self.prefix + (self.without_bos(ids) if self.adds_bos else ids) for ids in found]

    def encode_first(self, text: str, number: int, encode: Callable[[str], list[int]]) -> list[int]:
        """Return at least the first so many tokens of a text, and encode little more of it.

        A tokenizer that splits a text into words encodes each by itself, so that what follows a word changes none of
        its tokens. Any other may join whatever stands side by side, and encodes the whole text.

        Args:
            text: Any text.
            number: Tokens that are wanted.
            encode: Encodes a text, or the beginning of it.

        Returns:
            Token ids, of which the first ``number`` are those of the whole text, or all there are.
        """
        size = 8 * number  # a token of English has some four characters
        while (kept := text.find("\n", size) + 1) and (end := text.find("\n", kept + BEYOND) + 1):
            if not self._has_short_words(text[:end]):
                break
            short, long = encode(text[:kept]), encode(text[:end])
            if len(short) > number and short[:number] == long[:number]:
                return long[:number]
            size *= 2
        return encode(text)

    def _has_short_words(self, text: str) -> bool:
        """Tell whether the tokenizer splits a text into words, each so short that none spans what is cut off."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or backend.pre_tokenizer is None:
            return False
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        words = backend.pre_tokenizer.pre_tokenize_str(normal)
        return all(end - start <= LONGEST_WORD for _, (start, end) in words)

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts: as documents, or in a chat exactly those of the chat template.

        Raises:
            ValueError: If a prompt has no tokens, the model has no embedding of one, or the chat template fails.
        """
        found = [self._in_chat(text) for text in texts] if self.chat else self.encode_documents(texts)
        for text, ids in zip(texts, found, strict=True):
            if not ids:
                raise ValueError(f"The tokenizer gives the prompt {text[:60]!r} no tokens: remove it.")
        return found

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return token ids as text for people, without special tokens."""
        return self.tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)

    def _bare(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _in_chat(self, text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        try:
            found = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a small program of the checkpoint, and may fail in any way
            raise ValueError(
                f"The chat template of {self.tokenizer.name_or_path!r} fails on the prompt {text[:60]!r}: "
                f"{first_line(error).rstrip('.')}."
            ) from None
        ids = cast("list[int]", found)
        self.check(text, ids)
        return ids

    def check(self, text: str, ids: Sequence[int]) -> None:
        """Raise ValueError if the model has no embedding of a token of a text."""
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"The text {text[:60]!r} has the token {max(ids)} ({token!r}), but the model has embeddings of "
                f"{self.vocab_size:,} tokens only: take the model's own tokenizer, or remove the text."
            )
