"""Traces in CSV files: when requests come and how long they are, in our columns or those of Azure. Imports no numpy."""

import csv
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from saih.errors import SaihError

COLUMNS = ("arrival_s", "prompt_tokens", "new_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Of the Azure LLM inference traces (Splitwise, ISCA 2024; DynamoLLM, HPCA 2025)."""


class TraceRow(NamedTuple):
    """One request of a trace."""

    arrival_s: float
    prompt_tokens: int
    new_tokens: int


def write_csv(path: Path, trace: Sequence[TraceRow]) -> None:
    """Columns arrival_s, prompt_tokens, new_tokens; `read_csv` gives back the same numbers."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(trace)


def read_csv(path: Path, limit: int | None = None) -> list[TraceRow]:
    """A trace in order of arrival, its first one at time 0 for the Azure format; at most `limit` rows of the file.

    Raises SaihError with file and line for a file that is neither of the two formats or holds a wrong value.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = _columns(path, reader.fieldnames or ())
            rows: list[TraceRow] = []
            for row in reader:
                if limit is not None and len(rows) == limit:
                    break
                rows.append(_row([row[name] for name in columns], f"{path}:{reader.line_num}", columns))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SaihError(f"cannot read the trace {path}: {error}") from error
    if not rows:
        raise SaihError(f"the trace {path} holds no requests")
    rows.sort(key=lambda row: row.arrival_s)
    start_s = rows[0].arrival_s if columns == AZURE_COLUMNS else 0.0
    return [row._replace(arrival_s=row.arrival_s - start_s) for row in rows]


def _columns(path: Path, found: Sequence[str]) -> tuple[str, ...]:
    for columns in (COLUMNS, AZURE_COLUMNS):
        if set(columns) <= set(found):
            return columns
    raise SaihError(
        f"the trace {path} has columns {', '.join(found) or 'none'}; needed: {', '.join(COLUMNS)}, "
        f"or {', '.join(AZURE_COLUMNS)}"
    )


def _utc_s(when: str) -> float:
    """A time without a zone is UTC: in local time, clocks that are put back would make it jump."""
    time = datetime.fromisoformat(when)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _row(values: Sequence[str | None], where: str, columns: Sequence[str]) -> TraceRow:
    try:
        when, prompt, new = (value or "" for value in values)
        arrival_s = float(when) if columns == COLUMNS else _utc_s(when)
        row = TraceRow(arrival_s, int(prompt), int(new))
    except ValueError as error:
        raise SaihError(f"{where}: {error}") from error
    if not (math.isfinite(row.arrival_s) and row.prompt_tokens > 0 and row.new_tokens > 0):
        raise SaihError(f"{where}: needs a finite time and at least one token of each kind, got {list(values)}")
    return row
