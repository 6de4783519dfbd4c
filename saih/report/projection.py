"""The page of `saih project`: what was measured and what is projected from it, apart by mark, line and word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from saih.analysis.project import Sweep, leave_out, summary
from saih.core import Axis, Rung
from saih.report.curves import kind_of, scale_of
from saih.report.environment import environment, write_page
from saih.report.figures import SERIES_COLOURS, Line, Panel
from saih.report.grid import spread
from saih.report.results import Results


@dataclass(frozen=True)
class Study:
    """One results file: its cells, what is projected from them, and how far such projections miss."""

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    """labels, method, step_s, low_s, high_s, how."""
    panel: Panel | None
    """None where no axis has sizes to draw over."""
    missed: Mapping[str, Mapping[str, Any]]
    """Method -> `summary` of every measured cell predicted from the others."""


def study(number: int, results: Results, sweep: Sweep, rows: Sequence[Mapping[str, Any]], same_machine: bool) -> Study:
    """`rows` have `sizes` of the sized axes and `series` besides; cells of another machine are drawn without those
    measured here."""
    found = leave_out(sweep)
    methods = dict.fromkeys(each.method for each in found)
    missed = {method: summary([each for each in found if each.method == method]) for method in methods}
    panel = _panel(f"projected-{number}", results, sweep, rows, same_machine)
    return Study(results.path.name, results.title, rows, panel, missed)


def write(studies: Sequence[Study], machine: str | None, output: Path) -> Path:
    """The page, whole or not at all; `machine` is another one that is projected to."""
    template = environment().get_template("report/projection.html.j2")
    return write_page(template.render(studies=studies, machine=machine), output)


def _panel(
    name: str, results: Results, sweep: Sweep, rows: Sequence[Mapping[str, Any]], same_machine: bool
) -> Panel | None:
    """Step time over the first sized axis: a line for each combination of the others, measured and then projected."""
    if not sweep.sized or not rows:
        return None
    first, *others = sweep.sized
    axis = _with_rungs(next(axis for axis in results.axes if axis.name == first), rows)
    lines = []
    projected = pd.DataFrame([{**row, **row["sizes"]} for row in rows])
    groups = list(projected.groupby(["series", *others], sort=False))
    for place, (key, mine) in enumerate(spread(groups, SERIES_COLOURS)):
        series, *sizes = key
        label = " ".join(
            filter(None, [str(series), *(_told(results, *each) for each in zip(others, sizes, strict=True))])
        )
        if same_machine:
            lines += _measured(sweep, first, dict(zip(others, sizes, strict=True)), str(series), label, place)
        for method, said in mine.groupby("method", sort=False):
            said = said.sort_values(first)
            x, y, low, high = (said[column].tolist() for column in (first, "step_s", "low_s", "high_s"))
            lines.append(Line(f"{label} by {method}".strip(), x, y, low, high, "projected", place))
    title = f"Step time over {first}, {'measured and projected' if same_machine else 'projected'}"
    return Panel(name, title, f"{title}.", lines, scale_of(axis), "step time (s)", logarithmic=True)


def _measured(sweep: Sweep, first: str, sizes: Mapping[str, float], series: str, label: str, place: int) -> list[Line]:
    cells = sweep.cells.loc[sweep.measured]
    cells = cells[cells["series"] == series]
    for axis, size in sizes.items():
        cells = cells[cells[f"size_{axis}"] == size]
    if cells.empty:
        return []
    cells = cells.sort_values(f"size_{first}")
    x, y, low, high = (cells[name].tolist() for name in (f"size_{first}", "step_s", "step_s_low", "step_s_high"))
    return [Line(label, x, y, low, high, kind_of(cells), place)]


def _with_rungs(axis: Axis, rows: Sequence[Mapping[str, Any]]) -> Axis:
    """The axis with the sizes that were asked for besides."""
    known = {rung.size: rung for rung in axis.rungs}
    asked = {row["sizes"][axis.name]: row["rungs"][axis.name] for row in rows}
    rungs = {size: Rung(label, {}, size) for size, label in asked.items()} | known
    return Axis(axis.name, axis.unit, tuple(rungs[size] for size in sorted(rungs)))


def _told(results: Results, axis: str, size: float) -> str:
    """A rung of one of the other axes by its label, if that axis varies."""
    rungs = next(each for each in results.axes if each.name == axis).rungs
    label = next((rung.label for rung in rungs if rung.size == size), f"{size:g}")
    return f"{axis} {label}" if len(rungs) > 1 else ""
