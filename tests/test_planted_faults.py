"""Faults planted in real runs, each of which the verdict must name; five repeats of few steps."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from saih import jobs, plan, store, sweep, worker
from saih.analysis.bottleneck import Verdict, verdicts
from saih.analysis.ceilings import find_ceilings, merged
from saih.analysis.cells import job_steps, per_cell, per_point
from saih.core import Place, Point
from tests.sites import cpu_site

REPEATS = 5
QUICK = {"seconds": 0.0, "steps": 4, "warmup": 1}
TINY = {"mesh": 16, "width": 4, "stages": 2}


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


def measured(
    root: Path, workload: str, axes: dict[str, Any], settings: Mapping[str, Any], ceilings: Any = None, ranks: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A sweep, run here and gathered: points, samples, ranks."""
    given = dict(QUICK) | {"gpus": ranks} | dict(settings)
    asked = sweep.make_sweep(workload, axes, given, repeat=REPEATS)
    grid, site = sweep.points(asked, {}), cpu_site()
    name = sweep.sweep_name(asked, grid)
    planned = plan.make_plan(asked, name, grid, site, None, root)
    assert not planned.pruned, planned.pruned[0].reason
    folder = jobs.prepare(planned, root, ["saih"], ceilings)
    todo = [point.to_json() for point in grid]
    if ranks == 1:
        _run(0, 1, 0, str(folder.path), todo)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_run, (ranks, port, str(folder.path), todo), nprocs=ranks)
    path = store.gather(folder, root / "results", mixed=True)
    return store.load(path), store.load_samples(path), store.load_ranks(path)


def judged(root: Path, *what: Any, **more: Any) -> list[tuple[dict[str, str], Verdict]]:
    points, samples, ranks = measured(root, *what, **more)
    swept = points.attrs["sweep"]
    steps = job_steps(points, samples)
    cells = per_cell(points, steps, swept)
    found = verdicts(points, samples, ranks, per_point(points, steps, swept), cells, swept)
    labels = [name for name in cells if name.startswith("label_")]
    return [({name.removeprefix("label_"): cells.at[v.cell, name] for name in labels}, v) for v in found]


@pytest.fixture(scope="module")
def ceilings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this machine can do, from the same workload as everywhere."""
    root, parts = tmp_path_factory.mktemp("ceilings"), []
    for kernel, size in (("gemm", "1024"), ("copy", "4096"), ("launch", "512")):
        points, samples, _ = measured(root, "ceilings", {"kernel": [kernel], "size": [size]}, {})
        steps = job_steps(points, samples)
        parts.append(find_ceilings(per_cell(points, steps, points.attrs["sweep"]), {}))
    return merged(parts)


def throttled_reader(root: Path, ceilings: Any) -> Verdict:
    settings = TINY | {"emulated_reader_bytes_per_s": 1e6}
    [(_, verdict)] = judged(root, "cosmoflow", {"ablation": None}, settings | {"readers": 1}, ceilings)
    assert verdict.shares["input"].ablated
    return verdict


def limited_link(root: Path, ceilings: Any) -> Verdict:
    axes = {"ablation": ["none", "communication"]}
    settings = TINY | {"emulated_link_bytes_per_s": 4e6}
    [(_, verdict)] = judged(root, "cosmoflow", axes, settings, ceilings, ranks=2)
    assert verdict.shares["communication"].ablated
    return verdict


def slow_rank(root: Path, ceilings: Any) -> Verdict:
    settings = {"stages": 2, "emulated_slow_rank_s": 0.2, "width": 4}
    [(_, verdict)] = judged(root, "cosmoflow", {"data": ["16"]}, settings, ceilings, ranks=2)
    assert verdict.slowest is not None
    assert (verdict.slowest.rank, verdict.slowest.host) == (1, socket.gethostname())
    return verdict


def tiny_model(root: Path, ceilings: Any) -> Verdict:
    axes = {"width": [1, 2]}
    found = judged(root, "cosmoflow", axes, {"mesh": 8, "batch": 1, "input": "memory"}, ceilings)
    return {labels["width"]: verdict for labels, verdict in found}["1"]


def large_gemm(root: Path, ceilings: Any) -> Verdict:
    return judged(root, "ceilings", {"kernel": ["gemm"], "size": ["1024"]}, {}, ceilings)[0][1]


def streaming_kernel(root: Path, ceilings: Any) -> Verdict:
    return judged(root, "ceilings", {"kernel": ["triad"], "size": ["4096"]}, {}, ceilings)[0][1]


def cold_cache(root: Path, ceilings: Any) -> Verdict:
    found = judged(root, "ceilings", {"cache": ["cold", "warm"]}, {"kernel": "read"}, ceilings)
    by_cache = {labels["cache"]: verdict for labels, verdict in found}
    assert "a cached epoch" in by_cache["warm"].evidence
    assert by_cache["warm"].bottleneck == "input"
    return by_cache["cold"]


def healthy(root: Path, ceilings: Any) -> Verdict:
    settings = {"mesh": 32, "width": 8, "samples": 2}
    [(_, verdict)] = judged(root, "cosmoflow", {"ablation": ["none", "input"]}, settings, ceilings)
    return verdict


FAULTS: dict[Callable[[Path, Any], Verdict], set[str]] = {
    throttled_reader: {"input"},
    limited_link: {"communication"},
    slow_rank: {"straggler"},
    tiny_model: {"launch"},
    large_gemm: {"FLOP"},
    streaming_kernel: {"memory"},
    cold_cache: {"storage"},
    healthy: {"FLOP", "memory"},
}
"""What is planted, and the verdicts that are right."""


def test_every_planted_fault_is_found(tmp_path: Path, ceilings: Any, tell: Callable[[str], None]) -> None:
    found = {}
    for fault, right in FAULTS.items():
        verdict = fault(tmp_path / fault.__name__, ceilings)
        found[fault.__name__] = verdict.bottleneck in right
        sure = "" if verdict.certain else ", not certain"
        tell(f"{fault.__name__.replace('_', ' ')}: {verdict.bottleneck}{sure}; {verdict.evidence}")
    tell(f"planted faults found: {sum(found.values())} of {len(found)}, {REPEATS} repeats each")
    assert all(found.values()), found
