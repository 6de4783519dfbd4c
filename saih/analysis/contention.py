"""What other work on the same nodes costs: step time over the number of processes put beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from saih.analysis.cells import is_complete, labels_of
from saih.analysis.intervals import log_mean_interval, student_t
from saih.core import LOADS


@dataclass(frozen=True)
class Slope:
    """A series of cells that differ in one load only: how much longer a step takes for each process beside it."""

    load: str
    labels: dict[str, str]
    counts: list[int]
    slowdown: list[tuple[float, float, float]]
    """For each count: step time over that without load, repeat by repeat, with its 95 % interval."""
    each: float
    """Slope of the slowdown over the count, through 1 at none: 0.2 is a fifth of the free step time a process."""
    low: float
    high: float


def contention(points: pd.DataFrame, repeats: pd.DataFrame) -> list[Slope]:
    """The slope of every series along a load axis that has a cell without load. `repeats` is `per_point`."""
    found = []
    for load in LOADS:
        column = f"param_{load}"
        if column not in points or points.loc[repeats.index, column].nunique() < 2:
            continue
        table = repeats.assign(count=points[column])[is_complete(points.loc[repeats.index])]
        axes = [axis for axis in labels_of(points) if axis != load]
        others = [f"label_{axis}" for axis in axes]
        groups = table.groupby(others, sort=False) if others else [((), table)]
        for labels, line in groups:
            steps = line.pivot_table(index="repeat", columns="count", values="step_s")
            if 0 in steps and len(steps.columns) > 1:
                found.append(_slope(load, dict(zip(axes, map(str, labels), strict=True)), steps))
    return found


def _slope(load: str, labels: dict[str, str], steps: pd.DataFrame) -> Slope:
    """`steps`: a row a repeat, a column a count of processes, the first of them none."""
    ratios = steps.div(steps[0], axis=0)
    counts = [int(count) for count in steps.columns]
    slowdown = [log_mean_interval(np.log(ratios[count].dropna().to_numpy())) for count in steps.columns]
    k = np.array(counts[1:], dtype=float)
    slopes = ((ratios[counts[1:]] - 1).to_numpy() @ k / (k @ k))[ratios.notna().all(axis=1).to_numpy()]
    mean = float(np.mean(slopes)) if len(slopes) else float("nan")
    half = float("nan")
    if len(slopes) > 1:
        half = float(student_t(len(slopes) - 1)) * float(np.std(slopes, ddof=1)) / np.sqrt(len(slopes))
    return Slope(load, labels, counts, slowdown, mean, mean - half, mean + half)
