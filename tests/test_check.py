"""`saih site init` and `check` against a real Slurm: what init writes passes, and planted faults are named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import Cluster
from tests.test_slurm import LoginNode

RESOLVABLE = {"MASTER_ADDR": "127.0.0.1"}
"""The names of simulated nodes do not resolve."""


@pytest.fixture
def login(tmp_path: Path, slurm_cluster: Cluster) -> LoginNode:
    return LoginNode(tmp_path / "home", slurm_cluster)


def test_what_init_writes_passes_the_check(login: LoginNode) -> None:
    told = login.saih("site", "init")
    assert "partition debug of 1, 4 nodes with 2 cores, 3.9 GiB, 2 GPUs (sim), at most 60 min" in told
    assert "pmi2, pmix" in told
    path = login.folder / "sites" / "saih.yaml"
    assert path.name in told
    written = yaml.safe_load(path.read_text())
    assert written["submit"] == {"partition": "debug"}
    assert [written[key] for key in ("nodes", "gpus_per_node", "device")] == [4, 2, "cpu"]
    assert "device_memory_gib:   # fill in" in path.read_text()
    assert f"{path.relative_to(login.folder)} exists" in login.saih("site", "init", status=2)
    assert "unknown partition 'nope'" in login.saih("site", "init", "other", "--partition", "nope", status=2)

    written["environment"] |= RESOLVABLE
    path.write_text(yaml.safe_dump(written))
    told = login.saih("site", "check", "saih")
    assert "WRONG" not in told
    assert "2 nodes x 2 ranks: the data folder is shared" in told
    assert "as here" in told
    assert "all in order" in told


def plant(login: LoginNode, **faults: object) -> str:
    """What the check says of the cluster's site with these keys changed."""
    value = yaml.safe_load(login.cluster.site("srun")) | faults
    (login.folder / "sites" / "faulty.yaml").write_text(yaml.safe_dump(value))
    return login.saih("site", "check", "faulty", status=1)


def test_a_partition_there_is_not(login: LoginNode) -> None:
    assert "the scheduler knows no partition nope" in plant(login, submit={"partition": "nope"})


def test_a_python_there_is_not(login: LoginNode) -> None:
    told = plant(login, python="/nowhere/python")
    assert "WRONG 1 node x 1 rank: the nodes cannot start /nowhere/python" in told
    assert "log.txt" in told


def test_a_set_up_line_that_fails(login: LoginNode) -> None:
    told = plant(login, setup=["module load cudda"])
    assert "a line of setup, or the launcher, does not work on the nodes" in told
    assert "module: command not found" in told


def test_ranks_that_each_take_themselves_for_the_only_one(login: LoginNode) -> None:
    """As an mpiexec of another MPI starts them."""
    told = plant(login, container=["env", "PMI_RANK=0", "MPI_LOCALRANKID=0", "PMI_SIZE=1"])
    assert "ok    1 node x 1 rank" in told
    assert "WRONG 2 nodes x 2 ranks: every rank takes itself for the only one" in told


def test_a_data_folder_of_each_node_alone(login: LoginNode) -> None:
    """/proc/self/cwd leads every process to a folder of its own; ranks start in one of their node's."""
    script = login.folder / "python"
    home = '"$(dirname "$0")/of-$SLURMD_NODENAME"'
    script.write_text(f'#!/bin/sh\nmkdir -p {home}/data && cd {home} && exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    told = plant(login, data_folder="/proc/self/cwd/data", python=str(script))
    assert "the data folder /proc/self/cwd/data is not shared" in told


def test_a_job_that_waits_for_ever_is_cancelled(login: LoginNode) -> None:
    for _ in range(4):
        login.cluster.run("sbatch", "--chdir=/", "--output=/dev/null", "--exclusive", "--wrap=sleep 60")
    path = login.folder / "sites" / "srun.yaml"
    told = login.saih("site", "check", str(path), "--wait", "3", status=1)
    assert "still waits in the queue after 3 s (PENDING (" in told
    assert "saih-smoke" not in login.cluster.run("squeue", "--noheader", "--format=%j")
    login.cluster.run("scancel", "--me")
