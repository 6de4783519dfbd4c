"""How a number came about: measured, predicted, projected, simulated or emulated; a word and a shape for each."""

from __future__ import annotations

import pandas as pd

from saih.analysis.claims import SIMULATED

KINDS = {
    "measured": ("●", "timed on this machine, step by step"),
    "predicted": ("○", "worked out from the parameters alone, before anything ran"),
    "projected": ("◇", "a model of what was measured, continued to where nothing was measured"),
    "simulated": ("△", "counted in simulated time by a program that computes no real step"),
    "emulated": ("□", "timed, with a part that is not there stood in for: a sleep, a link held to a rate"),
}
"""Word -> (shape, what it means). Shape and word stand together everywhere: colour carries nothing alone."""

EMULATED = ("param_emulated_", "check_emulated_")
"""So begin the names of numbers that are above zero where a part of the machine was stood in for."""


def of_cells(table: pd.DataFrame) -> pd.Series:
    """The kind of each row of points or cells, by what its parameters and checks are called."""
    kinds = pd.Series("measured", index=table.index)
    kinds[_any_above_zero(table, EMULATED)] = "emulated"
    simulated = table[[name for name in table if str(name).startswith(SIMULATED)]]
    kinds[simulated.notna().any(axis=1)] = "simulated"
    return kinds


def of_metric(metric: str) -> str:
    """The kind of a claim, by the number it is about."""
    return "simulated" if metric.startswith(SIMULATED) else "measured"


def _any_above_zero(table: pd.DataFrame, beginnings: tuple[str, ...]) -> pd.Series:
    names = [name for name in table if str(name).startswith(beginnings)]
    numbers = table[names].apply(pd.to_numeric, errors="coerce")
    return (numbers > 0).any(axis=1)
