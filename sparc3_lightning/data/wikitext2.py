"""WikiText-2 (Merity et al. 2016), or any other text: windows of tokens to measure perplexity on."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from sparc3_lightning.data.base import HubDataset, TextDataModule, share_dataloader
from sparc3_lightning.data.tokens import PAD, Tokens
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.batching import BatchSize
from sparc3_lightning.sources import read_lines, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Convention = Literal["sliding", "disjoint"]
Bos = Literal["first", "every", "none"]


class Window(NamedTuple):
    """A stretch of the text; only its last ``num_scored`` tokens count."""

    convention: Convention
    start: int
    end: int
    num_scored: int


def sliding_windows(num_tokens: int, window: int, stride: int, unscored: int = 1) -> list[Window]:
    """Cut a text into overlapping windows; each token counts in the first window that predicts it.

    The very first token has nothing before it and is never scored. This is the convention of the Hugging Face guide on
    perplexity with its mean taken over tokens.

    Args:
        num_tokens: Of the text.
        window: Length of a window, in tokens.
        stride: Step from one window to the next, in tokens.
        unscored: Tokens at the beginning of a window that nothing predicts: 0 where another one stands before it.

    Example:
        >>> [tuple(w) for w in sliding_windows(10, window=6, stride=3)]
        [('sliding', 0, 6, 5), ('sliding', 3, 9, 3), ('sliding', 6, 10, 1)]
    """
    windows = []
    scored = unscored
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        # Where windows do not overlap, the first token of each has nothing before it either.
        num_scored = end - max(scored, start + unscored)
        if num_scored > 0:
            windows.append(Window("sliding", start, end, num_scored))
        scored = end
        if end == num_tokens:
            break
    return windows


def disjoint_windows(num_tokens: int, window: int, unscored: int = 1) -> list[Window]:
    """Cut a text into windows side by side, each scored but for its first token, and drop the tail (Wanda, GPTQ).

    Args:
        num_tokens: Of the text.
        window: Length of a window, in tokens.
        unscored: As of ``sliding_windows``.

    Example:
        >>> [tuple(w) for w in disjoint_windows(10, window=4)]
        [('disjoint', 0, 4, 3), ('disjoint', 4, 8, 3)]
    """
    return [
        Window("disjoint", start, start + window, window - unscored)
        for start in range(0, num_tokens - window + 1, window)
    ]


class WindowBatch(TypedDict):
    """Windows of a text, and their tokens padded on the right, shape ``[windows, tokens]``.

    Before the tokens of each window stand ``num_before`` others, that are not of the text.
    """

    input_ids: Tensor
    windows: list[Window]
    num_before: int


class WikiText2(TextDataModule):
    """Windows of the text for perplexity; rows are joined by two line breaks, blank ones too.

    Args:
        source: Local raw or txt file (a line is a row), jsonl, json, csv (each also with .gz) or parquet file, or a
            file inside a PyPI wheel, ``pypi:<name>==<version>/<path>``; None takes Salesforce/wikitext,
            wikitext-2-raw-v1, split test, from the hub.
        window: Length of a window, in tokens, with BOS if it has one.
        stride: Step from one sliding window to the next, in tokens.
        conventions: ``sliding`` counts the new tokens of each window; ``disjoint`` windows lie side by side and the
            tail is dropped, as Wanda and GPTQ do. The two differ by some 11 %. One or both.
        num_tokens: Use only the first tokens of the text; None for all.
        bos: Where the beginning-of-sequence token (BOS) stands: before the ``first`` window alone, as the published
            figures of LLaMA have it, before ``every`` window, or before ``none``. None is as the model was trained: for
            a tokenizer that adds BOS ``first``, or ``every`` for Gemma, which is lost without; for any other ``none``.
        text_field: Name of the field that holds the text.
        batch_size: Windows in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    group = "data.text"
    hub = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")

    def __init__(
        self,
        source: str | None = None,
        window: int = 2048,
        stride: int = 512,
        conventions: Sequence[Convention] = ("sliding", "disjoint"),
        num_tokens: int | None = None,
        bos: Bos | None = None,
        text_field: str = "text",
        batch_size: BatchSize = 1,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if window < 2 or not 1 <= stride <= window:
            raise OptionError("stride", f"must be between 1 and the window, got {stride} and {window}.", "data.text")
        if num_tokens is not None and num_tokens < 1:
            raise OptionError("num_tokens", f"must be at least 1, got {num_tokens}.", "data.text")
        if not conventions or not set(conventions) <= {"sliding", "disjoint"}:
            raise OptionError(
                "conventions", f"must name 'sliding', 'disjoint' or both, got {list(conventions)}.", "data.text"
            )
        self.save_hyperparameters(logger=False)
        self.window = window
        self.stride = stride
        self.conventions = tuple(conventions)
        self.num_tokens = num_tokens
        self.bos = bos
        self.has_bos = bos  # from setup_windows on as it is
        self.before: list[int] = []  # what stands before every window
        self.text_field = text_field
        self.windows: list[Window] = []

    def read_text(self) -> str:
        """Read the whole text."""
        path = None if self.source is None else resolve(self.source)
        if path is not None and path.name.lower().removesuffix(".gz").endswith((".raw", ".txt")):
            # As the rows of the hub's data set: a line keeps its line break, a blank one is empty.
            return "\n\n".join(line if line.strip() else "" for line in read_lines(path))
        rows = enumerate(self.rows(), start=1)
        return "\n\n".join(self.text_of(row, i, self.text_field, f"--{self.group}.text_field") for i, row in rows)

    def setup_windows(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Tokenize the text and cut it into windows.

        Raises:
            ValueError: If it is shorter than one window, or a window has no room for it.
        """
        tokens = self.tokens_of(tokenizer)
        input_ids = self._encode(tokens)[: self.num_tokens]
        size = self.window - len(self.before)
        if size < 1:
            raise OptionError(
                "window",
                f"must be more than the {len(self.before)} tokens that stand before the text of every window, got "
                f"{self.window}.",
                self.group,
            )
        if len(input_ids) < size:
            raise OptionError(
                "window",
                f"The text for perplexity has {len(input_ids)} tokens, fewer than --.window {self.window}.",
                self.group,
            )
        if "sliding" in self.conventions and self.stride > size:
            raise OptionError(
                "stride",
                f"must be at most {size}, got {self.stride}: of the {self.window} tokens of a window "
                f"{len(self.before)} stand before the text.",
                self.group,
            )
        self.input_ids = torch.tensor(input_ids)
        unscored = 0 if self.before else 1
        self.windows = []
        if "sliding" in self.conventions:
            self.windows += sliding_windows(len(input_ids), size, self.stride, unscored)
        if "disjoint" in self.conventions:
            self.windows += disjoint_windows(len(input_ids), size, unscored)

    def _encode(self, tokens: Tokens) -> list[int]:
        """Tokenize the text, and say where BOS stands.

        Raises:
            OptionError: If BOS is asked for, and the tokenizer has none.
        """
        usual: Bos = "none" if not tokens.adds_bos else "every" if self.needs_bos_everywhere() else "first"
        self.has_bos, self.before = self.bos or usual, []
        if self.has_bos == usual != "every":
            return self._first(tokens, lambda text: tokens.encode_documents([text])[0])
        if self.has_bos != "none" and tokens.bos is None:
            raise OptionError("bos", "cannot be had: the tokenizer has no such token; leave it out.", self.group)
        ids = self._first(tokens, lambda text: tokens.without_bos(tokens.encode_bare([text])[0]))
        if self.has_bos == "none":
            return ids
        before = tokens.prefix if tokens.adds_bos else [*tokens.prefix, cast("int", tokens.bos)]
        if self.has_bos == "first":
            return before + ids
        self.before = before
        return ids

    def _first(self, tokens: Tokens, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the tokens of the text, or as many as are used."""
        text = self.read_text()
        return encode(text) if self.num_tokens is None else tokens.encode_first(text, self.num_tokens, encode)

    @property
    def longest(self) -> int:
        """Number of tokens of a window."""
        return self.window

    def test_dataloader(self) -> DataLoader:
        """Return batches, see ``WindowBatch``."""
        return share_dataloader(self.windows, self.trainer, self.items_in_batch(), self.collate)

    def collate(self, pairs: list[tuple[Window, int]]) -> WindowBatch:
        """Return windows and their weights as a batch."""
        # A filler scores no token.
        windows = [window if weight else window._replace(num_scored=0) for window, weight in pairs]
        before = torch.tensor(self.before, dtype=torch.long)
        rows = [torch.cat([before, self.input_ids[window.start : window.end]]) for window in windows]
        # The causal mask keeps the filling on the right out of sight.
        input_ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
        return {"input_ids": input_ids, "windows": windows, "num_before": len(self.before)}
