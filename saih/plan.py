"""Predict what each point costs on a site, and rule out what cannot fit before anything starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saih import workload
from saih.core import Cost, Job, Point, Sweep
from saih.errors import SaihError
from saih.site import GIB, Site

UNKNOWN_FLOP_PER_S = 1e11
UNKNOWN_BYTES_PER_S = 1e10
LAUNCH_S = {"cpu": 1e-4, "cuda": 3e-5}
"""Seconds to dispatch one listed operation and the small ones around it from Python; a planning figure."""
LAUNCH_OVERHEAD_S = 6.0
"""Seconds to start a launcher and import torch on every rank."""
RESERVED_GIB = 0.5
"""Memory a rank holds before it allocates anything: interpreter, torch, communication buffers."""


@dataclass(frozen=True)
class Rates:
    """What one device is assumed to sustain, for prediction."""

    flop_per_s: float
    bytes_per_s: float
    launch_s: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """What one point is predicted to take. Bytes are per rank."""

    point: Point
    cost: Cost
    step_s: float
    point_s: float


@dataclass(frozen=True)
class Pruned:
    """A point ruled out before it started, with the number that ruled it out."""

    forecast: Forecast
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a sweep will run and what it leaves out."""

    sweep: Sweep
    name: str
    site: Site
    kept: tuple[Forecast, ...]
    pruned: tuple[Pruned, ...]

    @property
    def seconds(self) -> float:
        """Predicted duration when one job runs at a time."""
        launches = len(pack(self.kept, self.site, Path()))
        return sum(item.point_s for item in self.kept) + LAUNCH_OVERHEAD_S * launches


def rates(site: Site, precision: str, ceilings: dict[str, float] | None) -> Rates:
    """Rates of one device: measured by `ceilings` where they are known, else data sheet, else a guess that says so."""
    measured = ceilings or {}
    sheet = site.peak.flop_per_s.get(precision)
    flop = measured.get(precision) or sheet or UNKNOWN_FLOP_PER_S
    memory = measured.get("copy") or site.peak.memory_bytes_per_s or UNKNOWN_BYTES_PER_S
    source = "measured" if precision in measured else "data sheet" if sheet else "guess"
    return Rates(flop, memory, LAUNCH_S[site.device], source)


def predict_step_s(cost: Cost, speed: Rates) -> float:
    """Roofline time of a step (Williams et al. 2009): each operation is bound by its FLOP, its bytes or its launch."""
    return sum(
        max(operation.flop / speed.flop_per_s, operation.moved_bytes / speed.bytes_per_s, speed.launch_s)
        for operation in cost.operations
    )


def make_plan(
    sweep: Sweep, name: str, grid: Sequence[Point], site: Site, ceilings: dict[str, float] | None, data: Path
) -> Plan:
    """Forecast every point and prune: ranks, then memory, disk and job length, then the sweep's time budget."""
    spec = workload.spec(sweep.workload)
    costs: dict[str, Forecast] = {}
    free_disk = _free_bytes(data)
    kept, pruned = [], []
    for point in grid:
        known = costs.get(point.cell)
        if known is None:
            try:
                cost = spec.cost(point.params)
            except SaihError as error:
                nothing = Forecast(point, Cost(0.0, 0.0), 0.0, 0.0)
                pruned.append(Pruned(nothing, "invalid", str(error)))
                continue
            known = costs[point.cell] = _forecast(point, cost, site, ceilings)
        forecast = Forecast(point, known.cost, known.step_s, known.point_s)
        obstacle = _obstacle(forecast, site, free_disk)
        if obstacle:
            pruned.append(Pruned(forecast, *obstacle))
        else:
            kept.append(forecast)
    if sweep.time_budget_s is not None:
        spent_s = LAUNCH_OVERHEAD_S * len(pack(kept, site, Path()))
        kept, late = _within_budget(kept, sweep.time_budget_s, spent_s)
        pruned += late
    return Plan(sweep, name, site, tuple(kept), tuple(pruned))


def pack(forecasts: Sequence[Forecast], site: Site, folder: Path, first: int = 0) -> list[Job]:
    """Points that share an allocation share a job, up to the site's longest job, so that start-up is paid once.

    Where allocations are compared, each repeat gets jobs of its own: the repeats of the allocations then alternate.
    """
    shapes = {_shape(item) for item in forecasts}
    groups: dict[tuple[int, ...], list[Forecast]] = {}
    for item in forecasts:
        key = _shape(item) if len(shapes) == 1 else (item.point.repeat, *_shape(item))
        groups.setdefault(key, []).append(item)
    batches = [batch for _, group in sorted(groups.items()) for batch in _split(group, site.job_minutes * 60 / 2)]
    return [_job(batch, folder, first + number, site) for number, batch in enumerate(batches)]


def _shape(item: Forecast) -> tuple[int, int]:
    return item.point.nodes, item.point.gpus


def _split(group: Sequence[Forecast], longest_s: float) -> list[list[Forecast]]:
    batches: list[list[Forecast]] = []
    filled_s = math.inf
    for item in group:
        if filled_s + item.point_s > longest_s:
            batches.append([])
            filled_s = LAUNCH_OVERHEAD_S
        batches[-1].append(item)
        filled_s += item.point_s
    return batches


def _job(batch: Sequence[Forecast], folder: Path, number: int, site: Site) -> Job:
    nodes, gpus = _shape(batch[0])
    name = f"{number:03d}"
    limit = min(site.job_minutes * 60, 30 + 2 * (LAUNCH_OVERHEAD_S + sum(item.point_s for item in batch)))
    return Job(str(folder / name), name, tuple(item.point for item in batch), nodes, gpus, limit)


def _forecast(point: Point, cost: Cost, site: Site, ceilings: dict[str, float] | None) -> Forecast:
    precision = str(point.params.get("precision", "fp32"))
    step_s = predict_step_s(cost, rates(site, precision, ceilings))
    steps = point.timed_steps(step_s) + int(point.params["warmup"]) + cost.check_steps
    return Forecast(point, cost, step_s, cost.setup_s + steps * step_s)


def _obstacle(item: Forecast, site: Site, free_disk: float) -> tuple[str, str] | None:
    """Why this point cannot run on the site, with the number, or None."""
    point, cost = item.point, item.cost
    if point.nodes > site.nodes:
        return "nodes", f"needs {point.nodes} nodes; site {site.name} has {site.nodes}"
    if point.gpus > site.gpus_per_node:
        return "ranks", f"needs {point.gpus} ranks a node; site {site.name} has {site.gpus_per_node}"
    needed = cost.device_bytes / GIB + RESERVED_GIB
    available = site.device_memory_gib if site.device == "cuda" else site.node_memory_gib / point.gpus
    if needed > available:
        return "memory", f"needs {needed:.1f} GiB a rank; {available:.1f} GiB there"
    if cost.disk_bytes > free_disk:
        return "disk", f"needs {cost.disk_bytes / 1e9:.3g} GB of data; {free_disk / 1e9:.3g} GB free"
    job_min = (LAUNCH_OVERHEAD_S + item.point_s) / 60
    if job_min > site.job_minutes:
        return "time", f"predicted {job_min:.3g} min; the longest job is {site.job_minutes:g} min"
    return None


def _within_budget(kept: Sequence[Forecast], budget_s: float, spent: float) -> tuple[list[Forecast], list[Pruned]]:
    """Keep whole cells (all repeats), cheapest first, until the budget is spent; the order of points stays."""
    cells: dict[str, float] = {}
    for item in kept:
        cells[item.point.cell] = cells.get(item.point.cell, 0.0) + item.point_s
    chosen = set()
    for cell, seconds in sorted(cells.items(), key=lambda pair: pair[1]):
        spent += seconds
        if spent > budget_s:
            break
        chosen.add(cell)
    late = [
        Pruned(item, "time", f"predicted {cells[item.point.cell]:.3g} s; past the time budget of {budget_s:g} s")
        for item in kept
        if item.point.cell not in chosen
    ]
    return [item for item in kept if item.point.cell in chosen], late


def _free_bytes(folder: Path) -> float:
    """Free bytes of the file system `folder` is, or will be, on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return float(shutil.disk_usage(existing).free)
