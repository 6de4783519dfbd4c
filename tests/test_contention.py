"""What a load costs: slopes over the processes beside the steps, through one at none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from saih.analysis.contention import contention


def table(step_s: dict[int, list[float]], load: str = "load_readers", **labels: str) -> pd.DataFrame:
    rows = [
        {f"param_{load}": count, f"label_{load}": str(count), "repeat": repeat, "step_s": seconds}
        | {f"label_{axis}": label for axis, label in labels.items()}
        for count, repeats in step_s.items()
        for repeat, seconds in enumerate(repeats)
    ]
    return pd.DataFrame(rows)


def test_a_slope_is_a_share_of_the_free_step_for_each_process() -> None:
    both = table({0: [1.0, 2.0], 1: [1.2, 2.4], 2: [1.4, 2.8], 4: [1.8, 3.6]})
    [slope] = contention(both, both)
    assert (slope.load, slope.counts) == ("load_readers", [0, 1, 2, 4])
    assert (slope.each, slope.low, slope.high) == pytest.approx((0.2, 0.2, 0.2))
    assert slope.slowdown[2][0] == pytest.approx(1.4)


def test_repeats_that_disagree_widen_it_and_one_gives_no_interval() -> None:
    both = table({0: [1.0, 1.0, 1.0], 2: [1.2, 1.6, 1.4]})
    [slope] = contention(both, both)
    assert slope.each == pytest.approx(0.2)
    assert slope.low < 0.1 < 0.3 < slope.high
    single = table({0: [1.0], 2: [1.4]})
    assert np.isnan(contention(single, single)[0].low)


def test_series_have_slopes_of_their_own_and_none_without_a_free_step() -> None:
    both = pd.concat(
        [table({0: [1.0], 1: [1.5]}, cache="cold"), table({0: [1.0], 1: [1.0]}, cache="warm")], ignore_index=True
    )
    found = {slope.labels["cache"]: slope.each for slope in contention(both, both)}
    assert found == pytest.approx({"cold": 0.5, "warm": 0.0})
    loaded = table({1: [1.0], 2: [1.4]})
    assert contention(loaded, loaded) == []
