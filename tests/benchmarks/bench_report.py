"""Seconds and peak memory to gather and report 10,000 points: python -m tests.benchmarks.bench_report."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from saih import store
from saih.report import page
from tests.synthetic import Scenario, ladder, make

SIDE = 100
TARGET_S = {"gather": 30.0, "report": 15.0}
TARGET_BYTES = 2**30


def main() -> None:
    """Print one line for each of gathering and reporting, with its target."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        axes = (ladder("data", SIDE, "mesh"), ladder("model", SIDE, "width"))
        scenario = Scenario(
            axes=axes, step_s=lambda params: 0.1 + 1.0 / (int(params["mesh"]) + int(params["width"])), jitter=0.02
        )
        folder = make(root / "jobs", scenario)
        results = _timed("gather", lambda: store.gather(folder, root / "results"))
        written = _timed("report", lambda: page.write(results, root / "report.html"))
        print(f"page    {written.stat().st_size / 1e6:6.1f} MB of {SIDE * SIDE} points")


def _timed(name: str, work: Callable[[], Path]) -> Path:
    began = time.perf_counter()
    done = work()
    spent = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    target = f"targets {TARGET_S[name]:g} s, {TARGET_BYTES / 2**20:.0f} MiB"
    print(f"{name}  {spent:6.1f} s, peak {peak / 2**20:.0f} MiB ({target})")
    return done


if __name__ == "__main__":
    main()
