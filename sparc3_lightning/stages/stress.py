"""The verb stress: what is left of an effect after both models were rounded, trained, or given other prompts."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.stress_data import StressData
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.completions import COMPLETIONS, save_completions
from sparc3_lightning.evaluation.controls import Controls
from sparc3_lightning.evaluation.findings import Continuations
from sparc3_lightning.evaluation.results import Findings, PromptProtocol, Results, Settings
from sparc3_lightning.evaluation.stress import AS_IT_IS, OTHER_PROMPTS, STRESS, Stressed, StressResults, shares_left
from sparc3_lightning.evaluation.variants import Variant
from sparc3_lightning.models.architectures import parameters_of
from sparc3_lightning.models.components import prune_
from sparc3_lightning.models.neurons import mlp_of
from sparc3_lightning.models.rounding import check_bits, check_can_be_rounded, round_
from sparc3_lightning.provenance import contents, run_seed
from sparc3_lightning.report.escaping import for_file_name
from sparc3_lightning.report.stress import PAGE, said_of_stress, stress_table, write_page
from sparc3_lightning.report.tables import WIDTH, aligned, closing
from sparc3_lightning.selection.neuron_list import NeuronList
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.finetuning import FineTuning, Weights, check_enough, trained
from sparc3_lightning.stages.folders import folder_of, give_back, write_config
from sparc3_lightning.stages.trainer_options import check_trainer

T = TypeVar("T", Findings, Settings)


@dataclass(frozen=True)
class Pair:
    """The weights of the two models under a stress: those that differ from the checkpoint's, and how much grew back."""

    baseline: Weights
    pruned: Weights
    grew_back: float | None = None


@dataclass(frozen=True)
class Condition:
    """A stress.

    Args:
        name: Of it.
        data: What both models are measured on.
        weights: Makes their weights; None if both have the checkpoint's, and the neurons are masked.
        training: What tells one training from another; None without one.
    """

    name: str
    data: EvaluationData
    weights: Callable[[], Pair] | None = None
    training: list[object] | None = None


class Stress(Evaluation):
    """Measures what is left of the effect of pruning after the model was rounded, trained, or given other prompts.

    The model that is not pruned goes through the same. Weights are rounded to the nearest, in all linear layers of the
    blocks, symmetric around 0, by groups of 128 inputs. Both trainings see the same batches. Memory holds the
    checkpoint, the two models of a stress, and in a training four models of float32 more. The options ``finetune`` and
    ``sampling`` are groups, see ``FineTuning`` and ``SamplingOptions``.

    Args:
        neurons: The neurons.json of ``sparc3 prune``. Prompts that its scores were attributed on are left out.
        checkpoint: Hugging Face id, local folder or GGUF file; None takes the one that ``neurons`` names.
        bits: Numbers of bits to round the weights to, each from 2 to 8; ``[]`` for none.
        **options: As ``sparc3 evaluate``.
    """

    verb = "stress"
    OUTPUTS = (STRESS,)

    def __init__(
        self,
        neurons: Path,
        checkpoint: str | None = None,
        bits: Sequence[int] = (8, 4),
        finetune: FineTuning = FineTuning(),
        **options: Any,
    ) -> None:
        check_bits(list(bits))
        finetune.check()
        listed = NeuronList.load(Path(neurons))
        if any(neuron.mean for neuron in listed.neurons):
            raise OptionError(
                "neurons",
                f": those of {neurons} are {listed.ablation}, for which the rounded and trained weights have no place: "
                "prune with --.ablation zero.",
            )
        of = listed.checkpoint(neurons, checkpoint)
        super().__init__(
            of.name,
            neurons,
            controls=Controls(num_draws=0),
            doses=(),
            dampings=(1.0,),
            revision=of.revision,
            **options,
        )
        self.bits = list(bits)
        self.finetune = finetune
        self.found: StressResults

    def stress(self, trainer: L.Trainer, data: StressData) -> None:
        """Measure both models as they are, and after each stress.

        Args:
            trainer: Of one device.
            data: What to measure and to train on.

        Raises:
            OSError, ValueError: If an option or a file cannot be used, before the model is loaded.
        """
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise OptionError(
                "devices", "must be 1, without --.strategy: a model under stress is not shared out.", "trainer"
            )
        check_trainer(trainer)
        self.root = folder_of(trainer, self.verb)
        self.begin(self.root)
        loggers, trainer.loggers = trainer.loggers, []  # which would get each condition's figures by the same names
        try:
            conditions = self._conditions(data)
            settings, stressed, rows = None, [], None
            for number, self.condition in enumerate(conditions, start=1):
                rank_zero_info(f"{number} of {len(conditions)}: {self.condition.name}")
                grew_back = self._measure(trainer)
                continuations = Continuations(self.completions, self.results.headline_judge)
                settings, rows = settings or self._settings(data), rows or continuations
                found = part_of(self.results, Findings)
                prompts = PromptProtocol.of(self.condition.data.prompts)
                left = shares_left(rows, continuations, self.scorer_names) if number > 1 else {}
                stressed.append(Stressed(self.condition.name, found, prompts, left, grew_back))
        finally:
            trainer.loggers = loggers
            give_back(self.root)
        assert settings is not None
        self.found = StressResults(verdict=said_of_stress(stressed, self.behavior), stressed=stressed, **vars(settings))
        self.found.save(self.root / STRESS)
        write_page(self.root)
        if trainer.logger is not None:
            trainer.logger.log_metrics(numbers(stressed))
            trainer.logger.finalize("success")

    def _conditions(self, data: StressData) -> list[Condition]:
        """Set up all that is read, and list the stresses."""
        for part in data.parts.values():
            part.model_checkpoint = self.checkpoint
            part.prepare_data()
        plain = data.of(data.prompts)
        if self.bits:
            check_can_be_rounded(self.checkpoint.skeleton())
        conditions = [Condition(AS_IT_IS, plain)]
        conditions += [Condition(f"{bits} bits", plain, partial(self._rounded, bits)) for bits in self.bits]
        if self.finetune.steps:
            if data.neutral is None:
                raise OptionError(
                    "neutral", "is missing: give the text to train on, or --model.finetune.steps 0.", "data"
                )
            data.neutral.setup(self.verb)
            check_enough(data.neutral.samples, data.neutral.batch_size, self.finetune.steps)
            self.checkpoint.check_context(data.neutral.longest, "give shorter samples to --data.neutral")
            training = [*vars(self.finetune).values(), data.neutral.batch_size, data.neutral.fingerprint()]
            conditions.append(Condition("fine-tuned", plain, partial(self._trained, data.neutral), training))
        if data.other_prompts is not None:
            others = data.of(data.other_prompts)
            try:
                data.other_prompts.setup_prompts(
                    self.excluded_prompts, data.other_prompts.load_tokenizer(), self.longest_prompt
                )
            except OptionError as error:
                raise error.of("data.other_prompts") from None
            conditions.append(Condition(OTHER_PROMPTS, others))
        if len(conditions) == 1:
            raise OptionError(
                "bits",
                "is empty, and there is no other stress: give numbers, --model.finetune.steps or --data.other_prompts.",
            )
        return conditions

    def _measure(self, trainer: L.Trainer) -> float | None:
        """Measure both models under the condition; return how much of the pruned weights grew back in it."""
        pair = self.condition.weights() if self.condition.weights else None
        self.pruned_weights = None if pair is None else pair.pruned
        self.more_identity = {"condition": self.condition.name, "training": self.condition.training}
        with holding(self.model, pair.baseline) if pair else nullcontext():
            trainer.test(self, datamodule=self.condition.data, verbose=False)
        self.end_line()
        return None if pair is None else pair.grew_back

    def _rounded(self, bits: int) -> Pair:
        self.begin_line(f"Rounding to {bits} bits")
        rounding = partial(round_, bits=bits)
        return Pair(after(self.model, rounding), after(self.model, self._prune_, rounding))

    def _prune_(self, model: Any) -> None:
        prune_(model, self.off["pruned"])

    def _trained(self, neutral: Any) -> Pair:
        """Train both models on the same batches."""
        self.begin_line("Fine-tuning", "steps", 2 * self.finetune.steps)
        pruned = after(self.model, self._prune_)
        original = {name: weight for name, weight in self.model.named_parameters() if name in pruned}
        if self.finetune.keep_rows:
            columns = self._columns()
            pruned = {name: weight for name, weight in pruned.items() if name in columns}
        pair = []
        for start in ({}, pruned):
            with holding(self.model, start):
                pair.append(
                    trained(
                        self.model,
                        neutral.samples,
                        neutral.batch_size,
                        self.finetune,
                        self.trainer.strategy.root_device,
                        run_seed(),
                        lambda: self.advance(1),
                    )
                )
        baseline, of_pruned = pair
        return Pair(baseline, of_pruned, grown_back(original, pruned, of_pruned))

    def _columns(self) -> set[str]:
        """Return the parameters with the outgoing weights of the pruned neurons; of other components, all."""
        names = set()
        for neuron in self.off["pruned"]:
            layer = mlp_of(self.model, neuron.module).column if neuron.granularity == "neuron" else neuron.module
            names |= set(parameters_of(self.model, layer).values())
        return names

    def _settings(self, data: StressData) -> Settings:
        """Return what all findings rest on, with the parts that an evaluation does not have."""
        settings = part_of(self.results, Settings)
        others = {name: part for name, part in data.parts.items() if name not in self.condition.data.parts}
        config = {**settings.config, **{name: dict(part.hparams) for name, part in others.items()}}
        inputs = {name: contents(part.fetched_files()) for name, part in others.items()}
        return replace(settings, config=config, inputs={**settings.inputs, **inputs})

    def begin_loop(self, output: str | None = None) -> None:
        """Take the folder of the condition."""
        self.folder = self.root / for_file_name(self.condition.name)

    def keep_config(self) -> None:
        """Write config.yaml beside stress.json."""
        if self.config_yaml is not None:
            write_config(self.root, self.config_yaml)

    def on_test_start(self) -> None:
        """Choose the neurons, and take the weights of the pruned model to the device."""
        super().on_test_start()
        if self.pruned_weights is not None:
            held = dict(self.model.named_parameters())
            self.pruned_weights = {
                name: weight.to(self.device)
                for name, weight in self.pruned_weights.items()
                if not torch.equal(weight.to(self.device), held[name])
            }

    def on_test_batch_end(self, outputs: object, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop if that is asked for; nothing is kept of earlier conditions."""
        if self.stop.agreed(self.device) is not None:
            self.stop.leave(None, is_global_zero=True)

    def as_variant(self, variant: Variant) -> AbstractContextManager[None]:
        """Return the context in which the model in memory is this variant under the condition."""
        if self.pruned_weights is None or variant.kind == "baseline":
            return super().as_variant(variant)
        return self._as_pruned(self.pruned_weights)

    @contextmanager
    def _as_pruned(self, weights: Weights) -> Iterator[None]:
        """Have the model hold the pruned weights, among them maybe a head of its own; KL needs the other one's too."""
        head = self.model.get_output_embeddings()
        kept = {name: parameter.data for name, parameter in head.named_parameters()}
        self.original_head = partial(functional_call, head, kept)
        try:
            with holding(self.model, weights):
                yield
        finally:
            self.original_head = None

    def _write(self) -> None:
        save_completions(self.folder / COMPLETIONS, self.completions)
        self.log_of_completions.remove()

    def summary(self) -> str:
        """Return the table, what is left in words, and the paths of what was written."""
        written = [f"Results: {self.root / STRESS}", f"Report:  {self.root / PAGE}"]
        return closing(aligned(stress_table(self.found), WIDTH), self.found.verdict, written, [])


def numbers(stressed: Sequence[Stressed]) -> dict[str, float]:
    """Return the changes by pruning, in percent, for a logger, by the name of the stress."""
    changes = {one.name: asdict(one.found.change) for one in stressed if one.found.change is not None}
    return {f"{name}/{key}": value for name, of in changes.items() for key, value in of.items() if math.isfinite(value)}


def part_of(results: Results, kind: type[T]) -> T:
    """Return one of the dataclasses that results are made of."""
    return kind(**{field.name: getattr(results, field.name) for field in fields(kind)})


@contextmanager
def holding(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Have a model hold other weights for the length of a ``with`` block; none is copied.

    Args:
        model: Any model.
        weights: By the names of its parameters; those left out stay.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def after(model: nn.Module, *changes: Callable[[Any], None]) -> dict[str, Tensor]:
    """Return the weights that a model has after some changes, those that differ; the model stays as it is."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    copies = {name: weight.clone() for name, weight in before.items()}
    with holding(model, copies):
        for change in changes:
            change(model)
    return {name: weight for name, weight in copies.items() if not torch.equal(weight, before[name])}


def grown_back(original: Weights, pruned: Weights, now: Weights) -> float:
    """Return how far weights moved in a training where they had been pruned, over how far pruning had moved them.

    Args:
        original: Weights of the checkpoint, at least those in ``pruned``.
        pruned: Those that pruning changed.
        now: All weights after the training.

    Returns:
        The ratio of the norms: 0 if what was pruned stays so; 1 if as much came back, in whatever direction.
    """
    back = taken = 0.0
    for name, weight in pruned.items():
        places = weight != original[name]
        back += (now[name] - weight)[places].double().square().sum().item()
        taken += (original[name] - weight)[places].double().square().sum().item()
    return (back / taken) ** 0.5
