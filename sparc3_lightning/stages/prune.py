"""Stage 2: from score files to the list of neurons to prune, and to the pruned checkpoint."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from sparc3_lightning.attribution.scores import ScoreFile, WeightScores, average, check_match, load_matching
from sparc3_lightning.data.base import ReferenceSamples
from sparc3_lightning.errors import OptionError, OptionFileExistsError
from sparc3_lightning.models.checkpoints import Checkpoint, Dtype
from sparc3_lightning.models.components import Component, counts_of, in_words, kind_of, plural
from sparc3_lightning.models.export import check_export, export_dtype_of, export_pruned
from sparc3_lightning.models.keeping import load_kept
from sparc3_lightning.models.likelihood import check_logits
from sparc3_lightning.models.neurons import check_are_neurons
from sparc3_lightning.report.drawing import draw_or_warn
from sparc3_lightning.selection.budget import Budget, PerplexityRise, choose_within
from sparc3_lightning.selection.criteria import (
    Scores,
    differential_relevance,
    differential_strength,
    floor_of,
    with_floor,
)
from sparc3_lightning.selection.neuron_list import NEURONS, SELECTION, BudgetUse, NeuronList, Selected, origin
from sparc3_lightning.selection.neuron_selection import (
    CRITERIA,
    CriterionName,
    NeuronRanking,
    Sides,
    activations_beside,
    edited,
    means_beside,
)
from sparc3_lightning.selection.prediction import Prediction
from sparc3_lightning.selection.sides import check_are_costs, check_sides
from sparc3_lightning.selection.weight_selection import DifferentialWeights, select_weights
from sparc3_lightning.stages.attribute import ALIKE, noise_in_words
from sparc3_lightning.stages.base import Stage, paths_of
from sparc3_lightning.stages.folders import check_config, giving_back, own
from sparc3_lightning.stages.terminal import Line

UNFINISHED = "export.unfinished"  # beside neurons.json, until the pruned checkpoint is complete


class Pruning(Stage):
    """Selects the neurons, or single weights, that serve the behaviour most over all layers, and writes neurons.json.

    The option ``budget`` is a group, see ``Budget``.

    Args:
        general: Score files of general reference samples, one per seed; they are averaged.
        behavior: Score file of reference samples of the behaviour.
        harmless: Score file of samples like the behaviour's without the behaviour; subtracted from the behaviour's. Not
            for ``auroc``, which ranks by activations alone.
        criterion: ``difference``, the most negative differential relevance, as published; ``normalized_difference``,
            each side divided by its own total first; ``set_difference``, the highest for the behaviour in the top share
            by the behaviour and not in that by general text; ``benefit_per_cost``, the highest for the behaviour, if
            above 0, for each unit of the general score, which must be a cost (target ``sampled``, relevance
            ``fisher``), and the behaviour's ``signed``; ``auroc``, those whose mean activation tells the behaviour's
            samples from general ones best; or ``weighted_difference``, the difference times 2 AUROC - 1. But for the
            differences as they are, the two sides may differ in method and target. The last two need ``sparc3 attribute
            --model.activations true``.
        top_behavior: For ``set_difference``, share of all neurons by the behaviour; 1 leaves none out.
        top_general: For ``set_difference``, share of all neurons by general text that is left out.
        ablation: What takes the place of a neuron's activation: ``zero``, or its ``mean`` over the general samples,
            which needs ``sparc3 attribute --model.activations true``.
        num_neurons: Neurons, or weights, to prune, over all layers; not with a budget.
        dampings: How far a neuron is switched off: 1 is off, a fraction leaves the rest of its activation. Several are
            for the budget to choose from.
        num_ranked: Neurons that neurons.json lists, those that are pruned and those that come next, so that ``sparc3
            sweep`` can measure larger doses; and the most that a budget takes.
        min_differential_strength: Least value of (sum of general scores - sum of the behaviour's scores) / sum of
            general scores, in percent. It partly measures the length of the samples. For ``difference`` only.
        weak: What to do below ``min_differential_strength``: ``warn`` and go on, or stop with an ``error``.
        granularity: ``neuron`` for what the score files have scores of, be it neurons, heads, channels, or neurons and
            channels in one ranking; scores of weights are summed for neurons. Or ``weight`` to prune single weights, by
            the ``difference`` alone and without any harmless samples, mean ablation or budget; it needs scores of
            weights (``sparc3 attribute --model.granularity weight``).
        export: Folder to write the pruned checkpoint to: the files of the original, in which the pruned weights alone
            differ; None writes none. It must not exist.
        export_dtype: Of the exported weights; ``auto`` keeps the dtype of each.
    """

    verb = "prune"
    OUTPUTS = (NEURONS,)
    FILLED_IN: ClassVar[set[str]] = {"general", "behavior", "harmless"}

    def __init__(
        self,
        general: tuple[Path, ...] | Path,
        behavior: Path,
        harmless: Path | None = None,
        criterion: CriterionName = "difference",
        top_behavior: float = 0.1,
        top_general: float = 0.1,
        ablation: Literal["zero", "mean"] = "zero",
        num_neurons: int = 100,
        dampings: Sequence[float] = (1.0,),
        budget: Budget = Budget(),
        num_ranked: int = 1000,
        min_differential_strength: float = 15.0,
        weak: Literal["warn", "error"] = "warn",
        granularity: Literal["neuron", "weight"] = "neuron",
        export: Path | None = None,
        export_dtype: Dtype = "auto",
    ) -> None:
        super().__init__()
        if not general:
            raise OptionError("general", "must name at least one score file.")
        for option, number in (("num_neurons", num_neurons), ("num_ranked", num_ranked)):
            if number < 1:
                raise OptionError(option, f"must be at least 1, got {number}.")
        if not 0 < top_behavior <= 1 or not 0 <= top_general < 1:
            raise OptionError(
                "top_behavior", f"must be in (0, 1] and --.top_general in [0, 1), got {top_behavior} and {top_general}."
            )
        if harmless is not None and not CRITERIA[criterion].needs_scores:
            raise OptionError(
                "harmless", f"names score files, but --.criterion {criterion} ranks by activations alone: leave it out."
            )
        if not dampings or not all(0 < damping <= 1 for damping in dampings):
            raise OptionError("dampings", f"must be above 0 and at most 1, got {list(dampings)}.")
        budget.check(dampings)
        if granularity == "weight":
            others = {
                f"--.criterion {criterion}": criterion != "difference",
                "--.harmless": harmless is not None,
                f"--.ablation {ablation}": ablation != "zero",
                "--.budget.max_perplexity_increase": budget.max_perplexity_increase is not None,
            }
            if given := [option for option, is_given in others.items() if is_given]:
                raise OptionError("granularity", f"weight cannot be combined with {', '.join(given)}.")
        self.save_hyperparameters()
        self.general = paths_of(general)
        self.behavior = Path(behavior)
        self.harmless = None if harmless is None else Path(harmless)
        self.criterion: CriterionName = criterion
        self.top_behavior = top_behavior
        self.top_general = top_general
        self.ablation = ablation
        self.num_neurons = num_neurons
        self.dampings = list(dampings)
        self.budget = budget
        self.num_ranked = num_ranked
        self.min_differential_strength = min_differential_strength
        self.weak = weak
        self.granularity = granularity
        self.export = None if export is None else Path(export)
        self.export_dtype: Dtype = export_dtype

    @giving_back()
    def prune(
        self, folder: Path, text: ReferenceSamples | None = None, device: torch.device | None = None
    ) -> NeuronList:
        """Select the neurons and write everything about them to a folder.

        Writes neurons.json, selection.json (counts and a histogram of what ranks the neurons) and, as pictures,
        layers.png and differential.png; and the pruned checkpoint, if it was asked for.

        Args:
            folder: Where to write.
            text: What perplexity is measured on, for a budget.
            device: Where that is measured; None for the CPU.

        Raises:
            FileNotFoundError, ValueError: If a score file is missing, damaged, or does not match the others; if
                ``num_neurons`` is more than there are; if the differential strength is too low and ``weak`` is error;
                if not one neuron is within the budget.
            FileExistsError: If the folder holds a neurons.json, or there is an export; but if that broke off, it is
                finished.
        """
        if self._is_unfinished(folder):
            own(folder, self.verb)
            if self.config_yaml is not None:
                check_config(folder, self.config_yaml)
            return finish_export(folder)
        if self.export is not None and self.export.exists():
            raise OptionFileExistsError("export", f": {self.export} exists already; nothing was overwritten.")
        self.begin(folder)
        if self.budget.max_perplexity_increase is not None and text is None:
            raise OptionError(
                "budget.max_perplexity_increase", "needs a text: --data C4 --data.source <file> and so on."
            )
        found, provenance = self._weights() if self.granularity == "weight" else self._neurons(text, device)
        self.keep_config()
        provenance |= {"criterion": self.criterion, "ablation": self.ablation, "damping": found.chosen[0].damping}
        if self.criterion == "set_difference":
            provenance |= {"top_behavior": self.top_behavior, "top_general": self.top_general}
        if found.differential_strength is not None:
            provenance["differential_strength_percent"] = found.differential_strength
        if found.budget is not None:
            provenance["budget"] = asdict(found.budget)
        # The fingerprint is that of the exported checkpoint, noted just before that appears.
        provenance |= {"export": None, "export_dtype": None, "export_fingerprint": None}
        if self.export is not None:
            provenance |= {"export": str(self.export), "export_dtype": self.export_dtype}
        neurons = NeuronList(found.chosen, provenance, found.next, found.least_relevant)
        selection = found.results(self.criterion)
        selection.save(folder / SELECTION)
        # What was found comes before the export, which may fail: the same command then makes up for it.
        if self.export is not None:
            (folder / UNFINISHED).touch()
        neurons.save(self.output)
        draw_or_warn(folder)
        self._describe(found, self.output)
        return finish_export(folder) if self.export is not None else neurons

    def _is_unfinished(self, folder: Path) -> bool:
        """Tell whether a folder holds neurons whose export, to the same place, broke off."""
        if self.export is None or not (folder / UNFINISHED).exists() or not (folder / NEURONS).is_file():
            return False
        return NeuronList.load(folder / NEURONS).origin.get("export") == str(self.export)

    def _neurons(
        self, text: ReferenceSamples | None, device: torch.device | None
    ) -> tuple[Selected, dict[str, object]]:
        """Select neurons by scores of neurons, or of weights that are summed; and say where the scores come from."""
        needs = CRITERIA[self.criterion]
        general_files, behavior_file = load_matching(self.general), ScoreFile.load(self.behavior)
        check_match([general_files[0], behavior_file], needs.needs_one_kind)
        if needs.needs_costs:
            check_are_costs(general_files[0].provenance.spec, behavior_file.provenance.spec)
            for file in general_files:
                if file.provenance.spec.is_cost and not (file.provenance.split_half or 0) >= ALIKE:
                    rank_zero_warn(noise_in_words(file.provenance.split_half))
        scored = behavior_file.provenance.spec.granularity
        neurons = [name for name in behavior_file.scores if kind_of(scored, name) == "neuron"]
        check_are_neurons(neurons)
        if len(neurons) < len(behavior_file.scores):
            others = f"is for neurons, and these are scores of {plural(scored)}: leave it out."
            if self.budget.refine:
                raise OptionError("budget.refine", others)
            if self.ablation == "mean":
                raise OptionError("ablation", f"mean {others}")
        general, behavior = average(general_files), behavior_file.scores
        files = [*general_files, behavior_file]
        if self.harmless is not None:
            files += load_matching([self.behavior, self.harmless])[1:]
        check_sides(general_files, *files[len(general_files) :])
        self._check_export(behavior_file)
        if self.harmless is not None:
            behavior = differential_relevance(behavior, files[-1].scores)
        floor = floor_of(sum(file.provenance.num_tokens for file in general_files))
        sides = Sides(general, behavior, self.top_behavior, self.top_general, floor=floor)
        if needs.needs_activations:
            rows = activations_beside(self.general), activations_beside([self.behavior])
            sides = replace(sides, general_rows=rows[0], behavior_rows=rows[1])
        scores = needs.rank(sides)
        differential = None
        if self.criterion == "difference":
            differential = differential_strength(general, behavior)
            self._check_differential_strength(differential)
        means = means_beside(self.general) if self.ablation == "mean" else None
        ranking = NeuronRanking(scores, general, self.dampings[0], means, scored)
        num_listed, use = min(self.num_ranked, len(ranking.eligible)), None
        if self.budget.max_perplexity_increase is None:
            # If there are fewer than the number to prune, it is that option which is wrong, not the number listed.
            listed = ranking.first(max(self.num_neurons, num_listed))
            chosen = listed[: self.num_neurons]
        else:
            assert text is not None
            if not num_listed:
                way = ": raise --.top_behavior, or lower --.top_general" if self.criterion == "set_difference" else ""
                raise OptionError("criterion", f"{self.criterion} leaves no {scored} that may be pruned{way}.")
            listed = ranking.first(num_listed)
            on = device or torch.device("cpu")
            # A constant in the place of 0 costs something else than the costs say.
            is_predicted = general_files[0].provenance.spec.is_cost and means is None
            prediction = Prediction(general, floor) if is_predicted else None
            costs = with_floor(general, floor) if needs.needs_costs else None
            with closing(Line("Searching within the budget", "tokens", is_shown=self.shows_progress)) as line:
                chosen, use = within_budget(
                    self.budget, self.dampings, listed, text, general_files, on, line.advance, prediction, costs
                )
            if len(chosen) == num_listed < len(ranking.eligible):
                rank_zero_warn(
                    f"The {num_listed:,} of --model.num_ranked are all within the budget (perplexity "
                    f"{100 * use.rise:+.2f} %), and {len(ranking.eligible):,} could be ranked: raise it to use up the "
                    "budget."
                )
        return ranking.selected(chosen, listed, differential, use), origin(general_files, files[len(general_files) :])

    def _weights(self) -> tuple[Selected, dict[str, object]]:
        """Select single weights by scores of weights; and say where the scores come from."""
        layers = DifferentialWeights(self.general, self.behavior)
        check_sides(layers.general, layers.behavior)
        self._check_export(layers.behavior)
        found = select_weights(layers, self.num_neurons, self.num_ranked)
        assert found.differential_strength is not None
        self._check_differential_strength(found.differential_strength)
        chosen, following = (edited(weights, self.dampings[0]) for weights in (found.chosen, found.next))
        return replace(found, chosen=chosen, next=following), origin(layers.general, [layers.behavior])

    def _check_export(self, scores: ScoreFile | WeightScores) -> None:
        """Raise ValueError or OSError if the pruned checkpoint could not be written, before anything is searched."""
        if self.export is not None:
            source = scores.provenance
            check_export(
                Checkpoint.unchanged(source.checkpoint, source.checkpoint_fingerprint),
                list(scores.shapes),
                source.spec.granularity,
                self.export,
                dtype=export_dtype_of(self.export_dtype),
                with_means=self.ablation == "mean",
            )

    def _check_differential_strength(self, percent: float) -> None:
        if math.isfinite(percent) and percent >= self.min_differential_strength:
            return
        message = (
            f"The differential strength is {percent:.1f} %, below --model.min_differential_strength "
            f"{self.min_differential_strength:.1f} %: the behaviour's samples use the scored layers about as "
            "much as general text does. It partly measures length: compare samples of like length as well."
        )
        if self.weak == "error":
            raise OptionError("weak", f"{message} Nothing was written (--.weak error).")
        rank_zero_warn(message)

    def _describe(self, found: Selected, path: Path) -> None:
        layers = len({neuron.module for neuron in found.chosen})
        if found.differential_strength is None:
            by = self.criterion.replace("_", " ")
        else:
            by = f"differential strength {found.differential_strength:.1f} %"
        if found.budget:
            by += f", damping {found.chosen[0].damping:g}, perplexity {100 * found.budget.rise:+.2f} %"
            if found.budget.predicted is not None:
                by += f" ({100 * found.budget.predicted:+.2f} % predicted)"
        rank_zero_info(
            f"{in_words(counts_of(found.chosen))} of {found.num_candidates:,} in {layers} layers, {by}: {path}"
        )


def finish_export(folder: Path) -> NeuronList:
    """Export the pruned checkpoint of a folder with neurons.json whose export is not complete.

    Args:
        folder: Of ``sparc3 prune``.

    Returns:
        The neurons, with the fingerprint of the exported checkpoint among their provenance.

    Raises:
        OSError, ValueError: If the checkpoint has changed, or the export cannot be written. neurons.json stays.
    """
    neurons = NeuronList.load(folder / NEURONS)
    origin = neurons.origin
    needed = origin["checkpoint"], origin["checkpoint_fingerprint"], origin["export"], origin["export_dtype"]
    name, fingerprint, place, dtype_name = needed
    assert name is not None
    assert fingerprint is not None
    assert place is not None
    assert dtype_name is not None
    export = Path(place)

    def note(of_export: str) -> None:
        neurons.provenance["export_fingerprint"] = of_export
        neurons.save(folder / NEURONS)

    if not _is_export(export, origin["export_fingerprint"]):
        checkpoint = Checkpoint.unchanged(name, fingerprint)
        dtype = export_dtype_of(dtype_name)
        try:
            export_pruned(checkpoint, neurons.neurons, export, dtype=dtype, note=note)
        except OSError as error:
            raise OSError(
                f"{error} The neurons are kept in {folder / NEURONS}. To export them, give the same command again; "
                f"'sparc3 prune' with --trainer.logger.init_args.version {folder.name}."
            ) from error
    (folder / UNFINISHED).unlink()
    rank_zero_info(f"Pruned checkpoint: {export}")
    return neurons


def _is_export(folder: Path, fingerprint: str | None) -> bool:
    """Tell whether a folder is the export of this fingerprint, after which the process died."""
    try:
        return fingerprint is not None and Checkpoint(str(folder.absolute())).fingerprint == fingerprint
    except (OSError, ValueError):  # it is not there, or is no checkpoint
        return False


def within_budget(
    budget: Budget,
    dampings: Sequence[float],
    ranked: Sequence[Component],
    text: ReferenceSamples,
    general: Sequence[ScoreFile],
    device: torch.device,
    on_read: Callable[[float], None],
    prediction: Prediction | None = None,
    costs: Scores | None = None,
) -> tuple[list[Component], BudgetUse]:
    """Load the scored model, and select from the head of a ranking what stays within the budget.

    Args:
        budget: The budget.
        dampings: Dampings to choose from: 1 is off, a fraction damps.
        ranked: The neurons, first the one to take first.
        text: What perplexity is measured on. Documents that were used to attribute are left out.
        general: Score files of general reference samples.
        device: Where to measure.
        on_read: Called with the number of tokens that were read since.
        prediction: Of the rise of perplexity; None for none.
        costs: By which benefits were divided to rank the neurons, per module; None if they were not.

    Returns:
        The chosen neurons; and what was measured.

    Raises:
        ValueError: If the checkpoint has changed, no document is left, or not one neuron is within the budget.
    """
    scored = general[0].provenance
    checkpoint = Checkpoint.unchanged(scored.checkpoint, scored.checkpoint_fingerprint)
    check_logits(checkpoint.skeleton())
    text.model_checkpoint, text.model_device = checkpoint, device
    text.prepare_data()
    text.setup("predict")
    checkpoint.check_context(text.longest, text.way_to_shorter)
    same = [file.provenance for file in general if _are_of_one_source(text, file.provenance.data)]
    text.leave_out = {id_ for provenance in same for id_ in provenance.sample_ids}
    left = [sample for sample in text.samples if sample.id not in text.leave_out]
    if not left:
        raise ValueError("--data holds no document that was not used to attribute: choose another --data.seed.")
    if not any(len(sample.input_ids) > 1 for sample in left):
        raise ValueError("--data holds no document of two tokens, of which one is predicted: raise --data.seq_len.")
    rank_zero_info(f"Perplexity is measured on {len(left)} documents that were not used to attribute.")
    model = load_kept(checkpoint, getattr(torch, scored.spec.dtype))
    torch.nn.Module.to(model, device)  # in place; the method of transformers is typed as if it took no device
    rise = PerplexityRise(model, text.predict_dataloader(), batching := text.batching(), on_read, prediction)

    def benefit(neuron: Component) -> float:
        return -neuron.score * (1.0 if costs is None else costs[neuron.module][neuron.index].item())

    chosen = choose_within(rise, ranked, budget, dampings, benefit)
    return chosen, BudgetUse(
        max_perplexity_increase=budget.max_perplexity_increase,
        rise=rise(chosen),
        perplexity=rise.perplexity,
        num_tokens=rise.num_tokens,
        num_documents=len(left),
        data={"class": type(text).__name__, **text.hparams, **batching.notes},
        measured=rise.measured,
        predicted=None if prediction is None else prediction.rise(chosen),
    )


def _are_of_one_source(text: ReferenceSamples, data: Mapping[str, object]) -> bool:
    """Tell whether an id names the same document in a text and in the data of a score file."""
    if text.source is not None:  # in a file the id of a document is its row
        source = data.get("source")
        return isinstance(source, str) and _place(source) == _place(text.source)
    # In a stream it is the place after the shuffle.
    mine = {"class": type(text).__name__, **text.hparams}
    return all(data.get(name) == mine.get(name) for name in ("class", "source", "seed", "buffer_size"))


def _place(source: str) -> str:
    return source if source.startswith("pypi:") else str(Path(source).expanduser().resolve())
