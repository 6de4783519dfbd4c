"""Launchers: how the ranks of a job start, and how a rank learns where it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from saih.core import Job, Place
from saih.errors import SaihError, unknown

ASK_S = 10.0
"""How long an mpiexec may take to say what it is."""


def torchrun(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """One agent a node starts its ranks and stops them all when one dies; agents meet at $PET_RDZV_ENDPOINT.

    On several nodes this is what each agent is started with: `command` says how.
    """
    agent = ["-m", "torch.distributed.run", f"--nproc-per-node={job.gpus}", "--max-restarts=0"]
    if job.nodes == 1:
        return [*python, *agent, "--standalone", *worker]
    meet = [f"--nnodes={job.nodes}", "--rdzv-backend=c10d", f"--rdzv-id=saih-{job.name}"]
    return [*python, *agent, *meet, *worker]


def srun(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Slurm starts every rank; all stop when one fails."""
    ranks = [f"--nodes={job.nodes}", f"--ntasks={job.ranks}", f"--ntasks-per-node={job.gpus}", "--kill-on-bad-exit=1"]
    return ["srun", *ranks, *([f"--mpi={mpi}"] if mpi else []), *python, *worker]


def flux(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Flux starts every rank with its share of the cores; all stop when one fails."""
    ranks = [f"--nodes={job.nodes}", f"--ntasks={job.ranks}", "--exclusive"]
    return ["flux", "run", *ranks, "--setopt=cpu-affinity=per-task", "--setopt=exit-on-error", *python, *worker]


def mpiexec(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """MPICH and those who take its options (Intel MPI, Cray).

    MPICH's ends a job when a rank dies by a signal, but not when one exits before it has called MPI_Init: a rank whose
    Python does not even start is missed by the others only when their time to meet is over (`saih.worker.MEETING`).
    """
    return [_mpiexec(of_open_mpi=False), "-n", str(job.ranks), "-ppn", str(job.gpus), *python, *worker]


def openmpi(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Open MPI's mpiexec."""
    mapping = ["--map-by", f"ppr:{job.gpus}:node"]
    return [_mpiexec(of_open_mpi=True), "-n", str(job.ranks), *mapping, *python, *worker]


def horovodrun(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Horovod's own launcher on one node; it reaches other nodes by ssh, so for those take srun or mpiexec."""
    if job.nodes > 1:
        raise SaihError("launcher horovodrun starts ranks on one node only; across nodes use srun or mpiexec")
    return [*python, "-m", "horovod.runner.launch", "--gloo", "-np", str(job.ranks), python[-1], *worker]


LAUNCHERS: dict[str, Callable[[Job, str, Sequence[str], Sequence[str]], list[str]]] = {
    launcher.__name__: launcher for launcher in (torchrun, srun, flux, mpiexec, openmpi, horovodrun)
}

MPI_LAUNCHERS = {"mpiexec": False, "openmpi": True}
"""Launchers that are an MPI's own -> whether it is Open MPI's."""

ENVIRONMENTS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_SIZE"),  # horovodrun
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),  # MPICH's mpiexec; inside Slurm its proxies have a SLURM_PROCID too
    ("PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE"),  # Cray's (PALS): see argonne-lcf/alcf-nccl-tests on GitHub
    ("FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_SIZE"),  # flux run, which sets PMI_RANK and PMI_SIZE too
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),  # srun; a batch script is rank 0 of SLURM_NTASKS, too
)
"""Names of rank, local rank and world size, the innermost launcher first."""


def command(
    launcher: str,
    job: Job,
    mpi: str,
    python: Sequence[str],
    worker: Sequence[str],
    agents: str = "",
    mpiexec: str = "",
) -> list[str]:
    """The words that start `worker`, arguments of `python`, on all ranks of the job.

    `python` is one word, or several where a container comes first. `agents` is the launcher by which torchrun's agents
    start on several nodes, as the scheduler has it. `mpiexec` takes the place of the one found here, where the set-up
    lines of a job bring another.
    """
    if launcher not in LAUNCHERS:
        raise unknown("launcher", launcher, LAUNCHERS)
    words = LAUNCHERS[launcher](job, mpi, python, worker)
    if launcher == "torchrun" and job.nodes > 1:
        return command(agents, replace(job, gpus=1), "", [], words, mpiexec=mpiexec)
    return [mpiexec, *words[1:]] if mpiexec and launcher in MPI_LAUNCHERS else words


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Rank, local rank and world size, from what the launcher left in the environment; None where there was none."""
    for names in ENVIRONMENTS:
        if all(name in environment for name in names):
            return Place(*(int(environment[name]) for name in names))
    return None


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Rank, local rank and world size of this process; SaihError where no launcher started it."""
    found = find_place(environment)
    if found:
        return found
    raise SaihError(f"no launcher told this process its rank; start it with one of: {', '.join(LAUNCHERS)}")


def find_mpi() -> str:
    """The launcher of an MPI that is here, MPICH or its kin before Open MPI; empty where there is none."""
    here = (name for name, of_open_mpi in MPI_LAUNCHERS.items() if Path(_mpiexec(of_open_mpi)).is_absolute())
    return next(here, "")


@cache
def _mpiexec(of_open_mpi: bool) -> str:
    """The first mpiexec of that kind, beside this Python or on the PATH; a bare word where only the job will have one.

    A pip-installed MPI may stand before the machine's own on the PATH, and they take different options.
    """
    folders = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    for folder in dict.fromkeys(folders):
        program = shutil.which("mpiexec", path=folder)
        if program and _is_open_mpi(program) == of_open_mpi:
            return program
    return "mpiexec"


def _is_open_mpi(mpiexec: str) -> bool | None:
    """None for one that does not say."""
    try:
        answer = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return re.search(r"open[ -]?(mpi|rte)|prrte", answer.stdout, re.IGNORECASE) is not None
