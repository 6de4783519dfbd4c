"""The front page: what a decision rests on, of the right cells, with nothing made up where nothing was measured."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saih import store
from saih.analysis import kinds
from saih.core import Axis, Params, Point, Rung
from saih.errors import SaihError
from saih.report import committed, front, gains, page, results, sides, spreads
from saih.report.results import Results
from tests.synthetic import DATA, ENVIRONMENT, MODEL, SITE, Outcome, Scenario, make

GPUS = Axis("gpus", "per node", tuple(Rung(str(n), {"gpus": n}, n) for n in (1, 2)))
OTHER = SITE.model_copy(update={"name": "rival"})


def larger_is_slower(params: Params) -> float:
    """0.1 s for 16 voxels, 0.4 s for 32, and a quarter longer on two ranks."""
    return {16: 0.1, 32: 0.4}[int(params["mesh"])] * (1.25 if int(params["gpus"]) == 2 else 1.0)


def flop_of(params: Params) -> float:
    return 1e7 * (int(params["mesh"]) / 16) ** 3


SCALED = Scenario(axes=(DATA, GPUS), step_s=larger_is_slower, flop=flop_of, repeat=3, jitter=0.001)


def gathered(folder: Path, scenario: Scenario, name: str = "a") -> Path:
    return store.gather(make(folder / name / "jobs", scenario, name), folder / name, mixed=True)


def study(folder: Path, scenario: Scenario, name: str = "a") -> Results:
    return results.read(gathered(folder, scenario, name))


def shown(path: Path) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_a_row_tells_time_at_the_largest_size_and_efficiency_at_the_most_ranks(tmp_path: Path) -> None:
    row = front.row([study(tmp_path, SCALED)], "w", Counter())
    assert row.time.value.startswith("200 ms / ")
    assert row.time.of == "data=32 gpus=1", "of the cells of that size, the one whose ranks are fastest"
    assert "3 repeats" in row.time.certainty
    assert row.scaling.value == "80.0 %"
    assert row.scaling.of == "on 2 ranks, over 1"
    assert row.percent.value == "8.00 – 20.0 %"  # noqa: RUF001
    assert row.percent.certainty.startswith("highest at data=32 gpus=1")


def test_what_nobody_measured_is_called_so(tmp_path: Path) -> None:
    row = front.row([study(tmp_path, Scenario(axes=(DATA,)))], "w", Counter())
    assert row.scaling.value == row.energy.value == "not measured"
    text = shown(page.write(gathered(tmp_path, Scenario(axes=(DATA,)), "b"), tmp_path / "page.html"))
    assert text.count("not measured") >= 2
    assert "0 J" not in text


def test_energy_is_told_where_a_column_has_it(tmp_path: Path) -> None:
    one = study(tmp_path, Scenario(axes=(DATA.pick(["16"]),), repeat=2))
    work = one.samples[one.samples["warmup"] == 0].groupby("point")["units"].sum()
    told = {"j": work * 7.0, "scope": "package", "how": "counters", "hz": 2.0, "window_s": 1.0}
    for name, value in told.items():
        one.points[f"energy_rapl_{name}"] = value
    row = front.row([one], "w", Counter())
    assert row.energy.value.startswith("7.00 J / ")
    assert (row.energy.of, row.energy.certainty) == ("package, by rapl, 2.00/s", "7.00 to 7.00 J, 2 repeats")


def test_kinds_are_told_apart_and_never_share_a_figure(tmp_path: Path) -> None:
    emulated = Axis("emulated_link", "", tuple(Rung(str(n), {"emulated_link": n}, n) for n in (0, 4)))
    fast = Scenario(axes=(emulated,), step_s=lambda params: 0.01 if params["emulated_link"] else 1.0)
    one = study(tmp_path, fast)
    assert one.cells["measured_as"].tolist() == ["measured", "emulated"]
    assert front.row([one], "w", Counter()).percent.value == "10.0 %"
    simulated = study(tmp_path, Scenario(axes=(DATA,), check=lambda params: {"simulated_s": 1.0}), "b")
    row = front.row([simulated], "w", Counter())
    assert row.kind == "simulated"
    assert kinds.of_metric("check_simulated_s") == "simulated"
    text = page.write(simulated.path, tmp_path / "page.html").read_text()
    assert f'<span class="shape" aria-hidden="true">{kinds.KINDS["simulated"][0]}</span>simulated' in text
    assert len({shape for shape, _ in kinds.KINDS.values()}) == len(kinds.KINDS)


COMMITTED = """
committed:
  - {workload: synthetic, metric: step_s, at: {data: 16, gpus: 1}, at_most: 0.11}
  - {workload: synthetic, metric: step_s, at: {data: 32, gpus: 1}, at_most: 0.3}
  - {workload: synthetic, metric: work_per_s, at: {data: 32, gpus: 1}, at_least: 5.0}
  - {workload: synthetic, metric: percent_of_peak, at: {data: 64}, at_least: 1}
"""


def test_committed_values_are_met_missed_not_certain_or_not_measured(tmp_path: Path) -> None:
    (tmp_path / "bid.yaml").write_text(COMMITTED)
    commitments = committed.load(tmp_path / "bid.yaml")
    path = gathered(tmp_path, SCALED)
    verdicts = [each.verdict for each in committed.judge(commitments, [results.read(path)])]
    assert verdicts == ["met", "missed", "not certain", "not measured"]
    text = shown(page.write(path, tmp_path / "page.html", commitments=commitments))
    assert "committed: 1 met , 1 missed , 1 not certain" in text


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{workload: w, metric: speed, at_least: 1}", "unknown metric 'speed'"),
        ("{workload: w, metric: step_s}", "commitment 1: give at_least or at_most, one of the two"),
        ("{workload: w, metric: step_s, at_least: 1, at_most: 2}", "one of the two"),
        ("{workload: w, metric: step_s, atleast: 1}", "unknown key 'atleast'"),
    ],
)
def test_a_wrong_line_of_committed_values_is_named(tmp_path: Path, line: str, error: str) -> None:
    (tmp_path / "bid.yaml").write_text(f"committed:\n  - {line}\n")
    with pytest.raises(SaihError, match=error):
        committed.load(tmp_path / "bid.yaml")


@pytest.mark.parametrize(
    ("times", "jitter", "verdict"), [(0.5, 0.001, "rival is faster"), (2.0, 0.001, "testbed is faster")]
)
def test_systems_are_compared_on_equal_cells_only(tmp_path: Path, times: float, jitter: float, verdict: str) -> None:
    ours = study(tmp_path, Scenario(axes=(DATA, MODEL), repeat=3, jitter=jitter))
    theirs = study(
        tmp_path, Scenario(axes=(DATA,), repeat=3, jitter=jitter, site=OTHER, step_s=lambda params: times), "b"
    )
    assert [side.verdict for side in sides.sides([ours, theirs])] == ["no cell in common"], "no width: other cells"
    same = Scenario(axes=(DATA, MODEL), repeat=3, jitter=jitter, site=OTHER, step_s=lambda params: times)
    (side,) = sides.sides([ours, study(tmp_path, same, "c")])
    assert (side.cells, side.verdict) == (4, verdict)
    assert side.ratio == pytest.approx(1 / times, rel=0.02)


def test_two_machines_whose_sites_have_one_name_are_two_systems(tmp_path: Path) -> None:
    """As any two machines without a scheduler: each calls itself local."""
    theirs = Scenario(environment=lambda point: ENVIRONMENT | {"processor": "Other CPU"})
    ours, other, more = (
        study(tmp_path, each, name) for each, name in ((Scenario(), "a"), (theirs, "b"), (theirs, "c"))
    )
    found = results.told_apart([ours, other, more])
    assert [one.system for one in found] == ["testbed (Test CPU)", "testbed (Other CPU)", "testbed (Other CPU)"]
    assert [one.system for one in results.told_apart([other, more])] == ["testbed", "testbed"]


def test_one_repeat_decides_nothing_between_systems(tmp_path: Path) -> None:
    ours = study(tmp_path, Scenario())
    (side,) = sides.sides([ours, study(tmp_path, Scenario(site=OTHER, step_s=lambda params: 0.1), "b")])
    assert side.verdict == "not certain"


def test_a_page_of_two_systems_names_the_winner_and_keeps_ids_apart(tmp_path: Path) -> None:
    same = Scenario(repeat=3, jitter=0.001)
    faster = Scenario(repeat=3, jitter=0.001, site=OTHER, step_s=lambda params: 0.5)
    paths = [gathered(tmp_path, same, "a"), gathered(tmp_path, faster, "b")]
    source = page.write(paths, tmp_path / "page.html")
    text = shown(source)
    assert re.search(r"rival over testbed 4 2\.0\d ", text)
    assert "rival is faster" in text
    ids = re.findall(r'\sid="([^"]*)"', source.read_text())
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', source.read_text())) <= set(ids)


def test_ranks_are_told_by_host(tmp_path: Path) -> None:
    scenario = Scenario(axes=(DATA.pick(["16"]),), params={"gpus": 4}, repeat=2)
    one = study(tmp_path, scenario)
    assert spreads.ranks(one)[1] == [], "one host: nothing to tell apart"
    one.ranks["host"] = np.where(one.ranks["rank"] == 3, "slow", "n1")
    late = (one.samples["rank"] == 3).to_numpy()
    for column in ("step_s", "compute_s"):
        one.samples.loc[late, column] *= 1.5
    (strip,), hosts = spreads.ranks(one)
    assert strip.last == "rank 3 on slow"
    assert strip.dots[-1] == 1.0, "off the scale, at its end"
    assert [host["host"] for host in hosts] == ["slow", "n1"]
    assert hosts[0]["last"] == "1 of 1 cell"


def test_raw_repeats_stand_beside_their_median(tmp_path: Path) -> None:
    rows, total = spreads.repeats(study(tmp_path, Scenario(repeat=3, jitter=0.05)))
    assert total == 4
    assert all(len(row.values) == len(row.dots) == 3 for row in rows)
    assert all(0.0 in row.dots for row in rows), "the median of three is one of them"


def test_points_that_failed_their_check_are_counted_beside_the_gains(tmp_path: Path) -> None:
    def outcome(point: Point) -> Outcome:
        return Outcome("failed", "check-failed", "wrong loss") if point.labels["data"] == "16" else Outcome()

    scenario = Scenario(axes=(DATA,), workload="cosmoflow", outcome=outcome)
    assert "1 point here failed it" in shown(page.write(gathered(tmp_path, scenario), tmp_path / "page.html"))
    assert "no point here failed it" in shown(
        page.write(gathered(tmp_path, Scenario(axes=(DATA,), workload="cosmoflow"), "b"), tmp_path / "page.html")
    )


GROWING = Scenario(
    axes=(DATA, MODEL),
    workload="cosmoflow",
    step_s=lambda params: float(params["mesh"]) / 100,
    repeat=3,
    jitter=0.001,
)


def test_a_gain_says_how_it_came_about_and_whether_it_was_checked(tmp_path: Path) -> None:
    timed = study(tmp_path, GROWING)
    found = {each.claim["name"]: each for each in gains.best([timed])}
    rises = found["percent-of-peak-rises-with-data"]
    assert (rises.kind, rises.checked) == ("measured", "passed at all 12 points")
    assert found["two-ranks-efficiency"].checked == "", "nothing was measured for it"
    simulated = study(tmp_path, replace(GROWING, check=lambda params: {"simulated_s": 1.0}), "b")
    (rises,) = (each for each in gains.best([simulated]) if each.claim["name"] == rises.claim["name"])
    assert (rises.kind, rises.checked.partition(":")[0]) == ("simulated", gains.UNCHECKED)
    text = shown(page.write(timed.path, tmp_path / "page.html"))
    assert "Checked before timing: the loss falls on a fixed batch" in text
    assert "passed at all 12 points" in text


def test_the_best_evidence_of_several_files_counts_once(tmp_path: Path) -> None:
    few = study(tmp_path, replace(GROWING, axes=(DATA, MODEL.pick(["w4"]))))
    many = study(tmp_path, GROWING, "b")
    for order in ([few, many], [many, few]):
        found = {each.claim["name"]: each.study for each in gains.best(order)}
        assert found["percent-of-peak-rises-with-data"] is many
    text = shown(page.write([few.path, many.path], tmp_path / "page.html"))
    assert "This sweep has nothing to say on:" in text
