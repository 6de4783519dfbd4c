"""Draws a panel of lines as SVG that follows the page's theme, and tells its numbers. The only user of matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saih.analysis.numbers import ABSENT, three
from saih.report import vector

SERIES_COLOURS = 6
MOST_LINES = 2 * SERIES_COLOURS
"""Every colour twice: solid with a filled marker, then dashed with a hollow one."""
MARKERS = "osD^vP"
WIDTH_INCH, HEIGHT_INCH, LEGEND_ROW_INCH = 5.4, 3.4, 0.22
INTERVAL_ALPHA = 0.55
MOST_MARKERS = 16
SHAPES = {"projected": "D", "simulated": "^", "emulated": "s"}
"""Markers of what was not plainly measured: hollow, on a dash-dotted line, and named in the legend."""
THEME = {"#000001": "--ink", "#000002": "--muted", "#000003": "--rule", "#000004": "--page"}
THEME |= {f"#0000a{place}": f"--series-{place}" for place in range(SERIES_COLOURS)}
"""Colours drawn with -> the CSS variables that replace them."""
INK, MUTED, RULE, PAGE = list(THEME)[:4]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Line:
    """One series with its 95 % interval; NaN breaks it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    kind: str = "measured"
    place: int | None = None
    """Whose colour it takes, where it continues another line; else its own."""


@dataclass(frozen=True)
class Scale:
    """The axis across."""

    label: str
    ticks: Sequence[tuple[float, str]]
    joined: bool
    """Lines between the markers; not where the places have no order."""
    logarithmic: bool


Ideals = Sequence[tuple[Sequence[float], Sequence[float]]]
"""(x, y) of lines of reference."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines. `title` and `description` are for readers who cannot see it."""

    name: str
    title: str
    description: str
    lines: Sequence[Line]
    x: Scale
    y_label: str
    y_top: float | None = None
    ideals: Ideals = ()
    ideals_are: str = "ideal"
    y_bottom: float = 0.0
    logarithmic: bool = False
    """Of y; it then begins where the values do."""


@dataclass(frozen=True)
class Number:
    """One marker of a panel in words: the row of its table, and what hovering over it says."""

    series: str
    kind: str
    x: str
    y: str
    interval: str


def numbers_of(panel: Panel) -> list[Number]:
    """Every value that the panel draws, line by line."""
    named = dict(panel.x.ticks)
    return [
        Number(line.label, line.kind, named.get(x) or f"{x:.4g}", three(y), _ends(low, high))
        for line in panel.lines
        for x, y, low, high in zip(line.x, line.y, line.low, line.high, strict=True)
        if np.isfinite(y)
    ]


def _ends(low: float, high: float) -> str:
    return f"{three(low)} to {three(high)}" if np.isfinite(low) and np.isfinite(high) else ABSENT


def draw(panel: Panel, prefix: str = "") -> str:
    """The panel as an `<svg>` element whose colours are CSS variables and whose ids start with `prefix` and its own."""
    columns = 1 if any(len(line.label) > 28 for line in panel.lines) else 2
    named = sum(bool(line.label) for line in panel.lines) + bool(panel.ideals)
    rows = -(-named // columns)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": panel.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the fonts
        figure = Figure(figsize=(WIDTH_INCH, HEIGHT_INCH + rows * LEGEND_ROW_INCH), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for place, line in enumerate(panel.lines):
            _plot(axes, line, place, panel.x.joined)
        for x, y in panel.ideals:
            axes.plot(
                x,
                y,
                color=MUTED,
                linestyle=":",
                linewidth=1.2,
                label=panel.ideals_are if y is panel.ideals[0][1] else "",
            )
        _scale(axes, panel)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _themed(written.getvalue(), panel, prefix + panel.name)


def _scale(axes: Axes, panel: Panel) -> None:
    places, labels = [place for place, _ in panel.x.ticks], [label for _, label in panel.x.ticks]
    if panel.x.logarithmic:
        axes.set_xscale("log")
    elif not panel.x.joined:
        axes.set_xlim(min(places) - 0.5, max(places) + 0.5)
    axes.set_xticks(places, labels)
    axes.set_xticks([], minor=True)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.set_ylim(panel.y_bottom, panel.y_top)
    axes.set_xlabel(panel.x.label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color=RULE, linewidth=0.7)
    axes.tick_params(which="both", bottom=False, left=False)
    axes.set_axisbelow(True)


def _plot(axes: Axes, line: Line, number: int, joined: bool) -> None:
    place = number if line.place is None else line.place
    colour, hollow = f"#0000a{place % SERIES_COLOURS}", place >= SERIES_COLOURS or line.kind != "measured"
    style = "-." if line.kind != "measured" else "--" if hollow else "-"
    y = np.asarray(line.y, dtype=float)
    every = max(1, len(y) // MOST_MARKERS)
    error = [np.clip(y - np.asarray(line.low), 0, None), np.clip(np.asarray(line.high) - y, 0, None)]
    drawn, caps, bars = axes.errorbar(
        *(line.x, y, error),
        label=line.label if line.kind == "measured" else f"{line.label} ({line.kind})".strip(),
        color=colour,
        linestyle=style if joined else "none",
        linewidth=1.6,
        marker=SHAPES.get(line.kind, MARKERS[place % len(MARKERS)]),
        markersize=5.5,
        markevery=every,
        errorevery=every,
        markerfacecolor=PAGE if hollow else colour,
        elinewidth=1,
        capsize=3,
    )
    drawn.set_gid(f"line-{number}")
    for artist in (*caps, *bars):
        artist.set_alpha(INTERVAL_ALPHA)


def _themed(svg: str, panel: Panel, name: str) -> str:
    """Names for screen readers, values under the pointer, and colours that follow the page's theme."""
    values = {
        f"line-{place}": [_words(each) for each in numbers_of(replace(panel, lines=[line]))]
        for place, line in enumerate(panel.lines)
    }
    body = vector.own(svg, name, panel.title, panel.description, values)
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var({variable})")
    return body


def _words(each: Number) -> str:
    interval = f" ({each.interval})" if each.interval != ABSENT else ""
    return f"{each.series} at {each.x}: {each.y}{interval}".strip()
