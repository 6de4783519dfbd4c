"""Energy that is known only after a job: what its scheduler counted, and what a power meter wrote into a file."""

from __future__ import annotations

import csv
import datetime
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saih import schedulers
from saih.core import FORMAT
from saih.energy import Energy, integrate
from saih.errors import SaihError, unknown
from saih.files import blamed_on, read_record
from saih.jobs import PACK_KEYS, SUBMITTED_KEYS, SweepFolder

SCOPES = ("device", "package", "node", "rack")
COLUMNS = ("timestamp", "watts")
LARGEST_JOULE = 2**63
"""Slurm's "no value" is a little less than 2**64."""


@dataclass(frozen=True)
class PowerLog:
    """What a power meter wrote: (seconds since 1970, watts), and what hangs on it."""

    name: str
    scope: str
    samples: tuple[tuple[float, float], ...]

    def of_window(self, begin_s: float, end_s: float) -> Energy | None:
        """None where the file does not cover the window, or has less than two samples of it."""
        found = integrate(self.samples, begin_s, end_s)
        if found is None:
            return None
        return Energy("meter", self.scope, f"power meter, {self.name}", found[0], end_s - begin_s, found[1])


@dataclass(frozen=True)
class JobEnergy:
    """What a scheduler counted over a whole job."""

    joule: float
    seconds: float
    points: int
    """That shared the job."""

    def of_window(self, begin_s: float, end_s: float) -> Energy:
        """The job's mean power over the window: a scheduler counts jobs, not steps."""
        joule = self.joule / self.seconds * (end_s - begin_s)
        points = "its only point" if self.points == 1 else f"one of {self.points} points"
        how = f"Slurm's counters: mean power of the whole job ({self.seconds:.0f} s), of which this is {points}"
        return Energy("slurm", "node", how, joule, end_s - begin_s, 1 / self.seconds)


def read_log(path: Path, scope: str) -> PowerLog:
    """The samples of a CSV file with the columns `timestamp` and `watts`.

    Times are seconds since 1970, or ISO 8601, local where no zone is named. SaihError names the line that does not
    fit.
    """
    if scope not in SCOPES:
        raise unknown("scope of the power meter", scope, SCOPES)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SaihError(f"{path}: cannot be read as CSV ({error})") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise SaihError(f"{path}:1: no column {missing[0]}; the first line must name {' and '.join(COLUMNS)}")
    places = [names.index(name) for name in COLUMNS]
    samples = []
    for number, row in enumerate(rows[1:], start=2):
        if row:
            try:
                samples.append((_seconds(row[places[0]]), _watts(row[places[1]])))
            except (ValueError, IndexError):
                raise SaihError(
                    f"{path}:{number}: {','.join(row)!r} is no sample; write seconds since 1970 or "
                    "2026-01-31T12:00:00Z, and watts"
                ) from None
    return PowerLog(path.name, scope, tuple(sorted(samples)))


def of_scheduler(folder: SweepFolder, sweep: Mapping[str, Any]) -> dict[str, JobEnergy]:
    """Point id -> energy of the job that measured it; empty where its scheduler counts none."""
    name = str(sweep["site"].get("scheduler"))
    energies = getattr(schedulers.load(name), "energies", None) if name in schedulers.names() else None
    if energies is None:
        return {}
    homes = {}
    for home in folder.job_folders():
        submitted = home / "submitted.json"
        if submitted.exists():
            homes[str(read_record(submitted, FORMAT, SUBMITTED_KEYS)["id"])] = home
    known = _ask(energies, list(homes))
    found: dict[str, JobEnergy] = {}
    for name, home in homes.items():  # of a point that was tried again, the last job counts: it measured it
        joule, seconds = known.get(name, (LARGEST_JOULE, 0.0))
        if joule < LARGEST_JOULE:
            pack = read_record(home / "pack.json", FORMAT, PACK_KEYS)
            with blamed_on(home / "pack.json"):
                ids = [str(point["id"]) for point in pack["points"]]
            found |= {each: JobEnergy(joule, seconds, len(ids)) for each in ids}
    return found


def _ask(
    energies: Callable[[Sequence[str]], dict[str, tuple[float, float]]], ids: list[str]
) -> dict[str, tuple[float, float]]:
    """Results may be gathered where the scheduler cannot be asked: that is said, and energy stays absent."""
    try:
        return energies(ids)
    except SaihError as error:
        logging.getLogger(__name__).warning("energy of the jobs stays absent: %s", error)
        return {}


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text.strip()).timestamp()
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _watts(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value
