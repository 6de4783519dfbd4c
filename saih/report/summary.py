"""What a decision maker reads first: the range of % of peak, its two denominators with their sources, the counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saih.analysis import numbers
from saih.analysis.ceilings import find_ceilings, unit
from saih.analysis.cells import BESIDE, copy_rate, memory_bound, peaks
from saih.probe import WORKLOAD as CEILINGS
from saih.report.results import PERCENTAGES, Results
from saih.report.tables import counts


@dataclass(frozen=True)
class Range:
    """Lowest and highest of one quantity, the cells they were measured in, and how certain they are."""

    low: str
    high: str
    of: str
    lowest: str
    highest: str
    certainty: str = ""

    def __str__(self) -> str:
        ends = self.low if self.low == self.high else f"{self.low} -> {self.high}"
        return f"{ends} {self.of}"


@dataclass(frozen=True)
class Allocation:
    """The ranges over all cells measured on so many ranks: the first is the one to quote."""

    ranks: str
    """Empty where all cells have the same."""
    ranges: list[Range]


@dataclass(frozen=True)
class Summary:
    """The headline."""

    title: str
    machine: str
    date: str
    allocations: list[Allocation]
    """The fewest ranks; then the most, where ranks vary: more ranks are not a larger application."""
    denominators: list[str]
    """What 100 % is, and where the figure comes from."""
    caveats: list[str]
    diagnoses: list[str]
    """What was seen that explains the speed, with the cells it holds for; and that ceilings were refused."""
    counts: dict[str, int]
    repeats_failed: int
    """Failed points of cells that other repeats did measure."""


def summarize(results: Results) -> Summary:
    """The headline of a results file, with what can honestly be said where ceilings, FLOP or measurements lack."""
    probing = is_ceilings(results)
    return Summary(
        results.title,
        _machine(results),
        _date(results.points),
        _ceilings(results) if probing else _allocations(results),
        [] if probing else _denominators(results),
        [] if probing else _caveats(results),
        _diagnoses(results),
        counts(results),
        _repeats_failed(results),
    )


def plain(summary: Summary) -> str:
    """A few lines for a terminal."""
    if not summary.allocations:
        return f"nothing measured on {summary.machine}"
    first, *more = summary.allocations
    lines = [f"{_line(first)}, on {summary.machine}{f', {first.ranks}' if first.ranks else ''}"]
    lines += [f"{_line(each)}, on {each.ranks}" for each in more]
    ends = first.ranges[0]
    if ends.lowest != ends.highest:
        lines.append(f"lowest at {ends.lowest}, highest at {ends.highest}")
    lines += [f"diagnosis: {each}" for each in summary.diagnoses]
    return "\n".join(lines)


def _line(allocation: Allocation) -> str:
    return ", ".join(map(str, allocation.ranges))


def is_ceilings(results: Results) -> bool:
    """Whether these are the ceilings themselves, which have no measured ceiling to be compared with."""
    return bool(results.sweep["workload"] == CEILINGS)


def chosen_ceilings(results: Results) -> Mapping[str, Any]:
    """The ceilings a sweep of the ceilings workload comes to; empty where nothing was measured."""
    if results.measured.empty:
        return {"rates": {}, "sources": {}}
    return find_ceilings(results.cells, results.environments[0])


def ceiling_intervals(ceilings: Mapping[str, Any] | None) -> dict[str, str]:
    """The 95 % interval of each ceiling that has one."""
    found = (ceilings or {}).get("intervals") or {}
    known = {name: ends for name, ends in found.items() if ends}
    return {name: numbers.span(low, high, unit(name)) for name, (low, high) in known.items()}


def _what(ceiling: str) -> str:
    kind, _, which = ceiling.replace("-nodes", "").partition("-")
    words = {
        "copy": "memory copy",
        "triad": "memory triad",
        "upload": "host to device",
        "download": "device to host",
        "allreduce": f"all-reduce over {which}",
        "pingpong": "between two ranks",
        "pingpong_s": "from rank to rank",
        "read": f"read ({which.replace('-', ', ')})",
        "write": f"written ({which.replace('-', ', ')})",
        "opens_per_s": "files opened, read and closed",
        "launch_s": "a kernel launch",
    }
    told = words.get(kind, f"sustained in {ceiling}")
    return told + (", page-locked" if which == "pinned" else "") + (", between nodes" if "-nodes" in ceiling else "")


def _ceilings(results: Results) -> list[Allocation]:
    """The ceilings themselves, one after the other."""
    found = chosen_ceilings(results)
    intervals = ceiling_intervals(found)
    ranges = []
    for name, rate in found["rates"].items():
        figure, source = numbers.si(rate, unit(name)), found["sources"][name]
        certainty = f"95 % interval {intervals[name]}" if name in intervals else ""
        ranges.append(Range(figure, figure, _what(name), source, source, certainty))
    return [Allocation("", ranges)] if ranges else []


def _allocations(results: Results) -> list[Allocation]:
    """The ranges on the fewest and, where they vary, on the most ranks."""
    cells = results.whole
    counted = sorted(cells["ranks"].unique())
    ends = counted if len(counted) < 2 else [counted[0], counted[-1]]
    found = [
        Allocation(
            numbers.plural(int(ranks), "rank") if len(ends) > 1 else "",
            _ranges(results, cells[cells["ranks"] == ranks]),
        )
        for ranks in ends
    ]
    return [each for each in found if each.ranges]


def _ranges(results: Results, cells: pd.DataFrame) -> list[Range]:
    """% against each denominator that is known anywhere; else the work per second."""
    columns = {column: f"of {name}" for column, name in results.denominators.items() if _is_known(results, column)}
    columns |= {
        name: f"of {name.removeprefix('percent_of_')} timed beside" for name in BESIDE if _is_known(results, name)
    }
    columns = columns or {"work_per_s": f"{results.work_unit}/s"}
    found = [_range(results, cells, column, of) for column, of in columns.items() if cells[column].notna().any()]
    bound = cells[memory_bound(cells)]
    if not bound.empty:
        found.append(_range(results, bound, "percent_of_copy", "of memory copy where memory is the tighter bound"))
    return found


def _diagnoses(results: Results) -> list[str]:
    """Whether ceilings were refused; and each note that checks left, once, after the cells it holds for."""
    refused = results.sweep.get("ceilings_refused", "")
    told = [f"ceilings of another machine are not used ({refused}); saih probe measures this one's"] if refused else []
    cells: dict[str, list[str]] = {}
    noted = results.measured[results.measured.get("notes", pd.Series("", index=results.measured.index)) != ""]
    for _, cell in noted.iterrows():
        for note in cell["notes"].splitlines():
            cells.setdefault(note, []).append(results.labels(cell))
    return told + [f"{'; '.join(labels)}: {note}" for note, labels in cells.items()]


def _is_known(results: Results, column: str) -> bool:
    return bool(results.whole[column].notna().any())


def _caveats(results: Results) -> list[str]:
    peak, sheet = (_is_known(results, column) for column in PERCENTAGES)
    name = results.denominators["percent_of_datasheet"]
    if peak or results.measured.empty:
        return []
    if sheet:
        return [f"no measured ceiling, so these are percentages of the {name} alone; saih probe measures it"]
    if (results.measured["flop"] > 0).any():
        return [f"no ceiling and no {name} for this precision: % of peak cannot be told; run saih probe"]
    return ["this workload counts no FLOP: its work per second stands in place of % of peak"]


def _range(results: Results, cells: pd.DataFrame, column: str, of: str) -> Range:
    low, high = (cells.loc[cell] for cell in (cells[column].idxmin(), cells[column].idxmax()))
    form, unit = (numbers.three, " %") if column.startswith("percent") else (numbers.large, "")
    lowest, highest = (f"{form(cell[column])}{unit}" for cell in (low, high))
    certainty = _certainty(low, high, column, form, unit)
    return Range(lowest, highest, of, results.labels(low), results.labels(high), certainty)


def _certainty(low: pd.Series, high: pd.Series, column: str, form: Callable[[float], str], unit: str) -> str:
    """The intervals of both ends, what they cover, and from how many repeats."""
    spans, repeats, covers = [], [], []
    for cell in (low, high):
        rates = (cell[column] * cell["step_s"] / cell[step] for step in ("step_s_high", "step_s_low"))
        spans.append(" to ".join(map(form, rates)) + unit)
        repeats.append(numbers.plural(int(cell["repeats"]), "repeat"))
        covers.append(cell["interval"])
    spans, repeats, covers = (list(dict.fromkeys(each)) for each in (spans, repeats, covers))
    plural = "s" if len(spans) > 1 else ""
    told = [f"95 % interval{plural} {' and '.join(spans)}", " and ".join(covers), " and ".join(repeats)]
    return ", ".join(told)


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
            name = results.denominators["percent_of_datasheet"]
            told.append(f"{name}, {precision}: {numbers.si(sheet, 'FLOP/s')} a device ({source})")
    if memory_bound(results.measured).any():
        source = sources.get("copy", "source not stored")
        told.append(f"memory copy: {numbers.si(copy_rate(sweep), 'B/s')} read and written a device ({source})")
    return told


def _machine(results: Results) -> str:
    return f"{results.site} ({results.device})" if results.device else results.site


def _date(points: pd.DataFrame) -> str:
    began = sorted(text[:10] for text in points.get("began", []) if text)
    if not began:
        return ""
    return began[0] if began[0] == began[-1] else f"{began[0]} to {began[-1]}"


def _repeats_failed(results: Results) -> int:
    failed = results.points[results.points["status"] == "failed"]
    return int((results.cells["status"].reindex(failed["cell"]) == "measured").sum())
