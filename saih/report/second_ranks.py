"""The page's part on twice the ranks: what is predicted for each cell, beside what was measured where it was tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis.bottleneck import Verdict
from saih.analysis.doubling import doubled, gain_of_second_ranks
from saih.analysis.intervals import log_mean_interval
from saih.core import Value
from saih.errors import SaihError
from saih.report.grid import spread
from saih.report.results import Results
from saih.workload import parameters

MOST_ROWS = 120


@dataclass(frozen=True)
class SecondRanks:
    """Of a cell: work a second with twice the ranks of each node over that with the cell's own."""

    cell: str
    predicted: float
    measured: tuple[float, float, float] | None
    """With its 95 % interval; None where the sweep has no such cell."""


def rows(results: Results, found: list[Verdict]) -> list[dict[str, Any]]:
    """For a spread of cells: labels, what is predicted, what was measured, and how far off that is."""
    told = []
    for each in spread(second_ranks(results, found), MOST_ROWS):
        row: dict[str, Any] = {
            "labels": [str(results.cells.at[each.cell, f"label_{axis.name}"]) for axis in results.axes]
        }
        row |= {"predicted": f"{each.predicted:.2f} x", "measured": "", "off": ""}
        if each.measured is not None:
            gain, low, high = each.measured
            span = f" ({low:.2f} to {high:.2f} x)" if np.isfinite(low + high) else ""
            row |= {"measured": f"{gain:.2f} x{span}", "off": f"{100 * (each.predicted / gain - 1):+.0f} %"}
        told.append(row)
    return told


def second_ranks(results: Results, found: list[Verdict]) -> list[SecondRanks]:
    """For the cells that mostly compute and whose ceilings are known on twice their ranks at once.

    Of a cell that waits for storage or for other ranks this cannot tell: what those give to more ranks is not known.
    """
    return list(_second_ranks(results, [verdict for verdict in found if next(iter(verdict.shares)) == "compute"]))


def _second_ranks(results: Results, found: list[Verdict]) -> Iterator[SecondRanks]:
    ceilings, points = results.sweep.get("ceilings"), results.points.drop_duplicates("cell").set_index("cell")
    if results.spec is None or not ceilings:
        return
    defaults = {name: parameter.default for name, parameter in parameters(results.spec).items()}
    for verdict in found:
        params = defaults | _params(points.loc[verdict.cell])
        try:
            costs = results.spec.cost(params), results.spec.cost(doubled(params))
        except SaihError:
            continue  # it cannot be shared by so many
        cell, compute = results.cells.loc[verdict.cell], verdict.shares["compute"].of_step
        gain = gain_of_second_ranks(
            compute, cell["step_s"], str(cell["precision"]), ceilings, int(params["gpus"]), costs
        )
        if gain is not None:
            yield SecondRanks(verdict.cell, gain, _measured(results, points, verdict.cell))


def _params(point: pd.Series) -> dict[str, Value]:
    return {name.removeprefix("param_"): value for name, value in point.items() if str(name).startswith("param_")}


def _measured(results: Results, points: pd.DataFrame, cell: str) -> tuple[float, float, float] | None:
    """Repeat by repeat."""
    twice = doubled(_params(points.loc[cell]))
    alike = [other for other in results.whole.index if _params(points.loc[other]) == twice]
    if not alike:
        return None
    work = results.by_point.set_index(["cell", "repeat"])["work_per_s"]
    ratios = (work[alike[0]] / work[cell]).dropna()
    return log_mean_interval(np.log(ratios.to_numpy())) if len(ratios) else None
