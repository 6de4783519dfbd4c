"""Techniques against their baselines: of each claim the best evidence of all files, and the check behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saih.analysis import kinds, numbers
from saih.report.results import Results

UNCHECKED = "no check"


@dataclass(frozen=True)
class Gain:
    """A claim, and the file with the best evidence for it."""

    claim: Mapping[str, Any]
    study: Results
    kind: str
    """How the ratio came about."""
    checked: str
    """Whether what it rests on was checked before it was timed; empty where nothing was measured."""


def best(studies: Sequence[Results]) -> list[Gain]:
    """Each claim of one workload once, by the file whose interval is narrowest: the one that was made to tell."""
    found: dict[str, tuple[Mapping[str, Any], Results]] = {}
    for one in studies:
        for claim in one.claims:
            known = found.get(claim["name"])
            if known is None or _weight(claim) > _weight(known[0]):
                found[claim["name"]] = claim, one
    return [gain(claim, one) for claim, one in found.values()]


def gain(claim: Mapping[str, Any], study: Results) -> Gain:
    """The claim as one file has it."""
    return Gain(claim, study, _kind(claim, study), _checked(claim, study))


def _weight(claim: Mapping[str, Any]) -> tuple[bool, float, int]:
    """How much a file tells: whether it has an interval, how narrow that is over what it is around, and of what."""
    interval, measured = claim["interval"], claim["measured"]
    if not interval or not measured:
        return False, 0.0, claim["pairs"]
    return True, -abs((interval[1] - interval[0]) / measured), claim["pairs"]


def _kind(claim: Mapping[str, Any], study: Results) -> str:
    """A ratio is as far from a measurement as the farthest of the cells behind it."""
    cells = study.points.loc[claim["points"], "cell"].unique()
    found = {kinds.of_metric(claim["metric"]), *study.cells.loc[cells, "measured_as"]}
    return next((name for name in ("simulated", "emulated") if name in found), "measured")


def _checked(claim: Mapping[str, Any], study: Results) -> str:
    """Points that fail their check are not timed, so those that were timed have passed."""
    points = len(claim["points"])
    if not points:
        return ""
    if _kind(claim, study) == "simulated":
        return f"{UNCHECKED}: simulated, so there is no output to judge"
    if not study.check:
        return f"{UNCHECKED} told"
    return f"passed at all {numbers.plural(points, 'point')}"
