"""Values that a bidder committed to, from a YAML file, judged against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from saih import yamlfile
from saih.analysis.cells import is_whole
from saih.errors import SaihError, unknown
from saih.report.grid import words
from saih.report.results import Results

METRICS = ("work_per_s", "step_s", "percent_of_peak", "percent_of_datasheet")


class Commitment(BaseModel):
    """One line of the file: at these rungs, this metric is at least, or at most, so much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: str
    metric: str = Field(description=", ".join(METRICS))
    at: dict[str, str | int | float] = Field(default_factory=dict, description="axis: rung")
    at_least: float | None = None
    at_most: float | None = None
    system: str = Field("", description="the site's name; left out, every system is held to it")


class Committed(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    committed: tuple[Commitment, ...]


@dataclass(frozen=True)
class Judgement:
    """A commitment and what became of it: met, missed, not certain, or not measured."""

    system: str
    workload: str
    at: str
    metric: str
    bound: str
    """"≥" or "≤"."""
    value: float
    measured: float | None
    interval: tuple[float, float] | None
    verdict: str


def load(path: Path) -> tuple[Commitment, ...]:
    """The commitments in `path`; SaihError names file, line and key of what is wrong."""
    found = yamlfile.load(path, Committed).committed
    for number, each in enumerate(found, 1):
        where = f"{path}: commitment {number}"
        if each.metric not in METRICS:
            raise unknown("metric", each.metric, METRICS, where)
        if (each.at_least is None) == (each.at_most is None):
            raise SaihError(f"{where}: give at_least or at_most, one of the two")
    return found


def judge(commitments: Sequence[Commitment], studies: Sequence[Results]) -> list[Judgement]:
    """Each commitment against every measured cell it names; once as not measured where there is none."""
    told = []
    for each in commitments:
        mine = [one for one in studies if one.sweep["workload"] == each.workload]
        chosen = [one for one in mine if each.system in ("", one.system, one.site)]
        found = [_judgement(each, one, cell) for one in chosen for cell in _cells(each, one).to_dict("records")]
        told += found or [_absent(each)]
    return told


def _cells(each: Commitment, results: Results) -> pd.DataFrame:
    cells = results.measured[is_whole(results.measured)]
    for axis, rung in each.at.items():
        column = next((name for name in (f"label_{axis}", f"param_{axis}") if name in cells), None)
        if column is None:
            return cells.head(0)
        cells = cells[cells[column].astype(str) == str(rung)]
    return cells.dropna(subset=[each.metric])


def _judgement(each: Commitment, results: Results, cell: Mapping[str, object]) -> Judgement:
    value, step, low, high = (float(str(cell[name])) for name in (each.metric, "step_s", "step_s_low", "step_s_high"))
    ends = (low, high) if each.metric == "step_s" else (value * step / high, value * step / low)
    bound, target = ("≥", each.at_least) if each.at_least is not None else ("≤", each.at_most)
    assert target is not None  # noqa: S101 (load refuses a commitment without a bound)
    good, bad = (ends[0] >= target, ends[1] < target) if bound == "≥" else (ends[1] <= target, ends[0] > target)
    at = words({axis.name: cell[f"label_{axis.name}"] for axis in results.problem_axes})
    verdict = "met" if good else "missed" if bad else "not certain"
    return Judgement(results.system, each.workload, at, each.metric, bound, target, value, ends, verdict)


def _absent(each: Commitment) -> Judgement:
    bound, target = ("≥", each.at_least) if each.at_least is not None else ("≤", each.at_most)
    told = words(each.at)
    return Judgement(each.system, each.workload, told, each.metric, bound, target or 0.0, None, None, "not measured")
