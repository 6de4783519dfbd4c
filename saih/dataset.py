"""A data set by itself: pieces of it as the points of a sweep, and how much of it is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from saih import plan as planning
from saih import sweep as language
from saih import workload
from saih.core import Params
from saih.errors import SaihError
from saih.plan import Plan
from saih.site import Site

WORKLOAD = "universes"
"""What makes it where none is named: its spec has `data_folder` and `GENERATE`, the settings that make a data set."""

JOB_SHARE = 0.5
"""Of the site's longest job, what a piece is predicted to take at the most: then each piece is a job of its own."""


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, or will be, its size, and how much of it is there now."""

    path: Path
    whole_bytes: float
    there_bytes: Callable[[], float]


def plan(name: str, settings: Mapping[str, language.Scalar], seed: int, site: Site) -> tuple[DataSet, Plan]:
    """What there is to make, and the plan that makes it: all ranks of a node, a piece for each job that it takes.

    What is there stays: the pieces are looked through again and what they lack is made.

    Raises:
        SaihError: the workload makes no data set by itself, a setting is wrong, or it does not fit: disk, memory, time.
    """
    fixed = _settings(name, settings, site)
    params = _params(name, fixed, seed, site)
    maker, root = workload.maker(name), Path(site.data_folder)
    there_bytes = partial(maker.there_bytes, params, seed, root)
    data = DataSet(root / maker.data_folder(params, seed), workload.spec(name).cost(params).disk_bytes, there_bytes)
    _refuse_short_disk(data, site)
    whole = _pieces(name, fixed, 1, seed, site, data)
    seconds = max((item.point_s for item in whole.kept), default=0.0) or _late_s(whole)
    pieces = max(1, math.ceil(seconds / (site.job_minutes * 60 * JOB_SHARE)))
    made = whole if pieces == 1 else _pieces(name, fixed, pieces, seed, site, data)
    if made.pruned:
        raise SaihError(f"{data.path}: {made.pruned[0].kind}: {made.pruned[0].reason}")
    return data, made


def _settings(name: str, settings: Mapping[str, language.Scalar], site: Site) -> dict[str, language.Scalar]:
    return {"gpus": site.gpus_per_node, **workload.maker(name).GENERATE, **settings}


def _params(name: str, settings: Mapping[str, language.Scalar], seed: int, site: Site) -> Params:
    asked = language.make_sweep(name, {"piece": [0]}, settings, seed=seed, site=site.name)
    return language.points(asked, site.defaults)[0].params


def _pieces(
    name: str, settings: Mapping[str, language.Scalar], pieces: int, seed: int, site: Site, data: DataSet
) -> Plan:
    asked = language.make_sweep(
        name, {"piece": list(range(pieces))}, {**settings, "pieces": pieces}, seed=seed, site=site.name
    )
    grid = language.points(asked, site.defaults)
    there = data.there_bytes()
    return planning.make_plan(
        asked, language.sweep_name(asked, grid), grid, site, None, Path(site.data_folder), there_bytes=there
    )


def _late_s(whole: Plan) -> float:
    """Predicted seconds of a data set that is more than one job can make."""
    return max((item.forecast.point_s for item in whole.pruned if item.kind == "time"), default=0.0)


def _refuse_short_disk(data: DataSet, site: Site) -> None:
    missing, free = data.whole_bytes - data.there_bytes(), planning.free_bytes(Path(site.data_folder))
    if missing > free:
        raise SaihError(
            f"{data.path}: {missing / 1e9:.3g} GB of {data.whole_bytes / 1e9:.3g} GB are still to be made, and "
            f"{free / 1e9:.3g} GB are free in {Path(site.data_folder).absolute()}"
        )
