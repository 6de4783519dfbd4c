"""Verdicts on steps whose parts the test chooses: shares, splits, certainty, and what a faster part would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saih.analysis.bottleneck import TIMED, Share, Verdict, busy_ranks, elasticities, verdicts
from saih.analysis.cells import job_steps, per_cell, per_point
from saih.core import PHASES

CEILINGS = {"rates": {"fp32": 1e9, "copy": 1e9, "launch_s": 1e-4}}
"""1 GFLOP/s, 1 GB/s, 0.1 ms a launch."""
SITE: dict[str, Any] = {"site": {"peak": {"flop_per_s": {}}}}
STEPS = 4


@dataclass(frozen=True)
class Cell:
    """Phases of a step in seconds, the same in all steps: of one rank, or of several."""

    ranks: Sequence[Mapping[str, float]]
    ablation: str = "none"
    flop: float = 0.0
    moved_bytes: float = 0.0
    operations: int = 0
    size: int = 1
    read: tuple[float, float] = (np.nan, np.nan)
    """(from storage, asked for) in bytes, of all steps."""
    input_bytes: float = 0.0
    """What the plan says a step reads."""
    noise: Sequence[float] = field(default=(1.0, 1.01, 0.99))
    """Of each repeat: what all of it takes over what it should."""


def judge(*cells: Cell, axis: tuple[str, Sequence[int]] = ("size", (1, 2))) -> list[Verdict]:
    """On these cells of a sweep over one axis of these sizes, and over what is taken out."""
    points, samples, ranks = tables(cells)
    rungs = [{"label": str(size), "params": {}, "size": size} for size in axis[1]]
    sweep = {"ceilings": CEILINGS, "axes": [{"name": axis[0], "unit": "", "rungs": rungs}]} | SITE
    steps = job_steps(points, samples)
    repeats = per_point(points, steps, sweep)
    return verdicts(points, samples, ranks, repeats, per_cell(points, steps, sweep), sweep)


def tables(cells: Sequence[Cell]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Points, samples and ranks as a results file has them."""
    points, samples, ranks = {}, [], []
    for number, cell in enumerate(cells):
        for repeat, factor in enumerate(cell.noise):
            point = f"p{number}r{repeat}"
            points[point] = {
                "cell": f"c{number}",
                "repeat": repeat,
                "status": "measured",
                "ranks": len(cell.ranks),
                "predicted_operations": cell.operations,
                "predicted_input_bytes": cell.input_bytes,
                "param_ablation": cell.ablation,
                "param_size": cell.size,
                "label_ablation": cell.ablation,
                "label_size": str(cell.size),
                "size_size": cell.size,
            }
            for rank, phases in enumerate(cell.ranks):
                spent = {f"{phase}_s": factor * phases.get(phase, 0.0) for phase in PHASES}
                work = {"units": 1.0, "flop": cell.flop, "moved_bytes": cell.moved_bytes, "warmup": 0}
                row = {"point": point, "rank": rank} | work | spent | {"step_s": sum(spent.values())}
                samples += [row | {"step": step} for step in range(STEPS)]
                read = dict(zip(("storage_read_bytes", "file_read_bytes"), cell.read, strict=True))
                ranks.append({"point": point, "rank": rank, "host": f"n{rank}"} | read)
    return pd.DataFrame.from_dict(points, orient="index"), pd.DataFrame(samples), pd.DataFrame(ranks)


def one(verdicts_: list[Verdict]) -> Verdict:
    [verdict] = verdicts_
    return verdict


def test_shares_are_what_the_clocks_saw_and_add_up() -> None:
    verdict = one(judge(Cell([{"input": 0.6, "compute": 0.3, "other": 0.1}])))
    assert (verdict.bottleneck, verdict.certain) == ("input", True)
    assert sum(share.of_step for share in verdict.shares.values()) == pytest.approx(1.0)
    assert {part: verdict.shares[part].of_step for part in ("input", "compute", "other")} == pytest.approx(
        {"input": 0.6, "compute": 0.3, "other": 0.1}
    )
    assert "timed, not taken out" in verdict.evidence


def test_an_experiment_beats_the_clock() -> None:
    """The clock saw waiting for a batch; without reading the step is no faster: something else held the reader up."""
    whole, without = {"input": 0.6, "compute": 0.4}, {"compute": 0.99}
    verdict = one(judge(Cell([whole]), Cell([without], ablation="input")))
    assert verdict.shares["input"].ablated
    assert verdict.shares["input"].of_step == pytest.approx(0.01)
    assert next(iter(verdict.shares)) == "compute"
    verdict = one(judge(Cell([{"input": 0.6, "compute": 0.4}]), Cell([{"compute": 0.4}], ablation="input")))
    assert (verdict.bottleneck, verdict.shares["input"].of_step) == ("input", pytest.approx(0.6))
    assert "taken out of the step" in verdict.evidence


def test_repeats_that_disagree_and_single_ones_are_not_certain() -> None:
    whole, noise = [{"input": 0.5, "compute": 0.5}], (0.7, 1.0, 1.4)
    unsure = one(judge(Cell(whole, noise=noise), Cell([{"compute": 0.49}], ablation="input")))
    assert not unsure.certain
    assert unsure.shares["input"].low < unsure.shares["input"].of_step < unsure.shares["input"].high
    single = one(judge(Cell([{"input": 0.9, "compute": 0.1}], noise=(1.0,))))
    assert (single.bottleneck, single.certain) == ("input", False)


@pytest.mark.parametrize(
    ("read", "name"),
    [((9e6, 1e7), "storage"), ((3e6, 1e7), "input"), ((1e5, 1e7), "input"), ((np.nan, np.nan), "input")],
)
def test_input_is_storage_only_where_storage_delivered_it(read: tuple[float, float], name: str) -> None:
    verdict = one(judge(Cell([{"input": 0.9, "compute": 0.1}], read=read)))
    assert verdict.bottleneck == name
    assert ("a cached epoch" in verdict.evidence) == (read[0] == 1e5)


@pytest.mark.parametrize(("asked", "planned"), [(STEPS * 23.0, 0.0), (STEPS * 5e3, 6.7e7)])
def test_reads_of_others_and_of_measuring_itself_are_no_cached_epoch(asked: float, planned: float) -> None:
    verdict = one(judge(Cell([{"input": 0.9, "compute": 0.1}], read=(0.0, asked), input_bytes=planned)))
    assert np.isnan(verdict.from_storage)
    assert "cached" not in verdict.evidence


@pytest.mark.parametrize(
    ("cell", "name", "certain"),
    [
        (Cell([{"compute": 1.0}], flop=0.9e9, moved_bytes=0.1e9), "FLOP", True),
        (Cell([{"compute": 1.0}], flop=0.1e9, moved_bytes=0.9e9), "memory", True),
        (Cell([{"compute": 1.0}], flop=0.9e9, moved_bytes=0.85e9), "FLOP", False),
        (Cell([{"compute": 1.0}], flop=1e7, moved_bytes=1e7, operations=8000), "launch", True),
        (Cell([{"compute": 1.0}], flop=1e7, moved_bytes=1e7), "compute", False),
        (Cell([{"compute": 1.0}], flop=1e7, moved_bytes=5e7), "compute", False),
    ],
)
def test_computing_is_split_by_the_roofline(cell: Cell, name: str, certain: bool) -> None:
    verdict = one(judge(cell))
    assert (verdict.bottleneck, verdict.certain) == (name, certain)


def test_time_that_does_not_grow_with_its_work_goes_to_launches() -> None:
    small = Cell([{"compute": 1.0}], flop=0.3e9, moved_bytes=0.01e9)
    flat = Cell([{"compute": 1.1}], flop=1.2e9, moved_bytes=0.04e9, size=2)
    steep = Cell([{"compute": 4.0}], flop=1.2e9, moved_bytes=0.04e9, size=2)
    assert judge(small, flat)[0].bottleneck == "launch"
    assert judge(small, steep)[0].bottleneck == "FLOP"


@pytest.mark.parametrize(("operations", "certain"), [(0, False), (100, False), (1000, True)])
def test_launches_are_certain_only_where_they_take_time(operations: int, certain: bool) -> None:
    small = Cell([{"compute": 1.0}], flop=0.04e9, operations=operations)
    flat = Cell([{"compute": 1.1}], flop=0.16e9, operations=operations, size=2)
    verdict = judge(small, flat)[0]
    assert (verdict.bottleneck, verdict.certain) == ("launch", certain)


def test_far_from_every_ceiling_none_of_them_is_named_whatever_larger_cells_say() -> None:
    small = Cell([{"compute": 1.0}], moved_bytes=0.05e9)
    steep = Cell([{"compute": 4.0}], moved_bytes=0.2e9, size=2)
    verdict = judge(small, steep)[0]
    assert (verdict.bottleneck, verdict.certain) == ("compute", False)


def test_time_that_is_flat_over_one_axis_and_grows_over_another_goes_to_work() -> None:
    """Width 1 and 2 at sizes 1 and 8: flat over width; at the largest size the smaller one shows that it grows."""
    cells = pd.DataFrame({"label_data": [*"1188"], "label_width": [*"1212"], "ranks": 1}, index=[*"abcd"])
    took_s, work_s = pd.Series([1.0, 1.1, 8.0, 8.8], cells.index), pd.Series([0.1, 0.2, 0.8, 1.6], cells.index)
    found = elasticities(cells, took_s, work_s, ["data", "width"])
    assert found == {"a": pytest.approx(1.0), "b": pytest.approx(1.0), "c": pytest.approx(1.0)}


def test_a_slow_rank_is_a_straggler_with_a_name_and_ranks_that_take_turns_are_not_sure() -> None:
    fast, slow = {"compute": 0.2, "communication": 0.8}, {"compute": 0.9, "communication": 0.1}
    verdict = one(judge(Cell([fast, fast, slow])))
    assert (verdict.bottleneck, verdict.certain) == ("straggler", True)
    assert verdict.slowest is not None
    assert (verdict.slowest.rank, verdict.slowest.host) == (2, "n2")
    assert verdict.shares["communication"].of_step == pytest.approx(0.1)
    points, samples, ranks = tables([Cell([fast, fast, slow])])
    busy = busy_ranks(points, samples, ranks).set_index("rank")
    assert busy["busy_s"].tolist() == pytest.approx([0.2, 0.2, 0.9])
    assert busy["host"].tolist() == ["n0", "n1", "n2"]


def test_ranks_that_are_busy_equally_long_have_no_straggler_whatever_keeps_them_busy() -> None:
    verdict = one(judge(Cell([{"input": 0.5, "compute": 0.5}, {"input": 0.1, "compute": 0.9}])))
    assert verdict.shares["straggler"].of_step == pytest.approx(0.0, abs=1e-9)
    assert verdict.shares["input"].of_step + verdict.shares["compute"].of_step == pytest.approx(1.0)


def test_one_rank_alone_does_not_communicate_whatever_the_noise_of_leaving_it_out() -> None:
    whole, without = {"compute": 1.0}, {"compute": 0.87}
    alone = one(judge(Cell([whole]), Cell([without], ablation="communication"))).shares["communication"]
    assert (alone.of_step, alone.ablated) == (0.0, False)
    two = one(judge(Cell([whole] * 2), Cell([without] * 2, ablation="communication"))).shares["communication"]
    assert (two.of_step, two.ablated) == (pytest.approx(0.13), True)


def test_cells_that_only_read_have_no_growth_of_computing() -> None:
    points, samples, ranks = tables([Cell([{"input": 1.0}], moved_bytes=1e6)])
    points, sweep = points.drop(columns=["label_ablation", "param_ablation"]), {"axes": []} | SITE
    steps = job_steps(points, samples)
    cells, repeats = per_cell(points, steps, sweep), per_point(points, steps, sweep)
    assert one(verdicts(points, samples, ranks, repeats, cells, sweep)).bottleneck == "input"


def test_what_is_disturbed_gets_no_verdict() -> None:
    found = judge(Cell([{"compute": 1.0}]), Cell([{"compute": 0.5}], ablation="input"))
    assert [verdict.cell for verdict in found] == ["c0"]


def simulated(compute_s: float, read_s: float, reads_ahead: bool) -> float:
    """A step that computes and reads, one after the other or at the same time."""
    return max(compute_s, read_s) if reads_ahead else compute_s + read_s


@settings(max_examples=30)
@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.booleans())
def test_what_doubling_gives_is_what_doubling_gives(compute_s: float, read_s: float, reads_ahead: bool) -> None:
    """From the three experiments on a step, its time with a reader, or a processor, of twice the speed."""
    step_s = simulated(compute_s, read_s, reads_ahead)
    waits_s = step_s - compute_s
    verdict = one(
        judge(
            Cell([{"compute": compute_s, "input": waits_s}]),
            Cell([{"compute": compute_s}], ablation="input"),
            Cell([{"input": read_s}], ablation="compute"),
        )
    )
    faster_reader = step_s / simulated(compute_s, read_s / 2, reads_ahead)
    faster_compute = step_s / simulated(compute_s / 2, read_s, reads_ahead)
    assert verdict.shares["input"].gain_of_doubling()[0] == pytest.approx(faster_reader, rel=1e-6)
    assert verdict.shares["compute"].gain_of_doubling()[0] == pytest.approx(faster_compute, rel=1e-6)


def test_without_experiments_nothing_is_taken_to_overlap() -> None:
    assert Share(0.5, 0.4, 0.6, ablated=False).gain_of_doubling() == pytest.approx((4 / 3, 1.25, 10 / 7))
    assert Share(0.0, 0.0, 0.0, ablated=False).gain_of_doubling() == (1, 1, 1)
    assert set(one(judge(Cell([{"compute": 1.0}]))).shares) == set(TIMED)


def test_only_along_an_axis_of_sizes_is_a_cell_larger() -> None:
    """A variant that does more work in the same time says nothing of launches."""
    took_s, work_s = pd.Series([1.0, 1.0, 4.0], [*"abc"]), pd.Series([0.1, 0.4, 0.4], [*"abc"])
    cells = pd.DataFrame({"label_variant": [*"xyx"], "label_data": ["1", "1", "2"], "ranks": 1}, index=[*"abc"])
    assert elasticities(cells, took_s, work_s, ["data"]) == {"a": 1.0}
    assert elasticities(cells, took_s, work_s, ["variant"]) == {"a": 0.0}


def test_a_variant_with_more_work_in_the_same_time_makes_no_launch_of_the_other() -> None:
    few = Cell([{"compute": 1.0}], flop=0.3e9, moved_bytes=0.1e9)
    more = Cell([{"compute": 1.0}], flop=0.6e9, moved_bytes=0.2e9, size=2)
    assert "work^0.00" in judge(few, more, axis=("size", (1, 2)))[0].evidence
    assert "work^" not in judge(few, more, axis=("variant", (0, 1)))[0].evidence


@settings(max_examples=30)
@given(st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_computing_is_split_by_what_its_ceilings_take(flop_s: float, moving_s: float) -> None:
    """A step as long as the longer of the two, and some time that no ceiling explains: with a ceiling twice as high."""
    unexplained_s = 1.0 - max(flop_s, moving_s)
    verdict = one(judge(Cell([{"compute": 1.0}], flop=1e9 * flop_s, moved_bytes=1e9 * moving_s)))
    assert {name: limit.of_step for name, limit in verdict.limits.items()} == pytest.approx(
        {"FLOP": flop_s, "memory": moving_s, "launch": 0.0}, rel=1e-3
    )
    gains = {"FLOP": (flop_s / 2, moving_s), "memory": (flop_s, moving_s / 2), "launch": (flop_s, moving_s)}
    for name, halves in gains.items():
        assert verdict.limits[name].gain == pytest.approx(1 / (max(halves) + unexplained_s), rel=1e-3)
    assert verdict.limits["FLOP"].low < verdict.limits["FLOP"].of_step < verdict.limits["FLOP"].high


def test_computing_that_hardly_grows_goes_to_launches_for_the_part_that_does_not() -> None:
    small = Cell([{"compute": 0.8, "other": 0.2}], flop=0.01e9, moved_bytes=0.01e9)
    large = Cell([{"compute": 0.8 * 4**0.25, "other": 0.2}], flop=0.04e9, moved_bytes=0.04e9, size=2)
    limit = judge(small, large)[0].limits["launch"]
    assert limit.of_step == pytest.approx(0.8 * 0.75, rel=1e-6)
    assert limit.gain == pytest.approx(1 / 0.7, rel=1e-6)


def test_a_checkpoint_is_a_part_of_its_own_and_makes_no_straggler_of_who_writes() -> None:
    verdict = one(judge(Cell([{"compute": 0.2, "checkpoint": 0.8}, {"compute": 0.2, "checkpoint": 0.79}])))
    assert (verdict.bottleneck, verdict.certain) == ("checkpoint", True)
    assert verdict.shares["checkpoint"].gain_of_doubling()[0] == pytest.approx(1 / 0.6)
    assert verdict.shares["straggler"].of_step == pytest.approx(0.0, abs=1e-9)
