"""What holds each cell back: how its step divides into parts, and the experiment that shows the largest.

A part's share of the step is what the step loses when the part is taken out (axis `ablation`); where that experiment
was not made, what the clock saw. Shares are taken repeat by repeat, with Student's t; a verdict is certain where the
largest is larger than the next in that sense. Computing is then split by the roofline (Williams et al., 2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis.cells import copy_rate, is_whole, labels_of, peaks
from saih.analysis.intervals import student_t
from saih.core import PARTS, WHOLE

STRAGGLER = "straggler"
TIMED = ("input", "transfer", "compute", "communication", "other", STRAGGLER)
"""Parts of a step, as the clocks of all ranks tell them; they add up to the step."""
FLAT = 0.5
"""Time that grows with FLOP to less than this power is mostly not spent on them: launches, small kernels."""
EMPTY = 0.25
"""Below this share of the roofline, time does not go to what kernels do, unless larger cells say otherwise."""


@dataclass(frozen=True)
class Share:
    """A part of the step: 0 to 1 with its 95 % interval (NaN with one repeat), and whether an experiment shows it."""

    of_step: float
    low: float
    high: float
    ablated: bool

    def gain_of_doubling(self) -> tuple[float, float, float]:
        """How many times faster the step gets if this part takes half as long, all else equal; with its interval."""
        return _twice(self.of_step), _twice(self.low), _twice(self.high)


@dataclass(frozen=True)
class Verdict:
    """What holds a cell back: one of TIMED, computing as `FLOP`, `memory` or `launch`; how sure, and why."""

    cell: str
    bottleneck: str
    certain: bool
    shares: Mapping[str, Share]
    """TIMED part -> share, largest first."""
    evidence: str
    """The experiment or the measurement it rests on, in words with its numbers."""


def verdicts(
    points: pd.DataFrame, samples: pd.DataFrame, repeats: pd.DataFrame, cells: pd.DataFrame, sweep: Mapping[str, Any]
) -> list[Verdict]:
    """A verdict on every measured cell that is whole: nothing taken out of its step, no load put beside it.

    `points` and `samples` as stored; `repeats` is `per_point` and `cells` is `per_cell` of the same.
    """
    timed = parts_of_step(samples)
    whole = cells[(cells["status"] == "measured") & is_whole(cells)]
    steepness = elasticities(whole)
    found = []
    for cell in whole.index:
        shares = _shares(cell, points, repeats, timed)
        found.append(_judge(whole.loc[cell], shares, repeats, steepness.get(cell), sweep))
    return found


def parts_of_step(samples: pd.DataFrame) -> pd.DataFrame:
    """Median share of each of TIMED in the timed steps of a point: index point, one column a part.

    The step is that of the rank that is busy longest, which the others wait for in their communication. `straggler` is
    what it is busy longer than the (lower) median rank, whose input, transfer and compute stand for those parts.
    """
    timed = samples[samples["warmup"] == 0]
    busy = timed.assign(busy_s=timed["step_s"] - timed["communication_s"])
    keys = ["point", "step"]
    slowest = busy.loc[busy.groupby(keys, sort=False)["busy_s"].idxmax()].set_index(keys)
    own = [f"{part}_s" for part in ("input", "transfer", "compute", "other")]
    typical = busy.groupby(keys, sort=False)[own].quantile(0.5, interpolation="lower")
    straggler_s = (slowest["busy_s"] - typical.sum(axis=1)).clip(lower=0.0)
    table = typical.assign(communication_s=slowest["communication_s"], straggler_s=straggler_s)
    table = table.div(table.sum(axis=1), axis=0).rename(columns=lambda name: name.removesuffix("_s"))
    return table.groupby("point").median()[list(TIMED)]


def elasticities(whole: pd.DataFrame) -> dict[str, float]:
    """Cell -> d log time / d log FLOP towards the next larger cell along any one axis, the flattest of them.

    1 where time follows FLOP, 0 where it does not depend on them. Cells without a larger neighbour have none.
    """
    axes = [f"label_{axis}" for axis in labels_of(whole)]
    found: dict[str, float] = {}
    computing = whole[whole["flop"] > 0]
    for axis in axes:
        others = [name for name in axes if name != axis]
        groups = computing.groupby(others, sort=False) if others else [((), computing)]
        for _, line in groups:
            ladder = line[line["ranks"] == line["ranks"].iloc[0]].sort_values("flop")
            for small, large in zip(ladder.index, ladder.index[1:], strict=False):
                growth = float(np.log(ladder.at[large, "flop"] / ladder.at[small, "flop"]))
                if growth > 0:
                    slope = float(np.log(ladder.at[large, "step_s"] / ladder.at[small, "step_s"])) / growth
                    found[small] = min(slope, found.get(small, np.inf))
    return found


def _shares(cell: str, points: pd.DataFrame, repeats: pd.DataFrame, timed: pd.DataFrame) -> dict[str, Share]:
    """Shares of all parts, largest first: by experiment where there is one."""
    own = timed.reindex(repeats.index[repeats["cell"] == cell]).dropna()
    shares = {part: _share(own[part].to_numpy(), ablated=False) for part in TIMED}
    for part, saved in _ablations(cell, points, repeats):
        shares[part] = _share(saved, ablated=True)
    return dict(sorted(shares.items(), key=lambda item: -item[1].of_step))


def _ablations(cell: str, points: pd.DataFrame, repeats: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """(part, share of the step it costs, one a repeat) for every ablation of this cell."""
    if "param_ablation" not in points:
        return
    settings = [name for name in points if name.startswith("param_") and name != "param_ablation"]
    mine = points.loc[points["cell"] == cell].iloc[0]
    alike = points[(points[settings].fillna("") == mine[settings].fillna("")).all(axis=1)]
    table = repeats.loc[repeats.index.intersection(alike.index)]
    steps = table.assign(part=alike["param_ablation"]).pivot_table(index="repeat", columns="part", values="step_s")
    for part in PARTS:
        if part in steps and WHOLE in steps:
            saved = (1 - steps[part] / steps[WHOLE]).dropna().to_numpy()
            if len(saved):
                yield part, saved


def _share(values: np.ndarray, ablated: bool) -> Share:
    mean = float(np.mean(values))
    if len(values) < 2:
        return Share(_clip(mean), float("nan"), float("nan"), ablated)
    half = float(student_t(len(values) - 1)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return Share(_clip(mean), _clip(mean - half), _clip(mean + half), ablated)


def _judge(
    cell: pd.Series, shares: dict[str, Share], repeats: pd.DataFrame, steepness: float | None, sweep: Mapping[str, Any]
) -> Verdict:
    (first, largest), (_, second) = list(shares.items())[:2]
    certain = bool(largest.low > second.high)  # NaN, of a single repeat, is never certain
    how = "taken out of the step" if largest.ablated else "timed, not ablated"
    evidence = f"{first} is {100 * largest.of_step:.0f} % of the step ({how})"
    if first == "compute":
        first, reason, clear = _split_compute(cell, shares["compute"].of_step, steepness, sweep)
        evidence, certain = f"{evidence}; {reason}", certain and clear
    return Verdict(str(cell.name), first, certain, shares, evidence)


def _split_compute(
    cell: pd.Series, share: float, steepness: float | None, sweep: Mapping[str, Any]
) -> tuple[str, str, bool]:
    """(FLOP, memory or launch; why; whether that is clear) of the time spent computing."""
    compute_s = share * float(cell["step_s"])
    flop_s = float(cell["flop"]) / cell["ranks"] / peaks(sweep, str(cell["precision"]))[0]
    bytes_s = float(cell["moved_bytes"]) / cell["ranks"] / copy_rate(sweep)
    filled = {"FLOP": np.nan_to_num(flop_s / compute_s), "memory": np.nan_to_num(bytes_s / compute_s)}
    bound = max(filled, key=lambda name: filled[name])
    roofline = ", ".join(f"{100 * part:.0f} % of it at the measured {name} ceiling" for name, part in filled.items())
    if steepness is not None and steepness < FLAT:
        return "launch", f"its time grows as FLOP^{steepness:.2f} to the next larger cell; {roofline}", True
    if filled[bound] < EMPTY:
        return "launch", roofline, steepness is not None
    return bound, roofline, filled[bound] > 1.25 * min(filled.values())


def _twice(share: float) -> float:
    return 1 / (1 - share / 2)


def _clip(share: float) -> float:
    return float(np.clip(share, 0.0, 1.0))
