"""Speed-up and efficiency by hand: series that differ in ranks only, each against its own fewest ranks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from saih.analysis.intervals import log_mean_interval
from saih.analysis.scaling import scaling

Row = tuple[str, int, Sequence[float]]


def make_cells(*rows: Row, axis: str = "gpus") -> pd.DataFrame:
    """Rows: data label, ranks, work per second of each repeat."""
    return pd.DataFrame(
        {
            "label_data": [data for data, *_ in rows],
            f"label_{axis}": [str(ranks) for _, ranks, _ in rows],
            "ranks": [float(ranks) for _, ranks, _ in rows],
            "status": "measured",
            "work_per_s": [np.exp(np.mean(np.log(work))) for *_, work in rows],
        },
        index=[f"{data}-{ranks}" for data, ranks, _ in rows],
    )


def make_repeats(*rows: Row) -> pd.DataFrame:
    """The same rows, one a repeat; NaN was not measured."""
    flat = [(f"{data}-{ranks}", repeat, each) for data, ranks, work in rows for repeat, each in enumerate(work)]
    return pd.DataFrame(flat, columns=["cell", "repeat", "work_per_s"]).dropna().sample(frac=1, random_state=0)


def scaled(*rows: Row, axis: str = "gpus") -> pd.DataFrame:
    return scaling(make_cells(*rows, axis=axis), make_repeats(*rows))


@pytest.mark.parametrize("axis", ["gpus", "nodes"])
def test_speed_up_and_efficiency(axis: str) -> None:
    found = scaled(("16", 2, [30.0]), ("64", 1, [5.0]), ("16", 1, [20.0]), ("64", 4, [15.0]), axis=axis)
    assert found["speed_up"].to_dict() == pytest.approx({"16-2": 1.5, "16-1": 1.0, "64-1": 1.0, "64-4": 3.0})
    assert found["efficiency"].to_dict() == pytest.approx({"16-2": 0.75, "16-1": 1.0, "64-1": 1.0, "64-4": 0.75})
    assert set(found["base_ranks"]) == {1}
    assert (
        found[[f"{name}_{end}" for name in ("speed_up", "efficiency") for end in ("low", "high")]].isna().all(axis=None)
    )


def test_the_ratio_is_taken_repeat_by_repeat() -> None:
    """The machine drifts by half between repeats, but the same in both cells: the ratio does not."""
    found = scaled(("16", 1, [10.0, 20.0, 40.0]), ("16", 2, [15.0, 30.0, 60.0])).loc["16-2"]
    assert [found[f"speed_up{end}"] for end in ("", "_low", "_high")] == pytest.approx([1.5] * 3)
    assert [found[f"efficiency{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.75] * 3)


def test_the_interval_is_student_t_on_the_logarithms_of_the_ratios() -> None:
    found = scaled(("16", 1, [10.0, 20.0, 40.0]), ("16", 4, [20.0, 50.0, 70.0])).loc["16-4"]
    expected = log_mean_interval(np.log([2.0, 2.5, 1.75]))
    assert [found[f"speed_up{end}"] for end in ("", "_low", "_high")] == pytest.approx(expected)
    assert [found[f"efficiency{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [each / 4 for each in expected]
    )


def test_the_base_is_exactly_one_and_has_no_interval() -> None:
    found = scaled(("16", 1, [10.1, 20.3, 39.7]), ("16", 2, [15.0, 31.0, 60.0])).loc["16-1"]
    assert (found["speed_up"], found["efficiency"]) == (1.0, 1.0)
    assert found[["speed_up_low", "speed_up_high", "efficiency_low", "efficiency_high"]].isna().all()


def test_only_repeats_that_measured_both_cells_count() -> None:
    rows: list[Row] = [
        ("16", 1, [10.0, 1.0, np.nan]),
        ("16", 2, [15.0, np.nan, 99.0]),
        ("16", 4, [np.nan, np.nan, 9.0]),
    ]
    found = scaling(make_cells(*((data, ranks, [1.0]) for data, ranks, _ in rows)), make_repeats(*rows))
    assert found["speed_up"].to_dict() == pytest.approx({"16-1": 1.0, "16-2": 1.5, "16-4": np.nan}, nan_ok=True)
    assert np.isnan(found.loc["16-2", "speed_up_low"])


def test_the_base_is_the_fewest_ranks_that_were_measured() -> None:
    rows: list[Row] = [("16", 1, [1.0]), ("16", 2, [10.0]), ("16", 8, [20.0])]
    cells = make_cells(*rows)
    cells.loc["16-1", ["status", "work_per_s"]] = ["failed", np.nan]
    found = scaling(cells, make_repeats(*rows[1:]))
    assert found["base_ranks"].to_dict() == {"16-2": 2, "16-8": 2}
    assert found["speed_up"].to_dict() == pytest.approx({"16-2": 1.0, "16-8": 2.0})
    assert found["efficiency"].to_dict() == pytest.approx({"16-2": 1.0, "16-8": 0.5})


def test_without_other_axes_there_is_one_series() -> None:
    rows: list[Row] = [("16", 1, [10.0]), ("16", 2, [18.0])]
    found = scaling(make_cells(*rows).drop(columns="label_data"), make_repeats(*rows))
    assert found["efficiency"].tolist() == pytest.approx([1.0, 0.9])


SERIES: list[Row] = [("16", 1, [10.0]), ("16", 2, [18.0])]


@pytest.mark.parametrize(
    "cells",
    [
        make_cells(("16", 1, [10.0]), ("64", 1, [18.0])),
        make_cells(*SERIES).drop(columns="label_gpus"),
        make_cells(("16", 1, [10.0]), ("64", 2, [18.0])),
        make_cells(*SERIES).assign(status="failed"),
    ],
    ids=["one rank count", "no axis of ranks", "series of one", "nothing measured"],
)
def test_where_ranks_do_not_vary_there_is_nothing_to_say(cells: pd.DataFrame) -> None:
    assert scaling(cells, make_repeats(*SERIES)).empty
