"""Tables as text for spreadsheets, in which no cell can become a formula."""

from __future__ import annotations

import pandas as pd

BEGINNINGS = ("=", "+", "-", "@", "\t", "\n")
"""A spreadsheet computes what begins so (OWASP, CSV injection); an apostrophe before it makes it text."""


def csv(frame: pd.DataFrame) -> str:
    """Comma-separated, RFC 4180, numbers with nine digits; text that would be a formula gets an apostrophe."""
    return str(guarded(frame).to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def tsv(frame: pd.DataFrame) -> str:
    """Tab-separated, to paste; tabs and line breaks inside a cell become spaces."""
    flat = guarded(frame).map(lambda value: " ".join(value.split()) if isinstance(value, str) else value)
    return str(flat.to_csv(index=False, sep="\t", float_format="%.9g", lineterminator="\n"))


def guarded(frame: pd.DataFrame) -> pd.DataFrame:
    """The same table, its text and its column names made harmless. Numbers stay numbers."""
    text = [name for name, kind in frame.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    return frame.assign(**{str(name): frame[name].map(_harmless) for name in text}).rename(columns=_harmless)


def _harmless(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # pandas would leave a carriage return unquoted
    return f"'{text}" if text.startswith(BEGINNINGS) else text
