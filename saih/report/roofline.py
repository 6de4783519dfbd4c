"""The roofline (Williams et al., 2009): what each cell computes over what it moves, below what this machine can do."""

from __future__ import annotations

import numpy as np
import pandas as pd

from saih.analysis.cells import copy_rate, peaks
from saih.report.curves import Group, kind_of
from saih.report.figures import MOST_LINES, Line, Panel, Scale
from saih.report.grid import layout, spread
from saih.report.results import Results

GIGA = 1e9


def rooflines(results: Results) -> Group | None:
    """One panel for each precision whose ceilings are known, with every cell that computes and moves; or None.

    FLOP are the model's, and bytes those of its listed kernels; so a cell may stand above the slope where a cache holds
    what one kernel leaves for the next.
    """
    cells, panels = results.whole, []
    bytes_per_s = copy_rate(results.sweep)
    cells = cells[(cells["flop"] > 0) & (cells["moved_bytes"] > 0)]
    for precision, group in cells.groupby("precision"):
        flop_per_s, _ = peaks(results.sweep, str(precision))
        if np.isfinite(flop_per_s) and np.isfinite(bytes_per_s):
            panels.append(_panel(str(precision), group, flop_per_s, bytes_per_s, results))
    return Group("", panels) if panels else None


def _panel(precision: str, cells: pd.DataFrame, flop_per_s: float, bytes_per_s: float, results: Results) -> Panel:
    plan = layout(results.problem_axes)
    series = spread(plan.series(cells), MOST_LINES)
    named = f"{plan.lines.name} " if plan.lines else ""
    lines = [_line(f"{named}{label}".strip(), group) for label, group in series]
    intensity = cells["flop"] / cells["moved_bytes"]
    ridge = flop_per_s / bytes_per_s
    ends = min(float(intensity.min()), ridge) / 2, max(float(intensity.max()), ridge) * 2
    roof = [ends[0], ridge, ends[1]]
    heights = [min(flop_per_s, bytes_per_s * x) / GIGA for x in roof]
    title = f"Roofline in {precision}"
    told = f"{title}: {len(cells)} cells below {flop_per_s / GIGA:.3g} GFLOP/s and {bytes_per_s / GIGA:.3g} GB/s."
    scale = Scale("FLOP per byte", _powers(*ends), joined=False, logarithmic=True)
    return Panel(
        f"roofline-{precision}",
        title,
        told,
        lines,
        scale,
        "GFLOP/s of one device",
        ideals=[(roof, heights)],
        ideals_are="measured ceilings",
        logarithmic=True,
    )


def _line(label: str, cells: pd.DataFrame) -> Line:
    rate, low, high = (
        cells["flop"] / cells[step] / cells["ranks"] / GIGA for step in ("step_s", "step_s_high", "step_s_low")
    )
    x, y, *ends = (each.astype(float).tolist() for each in (cells["flop"] / cells["moved_bytes"], rate, low, high))
    return Line(label, x, y, ends[0], ends[1], kind_of(cells))


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten inside, or of two where there are fewer than two."""
    for base in (10.0, 2.0):
        first, last = np.ceil(np.log(low) / np.log(base)), np.floor(np.log(high) / np.log(base))
        found = [base**power for power in np.arange(first, last + 1)]
        if len(found) > 1:
            break
    return [(float(value), f"{value:g}") for value in found]
