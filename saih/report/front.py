"""The front page: of each system and workload the few figures that a decision rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from saih.analysis import numbers
from saih.analysis.bottleneck import CACHED_SHARE, Verdict
from saih.report import gains
from saih.report.results import Results
from saih.report.tables import main_percentage

ORDER = ("measured", "emulated", "simulated")
"""Of what is there, the first of these is what a row is about; kinds are never mixed in one figure."""
WORDS = {
    "input": "storage and input",
    "compute": "processor and memory",
    "communication": "network",
    "transfer": "host link",
    "checkpoint": "storage that is written to",
}
"""Parts of a step that a buyer can buy faster -> what they are called on the front page."""
NOT_MEASURED = "not measured"
NEGLIGIBLE = 0.005
"""A part with less of a step than this is not worth buying faster."""


@dataclass(frozen=True)
class Fact:
    """One figure of a row: the value, what it is of, and how certain it is."""

    value: str
    of: str = ""
    certainty: str = ""


@dataclass(frozen=True)
class Row:
    """One workload on one system."""

    workload: str
    anchor: str
    kind: str
    percent: Fact
    time: Fact
    scaling: Fact
    bottleneck: Fact
    gains: list[tuple[str, str]]
    """(part, times as fast a step gets with that part twice as fast), at the largest size."""
    energy: Fact
    claims: dict[str, int]
    committed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """A machine and what it did."""

    name: str
    machine: str
    date: str
    rows: list[Row]


def row(studies: Sequence[Results], anchor: str, committed: Mapping[str, int]) -> Row:
    """The front page's row of one workload on one system, from all its results files."""
    kind = next(
        (name for name in ORDER if any((one.whole["measured_as"] == name).any() for one in studies)), "measured"
    )
    parts = [(one, one.whole[one.whole["measured_as"] == kind]) for one in studies]
    parts = [(one, cells) for one, cells in parts if not cells.empty]
    first = studies[0]
    if not parts:
        nothing, name = Fact(NOT_MEASURED), str(first.sweep["workload"])
        facts = {"percent": nothing, "time": nothing, "scaling": nothing, "bottleneck": nothing, "energy": nothing}
        return Row(name, anchor, kind, gains=[], claims=_claims(studies), committed=dict(committed), **facts)
    study, target = _target(parts)
    return Row(
        str(first.sweep["workload"]),
        anchor,
        kind,
        _percent(parts),
        _time(study, target),
        _scaling(parts),
        _bottleneck(parts, study, str(target.name)),
        _gains(study, str(target.name)),
        _energy(study, str(target.name)),
        _claims(studies),
        dict(committed),
    )


def _target(parts: Sequence[tuple[Results, pd.DataFrame]]) -> tuple[Results, pd.Series]:
    """The largest size measured: most FLOP in a step of a rank, or most work; of several, the one that is fastest."""
    tried = []
    for one, cells in parts:
        table = cells[["flop", "units"]].div(cells["ranks"], axis=0).fillna(0.0)
        table = table.map(lambda size: float(f"{size:.3g}")).assign(speed=cells["work_per_s_per_rank"])
        largest = table.sort_values(["flop", "units", "speed"]).iloc[-1]
        tried.append((tuple(largest), one, cells.loc[largest.name]))
    _, study, cell = max(tried, key=lambda each: each[0])
    return study, cell


def _percent(parts: Sequence[tuple[Results, pd.DataFrame]]) -> Fact:
    known = [(one, cells, main_percentage(one)) for one, cells in parts]
    named = [(one, cells[column].dropna(), column) for one, cells, column in known if column]
    named = [(one, values, column) for one, values, column in named if not values.empty]
    if not named:
        return Fact(numbers.ABSENT, "no FLOP counted, or no ceiling")
    of = named[0][0].denominators[named[0][2]]
    same = [(one, values) for one, values, column in named if one.denominators[column] == of]
    low, high = min(values.min() for _, values in same), max(values.max() for _, values in same)
    best = next(one.labels(one.cells.loc[values.idxmax()]) for one, values in same if values.max() == high)
    ends = numbers.three(high) if low == high else f"{numbers.three(low)} – {numbers.three(high)}"  # noqa: RUF001
    return Fact(f"{ends} %", f"of {of}", f"highest at {best}")


def _time(study: Results, target: pd.Series) -> Fact:
    """Seconds for a unit of work: converted from the rate, so that less is better and systems compare."""
    many, prefix = (1e9, "G") if study.work_unit == "bytes" else (1.0, "")
    scale = many / (target["work_per_s"] * target["step_s"])
    value, low, high = (float(target[name] * scale) for name in ("step_s", "step_s_low", "step_s_high"))
    repeats = numbers.plural(int(target["repeats"]), "repeat")
    unit = study.work_unit[:-1] if study.work_unit.endswith("s") else study.work_unit
    unit = f"{prefix}B" if prefix else unit
    at = study.labels(target)
    return Fact(f"{numbers.si(value, 's')} / {unit}", at, f"{numbers.span(low, high, 's')}, {repeats}")


def _scaling(parts: Sequence[tuple[Results, pd.DataFrame]]) -> Fact:
    """At the most ranks; of several cells there, the one with the most FLOP."""
    found = [(one, one.scaled[one.scaled.index.isin(cells.index)]) for one, cells in parts if not one.scaled.empty]
    found = [(one, cells) for one, cells in found if not cells.empty]
    if not found:
        return Fact(NOT_MEASURED, "one number of ranks only")
    _, cells = max(found, key=lambda pair: (pair[1]["ranks"].max(), pair[1]["flop"].max()))
    cell = cells[cells["ranks"] == cells["ranks"].max()].sort_values("flop").iloc[-1]
    low, high = 100 * cell["efficiency_low"], 100 * cell["efficiency_high"]
    certainty = f"{numbers.three(low)} to {numbers.three(high)} %" if pd.notna(low) else "one repeat: no interval"
    of = f"on {numbers.plural(int(cell['ranks']), 'rank')}, over {int(cell['base_ranks'])}"
    return Fact(f"{numbers.three(100 * cell['efficiency'])} %", of, certainty)


def _bottleneck(parts: Sequence[tuple[Results, pd.DataFrame]], study: Results, target: str) -> Fact:
    """The most frequent verdict, certain ones first; and the verdict at the largest size."""
    found = [each for one, cells in parts for each in one.verdicts if each.cell in cells.index]
    if not found:
        return Fact(NOT_MEASURED)
    counted = Counter(each.bottleneck for each in found if each.certain) or Counter(each.bottleneck for each in found)
    name, count = counted.most_common(1)[0]
    sure = sum(each.certain for each in found)
    here = _verdict(study, target)
    largest = f"largest size: {here.bottleneck}{'' if here.certain else ' (not certain)'}" if here else ""
    certain = f"in {count} of {numbers.plural(len(found), 'cell')}"
    return Fact(name if sure else f"{name}?", certain if sure else f"{certain}, none certain", largest)


def _gains(study: Results, target: str) -> list[tuple[str, str]]:
    here = _verdict(study, target)
    if here is None:
        return []
    told = []
    for part, name in WORDS.items():
        share = here.shares.get(part)
        if share is None or (share.of_step < NEGLIGIBLE and part != "input"):  # who asks for storage gets an answer
            continue
        gain, low, high = share.gain_of_doubling()
        span = f"{low:.2f} to {high:.2f}" if pd.notna(low) else ""
        span = f" ({span})" if len(set(span.split(" to "))) > 1 else ""
        cached = part == "input" and here.from_storage < CACHED_SHARE
        told.append((f"{name} (page cache)" if cached else name, f"{gain:.2f}\N{NO-BREAK SPACE}x{span}"))
    return told


def _verdict(study: Results, cell: str) -> Verdict | None:
    return next((each for each in study.verdicts if each.cell == cell), None)


def _energy(study: Results, cell: str) -> Fact:
    """Joule for a unit of work, by the source that sees most of the machine; absent is absent."""
    found = study.energy[study.energy["cell"] == cell]
    if found.empty:
        return Fact(NOT_MEASURED)
    first = found.iloc[0]
    value, low, high = (first[f"joule_per_work{end}"] for end in ("", "_low", "_high"))
    repeats = numbers.plural(int(first["repeats"]), "repeat")
    certainty = f"{numbers.span(low, high, 'J')}, {repeats}" if pd.notna(low) else f"{repeats}: no interval"
    of = f"{first['scope']}, by {first['source']}, {numbers.three(first['hz'])}/s"
    return Fact(f"{numbers.si(float(value), 'J')} / {study.work_unit.removesuffix('s')}", of, certainty)


def _claims(studies: Sequence[Results]) -> dict[str, int]:
    """Claims by verdict; one that several files were asked about counts once, by its best evidence."""
    counted = Counter(str(each.claim["verdict"]) for each in gains.best(studies))
    return {verdict: counted[verdict] for verdict in ("holds", "fails", "not-measurable") if counted[verdict]}
