"""Compression: from the scores of weights to a sparse checkpoint, as a plain one with zeros in it.

It is a verb beside ``sparc3 prune``, with which it shares no option but the export: there is no behaviour and no list
of neurons here, and what it makes is the checkpoint.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparc3_lightning.attribution.scores import WeightScores, check_match, load_index
from sparc3_lightning.errors import OptionError, OptionFileExistsError
from sparc3_lightning.models.architectures import ALL, find_layers, linear_at, parameters_of, weight_of
from sparc3_lightning.models.checkpoints import Checkpoint, Dtype
from sparc3_lightning.models.export import Copy, check_export, copied, export_dtype_of
from sparc3_lightning.provenance import git_hash, versions
from sparc3_lightning.selection.sides import check_are_different
from sparc3_lightning.selection.sparsity import (
    SPARSITY,
    SparsityResults,
    check_sparsity,
    global_masks,
    global_threshold,
    prune_mask,
)
from sparc3_lightning.stages.base import Stage, paths_of
from sparc3_lightning.stages.folders import giving_back


class Ranking:
    """What weights are ranked by, one layer at a time: the absolute value of their mean score over the files.

    Signed relevance so counts by its size, whichever way a weight pulls; the other scores are not negative anyway.

    Args:
        files: The scores of weights, of the same layers; each file weighs the same.
    """

    def __init__(self, files: Sequence[WeightScores]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for layers in zip(*self.files, strict=True):
            yield layers[0][0], torch.stack([score for _, score in layers]).mean(dim=0).abs_()

    def masks(self, sparsity: float, pattern: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each layer, and True where a weight is pruned, shape ``[out_features, in_features]``."""
        if pattern == "global":
            yield from global_masks(self, global_threshold(self, sparsity))
            return
        for name, score in self:
            yield name, prune_mask(score, sparsity, pattern)


class Compression(Stage):
    """Sets the weights of the lowest scores to zero, and writes the sparse checkpoint.

    The layers are those that were scored: ``sparc3 attribute --model.granularity weight --model.layers '[all]'``
    scores every linear layer, those of experts among them, but the head and the routers that choose among experts.
    Embeddings, head and routers are never pruned.

    Args:
        general: Indexes of scores of weights on general reference samples, one per seed; they are averaged. Signed
            relevance is ranked by the absolute value of its mean.
        export: Folder to write the sparse checkpoint to: the files of the original, with zeros in the weights. It must
            not exist.
        sparsity: Share of the weights of those layers that becomes zero, in [0, 1].
        pattern: Which weights are compared with each other: a ``row``, the incoming weights of a neuron, as
            Wanda and SparC3 do; a ``layer``; ``global``, all layers; or n:m, such as ``2:4``, which keeps at most
            n of m weights side by side in a row.
        export_dtype: Of the exported weights; ``auto`` keeps the dtype of each.
    """

    verb = "compress"
    OUTPUTS = (SPARSITY,)

    def __init__(
        self,
        general: tuple[Path, ...] | Path,
        export: Path,
        sparsity: float = 0.5,
        pattern: str = "row",
        export_dtype: Dtype = "auto",
    ) -> None:
        super().__init__()
        if not general:
            raise OptionError("general", "must name at least one index of scores of weights.")
        check_sparsity(sparsity, pattern)
        if Path(export).exists():
            raise OptionFileExistsError("export", f": {export} exists already; nothing was overwritten.")
        self.save_hyperparameters()
        self.general = paths_of(general)
        self.export = Path(export)
        self.sparsity = sparsity
        self.pattern = pattern
        self.export_dtype: Dtype = export_dtype

    @giving_back()
    def compress(self, folder: Path) -> str:
        """Write the sparse checkpoint, and sparsity.json to a folder: the sparsity of each layer and its origin.

        Args:
            folder: Where sparsity.json goes.

        Returns:
            A sentence for the terminal.

        Raises:
            FileNotFoundError, ValueError: If a file of scores is missing, damaged, not of weights, or does not match
                the others or the checkpoint; if the pattern does not fit a layer.
            FileExistsError: If the folder holds a sparsity.json.
        """
        self.begin(folder)
        files = [load_index(path, "general") for path in self.general]
        check_match(files)
        check_are_different([("general", file) for file in files])
        source = files[0].provenance
        checkpoint = Checkpoint.unchanged(source.checkpoint, source.checkpoint_fingerprint)
        num_parameters = check_layers(files[0], checkpoint)
        dtype = export_dtype_of(self.export_dtype)
        check_export(checkpoint, list(files[0].shapes), "weight", self.export, dtype=dtype)
        self.keep_config()
        with copied(checkpoint, self.export, dtype) as copy:
            found = zero_(copy.model, held(copy, Ranking(files).masks(self.sparsity, self.pattern)))
        share = found.num_pruned / num_parameters
        SparsityResults(
            pattern=self.pattern,
            sparsity=self.sparsity,
            **vars(found),
            share_of_all_parameters=share,
            export=str(self.export),
            export_dtype=self.export_dtype,
            checkpoint=source.checkpoint,
            checkpoint_fingerprint=source.checkpoint_fingerprint,
            general=[{"path": str(file.path), "digest": file.digest, **file.provenance.summary()} for file in files],
            versions=versions(),
            git_hash=git_hash(),
        ).save(self.output)
        return (
            f"{found.num_pruned:,} of {found.num_weights:,} weights in {len(found.layers)} layers are zero, "
            f"{share:.1%} of all parameters: {self.export}\nSparsity of each layer: {self.output}"
        )


@dataclass(frozen=True)
class Zeroed:
    """What was set to zero; ``masks`` is a hash of where, and ``layers`` the sparsity of each layer."""

    num_pruned: int
    num_weights: int
    masks: str
    layers: dict[str, float]


def zero_(model: nn.Module, masks: Iterator[tuple[str, Tensor]]) -> Zeroed:
    """Set weights to zero in place, and return their numbers and a hash.

    Args:
        model: Any model.
        masks: Name of each linear layer, and True where a weight is pruned, shape ``[out_features, in_features]``.
    """
    digest, layers = hashlib.sha256(), {}
    num_pruned = num_weights = 0
    for name, pruned in masks:
        weight = weight_of(linear_at(model, name)).data
        weight.masked_fill_(pruned.to(weight.device), 0)
        digest.update(name.encode() + np.packbits(pruned.cpu().numpy()).tobytes())
        count = int(pruned.sum())
        layers[name] = count / pruned.numel()
        num_pruned += count
        num_weights += pruned.numel()
    return Zeroed(num_pruned, num_weights, digest.hexdigest()[:16], layers)


def held(copy: Copy, masks: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hold the weights of each layer while its mask is in use, and of all experts of a block while one is."""

    def owner_of(mask: tuple[str, Tensor]) -> str:
        return next(iter(parameters_of(copy.model, mask[0]).values())).rpartition(".")[0]

    for owner, of_owner in groupby(masks, owner_of):
        with copy.holding([owner]):
            yield from of_owner


def check_layers(scores: WeightScores, checkpoint: Checkpoint) -> int:
    """Check that the model has the layers, none of them the head, before it is loaded; return its number of parameters.

    Raises:
        ValueError: If a layer is not there, or has another shape.
    """
    model = checkpoint.skeleton()
    layers = find_layers(model, [ALL])
    for name, shape in scores.shapes.items():
        if name not in layers:
            raise OptionError(
                "layers",
                f"{scores.path}: {name} is the head, which is never pruned, a router of experts, or no linear layer of "
                "the model: attribute with --.layers '[all]'.",
            )
        if shape != list(weight_of(layers[name]).shape):
            raise ValueError(
                f"{scores.path}: {name} has shape {shape}, but {list(weight_of(layers[name]).shape)} in the model."
            )
    return sum(parameter.numel() for parameter in model.parameters())
