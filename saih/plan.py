"""Predict what each point costs on a site, and rule out what cannot fit before anything starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from saih import workload
from saih.core import Cost, Job, Operation, Point, Sweep
from saih.errors import SaihError
from saih.site import GIB, Site

UNKNOWN_FLOP_PER_S = 1e11
UNKNOWN_BYTES_PER_S = 1e10
LAUNCH_S = {"cpu": 1e-4, "cuda": 3e-5}
"""Seconds to dispatch one listed operation and the small ones around it from Python; a planning figure."""
LAUNCH_OVERHEAD_S = 6.0
"""Seconds to start a launcher and import torch on every rank."""
BESIDE_S = 1.0
"""Seconds to time the kernels that a point is compared with, where it asks for them; a planning figure."""
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
    return cost.emulated_s + max(_chain_s(cost.operations, speed), cost.beside_s + _chain_s(cost.beside, speed))


def _chain_s(operations: Sequence[Operation], speed: Rates) -> float:
    """Operations one after the other."""
    return sum(
        max(operation.flop / speed.flop_per_s, operation.moved_bytes / speed.bytes_per_s, speed.launch_s)
        for operation in operations
    )


def make_plan(
    sweep: Sweep,
    name: str,
    grid: Sequence[Point],
    site: Site,
    ceilings: dict[str, float] | None,
    data: Path,
    done: Set[str] = frozenset(),
    there_bytes: float = 0.0,
) -> Plan:
    """Forecast every point and prune: packages, ranks, then memory, disk and job length, then the sweep's time budget.

    Points whose ids are in `done` are measured already: they cost nothing and nothing rules them out. `there_bytes` of
    the data they need are on the disk already.
    """
    kept: list[Forecast] = []
    pruned: list[Pruned] = []
    planner = _Planner(sweep, site, ceilings, free_bytes(data) + there_bytes)
    for point in sorted(grid, key=lambda each: each.id not in done):  # stable: what is there comes first
        forecast, obstacle = planner.look_at(point, point.id in done)
        if obstacle is None:
            kept.append(forecast)
        else:
            pruned.append(Pruned(forecast, *obstacle))
    if sweep.time_budget_s is not None:
        ahead = [item for item in _charged(kept, done) if item.point.id not in done]
        spent_s = LAUNCH_OVERHEAD_S * len(pack(ahead, site, Path()))
        kept, late = _within_budget(kept, sweep.time_budget_s, spent_s, done)
        pruned += late
    order = {point.id: place for place, point in enumerate(grid)}
    kept.sort(key=lambda item: order[item.point.id])
    return Plan(sweep, name, site, tuple(_charged(kept, done)), tuple(pruned))


class _Planner:
    """Looks at points one after the other and remembers what their data sets need."""

    def __init__(self, sweep: Sweep, site: Site, ceilings: dict[str, float] | None, free_disk: float) -> None:
        self.spec = workload.spec(sweep.workload)
        self.site, self.ceilings, self.free_disk = site, ceilings, free_disk
        self.costs: dict[str, tuple[Cost, float]] = {}
        self.data_sets: set[str] = set()

    def look_at(self, point: Point, done: bool) -> tuple[Forecast, tuple[str, str] | None]:
        """What the point takes once its data set is there, and why it cannot run, with the number, or None."""
        try:
            cost, step_s = self._cost(point)
        except SaihError as error:
            return Forecast(point, Cost(0.0, 0.0), 0.0, 0.0), ("invalid", str(error))
        forecast = Forecast(point, cost, step_s, 0.0)
        if done:
            self.data_sets.add(_data_set(forecast))
            return forecast, None
        if lacks := workload.lacking(self.spec, point.params):
            return forecast, ("package", lacks)
        steps = point.timed_steps(step_s) + int(point.params["warmup"]) + cost.check_steps
        beside_s = BESIDE_S if point.params.get("beside") else 0.0
        forecast = replace(forecast, point_s=steps * step_s + beside_s)
        made = _data_set(forecast) in self.data_sets
        making_s, free = (0.0, math.inf) if made else (cost.setup_s, self.free_disk)
        obstacle = _obstacle(forecast, making_s, self.site, free)
        if obstacle is None and not made:
            self.data_sets.add(_data_set(forecast))
            self.free_disk -= cost.disk_bytes
        return forecast, obstacle

    def _cost(self, point: Point) -> tuple[Cost, float]:
        if point.cell not in self.costs:
            cost = self.spec.cost(point.params)
            speed = rates(self.site, str(point.params.get("precision", "fp32")), self.ceilings)
            self.costs[point.cell] = cost, predict_step_s(cost, speed)
        return self.costs[point.cell]


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


def _data_set(item: Forecast) -> str:
    return item.cost.data_set or item.point.id


def _charged(forecasts: Sequence[Forecast], done: Set[str]) -> list[Forecast]:
    """The same, where the first point of each data set makes it; those of measured points are there."""
    made = {_data_set(item) for item in forecasts if item.point.id in done}
    charged = []
    for item in forecasts:
        making_s = 0.0 if _data_set(item) in made else item.cost.setup_s
        charged.append(replace(item, point_s=item.point_s + making_s))
        made.add(_data_set(item))
    return charged


def _obstacle(item: Forecast, making_s: float, site: Site, free_disk: float) -> tuple[str, str] | None:
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
    job_min = (LAUNCH_OVERHEAD_S + making_s + item.point_s) / 60
    if job_min > site.job_minutes:
        return "time", f"predicted {job_min:.3g} min; the longest job is {site.job_minutes:g} min"
    return None


def _within_budget(
    kept: Sequence[Forecast], budget_s: float, spent: float, done: Set[str]
) -> tuple[list[Forecast], list[Pruned]]:
    """Keep whole cells (all repeats), cheapest first, until the budget is spent; what is measured stays anyway.

    A cell's price has its data set in it, which is spent once.
    """
    made = {_data_set(item) for item in kept if item.point.id in done}
    run_s: dict[str, float] = {}
    making_s: dict[str, dict[str, float]] = {}
    for item in kept:
        cell = item.point.cell
        run_s[cell] = run_s.get(cell, 0.0) + item.point_s
        making_s.setdefault(cell, {})[_data_set(item)] = 0.0 if _data_set(item) in made else item.cost.setup_s
    price_s = {cell: run_s[cell] + sum(making_s[cell].values()) for cell in run_s}
    chosen = set()
    for cell in sorted(price_s, key=lambda each: price_s[each]):
        seconds = run_s[cell] + sum(each for name, each in making_s[cell].items() if name not in made)
        spent += seconds
        if seconds and spent > budget_s:
            break
        chosen.add(cell)
        made |= making_s[cell].keys()
    late = [
        Pruned(item, "time", f"predicted {price_s[item.point.cell]:.3g} s; past the time budget of {budget_s:g} s")
        for item in kept
        if item.point.cell not in chosen and item.point.id not in done
    ]
    return [item for item in kept if item.point.cell in chosen or item.point.id in done], late


def free_bytes(folder: Path) -> float:
    """Free bytes of the file system `folder` is, or will be, on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return float(shutil.disk_usage(existing).free)
