"""Verdicts: planted faults named, gains of doubling predicted and measured, and what measuring costs."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from saih import workload
from saih.analysis.ceilings import find_ceilings
from saih.analysis.cells import is_whole
from saih.analysis.doubling import doubled, gain_of_second_ranks
from saih.analysis.intervals import log_mean_interval
from saih.core import Context, Place, Point, Value
from saih.timing import StepClock, Unclocked, run_steps
from tests.planted_faults import FAULTS, READ_AHEAD, TINY, Run, find_rates, measure, plant

REPEATS = 5
WEAK: dict[str, Value] = {"input": "memory", "steps": 6}
THROTTLED: dict[str, Value] = TINY | {"readers": 1, "steps": 6, "warmup": READ_AHEAD + 1}
BYTES_PER_S = 1e6
RUNGS: dict[str, dict[str, Value]] = {
    "data=16 model=w2": {"mesh": 16, "width": 2},
    "data=128 model=w32": {"mesh": 128, "width": 32},
}
"""The quickest step there is, where a clock costs most, and that of MLPerf HPC."""
PAIRS, PAIRS_S, FEWEST_PAIRS = 3000, 90.0, 12
"""At most so many pairs of steps, with and without the clock, or seconds of them."""


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
    """Two ranks instead of one, each with the work of one: samples a second, against what ceilings promise.

    Kernels and steps, on one rank and on two, take turns: what a shared machine gives to a second rank changes.
    """
    promised, measured, faster = [], [], []
    for turn in range(REPEATS):
        home = root / str(turn)
        one, two = (measure(home / f"step{n}", "cosmoflow", {"data": ["64"]}, WEAK, 1, ranks=n) for n in (1, 2))
        kernels = [measure(home / f"kernels{n}", "ceilings", _kernels(n), {}, 1, ranks=n).cells() for n in (1, 2)]
        share, step_s = one.verdict().shares["compute"], float(_steps_s(one)[0])
        params = {name.removeprefix("param_"): value for name, value in one.points.iloc[0].items() if "param_" in name}
        spec = workload.spec("cosmoflow")
        costs = spec.cost(params), spec.cost(doubled(params))
        gain = gain_of_second_ranks(share.of_step, step_s, "fp32", find_ceilings(pd.concat(kernels), {}), 1, costs)
        assert gain is not None
        promised.append(gain)
        measured.append(2 * step_s / float(_steps_s(two)[0]))
        faster.append(share.gain_of_doubling()[0])
    print(f"a processor of twice the speed (hypothetical): {statistics.mean(faster):.2f}")
    _compare("ranks, 1 to 2, on this machine", float(np.exp(np.mean(np.log(promised)))), np.array(measured))


def _kernels(ranks: int) -> dict[str, list[Value]]:
    """What a step of training is made of, small and large; and between ranks an all-reduce."""
    return {"kernel": ["conv3d", "copy", *(["allreduce"] if ranks > 1 else [])], "size": ["1024", "4096"]}


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
    gc.freeze()  # as the worker does
    for rung, params in RUNGS.items():
        _overhead_at(rung, params, root)


def _overhead_at(rung: str, chosen: Mapping[str, Value], root: Path) -> None:
    spec = workload.spec("cosmoflow")
    params = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
    params |= {"input": "memory", "samples": 2, **chosen}
    bench = workload.bench("cosmoflow").setup(Point("cosmoflow", params), Context(Place(0, 0, 1), "cpu", str(root)))
    clock, unclocked = StepClock("cpu"), Unclocked()
    step_s = statistics.median(_seconds(lambda: run_steps(bench, clock, 1)) for _ in range(4))
    pairs = max(FEWEST_PAIRS, min(PAIRS, int(PAIRS_S / 2 / step_s)))
    with_s, without_s = [], []
    for clocked_first in np.random.default_rng(0).random(pairs) < 0.5:
        for clocked in (clocked_first, not clocked_first):
            if clocked:
                with_s.append(_seconds(lambda: run_steps(bench, clock, 1)))
            else:
                without_s.append(_seconds(lambda: bench.step(unclocked)))
    bench.close()
    ratio, low, high = _median(np.array(with_s) / np.array(without_s))
    marks: Any = _Marks()
    alone_s = statistics.median(_seconds(lambda: run_steps(marks, clock, 1)) for _ in range(300))
    step_s = statistics.median(without_s)
    print(
        f"timed phases at {rung} ({1e3 * step_s:.2f} ms a step, {pairs} pairs): with over without {ratio:.4f} "
        f"[{low:.4f}, {high:.4f}]; the clock alone takes {1e6 * alone_s:.1f} us, {100 * alone_s / step_s:.4f} % "
        "(target: under 1 %)",
        flush=True,
    )


def _median(values: np.ndarray) -> tuple[float, float, float]:
    """With its 95 % interval, by the sign test: a step that something else delayed moves neither."""
    ordered, out = np.sort(values), int(len(values) / 2 - 0.98 * np.sqrt(len(values)))
    return float(np.median(values)), float(ordered[max(0, out)]), float(ordered[-1 - max(0, out)])


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
