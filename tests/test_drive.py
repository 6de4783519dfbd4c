"""What a job's end leads to, with a scheduler that ends every job as the test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from saih import drive, jobs, schedulers
from saih.core import COMMON, Cost, Job, Point, Sweep
from saih.errors import SaihError
from saih.files import read_json, write_json
from saih.jobs import SweepFolder
from saih.plan import Forecast, Plan
from saih.schedulers import Cause, State
from tests.sites import cpu_site


class Scripted:
    """A scheduler that runs each job as the test says: it measures points, leaves one running, and ends."""

    TEMPLATE = "local.sh.j2"
    SUBMIT: tuple[str, ...] = ()
    AGENTS = "srun"
    MAX_QUEUED = 1
    SHORTEST_PAUSE_S = LONGEST_PAUSE_S = 0.01
    CANCEL_ON_INTERRUPT = True

    def __init__(self, folder: SweepFolder, end: Callable[[list[Point]], tuple[int, bool, State]]) -> None:
        """`end(points of the job)` says how many are measured, whether the next one has begun, and how it ends."""
        self.folder, self.end = folder, end
        self.states_of: dict[str, State] = {}

    def submit(self, script: Path) -> str:
        home = script.parent
        points = [Point.from_json(value) for value in read_json(home / "pack.json")["points"]]
        measured, begun, state = self.end(points)
        for point in points[:measured]:
            write_json(self.folder.points / point.folder / "measurement.json", {})
        events = [{"event": "started", "point": point.id} for point in points[: measured + begun]]
        (home / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        self.states_of[str(home)] = state
        return str(home)

    def find(self, home: Path) -> str | None:
        return None

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        return {name: self.states_of[name] for name in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        pass


@dataclass
class Outcome:
    """What a drive did: its jobs in order, and the failures it recorded by `amount` of the point."""

    jobs: list[Job]
    failures: dict[int, dict[str, str]]
    measured: int


def drive_points(
    count: int,
    folder: SweepFolder,
    end: Callable[[list[Point]], tuple[int, bool, State]],
    monkeypatch: pytest.MonkeyPatch,
    **site: Any,
) -> Outcome:
    """Drive `count` points of 10 s through jobs that go as `end` says."""
    submitted: list[Job] = []
    honest = jobs.write_job

    def write_job(job: Job, *rest: object) -> Path:
        submitted.append(job)
        return honest(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(schedulers, "load", lambda name: Scripted(folder, end))
    monkeypatch.setattr(drive, "write_job", write_job)
    common = {each.name: each.default for each in COMMON}
    points = [Point("smoke", common | {"steps": 1 + number}) for number in range(count)]
    kept = tuple(Forecast(point, Cost(0.0, 1.0), 0.0, 10.0) for point in points)
    progress = drive.run(folder, Plan(Sweep("smoke", ()), "s", cpu_site(nodes=4, **site), kept, ()))
    paths = {int(point.params["steps"]) - 1: folder.points / point.folder / "failure.json" for point in points}
    failures = {number: read_json(path) for number, path in paths.items() if path.exists()}
    return Outcome(submitted, failures, len(progress.measured))


def number_of(point: Point) -> int:
    return int(point.params["steps"]) - 1


TIMEOUT = State("ended", "timeout", "TIMEOUT", ("n1",))


def test_after_a_timeout_the_next_job_has_twice_the_time_up_to_three_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = drive_points(1, SweepFolder(tmp_path / "s"), lambda points: (0, True, TIMEOUT), monkeypatch)
    first = outcome.jobs[0].time_limit_s
    assert [job.time_limit_s for job in outcome.jobs] == [first, 2 * first, 4 * first]
    assert outcome.failures[0]["kind"] == "timeout"
    assert "TIMEOUT on n1, 3 times" in outcome.failures[0]["reason"]


def test_a_timeout_of_the_longest_job_a_site_has_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path / "s")
    outcome = drive_points(1, folder, lambda points: (0, True, TIMEOUT), monkeypatch, job_minutes=1)
    assert [job.time_limit_s for job in outcome.jobs] == [60]
    assert "the site's longest job" in outcome.failures[0]["reason"]


def test_a_point_that_hangs_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten points in a pack, of which the third never ends: the other nine are measured."""

    def end(points: list[Point]) -> tuple[int, bool, State]:
        before = next((place for place, point in enumerate(points) if number_of(point) == 2), len(points))
        return (before, before < len(points), TIMEOUT if before < len(points) else State("ended"))

    outcome = drive_points(10, SweepFolder(tmp_path / "s"), end, monkeypatch)
    assert outcome.measured == 9
    assert list(outcome.failures) == [2]
    assert "3 times" in outcome.failures[2]["reason"]
    packs = [[number_of(point) for point in job.points] for job in outcome.jobs]
    assert packs == [list(range(10)), list(range(3, 10)), [2], [2]]


def test_a_pack_that_is_preempted_again_and_again_gets_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job measures two points before it is preempted: that is progress, however often it happens."""
    preempted = State("ended", "preempted", "PREEMPTED")
    outcome = drive_points(12, SweepFolder(tmp_path / "s"), lambda points: (2, len(points) > 2, preempted), monkeypatch)
    assert outcome.measured == 12
    assert not outcome.failures
    assert len(outcome.jobs) == 6


def test_ends_of_different_causes_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([TIMEOUT, TIMEOUT, State("ended", "preempted", "P"), State("ended", "preempted", "P"), TIMEOUT])
    outcome = drive_points(1, SweepFolder(tmp_path / "s"), lambda points: (0, True, next(ends)), monkeypatch)
    assert len(outcome.jobs) == 5
    assert "TIMEOUT on n1, 3 times" in outcome.failures[0]["reason"]


def test_after_a_node_failed_the_next_job_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = State("ended", "node-fail", "NODE_FAIL", ("n2",))
    outcome = drive_points(1, SweepFolder(tmp_path / "s"), lambda points: (0, True, lost), monkeypatch)
    assert [job.excluded_nodes for job in outcome.jobs] == [(), ("n2",), ("n2",)]
    assert len({job.time_limit_s for job in outcome.jobs}) == 1
    assert outcome.failures[0]["kind"] == "node-fail"


@pytest.mark.parametrize(("cause", "kind"), [("cancelled", "cancelled"), ("", "not-started")])
def test_other_ends_are_not_tried_again(
    cause: Cause, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path / "s")
    outcome = drive_points(2, folder, lambda points: (0, False, State("ended", cause, "X")), monkeypatch)
    assert len(outcome.jobs) == 1
    assert [failure["kind"] for failure in outcome.failures.values()] == [kind] * 2


def test_a_job_that_lingers_is_ended_and_its_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two ranks failed at the second of three points, and the launcher did not notice."""
    folder = SweepFolder(tmp_path / "s")

    class Lingering(Scripted):
        def submit(self, script: Path) -> str:
            home = super().submit(script)
            points = [Point.from_json(value) for value in read_json(Path(home) / "pack.json")["points"]]
            if len(points) == 3:
                with open(Path(home) / "events.jsonl", "a") as file:
                    file.write(json.dumps({"event": "failed", "point": points[1].id}) + "\n")
                self.states_of[home] = State("running")
            return home

        def cancel(self, ids: Sequence[str]) -> None:
            self.states_of |= dict.fromkeys(ids, State("ended", "cancelled", "CANCELLED"))

    def end(points: list[Point]) -> tuple[int, bool, State]:
        return (1, True, State("running")) if len(points) == 3 else (len(points), False, State("ended"))

    monkeypatch.setattr(schedulers, "load", lambda name: Lingering(folder, end))
    monkeypatch.setattr(drive, "LINGER_S", 0.05)
    common = {each.name: each.default for each in COMMON} | {"gpus": 2}
    points = [Point("smoke", common | {"steps": 1 + number}) for number in range(3)]
    kept = tuple(Forecast(point, Cost(0.0, 1.0), 0.0, 10.0) for point in points)
    progress = drive.run(folder, Plan(Sweep("smoke", ()), "s", cpu_site(), kept, ()))
    assert progress.measured == {points[0].id, points[2].id}
    assert progress.failed == {points[1].id}
    assert "by saih" in read_json(folder.jobs / "000" / "ended.json")["detail"]


class Refusing(Scripted):
    """Refuses every job but the first while that one runs; `lost_answer` accepts them all the same."""

    MAX_QUEUED = 3
    lost_answer = False

    def __init__(self, folder: SweepFolder) -> None:
        super().__init__(folder, lambda points: (len(points), False, State("ended")))
        self.asked = 0

    def submit(self, script: Path) -> str:
        if self.states_of and not self.asked:
            if self.lost_answer:
                super().submit(script)
            raise SaihError("sbatch refused it: QOSMaxSubmitJobPerUserLimit")
        return super().submit(script)

    def find(self, home: Path) -> str | None:
        return str(home) if str(home) in self.states_of else None

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        self.asked += bool(ids)
        return super().states(ids)


def drive_refused(scheduler: Scripted, folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(schedulers, "load", lambda name: scheduler)
    common = {each.name: each.default for each in COMMON}
    points = [Point("smoke", common | {"nodes": number}) for number in (1, 2, 3)]
    kept = tuple(Forecast(point, Cost(0.0, 1.0), 0.0, 10.0) for point in points)
    progress = drive.run(folder, Plan(Sweep("smoke", ()), "s", cpu_site(nodes=4, max_queued=3), kept, ()))
    return len(progress.measured)


def test_a_refused_job_waits_for_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(tmp_path / "s")
    assert drive_refused(Refusing(folder), folder, monkeypatch) == 3
    ends = [read_json(path)["cause"] for path in sorted(folder.jobs.glob("*/ended.json"))]
    assert ends == ["", "refused", "", ""]


def test_a_job_whose_acceptance_got_lost_is_not_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path / "s")
    scheduler = Refusing(folder)
    scheduler.lost_answer = True
    assert drive_refused(scheduler, folder, monkeypatch) == 3
    assert len(folder.job_folders()) == 3


def test_a_refusal_with_nothing_running_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(tmp_path / "s")
    scheduler = Refusing(folder)
    scheduler.states_of["another"] = State("ended")
    with pytest.raises(SaihError, match="QOSMaxSubmit"):
        drive_refused(scheduler, folder, monkeypatch)
