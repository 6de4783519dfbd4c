"""A plan becomes job folders; jobs are submitted, followed, and settled; what is missing can be run again.

jobs/<sweep>/sweep.json              what was asked for, what was planned, what was pruned
jobs/<sweep>/lock                    held by the one saih that drives the sweep
jobs/<sweep>/points/<point>/         measurement.json + samples.npz, or failure.json
jobs/<sweep>/jobs/<number>/          pack.json, job.sh, log.txt, events.jsonl, submitted.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from saih import environment, launchers, schedulers
from saih.core import FORMAT, Job, Point
from saih.errors import unknown
from saih.files import locked, read_json, write_atomic, write_json
from saih.plan import Forecast, Plan, pack
from saih.schedulers import Scheduler
from saih.site import GIB, Site

POLL_S = 0.1
LOG_TAIL_BYTES = 4000
ENDS = ("measured", "failed")


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

    def lock(self) -> Any:
        """Held while a saih drives this sweep; SaihError if another one does."""
        return locked(self.path / "lock", f"another saih is running {self.path.name}; wait for it, or see: saih status")


@dataclass
class Progress:
    """What has happened to each point so far, for whoever watches."""

    waiting: dict[str, Point]
    measured: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    running: Point | None = None
    job: str = ""


def find(root: Path, name: str) -> SweepFolder:
    """The sweep folder of that name under `root`; SaihError names the nearest ones."""
    path = root / name
    if not (path / "sweep.json").is_file():
        raise unknown(
            "sweep", name, [folder.name for folder in sorted(root.glob("*")) if (folder / "sweep.json").is_file()]
        )
    return SweepFolder(path)


def set_aside(folder: SweepFolder) -> None:
    """Move what was measured before into a folder of its own: nothing is lost, and nothing of it is used."""
    if folder.points.exists():
        folder.points.rename(folder.path / f"points-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")


def prepare(plan: Plan, root: Path, command: Sequence[str], ceilings: Mapping[str, Any] | None) -> SweepFolder:
    """Write sweep.json: all that gathering and reporting need to know about what was asked."""
    folder = SweepFolder(root / plan.name)
    write_json(folder.path / "sweep.json", describe(plan, command, ceilings))
    return folder


def describe(plan: Plan, command: Sequence[str], ceilings: Mapping[str, Any] | None) -> dict[str, Any]:
    """A plan as plain data."""
    sweep = plan.sweep
    return {
        "format": FORMAT,
        "name": plan.name,
        "workload": sweep.workload,
        "axes": [dataclasses.asdict(axis) | {"rungs": [_rung(rung) for rung in axis.rungs]} for axis in sweep.axes],
        "overrides": dict(sweep.overrides),
        "repeat": sweep.repeat,
        "seed": sweep.seed,
        "time_budget_s": sweep.time_budget_s,
        "site": plan.site.model_dump(mode="json"),
        "command": list(command),
        "version": environment.own_version(),
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
    template = schedulers.load(site.scheduler).TEMPLATE
    words = launchers.command(site.launcher, job, ["-m", "saih.worker", str(Path(job.folder, "pack.json").absolute())])
    variables = {"OMP_NUM_THREADS": str(site.threads_per_rank), "PYTHONPATH": _python_path()} | dict(site.environment)
    return (
        _templates()
        .get_template(template)
        .render(job=job, sweep=sweep, site=site, folder=str(Path.cwd()), environment=variables, command=words)
    )


def run(folder: SweepFolder, plan: Plan, watch: Callable[[Progress], None] = lambda _: None) -> None:
    """Drive the sweep until every planned point is measured or has failed. Call it with the sweep's lock held.

    Jobs an earlier saih left running are waited for, not started again. A job that dies takes down the point it was
    at: that point is recorded as failed with the log's tail, and the rest go into a new job.
    """
    scheduler = schedulers.load(plan.site.scheduler)
    version = environment.own_version()
    progress = Progress({item.point.id: item.point for item in plan.kept})
    _absorb_measured(folder, progress)
    live = live_jobs(folder, scheduler)
    try:
        while True:
            _follow(folder, scheduler, live, progress, watch)
            todo = [item for item in plan.kept if item.point.id not in progress.measured | progress.failed]
            if not todo:
                break
            jobs = pack(todo, plan.site, folder.jobs, first=_next_number(folder))
            for job in jobs[: scheduler.MAX_QUEUED]:
                script = write_job(job, folder, plan.site, version)
                live[_submit(scheduler, job, script)] = Path(job.folder)
    except KeyboardInterrupt:
        scheduler.cancel(list(live))
        raise


def status(folder: SweepFolder) -> dict[str, int]:
    """How many points are measured, failed, pruned and missing: what the files say."""
    sweep = read_json(folder.path / "sweep.json")
    counts = dict.fromkeys(("measured", "failed", "missing", "pruned"), 0)
    for value in sweep["points"]:
        home = folder.points / Point.from_json(value["point"]).folder
        kind = (
            "measured"
            if (home / "measurement.json").exists()
            else "failed"
            if (home / "failure.json").exists()
            else "missing"
        )
        counts[kind] += 1
    counts["pruned"] = len(sweep["pruned"])
    return counts


def live_jobs(folder: SweepFolder, scheduler: Scheduler) -> dict[str, Path]:
    """Jobs of this sweep that have not ended, id -> folder: one question to the scheduler."""
    homes = {_job_id(home): home for home in folder.job_folders()}
    states = scheduler.states(list(homes))
    return {name: home for name, home in homes.items() if states[name].phase != "ended"}


def _job_id(home: Path) -> str:
    """What the scheduler calls the job. The local one calls it by its folder: one killed while submitting is found."""
    submitted = home / "submitted.json"
    return str(read_json(submitted)["id"]) if submitted.exists() else str(home)


def _submit(scheduler: Scheduler, job: Job, script: Path) -> str:
    name = scheduler.submit(job, script)
    write_json(script.parent / "submitted.json", {"format": FORMAT, "id": name, "time": time.time()}, durable=False)
    return name


def _follow(
    folder: SweepFolder,
    scheduler: Scheduler,
    live: dict[str, Path],
    progress: Progress,
    watch: Callable[[Progress], None],
) -> None:
    """Wait until no job is alive, telling the watcher what the jobs tell; then settle what they left behind."""
    tails = {home: _events(home / "events.jsonl") for home in live.values()}
    while live:
        states = scheduler.states(list(live))
        for name, home in list(live.items()):
            for event in next(tails[home]):
                _note(folder, progress, event)
            progress.job = str(home)
            watch(progress)
            if states[name].phase == "ended":
                for event in next(tails[home]):
                    _note(folder, progress, event)
                _settle(folder, home, progress)
                watch(progress)
                del live[name]
        if live:
            time.sleep(POLL_S)


def _note(folder: SweepFolder, progress: Progress, event: Mapping[str, Any]) -> None:
    point = progress.waiting.get(event["point"])
    if point is None:
        return
    progress.running = point if event["event"] == "started" else None
    if event["event"] == "measured" and folder.is_measured(point):
        progress.measured.add(point.id)
    if event["event"] == "failed":
        progress.failed.add(point.id)


def _settle(folder: SweepFolder, home: Path, progress: Progress) -> None:
    """A job has ended: what it measured is done, the point it died at has failed, the rest can be tried again.

    A worker that never came up would not come up for the next point either: then all of its points have failed.
    """
    points = [Point.from_json(value) for value in read_json(home / "pack.json")["points"]]
    progress.measured |= {point.id for point in points if folder.is_measured(point)}
    left = [point for point in points if point.id in progress.waiting.keys() - progress.measured - progress.failed]
    started = {event["point"] for event in next(_events(home / "events.jsonl")) if event["event"] == "started"}
    for point in left:
        if point.id in started or not started:
            _record_death(folder, home, point, reached=point.id in started)
            progress.failed.add(point.id)
    progress.running = None


def _record_death(folder: SweepFolder, home: Path, point: Point, reached: bool) -> None:
    tail = log_tail(home)
    signal = re.search(r"Signal (\d+)|exitcode\s*:\s*-(\d+)", tail)
    number = int(signal[1] or signal[2]) if signal else None
    how = f"was killed by signal {number}" if number else "ended without a measurement"
    if number == 9:
        how += " (out of memory, where nobody sent it)"
    what = "the worker" if reached else "the job did not reach this point: it"
    failure = {
        "format": FORMAT,
        "point": point.to_json(),
        "kind": "died" if reached else "not-started",
        "reason": f"{what} {how}; log: {home / 'log.txt'}",
        "check": {},
        "log_tail": tail,
        "environment": {},
    }
    write_json(folder.points / point.folder / "failure.json", failure)


def log_tail(home: Path) -> str:
    """The last 4000 bytes of a job's log."""
    log = home / "log.txt"
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _events(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the events that were added since the last one; a half-written line waits for its end."""
    offset = 0
    while True:
        fresh = []
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read()
            whole = content.rfind(b"\n") + 1
            fresh = [json.loads(line) for line in content[:whole].splitlines()]
            offset += whole
        yield fresh


def _absorb_measured(folder: SweepFolder, progress: Progress) -> None:
    progress.measured |= {point.id for point in progress.waiting.values() if folder.is_measured(point)}


def _next_number(folder: SweepFolder) -> int:
    return max((int(path.name) for path in folder.jobs.glob("[0-9]*")), default=-1) + 1


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
        },
    }


def _rung(rung: Any) -> dict[str, Any]:
    return {"label": rung.label, "params": dict(rung.params), "size": rung.size}


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
