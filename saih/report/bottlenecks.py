"""The page's part on what holds each cell back: shares, verdicts with their evidence, what a better part would give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saih.analysis import numbers
from saih.analysis.bottleneck import CACHED_SHARE, LIMITS, TIMED, Limit, Share, Verdict
from saih.report.grid import MOST_GROUPS, layout, left_out, spread, words
from saih.report.results import Results

MOST_ROWS = 120
FIVE = 5
"""Times the memory of the host a data set has to be for storage to be what is measured."""
VISIBLE_SHARE = 0.005


@dataclass(frozen=True)
class Map:
    """Verdicts over two axes."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[tuple[str, str, bool]]]]
    """Of each rung of the second axis: (verdict, share, whether it is certain) for each of the first."""


def rows(results: Results) -> list[dict[str, Any]]:
    """For a spread of cells: labels, bars, verdict, evidence, and what doubling each part's speed would give."""
    return [_row(results, verdict) for verdict in spread(results.verdicts, MOST_ROWS)]


def maps(results: Results) -> tuple[list[Map], str]:
    """A map of verdicts for each combination of the further axes; and how many are left out."""
    plan = layout(results.problem_axes)
    if plan.lines is None:
        return [], ""
    by_cell = {verdict.cell: verdict for verdict in results.verdicts}
    combinations = list(plan.split(results.undisturbed))
    told = [_map(words(labels), cells, plan, by_cell) for labels, cells in combinations[:MOST_GROUPS]]
    return told, left_out(len(combinations), "map")


def cache_rule(results: Results) -> str:
    """Whether data sets are large enough not to be kept in memory, by MLPerf Storage's rule; empty if nothing is read.

    Sites state the memory of a node; what several nodes read, each of them may keep.
    """
    reading = results.whole[results.whole["file_read_bytes"] > 0]
    if reading.empty:
        return ""
    held = float(reading["predicted_disk_bytes"].max())
    memory = float(results.sweep["site"]["node_memory_gib"]) * 2**30
    if not held:
        return "The data sets were there before; an epoch that storage delivered nothing of is marked."
    told = f"The largest data set is {numbers.si(held, 'B')}, {numbers.three(held / memory)} times a node's memory"
    if held >= FIVE * memory:
        return f"{told}: too large to be read from there."
    return (
        f"{told}; below {FIVE} times (the rule of MLPerf Storage) an epoch may be read from the page cache, so what "
        "storage delivered is counted, and an epoch that it delivered nothing of is marked."
    )


def table(results: Results) -> pd.DataFrame:
    """One row a cell, for download: verdict, evidence, and of each part its share and the gain of doubling it."""
    records = []
    labels = results.cells[[f"label_{axis.name}" for axis in results.axes]].to_dict("index")
    for verdict in results.verdicts:
        record: dict[str, Any] = {"cell": verdict.cell} | labels[verdict.cell]
        record |= {"bottleneck": verdict.bottleneck, "certain": verdict.certain, "evidence": verdict.evidence}
        record["from_storage"] = verdict.from_storage
        if verdict.slowest:
            record |= {"slowest_rank": verdict.slowest.rank, "slowest_host": verdict.slowest.host}
        for part in TIMED:
            share = verdict.shares[part]
            record |= {f"share_{part}": share.of_step, f"share_{part}_low": share.low, f"share_{part}_high": share.high}
            record |= {f"ablated_{part}": share.ablated, f"gain_{part}": share.gain_of_doubling()[0]}
        for name in LIMITS:
            if limit := verdict.limits.get(name):
                record |= {f"share_{name}": limit.of_step, f"gain_{name}": limit.gain}
                record |= {f"share_{name}_low": limit.low, f"share_{name}_high": limit.high}
        records.append(record)
    return pd.DataFrame(records)


def _row(results: Results, verdict: Verdict) -> dict[str, Any]:
    cell = results.cells.loc[verdict.cell]
    visible = {part: share for part, share in verdict.shares.items() if share.of_step >= VISIBLE_SHARE}
    whole = max(1.0, sum(share.of_step for share in visible.values()))
    return {
        "labels": [str(cell[f"label_{axis.name}"]) for axis in results.axes],
        "step": numbers.si(cell["step_s"], "s"),
        "bars": [(part, 100 * visible[part].of_step / whole) for part in TIMED if part in visible],
        "verdict": verdict.bottleneck,
        "certain": verdict.certain,
        "evidence": verdict.evidence,
        "cached": verdict.from_storage < CACHED_SHARE,
        "slowest": verdict.slowest,
        "parts": [line for part in visible for line in _lines(verdict, part)],
    }


def _lines(verdict: Verdict, part: str) -> Iterator[tuple[str, bool, tuple[str, str], tuple[str, str]]]:
    """(name, whether an experiment shows it, share, gain) of a part, and of what computing goes to."""
    share = verdict.shares[part]
    yield part, share.ablated, _percent(share), _gain(share)
    if part == "compute":
        for name, limit in verdict.limits.items():
            if limit.of_step >= VISIBLE_SHARE:
                yield f"compute: {name}", False, _percent(limit), (f"{limit.gain:.2f} x", "the rest as it is")


def _map(caption: str, cells: pd.DataFrame, plan: Any, by_cell: dict[str, Verdict]) -> Map:
    across, down = plan.across, plan.lines
    labels = zip(cells[f"label_{across.name}"], cells[f"label_{down.name}"], strict=True)
    places = {place: by_cell[cell] for cell, place in zip(cells.index, labels, strict=True) if cell in by_cell}
    told = []
    for rung in down.rungs:
        line = [places.get((column.label, rung.label)) for column in across.rungs]
        told.append((rung.label, [_square(verdict) for verdict in line]))
    return Map(caption, [rung.label for rung in across.rungs], told)


def _square(verdict: Verdict | None) -> tuple[str, str, bool]:
    if verdict is None:
        return "", "", False
    largest = next(iter(verdict.shares.values()))
    limit = verdict.limits.get(verdict.bottleneck)
    of = f"{100 * limit.of_step:.0f} of " if limit else ""
    return verdict.bottleneck, f"{of}{100 * largest.of_step:.0f} %", verdict.certain


def _percent(share: Share | Limit) -> tuple[str, str]:
    """The value, and its interval."""
    return f"{100 * share.of_step:.3g} %", numbers.bracketed(100 * share.low, 100 * share.high, " %").strip()


def _gain(share: Share) -> tuple[str, str]:
    gain, low, high = share.gain_of_doubling()
    return f"{gain:.2f} x", numbers.bracketed(low, high, " x").strip()
