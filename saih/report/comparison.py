"""Systems side by side: what a comparison says as plain data, and the page made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from saih import __version__
from saih.analysis import numbers
from saih.analysis.compare import DRAWS, Comparison, Stability, ratio, scores, stability
from saih.files import write_atomic

TEMPLATES = Path(__file__).parent.parent / "templates"
KINDS = {"measurement": (True, False), "weights": (False, True), "both": (True, True)}
"""What is drawn again: repeats, weights."""


def tell(comparison: Comparison, energy: Mapping[str, Any], currency: str, seed: int) -> dict[str, Any]:
    """The comparison as data for JSON: NaN becomes None."""
    draws = {kind: stability(comparison, *which, seed=seed) for kind, which in KINDS.items()}
    first = comparison.systems[0]
    systems = []
    for system, score in zip(comparison.systems, scores(comparison), strict=True):
        worth = score.ssi / system.price * first.price
        systems.append(
            {
                "system": system.name,
                "capability": score.capability,
                "utilisation": score.utilisation,
                "speed_up": score.speed_up,
                "ssi": score.ssi,
                "slower_at": list(score.slower),
                "rank": draws["both"][system.name].rank,
                "stability": {kind: _drawn(each[system.name]) for kind, each in draws.items()},
                "nodes": _known(system.nodes),
                "price": _known(system.price),
                "ssi_per_price": _known(worth),
                "energy_per_work": energy["relative"].get(system.name),
            }
        )
    return {
        "reference": comparison.reference,
        "draws": DRAWS,
        "seed": seed,
        "currency": currency,
        "energy": dict(energy),
        "systems": systems,
        "applications": [_application(comparison, name) for name in comparison.entries],
        "left_out": dict(comparison.left_out),
    }


def write(told: Mapping[str, Any], output: Path) -> Path:
    """The page of `tell`'s data, whole or not at all."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"three": _three, "plural": numbers.plural, "seconds": lambda value: numbers.si(value, "s")}
    text = env.get_template("comparison.html.j2").render(told=told, bars=_bars(told), version=__version__)
    write_atomic(output, lambda file: file.write(text.encode()))
    return output


def _application(comparison: Comparison, name: str) -> dict[str, Any]:
    target = comparison.targets[name]
    rows = []
    for point in comparison.entries[name].values():
        reference = point[comparison.reference]
        entries = {}
        for system, entry in point.items():
            normalised = ratio(entry, reference)
            entries[system] = {
                "labels": entry.labels,
                "time_s": float(np.exp(np.mean(np.log(entry.seconds)))),
                "repeats": len(entry.seconds),
                "nodes": entry.nodes,
                "capability": entry.capability,
                "normalised": normalised[0],
                "interval": None if np.isnan(normalised[1]) else list(normalised[1:]),
            }
        rows.append({"labels": reference.labels, "systems": entries})
    return {"application": name, "weight": target.weight, "work": target.work, "points": rows}


def _drawn(each: Stability) -> dict[str, float]:
    return {"low": each.low, "high": each.high, "rank_holds": each.holds, "first": each.first}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _three(value: float | None) -> str:
    return numbers.ABSENT if value is None else numbers.three(value)


def _bars(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Places of SSI and its interval on one logarithmic line, in percent of its width."""
    spans = {each["system"]: each["stability"]["both"] for each in told["systems"]}
    ends = [value for span in spans.values() for value in (span["low"], span["high"])]
    low, high = np.log(min([*ends, 1.0])) - 0.05, np.log(max([*ends, 1.0])) + 0.05

    def place(value: float) -> float:
        return round(float(100 * (np.log(value) - low) / (high - low)), 2)

    return [
        {
            "system": each["system"],
            "at": place(each["ssi"]),
            "low": place(spans[each["system"]]["low"]),
            "high": place(spans[each["system"]]["high"]),
            "one": place(1.0),
        }
        for each in told["systems"]
    ]
