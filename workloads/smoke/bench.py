"""Sum vectors over all ranks, after asking every rank what it sees and judging all answers together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Check, Clock, Context, Point, Work
from saih.files import digest, write_atomic
from workloads.smoke import spec

LARGEST_SKEW_S = 1.0
PATIENCE_S = 5.0
"""How long a file that was written before may take to appear on another node."""
SUBMITTER = "login"


@dataclass(frozen=True)
class Sight:
    """What one rank sees, as numbers that can be gathered."""

    node: float
    """A number for the node's name."""
    device: float
    """A number for the GPU's own id; 0 on a CPU."""
    sum_error: float
    """Of an all-reduce, against the sum that the ranks must give."""
    cores: float
    """Cores this process may use."""
    sees_submitter: float
    """1 where the file of whoever submitted can be read."""
    writes: float
    """1 where its own file could be written."""
    files: float
    """Files of other ranks it can read."""
    time_s: float
    """Its clock, right after a barrier."""


def setup(point: Point, context: Context) -> Smoke:
    """A vector on the device, nothing more."""
    return Smoke(point, context)


class Smoke:
    """A vector on the device."""

    def __init__(self, point: Point, context: Context) -> None:
        self.point, self.place, self.device = point, context.place, context.device
        self.folder = Path(context.data_folder, str(point.params["folder"]))
        self.files = bool(point.params["folder"])
        self.vector_N = torch.full((int(point.params["size"]),), self.place.rank + 1.0, device=self.device).double()
        cost = spec.cost(point.params)
        self.work = Work(cost.work, cost.flop, cost.operations[0].moved_bytes)

    def check(self) -> Check:
        """Every rank judges the answers of all ranks, so all come to the same verdict."""
        writes = self._leave_a_file()
        self._line_up()
        sights = self._gather(
            Sight(
                node=_number(os.environ.get("SLURMD_NODENAME") or socket.gethostname()),
                device=_device_number(self.device),
                sum_error=self._sum_error(),
                cores=float(len(os.sched_getaffinity(0))),
                sees_submitter=float(not self.files or _appears(self.folder / SUBMITTER)),
                writes=float(writes),
                files=float(sum(not self.files or _appears(self._file(rank)) for rank in range(self.place.world))),
                time_s=0.0,
            )
        )
        self._line_up()
        clocks = self._gather(Sight(0, 0, 0, 0, 0, 0, 0, time.time()))
        times = [sight.time_s for sight in clocks]
        return verdict(sights, max(times) - min(times), self.point, torch.get_num_threads())

    def step(self, clock: Clock) -> Work:
        clock.enter("communication")
        if dist.is_initialized():
            dist.all_reduce(self.vector_N.clone())
        return self.work

    def close(self) -> None:
        """Nothing is held outside this object; the files stay for whoever submitted to see."""

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}-of-{self.place.world}"

    def _leave_a_file(self) -> bool:
        if not self.files:
            return True
        try:
            write_atomic(self._file(self.place.rank), lambda file: file.write(str(self.place.rank).encode()))
        except OSError:
            return False
        return True

    def _sum_error(self) -> float:
        """Largest |sum - 1 + 2 + ... + world| of the vectors."""
        total_N = self.vector_N.clone()
        if dist.is_initialized():
            dist.all_reduce(total_N)
        return float((total_N - self.place.world * (self.place.world + 1) / 2).abs().max())

    def _line_up(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def _gather(self, sight: Sight) -> list[Sight]:
        mine = torch.tensor([getattr(sight, each.name) for each in fields(Sight)], dtype=torch.float64)
        theirs: list[Tensor] = [mine]
        if dist.is_initialized():
            mine = mine.to(self.device)
            theirs = [torch.empty_like(mine) for _ in range(self.place.world)]
            dist.all_gather(theirs, mine)
        return [Sight(*row.tolist()) for row in theirs]


def verdict(sights: Sequence[Sight], skew_s: float, point: Point, threads: int) -> Check:
    """What is wrong with what the ranks saw, the cause before what follows from it."""
    ranks = len(sights)
    per_node = {sight.node: sum(each.node == sight.node for each in sights) for sight in sights}
    devices = {(sight.node, sight.device) for sight in sights}
    error = max(sight.sum_error for sight in sights)
    cores = min(sight.cores for sight in sights)
    numbers = {
        "ranks": float(ranks),
        "nodes": float(len(per_node)),
        "sum_error": error,
        "cores": cores,
        "clock_skew_s": skew_s,
    }
    wrongs = {
        f"{ranks} ranks run, where {point.ranks} were asked for": ranks != point.ranks,
        f"{ranks} ranks run on {len(per_node)} nodes with up to {max(per_node.values())} each, where {point.gpus} "
        f"on each of {point.nodes} nodes were asked for": set(per_node.values()) != {point.gpus}
        or len(per_node) != point.nodes,
        f"{ranks} ranks share {len(devices)} GPUs": bool(sights[0].device) and len(devices) != ranks,
        f"a sum over {ranks} ranks is wrong by {error:.3g}": error != 0,
        "the data folder cannot be written on the nodes": not all(sight.writes for sight in sights),
        "the data folder is not shared: a file written where the job was submitted is not seen on the nodes": not all(
            sight.sees_submitter for sight in sights
        ),
        "the data folder is not shared: a file that one rank wrote is not seen by another": any(
            sight.files < ranks for sight in sights
        ),
        f"a rank may use {cores:.0f} cores, where {threads} threads are to run": cores < threads,
        f"the clocks of the nodes differ by {skew_s:.3g} s": skew_s > LARGEST_SKEW_S,
    }
    why = "; ".join(text for text, is_wrong in wrongs.items() if is_wrong)
    return Check(not why, numbers, why)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _device_number(device: str) -> float:
    return _number(str(torch.cuda.get_device_properties(device).uuid)) if device.startswith("cuda") else 0.0


def _number(name: str) -> float:
    """A name as a whole number that float64 holds exactly."""
    return float(int(digest(name)[:12], 16))
