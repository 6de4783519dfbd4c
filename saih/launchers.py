"""Launchers: how the ranks of a job start, and how a rank learns where it stands."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from saih.core import Job, Place
from saih.errors import SaihError, unknown


def torchrun(job: Job, worker: Sequence[str]) -> list[str]:
    """One agent on this node starts `job.gpus` ranks; it stops them all when one dies."""
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={job.gpus}",
        "--max-restarts=0",
    ]
    return [*agent, *worker]


LAUNCHERS = {"torchrun": torchrun}


def command(launcher: str, job: Job, worker: Sequence[str]) -> list[str]:
    """The words that start `worker` (a module and its arguments) on all ranks of the job."""
    if launcher not in LAUNCHERS:
        raise unknown("launcher", launcher, LAUNCHERS)
    return LAUNCHERS[launcher](job, worker)


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Rank, local rank and world size of this process, from what the launcher left in its environment."""
    try:
        return Place(*(int(environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except KeyError as missing:
        raise SaihError(f"no launcher set {missing} for this process; start it with: {', '.join(LAUNCHERS)}") from None
