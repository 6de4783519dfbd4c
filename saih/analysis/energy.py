"""From the energy of every repeat to joule a unit of work and mean power of a cell, each source by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis.cells import is_whole
from saih.analysis.intervals import log_mean_interval

SOURCES = {"meter": 0, "slurm": 1, "rapl": 2, "nvml": 3, "nvidia_smi": 4}
"""In the order they are listed: from what measures most of the machine to what measures least."""
COLUMNS = (
    *("cell", "source", "scope", "how", "hz", "window_s", "repeats", "mean_power_w"),
    *("joule_per_work", "joule_per_work_low", "joule_per_work_high"),
)


def sources(points: pd.DataFrame) -> list[str]:
    """The sources that metered some point."""
    named = (re.fullmatch(r"energy_(\w+)_j", name) for name in points)
    return sorted((match[1] for match in named if match), key=lambda name: SOURCES.get(name, len(SOURCES)))


def per_cell(points: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """One row a cell and source, COLUMNS; none where nothing was metered. `points` and `samples` as stored.

    Joule a unit of work is taken repeat by repeat: the energy of the timed steps over the work of all of them on all
    ranks, with Student's t on the logarithms. Energies of different scope are different quantities: no two are added
    and none stands for another.
    """
    timed = samples[samples["warmup"] == 0]
    units = timed.groupby("point")["units"].sum().reindex(points.index)
    rows = []
    for source in sources(points):
        joule = points[f"energy_{source}_j"]
        known = points[np.isfinite(joule) & (joule > 0) & (units > 0) & is_whole(points)]
        for cell, mine in known.groupby("cell", sort=False):
            each = (joule / units)[mine.index]
            value, low, high = log_mean_interval(np.log(each.to_numpy(dtype=float)))
            first = mine.iloc[0]
            rows.append(
                {
                    "cell": cell,
                    "source": source,
                    "scope": first[f"energy_{source}_scope"],
                    "how": first[f"energy_{source}_how"],
                    "hz": float(mine[f"energy_{source}_hz"].min()),
                    "window_s": float(mine[f"energy_{source}_window_s"].min()),
                    "repeats": len(mine),
                    "mean_power_w": float((joule / points[f"energy_{source}_window_s"])[mine.index].mean()),
                    "joule_per_work": value,
                    "joule_per_work_low": low,
                    "joule_per_work_high": high,
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def relative(tables: Mapping[str, pd.DataFrame], cells: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Energy a unit of work of several systems over the first's, as a geometric mean over points.

    `tables` is system -> `per_cell`; `cells` has for each point the cell of each system. "relative" is empty, and "why"
    says why, where no source of the same scope metered all of them: energies of different scope are never compared.
    """
    told: dict[str, Any] = {"source": "", "scope": "", "hz": {}, "relative": {}, "why": ""}
    known = {
        name: {(row.source, row.scope, row.cell): (row.joule_per_work, row.hz) for row in table.itertuples()}
        for name, table in tables.items()
    }
    unmetered = [name for name, table in tables.items() if table.empty]
    if unmetered:
        return told | {"why": f"not metered on {', '.join(unmetered)}"}
    for source, scope in dict.fromkeys(key[:2] for key in next(iter(known.values()))):
        if all((source, scope, each[name]) in known[name] for each in cells for name in tables):
            found = {name: [known[name][source, scope, each[name]] for each in cells] for name in tables}
            means = {name: float(np.mean(np.log([joule for joule, _ in each]))) for name, each in found.items()}
            first = next(iter(means.values()))
            told |= {"source": source, "scope": scope}
            told["relative"] = {name: float(np.exp(mean - first)) for name, mean in means.items()}
            told["hz"] = {name: min(hz for _, hz in each) for name, each in found.items()}
            return told
    seen = "; ".join(
        f"{name}: {', '.join(sorted({f'{source} ({scope})' for source, scope, _ in each}))}"
        for name, each in known.items()
    )
    return told | {"why": f"no source of the same scope metered every point of all systems ({seen})"}
