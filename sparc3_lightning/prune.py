"""Stage 2: from score files to the list of neurons to prune, and to the pruned checkpoint."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from sparc3_lightning.checkpoints import Dtype, export_pruned, fingerprint, resolve_dtype
from sparc3_lightning.controls import lowest
from sparc3_lightning.files import check_absent, check_writable, write_atomically
from sparc3_lightning.neurons import NeuronList, select
from sparc3_lightning.provenance import git_hash, versions
from sparc3_lightning.relevance import differential_strength
from sparc3_lightning.scores import MUST_MATCH, ScoreFile, average, check_match, load_matching
from sparc3_lightning.selections import difference, normalized_difference, ratio, set_difference

NEURONS = "neurons.json"
SELECTION = "selection.json"


Selection = Literal["difference", "normalized_difference", "set_difference", "ratio"]


class Pruning(L.LightningModule):
    """Selects the neurons that serve the behaviour most over all layers, and writes neurons.json.

    Args:
        general: Score files of general reference samples, one per seed; they are averaged.
        behavior: Score file of reference samples of the behaviour.
        selection: ``difference``, the most negative differential relevance, as published; ``normalized_difference``,
            each side divided by its own total first; ``set_difference``, the highest for the behaviour in the top share
            by the behaviour and not in that by general text; or ``ratio``, the highest for the behaviour for each unit
            of the general score. But for the first, the two sides may differ in method and target.
        top_behavior: For ``set_difference``, share of all neurons by the behaviour; 1 leaves none out.
        top_general: For ``set_difference``, share of all neurons by general text that is left out.
        num_neurons: Neurons to prune, over all layers.
        num_ranked: Neurons that neurons.json lists, those that are pruned and those that come next, so that ``sparc3
            sweep`` can measure larger doses.
        min_strength: Least differential strength, (sum of general scores - sum of the behaviour's) / sum of general
            scores, in percent. It partly measures the length of the samples. For ``difference`` only.
        weak: What to do below ``min_strength``: ``warn`` and go on, or stop with an ``error``.
        export: Folder to write the pruned checkpoint to, in Hugging Face format with its tokenizer; None writes none.
            It must not exist.
        export_dtype: Of the exported weights; ``auto`` is the dtype the scores were computed in.
    """

    def __init__(
        self,
        general: Sequence[Path],
        behavior: Path,
        selection: Selection = "difference",
        top_behavior: float = 0.1,
        top_general: float = 0.1,
        num_neurons: int = 100,
        num_ranked: int = 1000,
        min_strength: float = 15.0,
        weak: Literal["warn", "error"] = "warn",
        export: Path | None = None,
        export_dtype: Dtype = "auto",
    ) -> None:
        super().__init__()
        if not general:
            raise ValueError("--model.general must name at least one score file.")
        if num_neurons < 1:
            raise ValueError(f"--model.num_neurons must be at least 1, got {num_neurons}.")
        if not 0 < top_behavior <= 1 or not 0 <= top_general < 1:
            raise ValueError(
                f"--model.top_behavior must be in (0, 1] and --model.top_general in [0, 1), got {top_behavior} and "
                f"{top_general}."
            )
        if export is not None and Path(export).exists():
            raise FileExistsError(f"--model.export: {export} exists already; nothing was overwritten.")
        self.save_hyperparameters()
        self.general = [Path(path) for path in general]
        self.behavior = Path(behavior)
        self.selection: Selection = selection
        self.top_behavior = top_behavior
        self.top_general = top_general
        self.num_neurons = num_neurons
        self.num_ranked = num_ranked
        self.min_strength = min_strength
        self.weak = weak
        self.export = None if export is None else Path(export)
        self.export_dtype: Dtype = export_dtype

    def prune(self, folder: Path) -> NeuronList:
        """Select the neurons and write everything about them to a folder.

        Writes neurons.json, selection.json (figures and a histogram of the differential relevance) and, as pictures,
        layers.png and differential.png; and the pruned checkpoint, if it was asked for.

        Args:
            folder: Where to write.

        Raises:
            FileNotFoundError, ValueError: If a score file is missing, damaged, or does not match the others; if
                ``num_neurons`` is more than there are; if the differential strength is too low and ``weak`` is error.
            FileExistsError: If the folder holds a neurons.json.
        """
        check_writable(folder)
        check_absent(folder / NEURONS)
        general_files, behavior_file = load_matching(self.general), ScoreFile.load(self.behavior)
        of_both = MUST_MATCH if self.selection == "difference" else ("checkpoint_fingerprint", "targets")
        check_match([general_files[0], behavior_file], of_both)
        general, behavior = average(general_files), behavior_file.scores
        ranked = self._rank(general, behavior)
        flat = torch.cat(list(ranked.values()))
        flat = flat[flat < math.inf]
        # With the number to prune first: it is that option which is wrong if there are not as many.
        chosen = select(ranked, self.num_neurons)
        following = select(ranked, min(max(self.num_ranked, self.num_neurons), len(flat)))[self.num_neurons :]
        provenance = _provenance(general_files, behavior_file)
        provenance["selection"] = self.selection
        if self.selection == "set_difference":
            provenance |= {"top_behavior": self.top_behavior, "top_general": self.top_general}
        strength = None
        if self.selection == "difference":
            strength = provenance["differential_strength_percent"] = differential_strength(general, behavior)
            self._check_strength(strength)
        provenance["export"] = None if self.export is None else str(self.export)
        least = lowest(chosen, {name: score.abs() for name, score in general.items()})
        neurons = NeuronList(chosen, provenance, following, least)
        selection = {
            "num_neurons": len(chosen),
            "num_candidates": sum(map(len, ranked.values())),
            "differential_strength_percent": strength,
            "num_negative": int((flat < 0).sum()),
            "threshold": chosen[-1].score,
            "neurons_per_module": {name: sum(n.module == name for n in chosen) for name in ranked},
            "histogram": histogram(flat),
        }
        from sparc3_lightning.figures import draw_differential, draw_layers

        draw_layers(selection["neurons_per_module"], folder / "layers.png")  # type: ignore[arg-type]
        draw_differential(selection, folder / "differential.png")
        write_atomically(folder / SELECTION, json.dumps(selection, indent=1) + "\n")
        if self.export is not None:
            self._export(neurons, behavior_file)
        # Last, since a folder with neurons.json counts as complete.
        neurons.save(folder / NEURONS)
        self._describe(neurons, selection, folder)
        return neurons

    def _rank(self, general: dict[str, torch.Tensor], behavior: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.selection == "set_difference":
            return set_difference(general, behavior, self.top_behavior, self.top_general)
        if self.selection == "ratio":
            return ratio(general, behavior)
        return (difference if self.selection == "difference" else normalized_difference)(general, behavior)

    def _check_strength(self, strength: float) -> None:
        if math.isfinite(strength) and strength >= self.min_strength:
            return
        message = (
            f"The differential strength is {strength:.1f} %, below --model.min_strength {self.min_strength:.1f} %: the "
            "behaviour's samples use the scored layers about as much as general text does. It partly measures length: "
            "compare samples of like length as well."
        )
        if self.weak == "error":
            raise ValueError(f"{message} Nothing was written (--model.weak error).")
        rank_zero_warn(message)

    def _describe(self, neurons: NeuronList, selection: dict[str, Any], folder: Path) -> None:
        layers = sum(count > 0 for count in selection["neurons_per_module"].values())
        strength = selection["differential_strength_percent"]
        of = self.selection.replace("_", " ") if strength is None else f"differential strength {strength:.1f} %"
        rank_zero_info(
            f"{len(neurons.neurons)} of {selection['num_candidates']:,} neurons in {layers} layers, {of}: "
            f"{folder / NEURONS}"
        )

    def _export(self, neurons: NeuronList, scores: ScoreFile) -> None:
        assert self.export is not None
        source = scores.provenance
        revision = source.checkpoint_fingerprint.partition("commit:")[2] or None
        if fingerprint(source.checkpoint, revision) != source.checkpoint_fingerprint:
            raise ValueError(
                f"The checkpoint {source.checkpoint!r} is no longer the one that was attributed "
                f"({source.checkpoint_fingerprint}); it was not exported."
            )
        name: Any = source.dtype if self.export_dtype == "auto" else self.export_dtype
        dtype = resolve_dtype(name, torch.device("cpu"))
        export_pruned(source.checkpoint, neurons.neurons, self.export, dtype=dtype, revision=revision)
        rank_zero_info(f"Pruned checkpoint: {self.export}")


def histogram(values: torch.Tensor, num_bins: int = 81) -> dict[str, list[float]]:
    """Count values in bins of equal width, between the smallest and the largest.

    Returns:
        ``edges``, one more than there are bins, and ``counts``.
    """
    counts, edges = torch.histogram(values.double(), bins=num_bins)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _provenance(general: list[ScoreFile], behavior: ScoreFile) -> dict[str, Any]:
    shared = behavior.provenance
    return {
        "checkpoint": shared.checkpoint,
        "checkpoint_fingerprint": shared.checkpoint_fingerprint,
        "general": [{"path": str(file.path), **file.provenance.summary()} for file in general],
        "behavior": {"path": str(behavior.path), **shared.summary()},
        "sample_ids": sorted({id_ for file in (*general, behavior) for id_ in file.provenance.sample_ids}),
        "versions": versions(),
        "git_hash": git_hash(),
    }
