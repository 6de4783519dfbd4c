"""Faults planted in real runs, and the verdict that is right on each; for the tests and for the benchmarks."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from saih import jobs, plan, store, sweep, worker
from saih.analysis.bottleneck import Verdict, verdicts
from saih.analysis.ceilings import find_ceilings, merged
from saih.analysis.cells import job_steps, per_cell, per_point
from saih.core import Place, Point, Value
from tests.sites import cpu_site

QUICK: dict[str, Value] = {"seconds": 0.0, "steps": 4, "warmup": 1}
TINY: dict[str, Value] = {"mesh": 16, "width": 4, "stages": 2}
READ_AHEAD = 4
"""Batches that a loader has ready when the first step begins: a slow reader is felt after them."""
Axes = Mapping[str, Sequence[Value] | None]


@dataclass(frozen=True)
class Fault:
    """What is planted where, and which verdicts on which cell are right."""

    name: str
    right: frozenset[str]
    workload: str
    axes: Axes
    settings: Mapping[str, Value]
    ranks: int = 1
    cell: Mapping[str, str] = field(default_factory=dict)
    """Labels of the cell that is judged; none where there is only one."""


FAULTS = (
    Fault(
        "throttled reader",
        frozenset({"input"}),
        "cosmoflow",
        {"ablation": None},
        TINY | {"emulated_reader_bytes_per_s": 1e6, "readers": 1, "warmup": READ_AHEAD + 1},
    ),
    Fault(
        "rate-limited link",
        frozenset({"communication"}),
        "cosmoflow",
        {"ablation": ["none", "communication"]},
        TINY | {"emulated_link_bytes_per_s": 4e6},
        ranks=2,
    ),
    Fault(
        "one slow rank",
        frozenset({"straggler"}),
        "cosmoflow",
        {"data": ["16"]},
        {"stages": 2, "width": 4, "emulated_slow_rank_s": 0.2},
        ranks=2,
    ),
    Fault(
        "tiny model",
        frozenset({"launch"}),
        "cosmoflow",
        {"width": [1, 2]},
        {"mesh": 8, "batch": 1, "input": "memory"},
        cell={"width": "1"},
    ),
    Fault("large GEMM", frozenset({"FLOP"}), "ceilings", {"kernel": ["gemm"], "size": ["1024"]}, {}),
    Fault("streaming kernel", frozenset({"memory"}), "ceilings", {"kernel": ["triad"], "size": ["4096"]}, {}),
    Fault(
        "cold cache",
        frozenset({"storage"}),
        "ceilings",
        {"cache": ["cold", "warm"]},
        {"kernel": "read"},
        cell={"cache": "cold"},
    ),
    Fault(
        "healthy",
        frozenset({"FLOP", "memory", "compute"}),  # how near it comes to a ceiling is the machine's affair
        "cosmoflow",
        {"ablation": ["none", "input"]},
        {"mesh": 32, "width": 8, "samples": 2},
    ),
)


@dataclass(frozen=True)
class Run:
    """What a sweep has measured."""

    points: pd.DataFrame
    samples: pd.DataFrame
    ranks: pd.DataFrame

    def cells(self) -> pd.DataFrame:
        steps = job_steps(self.points, self.samples)
        return per_cell(self.points, steps, self.points.attrs["sweep"])

    def verdict(self, repeat: int | None = None, **labels: str) -> Verdict:
        """On the one cell that is whole and has these labels; from all repeats, or from one alone."""
        points = self.points if repeat is None else self.points[self.points["repeat"] == repeat]
        samples, ranks = (table[table["point"].isin(points.index)] for table in (self.samples, self.ranks))
        sweep_ = self.points.attrs["sweep"]
        steps = job_steps(points, samples)
        cells = per_cell(points, steps, sweep_)
        found = verdicts(points, samples, ranks, per_point(points, steps, sweep_), cells, sweep_)
        [verdict] = [
            each
            for each in found
            if all(str(cells.at[each.cell, f"label_{axis}"]) == label for axis, label in labels.items())
        ]
        return verdict


def plant(fault: Fault, root: Path, ceilings: Mapping[str, Any], repeats: int) -> Run:
    """Run it."""
    return measure(root, fault.workload, fault.axes, fault.settings, repeats, ceilings, fault.ranks)


def measure(
    root: Path,
    workload: str,
    axes: Axes,
    settings: Mapping[str, Value],
    repeats: int,
    ceilings: Mapping[str, Any] | None = None,
    ranks: int = 1,
) -> Run:
    """A sweep, run here and gathered."""
    asked = sweep.make_sweep(workload, axes, QUICK | {"gpus": ranks} | dict(settings), repeat=repeats)
    grid, site = sweep.points(asked, {}), cpu_site()
    name = sweep.sweep_name(asked, grid)
    planned = plan.make_plan(asked, name, grid, site, None, root)
    assert not planned.pruned, planned.pruned[0].reason
    folder = jobs.prepare(planned, root, ["saih"], dict(ceilings) if ceilings else None)
    todo = [point.to_json() for point in grid]
    if ranks == 1:
        _run(0, 1, 0, str(folder.path), todo)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_run, (ranks, port, str(folder.path), todo), nprocs=ranks)
    path = store.gather(folder, root / "results", mixed=True)
    return Run(store.load(path), store.load_samples(path), store.load_ranks(path))


def find_rates(root: Path, repeats: int) -> dict[str, Any]:
    """The ceilings that tell computing from moving and launching, from the same workload as everywhere."""
    parts = []
    for kernel, size in (("gemm", "1024"), ("copy", "4096"), ("launch", "512")):
        cells = measure(root, "ceilings", {"kernel": [kernel], "size": [size]}, {}, repeats).cells()
        parts.append(find_ceilings(cells, {}))
    return merged(parts)


def _run(rank: int, world: int, port: int, folder: str, points: list[dict[str, Any]]) -> None:
    """One rank of a job, as a launcher starts it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    home = Path(folder)
    gc.freeze()  # as the worker does: collecting between points would visit all of torch
    pack = worker.Pack(home, (), home / "points", world, 1, "cpu", str(home.parent / "data"), None, {})
    with worker._process_group(Place(rank, rank, world), "cpu"):
        for point in points:
            worker.Launch(pack, Place(rank, rank, world), "cpu", {"host": "here"}).run(Point.from_json(point))
