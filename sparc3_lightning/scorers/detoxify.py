"""From text to toxicity: Detoxify's models, and others, behind one small protocol."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "toxicity_checkpoint"
SHIPPED_SHA256 = "0a79cd962a8b40a0f22136fd2cef88e86080622cff4f7bd69a917fa83db9c5df"
DETOXIFY_MODELS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")


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
        checkpoint, config = checkpoint_of(name)
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
