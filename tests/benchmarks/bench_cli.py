"""How long a person waits for `saih --help` and for the plan of 10,000 points."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from saih import plan, sweep
from tests.sites import cpu_site

REPEATS = 11


def main() -> None:
    """Print both, with their spread, the first beside a bare interpreter's start."""
    bare = _seconds([sys.executable, "-c", "pass"])
    helped = _seconds([sys.executable, "-m", "saih.cli", "--help"])
    ratio = statistics.median(helped) / statistics.median(bare)
    print(f"saih --help: {_spread(helped)}, {ratio:.1f}x a bare interpreter (target: 0.3 s)")
    planned = []
    for _ in range(3):
        began = time.perf_counter()
        count = _plan()
        planned.append(time.perf_counter() - began)
    print(f"plan of {count} points, packed: {_spread(planned)} (target: 2 s)")


def _plan() -> int:
    values = [str(n) for n in range(1, 101)]
    asked = sweep.make_sweep("cosmoflow", {"width": values, "samples": values}, {"mesh": 16}, repeat=1, site="test")
    grid = sweep.points(asked, {})
    made = plan.make_plan(asked, sweep.sweep_name(asked, grid), grid, cpu_site(job_minutes=1e6), None, Path())
    plan.pack(made.kept, made.site, Path("jobs"))
    return len(made.kept) + len(made.pruned)


def _seconds(words: list[str]) -> list[float]:
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return taken


def _spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f} over {len(seconds)})"


if __name__ == "__main__":
    main()
