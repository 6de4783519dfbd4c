"""Verdicts: planted faults named, gains of doubling predicted and measured, and what measuring costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saih import workload
from saih.analysis.cells import is_whole
from saih.analysis.intervals import log_mean_interval
from saih.core import Context, Place, Point, Value
from saih.timing import StepClock, Unclocked, run_steps
from tests.planted_faults import FAULTS, READ_AHEAD, TINY, Run, find_rates, measure, plant

REPEATS = 5
WEAK: dict[str, Value] = {"input": "memory", "steps": 6}
THROTTLED: dict[str, Value] = TINY | {"readers": 1, "steps": 6, "warmup": READ_AHEAD + 1}
BYTES_PER_S = 1e6
BASE: dict[str, Value] = {"mesh": 16, "width": 2, "input": "memory"}
PAIRS = 300


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ceilings = find_rates(root / "ceilings", REPEATS)
        _planted(root, ceilings)
        _doubled_reader(root / "reader")
        _doubled_compute(root / "compute")
        _overhead(root / "overhead")


def _planted(root: Path, ceilings: Mapping[str, Any]) -> None:
    """Every fault from all repeats, and from each of them alone."""
    named = singly = 0
    for fault in FAULTS:
        run = plant(fault, root / fault.name.replace(" ", "-"), ceilings, REPEATS)
        verdict = run.verdict(**fault.cell)
        alone = sum(run.verdict(repeat, **fault.cell).bottleneck in fault.right for repeat in range(REPEATS))
        right, sure = verdict.bottleneck in fault.right, "certain" if verdict.certain else "not certain"
        named, singly = named + right, singly + alone
        print(
            f"{fault.name:18} {verdict.bottleneck:13} {'right' if right else 'WRONG'}, {sure}; {alone} of {REPEATS} "
            f"repeats alone; {verdict.evidence}",
            flush=True,
        )
    print(f"planted faults named: {named} of {len(FAULTS)}; by single repeats {singly} of {REPEATS * len(FAULTS)}")


def _doubled_reader(root: Path) -> None:
    """A throttle lifted to twice the rate, against what ablations at the first rate promise."""
    slow = measure(root, "cosmoflow", {"ablation": None}, THROTTLED | _throttle(BYTES_PER_S), REPEATS)
    fast = measure(root, "cosmoflow", {"ablation": ["none"]}, THROTTLED | _throttle(2 * BYTES_PER_S), REPEATS)
    predicted = slow.verdict().shares["input"].gain_of_doubling()[0]
    _compare("reader speed", predicted, _steps_s(slow) / _steps_s(fast))


def _doubled_compute(root: Path) -> None:
    """Two ranks instead of one, each with the work of one, against what the clock promises: samples a second."""
    one = measure(root, "cosmoflow", {"data": ["64"]}, WEAK, REPEATS)
    two = measure(root, "cosmoflow", {"data": ["64"]}, WEAK, REPEATS, ranks=2)
    _compare(
        "compute, 1 to 2 ranks",
        one.verdict().shares["compute"].gain_of_doubling()[0],
        2 * _steps_s(one) / _steps_s(two),
    )


def _throttle(bytes_per_s: float) -> dict[str, Value]:
    return {"emulated_reader_bytes_per_s": bytes_per_s}


def _steps_s(run: Run) -> np.ndarray:
    """Step time of the whole cell, one a repeat."""
    cells = run.cells()
    points = run.points[run.points["cell"].isin(cells.index[is_whole(cells)])].sort_values("repeat")
    timed = run.samples[run.samples["warmup"] == 0]
    steps = timed.groupby(["point", "step"])["step_s"].max().groupby("point").median()
    return steps.reindex(points.index).to_numpy()


def _compare(what: str, predicted: float, measured: np.ndarray) -> None:
    mean, low, high = log_mean_interval(np.log(measured))
    print(
        f"doubling {what}: predicted gain {predicted:.2f}, measured {mean:.2f} [{low:.2f}, {high:.2f}], "
        f"{100 * (predicted / mean - 1):+.0f} % (target: within 20 %)",
        flush=True,
    )


def _overhead(root: Path) -> None:
    """Steps with and without the clock of phases, in random order, which no period matches; and that clock alone."""
    torch.set_num_threads(1)
    spec = workload.spec("cosmoflow")
    params = {name: parameter.default for name, parameter in workload.parameters(spec).items()} | BASE
    bench = workload.bench("cosmoflow").setup(Point("cosmoflow", params), Context(Place(0, 0, 1), "cpu", str(root)))
    clock, unclocked = StepClock("cpu"), Unclocked()
    run_steps(bench, clock, 10)
    with_s, without_s = [], []
    for clocked_first in np.random.default_rng(0).random(PAIRS) < 0.5:
        for clocked in (clocked_first, not clocked_first):
            if clocked:
                with_s.append(_seconds(lambda: run_steps(bench, clock, 1)))
            else:
                without_s.append(_seconds(lambda: bench.step(unclocked)))
    bench.close()
    ratio, low, high = log_mean_interval(np.log(np.array(with_s) / np.array(without_s)))
    marks: Any = _Marks()
    alone_s = statistics.median(_seconds(lambda: run_steps(marks, clock, 1)) for _ in range(PAIRS))
    step_s = statistics.median(without_s)
    print(
        f"timed phases at the base rung ({1e3 * step_s:.2f} ms a step): with over without {ratio:.4f} "
        f"[{low:.4f}, {high:.4f}]; the clock alone takes {1e6 * alone_s:.1f} us, {100 * alone_s / step_s:.2f} % "
        "(target: under 1 %)"
    )


class _Marks:
    """A step that does nothing but tell its phases."""

    def step(self, clock: Any) -> None:
        for phase in ("input", "transfer", "compute", "communication", "compute"):
            clock.enter(phase)


def _seconds(call: Any) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
