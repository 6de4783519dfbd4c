"""Which axis runs across a figure, which tells its lines apart, and which make figures of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd

from saih.analysis.numbers import plural
from saih.analysis.scaling import RESOURCES
from saih.core import Axis

Item = TypeVar("Item")

MOST_GROUPS = 6
"""Figures, or heat maps, for combinations of further axes."""


@dataclass(frozen=True)
class Layout:
    """The parts the axes of a sweep play in a figure."""

    across: Axis
    lines: Axis | None
    others: tuple[Axis, ...]

    def split(self, cells: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
        """Each combination of the other axes: its labels, and its cells."""
        if not self.others:
            yield {}, cells
            return
        columns = [f"label_{axis.name}" for axis in self.others]
        for labels, group in cells.groupby(columns, sort=False):
            yield dict(zip((axis.name for axis in self.others), map(str, labels), strict=True)), group

    def series(self, cells: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """One line for each rung of the second axis that has cells: its label, and its cells."""
        if self.lines is None:
            return [("", cells)]
        groups = dict(tuple(cells.groupby(f"label_{self.lines.name}", sort=False)))
        found = [(rung.label, groups.get(rung.label)) for rung in self.lines.rungs]
        return [(label, group) for label, group in found if group is not None]


def layout(axes: Sequence[Axis]) -> Layout:
    """A sized axis goes across, of the problem rather than of the machine; the next one that varies makes the lines."""
    ranked = sorted(axes, key=lambda axis: (len(axis.rungs) == 1, axis.named, axis.name in RESOURCES))
    across = ranked[0]
    varying = [axis for axis in axes if axis is not across and len(axis.rungs) > 1]
    lines = varying[0] if varying else None
    return Layout(across, lines, tuple(axis for axis in axes if axis is not across and axis is not lines))


def is_logarithmic(sizes: Sequence[float]) -> bool:
    """True for sizes that span almost a decade."""
    return min(sizes) > 0 and max(sizes) / min(sizes) >= 8


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]


def words(labels: Mapping[str, object]) -> str:
    """Labels as a caption: "gpus=2 precision=bf16"."""
    return " ".join(f"{axis}={label}" for axis, label in labels.items())


def left_out(count: int, noun: str) -> str:
    """A sentence on what MOST_GROUPS leaves out; empty where nothing is."""
    extra = count - MOST_GROUPS
    return f"{plural(extra, f'more {noun}')} left out here; the tables to download have all." if extra > 0 else ""
