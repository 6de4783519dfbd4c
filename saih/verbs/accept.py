"""`saih accept`: a stored sweep run again on a delivered machine, and judged against the bid."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saih.errors import SaihError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from saih.core import Params, Point
    from saih.plan import Plan
    from saih.site import Site

JOBS, RESULTS = Path("jobs"), Path("results")
EPILOG = "example: saih accept bid.h5 --site cluster --tolerance 5"
STATUS = {"pass": 0, "fail": 1, "undecided": 3}
"""Exit status; 2 is a mistake in what was asked, as everywhere."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb."""
    parser.epilog = EPILOG
    parser.add_argument("results", type=Path, metavar="BID.h5", help="results that were promised")
    parser.add_argument("--site", required=True, metavar="NAME|FILE", help="the delivered machine")
    parser.add_argument(
        "--tolerance", type=_percent, default=5.0, metavar="PERCENT", help="slower by so much passes (5)"
    )
    parser.add_argument("--repeat", type=int, metavar="N", help="repeats of every point (default: as in the bid)")
    parser.add_argument("--fresh", action="store_true", help="set what was measured for this before aside")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def accept(options: argparse.Namespace) -> int:
    """Run a stored sweep again on a delivered machine and judge it: exit status 0 passes, 1 fails, 3 is undecided."""
    from saih import site as sites
    from saih import store
    from saih.analysis import accept as judging
    from saih.analysis import cells
    from saih.analysis.ceilings import sweep_of

    site, bid = sites.load(options.site), store.load(options.results)
    plan, same = _plan(bid, site, options)
    results = _run(plan, options.fresh)
    tables = []
    for path in (options.results, results):
        points, samples = store.load(path), store.load_samples(path)
        tables.append(cells.per_point(points, cells.job_steps(points, samples), sweep_of(points)))
    first = bid.drop_duplicates("cell").set_index("cell")
    labels = {
        cell: " ".join(f"{axis}={first.at[cell, f'label_{axis}']}" for axis in cells.labels_of(bid)) for cell in same
    }
    judged = judging.judge(tables[0], tables[1], same, labels, options.tolerance / 100)
    verdict = judging.worst(judged)
    if options.json:
        import json

        told = {"verdict": verdict, "tolerance_percent": options.tolerance, "results": str(results)}
        print(json.dumps(told | {"cells": [each.to_json() for each in judged]}, indent=1, allow_nan=False))
    else:
        print("\n".join(_lines(judged)))
        print(f"results  {results}")
        print(f"{verdict.upper()}: {len(judged)} cells against {options.results}, tolerance {options.tolerance:g} %")
    return STATUS[verdict]


def _plan(bid: pd.DataFrame, site: Site, options: argparse.Namespace) -> tuple[Plan, dict[str, str]]:
    """The points of the bid on this site, and cell of the bid -> cell here."""
    from saih import jobs, probe, workload
    from saih import plan as planning
    from saih.analysis.cells import axes_of
    from saih.core import Point, Sweep
    from saih.files import digest

    told = bid.attrs["sweep"]
    known = workload.parameters(workload.spec(told["workload"]))
    measured = bid[bid["status"] == "measured"]
    if measured.empty:
        raise SaihError(f"{options.results}: nothing was measured, so there is no bid")
    grid: list[Point] = []
    same: dict[str, str] = {}
    for cell, rows in measured.groupby("cell", sort=False):
        first = rows.iloc[0]
        labels = {axis["name"]: str(first[f"label_{axis['name']}"]) for axis in told["axes"]}
        params = _params(first, known, str(options.results))
        repeats = range(options.repeat or len(rows))
        mine = [Point(told["workload"], params, labels, repeat, int(first["seed"])) for repeat in repeats]
        grid += mine
        same[str(cell)] = mine[0].cell
    grid.sort(key=lambda point: point.repeat)  # the repeats of a cell are spread over the whole run
    name = f"accept-{options.results.stem}-{digest({'site': site.name, 'cells': sorted(same.values())})[:8]}"
    folder = jobs.SweepFolder(JOBS / name)
    done = set() if options.fresh else {point.id for point in grid if folder.is_measured(point)}
    sweep = Sweep(told["workload"], axes_of(told), told["overrides"], len(grid) // len(same), told["seed"], site.name)
    ceilings, _ = probe.load(RESULTS, site)
    rates = ceilings["rates"] if ceilings else None
    return planning.make_plan(sweep, name, grid, site, rates, Path(site.data_folder), done), same


def _params(row: pd.Series, known: Mapping[str, Any], where: str) -> Params:
    """Parameters as the bid had them; what it did not know yet has its default."""
    params = {name: parameter.default for name, parameter in known.items()}
    for column, value in row.items():
        name = str(column).removeprefix("param_")
        if not str(column).startswith("param_") or value != value:
            continue
        if name not in known:
            raise unknown("parameter", name, known, where)
        plain = value.item() if hasattr(value, "item") else value
        kind = type(known[name].default)
        params[name] = kind(plain) if kind is not str else str(plain)  # whole numbers may have been stored as floats
    return params


def _run(plan: Plan, fresh: bool) -> Path:
    """Measure what is not measured yet; the results file."""
    from rich.console import Console

    from saih import drive, jobs, live, probe, schedulers, store, text

    print("\n".join(text.plan_lines(plan, everything=False)), file=sys.stderr)
    folder = jobs.SweepFolder(JOBS / plan.name)
    with folder.lock():
        if fresh:
            scheduler = schedulers.load(plan.site.scheduler)
            scheduler.cancel(list(drive.live_jobs(folder, scheduler)))
            jobs.set_aside(folder)
        jobs.refuse_other_code(folder, plan, jobs.version_of(plan)["source"])
        folder = jobs.prepare(plan, JOBS, ["saih", *sys.argv[1:]], probe.load(RESULTS, plan.site)[0])
        with live.Live(plan, Console(stderr=True)) as view:
            drive.run(folder, plan, view)
    return store.gather(folder, RESULTS)


def _lines(judged: list[Any]) -> list[str]:
    from saih.analysis.numbers import si, three

    lines = []
    for each in judged:
        span = f"{three(each.ratio)} x [{three(each.low)}, {three(each.high)}]" if each.ratio == each.ratio else ""
        figures = f"bid {si(each.bid_s, 's')}, delivered {si(each.delivered_s, 's')} {span}".rstrip()
        lines.append(f"{each.verdict.upper():10}{each.labels}: {figures}" + (f"; {each.why}" if each.why else ""))
    return lines


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of percent, 0 or more, not {text!r}")
    return value
