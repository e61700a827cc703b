"""An evaluation measured again from its results.json: what is not the same here, and which figures come out alike."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from jsonargparse import ArgumentError, ArgumentParser

from sparc3_lightning.data.evaluation_data import EvaluationData
from sparc3_lightning.evaluation.reproduction import REPRODUCTION, Changed, ReproductionResults, changes, compare
from sparc3_lightning.evaluation.results import RESULTS, Results
from sparc3_lightning.files import at_home
from sparc3_lightning.provenance import git_hash, revision_of, versions
from sparc3_lightning.report.escaping import for_terminal
from sparc3_lightning.report.tables import WIDTH, Table, aligned
from sparc3_lightning.scorers.functions import FunctionScorer
from sparc3_lightning.scorers.registry import location_of
from sparc3_lightning.sources import first_line, is_local
from sparc3_lightning.stages.base import paths_of
from sparc3_lightning.stages.evaluate import Evaluation, inputs_of
from sparc3_lightning.stages.plan import Config, named_by
from sparc3_lightning.stages.sweep import Sweep

STAGES: dict[str, type[Evaluation]] = {stage.verb: stage for stage in (Evaluation, Sweep)}
PARTS = ("text", "other_text", "prompts", "pairs")
HEADLINE = "judge of the headline"


class Reproduction:
    """An evaluation as results.json describes it, ready to be measured again.

    It is measured with the dtype that it had there, and of a checkpoint at the hub with the same commit.

    Args:
        path: The results.json of evaluate, sweep or run.

    Attributes:
        config: Seed, and options of model and data, as a config of the verb has them.
        model: The evaluation.
        data: Its data.

    Raises:
        OSError: If the file, or one that it names, is not there. Nothing was loaded.
        ValueError: If it is no results.json, is of another format, or describes what is no evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = at_home(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file: give the {RESULTS} of evaluate, sweep or run.")
        self.there = Results.load(self.path)
        of = self.there.config
        if of.get("verb") not in STAGES:
            raise ValueError(
                f"{self.path} was not written by {' or '.join(STAGES)} but by {of.get('verb')!r:.80}: it cannot be "
                "reproduced."
            )
        stage = STAGES[str(of["verb"])]
        try:
            model = cast("Config", {**_mapping(of["model"]), "dtype": self.there.inputs["dtype"]})
            classes = _mapping(of["classes"])
            data: Config = {
                name: {"class_path": classes[name], "init_args": dict(_mapping(of[name]))}
                for name in PARTS
                if name in classes
            }
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path} does not say how it was measured: its config lacks {error}.") from None
        if (commit := revision_of(self.there.checkpoint_fingerprint)) is not None:
            model["revision"] = commit
        self.verb = stage.verb
        self.config: Config = {"seed_everything": self.there.protocol.continuations.seed, "model": model, "data": data}
        self.model, self.data = self._made(stage)

    def _made(self, stage: type[Evaluation]) -> tuple[Evaluation, EvaluationData]:
        """Make the modules, which check their options and load nothing."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(stage, "model")
        parser.add_class_arguments(EvaluationData, "data")
        groups = {name: self.config[name] for name in ("model", "data")}
        try:
            config = parser.parse_object(groups)
            # Only now are the types and the classes known to be right.
            self._check_files(stage)
            made = parser.instantiate_classes(config)
        except ArgumentError as error:
            raise ValueError(f"{self.path} describes no evaluation of this version: {first_line(error):.300}") from None
        data: EvaluationData = made["data"]
        for part in data.parts.values():
            part.model_checkpoint = made["model"].checkpoint
        return made["model"], data

    def _check_files(self, stage: type[Evaluation]) -> None:
        """Raise FileNotFoundError, which names all of them, if files of this machine are not there any more."""
        model = self.config["model"]
        named = [str(path) for path in paths_of(model["neurons"])] if model["neurons"] is not None else []
        for option, kind, value in named_by(stage.READS, model):
            name = location_of(value) if kind == "scorer" else value
            is_file = option.startswith("zero_shot") or (kind == "scorer" and _is_path(name))
            is_checkpoint = kind == "checkpoint" and revision_of(self.there.checkpoint_fingerprint) is None
            named += [name] if is_file or is_checkpoint else []
        for part in self.config["data"].values():
            options = part["init_args"]
            sources = (options.get(name) for name in ("source", "nontoxic_source"))
            named += [source for source in sources if source is not None]
            named += [name] if (name := options.get("tokenizer")) is not None and _is_path(name) else []
        gone = [name for name in dict.fromkeys(named) if not name.startswith("pypi:") and not is_local(name)]
        if gone:
            raise FileNotFoundError(
                f"{self.path} was measured from what does not exist here: {', '.join(gone)} (seen from {Path.cwd()}). "
                "Put it there, or start from the folder where it was measured."
            )

    def changed(self, device: torch.device) -> list[Changed]:
        """Return what is not the same here: versions, checkpoint, and the contents of all that is read.

        Args:
            device: Where it is going to be measured.
        """
        there = {**self.there.versions, "commit of this package": self.there.git_hash or "not known"}
        here = {**versions(), "commit of this package": git_hash() or "not known"}
        there |= {"checkpoint": self.there.checkpoint_fingerprint, **self.there.inputs}
        here |= {"checkpoint": self.model.checkpoint.fingerprint, **inputs_of(self.model, self.data, device)}
        return changes(there, here)

    def compared(self, changed: list[Changed]) -> ReproductionResults:
        """Compare the figures, once the evaluation has been measured again."""
        found = compare(self.there, self.model.results, self.model.completions)
        judges = [results.headline_judge for results in (self.there, self.model.results)]
        changed = [*changed, *([Changed(HEADLINE, *judges)] if len(set(judges)) > 1 else [])]
        differing = sum(figure.outcome == "differs" for figure in found)
        return ReproductionResults(
            results=str(self.path.absolute()), num_differing=differing, changed=changed, figures=found
        )


def said_of_changes(path: Path, changed: list[Changed]) -> str:
    """Return in words what is not the same here."""
    if not changed:
        return f"{for_terminal(path)}: versions, checkpoint, data and scorers are the same here."
    lines = [f"  {change.name}: {change.there} there, {change.here} here" for change in changed]
    return "\n".join([f"{for_terminal(path)}: not the same here are", *map(for_terminal, lines)])


def said_of_figures(found: ReproductionResults, folder: Path) -> str:
    """Return the table of the figures, and how many of them differ."""
    rows: Table = [("figure", "there", "here", "interval", "")]
    for figure in found.figures:
        is_exact = figure.low == figure.high
        ends = "" if is_exact or math.isnan(figure.low) else f"{figure.low:.6g} to {figure.high:.6g}"
        rows.append((figure.name, f"{figure.there:.6g}", f"{figure.here:.6g}", ends, figure.outcome))
    number, differing = len(found.figures), found.num_differing
    other = "".join(
        f"\nThe headline is of {for_terminal(change.there)!r} there and of {for_terminal(change.here)!r} here:\n"
        "its figures are not of one judge."
        for change in found.changed
        if change.name == HEADLINE
    )
    said = f"{differing} of {number} figures differ" if differing else f"All {number} figures are reproduced"
    return f"\n{aligned(rows, WIDTH)}\n\n{said}.{other}\nReproduction: {for_terminal(folder / REPRODUCTION)}"


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError("a group of options")
    return value


def _is_path(name: str) -> bool:
    """Tell whether a name can be nothing but a path of this machine."""
    return name.startswith((".", "/", "~")) or (name.count("/") > 1 and not FunctionScorer.takes(name))
