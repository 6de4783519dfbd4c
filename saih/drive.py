"""Drive a sweep: submit jobs, follow them politely, settle what they leave behind, try again what deserves it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saih import schedulers
from saih.core import FORMAT, Job, Point
from saih.errors import SaihError
from saih.files import blamed_on, read_record, write_json
from saih.jobs import ENDED_KEYS, PACK_KEYS, SUBMITTED_KEYS, SweepFolder, log_tail, version_of, write_job
from saih.plan import Forecast, Plan, pack
from saih.schedulers import Scheduler, State

TICK_S = 0.1
"""How often event files are looked at; the scheduler is asked far less often."""
PAUSE_GROWTH = 1.5
RETRIED = ("preempted", "node-fail", "boot-fail", "timeout")
"""Ends that may be no fault of the points: the job's rest is tried again."""
MOST_TRIES = 3
"""How often a point may be the one that ran when its job met such an end."""
OUT_OF_MEMORY_WORDS = re.compile(r"oom[-_ ]?kill|OOM Killed|exceeded memory limit|out of memory", re.IGNORECASE)


@dataclass
class Progress:
    """What has happened to each point so far, for whoever watches."""

    waiting: dict[str, Point]
    measured: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    running: Point | None = None
    jobs: dict[str, State] = field(default_factory=dict)
    """Jobs that are queued or running, by id."""


LINGER_S = 60.0
"""How long a job may go on when nothing can come of it any more; some launchers do not notice that ranks are gone."""


@dataclass
class LiveJob:
    """A job that has not ended, its points, and where its events have been read to."""

    home: Path
    points: tuple[Point, ...]
    events: Iterator[list[dict[str, Any]]]
    over_s: float | None = None
    """When the last thing happened that can come of it, on the monotonic clock."""
    given_up: bool = False
    """Whether it lingered, and was cancelled for that."""

    @classmethod
    def of(cls, home: Path) -> LiveJob:
        return cls(home, tuple(_points_of(home)), read_events(home / "events.jsonl"))


def run(folder: SweepFolder, plan: Plan, watch: Callable[[Progress], None] = lambda _: None) -> Progress:
    """Drive the sweep until every planned point is measured or has failed. Call it with the sweep's lock held.

    Jobs an earlier saih left alive are followed, not submitted again. The scheduler is asked for all of them in one
    call, with pauses that grow while nothing changes.
    """
    drive = Drive(folder, plan)
    try:
        drive.until_done(watch)
    except KeyboardInterrupt:
        if drive.scheduler.CANCEL_ON_INTERRUPT:
            drive.scheduler.cancel(list(drive.live))
        raise
    return drive.progress


def live_jobs(folder: SweepFolder, scheduler: Scheduler) -> dict[str, State]:
    """Jobs of this sweep that have not ended, by id: one question to the scheduler."""
    states = scheduler.states([name for name in _job_ids(folder, scheduler).values() if name])
    return {name: state for name, state in states.items() if state.phase != "ended"}


class Drive:
    """The state of one sweep being driven."""

    def __init__(self, folder: SweepFolder, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.scheduler = schedulers.load(plan.site.scheduler)
        self.most_queued = plan.site.max_queued or self.scheduler.MAX_QUEUED
        self.version = version_of(plan)
        self.progress = Progress({item.point.id: item.point for item in plan.kept})
        self.progress.measured |= {point.id for point in self.progress.waiting.values() if folder.is_measured(point)}
        self.live: dict[str, LiveJob] = {}

    def until_done(self, watch: Callable[[Progress], None]) -> None:
        """The loop: submit what is missing, follow, settle."""
        self._adopt()
        while True:
            self._submit_missing()
            if not self.live:
                return
            self._follow(watch)

    def _adopt(self) -> None:
        """Follow what an earlier saih left alive; note how the rest of its jobs ended."""
        ids = {name: home for home, name in _job_ids(self.folder, self.scheduler).items() if name}
        for name, state in self.scheduler.states(list(ids)).items():
            if state.phase == "ended":
                _note_end(ids[name], state)
            else:
                self.live[name] = LiveJob.of(ids[name])

    def _submit_missing(self) -> None:
        """Jobs for what nobody has taken, as many as may be queued. A refusal waits while other jobs run."""
        taken = {point.id for job in self.live.values() for point in job.points}
        done = self.progress.measured | self.progress.failed | taken
        todo = [item for item in self.plan.kept if item.point.id not in done]
        for job in self._packed(todo)[: max(0, self.most_queued - len(self.live))]:
            try:
                self._submit(self._learn(job))
            except SaihError:
                if not self.live:
                    raise
                return

    def _packed(self, todo: Sequence[Forecast]) -> list[Job]:
        """Packs of points; one that was running when a job ran out of time is alone, lest it hold up others again."""
        slow = {item.point.id for item in todo if self._times_blamed(item.point, "timeout")}
        groups = [[item for item in todo if item.point.id not in slow]]
        groups += [[item] for item in todo if item.point.id in slow]
        jobs: list[Job] = []
        for group in groups:
            jobs += pack(group, self.plan.site, self.folder.jobs, first=self.folder.next_number() + len(jobs))
        return jobs

    def _times_blamed(self, point: Point, cause: str) -> int:
        return sum(end["cause"] == cause and _was_running(home, point) for home, end in _ends(self.folder).items())

    def _learn(self, job: Job) -> Job:
        """What earlier ends of these points teach: more time after a timeout, other nodes after a node failed."""
        ends = [end for home, end in _ends(self.folder).items() if _shares_points(home, job)]
        timeouts = sum(end["cause"] == "timeout" for end in ends)
        bad = {node for end in ends if end["cause"] in ("node-fail", "boot-fail") for node in end["nodes"]}
        excluded = tuple(sorted(bad)) if self.plan.site.nodes - len(bad) >= job.nodes else ()
        limit_s = min(job.time_limit_s * 2**timeouts, self.plan.site.job_minutes * 60)
        return replace(job, time_limit_s=limit_s, excluded_nodes=excluded)

    def _submit(self, job: Job) -> None:
        script, home = write_job(job, self.folder, self.plan.site, self.version), Path(job.folder)
        try:
            name = self.scheduler.submit(script)
        except SaihError as refusal:
            found = self.scheduler.find(home)  # an answer can be lost on its way back
            if found is None:
                _write_end(home, "refused", str(refusal))
                raise
            name = found
        submitted = {"format": FORMAT, "id": name, "time": time.time(), "time_limit_s": job.time_limit_s}
        write_json(home / "submitted.json", submitted, durable=False)
        self.live[name] = LiveJob.of(home)

    def _follow(self, watch: Callable[[Progress], None]) -> None:
        """Until a job has ended: read events every tick, ask the scheduler after pauses that grow."""
        pause_s = self.scheduler.SHORTEST_PAUSE_S
        while True:
            asked = time.monotonic()
            states = self.scheduler.states(list(self.live))
            if states != self.progress.jobs:
                pause_s = self.scheduler.SHORTEST_PAUSE_S
            self.progress.jobs = states
            ended = [name for name, state in states.items() if state.phase == "ended"]
            self._read_news()
            self._end_lingering()
            for name in ended:
                self._settle(name, self.live.pop(name), states[name])
            watch(self.progress)
            if ended:
                return
            while (waited_s := time.monotonic() - asked) < pause_s:
                if waited_s >= self.scheduler.SHORTEST_PAUSE_S and self._one_is_through():
                    break
                time.sleep(min(TICK_S, pause_s))
                self._read_news()
                watch(self.progress)
            pause_s = min(pause_s * PAUSE_GROWTH, self.scheduler.LONGEST_PAUSE_S)

    def _one_is_through(self) -> bool:
        """All points of a job are dealt with: it is about to end."""
        done = self.progress.measured | self.progress.failed
        return any(all(point.id in done for point in job.points) for job in self.live.values())

    def _read_news(self) -> None:
        for job in self.live.values():
            for event in next(job.events):
                self._note(event)
                done = self.progress.measured | self.progress.failed
                launch_failed = event["event"] == "failed" and job.points[0].ranks > 1
                over = launch_failed or all(point.id in done for point in job.points)
                job.over_s = time.monotonic() if over else None

    def _end_lingering(self) -> None:
        """Cancel jobs that only hold an allocation: all points are dealt with, or one of several ranks has failed."""
        for name, job in self.live.items():
            if job.over_s is not None and time.monotonic() - job.over_s > LINGER_S and not job.given_up:
                job.given_up = True
                self.scheduler.cancel([name])

    def _note(self, event: Mapping[str, Any]) -> None:
        point = self.progress.waiting.get(event["point"])
        if point is None:
            return
        self.progress.running = point if event["event"] == "started" else None
        if event["event"] == "measured" and self.folder.is_measured(point):
            self.progress.measured.add(point.id)
        if event["event"] == "failed":
            self.progress.failed.add(point.id)

    def _settle(self, name: str, job: LiveJob, state: State) -> None:
        """A job has ended: what it measured is done; of the rest, its end says what is tried again and what failed."""
        if job.given_up:
            state = replace(state, cause="", detail=f"{state.detail} by saih, for its ranks were gone")
        if state.cause == "boot-fail":
            self.scheduler.cancel([name])  # some schedulers keep it in the queue, held
        _note_end(job.home, state)
        progress = self.progress
        progress.measured |= {point.id for point in job.points if self.folder.is_measured(point)}
        progress.running = None
        open_ids = progress.waiting.keys() - progress.measured - progress.failed
        left = [point for point in job.points if point.id in open_ids]
        for point in left:
            verdict = self._verdict(job, state, point)
            if verdict is not None:
                self._record(job.home, point, *verdict)
                progress.failed.add(point.id)

    def _verdict(self, job: LiveJob, state: State, point: Point) -> tuple[str, str] | None:
        """(kind, reason) of a point that this end of its job makes a failure; None where it is tried again."""
        words = f"job ended as {state.detail}" if state.detail else "job ended"
        if state.nodes:
            words += f" on {','.join(state.nodes)}"
        if state.cause == "cancelled":
            return "cancelled", f"{words}; the same command runs it again"
        if not _was_running(job.home, point):
            return None
        if state.cause in RETRIED:
            tries = self._times_blamed(point, state.cause)
            if state.cause == "timeout" and _time_limit_s(job.home) >= self.plan.site.job_minutes * 60:
                return "timeout", f"{words}, the site's longest job"
            return (state.cause, f"{words}, {tries} times") if tries >= MOST_TRIES else None
        if _started(job.home):
            return _death(job.home, state, words)
        # the worker never came up, and would not come up for the next point either
        return "not-started", f"{words} before any point started"

    def _record(self, home: Path, point: Point, kind: str, reason: str) -> None:
        tail = log_tail(home)
        last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "it says nothing")
        failure = {
            "format": FORMAT,
            "point": point.to_json(),
            "kind": kind,
            "reason": f"{reason}; log {home / 'log.txt'} ends: {last[:200]}",
            "check": {},
            "log_tail": tail,
            "environment": {},
        }
        write_json(self.folder.points / point.folder / "failure.json", failure)


def _death(home: Path, state: State, words: str) -> tuple[str, str]:
    """The worker died at this point: of what, as far as scheduler and log tell."""
    tail = log_tail(home)
    if state.cause == "out-of-memory" or OUT_OF_MEMORY_WORDS.search(tail):
        return "out-of-memory", f"{words}; the node ran out of memory"
    if "timeout: sending signal" in tail:  # what local jobs run under
        return "timeout", f"{words}; it was past the site's longest job"
    signal = re.search(r"Signal (\d+)|exitcode\s*:\s*-(\d+)", tail)
    if signal is None:
        return "died", f"{words}; the worker ended without a measurement"
    number = int(signal[1] or signal[2])
    hint = " (out of memory, where nobody sent it)" if number == 9 else ""
    return "died", f"{words}; the worker was killed by signal {number}{hint}"


def _job_ids(folder: SweepFolder, scheduler: Scheduler) -> dict[Path, str]:
    """What the scheduler calls each job of the sweep; "" for one it never got.

    A saih killed between submitting and writing the id down leaves a job that only the scheduler knows: ask it.
    """
    ids = {}
    for home in folder.job_folders():
        submitted = home / "submitted.json"
        if submitted.exists():
            ids[home] = str(read_record(submitted, FORMAT, SUBMITTED_KEYS)["id"])
        else:
            ids[home] = "" if (home / "ended.json").exists() else scheduler.find(home) or ""
    return ids


def _time_limit_s(home: Path) -> float:
    """What the job was granted; 0 where nobody wrote it down."""
    submitted = home / "submitted.json"
    told = read_record(submitted, FORMAT, SUBMITTED_KEYS) if submitted.exists() else {}
    return float(told.get("time_limit_s", 0.0))


def _note_end(home: Path, state: State) -> None:
    """How a job ended, written once."""
    if not (home / "ended.json").exists():
        _write_end(home, state.cause, state.detail, state.nodes)


def _write_end(home: Path, cause: str, detail: str, nodes: Sequence[str] = ()) -> None:
    end = {"format": FORMAT, "cause": cause, "detail": detail, "nodes": list(nodes)}
    write_json(home / "ended.json", end, durable=False)


def _ends(folder: SweepFolder) -> dict[Path, dict[str, Any]]:
    """How each ended job of the sweep ended."""
    ended = (home / "ended.json" for home in folder.job_folders())
    return {path.parent: read_record(path, FORMAT, ENDED_KEYS) for path in ended if path.exists()}


def _points_of(home: Path) -> list[Point]:
    """The points of a job, as its pack.json has them."""
    path = home / "pack.json"
    pack = read_record(path, FORMAT, PACK_KEYS)
    with blamed_on(path):
        return [Point.from_json(value) for value in pack["points"]]


def _shares_points(home: Path, job: Job) -> bool:
    ids = {point.id for point in job.points}
    return any(each.id in ids for each in _points_of(home))


def _started(home: Path) -> set[str]:
    """Ids of the points that a job began with."""
    return {event["point"] for event in next(read_events(home / "events.jsonl")) if event["event"] == "started"}


def _was_running(home: Path, point: Point) -> bool:
    """Whether a point that a job left open was the one it ran in the end; all were, where none had begun."""
    started = _started(home)
    return point.id in started if started else any(each.id == point.id for each in _points_of(home))


def read_events(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the events that were added since the last one; a half-written line waits for its end.

    A line that is no event, as a full disk leaves it, is skipped: the measurement files say what is done.
    """
    offset = 0
    while True:
        fresh = []
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read()
            whole = content.rfind(b"\n") + 1
            fresh = [event for line in content[:whole].split(b"\n") if (event := _event(line))]
            offset += whole
        yield fresh


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line, or None where the line does not hold one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(event, dict) and all(isinstance(event.get(key), str) for key in ("event", "point"))
    return event if whole else None
