"""Intervals against scipy.stats and against the coverage they promise."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from saih.analysis.intervals import (
    BETWEEN,
    WITHIN,
    log_mean_interval,
    order_statistics,
    step_intervals,
    student_t,
)

TIMES = st.floats(1e-6, 1e3)


@given(st.lists(TIMES, min_size=2, max_size=12))
def test_student_t_of_logarithms(values: list[float]) -> None:
    logs = np.log(values)
    estimate, low, high = log_mean_interval(logs)
    assert estimate == pytest.approx(stats.gmean(values))
    if np.ptp(logs) > 1e-9:
        expected = np.exp(stats.t.interval(0.95, len(logs) - 1, loc=np.mean(logs), scale=stats.sem(logs)))
        assert (low, high) == pytest.approx(tuple(expected), rel=1e-9)
    assert low <= estimate * (1 + 1e-12)
    assert estimate <= high * (1 + 1e-12)


def test_one_value_has_no_interval() -> None:
    estimate, low, high = log_mean_interval(np.log([3.0]))
    assert estimate == pytest.approx(3)
    assert np.isnan(low)
    assert np.isnan(high)


def test_quantiles_of_student_t() -> None:
    freedom = np.array([1, 2, 5, 30, 1000])
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom))


@pytest.mark.parametrize("count", range(1, 121))
def test_order_statistics_cover_the_median_as_promised(count: int) -> None:
    low, high = order_statistics(np.random.default_rng(0).permutation(count).astype(float))
    below = int(low)
    assert high == count - 1 - below, "not symmetric"
    coverage = 1 - 2 * stats.binom.cdf(below, count, 0.5)
    tighter = 1 - 2 * stats.binom.cdf(below + 1, count, 0.5)
    if count < 6:
        assert (low, high) == (0, count - 1)
    else:
        assert coverage >= 0.95
        assert tighter < 0.95


@given(st.lists(TIMES, min_size=1, max_size=40))
def test_order_statistics_are_samples_around_the_median(values: list[float]) -> None:
    low, high = order_statistics(np.array(values))
    assert low in values
    assert high in values
    assert low <= np.median(values) <= high


def table(**cells: list[list[float]]) -> pd.DataFrame:
    """cell -> the steps of each of its repeats."""
    return pd.DataFrame(
        [(cell, repeat, s) for cell, repeats in cells.items() for repeat, steps in enumerate(repeats) for s in steps],
        columns=["cell", "repeat", "step_s"],
    )


def test_repeats_count_by_their_medians() -> None:
    repeats = [[1.0, 2.0, 90.0], [4.0], [3.0, 1.0, 2.0, 70.0]]
    found = step_intervals(table(a=repeats)).loc["a"]
    medians = np.log([2.0, 4.0, 2.5])
    expected = np.exp(stats.t.interval(0.95, 2, loc=np.mean(medians), scale=stats.sem(medians)))
    assert found["step_s"] == pytest.approx(stats.gmean([2.0, 4.0, 2.5]))
    assert (found["step_s_low"], found["step_s_high"]) == pytest.approx(tuple(expected))
    assert (found["repeats"], found["interval"]) == (3, BETWEEN)


def test_one_run_is_its_median_and_says_so() -> None:
    steps = [float(value) for value in range(8, 0, -1)]
    found = step_intervals(table(a=[steps], b=[[1.0], [1.0]])).loc["a"]
    assert found["step_s"] == pytest.approx(4.5)
    assert (found["step_s_low"], found["step_s_high"]) == (1, 8)
    assert (found["repeats"], found["interval"]) == (1, WITHIN)


def test_equal_repeats_have_an_interval_of_no_width() -> None:
    found = step_intervals(table(a=[[2.0], [2.0], [2.0]])).loc["a"]
    assert [found["step_s"], found["step_s_low"], found["step_s_high"]] == pytest.approx([2.0, 2.0, 2.0])


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.lists(TIMES, min_size=1, max_size=5), min_size=1, max_size=4),
        min_size=1,
    )
)
def test_cells_do_not_touch_each_other(cells: dict[str, list[list[float]]]) -> None:
    together = step_intervals(table(**cells))
    assert set(together.index) == set(cells)
    for cell, repeats in cells.items():
        pd.testing.assert_frame_equal(together.loc[[cell]], step_intervals(table(**{cell: repeats})), check_dtype=False)
        assert together.loc[cell, "step_s_low"] <= together.loc[cell, "step_s"] * (1 + 1e-9)
        assert together.loc[cell, "step_s"] <= together.loc[cell, "step_s_high"] * (1 + 1e-9)
