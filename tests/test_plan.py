"""Planning: predictions against a brute-force roofline, and rules that hold for every grid and every budget."""

import math
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saih import plan as planning
from saih import workload
from saih.core import Cost, Need, Operation, Params, Point, Sweep
from saih.errors import SaihError
from saih.plan import LAUNCH_OVERHEAD_S, Forecast, Plan, Rates, make_plan, pack, predict_step_s, rates
from saih.site import GIB, Peak, Site

AMOUNTS = st.floats(0, 1e18)
SPEED = st.floats(1e3, 1e18)


def make_site(**changes: object) -> Site:
    known: dict[str, object] = {
        "name": "toy",
        "scheduler": "local",
        "launcher": "torchrun",
        "device": "cpu",
        "nodes": 2,
        "gpus_per_node": 4,
        "threads_per_rank": 1,
        "node_memory_gib": 16,
        "device_memory_gib": 4,
        "job_minutes": 10,
    }
    return Site.model_validate(known | changes)


def make_point(number: int = 0, repeat: int = 0, **params: float | str) -> Point:
    known = {"nodes": 1, "gpus": 1, "warmup": 0, "steps": 1, "seconds": 0.0, "max_steps": 1, "needy": 0}
    return Point("toy", known | {"number": number} | params, {"number": str(number)}, repeat)


def toy_cost(params: Params) -> Cost:
    """Every figure of the cost is a parameter."""
    if params.get("invalid"):
        raise SaihError("number 3 makes no sense")
    return Cost(
        flop=1.0,
        work=1.0,
        operations=(Operation(float(params.get("flop", 0.0)), 0.0),),
        device_bytes=float(params.get("device_bytes", 0.0)),
        data_set=str(params.get("data_set", "")),
        disk_bytes=float(params.get("disk_bytes", 0.0)),
        setup_s=float(params.get("setup_s", 0.0)),
        check_steps=float(params.get("check_steps", 0.0)),
    )


NEEDS = {"needy": {7: Need("no_such_package", "pip install it"), 8: Need("json", "it is there")}}


def toy_plan(grid: Sequence[Point], site: Site, budget_s: float | None = None, done: Set[str] = frozenset()) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "spec", lambda name: SimpleNamespace(cost=toy_cost, NEEDS=NEEDS))
        patch.setitem(planning.LAUNCH_S, "cpu", 0.0)
        sweep = Sweep("toy", (), time_budget_s=budget_s)
        return make_plan(sweep, "toy", grid, site, {"fp32": 1e9, "copy": 1e9}, Path(), done)


@given(st.lists(st.builds(Operation, AMOUNTS, AMOUNTS), max_size=6), SPEED, SPEED, st.floats(0, 1))
def test_a_step_is_the_sum_of_its_operations(
    operations: list[Operation], flop_per_s: float, bytes_per_s: float, launch_s: float
) -> None:
    total = 0.0
    for each in operations:
        slowest = launch_s
        if each.flop / flop_per_s > slowest:
            slowest = each.flop / flop_per_s
        if each.moved_bytes / bytes_per_s > slowest:
            slowest = each.moved_bytes / bytes_per_s
        total += slowest
    cost = Cost(1.0, 1.0, tuple(operations))
    assert predict_step_s(cost, Rates(flop_per_s, bytes_per_s, launch_s, "")) == pytest.approx(total)


def test_a_step_by_hand() -> None:
    operations = (Operation(2e9, 1e9), Operation(1e9, 5e9), Operation(1.0, 1.0))
    assert predict_step_s(Cost(0.0, 1.0, operations), Rates(1e9, 1e9, 0.25, "")) == pytest.approx(2 + 5 + 0.25)
    assert predict_step_s(Cost(0.0, 1.0, operations, emulated_s=3), Rates(1e9, 1e9, 0.25, "")) == pytest.approx(
        10 + 0.25
    )


def test_rates_are_measured_or_promised_or_guessed() -> None:
    site = make_site(peak=Peak(flop_per_s={"fp32": 3e12}, memory_bytes_per_s=4e10))
    assert rates(site, "fp32", {"fp32": 1e12, "copy": 2e10}) == Rates(1e12, 2e10, planning.LAUNCH_S["cpu"], "measured")
    assert rates(site, "fp32", {"bf16": 1e12}) == Rates(3e12, 4e10, planning.LAUNCH_S["cpu"], "data sheet")
    assert rates(site, "bf16", None).source == "guess"
    assert rates(make_site(device="cuda"), "fp32", None).launch_s == planning.LAUNCH_S["cuda"]


def test_a_point_costs_its_set_up_its_check_its_warm_up_and_its_steps() -> None:
    busy = make_point(flop=2e9, setup_s=3.0, check_steps=4.5, warmup=2, steps=10, max_steps=20, seconds=24.0)
    [item] = toy_plan([busy], make_site()).kept
    assert item.step_s == pytest.approx(2.0)
    assert item.point_s == pytest.approx(3 + (4.5 + 2 + 12) * 2)


@pytest.mark.parametrize(
    ("params", "site", "kind", "reason"),
    [
        ({"nodes": 3}, {}, "nodes", "needs 3 nodes; site toy has 2"),
        ({"gpus": 5}, {}, "ranks", "needs 5 ranks a node; site toy has 4"),
        ({"device_bytes": 16 * GIB}, {}, "memory", "needs 16.5 GiB a rank; 16.0 GiB there"),
        ({"device_bytes": 4 * GIB, "gpus": 4}, {}, "memory", "needs 4.5 GiB a rank; 4.0 GiB there"),
        ({"device_bytes": 4 * GIB}, {"device": "cuda"}, "memory", "needs 4.5 GiB a rank; 4.0 GiB there"),
        ({"disk_bytes": 2e12}, {}, "disk", "needs 2e+03 GB of data; 1e+03 GB free"),
        ({"setup_s": 594.1}, {}, "time", "predicted 10 min; the longest job is 10 min"),
        ({"setup_s": 1200.0}, {"job_minutes": 20}, "time", "predicted 20.1 min; the longest job is 20 min"),
        ({"invalid": 1}, {}, "invalid", "number 3 makes no sense"),
        ({"needy": 7}, {}, "package", "needy=7 needs the no_such_package package: pip install it"),
    ],
)
def test_what_cannot_fit_is_pruned_with_the_number(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, float], site: dict[str, object], kind: str, reason: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    fits, does_not = make_point(0), make_point(1, **params)
    plan = toy_plan([fits, does_not], make_site(**site))
    assert [item.point for item in plan.kept] == [fits]
    assert [(each.forecast.point, each.kind, each.reason) for each in plan.pruned] == [(does_not, kind, reason)]


@pytest.mark.parametrize(
    "params",
    [
        {"nodes": 2},
        {"gpus": 4},
        {"device_bytes": 15.5 * GIB},
        {"device_bytes": 3.5 * GIB, "gpus": 4},
        {"disk_bytes": 1e12},
        {"setup_s": 593.9},
        {"needy": 8},
    ],
)
def test_what_just_fits_is_kept(monkeypatch: pytest.MonkeyPatch, params: dict[str, float]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    assert len(toy_plan([make_point(**params)], make_site()).kept) == 1


def test_the_disk_is_the_one_the_data_will_be_on(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "spec", lambda name: SimpleNamespace(cost=toy_cost, NEEDS=NEEDS))
        asked: list[Path] = []
        patch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or SimpleNamespace(free=1.0))
        make_plan(Sweep("toy", ()), "toy", [], make_site(), None, tmp_path / "not" / "yet" / "there")
    assert asked == [tmp_path]


@dataclass(frozen=True)
class Grid:
    """A grid of cells with these costs, each with the same number of repeats, on allocations of its own."""

    seconds: tuple[float, ...]
    gpus: tuple[int, ...]
    repeats: int

    @property
    def points(self) -> list[Point]:
        return [
            make_point(number, repeat, setup_s=seconds, gpus=gpus)
            for repeat in range(self.repeats)
            for number, (seconds, gpus) in enumerate(zip(self.seconds, self.gpus, strict=True))
        ]


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    seconds = draw(st.lists(st.floats(0.01, 580), min_size=1, max_size=8))
    one_shape = st.just([1] * len(seconds))
    many = st.lists(st.sampled_from([1, 2, 4]), min_size=len(seconds), max_size=len(seconds))
    return Grid(tuple(seconds), tuple(draw(one_shape | many)), draw(st.integers(1, 3)))


@given(grids(), st.floats(0, 4000))
def test_a_budget_keeps_the_cheapest_whole_cells(grid: Grid, budget_s: float) -> None:
    plan = toy_plan(grid.points, make_site(), budget_s)
    kept = [item.point for item in plan.kept]
    assert plan.seconds <= budget_s or not kept
    assert kept == [point for point in grid.points if point in kept], "the order of points changed"
    late = [each.forecast.point for each in plan.pruned]
    assert sorted(p.id for p in kept + late) == sorted(p.id for p in grid.points)
    kept_cells, late_cells = {p.cell for p in kept}, {p.cell for p in late}
    assert not kept_cells & late_cells
    cost = {p.cell: float(p.params["setup_s"]) for p in grid.points}
    assert max((cost[cell] for cell in kept_cells), default=0) <= min((cost[cell] for cell in late_cells), default=1e9)
    for each in plan.pruned:
        assert each.kind == "time"
        assert f"{grid.repeats * cost[each.forecast.point.cell]:.3g} s" in each.reason
        assert f"{budget_s:g} s" in each.reason


@given(grids())
def test_a_budget_of_the_predicted_time_keeps_everything(grid: Grid) -> None:
    whole = toy_plan(grid.points, make_site())
    assert not whole.pruned
    assert len(toy_plan(grid.points, make_site(), whole.seconds * (1 + 1e-9)).kept) == len(grid.points)


def test_a_budget_by_hand() -> None:
    grid = Grid((30.0, 5.0, 10.0), (1, 1, 1), 2)
    kept = {
        budget_s: [item.point.labels["number"] for item in toy_plan(grid.points, make_site(), budget_s).kept]
        for budget_s in (15.0, 16.5, 36.5, 95.0, 96.5)
    }
    assert kept == {15.0: [], 16.5: ["1"] * 2, 36.5: ["1", "2"] * 2, 95.0: ["1", "2"] * 2, 96.5: ["0", "1", "2"] * 2}


def forecasts(grid: Grid) -> list[Forecast]:
    return [Forecast(p, Cost(0.0, 1.0), 0.0, float(p.params["setup_s"])) for p in grid.points]


@given(grids(), st.integers(0, 5))
def test_packing_loses_nothing_and_mixes_no_allocations(grid: Grid, first: int) -> None:
    site = make_site()
    jobs = pack(forecasts(grid), site, Path("jobs"), first)
    assert sorted(p.id for job in jobs for p in job.points) == sorted(p.id for p in grid.points)
    assert [job.name for job in jobs] == [f"{first + place:03d}" for place in range(len(jobs))]
    assert [job.folder for job in jobs] == [f"jobs/{job.name}" for job in jobs]
    for job in jobs:
        assert {(p.nodes, p.gpus) for p in job.points} == {(job.nodes, job.gpus)}
        assert job.ranks == job.points[0].ranks
        length_s = LAUNCH_OVERHEAD_S + sum(float(p.params["setup_s"]) for p in job.points)
        assert length_s <= job.time_limit_s <= site.job_minutes * 60
        assert length_s <= site.job_minutes * 60 / 2 or len(job.points) == 1


@given(grids())
def test_repeats_alternate_between_allocations(grid: Grid) -> None:
    jobs = pack(forecasts(grid), make_site(), Path())
    order = [point.repeat for job in jobs for point in job.points]
    assert order == sorted(order)
    if len(set(grid.gpus)) > 1:
        assert all(len({p.repeat for p in job.points}) == 1 for job in jobs)
        per_repeat = [[p.gpus for job in jobs for p in job.points if p.repeat == r] for r in range(grid.repeats)]
        assert all(gpus == sorted(grid.gpus) for gpus in per_repeat)


def test_short_points_share_one_job() -> None:
    grid = Grid((1.0,) * 20, (1,) * 20, 3)
    assert len(pack(forecasts(grid), make_site(), Path())) == 1
    two = Grid((1.0,) * 20, (1, 2) * 10, 3)
    assert [(job.gpus, len(job.points)) for job in pack(forecasts(two), make_site(), Path())] == [(1, 10), (2, 10)] * 3
    assert pack([], make_site(), Path()) == []


def test_seconds_of_a_plan_count_start_up_once_a_job() -> None:
    plan = toy_plan(Grid((10.0, 20.0), (1, 2), 3).points, make_site())
    assert plan.seconds == pytest.approx(3 * 30 + 6 * LAUNCH_OVERHEAD_S)
    assert math.isclose(toy_plan([], make_site()).seconds, 0.0)


def test_a_data_set_is_made_once_and_paid_once() -> None:
    grid = [
        make_point(n, repeat, setup_s=100.0, data_set="shared", disk_bytes=1e3) for repeat in (0, 1) for n in (0, 1)
    ]
    assert [item.point_s for item in toy_plan(grid, make_site()).kept] == [100.0, 0.0, 0.0, 0.0]
    assert [item.point_s for item in toy_plan(grid, make_site(), done={grid[2].id}).kept] == [0.0] * 4


def test_who_makes_a_data_set_does_not_change_the_price_of_a_cell() -> None:
    """Cells 0 and 1 share a data set of 100 s. The dear one comes first in the grid, and would make it."""
    grid = [
        make_point(0, setup_s=100.0, data_set="large", flop=30e9),
        make_point(1, setup_s=100.0, data_set="large", flop=10e9),
        make_point(2, setup_s=1.0, data_set="small", flop=50e9),
    ]
    kept = {
        budget_s: {item.point.labels["number"]: item.point_s for item in toy_plan(grid, make_site(), budget_s).kept}
        for budget_s in (56.0, 166.0, 168.0, 196.0, 198.0)
    }
    both = {"1": 110.0, "2": 51.0}
    assert kept == {56.0: {}, 166.0: {"2": 51.0}, 168.0: both, 196.0: both, 198.0: {"0": 130.0, "1": 10.0, "2": 51.0}}


def test_data_sets_add_up_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 25e9)
    grid = [make_point(n, 0, data_set=f"set {n // 2}", disk_bytes=10e9) for n in range(6)]
    plan = toy_plan(grid, make_site())
    assert [item.point.labels["number"] for item in plan.kept] == ["0", "1", "2", "3"]
    assert {item.kind for item in plan.pruned} == {"disk"}
    assert "10 GB of data; 5 GB free" in plan.pruned[0].reason


def test_what_is_measured_costs_nothing_and_is_never_ruled_out() -> None:
    grid = [make_point(n, repeat, setup_s=50.0, device_bytes=1e15, needy=7) for repeat in (0, 1) for n in (0, 1)]
    done = {grid[0].id, grid[2].id}
    plan = toy_plan(grid, make_site(), budget_s=1.0, done=done)
    assert {item.point.id for item in plan.kept} == done
    assert sum(item.point_s for item in plan.kept) == 0
    assert {item.forecast.point.id for item in plan.pruned} == {grid[1].id, grid[3].id}
