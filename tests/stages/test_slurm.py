"""A real Slurm of one node, started here."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import sentence
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm
CONFIGS = Path(__file__).parents[2] / "configs"
NEEDED = ("slurmctld", "slurmd", "munged", "mungekey", "srun", "sbatch", "scontrol")


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what} took more than {seconds:.0f} seconds")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and slurmd, and yield the environment in which their commands work."""
    path = f"/usr/sbin:{os.environ['PATH']}"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"slurm-wlm and munge are not installed (no {', '.join(missing)})")
    if os.geteuid() != 0:
        pytest.skip("slurmd must be started by root")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    host = socket.gethostname()
    munge_socket = folder / "munge" / "socket"
    with socket.socket() as one, socket.socket() as other:  # two free ports
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={munge_socket},cred_expire=10
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2
RebootProgram=/bin/true
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{path}",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "OMP_NUM_THREADS": "1",
    }
    key = folder / "munge" / "key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, env=environment)
    logs = (folder / "daemons.log").open("w")
    commands = [
        ["munged", "--foreground", "--force", f"--socket={munge_socket}", f"--key-file={key}"]
        + [f"--{kind}-file={folder}/munge/{kind}" for kind in ("log", "pid", "seed")],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    daemons = []
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=logs, stderr=logs))
            time.sleep(1.5)

        def idle() -> bool:
            done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
            return done.stdout.strip() == "idle"

        wait_until(idle, 60, f"starting Slurm ({folder / 'slurmctld.log'})")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        logs.close()


@pytest.fixture
def run_yaml(tiny_checkpoint: str, tmp_path: Path) -> Path:
    """A config of `sparc3 run` on the tiny model."""
    rows = [{"text": sentence(i, 3 + i % 9), "toxicity": 0.95} for i in range(120)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": sentence(1000 + i, 40)} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = "sparc3_lightning.data"
    text = {"source": str(tmp_path / "texts.jsonl")}
    prompts = {"source": str(tmp_path / "prompts.jsonl")}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        "model": {"checkpoint": tiny_checkpoint},
        "general": {"class_path": f"{data}.C4", "init_args": {**text, "num_samples": 6, "seq_len": 16}},
        "behavior": {"class_path": f"{data}.ToxicPrompts", "init_args": {**prompts, "num_samples": 20}},
        "prune": {"num_neurons": 5},
        "evaluate": {"scorers": ["small"], "sampling": {"max_new_tokens": 6}, "controls": {"num_draws": 1}},
        "data": {
            "text": {"class_path": f"{data}.WikiText2", "init_args": {**text, "window": 32, "stride": 16}},
            "prompts": {"class_path": f"{data}.RealToxicityPrompts", "init_args": {**prompts, "num_prompts": 10}},
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def attribute_yaml(tiny_checkpoint: str, tmp_path: Path) -> Path:
    """A config of `sparc3 attribute` on the tiny model."""
    rows = [{"text": sentence(i, 3 + i % 9), "toxicity": 0.95} for i in range(93)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"source": str(tmp_path / "rows.jsonl"), "num_samples": 93, "batch_size": 1}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        "model": {"checkpoint": tiny_checkpoint, "save_every": 1},
        "data": {"class_path": "sparc3_lightning.data.ToxicPrompts", "init_args": options},
    }
    path = tmp_path / "attribute.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(slurm: dict[str, str], *command: object, timeout: float = 200) -> str:
    try:
        done = subprocess.run([*map(str, command)], env=slurm, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:  # its own message leaves out what the command said
        said = "\n".join((output or b"").decode() for output in (late.stdout, late.stderr))
        pytest.fail(f"{command[0]} took more than {timeout:.0f} seconds and said\n{said[-6000:]}")
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-6000:]}"
    return done.stdout


def state_of(slurm: dict[str, str], job: str) -> str:
    text = run(slurm, "scontrol", "show", "job", job)
    return next(word.partition("=")[2] for word in text.split() if word.startswith("JobState="))


def scores(name: str) -> dict:
    return load_file(f"lightning_logs/attribute/{name}/scores.safetensors")


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] - second[name]).norm() < 1e-6 * first[name].norm()


def test_srun_and_sbatch_give_the_scores_of_one_process(slurm: dict[str, str], attribute_yaml: Path) -> None:
    version = "--trainer.logger.init_args.version"
    common = ["attribute", "--config", attribute_yaml]
    run(slurm, "sparc3", *common, version, "alone")
    sharded = ["--config", CONFIGS / "fsdp.yaml", "--trainer.devices", 2]
    # Lightning's own choice is 15000 + the number of the job, which something else on this machine may be using.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {**slurm, "MASTER_PORT": str(free.getsockname()[1])}
    two = ["--kill-on-bad-exit=1", "-n", "2", "--ntasks-per-node=2"]
    run(environment, "srun", *two, "sparc3", *common, *sharded, version, "srun")
    assert_same(scores("alone"), scores("srun"))

    script = CONFIGS / "slurm" / "stage.sbatch"
    overlay = ["--config", CONFIGS / "fsdp.yaml"]
    job = run(environment, "sbatch", "--parsable", "--wait", "--ntasks-per-node=2", script, *common, *overlay).strip()
    assert state_of(slurm, job) == "COMPLETED", Path(f"slurm-{job}.out").read_text()
    assert_same(scores("alone"), scores(f"version_{job}"))


def test_a_device_count_that_slurm_did_not_give_is_one_clear_sentence(
    slurm: dict[str, str], attribute_yaml: Path
) -> None:
    command = ["srun", "-n", "2", "--ntasks-per-node=2", "sparc3", "attribute", "--config", str(attribute_yaml)]
    done = subprocess.run(
        [*command, "--config", str(CONFIGS / "fsdp.yaml"), "--trainer.devices=1"],
        env=slurm,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert "--ntasks-per-node" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_that_is_requeued_goes_on_and_ends_with_the_same_scores(
    slurm: dict[str, str], attribute_yaml: Path
) -> None:
    # A run that waits a little after each sample, so that it can be met in the middle.
    slow = Path("slow.py")
    slow.write_text(
        "import time\n"
        "from sparc3_lightning import cli\n"
        "from sparc3_lightning.stages import attribute\n"
        "class Slow(attribute.Attribution):\n"
        "    def predict_step(self, batch, batch_idx):\n"
        "        time.sleep(0.15)\n"
        "        super().predict_step(batch, batch_idx)\n"
        "cli.STAGES['attribute'] = cli.Verb(Slow, cli.ReferenceSamples)\n"
        "cli.entry_point()\n"
    )
    folder = Path("bin")
    folder.mkdir()
    (folder / "sparc3").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {slow.absolute()} "$@"\n')
    (folder / "sparc3").chmod(0o755)
    environment = {**slurm, "PATH": f"{folder.absolute()}:{slurm['PATH']}"}
    script = CONFIGS / "slurm" / "stage.sbatch"
    job = run(environment, "sbatch", "--parsable", "--ntasks-per-node=1", script, "attribute", "-c", attribute_yaml)
    job = job.strip()
    states = Path("lightning_logs/attribute", f"version_{job}")
    wait_until(lambda: any(states.glob("state-0-0*")), 90, "the first state")
    time.sleep(2)
    run(slurm, "scontrol", "requeue", job)
    wait_until(lambda: (states / "scores.safetensors").exists(), 180, "the requeued job")
    output = Path(f"slurm-{job}.out").read_text()
    assert "Going on after" in output
    run(slurm, "sparc3", "attribute", "--config", attribute_yaml, "--trainer.logger.init_args.version", "alone")
    alone, requeued = scores("alone"), scores(f"version_{job}")
    for name in alone:
        assert alone[name].equal(requeued[name])
    assert not list(states.glob("state-*"))


def test_every_stage_that_may_run_the_model_gets_its_resources_and_pruning_one_task_of_them(tmp_path: Path) -> None:
    plan = [field for verb in ("attribute", "prune", "evaluate") for field in (verb, "todo", f"{verb}.yaml")]
    commands = {
        "sparc3": f'[ "$1" = prepare ] || printf "%s\\0" {" ".join(plan)} >"${{@: -1}}"',
        "sbatch": f'echo "$@" >>{tmp_path}/submitted; echo 1',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    resources = "--ntasks-per-node=4 --gpus-per-node=4"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SPARC3_MODEL_JOB": resources}
    subprocess.run([CONFIGS / "slurm" / "pipeline.sh", "run.yaml"], env=environment, check=True)
    options = [line.partition("/")[0].split() for line in (tmp_path / "submitted").read_text().splitlines()]
    attribute, prune, evaluate, run = [" ".join(o for o in of if "dependency" not in o) for of in options]
    assert attribute == evaluate == f"--parsable {resources}"
    assert prune == f"--parsable {resources} --ntasks-per-node=1 --nodes=1", "sbatch takes the last of two values"
    assert run == "--parsable --ntasks-per-node=1 --nodes=1"


def test_the_pipeline_runs_to_its_end(slurm: dict[str, str], run_yaml: Path) -> None:
    environment = {**slurm, "SPARC3_MODEL_JOB": "--ntasks-per-node=1"}
    output = run(environment, CONFIGS / "slurm" / "pipeline.sh", run_yaml)
    jobs = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.split()[0].isdigit()}
    assert list(jobs.values()) == ["attribute"] * 4 + ["prune", "evaluate", "run"]
    last = list(jobs)[-1]
    wait_until(lambda: state_of(slurm, last) not in ("PENDING", "RUNNING", "COMPLETING"), 400, "the pipeline")
    for job, verb in jobs.items():
        assert state_of(slurm, job) == "COMPLETED", (verb, Path(f"slurm-{job}.out").read_text()[-2000:])
    results = list(Path("lightning_logs/run").glob("*/results.json"))
    assert len(results) == 1
    assert results[0].with_name("report.html").is_file()
