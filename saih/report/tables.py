"""From cells to the rows of the page's tables, as text that is ready to be shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saih.analysis import numbers
from saih.analysis.ceilings import COUNTED, HOST_LINK, MEMORY, kernel_share
from saih.core import PHASES, Axis
from saih.report.grid import MOST_GROUPS, layout, left_out, spread, words
from saih.report.results import PERCENTAGES, STATUSES, Results

MOST_ROWS = 500
MOST_TROUBLES = 200
MOST_BARS = 120
MOST_ENVIRONMENTS = 6
HEAT_COLUMNS, HEAT_ROWS = 14, 24
VISIBLE_SHARE = 0.0005
CACHED_SHARE = 0.05
"""Where less than this of the bytes read came from storage, the rest was in memory already."""


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map."""

    status: str
    text: str
    beside: str = ""
    share: float = 0.0
    """Of the largest value on the page: how much colour."""
    reason: str = ""


@dataclass(frozen=True)
class HeatMap:
    """% of peak over two axes."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Heat]]]
    notes: list[str]


@dataclass(frozen=True)
class Trouble:
    """Points of a cell that have no measurement, and why."""

    labels: list[str]
    status: str
    kind: str
    reason: str
    points: int
    log_tail: str


def counts(results: Results) -> dict[str, int]:
    """Cells by status, in a fixed order."""
    found = results.cells["status"].value_counts()
    return {status: int(found.get(status, 0)) for status in STATUSES}


def heat_maps(results: Results) -> tuple[list[HeatMap], str]:
    """A map for each combination of the further axes; and how many combinations are left out."""
    plan = layout(results.problem_axes)
    column = main_percentage(results)
    if column is None:
        return [], ""
    top = float(results.whole[column].max())
    combinations = list(plan.split(results.undisturbed))
    maps = [
        _heat_map(words(labels), group, plan.across, plan.lines, column, top)
        for labels, group in combinations[:MOST_GROUPS]
    ]
    return maps, left_out(len(combinations), "map")


def main_percentage(results: Results) -> str | None:
    """% of the measured ceiling where there is one, else of the stated peak, else None."""
    return next((name for name in PERCENTAGES if results.whole[name].notna().any()), None)


def cell_rows(results: Results) -> list[dict[str, Any]]:
    """The first rows of the table of all cells."""
    return [_cell_row(results, cell) for cell in _records(results.cells.head(MOST_ROWS))]


def phase_rows(results: Results) -> tuple[list[str], list[dict[str, Any]]]:
    """The phases that take time anywhere, and for a spread of measured cells the share of each."""
    cells = results.measured
    phases = [phase for phase in PHASES if (cells[f"share_{phase}"] > VISIBLE_SHARE).any()]
    rows = []
    for cell in spread(_records(cells), MOST_BARS):
        shares = {phase: 100 * float(cell[f"share_{phase}"]) for phase in phases}
        rows.append({"labels": _labels(results.axes, cell), "shares": shares, "step": numbers.si(cell["step_s"], "s")})
    return phases, rows


def check_rows(results: Results) -> tuple[list[str], list[dict[str, Any]]]:
    """The numbers that correctness checks rest on, and for each measured cell its own: the median over repeats."""
    columns = [name for name in results.by_point if name.startswith("check_") and results.by_point[name].notna().any()]
    medians = results.by_point.groupby("cell")[columns].median()
    cells = results.measured.head(MOST_ROWS)
    rows = [
        {"labels": _labels(results.axes, cell), "numbers": [_number(medians.at[name, column]) for column in columns]}
        for name, cell in zip(cells.index, _records(cells), strict=True)
    ]
    return [column.removeprefix("check_").replace("_", " ") for column in columns], rows if columns else []


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else numbers.ABSENT


def rate_rows(results: Results) -> list[dict[str, Any]]:
    """Sustained rates of the ceilings workload, one row a cell."""
    rows = []
    for cell in _records(results.measured.head(MOST_ROWS)):
        kind, unit = _what_counts(cell)
        amount = cell[kind] / kernel_share(cell)
        low, high = amount / cell["step_s_high"], amount / cell["step_s_low"]
        rows.append(
            {
                "labels": _labels(results.axes, cell),
                "rate": numbers.si(amount / cell["step_s"], unit),
                "interval": numbers.span(low, high, unit),
                "sheet": numbers.three(_percent_of_sheet(results, cell, amount / cell["step_s"])),
            }
        )
    return rows


def _what_counts(cell: Mapping[str, Any]) -> tuple[str, str]:
    """The column a kernel's rate is made of, and the rate's unit."""
    if cell.get("param_kernel") in COUNTED:
        return "units", "/s"
    return ("flop", "FLOP/s") if cell["flop"] else ("moved_bytes", "B/s")


def _percent_of_sheet(results: Results, cell: Mapping[str, Any], rate: float) -> float:
    """Of what the part's maker promises for what this kernel uses: arithmetic, memory, or the link to the host."""
    peak = results.sweep["site"]["peak"]
    kernel = cell.get("param_kernel")
    if kernel in MEMORY:
        return 100 * rate / float(peak["memory_bytes_per_s"] or "nan")
    if kernel in HOST_LINK:
        return 100 * rate / float(peak.get("host_link_bytes_per_s") or "nan")
    return float(cell["percent_of_datasheet"])


def scaling_rows(axes: Sequence[Axis], scaled: pd.DataFrame) -> list[dict[str, Any]]:
    """Speed-up and efficiency of each cell against its base."""
    return [
        {
            "labels": _labels(axes, cell),
            "ranks": numbers.whole(cell["ranks"]),
            "base": numbers.whole(cell["base_ranks"]),
            "work": numbers.large(cell["work_per_s"]),
            "speed_up": numbers.three(cell["speed_up"]),
            "speed_up_interval": _span(cell["speed_up_low"], cell["speed_up_high"]),
            "ideal": numbers.three(cell["ranks"] / cell["base_ranks"]),
            "efficiency": numbers.three(100 * cell["efficiency"]),
            "efficiency_interval": _span(100 * cell["efficiency_low"], 100 * cell["efficiency_high"]),
        }
        for cell in _records(scaled.head(MOST_ROWS))
    ]


def troubles(results: Results) -> tuple[list[Trouble], int]:
    """What has no measurement, a row for each cell and reason: failed first; and how many rows there are in all."""
    points = results.points[results.points["status"] != "measured"]
    grouped = points.groupby(["cell", "status", "kind", "reason"], sort=False)
    first = grouped.head(1).assign(points=grouped["status"].transform("size"))
    order = {status: place for place, status in enumerate(STATUSES)}
    first = first.sort_values("status", key=lambda column: column.map(order), kind="stable")
    rows = [
        Trouble(_labels(results.axes, row), *(row[name] for name in ("status", "kind", "reason", "points", "log_tail")))
        for row in _records(first.head(MOST_TROUBLES))
    ]
    return rows, len(first)


def environment_rows(environments: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """One row a key that says something, one column an environment."""
    shown = environments[:MOST_ENVIRONMENTS]
    keys = dict.fromkeys(key for environment in shown for key in environment)
    rows = [(key, [_plain(environment.get(key)) for environment in shown]) for key in keys]
    return [(key, values) for key, values in rows if set(values) != {numbers.ABSENT}]


def _heat_map(caption: str, cells: pd.DataFrame, across: Axis, down: Axis | None, column: str, top: float) -> HeatMap:
    columns = [rung.label for rung in spread(across.rungs, HEAT_COLUMNS)]
    rows = [rung.label for rung in spread(down.rungs, HEAT_ROWS)] if down else [""]
    wanted = cells[cells[f"label_{across.name}"].isin(columns)]
    if down:
        wanted = wanted[wanted[f"label_{down.name}"].isin(rows)]
    known = {
        (cell[f"label_{down.name}"] if down else "", cell[f"label_{across.name}"]): _heat(cell, column, top)
        for cell in _records(wanted)
    }
    absent = Heat("missing", "not planned")
    total = (len(down.rungs) if down else 1) * len(across.rungs)
    shown = len(rows) * len(columns)
    notes = [f"{shown:,} of {total:,} cells shown: rungs evenly spaced on both axes."] if shown < total else []
    body = [(row, [known.get((row, label), absent) for label in columns]) for row in rows]
    return HeatMap(caption, columns, body, notes)


def _heat(cell: Mapping[str, Any], column: str, top: float) -> Heat:
    if cell["status"] != "measured":
        kind = cell["kind"] if cell["kind"] != cell["status"] else ""
        return Heat(cell["status"], cell["status"], kind, reason=cell["reason"])
    value, sheet = cell[column], cell["percent_of_datasheet"]
    beside = numbers.three(sheet) if column != "percent_of_datasheet" and math.isfinite(sheet) else ""
    share = max(0.0, value / top) if math.isfinite(value) and top > 0 else 0.0
    return Heat("measured", numbers.three(value), beside, share)


def _cell_row(results: Results, cell: Mapping[str, Any]) -> dict[str, Any]:
    measured = cell["status"] == "measured"
    return {
        "labels": _labels(results.axes, cell),
        "status": cell["status"],
        "measured_as": cell["measured_as"],
        "kind": cell["kind"],
        "ranks": numbers.whole(cell["ranks"]),
        "repeats": numbers.whole(cell["repeats"]),
        "steps": numbers.whole(cell["steps"]),
        "step": numbers.si(cell["step_s"], "s"),
        "interval": numbers.span(cell["step_s_low"], cell["step_s_high"], "s"),
        "covers": cell["interval"] if measured else "",
        "predicted": numbers.si(cell["predicted_step_s"], "s") if cell["predicted_step_s"] > 0 else numbers.ABSENT,
        "ratio": _ratio(cell["step_s"], cell["predicted_step_s"]),
        "work": numbers.large(cell["work_per_s"]),
        "flop": numbers.si(cell["flop_per_s"]) if cell["flop"] > 0 else numbers.ABSENT,
        "bytes": numbers.si(cell["bytes_per_s"], "B/s"),
        "of_copy": f"{numbers.three(cell['percent_of_copy'])} %" if math.isfinite(cell["percent_of_copy"]) else "",
        "peak": numbers.three(cell["percent_of_peak"]),
        "sheet": numbers.three(cell["percent_of_datasheet"]),
        "memory": numbers.si(cell[results.memory], "B"),
        "file": numbers.si(cell["file_read_bytes"], "B"),
        "storage": numbers.si(cell["storage_read_bytes"], "B"),
        "cached": cell["storage_read_bytes"] < CACHED_SHARE * cell["file_read_bytes"],
    }


def _ratio(measured: float, predicted: float) -> str:
    return f"{numbers.three(measured / predicted)} x" if predicted > 0 and math.isfinite(measured) else ""


def _span(low: float, high: float) -> str:
    """An interval without a unit, and so without a prefix."""
    return f"{numbers.three(low)} to {numbers.three(high)}" if math.isfinite(low + high) else numbers.ABSENT


def _labels(axes: Sequence[Axis], cell: Mapping[str, Any]) -> list[str]:
    return [str(cell[f"label_{axis.name}"]) for axis in axes]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items()) or numbers.ABSENT
    return numbers.ABSENT if value is None or value == "" else str(value)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
