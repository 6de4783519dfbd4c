"""From a swept `ceilings` workload to the rates that everything else is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

MATCHING = ("processor", "gpu", "torch", "threads")
"""Ceilings hold for a machine that equals theirs in these."""
KERNEL = ("param_kernel", "param_size", "precision")
"""What tells one kernel that computes or moves memory from another."""
MEMORY, HOST_LINK, FILES, COUNTED = ("copy", "triad"), ("upload", "download"), ("read", "write"), ("open", "launch")
BETWEEN_RANKS = ("allreduce", "pingpong")


@dataclass(frozen=True)
class Ceiling:
    """One rate: an amount over the seconds of a cell's kernel; or, of a latency, seconds over an amount."""

    name: str
    cell: pd.Series
    amount: float
    source: str

    def value(self, step_s: str = "step_s") -> float:
        """By the median, or by an end of the interval, `step_s_low` or `step_s_high`."""
        seconds = float(self.cell[step_s]) * kernel_share(self.cell)
        return float(seconds / self.amount if is_latency(self.name) else self.amount / seconds)

    def interval(self) -> list[float]:
        return sorted(self.value(end) for end in ("step_s_low", "step_s_high"))


def kernel_share(cell: Mapping[str, Any] | pd.Series) -> float:
    """Share of a step that is the kernel's: before a file is read cold it has to be forgotten."""
    return 1.0 - float(cell.get("share_other", 0.0)) if cell.get("param_kernel") in FILES else 1.0


def is_latency(name: str) -> bool:
    """`launch_s` and `pingpong_s` are seconds; all others are something a second."""
    return name.endswith("_s") and not name.endswith("_per_s")


def unit(name: str) -> str:
    """Of a rate by its name: precisions count FLOP, opens files, latencies seconds, and all the rest bytes."""
    if is_latency(name):
        return "s"
    if name == "opens_per_s":
        return "/s"
    kinds = (*MEMORY, *HOST_LINK, *FILES, "allreduce", "pingpong")
    return "B/s" if name.split("-")[0] in kinds else "FLOP/s"


def find_ceilings(cells: pd.DataFrame, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Best sustained FLOP/s of a device for each precision, over kernels and sizes; and of all else the largest case.

    The largest copy or triad counts, not the fastest: smaller ones fit into a cache. `allreduce-<transport>`: what a
    rank contributes, over the time of the whole collective, largest message, most ranks. `pingpong`: bytes/s one way;
    `pingpong_s`: one way of the smallest message. Both get `-nodes` where they are between nodes. `read-cold`,
    `write-random-direct` and so on: bytes/s of one process that waits for each block. `opens_per_s`: small files.
    `launch_s`: seconds of a kernel that does nothing. `together`, where kernels ran on several ranks at once too: of
    these rates, the share that each of so many has.
    """
    measured = cells[cells["status"] == "measured"]
    found = list(_all(_on_fewest_ranks(measured)))
    return {
        "together": {each.name: shares for each in found if (shares := _together(each, measured))},
        "rates": {each.name: each.value() for each in found},
        "intervals": {each.name: each.interval() for each in found},
        "sources": {each.name: each.source for each in found},
        "machine": {key: environment.get(key) for key in MATCHING},
    }


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ceilings of several sweeps of one machine."""
    together: dict[str, Any] = {"machine": parts[0]["machine"]}
    for key in ("rates", "intervals", "sources", "together"):
        together[key] = {name: value for part in parts for name, value in part.get(key, {}).items()}
    return together


def _on_fewest_ranks(measured: pd.DataFrame) -> pd.DataFrame:
    """Cells of kernels that ranks run each for itself on the fewest ranks, with the amounts of one of them; all others.

    Amounts add up over ranks; a ceiling is one device's.
    """
    each_itself = ~measured["param_kernel"].isin(BETWEEN_RANKS)
    share = (1 / measured["ranks"]).where(each_itself, 1.0)
    amounts = {name: measured[name] * share for name in ("flop", "moved_bytes", "units") if name in measured}
    fewest = measured.groupby("param_kernel")["ranks"].transform("min")
    return measured.assign(**amounts)[~each_itself | (measured["ranks"] == fewest)]


def _together(ceiling: Ceiling, measured: pd.DataFrame) -> dict[str, float]:
    """Ranks at once -> share of this ceiling that each has: the same kernel of the same size, which takes longer."""
    cell = ceiling.cell
    if cell["param_kernel"] in BETWEEN_RANKS or cell["ranks"] > 1 or measured["ranks"].max() == 1:
        return {}
    alike = (measured[list(KERNEL)] == cell[list(KERNEL)]).all(axis=1)
    several = measured[alike & (measured["ranks"] > 1)]
    return {f"{each['ranks']:g}": float(cell["step_s"] / each["step_s"]) for _, each in several.iterrows()}


def _all(measured: pd.DataFrame) -> Iterator[Ceiling]:
    for precision, group in measured[measured["flop"] > 0].groupby("precision"):
        best = group.loc[(group["flop"] / group["step_s"]).idxmax()]
        yield Ceiling(str(precision), best, best["flop"], f"{best['param_kernel']} of size {best['param_size']:g}")
    for kernel, group in measured.groupby("param_kernel"):
        yield from _of_kernel(str(kernel), group)


def _of_kernel(kernel: str, group: pd.DataFrame) -> Iterator[Ceiling]:
    if kernel in MEMORY:
        largest = group.loc[group["moved_bytes"].idxmax()]
        arrays = 2 if kernel == "copy" else 3
        source = f"{kernel} of {largest['moved_bytes'] / arrays / 1e6:.0f} MB"
        yield Ceiling(kernel, largest, largest["moved_bytes"], source)
    elif kernel in HOST_LINK:
        for pinned, same in group.groupby("param_pinned"):
            largest = same.loc[same["moved_bytes"].idxmax()]
            source = f"{largest['moved_bytes'] / 1e6:.0f} MB of {'page-locked' if pinned else 'pageable'} memory"
            yield Ceiling(f"{kernel}-pinned" if pinned else kernel, largest, largest["moved_bytes"], source)
    elif kernel == "allreduce":
        for transport, same in group.groupby("param_transport"):
            largest = same.sort_values(["param_message_bytes", "ranks"]).iloc[-1]
            message = float(largest["param_message_bytes"])
            name = f"allreduce-{transport}{_where(largest)}"
            yield Ceiling(name, largest, message, _message(message, largest["ranks"]))
    elif kernel == "pingpong":
        cells = group.sort_values("param_message_bytes")
        smallest, largest = cells.iloc[0], cells.iloc[-1]
        for name, cell, amount in (("pingpong", largest, largest["moved_bytes"]), ("pingpong_s", smallest, 2.0)):
            name = name.replace("pingpong", f"pingpong{_where(cell)}")
            yield Ceiling(name, cell, amount, _message(float(cell["param_message_bytes"]), 2))
    elif kernel in FILES:
        for (pattern, cache), same in group.groupby(["param_pattern", "param_cache"]):
            cell = same.loc[same["moved_bytes"].idxmax()]
            name = "-".join([kernel, *(["random"] if pattern == "random" else []), str(cache)])
            source = f"{cell['moved_bytes'] / 1e6:.3g} MB in blocks of {'4 KiB' if pattern == 'random' else '1 MiB'}"
            yield Ceiling(name, cell, cell["moved_bytes"], source)
    elif kernel in COUNTED:
        cell = group.iloc[0]
        name, source = ("opens_per_s", "files of 4 KiB") if kernel == "open" else ("launch_s", "kernels of one number")
        yield Ceiling(name, cell, cell["units"], f"{cell['units']:g} {source}")


def _where(cell: pd.Series) -> str:
    """What tells a rate between nodes from one between the ranks of a node."""
    return "-nodes" if cell.get("param_nodes", 1) > 1 else ""


def _message(message_bytes: float, ranks: float) -> str:
    return f"{message_bytes / 1e6:.3g} MB on {ranks:g} ranks"


def sweep_of(points: pd.DataFrame) -> dict[str, Any]:
    """The sweep of a results file, from `points.attrs`.

    Ceilings of another machine than the points were measured on are none of theirs: they are left out, and
    `ceilings_refused` says why. A scheduler chooses the machine, so this is not known any earlier.
    """
    sweep = dict(points.attrs["sweep"])
    found = sweep.get("ceilings")
    whys = [mismatch(found, each) for each in points.attrs["environments"]] if found and "machine" in found else []
    why = next(filter(None, whys), "")
    return sweep | {"ceilings": None, "ceilings_refused": why} if why else sweep


def mismatch(ceilings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Why these ceilings do not hold for this environment; empty where they do."""
    machine = ceilings["machine"]
    differing = [key for key in MATCHING if machine.get(key) != environment.get(key)]
    return ", ".join(f"{key} is {environment.get(key)!r}, not {machine.get(key)!r}" for key in differing)
