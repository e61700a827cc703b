"""C4: general reference samples."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparc3_lightning.data.base import HubDataset, ReferenceSamples, Sample
from sparc3_lightning.files import cache_folder, write_atomically
from sparc3_lightning.models.batching import BatchSize
from sparc3_lightning.sources import Row, read_records, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class C4(ReferenceSamples):
    """Documents of C4 (or any other text), each cut to the same number of tokens.

    Documents with fewer than ``seq_len`` tokens are passed over and counted.

    Args:
        source: Local jsonl, json, csv, text (a line is a document; each also with .gz) or parquet file, or a file
            inside a PyPI wheel, ``pypi:<name>==<version>/<path>``; None streams allenai/c4, config en, split train,
            from the hub.
        num_samples: Documents to take.
        seq_len: Length of every sample, in tokens.
        crop: Take the ``head`` of a document (its first ``seq_len`` tokens), or a ``random`` stretch of it, as Wanda
            does; before that stands the beginning-of-sequence token only for models that are lost without it (Gemma).
        seed: Of the shuffle, and of the random stretches.
        buffer_size: Documents that the shuffle of the stream draws from.
        text_field: Name of the field that holds the text.
        batch_size: Samples in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
    """

    hub = HubDataset("allenai/c4", "en")

    def __init__(
        self,
        source: str | None = None,
        num_samples: int = 128,
        seq_len: int = 2048,
        crop: Literal["head", "random"] = "head",
        seed: int = 0,
        buffer_size: int = 10_000,
        text_field: str = "text",
        batch_size: BatchSize = 1,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(source, tokenizer, batch_size)
        if num_samples < 1 or seq_len < 1:
            raise ValueError(f"num_samples and seq_len must be at least 1, got {num_samples} and {seq_len}.")
        self.save_hyperparameters(logger=False)
        self.num_samples = num_samples
        self.seq_len = seq_len
        self.crop = crop
        self.seed = seed
        self.buffer_size = buffer_size
        self.text_field = text_field

    def prepare_data(self) -> None:
        """Fetch the file; or take the documents from the stream, and keep them, so that a run needs no network."""
        if self.source is not None:
            super().prepare_data()
        elif not self._kept_documents.exists():
            kept: list[Row] = []
            self._take(self.load_tokenizer(), self._stream(), kept.append)
            lines = [json.dumps(document, ensure_ascii=False) for document in kept]
            write_atomically(self._kept_documents, "\n".join(lines) + "\n")

    def fetched_files(self) -> list[Path]:
        """Return the files that ``prepare_data`` fetched."""
        return super().fetched_files() if self.source is not None else [self._kept_documents]

    def read_samples(self, tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
        """Tokenize documents in shuffled order until enough are long enough."""
        if self.source is not None:
            return self._take(tokenizer, self._shuffled_file())
        documents = ((int(str(record["number"])), str(record["text"])) for record in read_records(self._kept_documents))
        return self._take(tokenizer, documents)

    def _take(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        documents: Iterator[tuple[int, str]],
        keep: Callable[[Row], None] | None = None,
    ) -> list[Sample]:
        """Take the first documents that are long enough, and hand each that was read to ``keep``."""
        draw = random.Random(self.seed)
        tokens = self.tokens_of(tokenizer)
        keeps_bos = self.crop == "random" and tokens.adds_bos and self.needs_bos_everywhere()
        before = tokens.prefix if keeps_bos else []
        samples: list[Sample] = []
        num_too_short = 0
        for number, text in documents:
            if keep is not None:
                keep({"number": number, "text": text})
            (input_ids,) = tokens.encode_documents([text])
            if len(input_ids) < self.seq_len:
                num_too_short += 1
                continue
            start = draw.randrange(len(input_ids) - self.seq_len + 1) if self.crop == "random" else 0
            stretch = input_ids[start + len(before) : start + self.seq_len]
            samples.append(Sample(f"document-{number}", [*before, *stretch]))
            if len(samples) == self.num_samples:
                break
        if len(samples) < self.num_samples:
            raise ValueError(
                f"Only {len(samples)} of {len(samples) + num_too_short} documents have at least {self.seq_len} tokens, "
                f"but --data.num_samples is {self.num_samples}: lower --data.seq_len or --data.num_samples, or give a "
                "source with longer documents."
            )
        self.notes["num_too_short"] = num_too_short
        return samples

    def _stream(self) -> Iterator[tuple[int, str]]:
        """Yield the documents of the hub's shuffled stream, each with a number that names it."""
        stream = self.hub.rows(streaming=True).shuffle(seed=self.seed, buffer_size=self.buffer_size)
        for number, row in enumerate(stream):
            yield number, self.text_of(row, number + 1, self.text_field, "--data.text_field")

    @property
    def _kept_documents(self) -> Path:
        """Where the documents taken from the stream are kept; the name tells everything that chose them."""
        chosen_by = [*self.hub, self.seed, self.buffer_size, self.seq_len, self.num_samples, self.text_field]
        tokenizer = self.tokenizer_checkpoint
        chosen_by += [tokenizer.name, tokenizer.revision]
        digest = hashlib.sha256(json.dumps(chosen_by).encode()).hexdigest()[:16]
        return cache_folder() / "c4" / f"{digest}.jsonl"

    def _shuffled_file(self) -> Iterator[tuple[int, str]]:
        """Yield the documents of the file in shuffled order, each with the number of its row."""
        assert self.source is not None
        documents = []
        for number, record in enumerate(read_records(resolve(self.source)), start=1):
            documents.append((number, self.text_of(record, number, self.text_field, "--data.text_field")))
        random.Random(self.seed).shuffle(documents)
        yield from documents
