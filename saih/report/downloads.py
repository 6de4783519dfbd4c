"""Tables as links inside the page itself: CSV as it is where it is small, compressed where it is large."""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from saih.analysis import spreadsheet
from saih.analysis.cells import labels_of
from saih.report import bottlenecks
from saih.report.results import STATISTICS, Results

PLAIN_BYTES = 3_000
"""Above it a table is compressed: a page of many tables stays small."""
PART_BYTES = 1_300_000
"""Chromium does not save links above 2 MiB, of which base64 adds a third."""
LIMIT_BYTES = 6_000_000
"""Of one table's links together."""
RATIO = 3.0
"""How much smaller compression makes a table at the least; it decides into how many parts one is cut."""


@dataclass(frozen=True)
class Download:
    """One table: its links, or why there are none."""

    name: str
    anchor: str
    text: str
    rows: int
    links: list[tuple[str, str]]
    """(file name, data: address) of each part."""
    note: str = ""


def downloads(results: Results) -> list[Download]:
    """Statistics of every cell, the flat table of every point, and the raw samples."""
    stem, points = results.path.stem, results.points.drop(columns="log_tail")
    verdicts = bottlenecks.table(results)
    return [
        _download(stem, "cells", "one row a cell: medians, intervals, rates, phases", _cells(results)),
        _download(stem, "points", "one row a point: parameters, predictions, status", points),
        _download(stem, "verdicts", "one row a cell: bottleneck, evidence, shares, gains", verdicts),
        _download(stem, "samples", "one row a rank and step: seconds in each phase", results.samples),
    ]


def _cells(results: Results) -> pd.DataFrame:
    labels = [f"label_{axis}" for axis in labels_of(results.cells)]
    resources = [results.memory, "storage_read_bytes", "file_read_bytes"]
    columns = ["status", "measured_as", "kind", "reason", "ranks", "precision", "predicted_step_s"]
    return results.cells[[*labels, *columns, *STATISTICS, *resources]].reset_index()


def _download(stem: str, table: str, text: str, frame: pd.DataFrame) -> Download:
    size, name = _estimate(frame), f"{stem}.{table}"
    packed = size > PLAIN_BYTES
    carried = size / RATIO if packed else size
    if carried > LIMIT_BYTES:
        note = f"about {size / 1e6:.0f} MB, too large to carry in this page; the results file has it"
        return Download(name, table, text, len(frame), [], note)
    count = max(1, int(-(-carried // PART_BYTES)))
    bounds = np.linspace(0, len(frame), count + 1).astype(int)
    endings = [""] if count == 1 else [f".{number + 1}-of-{count}" for number in range(count)]
    pieces = [frame.iloc[low:high] for low, high in pairwise(bounds)]
    suffix = ".csv.gz" if packed else ".csv"
    links = [
        (f"{name}{ending}{suffix}", _address(piece, packed)) for ending, piece in zip(endings, pieces, strict=True)
    ]
    return Download(name, table, text, len(frame), links)


def _estimate(frame: pd.DataFrame) -> int:
    """Bytes as CSV, from rows spread over the table."""
    if frame.empty:
        return 0
    some = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, 200).astype(int))]
    return int(len(_csv(some)) / len(some) * len(frame))


def _address(frame: pd.DataFrame, packed: bool) -> str:
    content = _csv(frame)
    if packed:  # without the time of packing: the same results give the same page
        return f"data:application/gzip;base64,{base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()}"
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(content).decode()}"


def _csv(frame: pd.DataFrame) -> bytes:
    return spreadsheet.csv(frame).encode()
