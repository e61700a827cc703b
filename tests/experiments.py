"""A tiny experiment: the file of its options and what it reads, and stages that are run or pretended."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers import sentence
from made_up import made_up

from sparc3_lightning import cli

ALL = ["attribute", "attribute", "attribute", "prune", "evaluate"]
LOGS = Path("lightning_logs")
GENERAL_PROMPTS = """
class_path: sparc3_lightning.data.ToxicPrompts
init_args: {source: prompts.jsonl, min_toxicity: 0.3, num_samples: 4}
"""
MORE = ["--evaluate.scorers", "[small, other]", "--data.prompts.init_args.num_nontoxic", "2"]
MORE += ["--data.prompts.init_args.nontoxic_source", "mild.jsonl", "--data.prompts.init_args.min_toxicity", "0.5"]


def write_experiment(folder: Path, checkpoint: str) -> Path:
    """A tiny experiment.yaml, with the files it reads."""
    (folder / "general.txt").write_text("\n".join(sentence(i, 20 + i) for i in range(12)) + "\n")
    (folder / "text.txt").write_text("\n".join(sentence(1000 + i, 20) for i in range(10)) + "\n")
    rows = [{"prompt": {"text": sentence(100 + i, 3 + i % 7), "toxicity": i / 19}} for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {"checkpoint": checkpoint, "general_seeds": [0, 1]},
        "general": {
            "class_path": "sparc3_lightning.data.C4",
            "init_args": {"source": "general.txt", "num_samples": 4, "seq_len": 16},
        },
        "behavior": {
            "class_path": "sparc3_lightning.data.ToxicPrompts",
            "init_args": {"source": "prompts.jsonl", "min_toxicity": 0.5, "num_samples": 5},
        },
        "prune": {"num_neurons": 6, "min_differential_strength": -1000.0},
        "evaluate": {
            "scorers": ["small"],
            "sampling": {"max_new_tokens": 5, "temperature": 1.0},
            "controls": {"num_draws": 0},
        },
        "data": {
            "text": {
                "class_path": "sparc3_lightning.data.WikiText2",
                "init_args": {"source": "text.txt", "window": 32, "stride": 16},
            },
            "prompts": {
                "class_path": "sparc3_lightning.data.RealToxicityPrompts",
                "init_args": {"source": "prompts.jsonl", "num_prompts": 6, "min_toxicity": 0.3},
            },
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def remember_verbs(patch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    main = cli.main

    def remembering(args: list[str]) -> Any:
        if args[0] not in ("run", "prepare"):
            seen.append(args[0])
        return main(args)

    patch.setattr(cli, "main", remembering)
    return seen


def changed(options: dict[str, Any], changes: tuple[str, ...]) -> dict[str, Any]:
    """Return the options with others in place, which are written as on the command line."""
    options = copy.deepcopy(options)
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        *groups, last = name.removeprefix("--").split(".")
        of = options
        for group in groups:
            of = of[group]
        of[last] = yaml.safe_load(value)
    return options


def pretend(verb: str, config: Path) -> None:
    """Compute nothing, but write the file that ends a stage."""
    outputs = {"attribute": "scores.safetensors", "prune": "neurons.json", "evaluate": "results.json"}
    outputs["sweep"] = outputs["evaluate"]
    where = yaml.safe_load(config.read_text())["trainer"]["logger"]["init_args"]
    folder = Path(where["save_dir"], where["name"], where["version"])
    folder.mkdir(parents=True)
    (folder / outputs[verb]).write_text(made_up()[0].to_json())
    (folder / "report.html").touch()


class Done(NamedTuple):
    """The experiment as it stands in experiment.yaml, run from the command line."""

    home: Path
    verbs: list[str]
    results: dict[str, Any]
    folder: Path


def run(*changes: str) -> tuple[dict[str, Any], Path]:
    """Run the experiment, and return its results and the folder they are in."""
    done = cli.main(["run", "--config", "experiment.yaml", *changes])
    folder = Path(done.trainer.log_dir)
    return json.loads((folder / "results.json").read_text()), folder


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("baseline", "pruned", "change", "num_failed")}


def completions(folder: Path) -> list[dict[str, Any]]:
    evaluation = json.loads((folder / "experiment.json").read_text())["stages"]["evaluation"]
    return [json.loads(line) for line in Path(evaluation, "completions.jsonl").read_text().splitlines()]
