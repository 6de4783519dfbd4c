"""Parameters, ladders and points: what is accepted, and that a point's identity is its content and nothing else."""

import json
import os
import shlex
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from saih.core import COMMON, Axis, Parameter, Point, Rung, axis_of
from saih.errors import SaihError

WIDTH = Parameter("width", 16, "channels", minimum=1)
RATE = Parameter("rate", 0.5, minimum=0)
FUSED = Parameter("fused", False)
PRECISION = Parameter("precision", "fp32", choices=("fp32", "bf16"))
CHANNELS = Parameter("channels", 4, choices=(1, 2, 4))
LADDER = Axis("data", "voxels", tuple(Rung(str(n), {"mesh": n}, n) for n in (16, 32, 64)))

WORDS = st.text(max_size=30)
VALUES = st.one_of(
    st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), WORDS
)
PARAMS = st.dictionaries(WORDS, VALUES, max_size=6)
POINTS = st.builds(
    Point,
    workload=WORDS,
    params=PARAMS,
    labels=st.dictionaries(WORDS, WORDS, max_size=4),
    repeat=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)


@pytest.mark.parametrize(
    ("parameter", "given_", "value"),
    [
        (WIDTH, "32", 32),
        (WIDTH, 32, 32),
        (RATE, "1e-3", 1e-3),
        (RATE, 2, 2.0),
        (RATE, "0", 0.0),
        (FUSED, "true", True),
        (FUSED, "False", False),
        (FUSED, True, True),
        (PRECISION, "bf16", "bf16"),
        (CHANNELS, "2", 2),
        (Parameter("tag", "a"), 16, "16"),
    ],
)
def test_parse_gives_the_type_of_the_default(parameter: Parameter, given_: object, value: object) -> None:
    parsed = parameter.parse(given_)
    assert parsed == value
    assert type(parsed) is type(parameter.default)


@pytest.mark.parametrize(
    ("parameter", "given_"),
    [
        (WIDTH, "1e2"),
        (WIDTH, "16.0"),
        (WIDTH, 16.0),
        (WIDTH, ""),
        (WIDTH, "many"),
        (WIDTH, True),
        (WIDTH, None),
        (WIDTH, [16]),
        (WIDTH, "0"),
        (WIDTH, -3),
        (WIDTH, 2**63),
        (WIDTH, "9" * 400),
        (WIDTH, "9" * 5000),
        (RATE, "fast"),
        (RATE, False),
        (RATE, "nan"),
        (RATE, "inf"),
        (RATE, float("nan")),
        (RATE, 10**400),
        (RATE, "-0.1"),
        (FUSED, 1),
        (FUSED, "yes"),
        (FUSED, "1"),
        (PRECISION, "fp64"),
        (PRECISION, True),
        (CHANNELS, 3),
        (CHANNELS, True),
    ],
)
def test_parse_refuses_what_does_not_fit(parameter: Parameter, given_: object) -> None:
    with pytest.raises(SaihError, match=parameter.name) as caught:
        parameter.parse(given_, "study.yaml")
    assert str(caught.value).startswith("study.yaml: ")


def test_a_path_is_absolute_before_a_job_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = Parameter("trace", "", path=True)
    assert trace.parse("some/trace.csv") == str(tmp_path / "some" / "trace.csv")
    assert trace.parse("/some/trace.csv") == "/some/trace.csv"
    assert trace.parse("") == "", "none"


def test_parse_says_what_would_fit() -> None:
    with pytest.raises(SaihError, match=r"did you mean bf16.* valid: fp32, bf16"):
        PRECISION.parse("bf61")
    with pytest.raises(SaihError, match=r"valid: 1, 2, 4$"):
        CHANNELS.parse("3")
    with pytest.raises(SaihError, match="at least 1, not 0"):
        WIDTH.parse("0")
    with pytest.raises(SaihError, match="a whole number, not 'x'"):
        WIDTH.parse("x")


@given(st.integers(1, 2**63 - 1))
def test_whole_numbers_survive_text(number: int) -> None:
    assert WIDTH.parse(str(number)) == WIDTH.parse(number) == number


@given(st.floats(0, allow_nan=False, allow_infinity=False))
def test_numbers_survive_text(number: float) -> None:
    assert RATE.parse(repr(number)) == RATE.parse(number) == number


def test_pick_keeps_the_order_of_the_ladder() -> None:
    picked = LADDER.pick(["64", 16, "64"])
    assert [rung.label for rung in picked.rungs] == ["16", "64"]
    assert (picked.name, picked.unit, picked.named) == ("data", "voxels", False)
    assert picked.rungs[1] is LADDER.rungs[2]


def test_names_have_no_size_however_they_are_picked() -> None:
    kinds = axis_of(Parameter("kind", "a", "", "", choices=("a", "b", "c")))
    assert kinds.named
    assert kinds.pick(["a", "c"]).named
    assert axis_of(Parameter("pinned", False, "", ""), [False, True]).named
    assert not axis_of(Parameter("hogs", 0, "", ""), [0, 1, 2]).named


def test_an_axis_alone_means_its_usual_rungs_and_any_other_has_a_name() -> None:
    ladder = Axis("data", "voxels", LADDER.rungs, usual=("32", "16"))
    assert [rung.label for rung in ladder.pick().rungs] == ["16", "32"]
    assert [rung.label for rung in ladder.pick(["64", "16"]).rungs] == ["16", "64"]
    assert LADDER.pick() == LADDER


def test_pick_names_the_rungs_there_are() -> None:
    with pytest.raises(SaihError, match=r"^s\.yaml: unknown rung of axis data '33'; .*valid: 16, 32, 64$"):
        LADDER.pick([16, 33], "s.yaml")


def test_a_parameter_is_an_axis_from_small_to_large() -> None:
    axis = axis_of(WIDTH, ["16", 2, "16", "8"])
    assert [(rung.label, rung.params, rung.size) for rung in axis.rungs] == [
        ("2", {"width": 2}, 2.0),
        ("8", {"width": 8}, 8.0),
        ("16", {"width": 16}, 16.0),
    ]
    assert (axis.name, axis.unit) == ("width", "channels")


def test_choices_make_the_ladder_and_its_order() -> None:
    whole = axis_of(PRECISION)
    assert [(rung.label, rung.size) for rung in whole.rungs] == [("fp32", 0.0), ("bf16", 1.0)]
    assert axis_of(PRECISION, ["bf16", "fp32"]) == whole
    assert [rung.size for rung in axis_of(CHANNELS).rungs] == [1.0, 2.0, 4.0]


def test_free_text_keeps_the_order_given() -> None:
    axis = axis_of(Parameter("tag", "a"), ["z", "b"])
    assert [(rung.label, rung.size) for rung in axis.rungs] == [("z", 0.0), ("b", 1.0)]


def test_a_parameter_without_choices_needs_values() -> None:
    with pytest.raises(SaihError, match="width=A,B"):
        axis_of(WIDTH)
    with pytest.raises(SaihError, match="width must be a whole number"):
        axis_of(WIDTH, ["a"])


def point(**changes: object) -> Point:
    known = {parameter.name: parameter.default for parameter in COMMON}
    whole = {"workload": "toy", "params": known | {"width": 2, "rate": 1.0}, "labels": {"model": "w2"}} | changes
    return Point(**whole)  # type: ignore[arg-type]


def test_identity_is_the_content() -> None:
    same = point()
    assert len(same.id) == len(same.cell) == 16
    assert same.id != same.cell
    for name, value in same.params.items():
        changed = point(params=dict(same.params) | {name: type(value)(value + 1)})
        assert changed.cell != same.cell, name
        assert changed.id != same.id, name
    for changes in ({"seed": 1}, {"workload": "toy2"}):
        changed = point(**changes)
        assert changed.cell != same.cell
        assert changed.id != same.id
    repeated = point(repeat=1)
    assert repeated.cell == same.cell
    assert repeated.id != same.id


def test_identity_does_not_depend_on_how_it_is_written() -> None:
    same = point()
    backwards = point(params=dict(reversed(same.params.items())), labels={"anything": "else"})
    assert backwards.id == same.id


@given(POINTS, POINTS)
def test_equal_identity_means_equal_content(one: Point, other: Point) -> None:
    content = [json.dumps([p.workload, dict(p.params), p.seed], sort_keys=True) for p in (one, other)]
    assert (one.cell == other.cell) == (content[0] == content[1])
    assert (one.id == other.id) == (content[0] == content[1] and one.repeat == other.repeat)


@given(POINTS)
def test_a_point_survives_json(original: Point) -> None:
    value = json.loads(json.dumps(original.to_json()))
    assert (value["id"], value["cell"]) == (original.id, original.cell)
    back = Point.from_json(value)
    assert back == original
    assert (back.id, back.cell, back.folder) == (original.id, original.cell, original.folder)
    assert list(back.labels.items()) == list(original.labels.items())


@given(POINTS)
def test_folder_names_are_safe(any_point: Point) -> None:
    name = any_point.folder
    assert shlex.quote(name) in (name, f"'{name}'")
    assert all(letter.isascii() and (letter.isalnum() or letter in "=._-") for letter in name)
    assert name[0] not in "-.=~"
    assert len(os.fsencode(name)) <= 100
    assert Path(name).name == name
    assert any_point.id[:8] in name


def test_folder_names_show_the_labels() -> None:
    named = point(labels={"data": "64", "model": "w8"}, repeat=2)
    assert named.folder == f"data=64_model=w8_r2_{named.id[:8]}"


@pytest.mark.parametrize("label", ["深" * 100, "x" * 300, "a/b", "..", "x\n$(rm -rf ~)`'\"", "", "-rf"])
def test_folders_can_be_made(tmp_path: Path, label: str) -> None:
    folder = tmp_path / point(labels={"data": label}).folder
    folder.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@given(
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.floats(0, 1e6),
    st.floats(0, allow_nan=False, allow_infinity=False),
)
def test_timed_steps_are_enough_and_within_bounds(steps: int, most: int, seconds: float, step_s: float) -> None:
    timed = point(params={"steps": steps, "max_steps": most, "seconds": seconds}).timed_steps(step_s)
    assert isinstance(timed, int)
    assert steps <= timed <= max(steps, most)
    if steps < timed < most:  # neither bound: the fewest that last `seconds`, with a hair for rounding
        assert Fraction(timed) * Fraction(step_s) >= Fraction(seconds) * (1 - Fraction(1, 10**12))
        assert Fraction(timed - 1) * Fraction(step_s) < Fraction(seconds)


def test_timed_steps_by_hand() -> None:
    fixed = point(params={"steps": 5, "max_steps": 50, "seconds": 1.0})
    assert [fixed.timed_steps(s) for s in (1.0, 0.1, 0.03, 0.001, 0.0)] == [5, 10, 34, 50, 50]


@given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3))
def test_slower_steps_are_never_timed_more_often(one: float, other: float) -> None:
    assume(one < other)
    assert point().timed_steps(one) >= point().timed_steps(other)
