"""Speed-up and efficiency over ranks, against a base case that is named."""

from __future__ import annotations

import numpy as np
import pandas as pd

from saih.analysis.cells import labels_of
from saih.analysis.intervals import log_mean_interval

RESOURCES = ("nodes", "gpus")
SPEED_UP = ["speed_up", "speed_up_low", "speed_up_high"]


def scaling(cells: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Rows: measured cells of every series that differs in ranks only; empty where ranks do not vary.

    `cells` is `per_cell`, `repeats` is `per_point` of the same points. Adds `base_ranks` (the fewest of the series),
    `speed_up` (ratio of work per second to the base) and `efficiency` = speed_up / (ranks / base_ranks), each with
    `_low` and `_high`: the ratio is taken repeat by repeat, as a geometric mean with Student's t on the logarithms.
    The bounds are NaN with one repeat, and for the base, which is 1 by definition.
    """
    axes = labels_of(cells)
    if not set(axes) & set(RESOURCES):
        return pd.DataFrame()
    measured = cells[cells["status"] == "measured"]
    found = _with_base(measured, [f"label_{axis}" for axis in axes if axis not in RESOURCES])
    if found.empty:
        return pd.DataFrame()
    found = found.join(_speed_ups(found["base"], repeats))
    ratio = found["ranks"] / found["base_ranks"]
    return found.assign(**{name.replace("speed_up", "efficiency"): found[name] / ratio for name in SPEED_UP})


def _with_base(measured: pd.DataFrame, others: list[str]) -> pd.DataFrame:
    """The cells of every series with more than one number of ranks, with `base`, the cell with the fewest."""
    ordered = measured.assign(base=measured.index).sort_values("ranks", kind="stable")
    series = ordered.groupby(others or [pd.Series("", index=ordered.index)], sort=False)
    first, several = series[["base", "ranks"]].transform("first"), series["ranks"].transform("nunique") > 1
    found = measured.assign(base=first["base"], base_ranks=first["ranks"])
    return found[several.reindex(found.index)]


def _speed_ups(base: pd.Series, repeats: pd.DataFrame) -> pd.DataFrame:
    """`SPEED_UP` of each cell over its base, over the repeats that measured both."""
    own = repeats[repeats["cell"].isin(base.index)]
    work = repeats.set_index(["cell", "repeat"])["work_per_s"]
    pairs = pd.MultiIndex.from_arrays([own["cell"].map(base), own["repeat"]])
    logs = np.log(own["work_per_s"] / work.reindex(pairs).to_numpy()).dropna().groupby(own["cell"])
    found = {cell: log_mean_interval(each.to_numpy()) for cell, each in logs}
    table = pd.DataFrame.from_dict(found, orient="index", columns=SPEED_UP)
    table.loc[table.index == base.reindex(table.index), SPEED_UP[1:]] = np.nan
    return table
