"""Systems side by side: SSI against its definition, what must not change it, and how sure a rank is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saih import cli, store, weights
from saih.analysis.cells import job_steps, per_point
from saih.analysis.compare import Comparison, System, Target, compare, measurements, ratio, scores, stability, welch
from saih.analysis.energy import relative
from saih.errors import SaihError
from saih.files import read_json, write_json
from tests.synthetic import Scenario, make


def row(point: str, rate: float, repeat: int = 0, **rest: Any) -> dict[str, Any]:
    known = {"workload": "app", "cell": f"c{point}", "nodes": 1.0, "kind": "measured", "ranks": 1.0, "units": 4.0}
    return known | {"point": point, "repeat": repeat, "flop": 8.0, "work_per_s": rate, "label_data": point} | rest


def system(name: str, rows: Sequence[dict[str, Any]], **facts: float) -> System:
    return System(name, pd.DataFrame(rows), **facts)


def simple(name: str, rates: Sequence[Sequence[float]], **facts: Any) -> System:
    """A point for each entry, with its repeats."""
    nodes = facts.pop("used", 1.0)
    rows = [row(str(p), each, r, nodes=nodes) for p, repeats in enumerate(rates) for r, each in enumerate(repeats)]
    return system(name, rows, **facts)


RATE = st.floats(1e-3, 1e6)
APPS = st.integers(1, 4)


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[list[System], dict[str, Target]]:
    """Two or three systems, some applications with points and repeats of their own, weights, nodes used and owned."""
    count, apps = draw(st.integers(2, 3)), draw(APPS)
    shapes = [(draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(apps)]
    systems = []
    for number in range(count):
        rows = [
            row(
                f"{app}.{p}",
                draw(RATE),
                r,
                workload=f"app{app}",
                nodes=float(draw(st.integers(1, 8))) if not p else 2.0,
            )
            for app, (points, repeats) in enumerate(shapes)
            for p in range(points)
            for r in range(repeats)
        ]
        table = pd.DataFrame(rows)
        table["nodes"] = table.groupby("point")["nodes"].transform("first")
        systems.append(System(f"s{number}", table, float(draw(st.integers(1, 1000)))))
    targets = {f"app{app}": Target(draw(st.floats(0.1, 10))) for app in range(apps)}
    return systems, targets


def by_definition(systems: list[System], targets: dict[str, Target]) -> list[float]:
    """SSI, term by term: the product over applications of (c U S)^w, each a geometric mean over its points."""
    reference, told = systems[0], []
    for each in systems:
        product = 1.0
        for app, target in targets.items():
            mine, theirs = (s.rows[s.rows["workload"] == app] for s in (each, reference))
            terms = []
            for point in mine["point"].unique():
                a, b = mine[mine["point"] == point], theirs[theirs["point"] == point]
                speed_up = stats.gmean(a["work_per_s"]) / stats.gmean(b["work_per_s"])
                used = b["nodes"].iloc[0] / a["nodes"].iloc[0]
                terms.append(used * each.nodes / reference.nodes * speed_up)
            product *= stats.gmean(terms) ** (target.weight / sum(t.weight for t in targets.values()))
        told.append(product)
    return told


@settings(max_examples=20)
@given(comparisons())
def test_ssi_is_what_its_definition_says(case: tuple[list[System], dict[str, Target]]) -> None:
    systems, targets = case
    found = scores(compare(systems, targets))
    assert [each.ssi for each in found] == pytest.approx(by_definition(systems, targets), rel=1e-9)
    assert found[0].ssi == pytest.approx(1.0)
    for each in found:
        assert each.ssi == pytest.approx(each.capability * each.utilisation * each.speed_up)


@settings(max_examples=20)
@given(comparisons(), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_ssi_knows_no_unit_of_time_and_no_sum_of_weights(
    case: tuple[list[System], dict[str, Target]], unit: float, factor: float
) -> None:
    systems, targets = case
    before = [each.ssi for each in scores(compare(systems, targets))]
    rescaled = [replace(s, rows=s.rows.assign(work_per_s=s.rows["work_per_s"] * unit)) for s in systems]
    assert [each.ssi for each in scores(compare(rescaled, targets))] == pytest.approx(before)
    heavier = {name: replace(each, weight=each.weight * factor, work=7.0) for name, each in targets.items()}
    assert [each.ssi for each in scores(compare(systems, heavier))] == pytest.approx(before)


@settings(max_examples=20)
@given(comparisons())
def test_identical_systems_have_one_and_the_reference_inverts_it(case: tuple[list[System], dict[str, Target]]) -> None:
    systems, targets = case
    twins = [replace(systems[0], name=name) for name in "ab"]
    told = scores(compare(twins, targets))
    assert [each.ssi for each in told] == pytest.approx([1.0, 1.0])
    assert not any(each.slower for each in told)
    there = scores(compare(systems[:2], targets))[1].ssi
    back = scores(compare(systems[1::-1], targets))[1].ssi
    assert there * back == pytest.approx(1.0)


@settings(max_examples=20)
@given(comparisons(), st.floats(1.1, 100))
def test_ssi_grows_with_speed_and_with_nodes_owned(case: tuple[list[System], dict[str, Target]], factor: float) -> None:
    systems, targets = case
    before = scores(compare(systems, targets))[1].ssi
    faster = replace(systems[1], rows=systems[1].rows.assign(work_per_s=systems[1].rows["work_per_s"] * factor))
    assert scores(compare([systems[0], faster], targets))[1].ssi == pytest.approx(before * factor)
    larger = replace(systems[1], nodes=systems[1].nodes * factor)
    assert scores(compare([systems[0], larger], targets))[1].ssi == pytest.approx(before * factor)


def test_a_problem_that_runs_slower_is_flagged_and_not_clamped() -> None:
    found = compare([simple("a", [[10.0], [10.0]]), simple("b", [[40.0], [5.0]])], {})
    a, b = scores(found)
    assert b.ssi == pytest.approx(math.sqrt(4 * 0.5))
    assert (a.slower, b.slower) == ((), ("app data=1",))


def test_a_larger_problem_counts_by_how_much_larger_it_is() -> None:
    """b runs twice the FLOP a unit of work, at half the rate, on a quarter of its nodes."""
    a = system("a", [row("0", 10.0, nodes=2.0, label_data="64")], nodes=100.0)
    b = system("b", [row("1", 5.0, nodes=4.0, label_data="128", flop=16.0)], nodes=400.0)
    target = Target(cell={"data": "64"}, larger={"b": {"data": "128"}})
    told = scores(compare([a, b], {"app": target}))[1]
    assert (told.capability, told.speed_up) == (pytest.approx(2.0), pytest.approx(0.5))
    assert told.utilisation == pytest.approx(2 / 4 * 400 / 100)
    with pytest.raises(SaihError, match=r"app on b: no measured point at data=64"):
        compare([a, b], {"app": Target(cell={"data": "64"})})
    silent = replace(b, rows=b.rows.assign(flop=0.0))
    with pytest.raises(SaihError, match="counts no FLOP"):
        compare([a, silent], {"app": target})
    with pytest.raises(SaihError, match=r"app on a: no axis model; its axes: data"):
        compare([a, b], {"app": Target(cell={"model": "w2"})})


def test_only_points_that_all_have_are_compared_and_only_measured_ones() -> None:
    a = system("a", [row("0", 1.0), row("1", 1.0), row("2", 1.0)])
    b = system("b", [row("0", 2.0), row("2", 99.0, kind="emulated"), row("3", 99.0, kind="simulated")])
    found = compare([a, b], {})
    assert list(found.entries["app"]) == ["0"]
    assert found.left_out == {"a": 2, "b": 2}
    assert scores(found)[1].ssi == pytest.approx(2.0)
    with pytest.raises(SaihError, match="a, b have no equal points"):
        compare([a, replace(b, rows=b.rows.iloc[1:])], {})


SAMPLE = st.lists(st.floats(-2, 2), min_size=2, max_size=6)


@given(SAMPLE, SAMPLE)
def test_the_interval_of_a_ratio_is_welchs(a: list[float], b: list[float]) -> None:
    if np.var(a) + np.var(b) < 1e-6:
        return
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    _, low, high = welch(np.array(a), np.array(b))
    assert (low, high) == (pytest.approx(math.exp(expected.low)), pytest.approx(math.exp(expected.high)))


def test_one_repeat_has_no_interval() -> None:
    assert np.isnan(welch(np.array([1.0]), np.array([1.0, 2.0]))[1])


def three(spread: float) -> Comparison:
    """b is a tenth better than a in one application, c in another; repeats differ by `spread`."""
    noise = [1 - spread, 1.0, 1 + spread]
    better = {"a": (1.0, 1.0), "b": (1.1, 1.0), "c": (1.0, 1.12)}
    systems = [
        system(
            name,
            [
                row(f"{app}", rate * n, r, workload=app)
                for app, rate in zip("xy", rates, strict=True)
                for r, n in enumerate(noise)
            ],
        )
        for name, rates in better.items()
    ]
    return compare(systems, {})


def test_ranks_without_error_are_certain() -> None:
    told = stability(three(0.0), measurement=True, weights=False)
    assert {name: (each.rank, each.holds, each.first) for name, each in told.items()} == {
        "a": (3, 1.0, 0.0),
        "b": (2, 1.0, 0.0),
        "c": (1, 1.0, 1.0),
    }
    assert told["c"].low == pytest.approx(told["c"].high)


def test_measurement_error_and_weights_shake_the_rank_each_by_itself() -> None:
    noisy = stability(three(0.05), weights=False)
    assert 0.5 < noisy["c"].first < 0.95
    swayed = stability(three(0.0), measurement=False)
    assert 0.3 < swayed["c"].first < 0.8, "c wins as long as its application counts about as much as the other"
    assert swayed["a"].holds == 1.0, "no weights make a better than both"
    assert stability(three(0.05), seed=3) == stability(three(0.05), seed=3)
    assert stability(three(0.05), seed=3) != stability(three(0.05), seed=4)


def test_the_range_from_repeats_has_the_width_of_a_standard_error() -> None:
    """90 % of a normal with the standard error of the difference of two means, of many repeats."""
    dice = np.random.default_rng(1)
    rates = {name: np.exp(0.1 * dice.standard_normal(60)) for name in "ab"}
    found = compare([simple(name, [list(each)]) for name, each in rates.items()], {})
    told = stability(found, weights=False)["b"]
    error = math.sqrt(sum(np.log(each).var(ddof=1) / 60 for each in rates.values()))
    assert math.log(told.high / told.low) == pytest.approx(2 * stats.norm.ppf(0.95) * error, rel=0.05)


@settings(max_examples=20)
@given(st.floats(0.2, 5.0))
def test_weights_are_drawn_around_the_given(weight: float) -> None:
    """Mean and spread of the first application's weight, by SSI of a system that is e times faster there alone."""
    a = system("a", [row("0", 1.0, workload="x"), row("1", 1.0, workload="y")])
    b = system("b", [row("0", math.e, workload="x"), row("1", 1.0, workload="y")])
    told = stability(compare([a, b], {"x": Target(weight)}), measurement=False)["b"]
    share = weight / (weight + 1)
    low, high = stats.beta.ppf((0.05, 0.95), 20 * share, 20 * (1 - share))
    assert (math.log(told.low), math.log(told.high)) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def results(folder: Path, name: str, speed: float = 1.0, repeat: int = 3, **scenario: Any) -> Path:
    """A results file of four cells, `speed` times as fast."""
    given = {"step_s": lambda params: params["mesh"] / 100 / speed, "jitter": 0.02, "repeat": repeat} | scenario
    return store.gather(make(folder / "jobs", Scenario(**given), name), folder)


def test_equal_points_are_found_in_results_wherever_they_were_measured(tmp_path: Path) -> None:
    paths = [
        results(tmp_path, "a", params={"gpus": 2, "nodes": 1}),
        results(tmp_path, "b", params={"gpus": 1, "nodes": 2}),
    ]
    tables = []
    for path in paths:
        points, samples = store.load(path), store.load_samples(path)
        tables.append(measurements(points, per_point(points, job_steps(points, samples), points.attrs["sweep"])))
    assert set(tables[0]["point"]) == set(tables[1]["point"])
    assert not set(tables[0]["cell"]) & set(tables[1]["cell"])
    told = scores(compare([System("a", tables[0]), System("b", tables[1])], {}))[1]
    assert told.utilisation == pytest.approx(0.5), "it used twice the nodes"


WEIGHTS = """\
reference: old
currency: EUR
systems: {old: {nodes: 100, price: 1.0e+6}, new: {nodes: 200, price: 3.0e+6}}
applications: {synthetic: {weight: 2, work: 1000, cell: {data: 32, model: w8}}}
"""


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert cli.main(["compare", *words]) == status
    captured = capsys.readouterr()
    return captured.err if status == 2 else captured.out


def test_the_verb_tells_it_in_words_in_json_and_as_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = results(tmp_path, "a"), results(tmp_path, "b", speed=2.0)
    Path("weights.yaml").write_text(WEIGHTS)
    words = [f"new={b}", f"old={a}", "--weights", "weights.yaml"]
    told = json.loads(said(capsys, *words, "--json"))
    old, new = told["systems"]
    assert (told["reference"], old["ssi"]) == ("old", pytest.approx(1.0))
    assert new["ssi"] == pytest.approx(2 * 2)
    assert new["ssi_per_price"] == pytest.approx(4 / 3)
    assert new["energy_per_work"] is None
    (point,) = told["applications"][0]["points"]
    assert point["systems"]["old"]["time_s"] == pytest.approx(1000 / 2.0 * 0.32, rel=1e-3)
    low, high = point["systems"]["new"]["interval"]
    assert low < 0.5 < high
    assert point["systems"]["new"]["normalised"] == pytest.approx(0.5)
    text = said(capsys, *words, "-o", "page.html")
    assert "new is first in 100 % (repeats), 100 % (weights), 100 % (both) of 4000 draws; seed 0" in text
    page = Path("page.html").read_text()
    assert "<script" not in page
    assert "EUR" in page


def test_anonymous_means_no_name_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [results(tmp_path, name, speed) for name, speed in (("acme", 1.0), ("zuse", 0.5))]
    text = said(capsys, *(f"{path.stem}-inc={path}" for path in paths), "--anonymous", "-o", "page.html")
    told = said(capsys, *(f"{path.stem}-inc={path}" for path in paths), "--anonymous", "--json")
    for output in (text, told, Path("page.html").read_text()):
        assert "System B" in output
        assert not {"acme", "zuse", "testbed", "Test CPU", "n1"} & set(
            output.replace('"', " ").replace("=", " ").split()
        )
    assert "S < 1: slower than System A at synthetic data=16 model=w4" in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("applications: {nope: {weight: 1}}", "unknown application 'nope'"),
        ("systems: {c: {}}", "unknown system 'c'"),
        ("reference: c", "unknown system 'c'"),
        ("applications: {synthetic: {weight: -1}}", "weights.yaml:1: applications.synthetic.weight"),
        ("applications: {synthetic: {wieght: 1}}", "unknown key 'wieght'; did you mean weight"),
        ("applications: {synthetic: {larger: {c: {}}}}", "applications.synthetic.larger: unknown system 'c'"),
        ("weights", "must be a mapping of keys"),
    ],
)
def test_bad_weights_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.yaml").write_text(text)
    paths = [f"{name}={results(tmp_path, name, repeat=1)}" for name in "ab"]
    error = said(capsys, *paths, "--weights", "weights.yaml", status=2)
    assert error.count("\n") == 1
    assert complaint in error


@pytest.mark.parametrize("words", [["a.h5"], ["a.h5", "a.h5"], ["x=a.h5", "=a.h5"]])
def test_systems_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(capsys, *words, status=2).count("\n") == 1


def energies(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["cell", "source", "scope", "joule_per_work"]).assign(hz=2.0)


def test_energies_of_different_scope_are_never_compared() -> None:
    cells = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    a = energies(("1", "nvml", "device", 1.0), ("2", "nvml", "device", 2.0), ("1", "rapl", "package", 9.0))
    b = energies(("x", "nvml", "device", 2.0), ("y", "nvml", "device", 1.0), ("x", "meter", "node", 9.0))
    told = relative({"a": a, "b": b}, cells)
    assert (told["source"], told["scope"]) == ("nvml", "device")
    assert told["relative"] == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    other = relative({"a": a, "b": b.assign(scope="node")}, cells)
    assert other["relative"] == {}
    assert "no source of the same scope" in other["why"]
    assert relative({"a": a, "b": b.iloc[:0]}, cells)["why"] == "not metered on b"


def test_ratio_to_itself_is_one() -> None:
    found = compare([simple("a", [[1.0, 2.0]]), simple("b", [[1.0, 2.0]])], {})
    point = found.entries["app"]["0"]
    assert ratio(point["a"], point["a"]) == (1.0, 1.0, 1.0)


def test_weights_file_of_the_readme_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_text(WEIGHTS)
    assert weights.read(path, ["old", "new"], ["synthetic"]).applications["synthetic"].cell == {
        "data": "32",
        "model": "w8",
    }


def test_a_damaged_measurement_is_not_an_equal_point(tmp_path: Path) -> None:
    """Failed points have no time and are left out."""
    folder = make(tmp_path / "jobs", Scenario(), "a")
    victim = next(folder.points.glob("*/measurement.json"))
    told = read_json(victim)
    victim.unlink()
    failure = {"format": 1, "point": told["point"], "kind": "error", "reason": "x", "log_tail": ""}
    write_json(victim.with_name("failure.json"), failure)
    points = store.load(store.gather(folder, tmp_path))
    samples = store.load_samples(tmp_path / "a.h5")
    table = measurements(points, per_point(points, job_steps(points, samples), points.attrs["sweep"]))
    assert len(table) == 3
