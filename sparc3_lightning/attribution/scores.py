"""The score file, scores.safetensors: one tensor per target module, and a header that says what they are.

Scores of weights are as large as the model in float32. They are written to shards as they come, and an index beside
them holds the header.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.attribution.tensor_file import ERRORS, digest_of, load_tensors, opened, save_tensors
from sparc3_lightning.errors import OptionError, OptionFileNotFoundError
from sparc3_lightning.files import LEFT_OUT, Count, JsonFile, check_checksum, checksum, parse_json, read_as, replacing
from sparc3_lightning.models.experts import TokensSeen
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.sources import first_line

FORMAT = "sparc3_lightning scores 3"
INDEX = "weight_scores.safetensors.index.json"
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
        lrp_check: What a short sample showed about the LRP rules on the model; None for other methods.
        expert_tokens: How many tokens the scored experts saw; None without any.
        choosers: The scorers that had a part in choosing what is scored, or the samples: of each by its name what tells
            it from every other, None if that is not known.
        split_half: Of costs Spearman's correlation between those of every second sample and those of the samples
            between, over all components; None for other scores, or of a single sample. The costs of all samples are
            less noisy than those of a half.
    """

    checkpoint: str
    checkpoint_fingerprint: str
    spec: ScoreSpec
    data: dict[str, object]
    data_fingerprint: str
    num_samples: Count
    num_tokens: Count
    seq_len: Count
    seed: int | None
    num_nonfinite: Count = 0
    sample_ids: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    git_hash: str | None = None
    lrp_check: str | None = field(default=None, metadata=LEFT_OUT)
    expert_tokens: TokensSeen | None = field(default=None, metadata=LEFT_OUT)
    choosers: dict[str, str | None] = field(default_factory=dict, metadata=LEFT_OUT)
    split_half: float | None = field(default=None, metadata=LEFT_OUT)

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Read the header of a score file; fields of a later version are ignored.

        Raises:
            ValueError: If it is damaged.
        """
        return cast("Provenance", read_as(cls, parse_json(text)))

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


@dataclass(frozen=True)
class ScoreFile:
    """Scores per target module, shape ``[neurons]``, ``[heads]`` or ``[channels]``, float32, and their provenance."""

    scores: dict[str, Tensor]
    provenance: Provenance
    path: Path | None = None

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of the scores of each module."""
        return {name: list(score.shape) for name, score in self.scores.items()}

    def save(self, path: Path | str) -> None:
        """Write the file under a temporary name, and rename it."""
        save_tensors(Path(path), self.scores, {"format": FORMAT, "provenance": self.provenance.to_json()})

    @classmethod
    def load(cls, path: Path | str) -> "ScoreFile":
        """Read a score file. Scores of weights are summed to the scores of their neurons.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated or was changed, is not a score file, or holds NaN or infinity.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"The score file {path} does not exist; 'sparc3 attribute' writes it.")
        if path.name == INDEX:
            weights = WeightScores(path)
            sums = {name: score[slice(*weights.neuron_rows.get(name, [None]))].sum(dim=1) for name, score in weights}
            spec = replace(weights.provenance.spec, granularity="neuron")
            of_neurons = replace(weights.provenance, spec=spec)
            return cls({name: sums[name] for name in sorted(sums, key=_natural)}, of_neurons, path)
        scores, metadata = load_tensors(path, FORMAT)
        try:
            provenance = Provenance.from_json(metadata["provenance"])
        except KeyError:
            raise ValueError(f"The header of {path} is damaged: it has no provenance.") from None
        except ValueError as error:
            raise ValueError(f"The header of {path} is damaged: {error}.") from None
        if not scores:
            raise ValueError(f"{path} holds no scores.")
        for name, score in scores.items():
            _check(path, name, score, "[out_features]")
        return cls({name: scores[name] for name in sorted(scores, key=_natural)}, provenance, path)


def _check(path: Path, name: str, score: Tensor, shape: str) -> None:
    """Raise ValueError unless scores are finite, float32, and have as many dimensions as a shape in words."""
    if score.dim() != len(shape.split(",")):
        raise ValueError(f"{path}: {name} has shape {list(score.shape)}, expected {shape}.")
    if score.dtype != torch.float32:
        raise ValueError(f"{path}: the scores of {name} are of {score.dtype}, expected torch.float32.")
    if not torch.isfinite(score).all():
        raise ValueError(f"{path}: the scores of {name} hold NaN or infinity. Compute the file again.")


@dataclass(frozen=True)
class ShardIndex(JsonFile):
    """The index of the shards of scores of weights.

    Args:
        provenance: Of the scores.
        weight_map: The file that holds each module, beside the index.
        checksums: Of the scores of each module, see ``digest_of``.
        neuron_rows: First of the rows that are those of a module's neurons, and the row after the last one, where these
            are not all rows.
    """

    FORMAT = "sparc3_lightning weight_scores 3"
    provenance: Provenance
    weight_map: dict[str, str]
    checksums: dict[str, str]
    neuron_rows: dict[str, list[Count]] = field(default_factory=dict, metadata=LEFT_OUT)

    def check(self) -> None:
        """Raise ValueError unless each module has a checksum and a file beside the index, and there is one."""
        if not self.weight_map or self.weight_map.keys() != self.checksums.keys():
            raise ValueError("it does not name one checksum and one file for each module")
        if odd := [file for file in self.weight_map.values() if Path(file).name != file or not file.isprintable()]:
            raise ValueError(f"it names {odd[0]!r:.80}, which is no name of a file beside it")
        if odd := [name for name in self.weight_map if not name.isprintable()]:
            raise ValueError(f"it names {odd[0]!r:.80}, which is no module")


class WeightScores:
    """The scores of weights in an index and its shards, read one module at a time.

    Iterating gives the name of each target module and its scores, shape ``[out_features, in_features]``, float32.
    ``digest`` is a hash of all names and scores, as the index has it, and ``neuron_rows`` as in ``ShardIndex``.

    Args:
        path: The index.

    Raises:
        ValueError: If it was changed or is not an index of scores; while iterating, if a shard is missing, truncated or
            was changed, or holds NaN or infinity.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            index = ShardIndex.from_json(path.read_bytes())
            index.check()
        except ValueError as error:
            raise ValueError(
                f"{path} is not an index of scores, or is damaged: {error!s:.200}. Attribute again."
            ) from None
        self.files, self.provenance = index.weight_map, index.provenance
        self.neuron_rows = index.neuron_rows
        self.digest = checksum(index.checksums)
        self._unchecked = dict(index.checksums)  # a module is hashed when it is first read

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of the scores of each module, from the headers alone."""
        return {
            name: self._open(name, lambda file, name: list(file.get_slice(name).get_shape())) for name in self._names
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._names:
            score = self._open(name, lambda file, name: file.get_tensor(name))
            shard = self.path.parent / self.files[name]
            try:
                if name in self._unchecked:
                    check_checksum(self._unchecked[name], digest_of({name: score}))
                    del self._unchecked[name]
            except ValueError as error:
                raise ValueError(f"{shard} cannot be used: of {name} {error}.") from None
            _check(shard, name, score, "[out_features, in_features]")
            yield name, score

    @property
    def _names(self) -> list[str]:
        return sorted(self.files, key=_natural)

    def _open(self, name: str, read: Callable[[safe_open, str], _Read]) -> _Read:
        shard = self.path.parent / self.files[name]
        try:
            with opened(shard) as file:
                return read(file, name)
        except ERRORS as error:
            raise ValueError(
                f"{shard}, which {self.path.name} names, is missing or damaged: {first_line(error):.200}"
            ) from None


class ShardWriter:
    """Writes scores of weights to shards as they come: no more than one shard is held in memory.

    Args:
        folder: Where the shards and the index go.
        shapes: Of every module, in the order in which they will come.
        parts: Which rows of a module are those of its neurons, where these are not all rows.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], parts: Mapping[str, slice] | None = None
    ) -> None:
        self.folder = folder
        self.neuron_rows = {name: [part.start, part.stop] for name, part in (parts or {}).items()}
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
        self.checksums: dict[str, str] = {}
        self.shard: dict[str, Tensor] = {}

    def add(self, name: str, score: Tensor) -> None:
        """Take the scores of the next module, and write the shard once it is complete."""
        self.shard[name] = score.contiguous()
        self.checksums[name] = digest_of({name: self.shard[name]})
        if list(self.shard) != self.left[0]:
            return
        number = self.num_shards - len(self.left) + 1
        file = f"weight_scores-{number:05}-of-{self.num_shards:05}.safetensors"
        with replacing(self.folder / file) as temporary:
            save_file(self.shard, temporary, {"format": ShardIndex.FORMAT})
        self.files |= dict.fromkeys(self.left.pop(0), file)
        self.shard = {}

    def close(self, provenance: Provenance) -> None:
        """Write the index, last: a folder that holds one is complete."""
        ShardIndex(provenance, self.files, self.checksums, self.neuron_rows).save(self.folder / INDEX)


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
