"""Measured cells carried over to larger ones and to other machines, with 90 % prediction intervals; never measured.

Two ways, kept apart. By ceilings: the time of the nearest measured cell is divided among resources as its verdict says,
and each part grows as the amount asked of its resource and shrinks as that resource's ceiling (a roofline, Williams et
al., 2009, of each part by itself). How far that misses is learnt by predicting every measured cell from every other one
of its series. By scaling fits: `saih.analysis.trend`, where enough sizes are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from saih.analysis import trend
from saih.analysis.bottleneck import Verdict
from saih.analysis.cells import is_whole

RESOURCES = ("FLOP", "memory", "launch", "input", "transfer", "communication", "other")
"""What a step's time is spent on. `other` stays as it is."""
FEWEST_CELLS = 3
"""Fewer tell nothing of how far a projection misses."""


@dataclass(frozen=True)
class Machine:
    """Rates of one device: measured ceilings by their names, and the data sheet's FLOP/s and bytes/s."""

    name: str
    measured: Mapping[str, float]
    flop_per_s: Mapping[str, float]
    bytes_per_s: float | None

    def rate(self, resource: str, precision: str, sheet: bool) -> float:
        """Of a resource, something a second; NaN where unknown."""
        if sheet:
            stated = {"FLOP": self.flop_per_s.get(precision), "memory": self.bytes_per_s}
            return float(stated.get(resource) or "nan")
        names = {
            "FLOP": (precision,),
            "memory": ("copy",),
            "input": ("read-cold", "read-direct"),
            "transfer": ("upload",),
            "communication": ("allreduce-torch", "allreduce-mpi", "allreduce-torch-nodes", "allreduce-mpi-nodes"),
        }
        if resource == "launch":
            return 1 / float(self.measured.get("launch_s") or "nan")
        return next((float(self.measured[name]) for name in names.get(resource, ()) if name in self.measured), np.nan)


@dataclass(frozen=True)
class Projection:
    """Step time where nothing was measured. `low` and `high` are the 90 % prediction interval, NaN where unknown."""

    value: float
    low: float
    high: float
    how: str
    """By ceilings or by scaling, in words."""


@dataclass(frozen=True)
class LeftOut:
    """A measured cell that was predicted from the others alone."""

    cell: str
    method: str
    measured_s: float
    predicted: Projection
    beyond: bool
    """Whether it is the largest of its series, so that the others had to be extrapolated."""

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted.value / self.measured_s - 1

    @property
    def covered(self) -> bool:
        return bool(self.predicted.low <= self.measured_s <= self.predicted.high)


class Sweep:
    """A sweep's cells as a projection sees them: amounts asked of each resource, and how measured time divides."""

    def __init__(
        self,
        cells: pd.DataFrame,
        verdicts: Sequence[Verdict],
        sized: Sequence[str],
        here: Machine,
    ) -> None:
        """`cells` is `per_cell`; `sized` are the axes whose rungs have an order."""
        self.here, self.sized = here, list(sized)
        undisturbed = cells[is_whole(cells)]
        self.cells = undisturbed.assign(series=_series(undisturbed, self.sized))
        self.amounts = amounts(self.cells)
        by_cell = {verdict.cell: verdict for verdict in verdicts}
        self.measured = [str(cell) for cell in self.cells.index if cell in by_cell]
        self.parts = {cell: self._parts(cell, by_cell[cell]) for cell in self.measured}
        self.errors = self._errors()

    def _parts(self, cell: str, verdict: Verdict) -> np.ndarray:
        """Seconds of a step spent on each of RESOURCES."""
        shares = {part: share.of_step for part, share in verdict.shares.items()}
        computing = shares["compute"] + shares["straggler"]
        precision = str(self.cells.at[cell, "precision"])
        demand = [_over(self.amounts.at[cell, each], self.here.rate(each, precision, False)) for each in RESOURCES[:3]]
        known = np.nan_to_num(demand)
        split = known / known.sum() if known.sum() > 0 else np.array([1.0, 0.0, 0.0])
        rest = shares["other"] + shares["checkpoint"]
        parts = np.array(
            [*(computing * split), *(shares[part] for part in ("input", "transfer", "communication")), rest]
        )
        return np.asarray(float(self.cells.at[cell, "step_s"]) * parts / parts.sum())

    def by_ceilings(
        self, target: pd.Series, asked: pd.Series, there: Machine | None = None, without: Sequence[str] = ()
    ) -> Projection | None:
        """From the nearest measured cell of the same series; None where there is none.

        `target` names series and precision, `asked` is its row of `amounts`; `there` is another machine.
        """
        near = self._nearest(target, asked, there, without)
        if near is None:
            return None
        value, source, unknown = near
        where = "" if there is None else f" on {there.name}"
        parts = self.parts[source] / self.parts[source].sum()
        told = ", ".join(
            f"{part} {100 * share:.0f} %" for part, share in zip(RESOURCES, parts, strict=True) if share > 0.005
        )
        how = f"ceilings{where}, from {self.words(source)} ({told})"
        how += f"; not known there, taken as here: {', '.join(unknown)}" if unknown else ""
        known = [error for pair, error in self.errors.items() if not set(pair) & set(without)]
        cells = len(set().union(*(pair for pair in self.errors if not set(pair) & set(without))))
        if cells < FEWEST_CELLS:
            return Projection(value, float("nan"), float("nan"), how)
        tail = float(stdtrit(cells, 0.5 + trend.CONFIDENCE / 2))
        half = tail * float(np.sqrt(np.mean(np.square(known))))
        return Projection(value, value * float(np.exp(-half)), value * float(np.exp(half)), how)

    def by_scaling(self, target: pd.Series, without: Sequence[str] = ()) -> Projection | None:
        """From a model of the step times of its series over sizes; None where too few are measured."""
        axes = [axis for axis in self.sized if self.cells[f"size_{axis}"].nunique() > 1]
        mine = self.cells.loc[self._sources(str(target["series"]), without)]
        columns = [f"size_{axis}" for axis in axes]
        if mine.empty or not 1 <= len(axes) <= 2:
            return None
        model = trend.fit(mine[columns].to_numpy(dtype=float), mine["step_s"].to_numpy(dtype=float), axes)
        if model is None:
            return None
        found = model.predict([float(target[column]) for column in columns])
        return Projection(found.value, found.low, found.high, f"scaling fit: {model.formula()}")

    def words(self, cell: str) -> str:
        """The cell's labels."""
        names = [name for name in self.cells if str(name).startswith("label_")]
        return " ".join(f"{str(name).removeprefix('label_')}={self.cells.at[cell, name]}" for name in names)

    def _sources(self, series: str, without: Sequence[str]) -> list[str]:
        return [cell for cell in self.measured if self.cells.at[cell, "series"] == series and cell not in without]

    def _nearest(
        self, target: pd.Series, asked: pd.Series, there: Machine | None, without: Sequence[str]
    ) -> tuple[float, str, list[str]] | None:
        """(seconds, source, resources whose rate is not known there) from the source at the least distance."""
        best: tuple[float, float, str, list[str]] | None = None
        for cell in self._sources(str(target["series"]), without):
            found = self._carry(cell, asked, str(target["precision"]), there)
            if found is not None and (best is None or found[1] < best[0]):
                best = (found[1], found[0], cell, found[2])
        return best[1:] if best else None

    def _carry(
        self, source: str, asked: pd.Series, precision: str, there: Machine | None
    ) -> tuple[float, float, list[str]] | None:
        """A source's parts, each grown as its amount, shrunk as its rate; None where a new part has no rate."""
        total, distance, unknown = 0.0, 0.0, []
        parts = self.parts[source]
        for resource, seconds in zip(RESOURCES, parts, strict=True):
            had, wants = float(self.amounts.at[source, resource]), float(asked[resource])
            if had <= 0 or seconds <= 0:
                extra = _over(wants, (there or self.here).rate(resource, precision, False)) if had <= 0 < wants else 0.0
                if np.isnan(extra):
                    return None
                total += extra
                continue
            speed = self._speed(resource, str(self.cells.at[source, "precision"]), precision, there)
            if np.isnan(speed):
                unknown += [resource] if seconds > 0.005 * parts.sum() else []
                speed = 1.0
            if wants > 0:
                total += seconds * wants / had / speed
                distance += seconds / parts.sum() * (abs(math.log(wants / had)) + abs(math.log(speed)))
        return (total, distance, unknown) if total > 0 else None

    def _speed(self, resource: str, here: str, precision: str, there: Machine | None) -> float:
        """The rate there over the rate here: measured over measured, else sheet over sheet; NaN if unknown."""
        if resource == "other" or (there is None and here == precision):
            return 1.0
        new = there or self.here
        ratios = (
            new.rate(resource, precision, sheet) / self.here.rate(resource, here, sheet) for sheet in (False, True)
        )
        return next((ratio for ratio in ratios if np.isfinite(ratio)), float("nan"))

    def _errors(self) -> dict[tuple[str, str], float]:
        """(source, target) -> logarithm of predicted over measured, for all pairs of measured cells of a series."""
        found = {}
        for target in self.measured:
            for source in self._sources(str(self.cells.at[target, "series"]), [target]):
                carried = self._carry(source, self.amounts.loc[target], str(self.cells.at[target, "precision"]), None)
                if carried is not None:
                    found[source, target] = float(np.log(carried[0] / self.cells.at[target, "step_s"]))
        return found


def amounts(cells: pd.DataFrame) -> pd.DataFrame:
    """What a step asks of each of RESOURCES, a rank, from the plan: FLOP, bytes, kernels; 1 of `other`.

    A ring all-reduce moves 2 (p - 1) / p times its message (Patarasuk and Yuan, 2009).
    """
    ranks = cells["param_nodes"].astype(float) * cells["param_gpus"].astype(float)

    def planned(name: str) -> pd.Series:
        return cells.get(f"predicted_{name}", pd.Series(0.0, index=cells.index)).fillna(0.0).astype(float)

    return pd.DataFrame(
        {
            "FLOP": planned("flop"),
            "memory": planned("moved_bytes"),
            "launch": planned("operations"),
            "input": planned("input_bytes"),
            "transfer": planned("input_bytes"),
            "communication": planned("message_bytes") * 2 * (ranks - 1) / ranks,
            "other": 1.0,
        },
        index=cells.index,
    )[list(RESOURCES)]


def leave_out(sweep: Sweep) -> list[LeftOut]:
    """Every measured cell, predicted by each method from the others alone; those that a method can say nothing of lack.

    The spread that makes a ceiling projection's interval is learnt without the cell, too.
    """
    found = []
    for cell in sweep.measured:
        row, seconds = sweep.cells.loc[cell], float(sweep.cells.at[cell, "step_s"])
        mine = [each for each in sweep.measured if sweep.cells.at[each, "series"] == row["series"]]
        sizes = sweep.cells.loc[mine, [f"size_{axis}" for axis in sweep.sized]]
        beyond = bool((sizes.loc[cell] >= sizes.max()).any()) if len(sweep.sized) else False
        methods = {
            "ceilings": sweep.by_ceilings(row, sweep.amounts.loc[cell], None, [cell]),
            "scaling": sweep.by_scaling(row, [cell]),
        }
        for method, predicted in methods.items():
            if predicted is not None and np.isfinite(predicted.low):
                found.append(LeftOut(cell, method, seconds, predicted, beyond))
    return found


def summary(found: Sequence[LeftOut]) -> dict[str, Any]:
    """Count, median of the absolute relative errors, and the share that the 90 % intervals cover."""
    if not found:
        return {"cells": 0, "median_error": None, "coverage": None}
    errors = [abs(each.error) for each in found]
    covered = float(np.mean([each.covered for each in found]))
    return {"cells": len(found), "median_error": float(np.median(errors)), "coverage": covered}


def _series(cells: pd.DataFrame, sized: Sequence[str]) -> list[str]:
    """Cells that differ in sized axes only, or in ranks, have the same."""
    names = [str(name) for name in cells if str(name).startswith("label_") and str(name)[6:] not in sized]
    return [" ".join(f"{name[6:]}={row[name]}" for name in names) for row in cells.to_dict("records")]


def _over(amount: float, rate: float) -> float:
    return amount / rate if amount > 0 else 0.0
