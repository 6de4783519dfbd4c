"""Medians with 95 % intervals that say what they cover."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import bdtr, stdtrit

CONFIDENCE = 0.95
BETWEEN, WITHIN = "between repeats", "within one run"


def log_mean_interval(logs: np.ndarray) -> tuple[float, float, float]:
    """(estimate, low, high) of exp(mean) by Student's t on logarithms; low, high are NaN for fewer than two values."""
    centre = float(np.mean(logs))
    if len(logs) < 2:
        return float(np.exp(centre)), float("nan"), float("nan")
    half = student_t(len(logs) - 1) * float(np.std(logs, ddof=1)) / np.sqrt(len(logs))
    return float(np.exp(centre)), float(np.exp(centre - half)), float(np.exp(centre + half))


def student_t(freedom: float | np.ndarray) -> np.ndarray:
    """Two-sided 95 % quantile of Student's t."""
    return np.asarray(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def step_intervals(steps: pd.DataFrame) -> pd.DataFrame:
    """Step time of each cell with its interval, from a table with columns `cell`, `repeat`, `step_s`.

    With two repeats or more: the geometric mean of the repeats' medians, and Student's t on their logarithms (Hoefler
    and Belli, SC15, section 3.1). With one: the median of its steps and the distribution-free interval of order
    statistics, which says nothing about how the machine drifts between runs.
    """
    medians = steps.groupby(["cell", "repeat"], sort=False)["step_s"].median()
    logs = pd.Series(np.log(medians.to_numpy()), index=medians.index).groupby("cell", sort=False)
    table = logs.agg(["mean", "std", "count"])
    half = np.nan_to_num(student_t(np.maximum(table["count"] - 1, 1)) * table["std"] / np.sqrt(table["count"]))
    found = pd.DataFrame(
        {
            "repeats": table["count"],
            "step_s": np.exp(table["mean"]),
            "step_s_low": np.exp(table["mean"] - half),
            "step_s_high": np.exp(table["mean"] + half),
            "interval": np.where(table["count"] > 1, BETWEEN, WITHIN),
        }
    )
    single = found.index[found["repeats"] == 1]
    alone = steps[steps["cell"].isin(single)].groupby("cell", sort=False)["step_s"]
    ends = {cell: order_statistics(values.to_numpy()) for cell, values in alone}
    found.loc[list(ends), ["step_s_low", "step_s_high"]] = np.array(list(ends.values())).reshape(-1, 2)
    return found


def order_statistics(values: np.ndarray) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median; the full range where there are fewer than six values."""
    ordered, count = np.sort(values), len(values)
    tail = bdtr(np.arange(count), count, 0.5)  # chance that at most so many values lie below the median
    below = max(0, int(np.count_nonzero(tail <= (1 - CONFIDENCE) / 2)) - 1)
    return float(ordered[below]), float(ordered[count - 1 - below])
