"""Evaluate what a workload's spec claims, from measurements: holds, fails, or not measurable here and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis.cells import is_whole, labels_of
from saih.analysis.intervals import log_mean_interval
from saih.core import EXPERIMENTS, Claim

ENDS = ("first", "last")
SIMULATED = "check_simulated_"
"""So begin the names of numbers in simulated time: every repeat gives the same, so that one says all."""
PREDICTED = "check_predicted_"
"""Before a metric's name: what the workload itself predicts of it at a point."""


def evaluate(claim: Claim, points: pd.DataFrame, measured: pd.DataFrame) -> dict[str, Any]:
    """One claim as plain data. `points` is the flat table, `measured` is `per_point` of it.

    A claim without a denominator is about the metric itself. Else the ratio is taken repeat by repeat between cells
    that differ in nothing else, as a geometric mean over such pairs. The interval is Student's t over the logarithms
    of the repeats. Of several pairs, `series` has each by itself; `points` are the rows of the flat table it rests on.
    """
    told: dict[str, Any] = {
        "name": claim.name,
        "text": claim.text,
        "metric": claim.metric,
        "better": claim.better,
        "paper": claim.paper,
        "target": claim.target,
        "bound": claim.bound,
        "predicted": None,
        "measured": None,
        "interval": None,
        "pairs": 0,
        "points": [],
        "verdict": "not-measurable",
        "why": "",
        "series": [],
    }
    pairs = _pairs(claim, points, measured)
    if isinstance(pairs, str):
        return told | {"why": pairs}
    told |= _ratio(claim, pairs) | {"pairs": int(pairs.groupby("repeat").size().max()), "series": _series(claim, pairs)}
    told["points"] = sorted({int(point) for name in pairs if name.startswith("point") for point in pairs[name]})
    if told["interval"] is None:
        return told | {"why": "one repeat gives no interval; run with --repeat 3"}
    return told | _verdict(claim, *told["interval"])


def _ratio(claim: Claim, pairs: pd.DataFrame) -> dict[str, Any]:
    """Measured with its interval, and predicted."""
    logs = np.log(pairs["ratio"]).groupby(pairs["repeat"]).mean().to_numpy()
    ratio, low, high = log_mean_interval(logs)
    interval = None if np.isnan(low) else [low, high]
    if claim.metric.startswith(SIMULATED):
        interval = [ratio, ratio]
    return {"measured": ratio, "interval": interval, "predicted": _predicted(claim, pairs)}


def _series(claim: Claim, pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """The ratio for each combination of the other labels, in the order of the sweep; none where there is only one."""
    varying = [name for name in labels_of(pairs) if pairs[f"label_{name}"].nunique() > 1]
    if not varying:
        return []
    groups = pairs.groupby([f"label_{name}" for name in varying], sort=False)
    return [
        {"labels": dict(zip(varying, map(str, labels), strict=True))} | _ratio(claim, group) for labels, group in groups
    ]


def _verdict(claim: Claim, low: float, high: float) -> dict[str, str]:
    good, bad = low >= claim.target, high < claim.target
    if claim.better == "lower":
        good, bad = high <= claim.target, low > claim.target
    if good:
        return {"verdict": "holds"}
    if bad:
        return {"verdict": "fails", "why": f"the whole interval misses the target {claim.target:g}"}
    return {
        "verdict": "not-measurable",
        "why": f"the interval straddles the target {claim.target:g}; more repeats would tell",
    }


def _pairs(claim: Claim, points: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame | str:
    """Columns repeat, ratio, predicted, label_<axis>, point*: one row a pair of points; or why there are none."""
    axes = labels_of(points)
    where = {axis: label for axis, label in claim.where.items() if axis in axes or label not in ENDS}
    named = [*claim.numerator, *claim.denominator, *where]
    missing = sorted({axis for axis in named if axis not in axes})
    if missing:
        return f"axis {', '.join(missing)} does not vary in this sweep"
    if claim.metric not in measured:
        return f"no measured point has {claim.metric}"
    usable = measured[np.isfinite(measured[claim.metric]) & _as_claimed(points, measured, named)]
    if usable.empty:
        return f"no measured point has {claim.metric}; run saih probe for a measured peak"
    chosen = _select(usable, points, where, fewest_rungs=1)
    top = _select(chosen, points, claim.numerator, fewest_rungs=2)
    rest = [f"label_{axis}" for axis in axes if axis not in claim.numerator]
    columns = [*rest, "repeat", claim.metric]
    top = top[columns].assign(predicted=_prediction(points, top, claim.metric), point=top.index)
    if not claim.denominator:
        if top.empty:
            return f"no measured point at {_words(claim.numerator)}"
        return _in_every_repeat(top.assign(ratio=top[claim.metric], predicted=np.nan), rest)
    bottom = _select(chosen, points, claim.denominator, fewest_rungs=2)
    bottom = bottom[columns].assign(predicted=_prediction(points, bottom, claim.metric), point=bottom.index)
    pairs = top.merge(bottom, on=[*rest, "repeat"], suffixes=("_top", "_bottom"))
    if pairs.empty:
        return f"no measured pair of {_words(claim.numerator)} and {_words(claim.denominator)}"
    ratio = pairs[f"{claim.metric}_top"] / pairs[f"{claim.metric}_bottom"]
    predicted = pairs["predicted_top"] / pairs["predicted_bottom"]
    kept = _in_every_repeat(pairs.assign(ratio=ratio, predicted=predicted), rest)
    if kept.empty:
        return "no pair was measured in every repeat; run the sweep again for the missing points"
    if set(claim.numerator.values()) == {"last"} and (kept["ratio"] == 1).all():
        return f"only one rung of {', '.join(claim.numerator)} is measured"
    return kept[[*rest, "repeat", "ratio", "predicted", "point_top", "point_bottom"]]


def _as_claimed(points: pd.DataFrame, measured: pd.DataFrame, named: Sequence[str]) -> pd.Series:
    """Which rows a claim is about: those of undisturbed steps, unless it names an axis that disturbs them."""
    if set(named) & set(EXPERIMENTS):
        return pd.Series(True, index=measured.index)
    return is_whole(points.loc[measured.index])


def _words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis}={label}" for axis, label in labels.items())


def _in_every_repeat(pairs: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Series that every repeat has: a mean over other series in another repeat would compare unlike things."""
    if not labels:
        return pairs
    repeats = pairs.groupby(list(labels))["repeat"].transform("nunique")
    return pairs[repeats == pairs["repeat"].nunique()]


def _select(table: pd.DataFrame, points: pd.DataFrame, labels: Mapping[str, str], fewest_rungs: int) -> pd.DataFrame:
    """Rows at these labels; "first" and "last" mean the ends of each series that differs in this axis only.

    A series with fewer rungs than `fewest_rungs` has no ends.
    """
    for axis, label in labels.items():
        column = f"label_{axis}"
        if label not in ENDS:
            table = table[table[column] == label]
            continue
        size = points.loc[table.index, f"size_{axis}"]
        others = [name for name in table.columns if name.startswith("label_") and name != column]
        grouped = size.groupby([table[name] for name in others] or [pd.Series("", index=table.index)])
        ends = grouped.transform("min" if label == "first" else "max")
        enough = grouped.transform("nunique") >= fewest_rungs
        table = table[(size == ends) & enough]
    return table


def _prediction(points: pd.DataFrame, table: pd.DataFrame, metric: str) -> pd.Series:
    """What the workload predicts of the metric; else its plan, up to a factor that cancels in a ratio; else NaN."""
    told = PREDICTED + metric.removeprefix("check_")
    if told in table and table[told].notna().any():
        return table[told]
    planned = points.loc[table.index]
    ranks = planned["param_nodes"] * planned["param_gpus"]
    amount = {
        "step_s": planned["predicted_step_s"] ** 2,
        "percent_of_peak": planned["predicted_flop"],
        "percent_of_datasheet": planned["predicted_flop"],
        "flop_per_s": planned["predicted_flop"] * ranks,
        "work_per_s": planned["predicted_work"] * ranks,
        "work_per_s_per_rank": planned["predicted_work"],
    }
    return amount[metric] / planned["predicted_step_s"] if metric in amount else planned["predicted_step_s"] * np.nan


def _predicted(claim: Claim, pairs: pd.DataFrame) -> float | None:
    """The ratio of predictions; the roofline knows nothing of communication, so it says nothing where ranks differ."""
    if {"nodes", "gpus"} & {*claim.numerator, *claim.denominator}:
        return None
    ratio = float(np.exp(np.log(pairs["predicted"]).mean()))
    return ratio if np.isfinite(ratio) else None


def evaluate_all(
    claims: Sequence[Claim], points: pd.DataFrame, measured: pd.DataFrame, workload: str
) -> list[dict[str, Any]]:
    """Every claim of a workload's spec, with the workload's name."""
    return [{"workload": workload} | evaluate(claim, points, measured) for claim in claims]
