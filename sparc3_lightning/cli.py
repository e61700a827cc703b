"""The command line: a LightningCLI whose subcommands are the stages."""

import math
import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace, _HelpAction
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.data.base import ReferenceSamples
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.data.stress_data import StressData
from sparc3_lightning.distributed import check_is_single, check_slurm_tasks, is_rank_zero, usable_accelerator
from sparc3_lightning.files import at_home, check_absent, check_writable
from sparc3_lightning.models.keeping import keeping
from sparc3_lightning.report.drawing import draw
from sparc3_lightning.report.escaping import for_terminal
from sparc3_lightning.signals import ending_on_signals, run_process
from sparc3_lightning.sources import CONFIGS
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.base import Stage
from sparc3_lightning.stages.chat import Chat
from sparc3_lightning.stages.circuit import Circuit
from sparc3_lightning.stages.compare import Comparison
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.estimate import EstimateOptions
from sparc3_lightning.stages.evaluate import RESULTS, Evaluation
from sparc3_lightning.stages.experiment import Experiment
from sparc3_lightning.stages.export import Export
from sparc3_lightning.stages.folders import check_config, folder_of, giving_back, new_folder, own, reserve
from sparc3_lightning.stages.parser import Parser
from sparc3_lightning.stages.plan import Config
from sparc3_lightning.stages.prune import Pruning
from sparc3_lightning.stages.reproduce import REPRODUCTION, Reproduction, said_of_changes, said_of_figures
from sparc3_lightning.stages.stress import Stress
from sparc3_lightning.stages.sweep import Sweep
from sparc3_lightning.stages.terminal import is_verbose, speak
from sparc3_lightning.stages.trainer_options import check_trainer_options
from sparc3_lightning.stages.verbs import OPTIONS_USAGE, VERBS, answer


class SparC3Trainer(Trainer):
    """Options of the Lightning Trainer (a config is as trusted as code: callbacks and scorers that it names run)."""

    def prepare(self, model: Experiment) -> None:
        """Fetch everything the other verbs would download, and write a manifest of it."""

    def attribute(self, model: Attribution, datamodule: LightningDataModule) -> None:
        """Score the neurons of a model on reference samples."""
        self.predict(model, datamodule=datamodule, return_predictions=False)
        rank_zero_info(model.summary())

    def prune(self, model: Pruning, datamodule: ReferenceSamples | None = None) -> None:
        """Select the neurons to prune from score files, and export the pruned checkpoint."""
        neurons = model.prune(folder_of(self, "prune"), datamodule, self.strategy.root_device)
        if self.logger is not None:
            percent = neurons.origin.get("differential_strength_percent")
            known = {} if percent is None else {"differential_strength_percent": percent}
            self.logger.log_metrics({"num_neurons": len(neurons.neurons), **known})
            self.logger.finalize("success")

    def evaluate(self, model: Evaluation, datamodule: LightningDataModule) -> None:
        """Measure perplexity and toxicity of a model, as it is and with its neurons off."""
        self.test(model, datamodule=datamodule, verbose=False)
        rank_zero_info(model.summary())

    def sweep(self, model: Sweep, datamodule: LightningDataModule) -> None:
        """Measure toxicity against perplexity over numbers of neurons and dampings."""
        self.evaluate(model, datamodule)

    def stress(self, model: Stress, datamodule: StressData) -> None:
        """Measure what is left of an effect after weights were rounded or trained, and on other prompts."""
        model.stress(self, datamodule)
        rank_zero_info(model.summary())

    def compare(self, model: Comparison) -> None:
        """Compare the pruned neurons of several behaviours: which they share, and which are specific to one."""
        rank_zero_info(model.compare(folder_of(self, "compare")))

    def circuit(self, model: Circuit, datamodule: LightningDataModule) -> None:
        """Take the least relevant components out step by step, and find the sparsest circuit that keeps a behaviour."""
        self.predict(model, datamodule=datamodule, return_predictions=False)
        rank_zero_info(model.summary())

    def compress(self, model: Compression) -> None:
        """Set the weights of the lowest scores to zero, and write the sparse checkpoint."""
        rank_zero_info(model.compress(folder_of(self, "compress")))

    def export(self, model: Export) -> None:
        """Write a list of neurons, channels, heads or weights into a plain checkpoint, and upload it if asked."""
        rank_zero_info(model.write(folder_of(self, "export")))

    def chat(self, model: Chat, prompts: str | None = None) -> None:
        """Answer prompts with the model as it is and with its neurons off, side by side, from the same random draws.

        Args:
            model: The chat.
            prompts: File of prompts to answer, one a line of a text, or a jsonl, json, csv or parquet file as
                ``sparc3 evaluate`` reads it; without it prompts are typed at the terminal.
        """
        model.chat(self.strategy.root_device, prompts)

    def report(self, model: None) -> None:
        """Draw page, pictures and model card of a run again, from the files in its folder; no model is loaded."""

    def reproduce(self, model: None) -> None:
        """Measure an evaluation again from its results.json, and compare the figures; exit code 1 where one differs."""

    def run(self, model: Experiment, plan: Path | None = None, estimate: EstimateOptions | None = None) -> None:
        """Carry out the whole experiment: attribute, prune, evaluate and report.

        Args:
            model: The experiment.
            plan: Run nothing, but write a list of the stages to this file, and their configs, to run each as a job.
            estimate: Run nothing, but say what each stage will take and whether it fits. ``--estimate.tflops`` is the
                rate of a device, in 10^12 operations a second (by default measured here, in two seconds),
                ``--estimate.memory`` its memory in GB (by default what is here), and ``--estimate.prompt_tokens`` the
                length of a prompt (by default 32).
        """


@dataclass(frozen=True)
class Verb:
    """What a subcommand is made of: the classes of its groups ``model`` and ``data``."""

    stage: type[Stage]
    data: type[LightningDataModule] | None = None
    needs_data: bool = True


REPORT = "report"  # the verb that needs no more than a folder
REPRODUCE = "reproduce"  # the verb whose model and data are in a results.json
# Verbs of one process; the others are loops.
SINGLE = ("prepare", "prune", "stress", "compare", "compress", "export", REPORT, "run")
# The verbs that are a stage; the two of an experiment have a group for each of its stages.
STAGES = {
    verb.stage.verb: verb
    for verb in (
        Verb(Attribution, ReferenceSamples),
        Verb(Pruning, ReferenceSamples, needs_data=False),
        Verb(Evaluation, EvaluationData),
        Verb(Sweep, EvaluationData),
        Verb(Stress, StressData),
        Verb(Comparison),
        Verb(Circuit, ReferenceSamples),
        Verb(Compression),
        Verb(Export),
        Verb(Chat),
    )
}
USAGE = {REPORT: "FOLDER", REPRODUCE: "RESULTS [--trainer.<option> VALUE] ..."}
FOLDED = ("trainer", "attribute", "prune", "evaluate", "model.zero_shot")  # groups that --help shows by their names


class FindConfig(ActionConfigFile):
    """Takes the path of a config file, or the bare name of a shipped one."""

    def __call__(
        self, parser: ArgumentParser, cfg: Namespace, values: object, option_string: str | None = None
    ) -> None:
        """Parse the file."""
        path = Path(str(values))
        if not path.expanduser().exists():
            shipped = {file.name: str(file) for folder in reversed(CONFIGS) for file in folder.glob("*.yaml")}
            if str(path) not in shipped:
                like = get_close_matches(path.stem, [Path(name).stem for name in shipped], n=1)
                known = f"{like[0]}.yaml" if like else ", ".join(sorted(shipped))
                meant = f"did you mean the shipped {known}?" if like else f"the shipped ones are {known}."
                parser.error(f"--config: there is no file {values}: {meant}")
            values = shipped[str(path)]
        try:
            super().__call__(parser, cfg, values, option_string)
        except RecursionError:
            raise ValueError(f"The config {values} cannot be read: it holds itself, or is nested too deeply.") from None
        except ValueError as error:
            raise ValueError(f"The config {values} cannot be read: {error}.") from None


class Verbose(_HelpAction):  # as --help, it is nothing that a config may hold
    """Does nothing: ``entry_point`` has looked for it."""

    def __call__(self, *_: object) -> None:
        """Do nothing."""


class SparC3CLI(LightningCLI):
    """``sparc3 <verb> --config <file> [--config <overlay>] [--<group>.<option> <value>]``."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Name the verbs that are asked for; each is a method of the trainer."""
        return {name: {"model", "datamodule"} for name in VERBS if name in self.parser_kwargs}

    def init_parser(self, stage: str | None = None, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of a verb. It knows its stage; super would add a second config action."""
        # Else every error begins with the names of all options, two screens of them.
        kwargs["usage"] = f"sparc3 {stage or '<verb>'} {USAGE.get(str(stage), OPTIONS_USAGE)}"
        parser: Any = self.parser_class(**kwargs)
        parser.stage = stage
        if stage is not None:
            said = "Path of a config file, or the name of a shipped one (demo.yaml)."
            parser.add_argument("-c", "--config", action=FindConfig, metavar="FILE", help=said)
        parser.add_argument("-v", "--verbose", action=Verbose, help="Show the messages of all libraries, too.")
        return parser

    def add_default_arguments_to_parser(self, parser: Any) -> None:
        """Add the seed, which a verb that only draws does not have."""
        if parser.stage in (REPORT, REPRODUCE):
            parser.add_argument("--seed_everything", default=False, help=SUPPRESS)
        else:
            parser.add_argument(
                "--seed_everything",
                type=bool | int,
                default=self.seed_everything_default,
                help="Seed of all that is drawn at random; true draws the seed, too.",
            )

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add the groups of one verb."""
        self._add_groups(parser)
        parser.elsewhere = {
            f"--model.{name}": verb for verb, of in reversed(STAGES.items()) for name in signature(of.stage).parameters
        }
        for name in filter(parser.groups.__contains__, FOLDED):
            parser.fold(name)

    def _add_groups(self, parser: Any) -> None:
        if parser.stage == REPORT:
            parser.add_argument(
                "folder", type=Path, help="Of a run of evaluate, sweep, prune, circuit, compare or run."
            )
            return
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        for action in parser.groups["trainer"]._group_actions:
            action.complete = {}  # else the completion of a shell holds the options of every callback, in 200 MB
        logger = {"save_dir": "lightning_logs", "name": parser.stage}
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        defaults["trainer.logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}
        parser.set_defaults(defaults)
        if parser.stage == REPRODUCE:
            parser.add_argument("results", type=Path, help="The results.json of evaluate, sweep or run.")
            return
        if (verb := STAGES.get(parser.stage)) is None:
            self._add_experiment_arguments(parser)
            return
        parser.add_lightning_class_args(verb.stage, "model")
        if verb.data is ReferenceSamples:
            self._add_samples(parser, "data", "Samples to read", required=verb.needs_data)
        elif verb.data is not None:
            parser.add_lightning_class_args(verb.data, "data")

    def _add_experiment_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the options of every stage, each in the group of its verb, less those that the experiment fills in."""
        parser.add_class_arguments(Experiment, "model")
        parser.add_class_arguments(Attribution, "attribute", skip=Attribution.FILLED_IN, instantiate=False)
        first = "Prompts of a first stage, which continues them"
        self._add_samples(parser, "screen", first, RealToxicityPrompts, instantiate=False)
        self._add_samples(parser, "general", "Samples of text in general", required=True, instantiate=False)
        self._add_samples(parser, "behavior", "Samples of the behaviour", required=True, instantiate=False)
        parser.add_class_arguments(Pruning, "prune", skip=Pruning.FILLED_IN, instantiate=False)
        self._add_samples(parser, "budget_text", "Text on which a budget measures perplexity", instantiate=False)
        parser.add_class_arguments(Evaluation, "evaluate", skip=Evaluation.FILLED_IN, instantiate=False)
        parser.add_class_arguments(EvaluationData, "data", instantiate=False)

    @staticmethod
    def _add_samples(
        parser: LightningArgumentParser,
        name: str,
        said: str,
        of: type = ReferenceSamples,
        required: bool = False,
        instantiate: bool = True,
    ) -> None:
        said = f"{said}{' (required)' if required else ''}: a class, whose options are --{name}.<option>."
        parser.add_subclass_arguments(
            of, name, required=required, instantiate=instantiate, help=said, fail_untyped=False
        )

    def before_instantiate_classes(self) -> None:
        """Check what Lightning would find out too late."""
        if self.subcommand in SINGLE:
            check_is_single(self.subcommand, os.environ)
        if self.subcommand == REPORT:
            return
        trainer = _all_at_home(self.config[self.subcommand])["trainer"]
        check_trainer_options(trainer)
        if self._is_estimate():  # of a job that is not sent yet
            return
        check_slurm_tasks(trainer["devices"], trainer["num_nodes"], os.environ)
        trainer["accelerator"] = usable_accelerator(trainer["accelerator"])

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; no trainer, which has a folder, for a verb that draws or estimates."""
        if self.subcommand != REPORT and not self._is_estimate():
            super().instantiate_classes()
            return
        self.config_init, self.model, self.datamodule = self.config, None, None
        if self._is_estimate():
            self.config_init = self.parser.instantiate_classes(self.config)
            self.model = self._get(self.config_init, "model")
        self.trainer = self.trainer_class  # type: ignore[assignment]  # it has a method of that name, as every verb

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer. Without a logger, too, a run has a folder of its own."""
        options = self.config_init[self.subcommand]["trainer"]
        if options["logger"] in (False, []) and is_rank_zero():
            kwargs["default_root_dir"] = str(new_folder(Path(options["default_root_dir"] or "."), str(self.subcommand)))
        named = options["callbacks"] or []
        has_bar = any(isinstance(one, ProgressBar) for one in (named if isinstance(named, list) else [named]))
        if isinstance(self.model, Stage):  # it says more than the bar of Lightning, which counts batches
            self.model.shows_progress = _wants_progress(options) and not has_bar
        kwargs["enable_progress_bar"] = _wants_progress(options) and has_bar
        trainer = super().instantiate_trainer(**kwargs)
        reserve(trainer)
        if self.model is not None:
            self.model.config_yaml = self._config_yaml()
        return trainer

    def prepare(self, model: Experiment, **_: object) -> None:
        """Fetch everything."""
        model.prepare(self._options(), self._own_folder())

    def report(self, **_: object) -> None:
        """Draw a run again."""
        rank_zero_info(f"Drawn: {draw(self.config[REPORT]['folder'])}")

    def reproduce(self, **_: object) -> None:
        """Measure again what a results.json describes, and end with 1 where a figure differs."""
        again = Reproduction(self.config[REPRODUCE]["results"])
        seed_everything(again.config["seed_everything"], workers=True)
        changed = again.changed(self.trainer.strategy.root_device) if is_rank_zero() else []
        rank_zero_info(said_of_changes(again.path, changed))
        again.model.config_yaml = yaml.safe_dump({**again.config, "trainer": self._options()["trainer"]})
        wanted = _wants_progress(self.config_init[REPRODUCE]["trainer"])
        again.model.shows_progress = wanted and self.trainer.progress_bar_callback is None
        cast(SparC3Trainer, self.trainer).evaluate(again.model, again.data)
        found = again.compared(changed)
        if is_rank_zero():
            found.save(again.model.folder / REPRODUCTION)
        rank_zero_info(said_of_figures(found, again.model.folder))
        if found.num_differing:
            sys.exit(1)

    def _is_estimate(self) -> bool:
        return self.subcommand == "run" and self.config["run"]["estimate"] is not None

    def run(
        self, model: Experiment, plan: Path | None = None, estimate: EstimateOptions | None = None, **_: object
    ) -> None:
        """Run the stages, each as its own verb; in a process of its own where that starts further ones."""
        if estimate is not None:
            rank_zero_info(model.estimate(self._options(), estimate))
            return
        if plan is not None:
            model.config_yaml = None  # of the run that the plan is for
            model.write_plan(self._options(), self._own_folder(), Path(plan))
            return
        run_stage = _run_stage if self.trainer.world_size == 1 else _run_stage_as_process
        folder = self._own_folder()
        check_absent(folder / RESULTS)
        with keeping():
            results = model.run(self._options(), folder, run_stage)
        if self.trainer.logger is not None and results.change is not None:
            known = {name: value for name, value in asdict(results.change).items() if math.isfinite(value)}
            self.trainer.logger.log_metrics(known)
            self.trainer.logger.finalize("success")

    def _own_folder(self) -> Path:
        """Return the folder of a verb that is no stage, which this process owns from here on."""
        verb = str(self.subcommand)
        folder = folder_of(self.trainer, verb)
        check_writable(folder)
        own(folder, verb)
        if self.model.config_yaml is not None:
            check_config(folder, self.model.config_yaml)
        return folder

    def _config_yaml(self) -> str:
        # None is kept: left out, an option that was set to None would fall back to its default.
        return self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)

    def _options(self) -> Config:
        """Return the config of this verb as plain values."""
        return yaml.safe_load(self._config_yaml())


def _wants_progress(trainer: Any) -> bool:
    """Tell whether the options of a trainer let progress be shown; None is Lightning's yes."""
    return trainer["enable_progress_bar"] is not False


def _all_at_home(value: Any) -> Any:
    """Put the home folder in place of ~ where an option begins with it, in options of any depth.

    Raises:
        ValueError: If there is no home folder.
    """
    if isinstance(value, list):
        return [_all_at_home(item) for item in value]
    if isinstance(value, dict | Namespace):
        for name, inner in (vars(value) if isinstance(value, Namespace) else value).items():
            value[name] = _all_at_home(inner)
        return value
    if not isinstance(value, str | Path) or not re.match(r"~[^/\s]*(/|$)", str(value)):
        return value
    return type(value)(at_home(value))


def _run_stage(verb: str, config: Path) -> None:
    main([verb, "--config", str(config)])


def _run_stage_as_process(verb: str, config: Path) -> None:
    code = run_process([sys.executable, "-m", "sparc3_lightning", verb, "--config", str(config)])
    if code != 0:
        raise ChildProcessError(f"'sparc3 {verb} --config {config}' failed (exit code {code}); see above.")


def main(args: ArgsType = None) -> SparC3CLI:
    """Run the command line from Python: ``main(["attribute", "--config", "lrp.yaml"])``."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        answer(given)
    # Parsers of all verbs would take longer than the rest of what happens before a stage begins.
    asked = [name for name in VERBS if name in given] or VERBS
    set_parsing_settings(add_print_completion_argument=True)
    with giving_back():
        return SparC3CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # a stage writes it when nothing can be refused any more
            trainer_class=SparC3Trainer,
            parser_class=Parser,
            trainer_defaults={"inference_mode": False, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            parser_kwargs={"prog": "sparc3", **{name: {"stage": name, "description": VERBS[name]} for name in asked}},
        )


def entry_point() -> None:
    """Run the command line from a shell: an error the user can mend is one sentence, not a traceback."""
    speak(is_verbose(sys.argv[1:]))
    try:
        with ending_on_signals():
            main()
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("SPARC3_TRACEBACK"):
            raise
        sys.exit(f"sparc3: error: {for_terminal(error, keep=chr(10))}\n(SPARC3_TRACEBACK=1 shows where it was raised.)")
