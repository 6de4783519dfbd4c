"""Tables as CSV links inside the page itself, in parts that every browser will save."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from saih.analysis.cells import labels_of
from saih.report import bottlenecks
from saih.report.results import STATISTICS, Results

PART_BYTES = 1_300_000
"""Chromium does not save links above 2 MiB, of which base64 adds a third."""
LIMIT_BYTES = 6_000_000


@dataclass(frozen=True)
class Download:
    """One table: its links, or why there are none."""

    name: str
    text: str
    rows: int
    links: list[tuple[str, str]]
    """(file name, data: address) of each part."""
    note: str = ""


def downloads(results: Results) -> list[Download]:
    """Statistics of every cell, the flat table of every point, and the raw samples."""
    stem, points = results.path.stem, results.points.drop(columns="log_tail")
    return [
        _download(f"{stem}.cells", "one row a cell: medians, intervals, rates, phases", _cells(results)),
        _download(f"{stem}.points", "one row a point: parameters, predictions, status", points),
        _download(f"{stem}.verdicts", "one row a cell: bottleneck, evidence, shares, gains", _verdicts(results)),
        _download(f"{stem}.samples", "one row a rank and step: seconds in each phase", results.samples),
    ]


def _verdicts(results: Results) -> pd.DataFrame:
    return bottlenecks.table(results, bottlenecks.judged(results))


def _cells(results: Results) -> pd.DataFrame:
    labels = [f"label_{axis}" for axis in labels_of(results.cells)]
    resources = [results.memory, "storage_read_bytes", "file_read_bytes"]
    columns = [*labels, "status", "kind", "reason", "ranks", "precision", "predicted_step_s", *STATISTICS, *resources]
    return results.cells[columns].reset_index()


def _download(name: str, text: str, frame: pd.DataFrame) -> Download:
    size = _estimate(frame)
    if size > LIMIT_BYTES:
        note = f"about {size / 1e6:.0f} MB, too large to carry in this page; the results file has it"
        return Download(name, text, len(frame), [], note)
    count = max(1, -(-size // PART_BYTES))
    bounds = np.linspace(0, len(frame), count + 1).astype(int)
    endings = [""] if count == 1 else [f".{number + 1}-of-{count}" for number in range(count)]
    pieces = [frame.iloc[low:high] for low, high in pairwise(bounds)]
    links = [(f"{name}{ending}.csv", _address(piece)) for ending, piece in zip(endings, pieces, strict=True)]
    return Download(name, text, len(frame), links)


def _estimate(frame: pd.DataFrame) -> int:
    """Bytes as CSV, from rows spread over the table."""
    if frame.empty:
        return 0
    some = frame.iloc[np.unique(np.linspace(0, len(frame) - 1, 200).astype(int))]
    return int(len(_csv(some)) / len(some) * len(frame))


def _address(frame: pd.DataFrame) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(_csv(frame)).decode()


def _csv(frame: pd.DataFrame) -> bytes:
    return str(frame.to_csv(index=False, float_format="%.9g")).encode()
