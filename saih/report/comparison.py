"""Systems side by side: what a comparison says as plain data, and the page made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saih.analysis.compare import DRAWS, Comparison, Stability, ratio, scores, stability
from saih.report.environment import environment, write_page

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
    first = max(told["systems"], key=lambda each: each["stability"]["both"]["first"])
    template = environment().get_template("report/comparison.html.j2")
    text = template.render(told=told, bars=_bars(told), first=first)
    return write_page(text, output)


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
