"""Scorers that are a text-classification checkpoint of transformers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparc3_lightning.models.checkpoints import Checkpoint
from sparc3_lightning.models.loading import CLASSIFIER, check_vocabulary, load_strictly, load_tokenizer, read_config
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.scorers.base import Scorer, check_folder, score_by_length, split_label

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ClassifierScorer(Scorer):
    """Probability of the toxic label by a text-classification checkpoint of transformers.

    Args:
        name: Local folder, or Hugging Face id such as ``s-nlp/roberta_toxicity_classifier``; ``#`` and a label choose
            the label, otherwise the one that is called toxic is taken.
        device: Where to score.
        batch_size: Texts scored at a time. It changes speed and memory, and scores by rounding alone.

    Raises:
        OSError: If the checkpoint cannot be had.
        ValueError: If it is no text-classification model, or no label, or more than one, is called toxic.
    """

    form = "a folder, nor a Hugging Face id (owner/name)"
    what = "a text-classification checkpoint"

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        super().__init__(name)
        self.batch_size = batch_size
        checkpoint, label = split_label(name)
        source = Checkpoint(checkpoint)
        config = read_config(checkpoint, source.location, None, CLASSIFIER)
        labels = {int(i): str(text) for i, text in (config.id2label or {}).items()}
        self._label = toxic_label(labels, label, name)
        self._tokenizer = load_tokenizer(checkpoint, source.location, None)
        check_vocabulary(checkpoint, self._tokenizer, config)
        self._model: PreTrainedModel = load_strictly(checkpoint, source.folder, config, CLASSIFIER, torch.float32)
        self._model.to(device)
        limit = getattr(config, "max_position_embeddings", 10**6)
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit -= (config.pad_token_id or 0) + 1  # they count positions from the padding token on
        self._max_length = min(self._tokenizer.model_max_length, limit)

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a name, without its label, is a folder or an id of the hub."""
        checkpoint = split_label(name)[0]
        return Path(checkpoint).is_dir() or bool(_HUB_ID.fullmatch(str(Path(checkpoint))))

    @classmethod
    def check(cls, name: str, option: str) -> None:
        """Raise OptionFileNotFoundError if a folder lacks one of its files."""
        folder = Path(split_label(name)[0])
        if folder.is_dir():
            check_folder(folder, any(folder.glob("*.safetensors")), option)

    @classmethod
    def fetch(cls, name: str) -> list[Path]:
        """Fetch the checkpoint, and return its files."""
        return Checkpoint(split_label(name)[0]).fetch()

    @classmethod
    def fingerprint(cls, name: str) -> str:
        """Return what tells a scorer from another of the same name: its files, and the label that means toxic."""
        return f"{super().fingerprint(name)} {split_label(name)[1]}"

    @classmethod
    def revision(cls, name: str) -> str | None:
        """Return the commit of a checkpoint at the hub; None of a local one."""
        return revision_of(Checkpoint(split_label(name)[0]).fingerprint)

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of the toxic label, in [0, 1]; NaN where the model gave no number."""
        return score_by_length(texts, self.batch_size, self._score_batch)

    def _score_batch(self, texts: list[str]) -> list[float]:
        tokens = self._tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=self._max_length
        ).to(self._model.device)
        logits = self._model(**tokens).logits.float()
        several = self._model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
        return probabilities[:, self._label].tolist()


def toxic_label(labels: dict[int, str], wanted: str | None, name: str) -> int:
    """Return the index of the label that is wanted, or else of the one that is called toxic.

    Raises:
        ValueError: If there is no such label, or more than one.
    """
    if len(labels) == 1 and wanted is None:
        return next(iter(labels))
    found = [i for i, label in labels.items() if (label == wanted if wanted else is_toxic_label(label))]
    if len(found) != 1:
        raise ValueError(
            f"The scorer {name!r} has the labels {', '.join(labels.values())}: name the one that means toxic, as in "
            f"{split_label(name)[0]}#{next(iter(labels.values()), 'toxic')}."
        )
    return found[0]


def is_toxic_label(label: str) -> bool:
    """Whether a label is called toxic, and not non-toxic."""
    words = "".join(c if c.isalpha() else " " for c in label.lower()).split()
    return any(word in ("toxic", "toxicity") for word in words) and not {"non", "not", "no"} & set(words)
