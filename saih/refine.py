"""Adaptive sweeps: of a plan of all cells, which to measure and how often, so that a time budget tells the most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from saih.analysis.refine import choose, coarse
from saih.errors import SaihError
from saih.plan import LAUNCH_OVERHEAD_S, Forecast, Plan, Pruned

MOST_REPEATS = 12
"""Of a cell, whatever its interval."""
ROUND = 1 / 3
"""Share of the time left that a round of choices spends: what it finds changes the next one's."""

Repeats = Mapping[str, int]
"""Cell -> how many of its repeats are wanted."""


def start(plan: Plan, repeat: int, budget_s: float) -> dict[str, int]:
    """Every other rung of long ladders, and their ends; the cheapest cells first, as far as the budget goes.

    Raises SaihError where not even the cheapest fits.
    """
    labels = dict(zip((axis.name for axis in plan.sweep.axes), coarse(plan.sweep.axes), strict=True))
    forecasts = [item for item in _first(plan).values() if _is_among(item, labels)]
    left_s = budget_s - LAUNCH_OVERHEAD_S
    wanted: dict[str, int] = {}
    for item in sorted(forecasts, key=lambda each: each.point_s):
        left_s -= repeat * item.point_s
        if left_s >= 0:
            wanted[item.point.cell] = repeat
    if not wanted:
        needed_s = LAUNCH_OVERHEAD_S + repeat * min((each.point_s for each in forecasts), default=0.0)
        why = f"the cheapest cell takes {needed_s:.0f} s" if forecasts else "every cell is ruled out before time counts"
        raise SaihError(f"--refine: nothing fits {max(0.0, budget_s):.0f} s: {why}")
    return wanted


def more(plan: Plan, wanted: Repeats, cells: pd.DataFrame, left_s: float) -> dict[str, int]:
    """`wanted` and what a share of the time left is best spent on; the same where nothing is worth it.

    `cells` is `per_cell` of what is measured so far.
    """
    grown = [axis for axis in plan.sweep.axes if not axis.named and len(axis.rungs) > 2]
    ordered = [axis.name for axis in grown if min(rung.size for rung in axis.rungs) > 0]
    seconds = {cell: item.point_s for cell, item in _first(plan).items() if wanted.get(cell, 0) < MOST_REPEATS}
    chosen = choose(cells, ordered, seconds, ROUND * left_s - LAUNCH_OVERHEAD_S)
    return dict(wanted) | {cell: wanted.get(cell, 0) + 1 for cell in chosen}


def part(plan: Plan, wanted: Repeats) -> Plan:
    """The plan of what is wanted; cells of which nothing is are left out, and say why."""
    kept = tuple(item for item in plan.kept if item.point.repeat < wanted.get(item.point.cell, 0))
    left = tuple(
        Pruned(item, "refine", "its neighbours tell enough, or it takes too long for --refine")
        for item in plan.kept
        if item.point.cell not in wanted and item.point.repeat == 0
    )
    pruned = tuple(each for each in plan.pruned if each.forecast.point.repeat == 0)
    return replace(plan, kept=kept, pruned=(*pruned, *left))


def _first(plan: Plan) -> dict[str, Forecast]:
    """Cell -> forecast of one repeat of it that is not measured yet, or of its first."""
    found: dict[str, Forecast] = {}
    for item in plan.kept:
        if item.point.cell not in found or found[item.point.cell].point_s == 0:
            found[item.point.cell] = item
    return found


def _is_among(item: Forecast, labels: Mapping[str, set[str]]) -> bool:
    return all(item.point.labels[axis] in chosen for axis, chosen in labels.items())
