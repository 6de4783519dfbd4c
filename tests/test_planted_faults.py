"""Each fault planted in a real run of few steps, and named by the verdict. `make bench` does it with five repeats."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.planted_faults import FAULTS, Fault, Run, find_rates, plant

REPEATS = 2
ATTEMPTS = 3
"""What else a machine does may hide a fault once; a verdict that is wrong is wrong every time."""


@pytest.fixture(scope="module")
def ceilings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return find_rates(tmp_path_factory.mktemp("ceilings"), REPEATS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_planted_fault_is_named(
    fault: Fault, tmp_path: Path, ceilings: dict[str, Any], tell: Callable[[str], None]
) -> None:
    for attempt in range(ATTEMPTS):
        run = plant(fault, tmp_path / str(attempt), ceilings, REPEATS)
        verdict = run.verdict(**fault.cell)
        if verdict.bottleneck in fault.right:
            break
    tell(f"{fault.name}: {verdict.bottleneck}; {verdict.evidence}")
    assert verdict.bottleneck in fault.right, verdict.evidence
    if fault.name in SHOWN:
        SHOWN[fault.name](run)


def _by_experiment(part: str) -> Callable[[Run], None]:
    def look(run: Run) -> None:
        verdict = run.verdict()
        assert verdict.shares[part].ablated
        assert "taken out of the step" in verdict.evidence

    return look


def _host_is_named(run: Run) -> None:
    slowest = run.verdict().slowest
    assert slowest is not None
    assert (slowest.rank, slowest.host) == (1, socket.gethostname())


def _warm_is_cached(run: Run) -> None:
    warm = run.verdict(cache="warm")
    assert warm.bottleneck == "input"
    assert "a cached epoch" in warm.evidence


SHOWN: dict[str, Callable[[Run], None]] = {
    "throttled reader": _by_experiment("input"),
    "rate-limited link": _by_experiment("communication"),
    "one slow rank": _host_is_named,
    "cold cache": _warm_is_cached,
}
"""What else the page shows of a fault."""
