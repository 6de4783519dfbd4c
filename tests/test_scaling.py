"""Speed-up and efficiency by hand: series that differ in ranks only, each against its own fewest ranks."""

import numpy as np
import pandas as pd
import pytest

from saih.analysis.scaling import scaling


def make_cells(*rows: tuple[str, int, float, float], axis: str = "gpus") -> pd.DataFrame:
    """Rows: data label, ranks, work per second, half-width of the step time's interval in per cent."""
    return pd.DataFrame(
        {
            "label_data": [data for data, *_ in rows],
            f"label_{axis}": [str(ranks) for _, ranks, *_ in rows],
            "ranks": [float(ranks) for _, ranks, *_ in rows],
            "status": "measured",
            "work_per_s": [work for *_, work, _ in rows],
            "step_s": [1 / work for *_, work, _ in rows],
            "step_s_high": [(1 + percent / 100) / work for *_, work, percent in rows],
        },
        index=[f"{data}-{ranks}" for data, ranks, *_ in rows],
    )


@pytest.mark.parametrize("axis", ["gpus", "nodes"])
def test_speed_up_and_efficiency(axis: str) -> None:
    cells = make_cells(("16", 2, 30.0, 4.0), ("64", 1, 5.0, 0.0), ("16", 1, 20.0, 3.0), ("64", 4, 15.0, 0.0), axis=axis)
    found = scaling(cells)
    assert found["speed_up"].to_dict() == pytest.approx({"16-2": 1.5, "16-1": 1.0, "64-1": 1.0, "64-4": 3.0})
    assert found["efficiency"].to_dict() == pytest.approx({"16-2": 0.75, "16-1": 1.0, "64-1": 1.0, "64-4": 0.75})
    assert set(found["base_ranks"]) == {1}
    assert found.loc["16-2", "speed_up_error"] == pytest.approx(1.5 * np.hypot(0.03, 0.04))
    assert found.loc["64-4", "speed_up_error"] == pytest.approx(0)


def test_the_base_is_the_fewest_ranks_that_were_measured() -> None:
    cells = make_cells(("16", 1, 1.0, 0.0), ("16", 2, 10.0, 0.0), ("16", 8, 20.0, 0.0))
    cells.loc["16-1", ["status", "work_per_s"]] = ["failed", np.nan]
    found = scaling(cells)
    assert found["base_ranks"].to_dict() == {"16-2": 2, "16-8": 2}
    assert found["speed_up"].to_dict() == pytest.approx({"16-2": 1.0, "16-8": 2.0})
    assert found["efficiency"].to_dict() == pytest.approx({"16-2": 1.0, "16-8": 0.5})


def test_without_other_axes_there_is_one_series() -> None:
    found = scaling(make_cells(("16", 1, 10.0, 0.0), ("16", 2, 18.0, 0.0)).drop(columns="label_data"))
    assert found["efficiency"].tolist() == pytest.approx([1.0, 0.9])


@pytest.mark.parametrize(
    "cells",
    [
        make_cells(("16", 1, 10.0, 0.0), ("64", 1, 18.0, 0.0)),
        make_cells(("16", 1, 10.0, 0.0), ("16", 2, 18.0, 0.0)).drop(columns="label_gpus"),
        make_cells(("16", 1, 10.0, 0.0), ("64", 2, 18.0, 0.0)),
        make_cells(("16", 1, 10.0, 0.0), ("16", 2, 18.0, 0.0)).assign(status="failed"),
    ],
    ids=["one rank count", "no axis of ranks", "series of one", "nothing measured"],
)
def test_where_ranks_do_not_vary_there_is_nothing_to_say(cells: pd.DataFrame) -> None:
    assert scaling(cells).empty
