"""Speed-up and efficiency over ranks, against a base case that is named."""

from __future__ import annotations

import pandas as pd

from saih.analysis.cells import labels_of

RESOURCES = ("nodes", "gpus")


def scaling(cells: pd.DataFrame) -> pd.DataFrame:
    """Rows: measured cells of every series that differs in ranks only; empty where ranks do not vary.

    Adds `base_ranks`, `speed_up` (ratio of work per second to the fewest ranks of the series), its interval, and
    `efficiency` = speed_up / (ranks / base_ranks).
    """
    axes = labels_of(cells)
    if not set(axes) & set(RESOURCES):
        return pd.DataFrame()
    measured = cells[cells["status"] == "measured"]
    others = [f"label_{axis}" for axis in axes if axis not in RESOURCES]
    series = measured.groupby(others, sort=False) if others else [((), measured)]
    parts = [_against_base(group) for _, group in series if group["ranks"].nunique() > 1]
    return pd.concat(parts) if parts else pd.DataFrame()


def _against_base(group: pd.DataFrame) -> pd.DataFrame:
    base = group.loc[group["ranks"].idxmin()]
    speed_up = group["work_per_s"] / base["work_per_s"]
    own, other = (row["step_s_high"] / row["step_s"] - 1 for row in (group, base))  # relative half-widths
    error = speed_up * (own**2 + other**2) ** 0.5  # independent errors; none where a cell is its own base
    return group.assign(
        base_ranks=base["ranks"],
        speed_up=speed_up,
        speed_up_error=error.where(group["ranks"] != base["ranks"], 0.0),
        efficiency=speed_up / (group["ranks"] / base["ranks"]),
    )
