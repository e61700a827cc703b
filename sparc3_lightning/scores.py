"""The score file, scores.safetensors: one tensor per target module, and a header that says what they are."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparc3_lightning.files import write_atomically

FORMAT = "sparc3_lightning scores 1"
# Two score files can be averaged or subtracted only if they agree in these fields, and in their modules and shapes.
MUST_MATCH = ("checkpoint_fingerprint", "method", "rule", "relevance", "targets", "dtype")


@dataclass(frozen=True)
class Provenance:
    """All that is needed to know what a score file holds.

    Args:
        checkpoint: As given by ``--model.checkpoint``.
        checkpoint_fingerprint: Commit at the hub, or a hash of the local files.
        method: ``lrp`` or ``wanda``.
        rule: ``attnlrp`` or ``cp_lrp``; None for Wanda.
        relevance: ``magnitude`` or ``signed``; None for Wanda.
        targets: Names of the target layer types.
        dtype: Dtype of the model.
        data: Data module and its options.
        data_fingerprint: Hash of the token ids of all samples in order.
        num_samples: Number of samples.
        num_tokens: Number of tokens, without padding.
        seq_len: Length of the longest sample in tokens.
        seed: Seed of the run.
        num_nonfinite: Values that were NaN or infinite and were replaced by 0.
        sample_ids: Of each sample; for prompts they tell evaluation which to leave out.
        versions: Of this package, its main dependencies and Python.
        git_hash: Commit of this package's working tree, if it is one.
    """

    checkpoint: str
    checkpoint_fingerprint: str
    method: str
    rule: str | None
    relevance: str | None
    targets: list[str]
    dtype: str
    data: dict[str, Any]
    data_fingerprint: str
    num_samples: int
    num_tokens: int
    seq_len: int
    seed: int | None
    num_nonfinite: int = 0
    sample_ids: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    git_hash: str | None = None

    def summary(self) -> dict[str, Any]:
        """Return the provenance without the list of samples."""
        return {name: value for name, value in asdict(self).items() if name != "sample_ids"}


@dataclass(frozen=True)
class ScoreFile:
    """Scores per target module, shape ``[out_features]``, float32, and their provenance."""

    scores: dict[str, Tensor]
    provenance: Provenance
    path: Path | None = None

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, and rename it."""
        metadata = {"format": FORMAT, "provenance": json.dumps(asdict(self.provenance))}
        write_atomically(path, save({name: score.contiguous() for name, score in self.scores.items()}, metadata))

    @classmethod
    def load(cls, path: Path) -> "ScoreFile":
        """Read a score file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, is not a score file, or holds NaN or infinity.
        """
        if not path.is_file():
            raise FileNotFoundError(f"The score file {path} does not exist; 'sparc3 attribute' writes it.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file, but not scores: its header does not say {FORMAT!r}.")
        try:
            known = {item.name for item in fields(Provenance)}
            values = json.loads(metadata["provenance"])
            provenance = Provenance(**{name: value for name, value in values.items() if name in known})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The header of {path} is damaged: {error}") from None
        if not scores:
            raise ValueError(f"{path} holds no scores.")
        for name, score in scores.items():
            if score.dim() != 1:
                raise ValueError(f"{path}: {name} has shape {list(score.shape)}, expected [out_features].")
            if not torch.isfinite(score).all():
                raise ValueError(f"{path}: the scores of {name} hold NaN or infinity. Compute the file again.")
        return cls({name: scores[name] for name in sorted(scores, key=_natural)}, provenance, path)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def load_matching(paths: Sequence[Path]) -> list[ScoreFile]:
    """Read score files that belong together.

    Raises:
        ValueError: If two differ in checkpoint, method, rule, relevance, targets, dtype, modules or shapes.
    """
    files = [ScoreFile.load(path) for path in paths]
    first = files[0]
    for other in files[1:]:
        for name in MUST_MATCH:
            mine, theirs = getattr(first.provenance, name), getattr(other.provenance, name)
            if mine != theirs:
                raise ValueError(
                    f"The score files do not belong together: {name} is {mine!r} in {first.path} but {theirs!r} in "
                    f"{other.path}."
                )
        shapes, others = ({n: list(s.shape) for n, s in file.scores.items()} for file in (first, other))
        for name in sorted(shapes.keys() | others.keys()):
            if shapes.get(name) != others.get(name):
                raise ValueError(
                    f"The score files do not belong together: {name} has shape {shapes.get(name)} in {first.path} but "
                    f"{others.get(name)} in {other.path}."
                )
    return files


def average(files: Sequence[ScoreFile]) -> dict[str, Tensor]:
    """Return the mean of the scores of several files, each weighing the same, as one over seeds."""
    return {name: torch.stack([file.scores[name] for file in files]).mean(dim=0) for name in files[0].scores}
