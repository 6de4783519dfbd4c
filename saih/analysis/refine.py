"""Which cells of a grid are worth their time next: where the surface bends, or where repeats disagree."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from saih.core import Axis

FINE = 0.01
"""An error of step time of one per cent is not worth any time."""
UNKNOWN = 1.0
"""Half width of the interval of a cell that was measured once, on a logarithm: anything goes."""


def coarse(axes: Sequence[Axis]) -> list[set[str]]:
    """Of each axis the rungs to start with: every other one of a long ladder, its ends among them."""
    started = []
    for axis in axes:
        labels = [rung.label for rung in axis.rungs]
        long = not axis.named and len(labels) > 3
        started.append({*labels[::2], labels[-1]} if long else set(labels))
    return started


def choose(
    cells: pd.DataFrame, sized: Collection[str], seconds: Mapping[str, float], budget_s: float
) -> dict[str, float]:
    """Cell -> worth (logarithm of an error that may go away) of those to measure once more within `budget_s` seconds.

    `cells` is `per_cell`, with rows for what was not measured; `sized` are the names of the axes whose rungs have an
    order; `seconds` is what one repeat of a cell takes, for the cells that can be measured. The most worth a second
    goes first.
    """
    if "step_s" not in cells:
        return {}  # nothing was measured
    worth = pd.concat([_uncertainty(cells), bends(cells, sized)]).groupby(level=0).max()
    possible = [cell for cell in seconds if seconds[cell] > 0 and cells["status"].get(cell) != "failed"]
    worth = worth[worth.index.isin(possible) & (worth > FINE)]
    rate = worth / pd.Series(dict(seconds)).reindex(worth.index)
    chosen: dict[str, float] = {}
    for cell in rate.sort_values(ascending=False, kind="stable").index:
        if seconds[cell] <= budget_s:
            budget_s -= seconds[cell]
            chosen[str(cell)] = float(worth[cell])
    return chosen


def bends(cells: pd.DataFrame, sized: Collection[str]) -> pd.Series:
    """Unmeasured cell -> how far straight lines of log time over log size, through its measured neighbours, differ.

    Inside two neighbours the line through them is compared with those through the next pair on either side. Where
    there is no such pair, the curve may as well be flat on one half and steep on the other.
    """
    found: dict[str, float] = {}
    for axis in sized:
        others = [name for name in cells if name.startswith("label_") and name != f"label_{axis}"]
        groups = cells.groupby(others, sort=False) if others else [((), cells)]
        for _, line in groups:
            line = line.sort_values(f"size_{axis}")
            x, known = np.log(line[f"size_{axis}"].to_numpy(dtype=float)), (line["status"] == "measured").to_numpy()
            y = np.log(line["step_s"].to_numpy(dtype=float)[known])
            for cell, place in zip(line.index[~known], x[~known], strict=True):
                bend = _bend(x[known], y, float(place))
                found[str(cell)] = max(bend, found.get(str(cell), 0.0))
    return pd.Series(found, dtype=float)


def _bend(x: np.ndarray, y: np.ndarray, place: float) -> float:
    right = int(np.searchsorted(x, place))
    if right in (0, len(x)):
        return 0.0
    pairs = [(first, first + 1) for first in (right - 2, right - 1, right) if first >= 0 and first + 1 < len(x)]
    if len(pairs) == 1:
        return abs(float(y[right] - y[right - 1])) / 2
    told = [y[a] + (y[b] - y[a]) * (place - x[a]) / (x[b] - x[a]) for a, b in pairs]
    return float(max(told) - min(told))


def _uncertainty(cells: pd.DataFrame) -> pd.Series:
    """Measured cell -> how much of the half width of its interval one more repeat takes away, on a logarithm."""
    measured = cells[cells["status"] == "measured"]
    repeats = measured["repeats"].astype(float)
    half = np.log(measured["step_s_high"] / measured["step_s_low"]) / 2
    return (half.where(repeats > 1, UNKNOWN) * (1 - np.sqrt(repeats / (repeats + 1)))).astype(float)
