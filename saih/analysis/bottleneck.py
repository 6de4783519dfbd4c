"""What holds each cell back: how its step divides into parts, and the experiment that shows the largest.

A part's share of the step is what the step loses when the part is taken out (axis `ablation`); where that experiment
was not made, what the clock saw. Shares are taken repeat by repeat, with Student's t; a verdict is certain where the
largest is larger than the next in that sense. Computing is then split by the roofline (Williams et al., 2009), by the
measured latency of a launch and by how its time grows with its work; input by where the bytes came from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saih.analysis.cells import axes_of, copy_rate, is_whole, labels_of, peaks
from saih.analysis.intervals import student_t
from saih.core import PARTS, WHOLE

STRAGGLER = "straggler"
TIMED = ("input", "transfer", "compute", "communication", "checkpoint", "other", STRAGGLER)
"""Parts of a step, as the clocks of all ranks tell them; they add up to the step."""
LIMITS = ("FLOP", "memory", "launch")
"""What time spent computing goes to: arithmetic, traffic, or starting kernels whatever they do."""
BOTTLENECKS = ("storage", *TIMED, *LIMITS)
"""All verdicts: `storage` is input fetched from there; `compute` is told apart wherever ceilings are known."""
FLAT = 0.5
"""Time that grows with the work to less than this power is mostly not spent on it, but on launches."""
EMPTY = 0.25
"""Below this share of every ceiling, no ceiling tells what time goes to."""
NEGLIGIBLE = 0.05
"""Launches that are known to take less than this share of the time spent computing do not explain it for certain."""
CLEAR = 1.25
"""One resource accounts for this many times the time of another: which one binds is clear."""
CACHED_SHARE = 0.05
"""Where less than this of the bytes read came from storage, memory had them already: a cached epoch."""
READS = ("storage_read_bytes", "file_read_bytes")
FEWEST_BYTES = 4096
"""A step that reads less than a page reads no data."""
COUNTED_SHARE = 0.5
"""Where less than this of the bytes that a step should read was counted, the count says nothing of them."""
ALWAYS = 0.75
"""A straggler is the slowest rank in this share of the steps; otherwise ranks take turns."""


@dataclass(frozen=True)
class Share:
    """A part of the step: 0 to 1 with its 95 % interval (NaN with one repeat), and whether an experiment shows it."""

    of_step: float
    low: float
    high: float
    ablated: bool
    alone: float = 0.0
    """How long the part takes when no other one hides it, over the step: `of_step` where nothing overlaps, or nobody
    tried."""

    def gain_of_doubling(self) -> tuple[float, float, float]:
        """How many times faster the step gets if this part takes half as long, all else equal; with its interval.

        What the part hides, or is hidden by, stays hidden to the same extent: of a step that waits for its reader,
        twice the reader's speed gains no more than down to the time of what the reading overlaps.
        """
        mean, low, high = (
            1 / _with_half(share, max(share, self.alone)) for share in (self.of_step, self.low, self.high)
        )
        return mean, low, high


@dataclass(frozen=True)
class Limit:
    """Of computing: the share of the step that one of LIMITS takes, at its ceiling if not timed, with its interval.

    Shares need not add up to that of computing: arithmetic and traffic overlap, and some of it no ceiling explains.
    """

    of_step: float
    low: float
    high: float
    gain: float
    """How many times faster the step gets if this ceiling is twice as high and all time above ceilings stays."""


@dataclass(frozen=True)
class Slowest:
    """The rank that is busy longest most often."""

    rank: int
    host: str
    of_steps: float
    """Share of the timed steps in which it is."""


@dataclass(frozen=True)
class Verdict:
    """What holds a cell back: one of BOTTLENECKS; how sure, and why."""

    cell: str
    bottleneck: str
    certain: bool
    shares: Mapping[str, Share]
    """TIMED part -> share, largest first."""
    limits: Mapping[str, Limit]
    """What computing splits into, of LIMITS those that are known, largest first."""
    evidence: str
    """The experiment or the measurement it rests on, in words with its numbers."""
    from_storage: float
    """Share of the bytes read that storage delivered; NaN where nothing is read, or nobody counted."""
    slowest: Slowest | None
    """None with one rank."""


def verdicts(
    points: pd.DataFrame,
    samples: pd.DataFrame,
    ranks: pd.DataFrame,
    repeats: pd.DataFrame,
    cells: pd.DataFrame,
    sweep: Mapping[str, Any],
) -> list[Verdict]:
    """A verdict on every measured cell that is whole: nothing taken out of its step, no load put beside it.

    `points`, `samples` and `ranks` as stored; `repeats` is `per_point` and `cells` is `per_cell` of the same.
    """
    timed = parts_of_step(samples)
    whole = cells[(cells["status"] == "measured") & is_whole(cells)]
    shares = _shares(whole.index, points, repeats, timed)
    compute_s = pd.Series({cell: shares[cell]["compute"].of_step * whole.at[cell, "step_s"] for cell in whole.index})
    demands = _demands(whole, points, sweep)
    sized = [axis.name for axis in axes_of(sweep) if not axis.named]
    steepness = elasticities(whole, compute_s, demands[["FLOP", "memory"]].max(axis=1), sized)
    filled = demands.div(compute_s.where(compute_s > 0), axis=0).to_dict("index")
    fetched, slowest = from_storage(points, samples, ranks).to_dict(), slowest_ranks(points, samples, ranks)
    return [
        _judge(
            cell,
            shares[cell],
            {part: share for part, share in filled[cell].items() if not np.isnan(share)},
            _apart(whole.loc[cell]),
            steepness.get(cell),
            float(fetched.get(cell, np.nan)),
            slowest.get(cell),
        )
        for cell in whole.index
    ]


def parts_of_step(samples: pd.DataFrame) -> pd.DataFrame:
    """Median share of each of TIMED in the timed steps of a point: index point, one column a part.

    The step is that of the rank that is busy longest, which the others wait for in their communication. `straggler` is
    what it is busy longer than the rank of (lower) median busy time, whose parts stand for those of the step.
    """
    keys = ["point", "step"]
    busy = _busy(samples).sort_values([*keys, "busy_s"], kind="stable")
    steps = busy.groupby(keys)
    slowest = busy[steps.cumcount(ascending=False) == 0].set_index(keys)
    median = busy[steps.cumcount() == (steps["busy_s"].transform("size") - 1) // 2].set_index(keys)
    own = [f"{part}_s" for part in ("input", "transfer", "compute", "checkpoint", "other")]
    typical = median[own]
    straggler_s = slowest["busy_s"] - median["busy_s"]
    table = typical.assign(communication_s=slowest["communication_s"], straggler_s=straggler_s)
    table = table.div(table.sum(axis=1), axis=0).rename(columns=lambda name: name.removesuffix("_s"))
    return table.groupby("point").median()[list(TIMED)]


def slowest_ranks(points: pd.DataFrame, samples: pd.DataFrame, ranks: pd.DataFrame) -> dict[str, Slowest]:
    """Cell -> the rank that is busy longest in most timed steps of all repeats, where there are several ranks."""
    busy = _busy(samples)
    slowest = busy.loc[busy.groupby(["point", "step"], sort=False)["busy_s"].idxmax(), ["point", "rank"]]
    several = slowest[(points["ranks"].reindex(slowest["point"]) > 1).to_numpy()]
    hosts = ranks.set_index(["point", "rank"])["host"] if len(ranks) else pd.Series(dtype=object)
    found = {}
    for cell, mine in several.groupby(points["cell"].reindex(several["point"]).to_numpy()):
        rank = int(mine["rank"].mode()[0])
        names = hosts.reindex([(point, rank) for point in mine["point"].unique()]).dropna().unique()
        found[str(cell)] = Slowest(rank, " or ".join(map(str, names)), float((mine["rank"] == rank).mean()))
    return found


def busy_ranks(points: pd.DataFrame, samples: pd.DataFrame, ranks: pd.DataFrame) -> pd.DataFrame:
    """One row a rank of every cell that has several: cell, rank, host, and busy_s, the median over its timed steps."""
    busy = _busy(samples)
    table = busy[(points["ranks"].reindex(busy["point"]) > 1).to_numpy()]
    table = table.assign(cell=points["cell"].reindex(table["point"]).to_numpy())
    table = table.merge(ranks.reindex(columns=["point", "rank", "host"]), on=["point", "rank"], how="left")
    grouped = table.groupby(["cell", "rank"], sort=False)
    return grouped.agg(busy_s=("busy_s", "median"), host=("host", _named)).reset_index()


def _named(hosts: pd.Series) -> str:
    return " or ".join(sorted({*map(str, hosts.dropna())}))


def reads_per_step(points: pd.DataFrame, timed_steps: pd.Series, ranks: pd.DataFrame) -> pd.DataFrame:
    """Columns READS a step, of all ranks, index point, from counts of all its timed steps.

    NaN where nothing was read, or not by those that were counted.
    What measuring itself reads is below FEWEST_BYTES; and where much less was counted than the plan says a step reads,
    it was mapped into memory, or others read it.
    """
    reads = ranks.reindex(columns=["point", *READS]).groupby("point").sum(min_count=1).div(timed_steps, axis=0)
    counted = points.reindex(columns=["predicted_input_bytes", "ranks"]).reindex(reads.index)
    fewest = (counted.prod(axis=1, skipna=False).fillna(0.0).astype(float) * COUNTED_SHARE).clip(lower=FEWEST_BYTES)
    return reads.where(reads["file_read_bytes"] >= fewest)


def from_storage(points: pd.DataFrame, samples: pd.DataFrame, ranks: pd.DataFrame) -> pd.Series:
    """Cell -> share of the bytes read in its timed steps that storage delivered, where the kernel counts them."""
    timed = samples[samples["warmup"] == 0]
    reads = reads_per_step(points, timed.groupby("point")["step"].nunique(), ranks)
    reads = reads.groupby(points["cell"].reindex(reads.index)).sum(min_count=1)
    return (reads["storage_read_bytes"] / reads["file_read_bytes"]).clip(upper=1.0)


def elasticities(
    whole: pd.DataFrame, compute_s: pd.Series, work_s: pd.Series, sized: Collection[str]
) -> dict[str, float]:
    """Cell -> d log compute time / d log work, the steepest along any axis, of cells with a larger one beside them.

    Towards the next larger cell, or, at the end of an axis, from the next smaller one: time that is flat over one axis
    and grows over another goes to work. `work_s` is the time of the work at the ceilings. 1 where time follows it, 0
    where it does not depend on it. `sized` are the axes whose rungs have a size: another variant or precision is no
    larger cell.
    """
    axes = [f"label_{axis}" for axis in labels_of(whole)]
    found: dict[str, float] = {}
    ahead: set[str] = set()
    computing = whole.assign(compute_s=compute_s, work_s=work_s)
    computing = computing[(computing["work_s"] > 0) & (computing["compute_s"] > 0)]
    if computing.empty:
        return found
    for axis in sized:
        others = [name for name in axes if name != f"label_{axis}"]
        groups = computing.groupby(others, sort=False) if others else [((), computing)]
        for _, line in groups:
            ladder = line[line["ranks"] == line["ranks"].iloc[0]].sort_values("work_s")
            slopes = list(_slopes(ladder))
            ahead |= {cell for cell, _ in slopes}
            if slopes:
                slopes.append((str(ladder.index[-1]), slopes[-1][1]))
            for cell, slope in slopes:
                found[cell] = max(slope, found.get(cell, -np.inf))
    return {cell: slope for cell, slope in found.items() if cell in ahead}


def _slopes(ladder: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """Each cell of a line, in order of work, that a larger one follows."""
    for small, large in zip(ladder.index, ladder.index[1:], strict=False):
        growth = float(np.log(ladder.at[large, "work_s"] / ladder.at[small, "work_s"]))
        if growth > 0:
            yield str(small), float(np.log(ladder.at[large, "compute_s"] / ladder.at[small, "compute_s"])) / growth


def _busy(samples: pd.DataFrame) -> pd.DataFrame:
    """Timed steps, and how long each rank is busy in them: not with waiting for others, nor with writing together."""
    timed = samples[samples["warmup"] == 0]
    return timed.assign(busy_s=timed["step_s"] - timed["communication_s"] - timed["checkpoint_s"])


def _demands(whole: pd.DataFrame, points: pd.DataFrame, sweep: Mapping[str, Any]) -> pd.DataFrame:
    """Seconds that a step's FLOP, bytes and listed operations take at the measured ceilings; NaN where unknown."""
    flop_per_s = whole["precision"].map(lambda precision: peaks(sweep, str(precision))[0]).astype(float)
    launch_s = float(((sweep.get("ceilings") or {}).get("rates") or {}).get("launch_s") or "nan")
    operations = points.drop_duplicates("cell").set_index("cell").get("predicted_operations", pd.Series(dtype=float))
    return pd.DataFrame(
        {
            "FLOP": whole["flop"] / whole["ranks"] / flop_per_s,
            "memory": whole["moved_bytes"] / whole["ranks"] / copy_rate(sweep),
            "launch": operations.reindex(whole.index) * launch_s,
        }
    )


def _shares(
    cells: pd.Index, points: pd.DataFrame, repeats: pd.DataFrame, timed: pd.DataFrame
) -> dict[str, dict[str, Share]]:
    """Shares of all parts of each cell, largest first: by experiment where there is one."""
    own = timed.reindex(repeats.index)[list(TIMED)].to_numpy()
    rows, taken_out = repeats.groupby("cell").indices, _ablations(points, repeats, timed)
    found = {}
    for cell in cells:
        values = own[rows[cell]]
        values = values[~np.isnan(values).any(axis=1)]
        shares = {part: _share(values[:, place], ablated=False) for place, part in enumerate(TIMED)}
        shares |= {part: _share(saved, True, alone) for part, saved, alone in taken_out.get(cell, ())}
        found[cell] = dict(sorted(shares.items(), key=lambda item: -item[1].of_step))
    return found


def _ablations(
    points: pd.DataFrame, repeats: pd.DataFrame, timed: pd.DataFrame
) -> dict[str, list[tuple[str, np.ndarray, float]]]:
    """Cell -> (part, share of the step it costs, one a repeat; how long it is alone over the step) of every ablation.

    Computing is never hidden, so it is alone what the clock saw in the whole step; what it may hide, reading and
    communication, is what the clock saw where computing was taken out.
    """
    if "param_ablation" not in points or (points["param_ablation"].fillna(WHOLE) == WHOLE).all():
        return {}
    settings = [name for name in points if name.startswith("param_") and name != "param_ablation"]
    alike = points.groupby([points[name].fillna("") for name in settings], sort=False).ngroup()
    table = repeats[["cell", "repeat", "step_s"]].join(timed.mul(repeats["step_s"], axis=0))
    table = table.assign(part=points["param_ablation"], alike=alike)
    table = table[(table["part"] != "communication") | (points["ranks"].reindex(table.index) > 1)]  # one has no other
    return {
        str(group.loc[group["part"] == WHOLE, "cell"].iloc[0]): list(_taken_out(group))
        for _, group in table.groupby("alike", sort=False)
        if (group["part"] == WHOLE).any()
    }


def _taken_out(table: pd.DataFrame) -> Iterator[tuple[str, np.ndarray, float]]:
    """Of the repeats of a whole cell and of those that differ from it in the part taken out."""
    by_part = {part: rows.set_index("repeat") for part, rows in table.groupby("part")}
    whole_s = by_part[WHOLE]["step_s"]
    for part in PARTS:
        if part not in by_part:
            continue
        saved = (1 - by_part[part]["step_s"] / whole_s).dropna().to_numpy()
        unhidden = by_part.get(WHOLE if part == "compute" else "compute")
        alone = float("nan") if unhidden is None else float((unhidden[part] / whole_s).mean())
        if len(saved):
            yield part, saved, 0.0 if np.isnan(alone) else alone


def _share(values: np.ndarray, ablated: bool, alone: float = 0.0) -> Share:
    mean = float(np.mean(values))
    alone = max(alone, _clip(mean))
    if len(values) < 2:
        return Share(_clip(mean), float("nan"), float("nan"), ablated, alone)
    half = float(student_t(len(values) - 1)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return Share(_clip(mean), _clip(mean - half), _clip(mean + half), ablated, alone)


def _judge(
    cell: str,
    shares: dict[str, Share],
    filled: Mapping[str, float],
    apart: tuple[float, float],
    steepness: float | None,
    fetched: float,
    slowest: Slowest | None,
) -> Verdict:
    (first, largest), *others = shares.items()
    certain = all(largest.low > share.high for _, share in others)  # NaN, of a single repeat, is never certain
    how = "taken out of the step" if largest.ablated else "timed, not taken out"
    evidence = f"{first} is {100 * largest.of_step:.0f} % of the step ({how})"
    name, reason, clear = first, "", True
    if first == "compute":
        name, reason, clear = _split_compute(filled, steepness)
    elif first == "input":
        name, reason = _split_input(fetched)
    elif first == STRAGGLER and slowest is not None:
        clear = slowest.of_steps >= ALWAYS
        reason = f"rank {slowest.rank} on {slowest.host} is the slowest in {100 * slowest.of_steps:.0f} % of the steps"
    evidence = f"{evidence}; {reason}" if reason else evidence
    limits = _limits(shares["compute"].of_step, filled, apart, steepness)
    return Verdict(cell, name, certain and clear, shares, limits, evidence, fetched, slowest)


def _apart(cell: pd.Series) -> tuple[float, float]:
    """The step over the ends of its interval, the later one first; NaN with one repeat."""
    if cell["repeats"] < 2:
        return float("nan"), float("nan")
    return float(cell["step_s"] / cell["step_s_high"]), float(cell["step_s"] / cell["step_s_low"])


def _limits(
    computing: float, filled: Mapping[str, float], apart: tuple[float, float], steepness: float | None
) -> dict[str, Limit]:
    """Share of the step of each of LIMITS, and the gain of doubling it by the roofline (Williams et al., 2009).

    Of computing that hardly grows with its work, what does not grow is launching, whatever one launch takes alone.
    """
    known = {name: computing * share for name, share in filled.items()}
    if steepness is not None and steepness < FLAT:
        known["launch"] = max(known.get("launch", 0.0), computing * (1 - max(0.0, steepness)))
    shares = {name: _clip(share) for name, share in known.items()}
    bound = max(shares.values(), default=0.0)
    found = {}
    for name, share in shares.items():
        with_half = max([share / 2, *(other for rest, other in shares.items() if rest != name)])
        low, high = (_clip(share * end) for end in apart)
        found[name] = Limit(share, low, high, gain=1 / (1 - bound + with_half))
    return dict(sorted(found.items(), key=lambda item: -item[1].of_step))


def _split_input(fetched: float) -> tuple[str, str]:
    """(storage or input, why): bytes that memory had already were not read from storage."""
    if np.isnan(fetched):
        return "input", ""
    told = f"{100 * fetched:.0f} % of the bytes read came from storage"
    if fetched < CACHED_SHARE:
        return "input", f"{told}: a cached epoch"
    return ("storage" if fetched >= 0.5 else "input"), told


def _split_compute(known: Mapping[str, float], steepness: float | None) -> tuple[str, str, bool]:
    """(FLOP, memory or launch; why; whether that is clear) of the time spent computing.

    `known` is the share of that time that FLOP, memory and launch would take at their ceilings, of those known.
    """
    work = {name: part for name, part in known.items() if name != "launch"}
    if not work:
        return "compute", "no ceiling to tell FLOP from memory; run saih probe", False
    ceilings = ", ".join(f"{100 * part:.0f} % of it at the measured {name} ceiling" for name, part in known.items())
    most, least = max(work.values()), min(work.values())
    launch = known.get("launch")
    if steepness is not None and steepness < FLAT and most < 2 * EMPTY:
        told = f"its time grows as work^{steepness:.2f} at most along any axis; {ceilings}"
        return "launch", told, launch is None or launch >= NEGLIGIBLE
    if launch is not None and launch > CLEAR * most:
        return "launch", ceilings, launch >= EMPTY
    told = ceilings if steepness is None else f"{ceilings}; its time grows as work^{steepness:.2f}"
    if most < EMPTY:
        return "compute", f"{told}; far from all of them", False
    return max(work, key=lambda name: work[name]), told, most > CLEAR * least and len(work) == 2


def _with_half(share: float, alone: float) -> float:
    """The step, as a share of what it is, if a part of it takes half as long.

    The rest and the part overlap by as much of the shorter one as makes them last one step together.
    """
    rest, shorter = 1 - share, min(1 - share, alone)
    hidden = min(1.0, (rest + alone - 1) / shorter) if shorter > 0 else 0.0
    return max(rest, alone / 2) + (1 - hidden) * min(rest, alone / 2)


def _clip(share: float) -> float:
    return float(np.clip(share, 0.0, 1.0))
