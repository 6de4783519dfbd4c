"""From cells to panels: % of peak over size, rates of kernels over size, speed-up and efficiency over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from saih.analysis.ceilings import kernel_share
from saih.analysis.cells import labels_of
from saih.analysis.scaling import RESOURCES
from saih.core import Axis
from saih.report.figures import MOST_LINES, SERIES_COLOURS, Ideals, Line, Panel, Scale
from saih.report.grid import MOST_GROUPS, Layout, is_logarithmic, layout, left_out, spread, words
from saih.report.results import PERCENTAGES, Results

MOST_TICKS = 10
Series = Sequence[tuple[str, pd.DataFrame]]
"""What to call each line, and its cells."""
MOST_TOGETHER = 4
"""Series over ranks in one panel; where there are more, a panel each for the rungs of another axis."""


@dataclass(frozen=True)
class Group:
    """Panels that belong together, under one caption, and what was left out of them."""

    caption: str
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)


def percent_curves(results: Results) -> tuple[list[Group], str]:
    """% of peak over the first axis against each known denominator; and how many combinations are left out."""
    cells = results.whole
    known = [name for name in PERCENTAGES if cells[name].notna().any()]
    if not known:
        return [], ""
    plan = layout(results.problem_axes)
    combinations = list(plan.split(cells))
    reach = cells[known].mul(cells["step_s"] / cells["step_s_low"], axis=0)
    top = _top(float(cells[known].max().max()), float(reach.max().max()))
    groups = []
    for number, (labels, group) in enumerate(combinations[:MOST_GROUPS]):
        series, notes = _bounded(plan.series(group))
        panels = [
            _percent_panel(f"peak-{number}-{place}", column, results.denominators[column], labels, series, plan, top)
            for place, column in enumerate(known)
        ]
        groups.append(Group(words(labels), panels, notes))
    return groups, left_out(len(combinations), "combination")


def rate_curves(results: Results, name: str = "rate") -> Group:
    """What the ceilings workload sustains over size: FLOP/s of kernels that compute, bytes/s of those that move.

    `name` begins the names of its panels.
    """
    cells = results.measured
    plan = layout(results.axes)
    kinds = (
        ("GFLOP/s", "flop", cells[cells["flop"] > 0]),
        ("GB/s", "moved_bytes", cells[(cells["flop"] == 0) & (cells["moved_bytes"] > 0)]),
    )
    panels, notes = [], []
    for unit, amount, chosen in kinds:
        if not chosen.empty:
            series, left = _bounded(list(_every_series(plan, chosen)))
            panels.append(_rate_panel(name, unit, amount, series, plan.across))
            notes += left
    return Group("", panels, notes)


def scaling_curves(scaled: pd.DataFrame) -> tuple[list[Group], str]:
    """Speed-up and efficiency over ranks, a line for each series that differs in nothing else, with the ideal.

    Where many series would cover each other, a group for each rung of the first other axis; and what is left out.
    """
    others = [axis for axis in labels_of(scaled) if axis not in RESOURCES and scaled[f"label_{axis}"].nunique() > 1]
    if len(others) < 2 or len(_series_over_ranks(scaled, others)) <= MOST_TOGETHER:
        return [_scaling_group("scaling", "", scaled, others, scaled)], ""
    first, *rest = others
    parts = list(scaled.groupby(f"label_{first}", sort=False))
    groups = [
        _scaling_group(f"scaling-{number}", f"{first}={label}", part, rest, scaled)
        for number, (label, part) in enumerate(parts[:MOST_GROUPS])
    ]
    return groups, left_out(len(parts), f"{first} figure")


def _scaling_group(name: str, caption: str, part: pd.DataFrame, axes: Sequence[str], scaled: pd.DataFrame) -> Group:
    """Panels of one part of the cells, on the scales of all, so that groups can be compared."""
    series, notes = _bounded(_series_over_ranks(part, axes), SERIES_COLOURS)
    ranks = sorted(scaled["ranks"].unique())
    ladders = [[rank for rank in ranks if rank >= base] for base in sorted(part["base_ranks"].unique())]
    ideals = [(ladder, [rank / ladder[0] for rank in ladder]) for ladder in ladders]
    panels = [
        _scaling_panel(name, "speed-up", series, "speed_up", scaled, ideals),
        _scaling_panel(name, "efficiency (%)", series, "efficiency", scaled, [(ranks, [100.0] * len(ranks))]),
    ]
    return Group(caption, panels, notes)


def _series_over_ranks(scaled: pd.DataFrame, axes: Sequence[str]) -> Series:
    if not axes:
        return [("", scaled)]
    groups = scaled.groupby([f"label_{axis}" for axis in axes], sort=False)
    return [(words(dict(zip(axes, map(str, labels), strict=True))), group) for labels, group in groups]


def _percent_panel(
    name: str, column: str, denominator: str, labels: Mapping[str, str], series: Series, plan: Layout, top: float
) -> Panel:
    lines = [_percent_line(label, group, plan, column) for label, group in series]
    title = f"% of {denominator} over {plan.across.name}" + (f" at {words(labels)}" if labels else "")
    return Panel(name, title, _told(title, lines), lines, scale_of(plan.across), f"% of {denominator}", top)


def _rate_panel(name: str, unit: str, amount: str, series: Series, across: Axis) -> Panel:
    lines = []
    for label, group in series:
        group = group.sort_values(f"size_{across.name}")
        busy = group.apply(kernel_share, axis=1)
        rate, low, high = (group[amount] / group[step] / busy / 1e9 for step in ("step_s", "step_s_high", "step_s_low"))
        lines.append(_line(label, group[f"size_{across.name}"], rate, low, high))
    title = f"{unit} over {across.name}"
    return Panel(f"{name}-{amount.replace('_', '-')}", title, _told(title, lines), lines, scale_of(across), unit)


def _scaling_panel(group: str, label: str, series: Series, column: str, scaled: pd.DataFrame, ideals: Ideals) -> Panel:
    """`column` of each series; efficiency in per cent."""
    factor = 100 if column == "efficiency" else 1
    lines = []
    for name, cells in series:
        cells = cells.sort_values("ranks")
        value, low, high = (factor * cells[f"{column}{end}"] for end in ("", "_low", "_high"))
        lines.append(_line(name, cells["ranks"], value, low, high, kind_of(cells)))
    ranks = sorted(scaled["ranks"].unique())
    logarithmic = is_logarithmic(ranks)
    scale = Scale("ranks", _ticks(ranks, [f"{rank:g}" for rank in ranks], logarithmic), True, logarithmic)
    title = f"{label} over ranks"
    highest = max(factor * scaled[column].max(), *(max(y) for _, y in ideals))
    top = _top(highest, factor * scaled[f"{column}_high"].max())
    name = f"{group}-{column.replace('_', '-')}"
    return Panel(name, title, _told(title, lines), lines, scale, label, top, ideals)


def _top(highest: float, reach: float) -> float:
    """Where the y axis ends: above the intervals, but not so far that a wide one flattens the curves."""
    return min(1.04 * reach, 1.3 * highest) if reach > highest else 1.06 * highest


def _percent_line(label: str, group: pd.DataFrame, plan: Layout, column: str) -> Line:
    """One value a rung: a rung that was not measured is NaN, and breaks the line."""
    across = plan.across
    by_rung = group.drop_duplicates(f"label_{across.name}").set_index(f"label_{across.name}")
    by_rung = by_rung.reindex([rung.label for rung in across.rungs])
    share = by_rung[column]
    low, high = (share * by_rung["step_s"] / by_rung[step] for step in ("step_s_high", "step_s_low"))
    named = f"{plan.lines.name} {label}" if plan.lines else ""
    return _line(named, pd.Series([rung.size for rung in across.rungs]), share, low, high, kind_of(group))


def _line(label: str, x: pd.Series, y: pd.Series, low: pd.Series, high: pd.Series, kind: str = "measured") -> Line:
    x_values, y_values, *ends = (values.astype(float).tolist() for values in (x, y, low, high))
    return Line(label, x_values, y_values, ends[0], ends[1], kind)


def kind_of(cells: pd.DataFrame) -> str:
    """Of a line through these cells: one that is not plainly measured marks them all."""
    return next((kind for kind in ("simulated", "emulated") if (cells["measured_as"] == kind).any()), "measured")


def _every_series(plan: Layout, cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every combination of all axes but the one across."""
    for labels, group in plan.split(cells):
        for label, line in plan.series(group):
            yield " ".join(part for part in (label, *labels.values()) if part), line


def _bounded(series: Series, most: int = MOST_LINES) -> tuple[Series, list[str]]:
    kept = spread(series, most)
    return kept, [f"{len(kept)} of {len(series)} lines shown, evenly spaced."] if len(kept) < len(series) else []


def scale_of(axis: Axis) -> Scale:
    """The axis across a panel, with its rungs as ticks."""
    sizes, labels = [float(rung.size) for rung in axis.rungs], [rung.label for rung in axis.rungs]
    sized = not axis.named
    logarithmic = sized and is_logarithmic(sizes)
    label = f"{axis.name} ({axis.unit})" if axis.unit else axis.name
    return Scale(label, _ticks(sizes, labels, logarithmic), sized, logarithmic)


def _ticks(sizes: Sequence[float], labels: Sequence[str], logarithmic: bool) -> list[tuple[float, str]]:
    """Places from the largest down, as many as have room for their labels."""
    places = np.log(sizes) if logarithmic else np.asarray(sizes, dtype=float)
    room = (places.max() - places.min()) / MOST_TICKS
    kept: list[int] = []
    for place in np.argsort(-places):
        if not kept or places[kept[-1]] - places[place] >= room:
            kept.append(int(place))
    return [(sizes[place], labels[place]) for place in reversed(kept)]


def _told(title: str, lines: Sequence[Line]) -> str:
    """Lowest and highest value of each line, for those who cannot see them."""
    parts = []
    for line in lines:
        y = np.asarray(line.y)[np.isfinite(line.y)]
        if y.size:
            parts.append(f"{line.label} {y.min():.3g} to {y.max():.3g}".strip())
    return f"{title}: {'; '.join(parts)}"
