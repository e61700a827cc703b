"""The command line: a LightningCLI whose subcommands are the stages."""

import logging
import math
import os
import subprocess
import sys
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import sparc3_lightning
from sparc3_lightning.data.base import ReferenceSamples
from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.data.real_toxicity_prompts import RealToxicityPrompts
from sparc3_lightning.distributed import check_slurm_tasks, usable_accelerator
from sparc3_lightning.files import check_absent
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.base import Stage
from sparc3_lightning.stages.circuit import Circuit
from sparc3_lightning.stages.compare import Comparison
from sparc3_lightning.stages.compress import Compression
from sparc3_lightning.stages.evaluate import Evaluation
from sparc3_lightning.stages.experiment import Experiment
from sparc3_lightning.stages.plan import Config
from sparc3_lightning.stages.prune import Pruning
from sparc3_lightning.stages.sweep import Sweep

# The shipped configs: beside the package in a checkout, inside it in a wheel.
CONFIGS = (Path("configs"), Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")
DESCRIPTION = sparc3_lightning.__doc__


class SparC3Trainer(Trainer):
    """Options of the Lightning Trainer."""

    def prepare(self, model: Experiment) -> None:
        """Fetch everything the other verbs would download, and write a manifest of it."""

    def attribute(self, model: Attribution, datamodule: LightningDataModule) -> None:
        """Score the neurons of a model on reference samples."""
        self.predict(model, datamodule=datamodule, return_predictions=False)
        rank_zero_info(model.summary())

    def prune(self, model: Pruning, datamodule: ReferenceSamples | None = None) -> None:
        """Select the neurons to prune from score files, and export the pruned checkpoint."""
        neurons = model.prune(Path(self.log_dir or "."), datamodule, self.strategy.root_device)
        if self.logger is not None:
            percent = neurons.provenance.get("differential_strength_percent")
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

    def compare(self, model: Comparison) -> None:
        """Compare the pruned neurons of several behaviours: which they share, and which are specific to one."""
        rank_zero_info(model.compare(Path(self.log_dir or ".")))

    def circuit(self, model: Circuit, datamodule: LightningDataModule) -> None:
        """Take the least relevant components out step by step, and find the sparsest circuit that keeps a behaviour."""
        self.predict(model, datamodule=datamodule, return_predictions=False)
        rank_zero_info(model.summary())

    def compress(self, model: Compression) -> None:
        """Set the weights of the lowest scores to zero, and write the sparse checkpoint."""
        rank_zero_info(model.compress(Path(self.log_dir or ".")))

    def run(self, model: Experiment, plan: Path | None = None) -> None:
        """Carry out the whole experiment: attribute, prune, evaluate and report.

        Args:
            model: The experiment.
            plan: Run nothing, but write a list of the stages to this file, and their configs, to run each as a job.
        """


@dataclass(frozen=True)
class Verb:
    """What a subcommand is made of: the classes of its groups ``model`` and ``data``."""

    stage: type[Stage]
    data: type[LightningDataModule] | None = None
    needs_data: bool = True


# By name, each a method of the trainer; the two of an experiment have a group for each of its stages.
VERBS: dict[str, Verb | None] = {
    "prepare": None,
    **{
        verb.stage.verb: verb
        for verb in (
            Verb(Attribution, ReferenceSamples),
            Verb(Pruning, ReferenceSamples, needs_data=False),
            Verb(Evaluation, EvaluationData),
            Verb(Sweep, EvaluationData),
            Verb(Comparison),
            Verb(Circuit, ReferenceSamples),
            Verb(Compression),
        )
    },
    "run": None,
}


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml. It may replace the file of a run that broke off, but never goes into a folder with results."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config."""
        folder = trainer.log_dir
        if folder is not None:
            for name in (name for verb in VERBS.values() if verb for name in verb.stage.OUTPUTS):
                check_absent(Path(folder) / name)
        self.overwrite = True
        super().setup(trainer, pl_module, stage)


class FindConfig(ActionConfigFile):
    """Takes the path of a config file, or the bare name of a shipped one."""

    def __call__(
        self, parser: ArgumentParser, cfg: Namespace, values: object, option_string: str | None = None
    ) -> None:
        """Parse the file."""
        path = Path(str(values))
        if not path.exists() and path.parent == Path():
            values = next((str(folder / path) for folder in CONFIGS if (folder / path).is_file()), values)
        try:
            super().__call__(parser, cfg, values, option_string)
        except RecursionError:
            raise ValueError(f"The config {values} cannot be read: it holds itself, or is nested too deeply.") from None
        except ValueError as error:
            raise ValueError(f"The config {values} cannot be read: {error}.") from None


class SparC3CLI(LightningCLI):
    """``sparc3 <verb> --config <file> [--config <overlay>] [--<group>.<option> <value>]``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the verbs; each is a method of the trainer."""
        return {name: {"model", "datamodule"} for name in VERBS}

    def init_parser(self, stage: str | None = None, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of a verb. It knows its stage; super would add a second config action."""
        parser: Any = self.parser_class(**kwargs)
        parser.stage = stage
        parser.add_argument(
            "-c", "--config", action=FindConfig, help="Path of a config file, or the name of a shipped one (demo.yaml)."
        )
        return parser

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add the groups trainer, model and data of one verb, if it was asked for."""
        if parser.stage is None:
            return
        verb = VERBS[parser.stage]
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        logger = {"save_dir": "lightning_logs", "name": parser.stage}
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        defaults["trainer.logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}
        parser.set_defaults(defaults)
        if verb is None:
            self._add_experiment_arguments(parser)
            return
        parser.add_lightning_class_args(verb.stage, "model")
        if verb.data is not None:
            is_abstract = verb.data is ReferenceSamples
            parser.add_lightning_class_args(verb.data, "data", is_abstract, required=verb.needs_data)

    @staticmethod
    def _add_experiment_arguments(parser: LightningArgumentParser) -> None:
        """Add the options of every stage, each in the group of its verb, less those that the experiment fills in."""
        parser.add_class_arguments(Experiment, "model")
        parser.add_class_arguments(Attribution, "attribute", skip=Attribution.FILLED_IN, instantiate=False)
        parser.add_subclass_arguments(RealToxicityPrompts, "screen", instantiate=False, required=False)
        parser.add_subclass_arguments(ReferenceSamples, "general", instantiate=False, required=True)
        parser.add_subclass_arguments(ReferenceSamples, "behavior", instantiate=False, required=True)
        parser.add_class_arguments(Pruning, "prune", skip=Pruning.FILLED_IN, instantiate=False)
        parser.add_subclass_arguments(ReferenceSamples, "budget_text", instantiate=False, required=False)
        parser.add_class_arguments(Evaluation, "evaluate", skip=Evaluation.FILLED_IN, instantiate=False)
        parser.add_class_arguments(EvaluationData, "data", instantiate=False)

    def before_instantiate_classes(self) -> None:
        """Check what Lightning would find out too late."""
        trainer = self.config[self.subcommand]["trainer"]
        check_slurm_tasks(trainer["devices"], trainer["num_nodes"], os.environ)
        trainer["accelerator"] = usable_accelerator(trainer["accelerator"])

    def _save_config(self) -> None:
        """Save config.yaml for a verb that starts no loop, where the callback would."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                callback.setup(self.trainer, self.model, stage=str(self.subcommand))

    before_prune = _save_config
    before_compare = _save_config
    before_compress = _save_config
    before_prepare = _save_config
    before_run = _save_config

    def prepare(self, model: Experiment, **_: object) -> None:
        """Fetch everything."""
        model.prepare(self._options(), Path(self.trainer.log_dir or "."))

    def run(self, model: Experiment, plan: Path | None = None, **_: object) -> None:
        """Run the stages, each as its own verb; in a process of its own where that starts further ones."""
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise ValueError("'sparc3 run' is started once, not by every task of srun: use configs/slurm/pipeline.sh.")
        if plan is not None:
            model.write_plan(self._options(), Path(self.trainer.log_dir or "."), plan)
            return
        run_stage = _run_stage if self.trainer.world_size == 1 else _run_stage_as_process
        results = model.run(self._options(), Path(self.trainer.log_dir or "."), run_stage)
        if self.trainer.logger is not None and results.change is not None:
            known = {name: value for name, value in asdict(results.change).items() if math.isfinite(value)}
            self.trainer.logger.log_metrics(known)
            self.trainer.logger.finalize("success")

    def _options(self) -> Config:
        """Return the config of this verb as plain values."""
        parser = self._parser(self.subcommand)
        # None is kept: left out, an option that was set to None would fall back to its default in the stage.
        return yaml.safe_load(parser.dump(self.config[self.subcommand], skip_none=False))


def _run_stage(verb: str, config: Path) -> None:
    main([verb, "--config", str(config)])


def _run_stage_as_process(verb: str, config: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sparc3_lightning", verb, "--config", str(config)], check=False)
    if done.returncode != 0:
        raise ChildProcessError(f"'sparc3 {verb} --config {config}' failed (exit code {done.returncode}); see above.")


def _quiet() -> None:
    """Filter the messages that Lightning prints in every run, and those without meaning here."""
    for message in (
        "LightningCLI's args parameter",
        "predict returned None",
        ".*LeafSpec",
        ".*does not have many workers",
        "The `srun` command",
    ):
        warnings.filterwarnings("ignore", message)
    off_topic = ("💡 Tip", "GPU available", "TPU available", "Seed set to")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(off_topic))


def main(args: ArgsType = None) -> SparC3CLI:
    """Run the command line from Python: ``main(["attribute", "--config", "lrp.yaml"])``."""
    given = sys.argv[1:] if args is None else args
    # Filling the parsers of all verbs takes longer than the rest of what happens before a stage begins.
    asked = [name for name in VERBS if name in given] or VERBS
    return SparC3CLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        trainer_class=SparC3Trainer,
        trainer_defaults={"inference_mode": False, "enable_model_summary": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
        parser_kwargs={"description": DESCRIPTION, **{name: {"stage": name} for name in asked}},
    )


def entry_point() -> None:
    """Run the command line from a shell: an error the user can mend is one sentence, not a traceback."""
    _quiet()
    try:
        main()
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("SPARC3_TRACEBACK"):
            raise
        sys.exit(f"sparc3: error: {error}\n(SPARC3_TRACEBACK=1 shows where it was raised.)")
