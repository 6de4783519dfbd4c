"""Quality over speed-up, as a figure and as the table that says the same in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from saih import workload
from saih.analysis.cells import labels_of
from saih.analysis.numbers import ABSENT, three
from saih.core import TradeOff
from saih.report.curves import Group, Series, kind_of
from saih.report.figures import MOST_LINES, Ideals, Line, Panel, Scale
from saih.report.grid import spread, words
from saih.report.results import Results

SPEEDUP = "speedup"
"""Column with the measured speed-up over the baseline; `SPEEDUP_low` and `SPEEDUP_high` are its 95 % interval."""


@dataclass(frozen=True)
class Row:
    """A point in numbers, ready to be shown."""

    labels: list[str]
    counted: str
    measured: str
    interval: str
    quality: str
    gain: str


@dataclass(frozen=True)
class Section:
    """What the page says of a workload's trade-off."""

    trade: TradeOff
    best: list[str]
    """For each rung along the lines: which point gains most over the reference at equal quality."""
    group: Group
    rows: list[Row] = field(default_factory=list)


def section(results: Results) -> Section | None:
    """None where the workload names no trade-off, or no point has a quality."""
    trade = workload.trade_off(results.spec)
    if trade is None:
        return None
    wanted = [f"check_{name}" for name in (trade.quality, trade.speedup, trade.gain)]
    cells = results.measured
    if not set(wanted) <= set(cells) or cells[wanted].dropna().empty:
        return None
    cells = _with_speedup(cells, trade).dropna(subset=wanted)
    columns = {"counted work": f"check_{trade.speedup}", "seconds": SPEEDUP}
    panels = [
        _panel(trade, cells.dropna(subset=[column]), column, what)
        for what, column in columns.items()
        if cells[column].notna().any()
    ]
    kept, total = len(panels[0].lines), len(_series(trade, cells)[0])
    notes = [f"{kept} of {total} lines shown, evenly spaced."] if kept < total else []
    return Section(trade, _best(results, trade, cells), Group("", panels, notes), _rows(results, trade, cells))


def _with_speedup(cells: pd.DataFrame, trade: TradeOff) -> pd.DataFrame:
    """Step time of the baseline over each cell's, all other labels equal; NaN where the baseline is not measured."""
    axis, others = f"label_{trade.axis}", [f"label_{name}" for name in labels_of(cells) if name != trade.axis]
    empty = cells.assign(**{f"{SPEEDUP}{end}": np.nan for end in ("", "_low", "_high")})
    if axis not in cells or not (cells[axis] == trade.baseline).any():
        return empty
    steps = ["step_s", "step_s_low", "step_s_high"]
    base = cells.loc[cells[axis] == trade.baseline, [*others, *steps]]
    joined = (
        cells.merge(base, how="left", on=others, suffixes=("", "_base")) if others else cells.join(base, how="cross")
    )
    step, low, high = (joined[f"{name}_base"].to_numpy() for name in steps)
    return empty.assign(
        **{
            SPEEDUP: step / cells["step_s"].to_numpy(),
            f"{SPEEDUP}_low": low / cells["step_s_high"].to_numpy(),
            f"{SPEEDUP}_high": high / cells["step_s_low"].to_numpy(),
        }
    )


def _series(trade: TradeOff, cells: pd.DataFrame) -> tuple[Series, Series]:
    """The lines, and those of the reference: cells that differ in nothing but their place along the line."""
    axes = [name for name in labels_of(cells) if name != trade.along and cells[f"label_{name}"].nunique() > 1]
    if not axes:
        return [("", cells)], []
    lines: list[tuple[str, pd.DataFrame]] = []
    references: list[tuple[str, pd.DataFrame]] = []
    for labels, group in cells.groupby([f"label_{name}" for name in axes], sort=False):
        told = dict(zip(axes, map(str, labels), strict=True))
        name = " ".join([told.pop(trade.axis, ""), words(told)]).strip()
        is_reference = trade.axis in axes and group[f"label_{trade.axis}"].iat[0] == trade.reference
        (references if is_reference else lines).append((name, group))
    return lines, references


def _panel(trade: TradeOff, cells: pd.DataFrame, column: str, what: str) -> Panel:
    lines, references = _series(trade, cells)
    quality = cells[f"check_{trade.quality}"]
    room = 0.05 * (quality.max() - quality.min()) or 0.05 * abs(quality.max()) or 1.0
    drawn = [_line(name, group, column, trade) for name, group in spread(lines, MOST_LINES)]
    ideals: Ideals = [(line.x, line.y) for line in (_line(name, group, column, trade) for name, group in references)]
    title = f"{trade.label} over speed-up in {what}"
    told = [f"{line.label} {three(min(line.y))} to {three(max(line.y))}".strip() for line in drawn]
    return Panel(
        f"trade-{column.replace('_', '-')}",
        title,
        f"{title}: {'; '.join(told)}",
        drawn,
        Scale(f"speed-up in {what}", _ticks(cells[column]), True, False),
        trade.label,
        float(quality.max() + room),
        ideals,
        trade.reference,
        float(quality.min() - room),
    )


def _line(name: str, group: pd.DataFrame, column: str, trade: TradeOff) -> Line:
    group = group.sort_values(column)
    y = group[f"check_{trade.quality}"].tolist()
    return Line(name, group[column].tolist(), y, y, y, kind_of(group))


def _ticks(values: pd.Series) -> list[tuple[float, str]]:
    """Round speed-ups in the range of the values."""
    width = max(float(values.max() - values.min()), 0.2)
    step = next(size for size in (0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 100, 1e9) if width / size <= 8)
    first, last = np.ceil(values.min() / step), np.floor(values.max() / step)
    return [(place * step, f"{place * step:g}x") for place in np.arange(first, last + 1)] or [
        (float(values.mean()), f"{values.mean():.3g}x")
    ]


def _best(results: Results, trade: TradeOff, cells: pd.DataFrame) -> list[str]:
    """At each rung along the lines, the cell that gains most over the reference."""
    gain, along = f"check_{trade.gain}", f"label_{trade.along}"
    groups: Sequence[tuple[str, pd.DataFrame]] = (
        [(f"{trade.along} {label}: ", group) for label, group in cells.groupby(along, sort=False)]
        if along in cells
        else [("", cells)]
    )
    told = []
    for place, group in groups:
        cell = group.loc[group[gain].idxmax()]
        names = {axis.name: cell[f"label_{axis.name}"] for axis in results.axes if axis.name != trade.along}
        told.append(f"{place}{words(names)}, {three(cell[gain])} times")
    return told


def _rows(results: Results, trade: TradeOff, cells: pd.DataFrame) -> list[Row]:
    return [
        Row(
            [str(cell[f"label_{axis.name}"]) for axis in results.axes],
            three(cell[f"check_{trade.speedup}"]),
            three(cell[SPEEDUP]),
            _interval(cell[f"{SPEEDUP}_low"], cell[f"{SPEEDUP}_high"]),
            three(cell[f"check_{trade.quality}"]),
            three(cell[f"check_{trade.gain}"]),
        )
        for _, cell in cells.iterrows()
    ]


def _interval(low: float, high: float) -> str:
    return f"{three(low)} to {three(high)}" if np.isfinite(low) and np.isfinite(high) else ABSENT
