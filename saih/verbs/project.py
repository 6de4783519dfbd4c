"""`saih project`: measured cells carried over to larger ones and to other machines; never a measurement."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saih.errors import SaihError

if TYPE_CHECKING:
    import pandas as pd

    from saih.analysis.project import LeftOut, Machine, Projection, Sweep
    from saih.report.results import Results

RESULTS = Path("results")
EPILOG = "example: saih project results/reference/cosmoflow-cpu.h5 --at data=64,model=w128"
MARK = "projected, not measured"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb."""
    parser.epilog = EPILOG
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.h5")
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="AXIS=RUNG,...",
        help="a cell (default: all that are planned, not measured)",
    )
    parser.add_argument("--to", metavar="SITE|FILE", help="another machine: its site, or its ceilings-NAME.json")
    parser.add_argument(
        "--leave-out",
        action="store_true",
        help="predict every measured cell from the others, and say how well that went",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="write a page too")


def project(options: argparse.Namespace) -> int:
    """Carry measured cells over to larger ones or another machine, by ceilings and by fits, with 90 % intervals."""
    from saih.report import projection
    from saih.report.results import read

    if options.leave_out and (options.at or options.to):
        raise SaihError("--leave-out tests projections on what is measured: leave --at and --to out")
    if options.leave_out and options.output:
        raise SaihError("--leave-out has no page of its own: leave -o out; that of a projection says how far it misses")
    there = _machine(options.to) if options.to else None
    told: list[dict[str, Any]] = []
    studies = []
    for number, path in enumerate(options.results):
        results = read(path)
        sweep = _sweep(results)
        if options.leave_out:
            told.append({"results": str(path), "left_out": _leave_out(sweep)})
        else:
            rows = list(_project(results, sweep, options.at, there))
            told.append({"results": str(path), "cells": rows})
            if options.output:
                studies.append(projection.study(number, results, sweep, rows, there is None))
    if options.json:
        import json

        print(json.dumps({"kind": MARK, "results": [_plain(each) for each in told]}, indent=1, allow_nan=False))
    else:
        print("\n".join(_left_out_lines(told) if options.leave_out else _lines(told, options.to)))
    if options.output:
        written = projection.write(studies, there.name if there else None, options.output)
        if not options.json:
            print(f"page     {written}")
    return 0


def _sweep(results: Results) -> Sweep:
    from saih.analysis.project import Machine, Sweep

    told = results.sweep
    peak = told["site"]["peak"]
    measured = (told["ceilings"] or {}).get("rates") or {}
    here = Machine(told["site"]["name"], measured, peak["flop_per_s"], peak["memory_bytes_per_s"])
    axes = [axis for axis in results.problem_axes if not axis.named and min(rung.size for rung in axis.rungs) > 0]
    return Sweep(results.cells, results.verdicts, [axis.name for axis in axes], here)


def _machine(name: str) -> Machine:
    """Another machine, by the ceilings measured on it and its data sheet, as far as they are known."""
    from saih import probe, site
    from saih.analysis.project import Machine
    from saih.files import read_json

    if name.endswith(".json"):
        told = read_json(Path(name))
        if not isinstance(told, dict) or not isinstance(told.get("rates"), dict):
            raise SaihError(f"{name}: not a file of ceilings; saih probe writes one")
        return Machine(str(told.get("site", Path(name).stem)), told["rates"], {}, None)
    found = site.load(name)
    stored = probe.path_of(RESULTS, found)
    rates = read_json(stored)["rates"] if stored.exists() else {}
    return Machine(found.name, rates, found.peak.flop_per_s, found.peak.memory_bytes_per_s)


def _project(results: Results, sweep: Sweep, at: list[str], there: Machine | None) -> Iterator[dict[str, Any]]:
    """A row for each target and method."""
    from saih.analysis.project import amounts

    if at:
        targets = _asked(results, sweep, at)
    elif there is not None:
        targets = sweep.cells.loc[sweep.measured]
    else:
        targets = sweep.cells[~sweep.cells.index.isin(sweep.measured)]
    for (_, row), (_, asked) in zip(targets.iterrows(), amounts(targets).iterrows(), strict=True):
        by_ceilings = sweep.by_ceilings(row, asked, there)
        by_scaling = sweep.by_scaling(row) if there is None else None
        labels = results.labels(row)
        for method, found in {"ceilings": by_ceilings, "scaling": by_scaling}.items():
            if found is not None:
                yield {"labels": labels, "method": method, **_figures(found), "how": found.how} | _place(sweep, row)


def _place(sweep: Sweep, row: pd.Series) -> dict[str, Any]:
    """Where a page draws it; not for JSON."""
    sizes = {name: float(row[f"size_{name}"]) for name in sweep.sized}
    rungs = {name: str(row[f"label_{name}"]) for name in sweep.sized}
    return {"sizes": sizes, "rungs": rungs, "series": str(row["series"])}


def _figures(found: Projection) -> dict[str, float]:
    return {"step_s": found.value, "low_s": found.low, "high_s": found.high}


def _asked(results: Results, sweep: Sweep, at: list[str]) -> pd.DataFrame:
    """Cells at the rungs asked for, one for each series of the sweep, with what a step of them costs."""
    import pandas as pd

    from saih import sweep as language
    from saih import workload
    from saih.core import axis_of

    spec = workload.spec(results.sweep["workload"])
    known, ladders = workload.parameters(spec), {axis.name: axis for axis in spec.AXES}
    rungs = {}
    for name, label in language.parse_settings(at).items():
        if name not in sweep.sized:
            raise SaihError(f"--at {name}: not an axis with sizes that was swept; those are: {', '.join(sweep.sized)}")
        axis = ladders[name].pick([label], "--at") if name in ladders else axis_of(known[name], [label], "--at")
        rungs[name] = axis.rungs[0]
    missing = [name for name in sweep.sized if name not in rungs and sweep.cells[f"label_{name}"].nunique() > 1]
    if missing:
        raise SaihError(f"--at: say which rung of {', '.join(missing)} too: --at {missing[0]}=RUNG")
    rows = []
    for series in dict.fromkeys(sweep.cells.loc[sweep.measured, "series"]):
        base = next(sweep.cells.loc[cell] for cell in sweep.measured if sweep.cells.at[cell, "series"] == series)
        params = {name: parameter.default for name, parameter in known.items()} | _stored(base, known)
        changes: dict[str, Any] = {}
        for name, rung in rungs.items():
            params |= rung.params
            changes |= {f"label_{name}": rung.label, f"size_{name}": rung.size}
        cost = spec.cost(params)
        changes |= {f"param_{name}": params[name] for name in ("nodes", "gpus")}
        changes |= {"predicted_flop": cost.flop, "predicted_input_bytes": cost.input_bytes}
        changes |= {"predicted_message_bytes": cost.message_bytes, "predicted_operations": float(len(cost.operations))}
        changes["predicted_moved_bytes"] = sum(operation.moved_bytes for operation in cost.operations)
        planned = {name: value for name, value in changes.items() if name in base}  # as far as the file plans it
        rows.append({**base.to_dict(), **planned})
    return pd.DataFrame(rows)


def _stored(row: pd.Series, known: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a stored cell, in their own types."""
    found = {}
    for name, parameter in known.items():
        value = row.get(f"param_{name}")
        if value is not None and value == value:
            found[name] = type(parameter.default)(value)
    return found


def _leave_out(sweep: Sweep) -> list[dict[str, Any]]:
    from saih.analysis.project import leave_out

    return [{"labels": sweep.words(each.cell), "found": each} for each in leave_out(sweep)]


def _left_out_lines(told: list[dict[str, Any]]) -> list[str]:
    from saih.analysis.project import summary

    everything: list[LeftOut] = []
    lines = []
    for each in told:
        found = [one["found"] for one in each["left_out"]]
        everything += found
        for method in dict.fromkeys(one.method for one in found):
            mine = [one for one in found if one.method == method]
            lines.append(f"{Path(each['results']).name:36} by {method:9}{_summary(summary(mine))}")
    silent = sum(not each["left_out"] for each in told)
    lines.append(f"{silent} of {len(told)} results say nothing: too few cells that differ in size alone")
    for method in ("ceilings", "scaling"):
        for name, mine in {
            f"all, by {method}": [one for one in everything if one.method == method],
            f"beyond the rest, by {method}": [one for one in everything if one.method == method and one.beyond],
        }.items():
            lines.append(f"{name:49}{_summary(summary(mine))}")
    return lines


def _summary(told: Mapping[str, Any]) -> str:
    from saih.analysis.numbers import plural, three

    if not told["cells"]:
        return "no cell"
    median, coverage = three(100 * told["median_error"]), 100 * told["coverage"]
    return f"{plural(told['cells'], 'cell')}: median error {median} %, 90 % intervals cover {coverage:.0f} %"


def _lines(told: list[dict[str, Any]], to: str | None) -> list[str]:
    from saih.analysis.numbers import si, span

    lines = []
    for each in told:
        lines.append(f"{each['results']}: {MARK}{f', to {to}' if to else ''}; step time, 90 % prediction interval")
        for row in each["cells"]:
            interval = span(row["low_s"], row["high_s"], "s")
            lines.append(f"  {row['labels']:28} {row['method']:9}{si(row['step_s'], 's'):>9}  {interval}")
            lines.append(f"    {row['how']}")
        if not each["cells"]:
            lines.append("  nothing to project: all planned cells are measured, or too few; name one: --at AXIS=RUNG")
    return lines


def _plain(told: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it; NaN becomes None."""
    from saih.analysis.project import summary

    if "cells" in told:
        words = ("labels", "method", "step_s", "low_s", "high_s", "how")
        rows = [{name: None if row[name] != row[name] else row[name] for name in words} for row in told["cells"]]
        return {**told, "cells": rows}
    found = [each["found"] for each in told["left_out"]]
    rows = [
        {
            "labels": each["labels"],
            "method": each["found"].method,
            "measured_s": each["found"].measured_s,
            **_figures(each["found"].predicted),
            "beyond": each["found"].beyond,
            "covered": each["found"].covered,
        }
        for each in told["left_out"]
    ]
    methods = dict.fromkeys(each.method for each in found)
    totals = {method: summary([each for each in found if each.method == method]) for method in methods}
    return {"results": told["results"], "left_out": rows, "summary": totals}
