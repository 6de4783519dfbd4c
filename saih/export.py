"""A results file in the formats of others: CSV, JSON, Extra-P, MLPerf log lines, a worksheet to paste."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from saih.analysis import energy, spreadsheet
from saih.analysis.cells import labels_of
from saih.errors import unknown
from saih.report import trends
from saih.report.results import STATISTICS, Results, read

FORMAT = 1
"""Of the JSON document."""


def export(results: Path, to: str) -> str:
    """The text of a results file in format `to`, one of FORMATS; SaihError for another, or an unreadable file."""
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    _, write = FORMATS[to]
    return write(read(results))


def cells(results: Results) -> pd.DataFrame:
    """One row a cell: labels, status, statistics with intervals, and joule a unit of work of each source there is."""
    labels = [f"label_{axis}" for axis in labels_of(results.cells)]
    table = results.cells[[*labels, "status", "kind", "reason", "param_nodes", "ranks", "precision", *STATISTICS]]
    return table.join(_energy(results)).reset_index()


def _energy(results: Results) -> pd.DataFrame:
    drawn = energy.per_cell(results.points, results.samples).set_index("cell")
    found = pd.DataFrame(index=results.cells.index)
    for source, mine in drawn.groupby("source", sort=False):
        columns = ["joule_per_work", "joule_per_work_low", "joule_per_work_high", "mean_power_w", "scope", "hz"]
        found = found.join(mine[columns].add_prefix(f"{source}_"))
    return found


def _csv(results: Results) -> str:
    return spreadsheet.csv(cells(results))


def _worksheet(results: Results) -> str:
    """The columns that procurements ask for: what ran, on what, how long, how sure."""
    table = results.whole
    steps = {"time of a step [s]": "step_s", "low [s]": "step_s_low", "high [s]": "step_s_high"}
    drawn = _energy(results).reindex(table.index)
    columns: dict[str, Any] = {
        "application": table["workload"],
        "problem": [results.labels(row) for row in table.to_dict("records")],
        "nodes": table["param_nodes"],
        "ranks": table["ranks"],
        "threads a rank": results.sweep["site"]["threads_per_rank"],
        "precision": table["precision"],
        **{name: table[column] for name, column in steps.items()},
        f"{results.work_unit} a second": table["work_per_s"],
        "% of measured ceiling": table["percent_of_peak"],
        f"% of {results.denominators['percent_of_datasheet']}": table["percent_of_datasheet"],
        "repeats": table["repeats"],
    }
    for name in drawn:
        if str(name).endswith("_joule_per_work"):
            source = str(name).removesuffix("_joule_per_work")
            columns[f"J per unit of work ({source})"] = drawn[name]
            columns[f"scope ({source})"] = drawn[f"{source}_scope"]
    return spreadsheet.tsv(pd.DataFrame(columns))


def _json(results: Results) -> str:
    """Everything but raw samples; what is not there is null."""
    told = {
        "format": FORMAT,
        "kind": "measured",
        "sweep": dict(results.sweep),
        "environments": results.environments,
        "work_unit": results.work_unit,
        "cells": _records(cells(results)),
        "points": _records(results.points.drop(columns="log_tail")),
        "energy": _records(energy.per_cell(results.points, results.samples)),
        "claims": results.claims,
    }
    return json.dumps(_finite(told), indent=1, allow_nan=False, default=str) + "\n"


def _mlperf(results: Results) -> str:
    """Lines of MLPerf's logging library (mlcommons/logging, mllog): a run a point, its time from the timed steps."""
    lines = [
        line for _, point in results.points.iterrows() if point["status"] == "measured" for line in _run(results, point)
    ]
    return "".join(f":::MLLOG {json.dumps(_finite(line), allow_nan=False)}\n" for line in lines)


def _run(results: Results, point: pd.Series) -> Iterator[dict[str, Any]]:
    """Events of one point. Points of before timed steps had a clock time get no start and stop: none is made up."""
    began_ms = int(datetime.datetime.fromisoformat(point["began"]).timestamp() * 1e3)
    labels = {axis.name: point[f"label_{axis.name}"] for axis in results.axes}
    metadata = {
        "file": results.path.name,
        "lineno": int(str(point.name)),
        "point": point["id"],
        "repeat": int(point["repeat"]),
    }
    known = results.by_point.loc[point.name]

    def event(kind: str, key: str, value: Any, time_ms: int, **rest: Any) -> dict[str, Any]:
        core = {"namespace": point["id"], "time_ms": time_ms, "event_type": kind, "key": key, "value": value}
        return core | {"metadata": metadata | rest}

    yield event("POINT_IN_TIME", "submission_benchmark", str(point["workload"]), began_ms, **labels)
    yield event("POINT_IN_TIME", "submission_platform", str(results.sweep["site"]["name"]), began_ms)
    yield event("POINT_IN_TIME", "seed", int(point["seed"]), began_ms)
    end_ms = began_ms
    if math.isfinite(point.get("timed_end_s", math.nan)):
        start_ms, end_ms = (int(1e3 * point[f"timed_{edge}_s"]) for edge in ("begin", "end"))
        yield event("INTERVAL_START", "run_start", None, start_ms)
        yield event("INTERVAL_END", "run_stop", None, end_ms, status="success")
    stats = {"throughput": float(known["work_per_s"]), "step_s": float(known["step_s"])}
    yield event("POINT_IN_TIME", "tracked_stats", stats, end_ms, unit=f"{results.work_unit}/s")


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """Without NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FORMATS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "csv": ("csv", _csv),
    "json": ("json", _json),
    "extrap": ("jsonl", trends.extra_p),
    "mlperf": ("log", _mlperf),
    "worksheet": ("tsv", _worksheet),
}
"""Name -> (ending of the file, what writes it)."""
