"""WikiText-2 (Merity et al. 2016), or any other text: windows of tokens to measure perplexity on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparc3_lightning.data.base import HubDataset, TextDataModule, share_dataloader
from sparc3_lightning.errors import OptionError
from sparc3_lightning.sources import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Convention = Literal["sliding", "disjoint"]


class Window(NamedTuple):
    """A stretch of the text; only its last ``num_scored`` tokens count."""

    convention: Convention
    start: int
    end: int
    num_scored: int


def sliding_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Cut a text into overlapping windows; each token counts in the first window that predicts it.

    The very first token has nothing before it and is never scored. This is the convention of the Hugging Face guide on
    perplexity with its mean taken over tokens.

    Example:
        >>> [tuple(w) for w in sliding_windows(10, window=6, stride=3)]
        [('sliding', 0, 6, 5), ('sliding', 3, 9, 3), ('sliding', 6, 10, 1)]
    """
    windows = []
    scored = 1
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        # Where windows do not overlap, the first token of each has nothing before it either.
        num_scored = end - max(scored, start + 1)
        if num_scored > 0:
            windows.append(Window("sliding", start, end, num_scored))
        scored = end
        if end == num_tokens:
            break
    return windows


def disjoint_windows(num_tokens: int, window: int) -> list[Window]:
    """Cut a text into windows side by side, each scored but for its first token, and drop the tail (Wanda, GPTQ).

    Example:
        >>> [tuple(w) for w in disjoint_windows(10, window=4)]
        [('disjoint', 0, 4, 3), ('disjoint', 4, 8, 3)]
    """
    return [
        Window("disjoint", start, start + window, window - 1) for start in range(0, num_tokens - window + 1, window)
    ]


class WindowBatch(TypedDict):
    """Windows of a text, and their tokens padded on the right, shape ``[windows, tokens]``."""

    input_ids: Tensor
    windows: list[Window]


class WikiText2(TextDataModule):
    """Windows of the text for perplexity; rows are joined by two line breaks, blank ones too.

    Args:
        source: Local raw or txt file (a line is a row), jsonl, jsonl.gz or parquet file, or a file inside a PyPI wheel,
            ``pypi:<name>==<version>/<path>``; None takes Salesforce/wikitext, wikitext-2-raw-v1, split test, from the
            hub.
        window: Length of a window, in tokens.
        stride: Step from one sliding window to the next, in tokens.
        conventions: ``sliding`` counts the new tokens of each window; ``disjoint`` windows lie side by side and the
            tail is dropped, as Wanda and GPTQ do. The two differ by some 11 %. One or both.
        num_tokens: Use only the first tokens of the text; None for all.
        text_field: Name of the field that holds the text.
        batch_size: Windows in a batch. It changes speed and memory; in bfloat16 also rounding.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    hub = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")

    def __init__(
        self,
        source: str | None = None,
        window: int = 2048,
        stride: int = 512,
        conventions: Sequence[Convention] = ("sliding", "disjoint"),
        num_tokens: int | None = None,
        text_field: str = "text",
        batch_size: int = 1,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if window < 2 or not 1 <= stride <= window:
            raise OptionError("stride", f"must be between 1 and the window, got {stride} and {window}.", "data.text")
        if num_tokens is not None and num_tokens < 1:
            raise OptionError("num_tokens", f"must be at least 1, got {num_tokens}.", "data.text")
        if not conventions:
            raise OptionError("conventions", "must name 'sliding', 'disjoint' or both.", "data.text")
        self.save_hyperparameters(logger=False)
        self.window = window
        self.stride = stride
        self.conventions = tuple(conventions)
        self.num_tokens = num_tokens
        self.text_field = text_field
        self.windows: list[Window] = []

    def read_text(self) -> str:
        """Read the whole text."""
        path = None if self.source is None else resolve(self.source)
        if path is not None and path.suffix.lower() in (".raw", ".txt"):
            with path.open(encoding="utf-8") as lines:
                # As the rows of the hub's data set: a line keeps its line break, a blank one is empty.
                return "\n\n".join(line if line.strip() else "" for line in lines)
        rows = enumerate(self.rows(), start=1)
        return "\n\n".join(self.text_of(row, i, self.text_field, "--data.text.text_field") for i, row in rows)

    def setup_windows(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Tokenize the text and cut it into windows.

        Raises:
            ValueError: If it is shorter than one window.
        """
        input_ids = tokenizer(self.read_text(), verbose=False)["input_ids"][: self.num_tokens]
        if len(input_ids) < self.window:
            raise OptionError(
                "window",
                f"The text for perplexity has {len(input_ids)} tokens, fewer than --.window {self.window}.",
                "data.text",
            )
        self.input_ids = torch.tensor(input_ids)
        self.windows = []
        if "sliding" in self.conventions:
            self.windows += sliding_windows(len(input_ids), self.window, self.stride)
        if "disjoint" in self.conventions:
            self.windows += disjoint_windows(len(input_ids), self.window)

    def test_dataloader(self) -> DataLoader:
        """Return batches, see ``WindowBatch``."""
        return share_dataloader(self.windows, self.trainer, self.batch_size, self._collate)

    def _collate(self, pairs: list[tuple[Window, int]]) -> WindowBatch:
        # A filler scores no token.
        windows = [window if weight else window._replace(num_scored=0) for window, weight in pairs]
        longest = max(window.end - window.start for window in windows)
        input_ids = torch.zeros(len(windows), longest, dtype=torch.long)
        for row, window in enumerate(windows):  # the causal mask keeps the filling on the right out of sight
            input_ids[row, : window.end - window.start] = self.input_ids[window.start : window.end]
        return {"input_ids": input_ids, "windows": windows}
