"""`saih site init` and `check` against a real Slurm: what init writes passes, and planted faults are named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from saih import check, jobs, plan, schedulers
from saih.schedulers import flux, pbs, slurm
from tests.cluster.slurm import Cluster
from tests.sites import cpu_site
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


def test_a_job_that_hangs_is_cancelled_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the lock of local jobs: nobody else's job is waited for
    as_planned = plan.pack
    monkeypatch.setattr(plan, "pack", lambda *given: [replace(job, time_limit_s=4) for job in as_planned(*given)])
    site = cpu_site(setup=("echo hangs; sleep 20",))
    *before, finding = check.check(site, tmp_path / "jobs", 60)
    assert all(each.ok for each in before)
    assert not finding.ok
    assert finding.text.startswith("1 node x 1 rank: ")
    assert finding.tail == ("hangs",)
    (home,) = tmp_path.glob("jobs/smoke-*/jobs/000")
    assert schedulers.load("local").states([str(home)])[str(home)].phase == "ended"


@pytest.mark.parametrize(
    ("scheduler", "told", "text", "advice"),
    [
        ("slurm", "sbatch: error: invalid partition specified: x", "knows no partition x", "sinfo lists them"),
        ("pbs", "qsub refused job.sh: qsub: Unknown queue", "knows no queue x", "qstat -Q lists them"),
        ("flux", "flux-batch: ERROR: 'x' is not a valid queue", "knows no queue x", "flux queue list"),
        (
            "slurm",
            "still waits in the queue after 3 s (PENDING (Resources)); cancelled",
            "still waits",
            "debug partition",
        ),
        ("slurm", "still waits in the queue after 3 s (PENDING (Nodes Down)); cancelled", "still waits", "sinfo -R"),
        ("pbs", "still waits in the queue after 3 s (Can Never Run: Not enough); cancelled", "still waits", "pbsnodes"),
        ("pbs", "still waits in the queue after 3 s (H); cancelled", "still waits", "qstat -f says by whom"),
        ("flux", "still waits in the queue after 3 s (DEPEND); cancelled", "still waits", "submit.dependency"),
        ("local", "still waits in the queue after 3 s (no reason told); cancelled", "still waits", "--wait"),
        ("flux", "python: No module named torch", "has no torch", "set python"),
    ],
)
def test_advice_is_in_the_words_of_the_scheduler(
    scheduler: str, told: str, text: str, advice: str, tmp_path: Path
) -> None:
    site = cpu_site(scheduler=scheduler, submit={"partition": "x"})
    finding = check._explain(site, jobs.SweepFolder(tmp_path), f"1 node x 1 rank: {told}")
    assert text in finding.text
    assert advice in finding.advice


@pytest.mark.parametrize("module", [pbs, flux])
def test_nobody_is_told_to_run_another_schedulers_commands(module: schedulers.Scheduler) -> None:
    common = " ".join(symptom.advice for symptom in check.SYMPTOMS)
    own = " ".join([*(symptom.advice for symptom in module.SYMPTOMS), *module.WAITS.values(), check.LONGER])
    for word in {*slurm.COMMANDS, "sinfo", "sacctmgr", "scontrol"} - {"srun"}:
        assert word not in common + own
