"""From a swept `ceilings` workload to the rates that everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

MATCHING = ("processor", "gpu", "torch", "threads")
"""Ceilings hold for a machine that equals theirs in these."""


def find_ceilings(cells: pd.DataFrame, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Best sustained FLOP/s of a device for each precision, over kernels and sizes; bytes/s of the largest copy.

    The largest copy counts, not the fastest: smaller ones fit into a cache. Where all-reduces were measured, bytes/s of
    the largest message over each transport: what a rank contributes, over the time of the whole collective.
    """
    measured = cells[cells["status"] == "measured"]
    rates: dict[str, float] = {}
    sources: dict[str, str] = {}
    intervals: dict[str, list[float]] = {}
    for precision, group in measured[measured["flop"] > 0].groupby("precision"):
        best = group.loc[(group["flop"] / group["step_s"]).idxmax()]
        rates[str(precision)] = float(best["flop"] / best["step_s"])
        intervals[str(precision)] = [float(best["flop"] / best[end]) for end in ("step_s_high", "step_s_low")]
        sources[str(precision)] = f"{best['param_kernel']} of size {best['param_size']:g}"
    copies = measured[measured["param_kernel"] == "copy"]
    if not copies.empty:
        largest = copies.loc[(copies["moved_bytes"]).idxmax()]
        rates["copy"] = float(largest["moved_bytes"] / largest["step_s"])
        sources["copy"] = f"copy of {largest['moved_bytes'] / 2e6:.0f} MB"
    reductions = measured[measured["param_kernel"] == "allreduce"]
    if not reductions.empty:
        for transport, group in reductions.groupby("param_transport"):
            largest = group.loc[group["param_message_bytes"].idxmax()]
            message, name = float(largest["param_message_bytes"]), f"allreduce-{transport}"
            rates[name] = message / float(largest["step_s"])
            sources[name] = f"{message / 1e6:.3g} MB on {largest['ranks']:g} ranks"
    return {
        "rates": rates,
        "intervals": intervals,
        "sources": sources,
        "machine": {key: environment.get(key) for key in MATCHING},
    }


def mismatch(ceilings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Why these ceilings do not hold for this environment; empty where they do."""
    machine = ceilings["machine"]
    differing = [key for key in MATCHING if machine.get(key) != environment.get(key)]
    return ", ".join(f"{key} is {environment.get(key)!r}, not {machine.get(key)!r}" for key in differing)
