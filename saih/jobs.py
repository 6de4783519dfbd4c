"""The folder of a sweep: what was asked, the jobs with their scripts, and what became of each point.

jobs/<sweep>/sweep.json              what was asked for, what was planned, what was pruned
jobs/<sweep>/lock                    held by the one saih that drives the sweep
jobs/<sweep>/points/<point>/         measurement.json + samples.npz, or failure.json
jobs/<sweep>/jobs/<number>/          pack.json, job.sh, submitted.json, log.txt, events.jsonl, ended.json
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from saih import environment, launchers, schedulers, workload
from saih.core import FORMAT, Axis, Cost, Job, Point, Sweep
from saih.errors import SaihError, unknown
from saih.files import blamed_on, locked, read_record, write_atomic, write_json
from saih.plan import Forecast, Plan
from saih.site import GIB, Site

LOG_TAIL_BYTES = 4000
SWEEP_KEYS = (
    *("name", "workload", "axes", "overrides", "repeat", "seed", "site", "command", "version", "ceilings"),
    *("points", "pruned"),
)
PACK_KEYS = (
    *("name", "points", "points_folder", "ranks", "threads", "device", "data_folder", "rank_memory_bytes", "version"),
)
MEASUREMENT_KEYS = ("point", "began", "check", "ranks", "hosts", "per_rank", "samples_sha256", "environment")
FAILURE_KEYS = ("point", "kind", "reason", "log_tail")
SUBMITTED_KEYS = ("id",)
ENDED_KEYS = ("cause", "detail", "nodes")
"""What each JSON file of a sweep has besides its format number."""


@dataclass(frozen=True)
class SweepFolder:
    """The folder of one sweep."""

    path: Path

    @property
    def points(self) -> Path:
        return self.path / "points"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    def is_measured(self, point: Point) -> bool:
        """A point is done when its measurement file exists, whatever the scheduler says."""
        return (self.points / point.folder / "measurement.json").exists()

    def job_folders(self) -> list[Path]:
        return sorted(path for path in self.jobs.glob("[0-9]*") if (path / "pack.json").exists())

    @property
    def sweep_file(self) -> Path:
        return self.path / "sweep.json"

    def asked(self) -> dict[str, Any]:
        """sweep.json; SaihError where it is damaged."""
        told = read_record(self.sweep_file, FORMAT, SWEEP_KEYS)
        if not all(isinstance(told[key], list) for key in ("axes", "points", "pruned")):
            raise SaihError(f"{self.sweep_file}: damaged: axes, points and pruned must be lists")
        return told

    def site(self) -> Site:
        """The site it was planned for."""
        told = self.asked()
        with blamed_on(self.sweep_file):
            return Site.model_validate(told["site"])

    def failures(self) -> list[dict[str, Any]]:
        """failure.json of every planned point that failed."""
        planned = self.asked()["points"]
        with blamed_on(self.sweep_file):
            paths = [self.points / Point.from_json(value["point"]).folder / "failure.json" for value in planned]
        return [
            read_record(path, FORMAT, FAILURE_KEYS)
            for path in paths
            if path.exists() and not path.with_name("measurement.json").exists()
        ]

    def most_repeats(self) -> int:
        """The most repeats anybody has asked of this sweep; 0 for a new one."""
        told = self.asked()["points"] if self.sweep_file.exists() else []
        with blamed_on(self.sweep_file):
            return max((value["point"]["repeat"] + 1 for value in told), default=0)

    def next_number(self) -> int:
        """Of a job folder that does not exist yet."""
        return max((int(path.name) for path in self.jobs.glob("[0-9]*")), default=-1) + 1

    def lock(self) -> Any:
        """Held while a saih drives this sweep; SaihError if another one does."""
        return locked(self.path / "lock", f"another saih is running {self.path.name}; wait for it, or see: saih status")


def find(root: Path, name: str) -> SweepFolder:
    """The sweep folder of that name, or of that path under `root`; SaihError names the nearest ones."""
    given = Path(name)
    path = given if given.parent.resolve() == root.resolve() else root / name
    if not (path / "sweep.json").is_file():
        raise unknown(
            "sweep", name, [folder.name for folder in sorted(root.glob("*")) if (folder / "sweep.json").is_file()]
        )
    return SweepFolder(path)


def all_sweeps(root: Path) -> list[SweepFolder]:
    """Every sweep under `root`."""
    return [SweepFolder(path.parent) for path in sorted(root.glob("*/sweep.json"))]


def load_plan(folder: SweepFolder) -> Plan:
    """The plan as sweep.json has it: the points to run and the site, without their costs."""
    told, site = folder.asked(), folder.site()
    with blamed_on(folder.sweep_file):
        kept = [
            Forecast(
                Point.from_json(value["point"]),
                Cost(0.0, 0.0),
                value["predicted"]["step_s"],
                value["predicted"]["point_s"],
            )
            for value in told["points"]
        ]
    asked = Sweep(told["workload"], (), told["overrides"], told["repeat"], told["seed"], site.name)
    return Plan(asked, told["name"], site, tuple(kept), ())


def version_of(plan: Plan) -> dict[str, Any]:
    """What measures the points of a plan: version, digest of the code, commit."""
    return environment.own_version(workload.family_folder(plan.sweep.workload))


def set_aside(folder: SweepFolder) -> None:
    """Move what was measured before into a folder of its own: nothing is lost, and nothing of it is used."""
    if folder.points.exists():
        folder.points.rename(folder.path / f"points-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")


def refuse_other_code(folder: SweepFolder, plan: Plan, source: str) -> None:
    """SaihError if what is measured of the plan was measured by other code: the two could not be gathered."""
    for item in plan.kept:
        path = folder.points / item.point.folder / "measurement.json"
        if path.exists():
            measurement = read_record(path, FORMAT, MEASUREMENT_KEYS)
            with blamed_on(path):
                other = measurement["environment"].get("source")
            if other == source:
                return
            raise SaihError(
                f"{folder.path.name}: the code that measures has changed since ({other} to {source}); "
                "--fresh measures all again, --mixed goes on with the rest"
            )


def prepare(plan: Plan, root: Path, command: Sequence[str], ceilings: Mapping[str, Any] | None) -> SweepFolder:
    """Write sweep.json: all that gathering and reporting need to know about what was asked."""
    folder = SweepFolder(root / plan.name)
    write_json(folder.path / "sweep.json", describe(plan, command, ceilings, version_of(plan)))
    return folder


def describe(
    plan: Plan, command: Sequence[str], ceilings: Mapping[str, Any] | None, version: Mapping[str, Any]
) -> dict[str, Any]:
    """A plan as plain data, with what asked for it, the ceilings it was made with, and the `version_of` it."""
    sweep = plan.sweep
    return {
        "format": FORMAT,
        "name": plan.name,
        "workload": sweep.workload,
        "axes": [_axis(axis) for axis in sweep.axes],
        "overrides": dict(sweep.overrides),
        "repeat": sweep.repeat,
        "seed": sweep.seed,
        "time_budget_s": sweep.time_budget_s,
        "site": plan.site.model_dump(mode="json"),
        "command": list(command),
        "version": dict(version),
        "ceilings": ceilings,
        "points": [_planned(item) for item in plan.kept],
        "pruned": [_planned(item.forecast) | {"kind": item.kind, "reason": item.reason} for item in plan.pruned],
    }


def write_job(job: Job, folder: SweepFolder, site: Site, version: Mapping[str, Any]) -> Path:
    """pack.json and job.sh of one job; returns the script's path."""
    home = Path(job.folder)
    share = site.node_memory_gib * GIB / job.gpus if site.device == "cpu" else None
    write_json(
        home / "pack.json",
        {
            "format": FORMAT,
            "name": job.name,
            "points": [point.to_json() for point in job.points],
            "points_folder": str(folder.points.absolute()),
            "ranks": job.ranks,
            "threads": site.threads_per_rank,
            "device": site.device,
            "data_folder": str(Path(site.data_folder).absolute()),
            "rank_memory_bytes": share,
            "version": dict(version),
        },
        durable=False,
    )
    script = home / "job.sh"
    text = render(job, folder.path.name, site)
    write_atomic(script, lambda file: file.write(text.encode()), durable=False)
    return script


def render(job: Job, sweep: str, site: Site) -> str:
    """The job script, from the scheduler's template; all but the user's own set-up lines is quoted."""
    scheduler = schedulers.load(site.scheduler)
    _check_submission(site, scheduler)
    python = [*site.container, site.python or sys.executable]
    worker = ["-m", "saih.worker", str(Path(job.folder, "pack.json").absolute())]
    words = launchers.command(site.launcher, job, site.mpi, python, worker, scheduler.AGENTS, site.mpiexec)
    variables = {"OMP_NUM_THREADS": str(site.threads_per_rank), "PYTHONPATH": _python_path()} | dict(site.environment)
    return (
        _templates()
        .get_template(scheduler.TEMPLATE)
        .render(
            job=job,
            sweep=sweep,
            site=site,
            folder=str(Path.cwd()),
            environment=variables,
            python=sys.executable,
            log=str(Path(job.folder, "log.txt").absolute()),
            command=words,
        )
    )


def _check_submission(site: Site, scheduler: schedulers.Scheduler) -> None:
    """SaihError where the site asks for something its scheduler has no notion of."""
    stated = [name for name, value in site.submit if value]
    foreign = [name for name in stated if name not in scheduler.SUBMIT]
    if foreign:
        valid = f"valid: {', '.join(scheduler.SUBMIT)}" if scheduler.SUBMIT else "it takes none"
        raise SaihError(f"site {site.name}: scheduler {site.scheduler} has no submit.{foreign[0]}; {valid}")


def status(folder: SweepFolder) -> dict[str, int]:
    """How many points are measured, failed, pruned and missing: what the files say."""
    sweep = folder.asked()
    counts = dict.fromkeys(("measured", "failed", "missing", "pruned"), 0)
    with blamed_on(folder.sweep_file):
        homes = [folder.points / Point.from_json(value["point"]).folder for value in sweep["points"]]
        counts["pruned"] = len(sweep["pruned"])
    for home in homes:
        kind = (
            "measured"
            if (home / "measurement.json").exists()
            else "failed"
            if (home / "failure.json").exists()
            else "missing"
        )
        counts[kind] += 1
    return counts


def log_tail(home: Path) -> str:
    """The last 4000 bytes of a job's log."""
    log = home / "log.txt"
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _planned(item: Forecast) -> dict[str, Any]:
    cost = item.cost
    return {
        "point": item.point.to_json(),
        "predicted": {
            "step_s": item.step_s,
            "point_s": item.point_s,
            "flop": cost.flop,
            "moved_bytes": sum(operation.moved_bytes for operation in cost.operations),
            "work": cost.work,
            "parameters": cost.parameters,
            "device_bytes": cost.device_bytes,
            "input_bytes": cost.input_bytes,
            "message_bytes": cost.message_bytes,
            "disk_bytes": cost.disk_bytes,
            "operations": len(cost.operations),
        },
    }


def _axis(axis: Axis) -> dict[str, Any]:
    rungs = [{"label": rung.label, "params": dict(rung.params), "size": rung.size} for rung in axis.rungs]
    return {"name": axis.name, "unit": axis.unit, "rungs": rungs, "named": axis.named}


def _python_path() -> str:
    """Workers find the saih that submitted them, installed or not, and what the user put on the path."""
    given = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join(dict.fromkeys([*given, str(Path(__file__).resolve().parent.parent)]))


def _templates() -> jinja2.Environment:
    loaders = [jinja2.FileSystemLoader("templates"), jinja2.FileSystemLoader(str(Path(__file__).parent / "templates"))]
    env = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["quote"] = lambda value: shlex.quote(str(value))
    env.filters["comment"] = lambda value: "".join(letter if letter.isprintable() else "?" for letter in str(value))
    return env
