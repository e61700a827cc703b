"""The plan of an experiment: its stages, their configs and identity, and all checks before the first one runs."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from transformers import PreTrainedModel

from sparc3_lightning.attribution.spec import ScoreSpec
from sparc3_lightning.data.base import Kind, TextDataModule
from sparc3_lightning.data.tokens import Tokens
from sparc3_lightning.errors import OptionError, in_one_sentence
from sparc3_lightning.evaluation.variants import check_doses
from sparc3_lightning.files import kept_sha256
from sparc3_lightning.models.architectures import find_layers
from sparc3_lightning.models.checkpoints import Checkpoint, ForwardDtype
from sparc3_lightning.models.components import KINDS, Scored, kind_of, plural
from sparc3_lightning.models.export import check_export, export_dtype_of
from sparc3_lightning.models.neurons import check_are_neurons, columns_of
from sparc3_lightning.provenance import versions_of_results
from sparc3_lightning.scorers.functions import FunctionScorer
from sparc3_lightning.scorers.registry import fingerprint_of, location_of
from sparc3_lightning.selection.neuron_selection import CRITERIA
from sparc3_lightning.selection.sides import are_swapped, check_are_costs
from sparc3_lightning.sources import is_local, local_path
from sparc3_lightning.stages.attribute import Attribution, file_of
from sparc3_lightning.stages.base import Stage
from sparc3_lightning.stages.evaluate import COMPLETIONS, RESULTS, Evaluation, check_can_be_measured
from sparc3_lightning.stages.folders import without_none
from sparc3_lightning.stages.parser import Parser
from sparc3_lightning.stages.prune import NEURONS, Pruning
from sparc3_lightning.stages.sweep import Sweep, name_of
from sparc3_lightning.stages.trainer_options import NOT_RESULTS

Config = dict[str, Any]  # options as plain values, as in YAML
T = TypeVar("T")
SELECTING = ("attribute", "behavior_attribute", "prune")  # the groups that a selection beside the first may replace


@dataclass(frozen=True)
class StageRun:
    """One run of a verb: its config, the folder its results go to, and the file that is there once it is done."""

    name: str
    verb: str
    config: Config
    folder: Path
    output: str

    @property
    def done(self) -> bool:
        """Whether its results exist. The folder is named by a hash of the config, so they match it."""
        return (self.folder / self.output).is_file()


@dataclass(frozen=True)
class Plan:
    """The options that the stages of an experiment share, see ``Experiment``, and the stages themselves.

    All methods take the config of ``sparc3 run``, with the groups ``seed_everything``, ``trainer``, ``attribute``,
    ``general``, ``behavior``, ``budget_text`` (which may be None), ``prune``, ``evaluate`` and ``data``; and, for
    prompts that are chosen by what the model makes of them, ``screen``.
    """

    checkpoint: Checkpoint
    general_seeds: list[int]
    behavior_attribute: Config
    dtype: ForwardDtype
    logs: Path
    beside: dict[str, dict[str, Config]] = field(default_factory=dict)
    reads_files: bool = True  # an estimate reads none: its folders are not those of a run

    @property
    def model(self) -> Config:
        """The options of the model, for every stage that loads it."""
        return {"checkpoint": self.checkpoint.name, "dtype": self.dtype, "revision": self.checkpoint.revision}

    def general(self, options: Config) -> dict[str, Config]:
        """Return the name of the attribution on the general samples of each seed, and the config of the samples."""
        data = options["general"]
        return {
            f"general_{seed}": {**data, "init_args": {**data["init_args"], "seed": seed}} if _takes_seed(data) else data
            for seed in self.general_seeds
        }

    def selections(self, options: Config) -> dict[str, Config]:
        """Return the options of each selection by its name, with the group ``behavior_attribute``; the first has none.

        Raises:
            ValueError: If those that replace others are no options, or of the wrong type.
        """
        first = {**options, "behavior_attribute": self.behavior_attribute}
        found = {"": first}
        for name, groups in self.beside.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name) or name in ("baseline", "pruned"):
                raise OptionError("beside", f": a name is of letters, digits and -, and no model's, got {name!r}.")
            for group, given in groups.items():
                if group not in SELECTING or not isinstance(given, dict):
                    raise OptionError(f"beside.{name}", f"has the groups {', '.join(SELECTING)}, got {group}: {given}.")
            chosen = found[name] = _merged(first, groups)
            where = f"beside.{name}"
            chosen["attribute"] = parsed(Attribution, chosen["attribute"], f"{where}.attribute", Attribution.FILLED_IN)
            chosen["prune"] = parsed(Pruning, {**chosen["prune"], "export": None}, f"{where}.prune", Pruning.FILLED_IN)
        return found

    def attributions(self, options: Config) -> list[Config]:
        """Return the options of all attributions: for each selection of general samples, and of the behaviour's.

        Raises:
            ValueError: As ``selections``.
        """
        return [attribution for chosen in self.selections(options).values() for attribution in self._pair(chosen)]

    def _pair(self, chosen: Config) -> tuple[Config, Config]:
        """Return the options of the attribution of general samples, and of the behaviour's, for one selection."""
        model = {**self.model, "dtype": "auto" if self.dtype == "fast" else self.dtype}
        of_behavior = {**chosen["attribute"], **chosen["behavior_attribute"], **model}
        return {**chosen["attribute"], **model}, parsed(Attribution, of_behavior, "behavior_attribute")

    def stages(self, options: Config) -> list[StageRun]:
        """Return the stages in the order they run.

        Raises:
            ValueError: If stages that are not done would refuse their options.
        """
        if len(self.general_seeds) > 1 and not _takes_seed(options["general"]):
            raise OptionError(
                "general_seeds",
                f"--general: {options['general']['class_path']} draws the same samples whatever the seed, so "
                f"--.general_seeds must be one seed, got {self.general_seeds}.",
            )
        selections = self.selections(options)
        for chosen in selections.values():
            of_general, of_behavior = self._pair(chosen)
            specs = check_attributions(of_general, of_behavior)
            check_granularities(chosen["prune"]["granularity"], *(spec.granularity for spec in specs))
            if CRITERIA[chosen["prune"]["criterion"]].needs_costs:
                _by_group("prune", check_are_costs, *specs)
        if are_swapped(_described(options["general"]), _described(options["behavior"])):
            raise ValueError("--general is of toxic prompts and --behavior is of others: exchange the two.")
        if self.reads_files:
            check_chats(options, self.checkpoint)
        stages: list[StageRun] = []
        if options.get("screen") is not None:
            stages.append(self._stage("screen", Evaluation, options, screening(options, self.model), RESULTS))
        completions = stages[0].folder / COMPLETIONS if stages else None
        data = {**options["data"], "prompts": from_screening(options["data"]["prompts"], completions)}
        lists = []
        for name, chosen in selections.items():
            self._add_selection(stages, name, chosen, completions)
            lists.append(str(stages[-1].folder / NEURONS))
        evaluation = {**options["evaluate"], **self.model, "neurons": lists[0]}
        kind: type[Evaluation] = Evaluation
        if self.beside:
            budget = options["prune"]["budget"]["max_perplexity_increase"]
            names = [name_of(options["prune"]["criterion"], budget), *self.beside]
            if len(set(names)) < len(names):
                raise OptionError("beside", f": the first selection is called {names[0]} too.")
            evaluation |= {"neurons": lists, "names": names, "max_perplexity_increase": None}
            kind = Sweep
        stages.append(
            self._stage("evaluation", kind, options, {"model": evaluation, "data": data}, RESULTS, completions)
        )
        if not stages[-1].done:
            check_evaluation({**options["evaluate"], **self.model}, [one["prune"] for one in selections.values()])
        return stages

    def _add_selection(self, stages: list[StageRun], name: str, chosen: Config, completions: Path | None) -> None:
        """Append the stages of a selection, its pruning last, less the attributions that are there already."""
        prefix = name and f"{name}_"
        of_general, of_behavior = self._pair(chosen)
        references = [(general, of_general, samples) for general, samples in self.general(chosen).items()]
        references.append(("behavior", of_behavior, chosen["behavior"]))
        files = []
        for of_what, attribution, samples in references:
            samples = from_screening(samples, completions)
            config = {"model": attribution, "data": samples}
            output = file_of(attribution["granularity"])
            same = (one for one in stages if (one.config["model"], one.config.get("data")) == (attribution, samples))
            stage = next(same, None)
            if stage is None:
                stage = self._stage(prefix + of_what, Attribution, chosen, config, output, completions)
                stages.append(stage)
            files.append(str(stage.folder / stage.output))
        *general, behavior = files
        pruning = {"model": {**chosen["prune"], "general": general, "behavior": behavior}}
        if chosen.get("budget_text") is not None:
            pruning["data"] = chosen["budget_text"]
        stages.append(self._stage(f"{prefix}neurons", Pruning, chosen, pruning, NEURONS))
        if not stages[-1].done:
            check_pruning(pruning["model"], "data" in pruning)

    def check_model(self, options: Config, stages: Sequence[StageRun]) -> None:
        """Raise ValueError or OSError if a stage that is not done would refuse the model, whose weights are not loaded.

        A GGUF file is dequantized for it, and for an export the weights are fetched.
        """
        left = {stage.name for stage in stages if not stage.done}
        if not left:
            return
        skeleton = self.checkpoint.skeleton()
        for chosen in self.selections(options).values():
            self._check_selection(chosen, skeleton, options["evaluate"]["doses"], "neurons" in left)
        check_can_be_measured(skeleton)

    def _check_selection(self, chosen: Config, skeleton: PreTrainedModel, doses: Sequence[int], is_left: bool) -> None:
        """Raise ValueError or OSError if the stages of a selection would refuse the model."""
        prune = chosen["prune"]
        for of_one in self._pair(chosen):
            names = _by_group("attribute", Attribution(**of_one).find_layers_of, skeleton)
            layers = list(find_layers(skeleton, names))
            # Scores of weights are summed for neurons.
            scored = prune["granularity"] if of_one["granularity"] == "weight" else of_one["granularity"]
            kinds = {layer: kind_of(scored, layer) for layer in layers}
            neurons = [layer for layer, kind in kinds.items() if kind == "neuron"]
            _by_group("attribute", check_are_neurons, neurons)
            columns_of(skeleton, neurons)
        number = sum(math.prod(KINDS[kind].shape(skeleton, layer)) for layer, kind in kinds.items())
        if prune["num_neurons"] > number and prune["budget"]["max_perplexity_increase"] is None:
            what = f"must be between 1 and {number:,} (all {plural(scored)} that are scored)"
            raise OptionError("num_neurons", f"{what}, got {prune['num_neurons']}.", "prune")
        if doses and max(doses) > number:
            what = f"asks for {max(doses):,} {plural(scored)}, and only {number:,} are scored: ask for fewer."
            raise OptionError("doses", what, "evaluate")
        if prune["export"] is not None and is_left:
            check = partial(
                check_export,
                dtype=export_dtype_of(prune["export_dtype"]),
                with_means=prune["ablation"] == "mean",
                group="prune",
            )
            _by_group("prune", check, self.checkpoint, layers, scored, Path(prune["export"]))

    def _stage(
        self, name: str, stage: type[Stage], options: Config, config: Config, output: str, made: Path | None = None
    ) -> StageRun:
        trainer = {key: value for key, value in options["trainer"].items() if key not in NOT_RESULTS}
        seed = options["seed_everything"]
        # Options that are None are left out, so that a new option with that default does not make old results unknown.
        identity = [stage.verb, versions_of_results(), seed, without_none(trainer), without_none(config)]
        files = digests_of(stage, config, made) if self.reads_files else []
        digest = hashlib.sha256(json.dumps([*identity, files], sort_keys=True).encode()).hexdigest()[:8]
        config = {"seed_everything": seed, "trainer": copy.deepcopy(options["trainer"]), **copy.deepcopy(config)}
        where = {"save_dir": str(self.logs), "name": stage.verb, "version": f"{name}-{digest}"}
        config["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": where}
        return StageRun(name, stage.verb, config, self.logs / stage.verb / f"{name}-{digest}", output)


def parsed(stage: type[Stage], options: Config, named: str, filled_in: Collection[str] = ()) -> Config:
    """Return all options of a stage, as its own verb would parse them.

    Args:
        stage: Its class.
        options: Those that are given.
        named: What an error calls their group.
        filled_in: Options that are not among them yet.

    Raises:
        ValueError: If there is no such option, or a value is of the wrong type.
    """
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(stage, skip=set(filled_in), instantiate=False)
    try:
        return parser.parse_object(options).as_dict()
    except ArgumentError as error:
        said = parser.said_of_unknown(str(error)) or in_one_sentence(str(error), f".{named}.")
        raise OptionError(named, said if said.startswith("--.") else f": {said}") from None


def _merged(options: Config, given: Config) -> Config:
    """Return options with those that are given in their place, in groups of any depth."""
    nested = {
        key: _merged(options[key], value)
        for key, value in given.items()
        if isinstance(options.get(key), dict) and isinstance(value, dict)
    }
    return {**options, **given, **nested}


def check_attributions(general: Config, behavior: Config) -> tuple[ScoreSpec, ScoreSpec]:
    """Return what is computed of general text and of the behaviour.

    Raises:
        ValueError: If the attribution of one of them would refuse its options.
    """
    of_general = _by_group("attribute", partial(Attribution, **general)).spec
    try:
        return of_general, _by_group("attribute", partial(Attribution, **behavior)).spec
    except ValueError as error:
        raise OptionError("behavior_attribute", f"{error} (with --.behavior_attribute)") from None


def check_granularities(pruned: str, *attributed: Scored) -> None:
    """Raise ValueError unless what is attributed can be pruned. A neuron's score is the sum of its weights' scores."""
    if pruned == "weight" and set(attributed) != {"weight"}:
        raise ValueError("--prune.granularity weight needs scores of weights: give --attribute.granularity weight too.")
    if "head" in attributed:
        raise ValueError(
            "--attribute.granularity must be neuron, channel, neuron+channel or weight: no heads are pruned here."
        )
    if len({"neuron" if scored == "weight" else scored for scored in attributed}) > 1:
        raise ValueError(
            f"--attribute.granularity is {attributed[0]}, and {attributed[1]} with --model.behavior_attribute: leave "
            "it out there, so that both sides are scored alike."
        )


def check_chats(options: Config, checkpoint: Checkpoint) -> None:
    """Raise OptionError if prompts are to go through a chat template that their tokenizer has not."""
    groups = {group: options.get(group) for group in ("screen", "general", "behavior")}
    for group, data in {**groups, "data.prompts": options["data"]["prompts"]}.items():
        init = (data or {}).get("init_args", {})
        if init.get("chat"):
            tokenizer = Checkpoint(init["tokenizer"]) if init.get("tokenizer") else checkpoint
            Tokens(tokenizer.tokenizer(), chat=True).check_chat(group)


def check_pruning(options: Config, has_text: bool) -> None:
    """Raise ValueError if the pruning would refuse its options, or needs a text and there is none.

    Args:
        options: Of the stage.
        has_text: Whether the experiment has the group ``budget_text``.
    """
    _construct(Pruning, options)
    if options["budget"]["max_perplexity_increase"] is not None and not has_text:
        needs = "--prune.budget.max_perplexity_increase needs a text"
        raise ValueError(f"{needs}: add the group 'budget_text', as lexicon.yaml does.")


def check_evaluation(options: Config, prunings: Sequence[Config]) -> None:
    """Raise ValueError if the evaluation would refuse its options; its neurons need not be there yet.

    Args:
        options: Of the stage.
        prunings: Of each selection, which say how many neurons there will be for the doses.
    """
    doses, dampings = options["doses"], options["dampings"]
    for prune in prunings:
        has_budget = prune["budget"]["max_perplexity_increase"] is not None
        listed = prune["num_ranked"] if has_budget else max(prune["num_neurons"], prune["num_ranked"])
        if doses and max(doses) > listed:
            raise ValueError(
                f"--evaluate.doses asks for {max(doses)} {prune['granularity']}s, but the pruning lists at most "
                f"{listed}: give --prune.num_ranked {max(doses)}."
            )
    without = {**options, "neurons": None, "doses": [], "dampings": [1.0]}  # doses need the list of neurons
    _construct(Evaluation, without)
    _by_group("evaluate", check_doses, doses, dampings)


def _construct(stage: type[Stage], options: Config) -> None:
    """Make a stage's module, which checks its options and loads nothing."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(stage, "stage")
    config = parser.parse_object({"stage": options})  # text becomes paths
    _by_group(stage.verb, parser.instantiate_classes, config)


def _by_group(group: str, check: Callable[..., T], *arguments: object) -> T:
    """Call a stage's check, and name the option in its error as ``run`` does."""
    try:
        return check(*arguments)
    except OptionError as error:
        raise error.of(group) from None


def screening(options: Config, model: Config) -> Config:
    """Return the config of the evaluation that lets the model continue the prompts, and measures nothing else.

    Args:
        options: Config of ``sparc3 run`` with the groups ``evaluate``, ``data`` and ``screen``.
        model: Checkpoint, dtype and revision.
    """
    text = options["data"]["text"]
    # An evaluation has a text for perplexity too: here its first window, which costs next to nothing.
    one_window = {"num_tokens": text["init_args"]["window"], "conventions": ["disjoint"]}
    return {
        # By the first scorer alone, whose scores choose the prompts.
        "model": {
            **options["evaluate"],
            **model,
            **Evaluation.SCREENING,
            "scorers": options["evaluate"]["scorers"][:1],
        },
        "data": {
            "text": {**text, "init_args": {**text["init_args"], **one_window}},
            "prompts": options["screen"],
        },
    }


def wants_screening(data: Config) -> bool:
    """Whether prompts are to come from the stage ``screen``: by the model's own continuation, and from no file."""
    init = data.get("init_args", {})
    return init.get("by") == "continuation" and init.get("source") is None


def from_screening(data: Config, completions: Path | None) -> Config:
    """Return the config of prompts with the stage's completions.jsonl as their source, if that is where they come from.

    Args:
        data: Class and options of a data module.
        completions: Of the stage; None if the experiment has none.

    Raises:
        ValueError: If the prompts need the stage, and there is none.
    """
    if not wants_screening(data):
        return data
    if completions is None:
        raise ValueError(
            f"{data['class_path']} chooses prompts by the model's own continuation and names no source: add the "
            "group 'screen', prompts to let the model continue first, or name a completions.jsonl of its own."
        )
    return {**data, "init_args": {**data["init_args"], "source": str(completions)}}


def named_by(reads: dict[str, Kind], options: Config) -> list[tuple[str, Kind, str]]:
    """Return the options that may name local files: the option, the kind of file, and each of its values.

    Args:
        reads: What an option names; an option of a group is written with a dot, such as ``zero_shot.folder``.
        options: Of a stage, or of a data module.
    """
    found = []
    for option, kind in reads.items():
        group, _, name = option.rpartition(".")
        value = (options[group] if group else options).get(name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        found += [(option, kind, one) for one in values]
    return found


def digests_of(stage: type[Stage], config: Config, made: Path | None) -> list[str]:
    """Identify the content of every local file or folder that a stage reads: sources, checkpoints and scorers.

    A file that an earlier stage of the same experiment makes is left out: its path tells what it will hold.

    Args:
        stage: What runs.
        config: Its options, in the groups ``model`` and, if it has data, ``data``.
        made: That file, if there is one.
    """
    data = config.get("data", {})
    parts = [data] if "class_path" in data else [part for part in data.values() if part is not None]
    named = named_by(stage.reads(config["model"]), config["model"])
    for part in parts:
        named += named_by(_class_of(part).READS, part.get("init_args", {}))
    found = []
    for _, kind, value in named:
        if kind == "scorer":
            if is_local(location_of(value)) or FunctionScorer.takes(value):
                found.append(fingerprint_of(value))
        elif is_local(value) and value != str(made):
            found.append(Checkpoint(value).fingerprint if kind == "checkpoint" else _content(local_path(value), kind))
    return found


def _content(path: Path, kind: Kind) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    if kind == "tokenizer" and path.is_dir():  # a checkpoint's weights may be large, and are not read
        files = [file for file in files if file.suffix != ".safetensors"]
    return "".join(kept_sha256(file) for file in files)


def _class_of(data: Config) -> type[TextDataModule]:
    module, _, name = data["class_path"].rpartition(".")
    return getattr(import_module(module), name)


def _described(data: Config) -> Config:
    """Return the class and the options of a data module as the provenance of scores has them."""
    return {"class": data["class_path"].rpartition(".")[2], **data.get("init_args", {})}


def _takes_seed(data: Config) -> bool:
    return "seed" in signature(_class_of(data)).parameters
