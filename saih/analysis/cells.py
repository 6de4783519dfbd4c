"""From raw samples to one row a cell: step time with interval, rates, % of peak, phase shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saih.analysis.intervals import step_intervals
from saih.core import LOADS, PHASES, WHOLE, Axis, Rung

RATES = (
    *("flop_per_s", "bytes_per_s", "work_per_s", "work_per_s_per_rank"),
    *("percent_of_peak", "percent_of_datasheet", "percent_of_copy"),
    *("percent_of_gemm", "percent_of_conv3d"),
)
BESIDE = {"percent_of_gemm": "beside_gemm_flop_per_s", "percent_of_conv3d": "beside_conv3d_flop_per_s"}
"""Rates of kernels that were timed right before and after each point, where the sweep asked for it."""


def labels_of(points: pd.DataFrame) -> list[str]:
    """Names of the axes that vary in this table, in the order of the sweep."""
    return [name.removeprefix("label_") for name in points.columns if name.startswith("label_")]


def axes_of(sweep: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes of a stored sweep."""
    return tuple(
        Axis(
            axis["name"],
            axis["unit"],
            tuple(Rung(rung["label"], rung["params"], rung["size"]) for rung in axis["rungs"]),
            named=axis.get("named", _only_numbers(axis["rungs"])),
        )
        for axis in sweep["axes"]
    )


def _only_numbers(rungs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether sizes may be no more than places: for files from before axes said whether they are named."""
    return [rung["size"] for rung in rungs] == list(range(len(rungs)))


def job_steps(points: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """One row a timed step of a whole job: it lasts as long as its slowest rank; work and FLOP add up over ranks.

    Columns: point, step, cell, repeat, step_s, units, flop, moved_bytes, and <phase>_s of the slowest rank.
    """
    timed = samples[samples["warmup"] == 0]
    keys = ["point", "step"]
    slowest = timed.loc[
        timed.groupby(keys, sort=False)["step_s"].idxmax(), [*keys, "step_s", *(f"{p}_s" for p in PHASES)]
    ]
    totals = timed.groupby(keys, sort=False)[["units", "flop", "moved_bytes"]].sum().reset_index()
    steps = slowest.merge(totals, on=keys)
    return steps.join(points[["cell", "repeat"]], on="point")


def per_point(points: pd.DataFrame, steps: pd.DataFrame, sweep: Mapping[str, Any]) -> pd.DataFrame:
    """One row a measured point (one repeat), indexed like `points`: step time, rates, phase shares, its check."""
    grouped = steps.groupby("point", sort=False)
    table = grouped[["step_s", "units", "flop", "moved_bytes"]].median()
    checked = [name for name in points.columns if name.startswith("check_")]
    columns = ["cell", "repeat", "ranks", *BESIDE.values(), *(f"label_{axis}" for axis in labels_of(points)), *checked]
    columns += [name for name in ("param_ablation",) if name in points]
    table = table.join(_phase_shares(steps, "point"))
    table = table.join(points.reindex(columns=columns))  # no point has ranks where none was measured
    return _with_rates(table.join(_precision(points)), sweep)


def per_cell(points: pd.DataFrame, steps: pd.DataFrame, sweep: Mapping[str, Any]) -> pd.DataFrame:
    """One row a cell in sweep order, measured or not: status, step time with 95 % interval, rates, phase shares."""
    first = points.assign(measured=points["status"] == "measured")
    first = first.sort_values("measured", ascending=False, kind="stable").drop_duplicates("cell")
    table = first.assign(precision=_precision(first)).set_index("cell").loc[points["cell"].unique()]
    if steps.empty:
        return table
    found = step_intervals(steps)
    work = steps.groupby("cell", sort=False)[["units", "flop", "moved_bytes"]].median()
    count = steps.groupby("cell", sort=False).size().rename("steps")
    beside = points.reindex(columns=["cell", *BESIDE.values()]).groupby("cell", sort=False).median()
    table = table.drop(columns=[*BESIDE.values()], errors="ignore").join(beside)
    table = table.join(found).join(work).join(count).join(_phase_shares(steps, "cell"))
    return _with_rates(table, sweep)


def _phase_shares(steps: pd.DataFrame, by: str) -> pd.DataFrame:
    """Columns share_<phase>: of the time of all steps of a point or a cell."""
    sums = steps.groupby(by, sort=False)[[f"{phase}_s" for phase in PHASES] + ["step_s"]].sum()
    return pd.DataFrame({f"share_{phase}": sums[f"{phase}_s"] / sums["step_s"] for phase in PHASES})


def is_complete(table: pd.DataFrame) -> pd.Series:
    """Rows of points or cells whose steps do all their work: no part is taken out."""
    if "param_ablation" not in table:
        return pd.Series(True, index=table.index)
    return table["param_ablation"].fillna(WHOLE) == WHOLE


def is_whole(table: pd.DataFrame) -> pd.Series:
    """Rows of points or cells measured as users run them: no part taken out, no load put beside."""
    whole = is_complete(table)
    for load in LOADS:
        whole &= table.get(f"param_{load}", pd.Series(0, index=table.index)).fillna(0) == 0
    return whole


def peaks(sweep: Mapping[str, Any], precision: str) -> tuple[float, float]:
    """(measured, data sheet) FLOP/s of one device; NaN where unknown."""
    measured = ((sweep.get("ceilings") or {}).get("rates") or {}).get(precision)
    sheet = sweep["site"]["peak"]["flop_per_s"].get(precision)
    return float(measured or "nan"), float(sheet or "nan")


def copy_rate(sweep: Mapping[str, Any]) -> float:
    """Bytes/s of the measured memory copy of one device; NaN where unknown."""
    return float(((sweep.get("ceilings") or {}).get("rates") or {}).get("copy") or "nan")


def memory_bound(cells: pd.DataFrame) -> pd.Series:
    """Whether the bytes of a step take longer than its FLOP, each at the measured ceiling (Williams et al. 2009)."""
    return cells["percent_of_copy"] > cells["percent_of_peak"].fillna(0.0)


def _with_rates(table: pd.DataFrame, sweep: Mapping[str, Any]) -> pd.DataFrame:
    known = {precision: peaks(sweep, precision) for precision in table["precision"].unique()}
    measured = table["precision"].map(lambda name: known[name][0]).astype(float)
    sheet = table["precision"].map(lambda name: known[name][1]).astype(float)
    flop_per_s = table["flop"] / table["step_s"]
    bytes_per_s = table["moved_bytes"] / table["step_s"]
    per_rank = flop_per_s / table["ranks"]
    complete = is_complete(table)  # else there was less to do than these FLOP and bytes
    computes, moves = complete & (table["flop"] > 0), complete & (table["moved_bytes"] > 0)
    return table.assign(
        flop_per_s=flop_per_s.where(complete),
        bytes_per_s=bytes_per_s.where(moves),
        work_per_s=table["units"] / table["step_s"],
        work_per_s_per_rank=table["units"] / table["step_s"] / table["ranks"],
        percent_of_peak=(100 * per_rank / measured).where(computes),
        percent_of_datasheet=(100 * per_rank / sheet).where(computes),
        percent_of_copy=(100 * bytes_per_s / table["ranks"] / copy_rate(sweep)).where(moves),
        **{name: (100 * per_rank / table[rate]).where(computes) for name, rate in BESIDE.items()},
    )


def _precision(points: pd.DataFrame) -> pd.Series:
    """The precision each point computes in; workloads without the parameter compute in fp32."""
    if "param_precision" in points:
        return points["param_precision"].rename("precision")
    return pd.Series("fp32", index=points.index, name="precision")
