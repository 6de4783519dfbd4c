"""A results file read and analysed once, for every part of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saih import store, workload
from saih.analysis import energy, kinds
from saih.analysis.bottleneck import Verdict, reads_per_step, verdicts
from saih.analysis.ceilings import sweep_of
from saih.analysis.cells import RATES, axes_of, is_whole, job_steps, per_cell, per_point
from saih.analysis.claims import evaluate_all
from saih.analysis.scaling import scaling
from saih.core import EXPERIMENTS, PHASES, Axis
from saih.errors import SaihError
from saih.report.grid import words
from saih.workload import Spec

STATUSES = ("measured", "failed", "pruned", "missing")
PERCENTAGES = ("percent_of_peak", "percent_of_datasheet")
STATISTICS = (
    *("repeats", "steps", "step_s", "step_s_low", "step_s_high", "interval", "units", "flop", "moved_bytes"),
    *(f"share_{phase}" for phase in PHASES),
    *RATES,
)


@dataclass(frozen=True)
class Results:
    """What a results file holds, and what follows from it."""

    path: Path
    points: pd.DataFrame
    samples: pd.DataFrame
    cells: pd.DataFrame
    """`per_cell`, with peak memory of the largest rank, bytes read in a step by all ranks together, and `measured_as`:
    whether a part of what was timed is simulated or emulated."""
    spec: Spec | None
    """None where the results come from a workload that is not installed here."""
    claims: list[dict[str, Any]]
    by_point: pd.DataFrame
    """`per_point`: one row a repeat of a measured cell."""
    ranks: pd.DataFrame
    """One row a rank of a measured point, as stored."""
    alias: str = ""
    """What the machine is called where another one's site has the same name."""

    @cached_property
    def sweep(self) -> Mapping[str, Any]:
        return sweep_of(self.points)

    @property
    def environments(self) -> list[dict[str, Any]]:
        return list(self.points.attrs["environments"])

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        return axes_of(self.sweep)

    @cached_property
    def problem_axes(self) -> tuple[Axis, ...]:
        """The axes along which the application or the machine differs, not what is done to it for diagnosis."""
        problem = tuple(axis for axis in self.axes if not set(axis.rungs[0].params) <= set(EXPERIMENTS))
        return problem or self.axes

    @cached_property
    def measured(self) -> pd.DataFrame:
        """The measured cells."""
        return self.cells[self.cells["status"] == "measured"]

    @cached_property
    def undisturbed(self) -> pd.DataFrame:
        """The cells, measured or not, in which no part of a step is taken out and no load put beside it."""
        return self.cells[is_whole(self.cells)]

    @cached_property
    def whole(self) -> pd.DataFrame:
        """The measured ones of them: what ranges, curves and speed-ups are made of."""
        return self.measured[is_whole(self.measured)]

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """What holds back each measured cell that is as users run it."""
        if self.whole.empty:
            return []
        return verdicts(self.points, self.samples, self.ranks, self.by_point, self.cells, self.sweep)

    @cached_property
    def scaled(self) -> pd.DataFrame:
        """`scaling` of the undisturbed cells; empty where ranks do not vary."""
        return pd.DataFrame() if self.whole.empty else scaling(self.undisturbed, self.by_point)

    @cached_property
    def energy(self) -> pd.DataFrame:
        """`saih.analysis.energy.per_cell`: a row a metered cell and source, from what measures most of the machine."""
        return energy.per_cell(self.points, self.samples)

    @property
    def system(self) -> str:
        """What the front page calls the machine: its site's name, if that is its own."""
        return self.alias or self.site

    @property
    def site(self) -> str:
        """The name of the site it was measured on."""
        return str(self.sweep["site"]["name"])

    @property
    def device(self) -> str:
        """What computed, by its own name: GPUs, or processors."""
        told = {environment.get("gpu") or environment.get("processor", "") for environment in self.environments}
        return ", ".join(sorted(filter(None, told))) or str(self.sweep["site"]["device_name"])

    @property
    def title(self) -> str:
        return self.spec.TITLE if self.spec else str(self.sweep["workload"])

    @property
    def work_unit(self) -> str:
        return self.spec.WORK_UNIT if self.spec else "units of work"

    @property
    def check(self) -> str:
        """What is held to be true of a point before it is timed; empty where nobody says."""
        return str(getattr(self.spec, "CHECK", ""))

    @property
    def denominators(self) -> dict[str, str]:
        """What 100 % is of each of `PERCENTAGES`. Makers of CPUs state no FLOP/s: saih works out a nominal figure."""
        nominal = str(self.sweep["site"]["peak"]["source"]).startswith("nominal")
        return dict(zip(PERCENTAGES, ("measured ceiling", "nominal peak" if nominal else "data sheet"), strict=True))

    @property
    def memory(self) -> str:
        """The column of `cells` with the peak memory of the largest rank."""
        return _memory(self.sweep)

    def labels(self, cell: Mapping[str, Any] | pd.Series) -> str:
        """A cell by its labels: "data=64 model=w16"."""
        return words({axis.name: cell[f"label_{axis.name}"] for axis in self.problem_axes})


def read(path: Path) -> Results:
    """Read and analyse a results file; SaihError where it is not one."""
    points, samples, ranks = store.load(path), store.load_samples(path), store.load_ranks(path)
    sweep = sweep_of(points)
    steps = job_steps(points, samples)
    spec = _spec(sweep["workload"])
    measured = per_point(points, steps, sweep)
    claims = evaluate_all(spec.CLAIMS, points, measured, sweep["workload"]) if spec else []
    cells = per_cell(points, steps, sweep)
    cells = cells.assign(**{name: np.nan for name in ("ranks", *STATISTICS) if name not in cells})
    cells = _with_resources(cells, points, steps, ranks)
    cells = cells.assign(measured_as=kinds.of_cells(cells))
    return Results(path, points, samples, cells, spec, claims, measured, ranks)


def told_apart(studies: Sequence[Results]) -> list[Results]:
    """The same; machines that differ though their sites have one name, such as local, get a name each."""
    devices: dict[str, set[str]] = {}
    for one in studies:
        devices.setdefault(one.site, set()).add(one.device)
    return [replace(one, alias=f"{one.site} ({one.device})") if len(devices[one.site]) > 1 else one for one in studies]


def _spec(name: str) -> Spec | None:
    try:
        return workload.spec(name)
    except SaihError:
        return None


def _with_resources(
    cells: pd.DataFrame, points: pd.DataFrame, steps: pd.DataFrame, ranks: pd.DataFrame
) -> pd.DataFrame:
    """Add peak memory of the largest rank, of all repeats; and bytes read a step, all ranks, median over repeats."""
    column = _memory(points.attrs["sweep"])
    found = ranks.reindex(columns=["point", column])
    cell = points["cell"].reindex(found["point"]).to_numpy()
    reads = reads_per_step(points, steps.groupby("point").size(), ranks)
    reads = reads.groupby(points["cell"].reindex(reads.index)).median()
    return cells.join(found[column].groupby(cell).max()).join(reads)


def _memory(sweep: Mapping[str, Any]) -> str:
    return "host_peak_bytes" if sweep["site"]["device"] == "cpu" else "device_peak_bytes"
