"""From raw samples to cells: small tables whose every figure is worked out by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saih.analysis.cells import copy_rate, job_steps, labels_of, memory_bound, peaks, per_cell, per_point
from saih.analysis.intervals import BETWEEN, WITHIN
from saih.core import PHASES

SWEEP: dict[str, Any] = {
    "ceilings": {"rates": {"fp32": 100.0, "copy": 7.0}},
    "site": {"peak": {"flop_per_s": {"fp32": 400.0, "bf16": 800.0}}},
}


def make_points(*rows: dict[str, object]) -> pd.DataFrame:
    known: dict[str, object] = {"status": "measured", "repeat": 0, "ranks": 1.0, "param_precision": "fp32"}
    frame = pd.DataFrame([known | row for row in rows])
    return frame.assign(label_data=frame["cell"], size_data=1.0)


def make_samples(*rows: Sequence[float]) -> pd.DataFrame:
    """Rows: point, rank, step, warmup, compute_s, other_s, units, flop, moved_bytes."""
    columns = ["point", "rank", "step", "warmup", "compute_s", "other_s", "units", "flop", "moved_bytes"]
    frame = pd.DataFrame(rows, columns=columns).astype({"point": int, "rank": int, "step": int, "warmup": bool})
    frame = frame.assign(**{f"{phase}_s": 0.0 for phase in PHASES if f"{phase}_s" not in columns})
    return frame.assign(step_s=frame["compute_s"] + frame["other_s"])


TWO_RANKS = make_samples(
    (0, 0, 0, True, 90.0, 0.0, np.nan, np.nan, np.nan),
    (0, 1, 0, True, 99.0, 0.0, np.nan, np.nan, np.nan),
    (0, 0, 0, False, 1.0, 0.5, 2.0, 30.0, 4.0),
    (0, 0, 1, False, 3.0, 1.0, 2.0, 30.0, 4.0),
    (0, 1, 0, False, 1.0, 1.0, 3.0, 50.0, 6.0),
    (0, 1, 1, False, 1.0, 2.0, 3.0, 50.0, 6.0),
)


def test_a_step_lasts_as_long_as_its_slowest_rank() -> None:
    steps = job_steps(make_points({"cell": "a", "ranks": 2.0, "repeat": 3}), TWO_RANKS)
    assert len(steps) == 2, "warm-up counts for nothing"
    by_step = steps.set_index("step").sort_index()
    assert list(by_step["step_s"]) == [2.0, 4.0]
    assert list(by_step["compute_s"]) == [1.0, 3.0], "the phases are those of the slowest rank"
    assert list(by_step["other_s"]) == [1.0, 1.0]
    assert list(by_step["units"]) == [5.0, 5.0]
    assert list(by_step["flop"]) == [80.0, 80.0]
    assert list(by_step["moved_bytes"]) == [10.0, 10.0]
    assert set(by_step["cell"]) == {"a"}
    assert set(by_step["repeat"]) == {3}
    assert by_step[[f"{phase}_s" for phase in PHASES]].sum(axis=1).tolist() == [2.0, 4.0]


def test_percent_of_peak_is_of_each_rank() -> None:
    points = make_points({"cell": "a", "ranks": 2.0})
    row = per_cell(points, job_steps(points, TWO_RANKS), SWEEP).loc["a"]
    assert row["step_s"] == pytest.approx(3.0)
    assert row["flop_per_s"] == pytest.approx(80 / 3)
    assert row["percent_of_peak"] == pytest.approx(100 * 80 / 3 / 2 / 100)
    assert row["percent_of_datasheet"] == pytest.approx(100 * 80 / 3 / 2 / 400)
    assert row["work_per_s"] == pytest.approx(5 / 3)
    assert row["work_per_s_per_rank"] == pytest.approx(5 / 6)
    assert row["moved_bytes"] == 10
    assert (row["steps"], row["repeats"], row["interval"]) == (2, 1, WITHIN)
    assert row["share_compute"] == pytest.approx(4 / 6)
    assert row["share_other"] == pytest.approx(2 / 6)
    assert sum(row[f"share_{phase}"] for phase in PHASES) == pytest.approx(1)
    point = per_point(points, job_steps(points, TWO_RANKS), SWEEP).loc[0]
    assert point["percent_of_peak"] == pytest.approx(100 * 80 / 3 / 2 / 100)
    assert (point["repeat"], point["ranks"], point["label_data"]) == (0, 2, "a")


ONE_STEP = make_samples((0, 0, 0, False, 0.5, 0.0, 1.0, 20.0, 8.0))


@pytest.mark.parametrize("ceilings", [None, {}, {"rates": None}, {"rates": {}}, {"rates": {"bf16": 1.0}}])
def test_a_missing_ceiling_is_missing_not_zero(ceilings: object) -> None:
    points = make_points({"cell": "a"})
    sweep = {"ceilings": ceilings, "site": {"peak": {"flop_per_s": {}}}}
    row = per_cell(points, job_steps(points, ONE_STEP), sweep).loc["a"]
    assert np.isnan(row["percent_of_peak"])
    assert np.isnan(row["percent_of_datasheet"])
    assert row["flop_per_s"] == pytest.approx(40)
    assert np.isnan(peaks(sweep, "fp32")).all()


def test_bytes_stand_beside_the_measured_copy_and_say_what_binds() -> None:
    points = make_points({"cell": "a"}, {"cell": "b"}, {"cell": "c"})
    others = [ONE_STEP.assign(point=1, moved_bytes=2.0), ONE_STEP.assign(point=2, moved_bytes=0.0)]
    samples = pd.concat([ONE_STEP, *others], ignore_index=True)
    sweep = SWEEP | {"ceilings": {"rates": {"fp32": 100.0, "copy": 32.0}}}
    table = per_cell(points, job_steps(points, samples), sweep)
    assert table["bytes_per_s"].tolist() == pytest.approx([16.0, 4.0, np.nan], nan_ok=True)
    assert table["percent_of_copy"].tolist() == pytest.approx([50.0, 12.5, np.nan], nan_ok=True)
    assert table["percent_of_peak"].tolist() == pytest.approx([40.0] * 3)
    assert memory_bound(table).tolist() == [True, False, False]
    assert per_point(points, job_steps(points, samples), sweep)["percent_of_copy"].tolist()[0] == pytest.approx(50.0)
    assert np.isnan(copy_rate({"ceilings": None}))


def test_each_precision_has_its_own_peak() -> None:
    points = make_points({"cell": "a"}, {"cell": "b", "param_precision": "bf16"})
    samples = pd.concat([ONE_STEP, ONE_STEP.assign(point=1)], ignore_index=True)
    table = per_cell(points, job_steps(points, samples), SWEEP)
    assert table["percent_of_datasheet"].tolist() == pytest.approx([10.0, 5.0])
    assert table["percent_of_peak"].tolist() == pytest.approx([40.0, np.nan], nan_ok=True)
    assert peaks(SWEEP, "fp32") == (100.0, 400.0)


def test_without_the_parameter_precision_is_fp32() -> None:
    points = make_points({"cell": "a"}).drop(columns="param_precision")
    assert per_cell(points, job_steps(points, ONE_STEP), SWEEP).loc["a", "percent_of_peak"] == pytest.approx(40)


def test_a_step_that_computes_nothing_has_no_percent_of_peak() -> None:
    points = make_points({"cell": "a"})
    row = per_cell(points, job_steps(points, ONE_STEP.assign(flop=0.0)), SWEEP).loc["a"]
    assert np.isnan(row["percent_of_peak"])
    assert row["work_per_s"] == pytest.approx(2)


def test_cells_that_were_not_measured_stay_in_the_table_without_figures() -> None:
    points = make_points(
        {"cell": "pruned", "status": "pruned", "ranks": np.nan},
        {"cell": "late", "status": "failed", "ranks": np.nan},
        {"cell": "whole"},
        {"cell": "late", "repeat": 1},
        {"cell": "whole", "repeat": 1},
        {"cell": "gone", "status": "missing", "ranks": np.nan},
    )
    samples = pd.concat(
        [ONE_STEP.assign(point=row, compute_s=s, step_s=s) for row, s in ((2, 1.0), (3, 2.0), (4, 4.0))],
        ignore_index=True,
    )
    table = per_cell(points, job_steps(points, samples), SWEEP)
    assert table["status"].to_dict() == {"pruned": "pruned", "late": "measured", "whole": "measured", "gone": "missing"}
    assert table["interval"].dropna().to_dict() == {"late": WITHIN, "whole": BETWEEN}
    assert table["step_s"].to_dict() == pytest.approx(
        {"pruned": np.nan, "late": 2.0, "whole": 2.0, "gone": np.nan}, nan_ok=True
    )
    assert list(table.index) == ["pruned", "late", "whole", "gone"], "the order of the sweep"
    by_point = per_point(points, job_steps(points, samples), SWEEP)
    assert by_point["step_s"].to_dict() == {2: 1.0, 3: 2.0, 4: 4.0}


def test_nothing_measured_at_all() -> None:
    points = make_points({"cell": "a", "status": "failed", "ranks": np.nan})
    nothing = TWO_RANKS.iloc[:0]
    table = per_cell(points, job_steps(points, nothing), SWEEP)
    assert table["status"].tolist() == ["failed"]
    assert per_point(points, job_steps(points, nothing), SWEEP).empty


def test_labels_of() -> None:
    assert labels_of(pd.DataFrame(columns=["id", "label_model", "size_model", "label_data"])) == ["model", "data"]
