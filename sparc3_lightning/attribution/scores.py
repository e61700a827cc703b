"""The score file, scores.safetensors: one tensor per target module, and a header that says what they are.

Scores of weights are as large as the model in float32. They are written to shards as they come, and an index beside
them holds the header.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.files import replacing, write_atomically
from sparc3_lightning.provenance import revision_of

FORMAT = "sparc3_lightning scores 2"
INDEX = "weight_scores.safetensors.index.json"
INDEX_FORMAT = "sparc3_lightning scores of weights 2"
SHARD_BYTES = 2 << 30
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Provenance:
    """The origin and the meaning of the scores in a file.

    Args:
        checkpoint: As given by ``--model.checkpoint``.
        checkpoint_fingerprint: Commit at the hub, or a hash of the local files.
        spec: The options that say which scores were computed, none of them left open.
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
    spec: ScoreSpec
    data: dict[str, object]
    data_fingerprint: str
    num_samples: int
    num_tokens: int
    seq_len: int
    seed: int | None
    num_nonfinite: int = 0
    sample_ids: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    git_hash: str | None = None

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Read the header of a score file; fields of a later version are ignored.

        Raises:
            KeyError, TypeError, ValueError: If it is damaged.
        """
        values = json.loads(text)
        check_sample_ids(values["sample_ids"])
        values["spec"] = ScoreSpec(**{item.name: values["spec"][item.name] for item in fields(ScoreSpec)})
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    def to_json(self) -> str:
        """Return the header of a score file."""
        return json.dumps(asdict(self))

    @property
    def revision(self) -> str | None:
        """Commit of the checkpoint at the hub; None for a local one."""
        return revision_of(self.checkpoint_fingerprint)

    def shared(self) -> dict[str, object]:
        """Return the fields in which score files that belong together agree, beside their modules and shapes."""
        return {"checkpoint_fingerprint": self.checkpoint_fingerprint, **self.spec.shared()}

    def summary(self) -> dict[str, object]:
        """Return the provenance without the list of samples."""
        return {name: value for name, value in asdict(self).items() if name != "sample_ids"}


def check_sample_ids(ids: object) -> None:
    """Raise ValueError unless ids of samples, by which an evaluation leaves prompts out, are a list of texts."""
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        wrong = ids if not isinstance(ids, list) else next(name for name in ids if not isinstance(name, str))
        raise ValueError(f"its sample_ids must be a list of texts, got {wrong!r:.60}")


@dataclass(frozen=True)
class ScoreFile:
    """Scores per target module, shape ``[out_features]`` or of heads ``[heads]``, float32, and their provenance."""

    scores: dict[str, Tensor]
    provenance: Provenance
    path: Path | None = None

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of the scores of each module."""
        return {name: list(score.shape) for name, score in self.scores.items()}

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, and rename it."""
        metadata = {"format": FORMAT, "provenance": self.provenance.to_json()}
        write_atomically(path, save({name: score.contiguous() for name, score in self.scores.items()}, metadata))

    @classmethod
    def load(cls, path: Path) -> "ScoreFile":
        """Read a score file. Scores of weights are summed to the scores of their neurons.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, is not a score file, or holds NaN or infinity.
        """
        if not path.is_file():
            raise FileNotFoundError(f"The score file {path} does not exist; 'sparc3 attribute' writes it.")
        if path.name == INDEX:
            weights = WeightScores(path)
            sums = {name: score.sum(dim=1) for name, score in weights}
            spec = replace(weights.provenance.spec, granularity="neuron")
            of_neurons = replace(weights.provenance, spec=spec)
            return cls({name: sums[name] for name in sorted(sums, key=_natural)}, of_neurons, path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}") from None
        _check_version(path, metadata, FORMAT)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file, but not scores: its header does not say {FORMAT!r}.")
        provenance = _provenance(path, metadata)
        if not scores:
            raise ValueError(f"{path} holds no scores.")
        for name, score in scores.items():
            if score.dim() != 1:
                raise ValueError(f"{path}: {name} has shape {list(score.shape)}, expected [out_features].")
            if not torch.isfinite(score).all():
                raise ValueError(f"{path}: the scores of {name} hold NaN or infinity. Compute the file again.")
        return cls({name: scores[name] for name in sorted(scores, key=_natural)}, provenance, path)


class WeightScores:
    """The scores of weights in an index and its shards, read one module at a time.

    Iterating gives the name of each target module and its scores, shape ``[out_features, in_features]``, float32.

    Args:
        path: The index.

    Raises:
        ValueError: If it is damaged or not an index of scores; while iterating, if a shard is missing, truncated, or
            holds NaN or infinity.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            metadata, self.files = content["metadata"], content["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an index of scores, or is damaged: {error}") from None
        _check_version(path, metadata, INDEX_FORMAT)
        if metadata.get("format") != INDEX_FORMAT:
            raise ValueError(f"{path} is not an index of scores: its metadata does not say {INDEX_FORMAT!r}.")
        self.provenance = _provenance(path, metadata)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of the scores of each module, from the headers alone."""
        return {
            name: self._open(name, lambda file, name: list(file.get_slice(name).get_shape())) for name in self._names
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._names:
            score = self._open(name, lambda file, name: file.get_tensor(name))
            if score.dim() != 2 or not torch.isfinite(score).all():
                shard = self.path.parent / self.files[name]
                raise ValueError(f"{shard}: {name} has shape {list(score.shape)}, or holds NaN or infinity.")
            yield name, score

    @property
    def _names(self) -> list[str]:
        return sorted(self.files, key=_natural)

    def _open(self, name: str, read: Callable[[safe_open, str], _Read]) -> _Read:
        shard = self.path.parent / self.files[name]
        try:
            with safe_open(shard, framework="pt") as file:
                return read(file, name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard}, which {self.path.name} names, is missing or damaged: {error}") from None


class ShardWriter:
    """Writes scores of weights to shards as they come: no more than one shard is held in memory.

    Args:
        folder: Where the shards and the index go.
        shapes: Of every module, in the order in which they will come.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self.folder = folder
        self.left: list[list[str]] = [[]]
        held = 0
        for name, (rows, columns) in shapes.items():
            if self.left[-1] and held + 4 * rows * columns > SHARD_BYTES:
                self.left.append([])
                held = 0
            self.left[-1].append(name)
            held += 4 * rows * columns
        self.num_shards = len(self.left)
        self.files: dict[str, str] = {}
        self.shard: dict[str, Tensor] = {}

    def add(self, name: str, score: Tensor) -> None:
        """Take the scores of the next module, and write the shard once it is complete."""
        self.shard[name] = score.contiguous()
        if list(self.shard) != self.left[0]:
            return
        number = self.num_shards - len(self.left) + 1
        file = f"weight_scores-{number:05}-of-{self.num_shards:05}.safetensors"
        with replacing(self.folder / file) as temporary:
            save_file(self.shard, temporary, {"format": INDEX_FORMAT})
        self.files |= dict.fromkeys(self.left.pop(0), file)
        self.shard = {}

    def close(self, provenance: Provenance) -> None:
        """Write the index, last: a folder that holds one is complete."""
        metadata = {"format": INDEX_FORMAT, "provenance": provenance.to_json()}
        write_atomically(self.folder / INDEX, json.dumps({"metadata": metadata, "weight_map": self.files}, indent=2))


def _check_version(path: Path, metadata: Mapping[str, str], expected: str) -> None:
    """Raise ValueError if a score file has the format of an older version."""
    name, _, number = expected.rpartition(" ")
    theirs = str(metadata.get("format")).removeprefix(f"{name} ")
    if theirs.isdigit() and int(theirs) < int(number):
        raise ValueError(f"{path} was written by an older version in format {theirs}; attribute again.")


def _provenance(path: Path, metadata: Mapping[str, str]) -> Provenance:
    try:
        return Provenance.from_json(metadata["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The header of {path} is damaged: {error}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def load_matching(paths: Sequence[Path]) -> list[ScoreFile]:
    """Read score files that belong together.

    Raises:
        ValueError: If two differ in what they share, see ``Provenance.shared``, in modules or in shapes.
    """
    files = [ScoreFile.load(path) for path in paths]
    check_match(files)
    return files


def check_match(files: Sequence[ScoreFile | WeightScores], of_one_kind: bool = True) -> None:
    """Raise ValueError if two score files are not of the same layers, or of the same kind of scores.

    Args:
        files: The files, or indexes of scores of weights.
        of_one_kind: Whether scores are compared by their values, for which everything in ``Provenance.shared`` must
            agree; else it is the checkpoint, and the names and shapes of the layers alone.
    """
    first = files[0]
    shared = first.provenance.shared()
    for other in files[1:]:
        theirs = other.provenance.shared()
        for name in shared if of_one_kind else ("checkpoint_fingerprint", "layers"):
            if shared[name] != theirs[name]:
                raise ValueError(
                    f"The score files do not belong together: {name} is {shared[name]!r} in {first.path} but "
                    f"{theirs[name]!r} in {other.path}."
                )
        shapes, others = first.shapes, other.shapes
        for name in sorted(shapes.keys() | others.keys()):
            if shapes.get(name) != others.get(name):
                raise ValueError(
                    f"The score files do not belong together: {name} has shape {shapes.get(name)} in {first.path} but "
                    f"{others.get(name)} in {other.path}."
                )


def average(files: Sequence[ScoreFile]) -> dict[str, Tensor]:
    """Return the mean of the scores of several files, each weighing the same, as one over seeds."""
    return {name: torch.stack([file.scores[name] for file in files]).mean(dim=0) for name in files[0].scores}


def load_index(path: Path, option: str) -> WeightScores:
    """Open an index of scores of weights.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is something else.
    """
    if not path.is_file():
        raise OptionFileNotFoundError(option, f": {path} does not exist; 'sparc3 attribute' writes it.")
    if path.name != INDEX:
        raise OptionError(
            option,
            f": expected {INDEX}, the index of scores of weights, got {path}: run 'sparc3 attribute' with "
            "--.granularity weight.",
        )
    return WeightScores(path)
