"""The page's part on contention: what processes put beside the steps cost, drawn and in a table, and what was read."""

from __future__ import annotations

from saih.analysis import numbers
from saih.analysis.contention import Slope, contention
from saih.report.curves import Group
from saih.report.figures import MOST_LINES, Line, Panel, Scale
from saih.report.grid import spread, words
from saih.report.results import Results


def figure(results: Results) -> Group | None:
    """Step time over that without load, over the number of processes: a panel a kind of load, a line a series."""
    by_load: dict[str, list[Slope]] = {}
    for slope in contention(results.points, results.by_point):
        by_load.setdefault(slope.load, []).append(slope)
    panels = [_panel(load, spread(slopes, MOST_LINES)) for load, slopes in by_load.items()]
    return Group("", panels) if panels else None


def rows(results: Results) -> list[dict[str, str]]:
    """What each process put beside the steps costs, a row a series and count."""
    told = []
    for slope in contention(results.points, results.by_point):
        each = f"{100 * slope.each:.3g} %{numbers.bracketed(100 * slope.low, 100 * slope.high, ' %')}"
        for count, (ratio, low, high) in zip(slope.counts, slope.slowdown, strict=True):
            told.append(
                {
                    "series": words(slope.labels),
                    "load": f"{count} {slope.load.replace('_', ' ')}",
                    "slowdown": f"{numbers.three(ratio)} x{numbers.bracketed(low, high, ' x')}" if count else "1 x",
                    "read": _read(results, slope, count),
                    "each": each,
                }
            )
    return told


def _panel(load: str, slopes: list[Slope]) -> Panel:
    lines = []
    for slope in slopes:
        ratios, low, high = (list(values) for values in zip(*slope.slowdown, strict=True))
        lines.append(Line(words(slope.labels), [float(count) for count in slope.counts], ratios, low, high))
    counts = sorted({count for slope in slopes for count in slope.counts})
    what = load.removeprefix("load_")
    title = f"Step time beside {what}"
    told = [f"{line.label} {line.y[0]:.3g} to {line.y[-1]:.3g} times".strip() for line in lines]
    return Panel(
        f"contention-{what}",
        title,
        f"{title}, over that without: {'; '.join(told)}",
        lines,
        Scale(f"{what} beside the steps", [(float(count), str(count)) for count in counts], True, False),
        "step time over undisturbed",
        ideals=[([float(counts[0]), float(counts[-1])], [1.0, 1.0])],
        ideals_are="undisturbed",
    )


def _read(results: Results, slope: Slope, count: int) -> str:
    """What storage delivered in a step, of what was asked for; empty where nothing was, or nobody counted.

    It may be more: the system reads ahead, and what is forgotten before it is used is read again.
    """
    cells = results.measured
    mine = cells[f"param_{slope.load}"] == count
    for axis, label in slope.labels.items():
        mine &= cells[f"label_{axis}"] == label
    storage, asked = cells.loc[mine, ["storage_read_bytes", "file_read_bytes"]].mean()
    return f"{numbers.si(storage, 'B')} of {numbers.si(asked, 'B')}" if asked > 0 and storage >= 0 else ""
