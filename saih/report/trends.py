"""The page's part on trends: curves in three numbers, a model of step time, the largest rung held out, and beyond.

What the model says was not measured; it is kept apart from all that was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saih.analysis import numbers
from saih.analysis.trend import Model, Prediction, fit, shape
from saih.core import Axis
from saih.report.curves import Group, kind_of, scale_of
from saih.report.figures import SERIES_COLOURS, Line, Panel
from saih.report.grid import layout, spread, words
from saih.report.results import Results
from saih.report.tables import main_percentage

MOST_EXTRAPOLATED = 40


@dataclass(frozen=True)
class Trend:
    """Of the cells that differ in one or two sized axes only."""

    caption: str
    formula: str
    held_out: list[dict[str, str]]
    """Cells of the largest rung, predicted from the smaller ones alone, beside what was measured."""
    held_out_told: str
    """The same in a line: the largest error of all, and how many are inside their intervals."""
    extrapolated: list[dict[str, str]]
    """Cells that were asked for and not measured."""
    group: Group | None
    """What was measured and, as projection, what the model says of the rest; None where nothing is left."""


def shapes(results: Results) -> list[dict[str, str]]:
    """Range, knee and saturation of % of peak along each sized axis, a row a curve."""
    column = main_percentage(results)
    told: list[dict[str, str]] = []
    if column is None:
        return told
    for axis in results.problem_axes:
        others = [each for each in results.problem_axes if each.name != axis.name]
        for labels, line in _series(results.whole, others):
            if axis.named or line[f"size_{axis.name}"].nunique() < 3:
                continue
            found = shape(line[f"size_{axis.name}"].tolist(), line[column].tolist())
            named = dict(zip(line[f"size_{axis.name}"], line[f"label_{axis.name}"], strict=True))
            told.append(
                {
                    "axis": axis.name,
                    "series": words(labels) or "all",
                    "range": f"{numbers.three(found.low)} to {numbers.three(found.high)} %",
                    "knee": "none" if found.knee is None else str(named[found.knee]),
                    "saturation": "not reached" if found.saturation is None else str(named[found.saturation]),
                }
            )
    return told + _surfaces(results, column)


def _surfaces(results: Results, column: str) -> list[dict[str, str]]:
    """The same over all sized axes at once, by work: knee and saturation of the best that so much work reaches."""
    sized = [axis for axis in results.problem_axes if not axis.named and len(axis.rungs) > 2]
    others = [axis for axis in results.problem_axes if axis not in sized]
    told = []
    for labels, cells in _series(results.whole, others):
        ordered = cells[cells["flop"] > 0].sort_values("flop")
        if len(sized) < 2 or len(ordered) < 3:
            continue
        best = ordered[column].cummax()
        found = shape(ordered["flop"].tolist(), best.tolist())
        leaders = [ordered[column].to_numpy()[: place + 1].argmax() for place in range(len(ordered))]
        names = [words({axis.name: ordered[f"label_{axis.name}"].iloc[each] for axis in sized}) for each in leaders]
        named = dict(zip(ordered["flop"], names, strict=True))
        told.append(
            {
                "axis": " and ".join(axis.name for axis in sized),
                "series": words(labels) or "all, by work",
                "range": f"{numbers.three(ordered[column].min())} to {numbers.three(found.high)} %",
                "knee": "none" if found.knee is None else named[found.knee],
                "saturation": "not reached" if found.saturation is None else named[found.saturation],
            }
        )
    return told


def trends(results: Results) -> list[Trend]:
    """A model of step time over the sized axes, for each combination of the others that has enough sizes."""
    plan = layout(results.problem_axes)
    sized = [axis for axis in (plan.across, plan.lines) if axis is not None and not axis.named and len(axis.rungs) > 2]
    others = [axis for axis in results.problem_axes if axis not in sized]
    found = []
    for number, (labels, cells) in enumerate(_series(results.undisturbed, others)):
        told = _trend(number, words(labels), cells, sized) if sized else None
        found += [told] if told else []
    return found


def held_out_lines(results: Results) -> list[str]:
    """A line each trend whose largest rung was held out."""
    told = [(trend.caption, trend.held_out_told) for trend in trends(results) if trend.held_out]
    return [f"held out: {f'{caption}: ' if caption else ''}{line}" for caption, line in told]


def extra_p(results: Results) -> str:
    """Measured step times in the JSON Lines format of Extra-P 4: one line a repeat, over the sized axes.

    Cells that differ in other axes are call paths of their own.
    """
    sized = [axis for axis in results.problem_axes if not axis.named]
    others = [axis for axis in results.problem_axes if axis.named]
    lines = []
    for cell, row in results.whole.sort_values([f"size_{axis.name}" for axis in sized]).iterrows():
        place = {
            "params": {axis.name: float(row[f"size_{axis.name}"]) for axis in sized},
            "callpath": "->".join(["step", *(f"{axis.name}={row[f'label_{axis.name}']}" for axis in others)]),
            "metric": "step_s",
        }
        steps_s = results.by_point.loc[results.by_point["cell"] == cell, "step_s"]
        lines += [json.dumps(place | {"value": float(value)}) for value in steps_s]
    return "".join(f"{line}\n" for line in lines)


def _trend(number: int, caption: str, cells: pd.DataFrame, sized: list[Axis]) -> Trend | None:
    model = _fit(cells, sized)
    if model is None:
        return None
    left = cells[cells["status"] != "measured"].head(MOST_EXTRAPOLATED)
    beyond = [_row(cell, sized, model) for _, cell in left.iterrows()]
    panel = _panel(f"trend-{number}", cells, left, sized, model)
    group = None if left.empty else Group(caption, [panel])
    rows, line = _held_out(cells, sized)
    return Trend(caption, model.formula(), rows, line, beyond, group)


def _panel(name: str, cells: pd.DataFrame, left: pd.DataFrame, sized: list[Axis], model: Model) -> Panel:
    """Step time over the first axis: what was measured, and what is projected from it in the same colour."""
    across, told = sized[0], []
    size = f"size_{across.name}"
    named = [(axis.name, rung.label) for axis in sized[1:] for rung in axis.rungs]
    for place, (axis, rung) in enumerate(spread(named, SERIES_COLOURS) or [("", "")]):
        mine = cells[cells[f"label_{axis}"] == rung] if axis else cells
        mine, label = mine.sort_values(size), f"{axis} {rung}".strip()
        seen, beyond = mine[mine["status"] == "measured"], mine[mine.index.isin(left.index)]
        if len(seen):
            step, low, high = (seen[name].tolist() for name in ("step_s", "step_s_low", "step_s_high"))
            told.append(Line(label, seen[size].tolist(), step, low, high, kind_of(seen), place))
        if len(beyond):
            said = [_predict(cell, sized, model) for _, cell in beyond.iterrows()]
            step, low, high = ([getattr(each, end) for each in said] for end in ("value", "low", "high"))
            told.append(Line(label, beyond[size].tolist(), step, low, high, "projected", place))
    title = f"Step time over {across.name}, measured and projected"
    return Panel(name, title, f"{title}.", told, scale_of(across), "step time (s)", logarithmic=True)


def _held_out(cells: pd.DataFrame, sized: list[Axis]) -> tuple[list[dict[str, str]], str]:
    """Fit all but the largest rung of the first axis, and predict that: its cells, and a line on them."""
    first = f"size_{sized[0].name}"
    largest = cells[first] == cells.loc[cells["status"] == "measured", first].max()
    model = _fit(cells[~largest], sized)
    if model is None:
        return [], ""
    told, errors, inside = [], [], []
    held = cells[largest & (cells["status"] == "measured")]
    for _, cell in held.iterrows():
        predicted = _predict(cell, sized, model)
        inside.append(predicted.low <= cell["step_s"] <= predicted.high)
        errors.append(100 * (predicted.value / cell["step_s"] - 1))
        found = {"error": f"{errors[-1]:+.1f} %", "inside": "yes" if inside[-1] else "no"}
        told.append(_row(cell, sized, model) | {"measured": numbers.si(cell["step_s"], "s")} | found)
    rung = f"{sized[0].name}={held[f'label_{sized[0].name}'].iloc[0]}"
    line = (
        f"{rung} predicted from smaller ones, off by {max(errors, key=abs):+.1f} % at most, "
        f"{sum(inside)} of {len(inside)} inside the 90 % interval"
    )
    return told, line


def _fit(cells: pd.DataFrame, sized: list[Axis]) -> Model | None:
    """A model of the mean step time of each measured cell."""
    measured, sizes = cells[cells["status"] == "measured"], [f"size_{axis.name}" for axis in sized]
    if measured.empty:
        return None
    steps_s = measured["step_s"].to_numpy(dtype=float)
    return fit(measured[sizes].to_numpy(dtype=float), steps_s, [axis.name for axis in sized])


def _predict(cell: Mapping[str, Any] | pd.Series, sized: list[Axis], model: Model) -> Prediction:
    return model.predict([float(cell[f"size_{axis.name}"]) for axis in sized])


def _row(cell: pd.Series, sized: list[Axis], model: Model) -> dict[str, str]:
    predicted = _predict(cell, sized, model)
    return {
        "labels": words({axis.name: cell[f"label_{axis.name}"] for axis in sized}),
        "predicted": numbers.si(predicted.value, "s"),
        "interval": numbers.span(predicted.low, predicted.high, "s"),
    }


def _series(cells: pd.DataFrame, others: list[Axis]) -> list[tuple[dict[str, str], pd.DataFrame]]:
    if not others:
        return [({}, cells)]
    names = [axis.name for axis in others]
    groups = cells.groupby([f"label_{name}" for name in names], sort=False)
    return [(dict(zip(names, map(str, labels), strict=True)), group) for labels, group in groups]
