"""What the variables of a Slurm job say: a process that would wait for others for ever is refused at once."""

import pytest

from sparc3_lightning.cli import main
from sparc3_lightning.distributed import check_is_single, check_slurm_tasks

BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2"},
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
        {**BATCH, "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "1"},
        {**BATCH, "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2"},
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"},  # the script
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
    ],
)
@pytest.mark.parametrize("devices", ["auto", 1, 2])
def test_several_tasks_without_srun_are_refused_with_the_way_out(environment, devices):
    with pytest.raises(ValueError, match=r"^This Slurm job has \d tasks, but srun did not start .*put srun before"):
        check_slurm_tasks(devices, 1, environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
        BATCH,
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_one_task_or_those_of_srun_are_no_obstacle(environment):
    check_slurm_tasks(2, 1, environment)
    check_slurm_tasks("auto", 1, environment)


@pytest.mark.parametrize("name", ["interactive", "bash"])
def test_in_an_interactive_job_lightning_starts_the_processes_of_one_node_but_not_of_two(name):
    environment = {"SLURM_JOB_NAME": name, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    check_slurm_tasks(2, 1, environment)
    with pytest.raises(ValueError, match="put srun before sparc3"):
        check_slurm_tasks(2, 2, environment)


def test_another_number_of_tasks_than_of_devices_is_refused_with_both():
    environment = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    with pytest.raises(ValueError, match=r"^srun started 2 task\(s\) on 1 node\(s\), but --trainer\.devices 4"):
        check_slurm_tasks(4, 1, environment)


@pytest.mark.parametrize(
    "environment",
    [
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "RANK": "1"},  # torchrun
    ],
)
def test_a_verb_of_one_process_is_refused_in_every_one_of_several(environment):
    with pytest.raises(ValueError, match=r"^'sparc3 prune' works in one process, but was started as 2, .*--ntasks=1"):
        check_is_single("prune", environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "2"},  # the script
        {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"},
    ],
)
def test_a_verb_of_one_process_runs_in_one(environment):
    check_is_single("run", environment)


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--model.general", "[a]", "--model.behavior", "b"],
        ["compare", "--model.neurons", "[a, b]"],
        ["compress", "--model.general", "[a]", "--model.export", "out"],
        ["report", "some"],
    ],
)
def test_every_verb_that_is_no_loop_is_refused_on_the_command_line(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match=f"^'sparc3 {command[0]}' works in one process"):
        main(command)
    assert not any(tmp_path.iterdir())
