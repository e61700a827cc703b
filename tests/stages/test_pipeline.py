"""The chain of Slurm jobs, with an sbatch that only notes what it is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from experiments import LOGS, write_experiment

from sparc3_lightning.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_if_from_python")]
ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "configs" / "slurm" / "pipeline.sh"
SPARC3 = f'PYTHONPATH={ROOT} exec {sys.executable} -m sparc3_lightning "$@"'
SBATCH = """
number=$(ls asked | wc -l)
printf '%s\\0' "$@" >"asked/$number"
echo "$((number + 1));cluster"
"""
AWKWARD = 'my logs/it\'s "$HOME" of über\nus'


def pipeline(*options: str, sparc3: str = SPARC3, sbatch: str = SBATCH) -> subprocess.CompletedProcess[str]:
    Path("bin").mkdir(exist_ok=True)
    Path("asked").mkdir(exist_ok=True)
    for name, body in (("sparc3", sparc3), ("sbatch", sbatch)):
        (Path("bin") / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (Path("bin") / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{Path('bin').absolute()}:{os.environ['PATH']}"}
    return subprocess.run([PIPELINE, *options], env=environment, capture_output=True, text=True, timeout=300)


def asked() -> list[list[str]]:
    """What sbatch was given, without the path of the script."""
    given = [path.read_text().split("\0")[:-1] for path in sorted(Path("asked").iterdir(), key=lambda p: int(p.name))]
    return [[word for word in words if not word.endswith("stage.sbatch")] for words in given]


def planned(fields: list[str], and_then: str = "") -> str:
    """A command that prepares nothing and writes a plan."""
    words = " ".join(f"'{field}'" for field in fields)
    return f'[ "$1" = prepare ] && exit\n[ -z "{words}" ] || printf "%s\\0" {words} >"${{@: -1}}"\n{and_then}'


def test_every_stage_is_submitted_whatever_the_name_of_the_folder_of_logs(tiny_checkpoint, tmp_path):
    config = write_experiment(tmp_path, tiny_checkpoint)
    where = ["--model.logs", AWKWARD, "--trainer.logger.init_args.save_dir", AWKWARD]
    done = pipeline(str(config), *where)
    assert done.returncode == 0, done.stderr
    jobs = asked()
    verbs = [next(word for word in words if not word.startswith("--")) for words in jobs]
    assert verbs == ["attribute", "attribute", "attribute", "prune", "evaluate", "run"]
    assert [words[1] for words in jobs[3:]] == [
        f"--dependency=afterok:{jobs_before}" for jobs_before in ("1:2:3", 4, 5)
    ]
    for words in jobs[:-1]:
        stage = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        assert stage["trainer"]["logger"]["init_args"]["save_dir"] == AWKWARD.replace("$HOME", os.environ["HOME"])
    assert jobs[-1][-len(where) :] == where
    # And such a stage runs, there.
    config = jobs[0][jobs[0].index("--config") + 1]
    main(["attribute", "--config", config])
    assert len(list(Path().glob("my logs/**/scores.safetensors"))) == 1
    assert not LOGS.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([], "the plan names no stage, so nothing was submitted"),
        (["attribute", "undone", "a.yaml"], "the plan says 'undone' of 'a.yaml'"),
        (["attribut", "todo", "a.yaml"], "an unknown verb, 'attribut'"),
    ],
)
def test_a_plan_that_says_nothing_fails_loudly(fields, words):
    done = pipeline("run.yaml", sparc3=planned(fields))
    assert done.returncode == 1
    assert "pipeline.sh: error: " in done.stderr
    assert words in done.stderr
    assert asked() == []


@pytest.mark.parametrize(
    ("sbatch", "words"), [("echo no room >&2; exit 3", "no room"), ("echo", "sbatch gave no number")]
)
def test_an_sbatch_that_fails_ends_the_pipeline(sbatch, words):
    done = pipeline("run.yaml", sparc3=planned(["attribute", "todo", "a.yaml"]), sbatch=sbatch)
    assert done.returncode != 0
    assert words in done.stderr


def test_stages_that_are_done_are_not_submitted_but_their_results_are_gathered():
    done = pipeline("run.yaml", sparc3=planned(["attribute", "done", "a.yaml", "prune", "done", "b.yaml"]))
    assert done.returncode == 0, done.stderr
    assert [words[-3:] for words in asked()] == [["run", "--config", "run.yaml"]]


def test_a_pipeline_without_a_config_says_how_it_is_called():
    done = pipeline()
    assert done.returncode != 0
    assert "configs/slurm/pipeline.sh run.yaml" in done.stderr
