"""What a decision maker reads first: the range of % of peak, its two denominators with their sources, the counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saih.analysis.ceilings import find_ceilings
from saih.analysis.cells import peaks
from saih.probe import WORKLOAD as CEILINGS
from saih.report import numbers
from saih.report.results import Results
from saih.report.tables import counts


@dataclass(frozen=True)
class Range:
    """Lowest and highest of one quantity over all measured cells, and the cells they were measured in."""

    low: str
    high: str
    of: str
    lowest: str
    highest: str

    def __str__(self) -> str:
        ends = self.low if self.low == self.high else f"{self.low} -> {self.high}"
        return f"{ends} {self.of}"


@dataclass(frozen=True)
class Summary:
    """The headline."""

    title: str
    machine: str
    date: str
    ranges: list[Range]
    """The range to quote first; the same against the other denominator second."""
    denominators: list[str]
    """What 100 % is, and where the figure comes from."""
    caveats: list[str]
    counts: dict[str, int]
    repeats_failed: int
    """Failed points of cells that other repeats did measure."""


def summarize(results: Results) -> Summary:
    """The headline of a results file, with what can honestly be said where ceilings, FLOP or measurements lack."""
    ranges, caveats = (_ceilings(results), []) if is_ceilings(results) else _ranges(results)
    return Summary(
        results.title,
        _machine(results),
        _date(results.points),
        ranges,
        [] if is_ceilings(results) else _denominators(results),
        caveats,
        counts(results),
        _repeats_failed(results),
    )


def plain(summary: Summary) -> str:
    """One or two lines for a terminal."""
    if not summary.ranges:
        return f"nothing measured on {summary.machine}"
    lines = [f"{', '.join(map(str, summary.ranges))}, on {summary.machine}"]
    ends = summary.ranges[0]
    if ends.lowest != ends.highest:
        lines.append(f"lowest at {ends.lowest}, highest at {ends.highest}")
    return "\n".join(lines)


def is_ceilings(results: Results) -> bool:
    """Whether these are the ceilings themselves, which have no measured ceiling to be compared with."""
    return bool(results.sweep["workload"] == CEILINGS)


def chosen_ceilings(results: Results) -> Mapping[str, Any]:
    """The ceilings a sweep of the ceilings workload comes to; empty where nothing was measured."""
    if results.measured.empty:
        return {"rates": {}, "sources": {}}
    return find_ceilings(results.cells, results.environments[0])


def _ceilings(results: Results) -> list[Range]:
    """The ceilings themselves, one after the other."""
    found = chosen_ceilings(results)
    ranges = []
    for name, rate in found["rates"].items():
        unit, what = ("B/s", "memory copy") if name == "copy" else ("FLOP/s", f"sustained in {name}")
        figure = numbers.si(rate, unit)
        ranges.append(Range(figure, figure, what, found["sources"][name], found["sources"][name]))
    return ranges


def _ranges(results: Results) -> tuple[list[Range], list[str]]:
    caveats = []
    peak = _range(results, "percent_of_peak", "of measured ceiling", _percent)
    sheet = _range(results, "percent_of_datasheet", "of data sheet", _percent)
    if peak is None and sheet is not None:
        caveats.append("no measured ceiling, so these are percentages of the data sheet alone; saih probe measures it")
    if peak is None and sheet is None and not results.measured.empty:
        if (results.measured["flop"] > 0).any():
            caveats.append("no ceiling and no data sheet for this precision: % of peak cannot be told; run saih probe")
        else:
            caveats.append("this workload counts no FLOP: its work per second stands in place of % of peak")
        work = _range(results, "work_per_s", f"{results.work_unit}/s", numbers.large)
        return [work] if work else [], caveats
    return [found for found in (peak, sheet) if found], caveats


def _range(results: Results, column: str, of: str, form: Any) -> Range | None:
    values = results.measured[column].dropna()
    if values.empty:
        return None
    low, high = values.idxmin(), values.idxmax()
    names = [results.labels(results.cells.loc[cell]) for cell in (low, high)]
    return Range(form(values[low]), form(values[high]), of, *names)


def _percent(value: float) -> str:
    return f"{numbers.three(value)} %"


def _denominators(results: Results) -> list[str]:
    sweep, told = results.sweep, []
    sources = (sweep.get("ceilings") or {}).get("sources") or {}
    for precision in sorted(results.measured["precision"].unique()):
        measured, sheet = peaks(sweep, precision)
        if measured > 0:
            source = sources.get(precision, "source not stored")
            told.append(f"measured ceiling, {precision}: {numbers.si(measured, 'FLOP/s')} a device ({source})")
        if sheet > 0:
            source = sweep["site"]["peak"]["source"] or "source not stated"
            told.append(f"data sheet, {precision}: {numbers.si(sheet, 'FLOP/s')} a device ({source})")
    return told


def _machine(results: Results) -> str:
    site = results.sweep["site"]
    parts = {environment.get("gpu") or environment.get("processor", "") for environment in results.environments}
    named = ", ".join(sorted(filter(None, parts))) or site["device_name"]
    return f"{site['name']} ({named})" if named else str(site["name"])


def _date(points: pd.DataFrame) -> str:
    began = sorted(text[:10] for text in points.get("began", []) if text)
    if not began:
        return ""
    return began[0] if began[0] == began[-1] else f"{began[0]} to {began[-1]}"


def _repeats_failed(results: Results) -> int:
    failed = results.points[results.points["status"] == "failed"]
    return int((results.cells["status"].reindex(failed["cell"]) == "measured").sum())
