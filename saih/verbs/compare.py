"""`saih compare`: systems side by side on equal points."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saih.errors import SaihError

if TYPE_CHECKING:
    import pandas as pd

    from saih.analysis.compare import Comparison, System
    from saih.weights import Weights

EPILOG = "example: saih compare old=a.h5 new=b.h5 --weights weights.yaml -o reports/compare.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb."""
    parser.epilog = EPILOG
    parser.add_argument("systems", nargs="+", metavar="[NAME=]RESULTS.h5[,RESULTS.h5]", help="the reference first")
    parser.add_argument("--weights", type=Path, metavar="FILE.yaml", help="weights, target problems, nodes, prices")
    parser.add_argument("--anonymous", action="store_true", help="call them System A, System B, ...")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws that rank stability rests on (0)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="write the page too")


def compare(options: argparse.Namespace) -> int:
    """Put systems side by side on equal points: time metric, SSI, and how sure the ranking is."""
    from saih.report import comparison as page

    told = _tell(options)
    if options.json:
        import json

        print(json.dumps(told, indent=1, allow_nan=False))
    else:
        print("\n".join(_lines(told)))
    if options.output:
        written = page.write(told, options.output)
        if not options.json:
            print(f"page     {written}")
    return 0


def _tell(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from saih import weights
    from saih.analysis.compare import compare as side_by_side
    from saih.analysis.energy import relative
    from saih.report import comparison as page

    named = _named(options.systems)
    tables = {name: _read(paths) for name, paths in named.items()}
    workloads = list(dict.fromkeys(name for rows, _ in tables.values() for name in rows["workload"].unique()))
    facts = weights.read(options.weights, list(named), workloads) if options.weights else weights.Weights()
    systems = _systems(tables, facts)
    energies = {each.name: tables[each.name][1] for each in systems}
    targets = _targets(facts)
    if options.anonymous:
        alias = {each.name: f"System {_letters(place)}" for place, each in enumerate(systems)}
        systems = [replace(each, name=alias[each.name]) for each in systems]
        energies = {alias[name]: table for name, table in energies.items()}
        targets = {
            name: replace(each, larger={alias[system]: labels for system, labels in (each.larger or {}).items()})
            for name, each in targets.items()
        }
    found = side_by_side(systems, targets)
    return page.tell(found, relative(energies, _cells(found)), facts.currency, options.seed)


def _named(words: Sequence[str]) -> dict[str, list[Path]]:
    """System -> its files; a file without a name is called as it is."""
    named: dict[str, list[Path]] = {}
    for word in words:
        name, sign, files = word.partition("=")
        paths = [Path(each) for each in (files if sign else word).split(",")]
        name = name if sign else paths[0].stem
        if name in named or not name:
            raise SaihError(
                f"{word}: {'two systems are' if name else 'a system is'} called {name!r}; write NAME={word}"
            )
        named[name] = paths
    if len(named) < 2:
        raise SaihError(f"{words[0]}: name two systems or more, the reference first")
    return named


def _read(paths: Sequence[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measurements of a system, and the energy of its cells."""
    import pandas as pd

    from saih import store
    from saih.analysis import cells, energy
    from saih.analysis.ceilings import sweep_of
    from saih.analysis.compare import measurements

    rows, drawn = [], []
    for path in paths:
        points, samples = store.load(path), store.load_samples(path)
        repeats = cells.per_point(points, cells.job_steps(points, samples), sweep_of(points))
        rows.append(measurements(points, repeats))
        drawn.append(energy.per_cell(points, samples))
    return pd.concat(rows, ignore_index=True), pd.concat(drawn, ignore_index=True)


def _systems(tables: dict[str, tuple[pd.DataFrame, pd.DataFrame]], facts: Weights) -> list[System]:
    from saih.analysis.compare import System
    from saih.weights import SystemFacts

    found = []
    for name, (rows, _) in tables.items():
        own = facts.systems.get(name, SystemFacts())
        found.append(System(name, rows, float(own.nodes or "nan"), float(own.price or "nan")))
    return sorted(found, key=lambda each: each.name != facts.reference) if facts.reference else found


def _targets(facts: Weights) -> dict[str, Any]:
    from saih.analysis.compare import Target

    return {
        name: Target(each.weight, each.work, each.cell or None, each.larger)
        for name, each in facts.applications.items()
    }


def _cells(found: Comparison) -> list[dict[str, str]]:
    """Of each point compared the cell of each system."""
    return [
        {system.name: point[system.name].cell for system in found.systems}
        for points in found.entries.values()
        for point in points.values()
    ]


def _letters(place: int) -> str:
    """A to Z, AA, AB, ..."""
    return ("" if place < 26 else _letters(place // 26 - 1)) + chr(ord("A") + place % 26)


def _lines(told: dict[str, Any]) -> list[str]:
    from saih.analysis.numbers import ABSENT, si, three

    lines = []
    names = [each["system"] for each in told["systems"]]
    for app in told["applications"]:
        work = f"{three(app['work'])} units of work" if app["work"] else "the work of one step"
        lines.append(f"{app['application']}, weight {three(app['weight'])}: seconds for {work}, and over {names[0]}'s")
        for point in app["points"]:
            lines.append(f"  {point['labels'] or 'target'}")
            for name in names:
                entry = point["systems"][name]
                low_high = " [{}, {}]".format(*map(three, entry["interval"])) if entry["interval"] else " (one repeat)"
                larger = f", {three(entry['capability'])} times the problem" if entry["capability"] != 1 else ""
                slower = ", slower" if entry["normalised"] > 1 else ""
                interval = "" if name == names[0] else f"  {three(entry['normalised'])} x{low_high}{larger}{slower}"
                lines.append(f"    {name:24} {si(entry['time_s'], 's'):>9}{interval}")
    heads = ("SSI", "90 % range", "capability", "utilisation", "speed-up", "rank", "holds", "SSI/price", "energy/work")
    lines += ["", f"{'system':24}" + "".join(f"{head:>14}" for head in heads)]
    for each in told["systems"]:
        both = each["stability"]["both"]
        worth, energy = (
            ABSENT if value is None else three(value) for value in (each["ssi_per_price"], each["energy_per_work"])
        )
        shown = [
            three(each["ssi"]),
            f"{three(both['low'])}-{three(both['high'])}",
            *(three(each[name]) for name in ("capability", "utilisation", "speed_up")),
            str(each["rank"]),
            f"{100 * both['rank_holds']:.0f} %",
            worth,
            energy,
        ]
        lines.append(f"{each['system']:24}" + "".join(f"{cell:>14}" for cell in shown))
        lines += [f"  S < 1: slower than {names[0]} at {point}" for point in each["slower_at"]]
    return [*lines, *_notes(told)]


def _notes(told: dict[str, Any]) -> list[str]:
    from saih.analysis.numbers import plural, three

    first = max(told["systems"], key=lambda each: each["stability"]["both"]["first"])
    kinds = {"measurement": "repeats", "weights": "weights", "both": "both"}
    shares = ", ".join(f"{100 * first['stability'][kind]['first']:.0f} % ({word})" for kind, word in kinds.items())
    energy = told["energy"]
    rates = ", ".join(f"{three(hz)}/s on {name}" for name, hz in energy["hz"].items())
    drawn = f"scope {energy['scope']}, by {energy['source']}, read {rates}" if energy["relative"] else energy["why"]
    left = ", ".join(f"{plural(count, 'point')} of {name}" for name, count in told["left_out"].items())
    return [
        f"{first['system']} is first in {shares} of {told['draws']} draws; seed {told['seed']}",
        f"energy: {drawn}",
        f"left out, for not being equal points or not being measured (emulated, simulated): {left}",
    ]
