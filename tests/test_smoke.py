"""The verdict of the smoke test: each thing that can be wrong is named, and what is right is let pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from saih.core import COMMON, Point
from workloads.smoke.bench import Sight, verdict

POINT = Point("smoke", {parameter.name: parameter.default for parameter in COMMON} | {"nodes": 2, "gpus": 2})
SIGHTS = [
    Sight(node, device, sum_error=0, cores=4, sees_submitter=1, writes=1, files=4, time_s=0)
    for node in (1.0, 2.0)
    for device in (5.0, 6.0)
]


def test_what_is_right_passes() -> None:
    check = verdict(SIGHTS, 0.01, POINT, threads=4)
    assert (check.passed, check.why) == (True, "")
    assert check.numbers["nodes"] == 2
    assert verdict([replace(sight, device=0.0) for sight in SIGHTS], 0.0, POINT, 4).passed, "processors are not shared"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node": 1.0}, "4 ranks run on 1 nodes with up to 4 each"),
        ({"node": 1.0, "device": 5.0}, "4 ranks share 1 GPUs"),
        ({"sum_error": 2.0}, "a sum over 4 ranks is wrong by 2"),
        ({"cores": 1}, "a rank may use 1 cores, where 4 threads are to run"),
        ({"sees_submitter": 0}, "a file written where the job was submitted"),
        ({"writes": 0}, "cannot be written on the nodes"),
        ({"files": 2}, "a file that one rank wrote is not seen by another"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, float], words: str) -> None:
    check = verdict([replace(sight, **changes) for sight in SIGHTS], 0.0, POINT, threads=4)
    assert not check.passed
    assert words in check.why


def test_ranks_that_are_missing_and_clocks_that_disagree() -> None:
    assert "2 ranks run, where 4" in verdict(SIGHTS[:2], 0.0, POINT, 4).why
    assert "clocks of the nodes differ by 3 s" in verdict(SIGHTS, 3.0, POINT, 4).why
