"""Claims: every verdict from a table whose ratios are known, and pairs that differ in nothing but the claim."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saih import text
from saih.analysis.claims import evaluate, evaluate_all
from saih.core import Claim

Rows = list[dict[str, Any]]
FASTER = Claim("faster", "twice as fast", "step_s", {"variant": "new"}, {"variant": "old"}, 0.6, "lower", paper="2x")
RISES = Claim("rises", "% of peak rises", "percent_of_peak", {"data": "last"}, {"data": "first"}, 1.0)


def tables(rows: Rows) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The flat table, and `per_point` of it, in which points with `measured=False` have no row."""
    points = pd.DataFrame(rows)
    for name in [name for name in points if name.startswith("label_")]:
        axis = name.removeprefix("label_")
        points[f"size_{axis}"] = points[name].map(lambda label: float(label) if label.isdigit() else 0.0)
    points = points.assign(predicted_flop=10.0, predicted_work=1.0, param_nodes=1, param_gpus=2)
    kept = points[points.pop("measured")] if "measured" in points else points
    return points, kept.drop(columns=[name for name in kept if name.startswith(("size_", "predicted_"))])


def judge(claim: Claim, rows: Rows) -> dict[str, Any]:
    return evaluate(claim, *tables(rows))


def variants(*ratios: float, old: float = 1.0) -> Rows:
    """One pair a repeat: the old one takes `old` times (repeat + 1), the new one `ratio` of that."""
    return [
        {"label_variant": name, "repeat": repeat, "step_s": seconds, "predicted_step_s": planned}
        for repeat, ratio in enumerate(ratios)
        for name, seconds, planned in (
            ("old", old * (repeat + 1), 4.0),
            ("new", ratio * old * (repeat + 1), 2.0),
        )
    ]


def test_a_ratio_with_its_interval_and_its_prediction() -> None:
    ratios = [0.5, 0.52, 0.49]
    told = judge(FASTER, variants(*ratios))
    logs = np.log(ratios)
    expected = np.exp(stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs)))
    assert told["measured"] == pytest.approx(stats.gmean(ratios))
    assert told["interval"] == pytest.approx(list(expected))
    assert told["predicted"] == pytest.approx(0.5)
    assert (told["verdict"], told["why"], told["pairs"]) == ("holds", "", 1)
    assert {key: told[key] for key in ("name", "text", "metric", "better", "paper", "target")} == {
        "name": "faster",
        "text": "twice as fast",
        "metric": "step_s",
        "better": "lower",
        "paper": "2x",
        "target": 0.6,
    }


@pytest.mark.parametrize(
    ("better", "target", "verdict", "why"),
    [
        ("lower", 0.6, "holds", ""),
        ("lower", 0.4, "fails", "misses the target 0.4"),
        ("lower", 0.5, "not-measurable", "straddles the target 0.5; more repeats would tell"),
        ("higher", 0.4, "holds", ""),
        ("higher", 0.6, "fails", "misses the target 0.6"),
        ("higher", 0.5, "not-measurable", "straddles the target 0.5; more repeats would tell"),
    ],
)
def test_the_whole_interval_must_be_on_one_side(better: Any, target: float, verdict: str, why: str) -> None:
    claim = Claim("c", "t", "step_s", {"variant": "new"}, {"variant": "old"}, target, better)
    told = judge(claim, variants(0.49, 0.51, 0.5))
    assert told["verdict"] == verdict
    assert why in told["why"]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_equal_repeats_that_meet_the_target_exactly(better: Any) -> None:
    claim = Claim("c", "t", "step_s", {"variant": "new"}, {"variant": "old"}, 0.5, better)
    assert judge(claim, variants(0.5, 0.5, 0.5))["verdict"] == "holds"


def test_pairs_are_matched_repeat_by_repeat() -> None:
    """The machine slows down tenfold from repeat to repeat, both variants with it: the ratio is still certain."""
    drifting = [row | {"step_s": row["step_s"] * 10 ** row["repeat"]} for row in variants(0.5, 0.5, 0.5)]
    told = judge(FASTER, drifting)
    assert told["interval"] == pytest.approx([0.5, 0.5])
    assert told["verdict"] == "holds"


def test_one_repeat_has_no_interval() -> None:
    told = judge(FASTER, variants(0.5))
    assert (told["measured"], told["interval"], told["verdict"]) == (pytest.approx(0.5), None, "not-measurable")
    assert "--repeat 3" in told["why"]


def test_a_repeat_without_its_partner_counts_for_nothing() -> None:
    rows = variants(0.5, 0.5, 0.01)
    rows[-2]["measured"] = False
    told = judge(FASTER, [{"measured": True} | row for row in rows])
    assert told["measured"] == pytest.approx(0.5)


def test_an_axis_that_does_not_vary_is_named() -> None:
    told = judge(RISES, variants(0.5, 0.5))
    assert (told["verdict"], told["why"]) == ("not-measurable", "axis data does not vary in this sweep")
    where = Claim("c", "t", "step_s", {"variant": "new"}, {"variant": "old"}, 1.0, where={"gpus": "2"})
    assert judge(where, variants(0.5, 0.5))["why"] == "axis gpus does not vary in this sweep"


def test_without_the_metric_nothing_can_be_said() -> None:
    told = judge(RISES, ladder({("16", "w4"): [np.nan, np.nan], ("32", "w4"): [np.nan, np.nan]}))
    assert (told["verdict"], told["measured"]) == ("not-measurable", None)
    assert "no measured point has percent_of_peak" in told["why"]


def test_without_a_pair_the_sides_are_named() -> None:
    rows = [row for row in variants(0.5, 0.5) if row["label_variant"] == "old"]
    assert judge(FASTER, rows)["why"] == "no measured pair of variant=new and variant=old"


def ladder(percents: dict[tuple[str, str], list[float]]) -> Rows:
    """(data, model) -> % of peak of each repeat; None is not measured."""
    return [
        {
            "label_data": data,
            "label_model": model,
            "repeat": repeat,
            "percent_of_peak": percent if percent is not None else np.nan,
            "predicted_step_s": 1.0,
            "measured": percent is not None,
        }
        for (data, model), repeats in percents.items()
        for repeat, percent in enumerate(repeats)
    ]


def test_first_and_last_are_the_ends_of_each_series() -> None:
    """w8 was pruned at 64: its last rung is 32. The middle rungs do not count."""
    told = judge(
        RISES,
        ladder(
            {
                ("16", "w4"): [1.0, 1.0],
                ("32", "w4"): [77.0, 99.0],
                ("64", "w4"): [2.0, 2.0],
                ("16", "w8"): [10.0, 10.0],
                ("32", "w8"): [80.0, 80.0],
            }
        ),
    )
    assert told["measured"] == pytest.approx(stats.gmean([2.0, 8.0]))
    assert told["pairs"] == 2
    assert told["verdict"] == "holds"


def test_sizes_order_the_rungs_not_their_names() -> None:
    told = judge(RISES, ladder({("128", "w4"): [3.0, 3.0], ("16", "w4"): [1.0, 1.0], ("64", "w4"): [9.0, 9.0]}))
    assert told["measured"] == pytest.approx(3)


def test_the_ends_are_the_same_in_every_repeat() -> None:
    """Where the largest rung failed in one repeat, that repeat must not compare a smaller one instead."""
    told = judge(
        RISES,
        ladder({("16", "w4"): [1.0] * 3, ("32", "w4"): [5.0] * 3, ("64", "w4"): [2.0, 2.0, None]}),  # type: ignore[list-item]
    )
    assert told["measured"] == pytest.approx(2)
    assert told["interval"] == pytest.approx([2, 2])


def test_a_series_of_one_rung_has_no_ends() -> None:
    told = judge(RISES, ladder({("16", "w4"): [1.0, 1.0], ("64", "w8"): [3.0, 3.0]}))
    assert (told["verdict"], told["measured"]) == ("not-measurable", None)
    assert told["why"]
    with_another = {("16", "w4"): [1.0, 1.0], ("64", "w4"): [4.0, 4.0], ("16", "w8"): [3.0, 3.0]}
    assert judge(RISES, ladder(with_another))["measured"] == pytest.approx(4)


def test_one_axis_alone_has_ends_too() -> None:
    rows = ladder({("16", "w4"): [1.0, 1.0], ("64", "w4"): [3.0, 3.0]})
    alone = [{key: value for key, value in row.items() if key != "label_model"} for row in rows]
    assert judge(RISES, alone)["measured"] == pytest.approx(3)


def test_where_narrows_the_comparison() -> None:
    percents = {("16", "w4"): [1.0, 1.0], ("64", "w4"): [2.0, 2.0], ("16", "w8"): [1.0, 1.0], ("64", "w8"): [7.0, 7.0]}
    only = {"model": "w8"}
    claim = Claim("c", "t", "percent_of_peak", {"data": "last"}, {"data": "first"}, 1.0, where=only)
    assert judge(claim, ladder(percents))["measured"] == pytest.approx(7)
    largest = Claim("c", "t", "percent_of_peak", {"model": "w8"}, {"model": "w4"}, 1.0, where={"data": "last"})
    assert judge(largest, ladder(percents))["measured"] == pytest.approx(3.5)


def test_pairs_differ_in_nothing_else() -> None:
    """Four series, each with its own ratio: the geometric mean over pairs, taken within each repeat."""
    ratios = {("16", "w4"): 2.0, ("16", "w8"): 3.0, ("64", "w4"): 5.0, ("64", "w8"): 7.0}
    rows: Rows = [
        {
            "label_data": data,
            "label_model": model,
            "label_variant": variant,
            "repeat": repeat,
            "step_s": (place + 1) * (ratios[data, model] if variant == "new" else 1.0),
            "predicted_step_s": 1.0 if variant == "new" else 4.0,
        }
        for place, (data, model) in enumerate(ratios)
        for variant, repeat in product(("old", "new"), range(2))
    ]
    told = judge(FASTER, rows)
    assert told["measured"] == pytest.approx(stats.gmean(list(ratios.values())))
    assert told["pairs"] == 4
    assert told["interval"] == pytest.approx([told["measured"]] * 2), "the repeats agree"
    assert told["predicted"] == pytest.approx(0.25)
    assert {tuple(each["labels"].items()): each["measured"] for each in told["series"]} == {
        (("data", data), ("model", model)): pytest.approx(ratio) for (data, model), ratio in ratios.items()
    }
    assert all(each["interval"] == pytest.approx([each["measured"]] * 2) for each in told["series"])


def test_a_single_pair_is_no_series_and_a_bound_is_passed_on() -> None:
    claim = Claim("c", "t", "step_s", {"variant": "new"}, {"variant": "old"}, 0.6, "lower", bound=0.25)
    told = judge(claim, variants(0.5, 0.52, 0.49))
    assert (told["series"], told["bound"]) == ([], 0.25)
    assert "predicted 0.5, bound 0.25, target 0.6" in text.claim_lines({"workload": "toy"} | told)[0]
    assert "bound" not in text.claim_lines({"workload": "toy"} | judge(FASTER, variants(0.5, 0.52)))[0]


@pytest.mark.parametrize(
    ("metric", "predicted"),
    [("step_s", 0.5), ("percent_of_peak", 2.0), ("work_per_s_per_rank", 2.0), ("percent_of_datasheet", 2.0)],
)
def test_predictions_follow_the_metric(metric: str, predicted: float) -> None:
    claim = Claim("c", "t", metric, {"variant": "new"}, {"variant": "old"}, 1.0)
    rows = [row | {metric: row["step_s"]} for row in variants(0.5, 0.5)]
    assert judge(claim, rows)["predicted"] == pytest.approx(predicted)


def test_a_metric_nobody_planned_has_no_prediction() -> None:
    claim = Claim("c", "t", "units", {"variant": "new"}, {"variant": "old"}, 1.0)
    assert judge(claim, [row | {"units": 1.0} for row in variants(0.5, 0.5)])["predicted"] is None


def test_all_claims_of_a_workload() -> None:
    told = evaluate_all([FASTER, RISES], *tables(variants(0.5, 0.5)), "toy")
    assert [(one["workload"], one["name"]) for one in told] == [("toy", "faster"), ("toy", "rises")]


def test_a_series_that_a_repeat_lacks_is_left_out_of_all() -> None:
    """Else the mean of that repeat would be over other series, and the interval over nothing that was repeated."""
    rows = [
        {"label_data": data, "label_variant": variant, "repeat": repeat, "step_s": seconds, "predicted_step_s": 1.0}
        for repeat in range(3)
        for data, ratio in (("16", 1.1), ("32", 10.0))
        for variant, seconds in (("old", 1.0), ("new", ratio))
    ]
    whole = judge(FASTER, rows)
    assert whole["measured"] == pytest.approx((1.1 * 10) ** 0.5)
    lost = judge(FASTER, rows[:-1])
    assert lost["measured"] == pytest.approx(1.1)
    assert lost["pairs"] == 1
    nothing = judge(FASTER, [row for row in rows if row["label_data"] == "16"][:-1] + rows[-2:])
    assert nothing["verdict"] == "not-measurable"
    assert "in every repeat" in nothing["why"]


def test_where_the_largest_counts_alone_and_an_axis_that_does_not_vary_is_no_obstacle() -> None:
    claim = Claim("c", "t", "step_s", {"variant": "new"}, {"variant": "old"}, 1.0, where={"data": "last"})
    rows = [
        {"label_data": data, "label_variant": variant, "repeat": repeat, "step_s": seconds, "predicted_step_s": 1.0}
        for repeat in range(3)
        for data, ratio in (("16", 1.1), ("32", 10.0))
        for variant, seconds in (("old", 1.0), ("new", ratio))
    ]
    assert judge(claim, rows)["measured"] == pytest.approx(10.0)
    assert judge(claim, [row for row in rows if row["label_data"] == "16"])["measured"] == pytest.approx(1.1)
    assert judge(claim, variants(0.5, 0.5))["measured"] == pytest.approx(0.5)


def test_a_claim_on_a_number_of_the_check() -> None:
    """Quality, say: it does not vary between repeats, so its interval is a point."""
    likeness = Claim("likeness", "SSIM of new over old", "check_ssim", {"variant": "new"}, {"variant": "old"}, 0.96)
    rows = [row | {"check_ssim": 0.97 if row["label_variant"] == "new" else 1.0} for row in variants(0.5, 0.5, 0.5)]
    told = judge(likeness, rows)
    assert told["measured"] == pytest.approx(0.97)
    assert told["interval"] == pytest.approx([0.97, 0.97])
    assert told["verdict"] == "holds"
    assert told["predicted"] is None
    assert judge(likeness, variants(0.5, 0.5, 0.5))["why"] == "no measured point has check_ssim"


def test_a_workload_may_predict_its_own_numbers() -> None:
    predictions = {"new": 8.0, "old": 2.0}
    rows = [row | {"check_predicted_work_per_s": predictions[row["label_variant"]]} for row in variants(0.5, 0.5)]
    rows = [row | {"work_per_s": 1.0} for row in rows]
    assert judge(replace(FASTER, metric="work_per_s"), rows)["predicted"] == pytest.approx(4)
    quality = replace(FASTER, metric="check_ssim")
    rows = [row | {"check_ssim": 1.0, "check_predicted_ssim": predictions[row["label_variant"]]} for row in rows]
    assert judge(quality, rows)["predicted"] == pytest.approx(4)
    assert judge(FASTER, rows)["predicted"] == pytest.approx(0.5), "of another metric it says nothing"


def test_one_repeat_of_simulated_time_decides() -> None:
    rows = [row | {"check_simulated_s": 3.0 if row["label_variant"] == "new" else 2.0} for row in variants(0.5)]
    slower = Claim("slower", "", "check_simulated_s", {"variant": "new"}, {"variant": "old"}, 1.4)
    told = judge(slower, rows)
    assert told["verdict"] == "holds"
    assert told["interval"] == pytest.approx([1.5, 1.5])
    assert judge(replace(slower, target=1.6), rows)["verdict"] == "fails"
