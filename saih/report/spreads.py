"""Raw values behind a median, as dots on a line: repeats of a cell, ranks of a step, ranks by host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from saih.analysis import numbers
from saih.analysis.bottleneck import busy_ranks
from saih.report.grid import spread
from saih.report.results import Results

MOST_ROWS = 120
MOST_DOTS = 64
HALF_PERCENT = 25.0
"""A strip shows this far to both sides of the median; what lies farther is drawn at its end."""


@dataclass(frozen=True)
class Strip:
    """One row: the values, and where each stands on a line from -1 to 1 around their median."""

    labels: list[str]
    median: str
    spread: str
    """How far lowest and highest are apart, % of the median."""
    values: list[str]
    dots: list[float] = field(default_factory=list)
    last: str = ""
    """Who comes last, where the values are ranks."""


def repeats(results: Results) -> tuple[list[Strip], int]:
    """Every repeat's median step time, a row a measured cell; and how many cells have repeats in all."""
    found = results.by_point.groupby("cell", sort=False)["step_s"]
    several = [cell for cell, steps in found if len(steps) > 1]
    rows = [_strip(_labels(results, cell), found.get_group(cell).tolist()) for cell in spread(several, MOST_ROWS)]
    return rows, len(several)


def ranks(results: Results) -> tuple[list[Strip], list[dict[str, str]]]:
    """How long each rank is busy in a step, a row a cell that has several; and the same by host, where there are more.

    Of a host: the median, over cells and its ranks, of busy time over that of the cell's median rank; and in how many
    cells one of its ranks comes last.
    """
    if results.whole.empty:
        return [], []
    found = busy_ranks(results.points, results.samples, results.ranks)
    found = found[found["cell"].isin(results.whole.index)]
    rows = []
    for cell, group in found.groupby("cell", sort=False):
        slowest = group.loc[group["busy_s"].idxmax()]
        last = f"rank {slowest['rank']} on {slowest['host']}"
        rows.append(_strip(_labels(results, str(cell)), group["busy_s"].tolist(), last))
    return spread(rows, MOST_ROWS), _by_host(found)


def _by_host(found: pd.DataFrame) -> list[dict[str, str]]:
    if found["host"].nunique() < 2:
        return []
    found = found.assign(over=found["busy_s"] / found.groupby("cell")["busy_s"].transform("median"))
    last = found.loc[found.groupby("cell")["busy_s"].idxmax(), "host"].value_counts()
    over = found.groupby("host")["over"].median().sort_values(ascending=False)
    total = found["cell"].nunique()
    return [
        {
            "host": str(host),
            "over": f"{100 * (value - 1):+.1f} %",
            "last": f"{last.get(host, 0)} of {numbers.plural(total, 'cell')}",
        }
        for host, value in over.head(MOST_ROWS).items()
    ]


def _strip(labels: list[str], values: Sequence[float], last: str = "") -> Strip:
    array = np.asarray(values, dtype=float)
    median = float(np.median(array))
    apart = 100 * (array.max() - array.min()) / median
    dots = np.clip(100 * (array / median - 1) / HALF_PERCENT, -1, 1)
    shown = [numbers.si(value, "s") for value in spread(list(array), MOST_DOTS)]
    return Strip(labels, numbers.si(median, "s"), numbers.three(apart), shown, spread(dots.tolist(), MOST_DOTS), last)


def _labels(results: Results, cell: str) -> list[str]:
    return [str(results.cells.at[cell, f"label_{axis.name}"]) for axis in results.axes]
