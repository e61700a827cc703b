"""From text to toxicity: Detoxify's models, and others, behind one small protocol."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from sparc3_lightning.classifiers import (
    ClassifierScorer,
    FunctionScorer,
    RepetitionScorer,
    check_function,
    fetch_classifier,
    is_function,
    split_label,
)
from sparc3_lightning.sources import sha256_of

SHIPPED = Path(__file__).parent / "toxicity_checkpoint"
SHIPPED_SHA256 = "0a79cd962a8b40a0f22136fd2cef88e86080622cff4f7bd69a917fa83db9c5df"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REPETITION = "repetition"
DETOXIFY_MODELS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")


class Scorer(Protocol):
    """Scores texts."""

    name: str

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where a text could not be scored."""
        ...


class DetoxifyScorer:
    """Toxicity by a Detoxify model.

    Args:
        name: One of Detoxify's own models (fetched from its release page and from the hub); ``small`` for the
            checkpoint that this package ships; or a local folder with a Detoxify checkpoint (one ``*.ckpt``), its
            Hugging Face config and its tokenizer.
        device: Where to score.
        batch_size: Texts scored at a time. It changes speed and memory, not results.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        from detoxify import Detoxify

        self.name = name
        self.batch_size = batch_size
        checkpoint, config = _checkpoint_of(name)
        # Not by huggingface_config_path, with which Detoxify takes the number of labels of the config, not its own.
        self._detoxify = Detoxify(checkpoint=_without_pickles(checkpoint, config), device=device)
        self._detoxify.model.eval()
        limit = self._detoxify.model.config.max_position_embeddings
        self._detoxify.tokenizer.model_max_length = min(self._detoxify.tokenizer.model_max_length, limit)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where the model gave no number."""
        # Texts of like length side by side cost less padding, and what each is padded to then depends on the texts
        # alone.
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        scores = [math.nan] * len(texts)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            values = self._detoxify.predict([texts[i] for i in chunk])["toxicity"]
            for i, value in zip(chunk, values if isinstance(values, list) else [values], strict=True):
                scores[i] = value if math.isfinite(value) else math.nan
        return scores


def load_scorer(name: str, device: torch.device | str = "cpu") -> Scorer:
    """Load the scorer of a name.

    Args:
        name: One of Detoxify's models; ``small``; ``repetition``; a folder with a Detoxify checkpoint; a folder or
            Hugging Face id of a text-classification checkpoint, if need be with ``#`` and the label that means toxic;
            or ``package.module:function``.
        device: Where to score.
    """
    check_scorer(name)
    return _kind(name)(name, device)


class Remembering:
    """A scorer that scores a text once.

    What a text is padded with, and so the last digits of its score, depends on the texts beside it: without this, two
    models that write the same would not be alike.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._known: dict[str, float] = {}

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, as the scorer does."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known |= zip(new, self._scorer.score(new), strict=True)
        return [self._known[text] for text in texts]

    def score_drawn(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each continuation, by its text, or by the tokens that were drawn if these are counted."""
        return self._scorer.score_tokens(tokens) if isinstance(self._scorer, RepetitionScorer) else self.score(texts)


def _kind(name: str) -> type[DetoxifyScorer] | type[ClassifierScorer] | type[FunctionScorer] | type[RepetitionScorer]:
    if name == REPETITION:
        return RepetitionScorer
    folder = Path(split_label(name)[0])
    if name == "small" or name in DETOXIFY_MODELS or any(folder.glob("*.ckpt")):
        return DetoxifyScorer
    return FunctionScorer if is_function(name) and not folder.exists() else ClassifierScorer


def check_scorer(name: str, option: str = "--model.scorer") -> None:
    """Raise unless there is a scorer of this name; cheap, nothing is loaded.

    Raises:
        ValueError: If the name is unknown, a package is not installed, or the shipped checkpoint is not the one that
            was shipped.
        FileNotFoundError: If a folder lacks one of its files.
    """
    kind, folder = _kind(name), Path(split_label(name)[0])
    if kind is RepetitionScorer:
        return
    if name == "small":
        if sha256_of(SHIPPED / "toxicity.ckpt") != SHIPPED_SHA256:
            raise ValueError(f"{SHIPPED / 'toxicity.ckpt'} is not the file that was shipped (its sha256 differs).")
    elif kind is FunctionScorer:
        check_function(name, option)
    elif kind is DetoxifyScorer and "#" in name:
        raise ValueError(f"{option}: {name!r} names a label, which a Detoxify checkpoint does not take.")
    elif folder.is_dir():
        is_detoxify = len(list(folder.glob("*.ckpt"))) == 1
        is_classifier = any(folder.glob("*.safetensors"))
        if not (is_detoxify or is_classifier) or not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{option}: {folder} must hold a config.json, a tokenizer, and either one *.ckpt of Detoxify or the "
                "*.safetensors of a text-classification checkpoint."
            )
    elif kind is ClassifierScorer and not _HUB_ID.fullmatch(str(folder)):
        raise ValueError(
            f"{option}: {name!r} is neither 'small', {', '.join(DETOXIFY_MODELS)}, {REPETITION}, nor a folder, nor a "
            "Hugging Face id (owner/name), nor package.module:function."
        )


def fetch_scorer(name: str) -> list[Path]:
    """Fetch what a scorer needs, and return the files."""
    kind = _kind(name)
    if kind in (FunctionScorer, RepetitionScorer):
        return []
    if kind is ClassifierScorer:
        return fetch_classifier(name)
    checkpoint, config = _checkpoint_of(name)
    return [checkpoint, *(path for path in Path(config).iterdir() if path.suffix == ".json")]


def _checkpoint_of(name: str) -> tuple[Path, str]:
    """Return the checkpoint file and the folder of its Hugging Face config."""
    if name in DETOXIFY_MODELS:
        return _download(name)
    folder = SHIPPED if name == "small" else Path(name)
    return next(folder.glob("*.ckpt")), str(folder)


def _download(name: str) -> tuple[Path, str]:
    """Fetch one of Detoxify's models, with the config and tokenizer that its checkpoint names.

    The names of the files on the release page end in the first eight digits of their sha256, which is checked.
    """
    from detoxify.detoxify import MODEL_URLS
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from sparc3_lightning.sources import cache_folder

    url = MODEL_URLS[name]
    path = cache_folder() / "detoxify" / url.rsplit("/", 1)[1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        arch = _load(path)["config"]["arch"]["args"]
        config = snapshot_download(arch["model_type"], allow_patterns=["*.json", "*.txt", "*.model"])
    except (OSError, HfHubHTTPError, RuntimeError) as error:
        raise ConnectionError(
            f"Detoxify's model {name!r} cannot be fetched ({type(error).__name__}: {error!s:.120}). Run 'sparc3 "
            "prepare' where there is a network, or use --model.scorer small, the checkpoint that this package ships."
        ) from error
    return path, config


def _load(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        (
            checkpoint["config"]["arch"]["args"],
            checkpoint["config"]["dataset"]["args"]["classes"],
            checkpoint["state_dict"],
        )
    except Exception as error:  # torch raises what the unpickler meets: half a dozen classes for a foreign file
        raise ValueError(f"{path} is not a Detoxify checkpoint of plain tensors: {error!s:.200}") from None
    return checkpoint


def _without_pickles(path: Path, config: str) -> io.BytesIO:
    """Return the checkpoint as Detoxify can take it, read and written again without unpickling anything.

    Detoxify unpickles the file it is given, so it is given bytes that were written here from plain tensors. Its config
    and tokenizer it takes from ``model_type``, so their folder is put there.
    """
    checkpoint = _load(path)
    checkpoint["config"]["arch"]["args"]["model_type"] = config
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return buffer
