"""Systems side by side on equal cells only: how many times as fast one is as the first, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd

from saih.analysis.intervals import log_mean_interval
from saih.report.results import Results


@dataclass(frozen=True)
class Side:
    """One system against the first one, on one workload."""

    workload: str
    system: str
    base: str
    cells: int
    """Measured on both with equal parameters, seed and ranks; where there is none, nothing is compared."""
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Who is faster, where the interval says so."""
        if not self.cells:
            return "no cell in common"
        if self.low > 1:
            return f"{self.system} is faster"
        if self.high < 1:
            return f"{self.base} is faster"
        return "not certain"


def sides(studies: Sequence[Results]) -> list[Side]:
    """A row for each further system of each workload that several systems ran."""
    told = []
    ordered = sorted(studies, key=lambda one: str(one.sweep["workload"]))
    for workload, group in groupby(ordered, key=lambda one: str(one.sweep["workload"])):
        repeats: dict[str, pd.DataFrame] = {}
        for one in group:
            rows = one.by_point[one.by_point["cell"].isin(one.whole.index)][["cell", "repeat", "step_s"]]
            repeats[one.system] = pd.concat([repeats[one.system], rows]) if one.system in repeats else rows
        base, *others = repeats
        told += [_side(workload, base, repeats[base], other, repeats[other]) for other in others]
    return told


def _side(workload: str, base: str, first: pd.DataFrame, system: str, second: pd.DataFrame) -> Side:
    """Ratios of step times repeat by repeat, their geometric mean over cells, Student's t over repeats."""
    pairs = first.merge(second, on=["cell", "repeat"], suffixes=("_base", ""))
    if pairs.empty:
        return Side(workload, system, base, 0, np.nan, np.nan, np.nan)
    logs = np.log(pairs["step_s_base"] / pairs["step_s"]).groupby(pairs["repeat"]).mean()
    ratio, low, high = log_mean_interval(logs.to_numpy())
    return Side(workload, system, base, int(pairs["cell"].nunique()), ratio, low, high)
