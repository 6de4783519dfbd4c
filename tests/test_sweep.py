"""The sweep language: words and study files become the grid they say, and every mistake is named with its place."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saih import cli, workload
from saih.core import Sweep
from saih.errors import SaihError
from saih.sweep import (
    make_sweep,
    parse_axes,
    parse_duration,
    parse_settings,
    points,
    sweep_name,
)

NAMES = st.from_regex(r"[a-z_]+", fullmatch=True)
LABELS = st.from_regex(r"[A-Za-z0-9.]+", fullmatch=True)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(name: str = "cosmoflow", axes: Mapping[str, list[str] | None] | None = None, **settings: str) -> Sweep:
    return make_sweep(name, axes or {"data": None}, settings)


@pytest.mark.parametrize(
    ("words", "axes"),
    [
        ([], {}),
        (["data,model"], {"data": None, "model": None}),
        (["data", "model"], {"data": None, "model": None}),
        (["data=32,64,128"], {"data": ["32", "64", "128"]}),
        (["data=32,64,model=w4"], {"data": ["32", "64"], "model": ["w4"]}),
        (["data,gpus=1,2", "model=w4,w8"], {"data": None, "gpus": ["1", "2"], "model": ["w4", "w8"]}),
    ],
)
def test_parse_axes(words: list[str], axes: dict[str, list[str] | None]) -> None:
    parsed = parse_axes(words)
    assert parsed == axes
    assert list(parsed) == list(axes)


@given(st.dictionaries(NAMES, st.lists(LABELS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_axes_with_rungs_can_stand_in_one_word_or_in_many(axes: dict[str, list[str]]) -> None:
    words = [f"{name}={','.join(labels)}" for name, labels in axes.items()]
    assert parse_axes(words) == axes
    assert parse_axes([",".join(words)]) == axes


@pytest.mark.parametrize("words", [["=32"], ["data,,model"], [""], ["data,"], [",data"], [","], [",,"], ["data", ","]])
def test_an_axis_needs_a_name(words: list[str]) -> None:
    with pytest.raises(SaihError, match="an axis has no name; write --axis data,model or --axis data=32,64"):
        parse_axes(words)


@pytest.mark.parametrize("words", [["data=32", "data=64"], ["data", "data"], ["data=32,data=64"], ["data,data=32"]])
def test_an_axis_is_given_once(words: list[str]) -> None:
    with pytest.raises(SaihError, match="--axis data is given twice"):
        parse_axes(words)


def test_parse_settings() -> None:
    assert parse_settings([]) == {}
    assert parse_settings(["width=2,precision=bf16", "batch=4"]) == {"width": "2", "precision": "bf16", "batch": "4"}
    assert parse_settings(["tag=a=b"]) == {"tag": "a=b"}


@pytest.mark.parametrize("word", ["width", "=3", "", "width=2,", "width=2,,batch=3"])
def test_a_setting_has_a_name_and_a_value(word: str) -> None:
    with pytest.raises(SaihError, match="--set NAME=VALUE"):
        parse_settings([word])


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), (" 10 m ", 600), ("2h", 7200), ("0", 0), ("0.5", 0.5)]
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5", "5x", "1e3", "nan", "inf", "5 m s", "10min", "1:30"])
def test_a_duration_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SaihError, match=r"s\.yaml: time_budget .*90s, 10m, 2h"):
        parse_duration(text, "s.yaml: time_budget")


def test_unknown_names_come_with_the_nearest_ones() -> None:
    with pytest.raises(SaihError, match="unknown workload 'cosmoflw'; did you mean cosmoflow") as caught:
        make("cosmoflw")
    assert "ceilings" in str(caught.value)
    with pytest.raises(SaihError, match="unknown axis 'dat'; did you mean data"):
        make(axes={"dat": None})
    with pytest.raises(SaihError, match=r"unknown rung of axis data '65'; did you mean 64.* valid: 16, 32, 64, 128"):
        make(axes={"data": ["65"]})
    with pytest.raises(SaihError, match="unknown parameter 'widht'; did you mean width"):
        make(widht="3")
    with pytest.raises(SaihError, match="unknown value of precision 'fp8'; did you mean fp32"):
        make(precision="fp8")
    with pytest.raises(SaihError, match="a sweep needs an axis; cosmoflow has: data, model"):
        make_sweep("cosmoflow", {}, {})


def test_a_parameter_is_set_in_one_place() -> None:
    with pytest.raises(SaihError, match="--set width: axis model already sets width"):
        make(axes={"model": None}, width="3")
    with pytest.raises(SaihError, match="--set batch: axis batch already sets batch"):
        make(axes={"batch": ["1"]}, batch="3")
    with pytest.raises(SaihError, match="axes model and width both set width"):
        make(axes={"model": None, "width": ["1", "2"]})


def test_the_grid_is_full_and_repeats_are_outermost() -> None:
    sweep = replace(make(axes={"data": ["64", "32"], "gpus": ["1", "2"]}, batch="4"), repeat=3, seed=7)
    grid = points(sweep, {"warmup": 1, "batch": 8, "kernel": "copy"})  # the last is for another workload
    combinations = list(itertools.product((0, 1, 2), ("32", "64"), ("1", "2")))
    assert [(p.repeat, p.labels["data"], p.labels["gpus"]) for p in grid] == combinations
    assert [(p.params["mesh"], p.gpus) for p in grid] == [(int(mesh), int(gpus)) for _, mesh, gpus in combinations]
    assert len({p.id for p in grid}) == 12
    assert len({p.cell for p in grid}) == 4
    assert {p.seed for p in grid} == {7}
    known = workload.parameters(workload.spec("cosmoflow"))
    for p in grid:
        assert set(p.params) == set(known)
        assert (p.params["warmup"], p.params["batch"]) == (1, 4)  # the site's default; the command line over the site's
        assert p.params["width"] == known["width"].default


@given(
    st.lists(st.sampled_from(["16", "32", "64", "128"]), min_size=1),
    st.lists(st.sampled_from(["w4", "w8", "w16"]), min_size=1),
    st.integers(1, 4),
)
def test_grid_size(data: list[str], model: list[str], repeat: int) -> None:
    sweep = replace(make_sweep("cosmoflow", {"data": data, "model": model}, {}), repeat=repeat)
    assert len(points(sweep, {})) == len(set(data)) * len(set(model)) * repeat


def test_a_site_default_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SaihError, match="site local: defaults: batch must be at least 1"):
        points(make(), {"batch": 0})


def test_a_site_default_that_no_workload_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SaihError, match="site local: defaults: unknown parameter 'gpuss'; did you mean gpus") as caught:
        points(make(), {"batch": 2, "gpuss": 2})
    assert "kernel" in str(caught.value), "those of other workloads are valid too"
    packages = dict(workload.packages()) | {"broken": "no.such.package"}
    monkeypatch.setattr(workload, "packages", lambda: packages)
    assert points(make(), {"kernel": "copy"}), "a workload that is broken spoils nothing"
    with pytest.raises(SaihError, match="unknown parameter 'gpuss'"):
        points(make(), {"gpuss": 2})


def test_a_grid_beyond_all_bounds_is_refused_before_it_is_built() -> None:
    values = [str(number) for number in range(1, 1001)]
    sweep = make(axes={"batch": values, "warmup": values})
    with pytest.raises(
        SaihError, match=r"2,000,000 points \(batch 1000 x warmup 1000 x 2 repeats\), more than 1,000,000"
    ):
        points(replace(sweep, repeat=2), {})
    with pytest.raises(SaihError, match=r"6,000,000,000,000 points"):
        points(replace(make(), repeat=10**12), {})


def name_of(sweep: Sweep) -> str:
    return sweep_name(sweep, points(sweep, {}))


def test_the_name_of_a_sweep_is_its_content() -> None:
    base = make(axes={"data": ["32", "64"]})
    assert re.fullmatch(r"cosmoflow-data-[0-9a-f]{8}", name_of(base))
    assert name_of(make(axes={"data": ["64", "32"]})) == name_of(base)
    assert name_of(replace(base, repeat=5)) == name_of(base)
    assert name_of(make(axes={"gpus": ["1", "2"]})) == name_of(make(axes={"gpus": ["2", "1"]}))
    others = [
        make(axes={"data": ["32"]}),
        make(axes={"data": ["32", "64"]}, batch="3"),
        make(axes={"data": ["32", "64"]}, steps="6"),
        replace(base, site="elsewhere"),
        replace(base, seed=1),
        make(axes={"data": ["32", "64"], "gpus": ["1"]}),
    ]
    assert len({name_of(sweep) for sweep in [base, *others]}) == 1 + len(others)


STUDY = """\
# every key there is
workload: cosmoflow
axes:
  data: [32, 64]
  gpus: [1, "2"]
  precision:
set:
  batch: 4
  scaling: strong
  seconds: 0.5
repeat: 2
seed: 5
time_budget: 90
"""


def asked(*words: str) -> Sweep:
    (one,) = all_asked(*words)
    return one


def all_asked(*words: str) -> list[Sweep]:
    return cli._asked(cli._parser().parse_args(["sweep", *words]))[1]


def test_a_study_is_the_command_line_written_down(workplace: Path) -> None:
    (workplace / "study.yaml").write_text(STUDY)
    words = "cosmoflow --axis data=32,64,gpus=1,2 --axis precision --set batch=4,scaling=strong,seconds=0.5 --repeat 2"
    typed = asked(*words.split(), "--seed=5", "--time-budget=90s")
    assert asked("study.yaml") == typed
    assert name_of(asked("study.yaml")) == name_of(typed)


def test_the_command_line_goes_over_a_study(workplace: Path) -> None:
    (workplace / "study.yaml").write_text(STUDY)
    changed = asked("study.yaml", "--axis=data=16", "--set=batch=2", "--repeat=1", "--seed=0", "--time-budget=2m")
    assert [[rung.label for rung in axis.rungs] for axis in changed.axes] == [["16"]]
    assert changed.overrides == {"batch": 2, "scaling": "strong", "seconds": 0.5}
    assert (changed.repeat, changed.seed, changed.time_budget_s) == (1, 0, 120)


PARTS = """
set: {batch: 4, seconds: 0.1}
parts:
  widths: {axes: {model: [w4, w8]}}
  ranks: {axes: {gpus: [1, 2]}, set: {samples: 4, seconds: 1}}
repeat: 2
"""


def test_parts_of_a_study_are_sweeps_of_their_own(workplace: Path) -> None:
    (workplace / "study.yaml").write_text(PARTS)
    widths, ranks = all_asked("study.yaml", "--set=steps=3")
    assert widths == asked("--axis=model=w4,w8", "--set=batch=4,seconds=0.1,steps=3", "--repeat=2")
    assert ranks == asked("--axis=gpus=1,2", "--set=batch=4,seconds=1,samples=4,steps=3", "--repeat=2")
    assert asked("study.yaml", "--part=ranks", "--set=steps=3") == ranks
    assert [axis.name for axis in asked("study.yaml", "--part=ranks", "--axis=data=16").axes] == ["data"]


def test_a_part_can_be_of_another_workload(workplace: Path) -> None:
    (workplace / "study.yaml").write_text(
        "parts:\n  a: {axes: {data: [16]}}\n  b: {workload: ceilings, axes: {kernel: }}\n"
    )
    assert [one.workload for one in all_asked("study.yaml")] == ["cosmoflow", "ceilings"]


def test_a_part_can_have_repeats_of_its_own(workplace: Path) -> None:
    (workplace / "study.yaml").write_text(
        "repeat: 2\nparts:\n  a: {axes: {data: [16]}}\n  b: {axes: {data: [16]}, repeat: 7}\n"
    )
    assert [one.repeat for one in all_asked("study.yaml")] == [2, 7]
    assert [one.repeat for one in all_asked("study.yaml", "--repeat=4")] == [4, 4]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (PARTS, ["--part=rank"], r"^study\.yaml: unknown part 'rank'; did you mean ranks\? valid: widths, ranks"),
        (PARTS, ["--axis=data"], r"^study\.yaml has 2 parts; say whose axes --axis replaces: --part NAME"),
        (PARTS + "axes: {data: [32]}\n", [], r"^study\.yaml: a study has axes, or parts with axes, not both"),
        ("axes: {data: [32]}\n", ["--part=a"], r"^study\.yaml: unknown part 'a'"),
    ],
)
def test_mistakes_with_parts(text: str, words: list[str], message: str, workplace: Path) -> None:
    (workplace / "study.yaml").write_text(text)
    with pytest.raises(SaihError, match=message):
        all_asked("study.yaml", *words)


def test_only_studies_have_parts(workplace: Path) -> None:
    with pytest.raises(SaihError, match="only a study file has parts"):
        all_asked("cosmoflow", "--axis=data", "--part=a")


def test_a_study_needs_only_axes(workplace: Path) -> None:
    (workplace / "study.yml").write_text("axes: {data: }\n")
    assert asked("study.yml") == asked("--axis=data")


KEYS = "valid.*: workload, axes, set, repeat, parts, seed, site, time_budget"
AXES = "axes: {data: [32]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXES + "repeats: 3\n", rf"^bad\.yaml:2: unknown key 'repeats'; did you mean repeat or parts\? {KEYS}"),
        ("workload: cosmoflow\n", r"^bad\.yaml: a sweep needs an axis; cosmoflow has: data, model"),
        ("", rf"^bad\.yaml: must be a mapping of keys; {KEYS}"),
        ("- data\n- model\n", rf"^bad\.yaml: must be a mapping of keys; {KEYS}"),
        ("axes: [data]\n", r"^bad\.yaml:1: axes: must be a mapping of keys, not \['data'\]; write axes: {data"),
        (
            "axes:\n  model:\n  data: 32\n",
            r"^bad\.yaml:3: axes\.data: must be a list, not 32; write axes: {data: \[32, 64\], model: }",
        ),
        (AXES + "repeat: often\n", r"^bad\.yaml:2: repeat: .* valid integer.*, not 'often'"),
        (AXES + "repeat: 0\n", r"^bad\.yaml:2: repeat: .*greater than 0, not 0"),
        (AXES + "seed: -1\n", r"^bad\.yaml:2: seed: .*greater than or equal to 0, not -1"),
        (
            AXES + "set:\n  batch: 2\n  width: [1]\n",
            r"^bad\.yaml:4: set\.width: must be true .*, not \[1\]; write set: {width: 4",
        ),
        (
            AXES + "set: {width: [4]}\n",
            r"set\.width: must be true or false, a whole number, a number or text, not \[4\]",
        ),
        ("axes: {data: 16}\n", r"^bad\.yaml:1: axes\.data: must be a list, not 16; write axes: .* list of rungs"),
        ("axes: {data: [[16]]}\n", r"^bad\.yaml:1: axes\.data\.0: must be true .*, not \[16\]; write axes: "),
        (AXES + "set: {width: wide}\n", r"^bad\.yaml: width must be a whole number, not 'wide'"),
        (AXES + "set: {width: 0}\n", r"^bad\.yaml: width must be at least 1, not 0"),
        (AXES + "set: {widht: 4}\n", r"^bad\.yaml: unknown parameter 'widht'; did you mean width"),
        (AXES + "set: {mesh: 32}\n", r"^bad\.yaml: --set mesh: axis data already sets mesh"),
        ("axes: {data: [33]}\n", r"^bad\.yaml: unknown rung of axis data '33'; .*valid: 16, 32, 64"),
        ("axes: {date: }\n", r"^bad\.yaml: unknown axis 'date'; did you mean data"),
        ("axes: {}\n", r"^bad\.yaml: a sweep needs an axis; cosmoflow has: data, model"),
        ("workload: cosmo\naxes: {data: }\n", r"^bad\.yaml: unknown workload 'cosmo'; did you mean cosmoflow"),
        (AXES + "site: nowhere\n", r"unknown site 'nowhere'"),
        (AXES + "time_budget: soon\n", r"^bad\.yaml: time_budget 'soon': write a number of seconds"),
        (AXES + "time_budget: 2024-13-45\n", r"^bad\.yaml: not valid YAML \(month must be in 1\.\.12\)"),
        (AXES + "set: {width: 4\n", r"^bad\.yaml:3: not valid YAML"),
        ("axes: {data: [32]}\n\tset: 3\n", r"^bad\.yaml:2: not valid YAML"),
        ("axes: &a [*a]\n", r"^bad\.yaml"),
        ("a: &a [*b]\n", r"^bad\.yaml:1: not valid YAML"),
        ("axes: !!python/object/apply:os.getcwd []\n", r"^bad\.yaml:1: not valid YAML"),
        (AXES + AXES, r"^bad\.yaml:2: key axes is given twice"),
        ("axes:\n  data: [32]\n  data: [64]\n", r"^bad\.yaml:3: key data is given twice"),
        ("axes: {data: []}\n", r"^bad\.yaml: axis data has no rungs"),
        (AXES + "3: 4\n", r"^bad\.yaml:2: 3: keys should be strings"),
        ("axes: {data: [32]}\0\n", r"^bad\.yaml: not valid YAML"),
        ("axes: " + "[" * 5000, r"^bad\.yaml: not valid YAML"),
    ],
)
def test_a_mistake_in_a_study_is_named_with_its_place(workplace: Path, text: str, message: str) -> None:
    (workplace / "bad.yaml").write_text(text)
    with pytest.raises(SaihError, match=message):
        asked("bad.yaml")


def test_a_study_that_cannot_be_read(workplace: Path) -> None:
    (workplace / "latin.yaml").write_bytes(b"axes: \xe4\n")
    (workplace / "folder.yaml").mkdir()
    for name in ("latin.yaml", "folder.yaml", "missing.yaml"):
        with pytest.raises(SaihError, match=rf"^{name}: cannot be read"):
            asked(name)
