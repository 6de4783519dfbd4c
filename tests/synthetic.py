"""Sweep folders as workers leave them, with numbers that the test chooses."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saih import environment, jobs, workload
from saih.core import COMMON, FORMAT, PHASES, Axis, Cost, Operation, Params, Point, Rung, Sweep
from saih.files import write_json
from saih.jobs import SweepFolder
from saih.plan import Forecast, Plan, Pruned
from saih.site import Peak, Site

ENVIRONMENT = {
    "processor": "Test CPU",
    "gpu": "",
    "torch": "2.0",
    "python": "3.11",
    "host": "n1",
    "saih": "0",
    "commit": "c0ffee",
}
MACHINE = {"processor": "Test CPU", "gpu": "", "torch": "2.0"}
CEILINGS = {"rates": {"fp32": 1e9}, "sources": {"fp32": "gemm of size 1024"}, "machine": MACHINE}
"""1 GFLOP/s measured; the data sheet of `SITE` says 2."""
SITE = Site(
    name="testbed",
    scheduler="local",
    launcher="torchrun",
    device="cpu",
    device_name="Test CPU",
    nodes=64,
    gpus_per_node=8,
    threads_per_rank=1,
    node_memory_gib=64,
    device_memory_gib=8,
    peak=Peak(flop_per_s={"fp32": 2e9}, source="test data sheet"),
)
DATA = Axis("data", "voxels", tuple(Rung(str(size), {"mesh": size}, size) for size in (16, 32)))
MODEL = Axis("model", "channels", tuple(Rung(f"w{size}", {"width": size}, size) for size in (4, 8)))


@dataclass(frozen=True)
class Outcome:
    """What became of a point: measured, failed, missing or pruned."""

    status: str = "measured"
    kind: str = ""
    reason: str = ""
    log_tail: str = ""


@dataclass(frozen=True)
class Scenario:
    """A sweep and its made-up outcome. The functions get a point's parameters; times are in seconds."""

    axes: Sequence[Axis] = (DATA, MODEL)
    workload: str = "synthetic"
    repeat: int = 1
    steps: int = 5
    warmup: int = 1
    phases: Sequence[str] = PHASES
    flop: Callable[[Params], float] = lambda params: 1e8
    """FLOP of one step on one rank."""
    step_s: Callable[[Params], float] = lambda params: 1.0
    jitter: float = 0.0
    """Relative: repeats and steps are spread by this around `step_s`."""
    shares: Mapping[str, float] = field(default_factory=lambda: {"input": 0.1, "compute": 0.8, "other": 0.1})
    units: float = 2.0
    """Work of one step on one rank."""
    outcome: Callable[[Point], Outcome] = lambda point: Outcome()
    params: Params = field(default_factory=dict)
    ceilings: Mapping[str, Any] | None = field(default_factory=lambda: CEILINGS)
    site: Site = SITE
    environment: Callable[[Point], Mapping[str, Any]] = lambda point: ENVIRONMENT
    check: Callable[[Params], Mapping[str, float]] = lambda params: {"relative_error": 1e-6}
    file_read_bytes: float = 1e6
    storage_read_bytes: float = 0.0
    command: Sequence[str] = ("saih", "sweep", "synthetic", "--set", "note=two words")


def make(root: Path, scenario: Scenario, name: str = "synthetic-sweep") -> SweepFolder:
    """Write the sweep's folder under `root`, ready for `store.gather`."""
    outcomes = [(point, scenario.outcome(point)) for point in _grid(scenario)]
    sweep = Sweep(scenario.workload, tuple(scenario.axes), scenario.params, scenario.repeat, site=scenario.site.name)
    kept = [_forecast(scenario, point) for point, outcome in outcomes if outcome.status != "pruned"]
    pruned = [
        Pruned(_forecast(scenario, point), outcome.kind, outcome.reason)
        for point, outcome in outcomes
        if outcome.status == "pruned"
    ]
    plan = Plan(sweep, name, scenario.site, tuple(kept), tuple(pruned))
    folder = SweepFolder(root / name)
    version = environment.own_version(workload.family_folder("smoke"))
    described = jobs.describe(plan, scenario.command, scenario.ceilings, version)
    write_json(folder.path / "sweep.json", described, durable=False)
    for point, outcome in outcomes:
        if outcome.status == "measured":
            _measure(scenario, point, folder.points / point.folder)
        elif outcome.status == "failed":
            _fail(scenario, point, outcome, folder.points / point.folder)
    return folder


def ladder(name: str, count: int, parameter: str = "", unit: str = "") -> Axis:
    """An axis with sizes 1 to `count`."""
    return Axis(name, unit, tuple(Rung(str(size), {parameter or name: size}, size) for size in range(1, count + 1)))


def _grid(scenario: Scenario) -> list[Point]:
    base = {parameter.name: parameter.default for parameter in COMMON} | dict(scenario.params)
    cells = []
    for rungs in itertools.product(*(axis.rungs for axis in scenario.axes)):
        params = base | {key: value for rung in rungs for key, value in rung.params.items()}
        cells.append((params, {axis.name: rung.label for axis, rung in zip(scenario.axes, rungs, strict=True)}))
    repeats = range(scenario.repeat)
    return [Point(scenario.workload, params, labels, repeat) for repeat in repeats for params, labels in cells]


def _forecast(scenario: Scenario, point: Point) -> Forecast:
    """Predicted to take half as long as it will."""
    flop, step_s = scenario.flop(point.params), scenario.step_s(point.params)
    cost = Cost(flop, scenario.units, (Operation(flop, 1e6),), disk_bytes=scenario.file_read_bytes)
    return Forecast(point, cost, step_s / 2, step_s * scenario.steps)


def _measure(scenario: Scenario, point: Point, home: Path) -> None:
    home.mkdir(parents=True)
    content = _samples(scenario, point)
    per_rank = {
        "setup_s": 0.1,
        "check_s": 0.1,
        "device_peak_bytes": None,
        "host_peak_bytes": 1e9,
        "storage_read_bytes": scenario.storage_read_bytes,
        "file_read_bytes": scenario.file_read_bytes,
    }
    measurement = {
        "format": FORMAT,
        "point": point.to_json(),
        "began": "2026-01-02T03:04:05+00:00",
        "ended": "2026-01-02T03:04:06+00:00",
        "check": dict(scenario.check(point.params)),
        "ranks": point.ranks,
        "hosts": [scenario.environment(point).get("host", "n1")] * point.ranks,
        "per_rank": {key: [value] * point.ranks for key, value in per_rank.items()},
        "samples_sha256": hashlib.sha256(content).hexdigest(),
        "environment": dict(scenario.environment(point)),
    }
    (home / "samples.npz").write_bytes(content)
    write_json(home / "measurement.json", measurement, durable=False)


def _samples(scenario: Scenario, point: Point) -> bytes:
    """Every rank alike; steps and repeats spread evenly around the wanted time."""
    spread = 1 + scenario.jitter * (_centred(scenario.steps) + _centred(scenario.repeat)[point.repeat])
    step_s = scenario.step_s(point.params) * spread
    phase_s = np.outer(step_s, [scenario.shares.get(phase, 0.0) for phase in scenario.phases])
    each = (point.ranks, scenario.steps)
    packed = io.BytesIO()
    np.savez(
        packed,
        warmup_phase_s=np.broadcast_to(2 * phase_s[:1], (point.ranks, scenario.warmup, len(scenario.phases))),
        phase_s=np.broadcast_to(phase_s, (*each, len(scenario.phases))),
        units=np.full(each, scenario.units),
        flop=np.full(each, scenario.flop(point.params)),
        moved_bytes=np.full(each, 1e6),
    )
    return packed.getvalue()


def _centred(count: int) -> np.ndarray:
    return np.linspace(-1, 1, count) if count > 1 else np.zeros(1)


def _fail(scenario: Scenario, point: Point, outcome: Outcome, home: Path) -> None:
    failure = {
        "format": FORMAT,
        "point": point.to_json(),
        "kind": outcome.kind,
        "reason": outcome.reason,
        "check": {},
        "log_tail": outcome.log_tail,
        "environment": dict(scenario.environment(point)),
    }
    write_json(home / "failure.json", failure, durable=False)
