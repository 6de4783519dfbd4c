"""Systems side by side on equal points: a normalised time metric, SSI, and how sure the ranking is.

SSI, Scalable System Improvement (Austin et al., "A metric for evaluating supercomputer performance in the era
of extreme heterogeneity", PMBS 2018; NERSC's procurements): the weighted geometric mean over applications of c U S.
c: how many times the reference's problem a system ran; U = (n_ref / n) (N / N_ref), nodes used and nodes owned;
S = t_ref / t, which must not be below 1: no problem may run slower than on the reference. It is flagged, never clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis import kinds
from saih.analysis.cells import is_whole, labels_of
from saih.analysis.intervals import student_t
from saih.errors import SaihError
from saih.files import digest

NOT_THE_PROBLEM = {"nodes", "gpus", "warmup", "steps", "seconds", "max_steps", "beside", *("load_readers", "load_hogs")}
"""Parameters that say where and for how long a problem was measured: equal points may differ in them, but for ranks."""
DRAWS = 4000
DIRICHLET = 20.0
"""Weights are drawn around the given ones as if those were counted on so many applications: a standard deviation of
about a tenth for a weight of a half."""


@dataclass(frozen=True)
class System:
    """One system's measurements: a row a repeat of a cell as users run it; from `measurements`."""

    name: str
    rows: pd.DataFrame
    nodes: float = float("nan")
    """It owns; NaN where nobody said."""
    price: float = float("nan")


@dataclass(frozen=True)
class Target:
    """Which points of a workload count, by which work, how much."""

    weight: float = 1.0
    work: float | None = None
    cell: Mapping[str, str] | None = None
    """Labels; None: all equal points."""
    larger: Mapping[str, Mapping[str, str]] | None = None
    """System -> the labels in which the problem it ran differs from `cell`."""


@dataclass(frozen=True)
class Entry:
    """One system at one point: its time metric repeat by repeat, and what SSI needs."""

    labels: str
    cell: str
    seconds: tuple[float, ...]
    nodes: float
    capability: float


@dataclass(frozen=True)
class Comparison:
    """`entries[workload][point][system]`, with the reference first among `systems`; equal points alone."""

    systems: tuple[System, ...]
    targets: Mapping[str, Target]
    entries: Mapping[str, Mapping[str, Mapping[str, Entry]]]
    left_out: Mapping[str, int]
    """System -> measured points that not all others have, or that are emulated or simulated."""

    @property
    def reference(self) -> str:
        return self.systems[0].name


@dataclass(frozen=True)
class Score:
    """SSI of one system over the reference, and what it is made of: weighted geometric means."""

    name: str
    capability: float
    utilisation: float
    speed_up: float
    ssi: float
    slower: tuple[str, ...]
    """Points at which S < 1."""


@dataclass(frozen=True)
class Stability:
    """What becomes of SSI and rank when weights and measurements might have been others."""

    low: float
    high: float
    """90 % of the draws of SSI lie between them."""
    rank: int
    holds: float
    """Share of the draws in which the system has this rank."""
    first: float


def measurements(points: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """What is compared of a results file, a row a repeat of cells as users run them; `repeats` is `per_point`.

    Columns: workload, point (equal for equal problems on equally many ranks), repeat, units, flop, work_per_s, nodes,
    ranks, kind, cell, and label_<axis>.
    """
    table = repeats[is_whole(points.loc[repeats.index])]
    planned = points.loc[table.index]
    settings = [name for name in planned if name.startswith("param_")]
    return pd.DataFrame(
        {
            "workload": planned["workload"],
            "point": [_problem(row, settings) for row in planned.to_dict("records")],
            "cell": planned["cell"],
            "nodes": planned["param_nodes"],
            "kind": kinds.of_cells(planned),
            **{name: table[name] for name in ("repeat", "ranks", "units", "flop", "work_per_s")},
            **{f"label_{axis}": planned[f"label_{axis}"] for axis in labels_of(planned)},
        }
    )


def _problem(row: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Hash of what is computed, and on how many ranks."""
    known = {name.removeprefix("param_"): row[name] for name in settings}
    ranks = int(known["nodes"]) * int(known["gpus"])
    asked = {name: _plain(value) for name, value in known.items() if name not in NOT_THE_PROBLEM and value == value}
    return digest({"workload": row["workload"], "params": asked, "seed": int(row["seed"]), "ranks": ranks})[:16]


def _plain(value: Any) -> bool | float | str:
    """A column of whole numbers with gaps is one of floats: 1 and 1.0 are the same setting."""
    return value if isinstance(value, (str, bool)) else bool(value) if isinstance(value, np.bool_) else float(value)


def compare(systems: Sequence[System], targets: Mapping[str, Target]) -> Comparison:
    """The systems on their equal points; the first is the reference. SaihError where there is nothing to compare."""
    usable = {each.name: each.rows[each.rows["kind"] == "measured"] for each in systems}
    entries: dict[str, dict[str, dict[str, Entry]]] = {}
    for workload in _shared(usable, "workload"):
        target = targets.get(workload, Target())
        mine = {name: rows[rows["workload"] == workload] for name, rows in usable.items()}
        found = _at_target(workload, target, target.cell, mine) if target.cell else _at_equal_points(target, mine)
        if found:
            entries[workload] = found
    if not entries:
        names = ", ".join(usable)
        raise SaihError(f"{names} have no equal points: same workload, parameters and number of ranks, measured on all")
    used = {name: sum(name in point for points in entries.values() for point in points.values()) for name in usable}
    left = {each.name: each.rows["point"].nunique() - used[each.name] for each in systems}
    return Comparison(tuple(systems), {name: targets.get(name, Target()) for name in entries}, entries, left)


def _shared(tables: Mapping[str, pd.DataFrame], column: str) -> list[str]:
    first, *others = tables.values()
    return [value for value in first[column].unique() if all((each[column] == value).any() for each in others)]


def _at_equal_points(target: Target, tables: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Entry]]:
    reference = next(iter(tables.values()))
    return {
        point: {
            name: _entry(rows[rows["point"] == point], reference[reference["point"] == point], target.work, same=True)
            for name, rows in tables.items()
        }
        for point in _shared(tables, "point")
    }


def _at_target(
    workload: str, target: Target, cell: Mapping[str, str], tables: Mapping[str, pd.DataFrame]
) -> dict[str, dict[str, Entry]]:
    """One point: the target problem, or the larger one that a system ran instead."""
    chosen = {}
    for name, rows in tables.items():
        labels = {**cell, **(target.larger or {}).get(name, {})}
        missing = [axis for axis in labels if f"label_{axis}" not in rows]
        if missing:
            raise SaihError(f"{workload} on {name}: no axis {missing[0]}; its axes: {', '.join(_axes(rows))}")
        at = rows[np.logical_and.reduce([rows[f"label_{axis}"] == label for axis, label in labels.items()])]
        told = " ".join(f"{axis}={label}" for axis, label in labels.items())
        if at["point"].nunique() != 1:
            many = f"{at['point'].nunique()} points" if len(at) else "no measured point"
            raise SaihError(f"{workload} on {name}: {many} at {told}; name one, with a rung of each of its axes")
        chosen[name] = at
    reference = next(iter(chosen.values()))
    same = {name: name not in (target.larger or {}) for name in chosen}
    for name, rows in chosen.items():
        if same[name] and rows["point"].iloc[0] != reference["point"].iloc[0] and not _same_problem(rows, reference):
            raise SaihError(f"{workload} on {name}: not the same problem as on the reference, though its labels are")
    return {"target": {name: _entry(rows, reference, target.work, same[name]) for name, rows in chosen.items()}}


def _same_problem(rows: pd.DataFrame, reference: pd.DataFrame) -> bool:
    """On another number of ranks the points differ, and the FLOP of a unit of work do not."""
    return bool(np.isclose(_flop_per_work(rows), _flop_per_work(reference), rtol=1e-6))


def _entry(rows: pd.DataFrame, reference: pd.DataFrame, work: float | None, same: bool) -> Entry:
    units = work if work is not None else float(reference["units"].median())
    capability = 1.0 if same else _flop_per_work(rows) / _flop_per_work(reference)
    if not np.isfinite(capability):
        raise SaihError(f"{rows['workload'].iloc[0]} counts no FLOP, so how much larger a problem is cannot be told")
    first = rows.iloc[0]
    labels = " ".join(f"{axis}={first[f'label_{axis}']}" for axis in _axes(rows))
    return Entry(labels, str(first["cell"]), tuple(units / rows["work_per_s"]), float(first["nodes"]), capability)


def _flop_per_work(rows: pd.DataFrame) -> float:
    flop = float((rows["flop"] / rows["units"]).median())
    return flop if flop > 0 else float("nan")


def _axes(rows: pd.DataFrame) -> list[str]:
    return [axis for axis in labels_of(rows) if isinstance(rows[f"label_{axis}"].iloc[0], str)]


def ratio(entry: Entry, reference: Entry) -> tuple[float, float, float]:
    """The normalised time metric t / t_ref with its 95 % interval; the bounds are NaN where one has a single repeat."""
    mine, theirs = np.log(entry.seconds), np.log(reference.seconds)
    if entry == reference:
        return 1.0, 1.0, 1.0
    return welch(mine, theirs)


def welch(logs: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """exp of the difference of two means with its 95 % interval (Welch, 1947); NaN bounds with one repeat of either."""
    difference = float(np.mean(logs) - np.mean(others))
    if min(len(logs), len(others)) < 2:
        return float(np.exp(difference)), float("nan"), float("nan")
    a, b = (float(np.var(each, ddof=1)) / len(each) for each in (logs, others))
    if a + b == 0:
        return (float(np.exp(difference)),) * 3
    freedom = (a + b) ** 2 / (a**2 / (len(logs) - 1) + b**2 / (len(others) - 1))
    half = float(student_t(freedom)) * float(np.sqrt(a + b))
    return tuple(float(np.exp(difference + sign * half)) for sign in (0, -1, 1))  # type: ignore[return-value]


def scores(comparison: Comparison) -> list[Score]:
    """SSI of every system over the reference, whose own is 1."""
    weights, terms = _weights(comparison), _log_terms(comparison)
    speed_ups = _log_speed_ups(_log_times(comparison))[0]
    told = []
    for place, system in enumerate(comparison.systems):
        c, u, s = (float(np.exp(each[place] @ weights)) for each in (*terms, speed_ups))
        told.append(Score(system.name, c, u, s, c * u * s, _slower(comparison, system.name)))
    return told


def stability(
    comparison: Comparison, measurement: bool = True, weights: bool = True, draws: int = DRAWS, seed: int = 0
) -> dict[str, Stability]:
    """How SSI and ranks move when repeats are drawn again (bootstrap), weights are drawn around the given, or both.

    The repeats of every point are drawn with replacement, each system by itself, and their spread is widened by
    sqrt(n / (n - 1)) for being that of a sample. Weights come from a Dirichlet distribution around the given ones.
    """
    dice = np.random.default_rng(seed)
    given = _weights(comparison)
    logs_t = _drawn_log_times(comparison, draws, dice) if measurement else _log_times(comparison)
    drawn = dice.dirichlet(DIRICHLET * given, draws) if weights else given[None]
    capability, utilisation = _log_terms(comparison)
    terms = capability + utilisation + _log_speed_ups(logs_t)
    logs = (terms * drawn[:, None, :]).sum(axis=2)
    ranks, own = _ranks(logs), _ranks(np.log([[score.ssi for score in scores(comparison)]]))[0]
    low, high = np.exp(np.quantile(logs, (0.05, 0.95), axis=0))
    return {
        system.name: Stability(
            float(low[k]),
            float(high[k]),
            int(own[k]),
            float((ranks[:, k] == own[k]).mean()),
            float((ranks[:, k] == 1).mean()),
        )
        for k, system in enumerate(comparison.systems)
    }


def _log_terms(comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """ln c and ln U, [systems, applications] each: means over the points of an application."""
    reference = comparison.systems[0]
    capability, utilisation = [], []
    for system in comparison.systems:
        owned = system.nodes / reference.nodes
        owned = 1.0 if np.isnan(owned) else owned
        pairs = [
            [(point[system.name], point[reference.name]) for point in points.values()]
            for points in comparison.entries.values()
        ]
        capability.append([np.mean([np.log(own.capability) for own, _ in each]) for each in pairs])
        utilisation.append([np.mean([np.log(ref.nodes / own.nodes * owned) for own, ref in each]) for each in pairs])
    return np.array(capability), np.array(utilisation)


def _log_times(comparison: Comparison) -> np.ndarray:
    """ln t as measured, [1, systems, applications]: the mean over repeats, then over points."""
    return _each_entry(comparison, lambda logs: np.array([logs.mean()]))


def _drawn_log_times(comparison: Comparison, draws: int, dice: np.random.Generator) -> np.ndarray:
    """The same of repeats drawn again, [draws, systems, applications]."""

    def bootstrap(logs: np.ndarray) -> np.ndarray:
        count = len(logs)
        means = logs[dice.integers(0, count, (draws, count))].mean(axis=1)
        return np.asarray(logs.mean() + (means - logs.mean()) * (np.sqrt(count / (count - 1)) if count > 1 else 1.0))

    return _each_entry(comparison, bootstrap)


def _each_entry(comparison: Comparison, mean: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`mean` gives [draws] for the logarithms of one entry's repeats; they are averaged over the points."""
    return np.stack(
        [
            np.stack(
                [
                    np.mean([mean(np.log(point[system.name].seconds)) for point in points.values()], axis=0)
                    for points in comparison.entries.values()
                ],
                axis=1,
            )
            for system in comparison.systems
        ],
        axis=1,
    )


def _log_speed_ups(log_times: np.ndarray) -> np.ndarray:
    return np.asarray(log_times[:, :1] - log_times)


def _weights(comparison: Comparison) -> np.ndarray:
    given = np.array([comparison.targets[app].weight for app in comparison.entries])
    return np.asarray(given / given.sum())


def _slower(comparison: Comparison, name: str) -> tuple[str, ...]:
    return tuple(
        f"{app} {point[name].labels}".strip()
        for app, points in comparison.entries.items()
        for point in points.values()
        if ratio(point[name], point[comparison.reference])[0] > 1
    )


def _ranks(logs: np.ndarray) -> np.ndarray:
    """[draws, systems]: 1 for the largest; equal ones share the better rank."""
    return np.asarray(1 + (logs[:, None, :] > logs[:, :, None]).sum(axis=2))
