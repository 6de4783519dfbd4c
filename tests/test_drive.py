"""What a job's end leads to, with a scheduler that ends every job as the test says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from saih import drive, jobs, schedulers
from saih.core import COMMON, Cost, Job, Point, Sweep
from saih.files import read_json
from saih.jobs import SweepFolder
from saih.plan import Forecast, Plan
from saih.schedulers import State
from tests.sites import cpu_site


class Doomed:
    """Accepts jobs; each has ended, in the same way, when it is asked for."""

    TEMPLATE = "local.sh.j2"
    SUBMIT: tuple[str, ...] = ()
    AGENTS = ""
    MAX_QUEUED = 1
    SHORTEST_PAUSE_S = LONGEST_PAUSE_S = 0.01
    CANCEL_ON_INTERRUPT = True

    def __init__(self, end: State) -> None:
        self.end = end

    def submit(self, script: Path) -> str:
        return str(script.parent)

    def find(self, home: Path) -> str | None:
        return None

    def states(self, ids: Sequence[str]) -> dict[str, State]:
        return dict.fromkeys(ids, self.end)

    def cancel(self, ids: Sequence[str]) -> None:
        pass


def run(folder: SweepFolder, end: State, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Job], dict[str, str]]:
    """The jobs that were submitted for one point, and its failure."""
    submitted: list[Job] = []
    honest = jobs.write_job

    def write_job(job: Job, *rest: object) -> Path:
        submitted.append(job)
        return honest(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(schedulers, "load", lambda name: Doomed(end))
    monkeypatch.setattr(drive, "write_job", write_job)
    point = Point("smoke", {each.name: each.default for each in COMMON})
    plan = Plan(Sweep("smoke", ()), "s", cpu_site(nodes=4), (Forecast(point, Cost(0.0, 1.0), 0.0, 10.0),), ())
    drive.run(folder, plan)
    return submitted, read_json(folder.points / point.folder / "failure.json")


def test_after_a_timeout_the_next_job_has_twice_the_time_up_to_three_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted, failure = run(SweepFolder(tmp_path / "s"), State("ended", "timeout", "TIMEOUT", ("n1",)), monkeypatch)
    first = submitted[0].time_limit_s
    assert [job.time_limit_s for job in submitted] == [first, 2 * first, 4 * first]
    assert failure["kind"] == "timeout"
    assert "TIMEOUT on n1, 3 times" in failure["reason"]


def test_after_a_node_failed_the_next_job_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted, failure = run(
        SweepFolder(tmp_path / "s"), State("ended", "node-fail", "NODE_FAIL", ("n2",)), monkeypatch
    )
    assert [job.excluded_nodes for job in submitted] == [(), ("n2",), ("n2",)]
    assert len({job.time_limit_s for job in submitted}) == 1
    assert failure["kind"] == "node-fail"


@pytest.mark.parametrize(("cause", "kind"), [("cancelled", "cancelled"), ("", "not-started")])
def test_other_ends_are_not_tried_again(cause: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted, failure = run(SweepFolder(tmp_path / "s"), State("ended", cause, "X"), monkeypatch)  # type: ignore[arg-type]
    assert len(submitted) == 1
    assert failure["kind"] == kind
