"""From cells to panels: % of peak over size, rates of kernels over size, speed-up and efficiency over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from saih.analysis.cells import labels_of
from saih.analysis.scaling import RESOURCES
from saih.core import Axis
from saih.report.figures import MOST_LINES, Line, Panel
from saih.report.grid import MOST_GROUPS, Layout, is_logarithmic, is_sized, layout, left_out, spread, words
from saih.report.results import PERCENTAGES, Results

MOST_TICKS = 10
Series = Sequence[tuple[str, pd.DataFrame]]
"""What to call each line, and its cells."""
DENOMINATORS = {"percent_of_peak": "% of measured ceiling", "percent_of_datasheet": "% of data sheet"}


@dataclass(frozen=True)
class Group:
    """Panels that belong together, under one caption, and what was left out of them."""

    caption: str
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)


def percent_curves(results: Results) -> tuple[list[Group], str]:
    """% of peak over the first axis against each known denominator; and how many combinations are left out."""
    cells = results.measured
    known = [name for name in PERCENTAGES if cells[name].notna().any()]
    if not known:
        return [], ""
    plan = layout(results.axes)
    combinations = list(plan.split(cells))
    top = _top(cells, known)
    groups = []
    for number, (labels, group) in enumerate(combinations[:MOST_GROUPS]):
        series, notes = _bounded(plan.series(group))
        panels = [
            _percent_panel(f"peak-{number}-{place}", column, labels, series, plan.across, top)
            for place, column in enumerate(known)
        ]
        groups.append(Group(words(labels), panels, notes))
    return groups, left_out(len(combinations), "combination")


def rate_curves(results: Results) -> list[Group]:
    """What the ceilings workload sustains over size: FLOP/s of kernels that compute, bytes/s of those that move."""
    cells = results.measured
    plan = layout(results.axes)
    panels = []
    for name, chosen, amount, unit in (
        ("flop", cells[cells["flop"] > 0], "flop", "GFLOP/s"),
        ("bytes", cells[(cells["flop"] == 0) & (cells["moved_bytes"] > 0)], "moved_bytes", "GB/s"),
    ):
        if chosen.empty:
            continue
        lines = []
        for labels, group in _every_series(plan, chosen):
            group = group.sort_values(f"size_{plan.across.name}")
            rate, low, high = (group[amount] / group[step] / 1e9 for step in ("step_s", "step_s_high", "step_s_low"))
            lines.append(_line(labels, group[f"size_{plan.across.name}"], rate, low, high))
        title = f"{unit} over {plan.across.name}"
        panels.append(
            Panel(
                name=f"rate-{name}",
                title=title,
                description=f"{title}: {_told(lines)}",
                x_label=_axis_label(plan.across),
                y_label=unit,
                lines=lines[:MOST_LINES],
                **_across(plan.across),  # type: ignore[arg-type]
            )
        )
    return [Group("", panels)] if panels else []


def scaling_curves(cells: pd.DataFrame) -> list[Group]:
    """Speed-up and efficiency over ranks, a line for each series that differs in nothing else, with the ideal."""
    others = [f"label_{axis}" for axis in labels_of(cells) if axis not in RESOURCES]
    series = [
        (words(dict(zip((name.removeprefix("label_") for name in others), map(str, labels), strict=True))), group)
        for labels, group in (cells.groupby(others, sort=False) if others else [((), cells)])
    ]
    kept, notes = _bounded(series)
    ranks = sorted(cells["ranks"].unique())
    ticks = [(rank, f"{rank:g}") for rank in spread(ranks, MOST_TICKS)]
    bases = sorted(cells["base_ranks"].unique())
    panels = []
    for column, label in (("speed_up", "speed-up"), ("efficiency", "efficiency (%)")):
        factor = 1.0 if column == "speed_up" else 100.0
        lines = []
        for name, group in kept:
            group = group.sort_values("ranks")
            y, error = factor * group[column], factor * group[column] * group["speed_up_error"] / group["speed_up"]
            lines.append(_line(name, group["ranks"], y, y - error, y + error))
        ideals = [
            (span, [rank / base for rank in span] if column == "speed_up" else [100.0] * len(span))
            for base in (bases if column == "speed_up" else bases[:1])
            if (span := [rank for rank in ranks if rank >= base])
        ]
        panels.append(
            Panel(
                name=f"scaling-{column.replace('_', '-')}",
                title=f"{label} over ranks",
                description=f"{label} over ranks: {_told(lines)}",
                x_label="ranks",
                y_label=label,
                lines=lines,
                ticks=ticks,
                log_x=is_logarithmic(ranks),
                ideals=ideals,
            )
        )
    return [Group("", panels, notes)]


def _percent_panel(
    name: str, column: str, labels: Mapping[str, str], series: Series, across: Axis, top: float
) -> Panel:
    lines = [_percent_line(label, group, across, column) for label, group in series]
    where = f" at {words(labels)}" if labels else ""
    return Panel(
        name=name,
        title=f"{DENOMINATORS[column]} over {across.name}{where}",
        description=f"{DENOMINATORS[column]} over {across.name}{where}: {_told(lines)}",
        x_label=_axis_label(across),
        y_label=DENOMINATORS[column],
        lines=lines,
        y_top=top,
        **_across(across),  # type: ignore[arg-type]
    )


def _top(cells: pd.DataFrame, columns: Sequence[str]) -> float:
    """Where the y axis ends: above the intervals, but not so far that a wide one flattens the curves."""
    highest = float(cells[columns].max().max())
    reach = float(cells[columns].mul(cells["step_s"] / cells["step_s_low"], axis=0).max().max())
    return min(1.04 * reach, 1.3 * highest) if reach > highest else 1.06 * highest


def _percent_line(label: str, group: pd.DataFrame, across: Axis, column: str) -> Line:
    """One value a rung: a rung that was not measured is NaN, and breaks the line."""
    by_rung = group.drop_duplicates(f"label_{across.name}").set_index(f"label_{across.name}")
    by_rung = by_rung.reindex([rung.label for rung in across.rungs])
    share = by_rung[column]
    low, high = (share * by_rung["step_s"] / by_rung[step] for step in ("step_s_high", "step_s_low"))
    return _line(label, pd.Series([rung.size for rung in across.rungs]), share, low, high)


def _line(label: str, x: pd.Series, y: pd.Series, low: pd.Series, high: pd.Series) -> Line:
    return Line(label, *(values.astype(float).tolist() for values in (x, y, low, high)))


def _every_series(plan: Layout, cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every combination of all axes but the one across."""
    for labels, group in plan.split(cells):
        for label, line in plan.series(group):
            yield " ".join(part for part in (label.partition(" ")[2], *labels.values()) if part), line


def _bounded(series: Series) -> tuple[Series, list[str]]:
    kept = spread(series, MOST_LINES)
    notes = [f"{len(kept)} of {len(series)} lines shown, evenly spaced."] if len(kept) < len(series) else []
    return kept, notes


def _across(axis: Axis) -> dict[str, object]:
    sizes = [float(rung.size) for rung in axis.rungs]
    sized = is_sized(axis)
    logarithmic = sized and is_logarithmic(sizes)
    return {"ticks": _ticks(axis, logarithmic), "joined": sized, "log_x": logarithmic}


def _ticks(axis: Axis, logarithmic: bool) -> list[tuple[float, str]]:
    """Rungs from the largest down, as many as have room for their labels."""
    sizes = np.array([float(rung.size) for rung in axis.rungs])
    places = np.log(sizes) if logarithmic else sizes
    room = (places.max() - places.min()) / MOST_TICKS
    kept: list[int] = []
    for place in np.argsort(-places):
        if not kept or places[kept[-1]] - places[place] >= room:
            kept.append(int(place))
    return [(sizes[place], axis.rungs[place].label) for place in reversed(kept)]


def _axis_label(axis: Axis) -> str:
    return f"{axis.name} ({axis.unit})" if axis.unit else axis.name


def _told(lines: Sequence[Line]) -> str:
    """Lowest and highest value of each line, for those who cannot see them."""
    parts = []
    for line in lines:
        y = np.asarray(line.y)[np.isfinite(line.y)]
        if y.size:
            parts.append(f"{line.label} {y.min():.3g} to {y.max():.3g}".strip())
    return "; ".join(parts)
