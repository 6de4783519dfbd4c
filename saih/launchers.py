"""Launchers: how the ranks of a job start, and how a rank learns where it stands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from saih.core import Job, Place
from saih.errors import SaihError, unknown


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
    """MPICH and those who take its options (Intel MPI, Cray)."""
    return [_beside_python("mpiexec"), "-n", str(job.ranks), "-ppn", str(job.gpus), *python, *worker]


def openmpi(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Open MPI's mpiexec."""
    mapping = ["--map-by", f"ppr:{job.gpus}:node"]
    return [_beside_python("mpiexec"), "-n", str(job.ranks), *mapping, *python, *worker]


def horovodrun(job: Job, mpi: str, python: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Horovod's own launcher on one node; it reaches other nodes by ssh, so for those take srun or mpiexec."""
    if job.nodes > 1:
        raise SaihError("launcher horovodrun starts ranks on one node only; across nodes use srun or mpiexec")
    return [_beside_python("horovodrun"), "--gloo", "-np", str(job.ranks), *python, *worker]


LAUNCHERS: dict[str, Callable[[Job, str, Sequence[str], Sequence[str]], list[str]]] = {
    launcher.__name__: launcher for launcher in (torchrun, srun, flux, mpiexec, openmpi, horovodrun)
}

ENVIRONMENTS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_SIZE"),  # horovodrun
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),  # MPICH's mpiexec; inside Slurm its proxies have a SLURM_PROCID too
    ("FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_SIZE"),  # flux run, which sets PMI_RANK and PMI_SIZE too
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),  # srun
)
"""Names of rank, local rank and world size, the innermost launcher first."""


def command(
    launcher: str, job: Job, mpi: str, python: Sequence[str], worker: Sequence[str], agents: str = ""
) -> list[str]:
    """The words that start `worker`, arguments of `python`, on all ranks of the job.

    `python` is one word, or several where a container comes first. `agents` is the launcher by which torchrun's agents
    start on several nodes, as the scheduler has it.
    """
    if launcher not in LAUNCHERS:
        raise unknown("launcher", launcher, LAUNCHERS)
    words = LAUNCHERS[launcher](job, mpi, python, worker)
    return command(agents, replace(job, gpus=1), "", [], words) if launcher == "torchrun" and job.nodes > 1 else words


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Rank, local rank and world size of this process, from what its launcher left in the environment."""
    for names in ENVIRONMENTS:
        if all(name in environment for name in names):
            return Place(*(int(environment[name]) for name in names))
    raise SaihError(f"no launcher told this process its rank; start it with one of: {', '.join(LAUNCHERS)}")


def _beside_python(program: str) -> str:
    """The program of the environment saih runs in, else the one on the PATH of the job."""
    own = Path(sys.executable).parent / program
    return str(own) if own.exists() else shutil.which(program) or program
