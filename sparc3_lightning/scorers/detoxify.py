"""Scorers that are a model of Detoxify: its own ones, the one that this package ships, and those in a folder."""

import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparc3_lightning.errors import OptionError
from sparc3_lightning.files import cache_folder, sha256_of
from sparc3_lightning.models.loading import CLASSIFIER, check_complete, in_short, is_unused
from sparc3_lightning.provenance import contents
from sparc3_lightning.scorers.base import Scorer, check_folder, score_by_length, split_label

SHIPPED = Path(__file__).parent / "toxicity_checkpoint"
SHIPPED_SHA256 = "0a79cd962a8b40a0f22136fd2cef88e86080622cff4f7bd69a917fa83db9c5df"
DETOXIFY_MODELS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")


class DetoxifyScorer(Scorer):
    """Toxicity by a Detoxify model.

    Args:
        name: One of Detoxify's own models (fetched from its release page and from the hub); ``small`` for the
            checkpoint that this package ships; or a local folder with a Detoxify checkpoint (one ``*.ckpt``), its
            Hugging Face config and its tokenizer.
        device: Where to score.
        batch_size: Texts scored at a time. It changes speed and memory, and scores by rounding alone.

    Raises:
        ValueError: If the checkpoint is not one of Detoxify's, or the shipped one is not as it was shipped.
        FileNotFoundError: If a folder lacks one of its files.
        ConnectionError: If the checkpoint cannot be fetched.
    """

    words = ("small", *DETOXIFY_MODELS)
    what = "a Detoxify checkpoint"

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        super().__init__(name)
        self.check(name, "scorer")
        self.batch_size = batch_size
        path, config = checkpoint_of(name)
        self.detoxify = _build(path, config, device)
        self.detoxify.model.eval()
        limit = self.detoxify.model.config.max_position_embeddings
        self.detoxify.tokenizer.model_max_length = min(self.detoxify.tokenizer.model_max_length, limit)

    @classmethod
    def takes(cls, name: str) -> bool:
        """Return whether a name is a folder with a Detoxify checkpoint; a label behind it is then refused."""
        return any(Path(split_label(name)[0]).glob("*.ckpt"))

    @classmethod
    def check(cls, name: str, option: str) -> None:
        """Raise unless a folder has its files, and the shipped checkpoint is the one that was shipped."""
        if name == "small":
            if sha256_of(SHIPPED / "toxicity.ckpt") != SHIPPED_SHA256:
                raise ValueError(f"{SHIPPED / 'toxicity.ckpt'} is not the file that was shipped (its sha256 differs).")
        elif "#" in name:
            raise OptionError(option, f": {name!r} names a label, which a Detoxify checkpoint does not take.")
        elif name not in DETOXIFY_MODELS:
            folder = Path(name)
            check_folder(folder, len(list(folder.glob("*.ckpt"))) == 1, option)

    @classmethod
    def fetch(cls, name: str) -> list[Path]:
        """Fetch the checkpoint, its config and its tokenizer, and return the files."""
        checkpoint, config = checkpoint_of(name)
        return [checkpoint, *(path for path in Path(config).iterdir() if path.suffix == ".json")]

    @classmethod
    def fingerprint(cls, name: str) -> str:
        """Return what tells a scorer from another of the same name: its files, and the version of Detoxify."""
        checkpoint, config = checkpoint_of(name)
        files = {checkpoint, *(path for path in Path(config).iterdir() if path.is_file())}
        return f"{contents(files)} {version('detoxify')}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the toxicity of each text, in [0, 1]; NaN where the model gave no number."""
        return score_by_length(texts, self.batch_size, self._score_batch)

    def _score_batch(self, texts: list[str]) -> list[float]:
        values = self.detoxify.predict(texts)["toxicity"]
        return values if isinstance(values, list) else [values]  # of one text Detoxify gives no list


def checkpoint_of(name: str) -> tuple[Path, str]:
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
            "prepare' where there is a network, or name the scorer 'small', the checkpoint that this package ships."
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


def _build(path: Path, config: str, device: torch.device | str) -> Any:
    """Build Detoxify's model, and check that it has all its weights from the checkpoint.

    Raises:
        ValueError: If the checkpoint names classes that are none of transformers' own, or holds other tensors than its
            model has.
    """
    import transformers
    from detoxify import Detoxify

    checkpoint = _load(path)
    arch = checkpoint["config"]["arch"]["args"]
    # Of its own: a class such as AutoTokenizer would ask whether it may run the code of the folder.
    for key, base in (("model_name", "PreTrainedModel"), ("tokenizer_name", "PreTrainedTokenizerBase")):
        named = getattr(transformers, str(arch.get(key)), None)
        if not (isinstance(named, type) and issubclass(named, getattr(transformers, base))):
            raise ValueError(f"{path} names {arch.get(key)!r} as its {key}, which is no such class of transformers.")
    # Not by huggingface_config_path, with which Detoxify takes the number of labels of the config, not its own.
    try:
        detoxify = Detoxify(checkpoint=_without_pickles(checkpoint, config), device=device)
    except RuntimeError as error:
        raise ValueError(f"{path} holds other weights than the config beside it says ({in_short(error)}).") from None
    wanted, given = detoxify.model.state_dict(), checkpoint["state_dict"]
    unexpected = [key for key in given.keys() - wanted.keys() if not is_unused(key, None, CLASSIFIER)]
    check_complete(str(path), wanted.keys() - given.keys(), unexpected, [], CLASSIFIER)
    return detoxify


def _without_pickles(checkpoint: dict[str, Any], config: str) -> io.BytesIO:
    """Return the checkpoint as Detoxify can take it, read and written again without unpickling anything.

    Detoxify unpickles the file it is given, so it is given bytes that were written here from plain tensors. Its config
    and tokenizer it takes from ``model_type``, so their folder is put there.
    """
    checkpoint["config"]["arch"]["args"]["model_type"] = config
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return buffer
