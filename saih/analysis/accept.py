"""A delivered machine against its bid, cell by cell: pass, fail, or undecided, with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis.compare import welch

VERDICTS = ("pass", "fail", "undecided")


@dataclass(frozen=True)
class Judged:
    """One cell of the bid."""

    labels: str
    bid_s: float
    delivered_s: float
    """NaN where it was not measured."""
    ratio: float
    """Step time delivered over bid: above 1 is slower than promised; with its 95 % interval, NaN with one repeat."""
    low: float
    high: float
    verdict: str
    why: str

    def to_json(self) -> dict[str, Any]:
        """NaN becomes None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def judge(
    bid: pd.DataFrame, delivered: pd.DataFrame, same: Mapping[str, str], labels: Mapping[str, str], tolerance: float
) -> list[Judged]:
    """Each cell of the bid; `bid` and `delivered` are `per_point`, `same` maps cells of the bid to those delivered.

    A cell passes where the whole interval of the ratio is at most 1 + `tolerance`, fails where all of it is above, or
    nothing was measured; between them more repeats would tell.
    """
    return [_judge(labels[cell], _logs(bid, cell), _logs(delivered, there), tolerance) for cell, there in same.items()]


def worst(judged: list[Judged]) -> str:
    """The verdict on all: fail if any fails, else undecided if any is."""
    verdicts = {each.verdict for each in judged}
    return next((verdict for verdict in ("fail", "undecided") if verdict in verdicts), "pass")


def _logs(repeats: pd.DataFrame, cell: str) -> np.ndarray:
    return np.asarray(np.log(repeats.loc[repeats["cell"] == cell, "step_s"].to_numpy(dtype=float)))


def _judge(labels: str, bid: np.ndarray, delivered: np.ndarray, tolerance: float) -> Judged:
    bid_s, nothing = float(np.exp(bid.mean())), float("nan")
    if not len(delivered):
        return Judged(
            labels, bid_s, nothing, nothing, nothing, nothing, "fail", "not measured on the delivered machine"
        )
    ratio, low, high = welch(delivered, bid)
    most = 1 + tolerance
    if np.isnan(low):
        verdict, why = "undecided", "one repeat gives no interval"
    elif high <= most:
        verdict, why = "pass", ""
    elif low > most:
        verdict, why = "fail", f"the whole interval is above {most:g} times the bid"
    else:
        verdict, why = "undecided", f"the interval straddles {most:g} times the bid; more repeats would tell"
    return Judged(labels, bid_s, float(np.exp(delivered.mean())), ratio, low, high, verdict, why)
