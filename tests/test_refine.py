"""Adaptive sweeps: measured where the surface bends or repeats disagree, never past their time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saih import refine, sweep
from saih.analysis.refine import FINE, bends, choose, coarse
from saih.core import Axis, Rung
from saih.errors import SaihError
from saih.plan import make_plan
from tests.sites import cpu_site

SIZES = (1, 2, 4, 8, 16, 32)
DATA = Axis("data", "", tuple(Rung(str(n), {"mesh": n}, n) for n in SIZES))


def line(law: Callable[[float], float], measured: set[int], spread: float = 1.0, repeats: int = 3) -> pd.DataFrame:
    """Cells along one axis, of which some are measured; intervals are a factor `spread` either way."""
    rows = []
    for n in SIZES:
        known = n in measured
        step_s = law(n) if known else np.nan
        row = {"label_data": str(n), "size_data": n, "status": "measured" if known else "pruned", "step_s": step_s}
        rows.append(row | {"step_s_low": step_s / spread, "step_s_high": step_s * spread, "repeats": repeats})
    return pd.DataFrame(rows, index=[f"c{n}" for n in SIZES])


def test_a_power_law_bends_nowhere_and_a_floor_does_where_it_ends() -> None:
    straight = bends(line(lambda n: n**1.5, {1, 4, 16, 32}), ["data"])
    assert straight.max() == pytest.approx(0.0, abs=1e-9)
    bent = bends(line(lambda n: max(4.0, n**2 / 4), {1, 4, 16, 32}), ["data"])
    assert bent["c8"] > 0.5
    assert set(bent.index) == {"c2", "c8"}


def test_what_lies_outside_of_all_measured_cells_has_no_bend() -> None:
    assert bends(line(lambda n: n, {1, 2, 4}), ["data"]).max() == 0.0


def test_the_bend_goes_first_and_then_the_widest_interval() -> None:
    seconds = {f"c{n}": 1.0 for n in SIZES}
    table = line(lambda n: max(4.0, n**2 / 4), {1, 4, 16, 32}, spread=1.05)
    table.loc["c16", "step_s_high"] *= 1.5
    assert set(choose(table, ["data"], seconds, 2.0)) == {"c2", "c8"}, "both sides of the corner"
    assert "c16" in choose(table, ["data"], seconds, 3.0)


def test_what_is_known_well_is_left_alone() -> None:
    assert choose(line(lambda n: n, set(SIZES), spread=1 + FINE), ["data"], {f"c{n}": 1.0 for n in SIZES}, 1e9) == {}


def test_what_failed_is_not_tried_for_its_bend() -> None:
    table = line(lambda n: max(4.0, n**2 / 4), {1, 4, 16, 32})
    table.loc["c8", "status"] = "failed"
    assert "c8" not in choose(table, ["data"], {f"c{n}": 1.0 for n in SIZES}, 9.0)


def test_a_single_repeat_is_worth_another() -> None:
    assert set(choose(line(lambda n: n, {1, 2}, repeats=1), ["data"], {"c1": 1.0, "c2": 1.0}, 9.0)) == {"c1", "c2"}


@given(
    st.lists(st.floats(0.1, 10), min_size=len(SIZES), max_size=len(SIZES)),
    st.floats(0, 20),
    st.sets(st.sampled_from(SIZES)),
)
def test_the_budget_holds(costs: list[float], budget_s: float, measured: set[int]) -> None:
    seconds = dict(zip((f"c{n}" for n in SIZES), costs, strict=True))
    table = line(lambda n: 1 + n**2, measured, spread=1.5)
    chosen = choose(table, ["data"], seconds, budget_s)
    assert sum(seconds[cell] for cell in chosen) <= budget_s


def test_a_coarse_grid_has_the_ends_and_all_of_what_has_no_order() -> None:
    engines = Axis("engine", "", tuple(Rung(name, {"engine": name}, 0) for name in "abcde"), named=True)
    assert coarse([DATA, engines]) == [{"1", "4", "16", "32"}, set("abcde")]


def test_plans_grow_and_keep_what_they_had() -> None:
    asked = sweep.make_sweep("ceilings", {"size": None}, {"kernel": "copy"}, repeat=refine.MOST_REPEATS)
    plan = make_plan(asked, "p", sweep.points(asked, {}), cpu_site(), None, Path())
    wanted = refine.start(plan, 2, 1e6)
    assert sorted(wanted.values()) == [2, 2, 2]
    part = refine.part(plan, wanted)
    assert len(part.kept) == 6
    assert {(each.kind, each.forecast.point.labels["size"]) for each in part.pruned} == {
        ("refine", "1024"),
        ("refine", "4096"),
    }
    table = pd.DataFrame(
        {
            "label_size": [item.point.labels["size"] for item in plan.kept[:5]],
            "size_size": [float(item.point.labels["size"]) for item in plan.kept[:5]],
            "status": ["measured", "pruned", "measured", "pruned", "measured"],
            "repeats": 2,
        },
        index=[item.point.cell for item in plan.kept[:5]],
    )
    table["step_s"] = table["size_size"].where(table["status"] == "measured")
    table["step_s_low"], table["step_s_high"] = table["step_s"] / 2, table["step_s"] * 2
    grown = refine.more(plan, wanted, table, 1e6)
    assert all(grown[cell] == 3 for cell in wanted)
    assert refine.more(plan, wanted, table, 0.0) == wanted
    with pytest.raises(SaihError, match="nothing fits 0 s: the cheapest cell takes"):
        refine.start(plan, 2, 0.0)
