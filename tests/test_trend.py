"""Trends: curves of known shape, laws that are found again, and intervals that cover what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from saih import store
from saih.analysis.trend import CONFIDENCE, fit, shape
from saih.core import Axis, Params, Rung
from saih.report import results, trends
from saih.report.results import Results
from tests.synthetic import Scenario, make

SIZES = (16.0, 32.0, 64.0, 128.0, 256.0)


def test_a_straight_fall_has_no_knee() -> None:
    assert shape((1, 2, 4, 8), (80, 60, 40, 20)).knee is None
    assert shape((0, 1, 2), (1, 5, 6)).knee is None, "a size of 0 has no logarithm"


def test_a_curve_that_levels_off_has_a_knee_and_a_saturation() -> None:
    found = shape((1, 2, 4, 8, 16, 32), (10, 40, 70, 96, 98, 100))
    assert (found.low, found.high) == (10, 100)
    assert found.knee in (4, 8)
    assert found.saturation == 8


@pytest.mark.parametrize("values", [(1, 2, 3, 4, 5), (1, 2, 4, 8, 16), (16, 8, 4, 2, 1)])
def test_a_curve_that_does_not_level_off_has_no_saturation(values: tuple[float, ...]) -> None:
    assert shape(SIZES, values).saturation is None


@pytest.mark.parametrize(
    ("law", "told"),
    [
        (lambda n: 0.01 + 2e-8 * n**3, "n^3"),
        (lambda n: 0.5 + 0.0 * n, "0.5"),
        (lambda n: 1e-3 * n * np.log2(n), "n log2(n)"),
    ],
)
def test_a_law_without_noise_is_found_again(law: Callable[[np.ndarray], np.ndarray], told: str) -> None:
    n = np.array(SIZES)
    model = fit(n[:, None], law(n), ("n",))
    assert model is not None
    assert told in model.formula()
    beyond = model.predict([512.0])
    assert beyond.value == pytest.approx(float(law(np.array(512.0))), rel=1e-3)


def test_too_few_sizes_make_no_model() -> None:
    assert fit(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 4.0]), ("n",)) is None


def surface(dice: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A random law over two sizes: a floor and a product of powers, as of kernels that launches hide when small."""
    i, k = dice.choice([1.0, 1.5, 2.0, 3.0]), dice.choice([0.5, 1.0, 1.5, 2.0])
    floor = dice.uniform(0.0, 3.0) * 64.0**i * 8.0**k
    return lambda p: 1e-6 * (floor + p[:, 0] ** i * p[:, 1] ** k)


def test_intervals_cover_what_they_say(tell: Callable[[str], None]) -> None:
    """200 surfaces of 5 x 4 cells; the cell one rung beyond both ends is predicted.

    Repeats scatter by 5 %, and cells by 4 % from the law, which all three repeats of a cell have in common.
    """
    dice = np.random.default_rng(7)
    grid = np.array([(data, model) for data in SIZES for model in (4.0, 8.0, 16.0, 32.0)])

    def measured(law: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray) -> np.ndarray:
        repeats = np.exp(0.05 * dice.standard_normal((3, len(sizes))))
        return law(sizes) * np.exp(0.04 * dice.standard_normal(len(sizes))) * repeats.mean(axis=0)

    inside, errors = 0, []
    for _ in range(200):
        law = surface(dice)
        model = fit(grid, measured(law, grid), ("data", "model"))
        assert model is not None
        beyond = np.array([[512.0, 64.0]])
        seen = float(measured(law, beyond)[0])
        predicted = model.predict(beyond[0])
        inside += predicted.low <= seen <= predicted.high
        errors.append(abs(predicted.value / float(law(beyond)[0]) - 1))
    error = 100 * float(np.median(errors))
    tell(f"90 % intervals hold {inside / 2:.1f} % of 200 extrapolated cells; median error {error:.1f} %")
    assert 0.85 <= inside / 200 <= 0.95, CONFIDENCE


def test_a_surface_saturates_at_the_least_work_that_fills_the_machine(tmp_path: Path) -> None:
    """Up to 0.6 GFLOP a step efficiency grows with the work, whichever axis it comes from; 0.3 GFLOP is half of it."""

    def flop(params: Params) -> float:
        return 1e8 * float(params["data"]) * float(params["model"])

    axes = [Axis(name, "", tuple(Rung(str(n), {name: n}, n) for n in (1, 2, 3, 4))) for name in ("data", "model")]
    scenario = Scenario(axes=axes, flop=flop, step_s=lambda params: flop(params) / 0.9e9 / min(1.0, flop(params) / 6e8))
    found = trends.shapes(results.read(store.gather(make(tmp_path / "jobs", scenario), tmp_path, mixed=True)))
    (row,) = (each for each in found if each["axis"] == "data and model")
    assert row["range"] == "15.0 to 90.0 %"
    assert row["saturation"] in ("data=2 model=3", "data=3 model=2")


RECORDED = Path(__file__).parent / "recorded" / "extra-p"
LADDER = (4, 8, 16, 32, 64)


def surface_of(name: str) -> Scenario:
    """Two call paths over two sizes, each by a law of its own, with a scatter of a few per cent over three repeats."""
    sized = [Axis(axis, "", tuple(Rung(str(n), {axis: n}, n) for n in LADDER)) for axis in ("data", "model")]
    engine = Axis("engine", "", (Rung("a", {"engine": "a"}, 0), Rung("b", {"engine": "b"}, 1)), named=True)

    def step_s(params: Params) -> float:
        data, model = float(params["data"]), float(params["model"])
        return (
            0.01 + 1e-6 * data**2 * model if params["engine"] == "a" else 2e-4 * data * np.log2(data) + 1e-5 * model**2
        )

    return Scenario(axes=(*sized, engine), workload=name, repeat=3, step_s=step_s, jitter=0.02)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    folder = tmp_path_factory.mktemp("extra-p")
    path = store.gather(make(folder / "jobs", surface_of("synthetic")), folder / "results", mixed=True)
    found = results.read(path)
    return found, trends.extra_p(found)


def test_extra_p_is_told_what_it_was_told_when_its_answer_was_recorded(exported: tuple[Results, str]) -> None:
    assert exported[1] == (RECORDED / "surface.jsonl").read_text()


@pytest.mark.parametrize("engine", ["a", "b"])
def test_extra_p_agrees(engine: str, exported: tuple[Results, str], tell: Callable[[str], None]) -> None:
    """On the same measurements: at every size measured within 5 %, and one rung beyond both inside the interval."""
    answer = json.loads((RECORDED / "answer.json").read_text())
    theirs = answer["models"][f"step->engine={engine}"]
    sizes, values = measurements(exported[1], engine)
    model = fit(sizes, values, ("data", "model"))
    assert model is not None
    *inside, beyond = theirs["values"]
    apart = [model.predict(each["sizes"]).value / each["step_s"] - 1 for each in inside]
    predicted = model.predict(beyond["sizes"])
    worst, there = 100 * max(map(abs, apart)), 100 * (predicted.value / beyond["step_s"] - 1)
    tell(f"Extra-P {answer['extrap']}: {theirs['function']}; saih: {model.formula()}")
    tell(f"at most {worst:.1f} % apart where measured, {there:+.1f} % one rung beyond both sizes")
    assert max(map(abs, apart)) < 0.05
    assert predicted.low <= beyond["step_s"] <= predicted.high


def measurements(exported: str, engine: str) -> tuple[np.ndarray, np.ndarray]:
    lines = [json.loads(line) for line in exported.splitlines()]
    mine = [line for line in lines if line["callpath"] == f"step->engine={engine}"]
    return np.array([[*line["params"].values()] for line in mine]), np.array([line["value"] for line in mine])
