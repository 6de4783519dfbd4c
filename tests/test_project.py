"""Projections: exact laws are projected exactly, intervals cover what they say, and none is called measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saih import cli, store
from saih.analysis.project import RESOURCES, Machine, Sweep, amounts, leave_out, summary
from saih.core import Axis, Params, Rung
from saih.files import write_json
from saih.report.results import read
from saih.verbs.project import _sweep
from tests.synthetic import MACHINE, Outcome, Scenario, make

SIZES = (16, 32, 64, 128, 256, 512)
DATA = Axis("data", "voxels", tuple(Rung(str(size), {"mesh": size}, size) for size in SIZES))
RATES = {"fp32": 1e9, "copy": 1e9, "allreduce-torch": 1e8}


def sweep(folder: Path, step_s: Callable[[Params], float], name: str = "s", **scenario: Any) -> tuple[Path, Sweep]:
    """A ladder of cells that take 1000 FLOP a voxel's side cubed, all but the last measured."""
    given: dict[str, Any] = {
        "axes": (DATA,),
        "repeat": 3,
        "jitter": 0.01,
        "flop": lambda params: 1000.0 * params["mesh"] ** 3,
        "step_s": step_s,
        "shares": {"compute": 1.0},
        "outcome": lambda point: Outcome("pruned", "time", "too long") if point.params["mesh"] == 512 else Outcome(),
        "ceilings": {"rates": RATES, "sources": {}, "machine": MACHINE},
    }
    path = store.gather(make(folder / "jobs", Scenario(**(given | scenario)), name), folder)
    return path, _sweep(read(path))


def target(found: Sweep, size: int) -> Any:
    return found.cells[found.cells["size_data"] == size].iloc[0]


def test_what_is_bound_by_its_ceiling_grows_as_its_work(tmp_path: Path) -> None:
    """Half of the FLOP ceiling at every size: eight times the FLOP is eight times the step."""
    _, found = sweep(tmp_path, lambda params: 1000.0 * params["mesh"] ** 3 / 0.5e9, jitter=0.0)
    row = target(found, 512)
    projected = found.by_ceilings(row, found.amounts.loc[row.name])
    assert projected is not None
    assert projected.value == pytest.approx(1000.0 * 512**3 / 0.5e9, rel=0.02), "1 MB a step takes next to nothing"
    assert "from data=256" in projected.how


def test_a_machine_with_twice_the_ceiling_halves_the_part_it_bounds(tmp_path: Path) -> None:
    """Three quarters compute, one quarter that no ceiling is known of."""
    shares = {"compute": 0.75, "other": 0.25}
    _, found = sweep(tmp_path, lambda params: 1000.0 * params["mesh"] ** 3 / 0.5e9, shares=shares, jitter=0.0)
    row = target(found, 256)
    there = Machine("new", {**RATES, "fp32": 4e9, "copy": 4e9}, {}, None)
    projected = found.by_ceilings(row, found.amounts.loc[row.name], there)
    assert projected is not None
    assert projected.value == pytest.approx(row["step_s"] * (0.75 / 4 + 0.25), rel=1e-6)
    assert projected.how.startswith("ceilings on new, from data=256")


def test_sheets_are_compared_with_sheets_and_what_is_unknown_is_said(tmp_path: Path) -> None:
    _, found = sweep(tmp_path, lambda params: 1.0, jitter=0.0)
    row = target(found, 256)
    sheet = Machine("sheet", {}, {"fp32": 4e9}, None)  # the site's own sheet says 2e9
    projected = found.by_ceilings(row, found.amounts.loc[row.name], sheet)
    assert projected is not None
    assert projected.value == pytest.approx(0.5, rel=0.01)
    nothing = found.by_ceilings(row, found.amounts.loc[row.name], Machine("blank", {}, {}, None))
    assert nothing is not None
    assert nothing.value == pytest.approx(1.0)
    assert "not known there, taken as here: FLOP" in nothing.how


def test_more_ranks_bring_communication_that_was_not_there(tmp_path: Path) -> None:
    """A ring moves 2 (p - 1) / p times the message, at the measured rate."""
    _, found = sweep(tmp_path, lambda params: 1.0, jitter=0.0)
    cells = found.cells.assign(predicted_message_bytes=1e6, param_gpus=4)
    asked = amounts(cells)
    assert asked["communication"].iloc[0] == pytest.approx(1e6 * 2 * 3 / 4)
    assert amounts(found.cells.assign(predicted_message_bytes=1e6))["communication"].iloc[0] == 0.0, "one rank"
    row = cells[cells["size_data"] == 256].iloc[0]
    projected = found.by_ceilings(row, asked.loc[row.name])
    assert projected is not None
    assert projected.value == pytest.approx(1.0 + 1.5e6 / RATES["allreduce-torch"])
    silent = Sweep(found.cells, [], ["data"], Machine("x", {}, {}, None))
    silent.measured, silent.parts = found.measured, found.parts
    assert silent.by_ceilings(row, asked.loc[row.name]) is None, "no rate, no projection"


def test_a_scaling_fit_finds_the_law_again(tmp_path: Path) -> None:
    _, found = sweep(tmp_path, lambda params: 0.1 + 1e-6 * params["mesh"] ** 3)
    projected = found.by_scaling(target(found, 512))
    assert projected is not None
    assert projected.value == pytest.approx(0.1 + 1e-6 * 512**3, rel=0.03)
    assert projected.low < projected.value < projected.high


def test_a_cell_left_out_has_no_say_in_its_own_prediction(tmp_path: Path) -> None:
    """The same prediction, whatever was measured there."""
    found = []
    for number, odd in enumerate((1.0, 50.0)):
        law = lambda params, odd=odd: params["mesh"] ** 3 * 1e-6 * (odd if params["mesh"] == 64 else 1.0)  # noqa: E731
        _, this = sweep(tmp_path, law, f"s{number}")
        found.append({each.method: each.predicted for each in leave_out(this) if each.cell == target(this, 64).name})
    assert found[0].keys() == {"ceilings", "scaling"}
    for method in found[0]:
        before, after = (each[method] for each in found)
        assert (before.value, before.low, before.high) == pytest.approx((after.value, after.low, after.high))


def test_ninety_percent_intervals_cover_about_ninety_percent(tmp_path: Path, tell: Callable[[str], None]) -> None:
    """Ladders whose efficiency wanders by a factor from rung to rung, as that of kernels does."""
    dice = np.random.default_rng(5)
    found = []
    for number in range(12):
        wander = dict(zip(SIZES, np.exp(0.3 * dice.standard_normal(len(SIZES))), strict=True))
        law = lambda params, wander=wander: params["mesh"] ** 3 * 1e-6 * wander[params["mesh"]]  # noqa: E731
        found += [each for each in leave_out(sweep(tmp_path, law, f"s{number}")[1]) if each.method == "ceilings"]
    told = summary(found)
    tell(
        f"ceilings, left out: {told['cells']} cells, median error {100 * told['median_error']:.0f} %, "
        f"90 % intervals cover {100 * told['coverage']:.0f} %"
    )
    assert told["cells"] == 60
    assert 0.8 <= told["coverage"] <= 1.0
    assert summary([]) == {"cells": 0, "median_error": None, "coverage": None}


def test_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    shares = {"input": 0.2, "transfer": 0.1, "compute": 0.4, "communication": 0.2, "other": 0.1}
    _, found = sweep(tmp_path, lambda params: 2.0, shares=shares, jitter=0.0)
    for cell in found.measured:
        parts = dict(zip(RESOURCES, found.parts[cell], strict=True))
        assert sum(parts.values()) == pytest.approx(2.0)
        assert parts["input"] == pytest.approx(0.4)
        assert parts["FLOP"] + parts["memory"] + parts["launch"] == pytest.approx(0.8)


def said(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    assert cli.main(["project", *map(str, words)]) == status
    captured = capsys.readouterr()
    return captured.err if status == 2 else captured.out


def test_the_verb_never_calls_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = sweep(tmp_path, lambda params: 0.1 + 1e-6 * params["mesh"] ** 3)
    text = said(capsys, path)
    assert text.startswith(f"{path}: projected, not measured; ")
    assert "data=512" in text
    assert "data=256  " not in text, "what is measured needs no projection"
    told = json.loads(said(capsys, path, "--json"))
    assert told["kind"] == "projected, not measured"
    (ceilings, scaling) = told["results"][0]["cells"]
    assert (ceilings["method"], scaling["method"]) == ("ceilings", "scaling")
    assert scaling["low_s"] < scaling["step_s"] < scaling["high_s"]
    write_json(tmp_path / "ceilings-new.json", {"rates": {**RATES, "fp32": 2e9}, "site": "new"})
    there = json.loads(said(capsys, path, "--to", tmp_path / "ceilings-new.json", "--json"))["results"][0]["cells"]
    assert len(there) == len(found.measured)
    assert {each["method"] for each in there} == {"ceilings"}, "a fit knows nothing of another machine"
    left = said(capsys, path, "--leave-out")
    assert "by ceilings 5 cells: median error" in left
    assert "by scaling  5 cells: median error" in left
    assert json.loads(said(capsys, path, "--leave-out", "--json"))["results"][0]["summary"]["ceilings"]["cells"] == 5


def test_the_page_tells_projected_from_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = sweep(tmp_path, lambda params: 0.1 + 1e-6 * params["mesh"] ** 3)
    page = tmp_path / "page.html"
    assert said(capsys, path, "-o", page).endswith(f"page     {page}\n")
    source = page.read_text()
    assert "<h1>Projected, not measured</h1>" in source
    drawn = re.findall(r"<tr><th scope=\"row\">([^<]*)</th><td>([^<]*)</td>.*?kind-(\w+)", source)
    assert [x for line, x, kind in drawn if kind == "measured"] == [f"{n}" for n in SIZES if n != 512]
    assert {(line, x) for line, x, kind in drawn if kind == "projected"} == {
        ("by ceilings", "512"),
        ("by scaling", "512"),
    }
    assert f'<th scope="row">scaling</th><td>{len(found.measured)}</td>' in source, "how far it misses"
    write_json(tmp_path / "ceilings-new.json", {"rates": {**RATES, "fp32": 2e9}, "site": "<b>new</b>"})
    said(capsys, path, "--to", tmp_path / "ceilings-new.json", "-o", page, "--json")
    source = page.read_text()
    assert "to &lt;b&gt;new&lt;/b&gt;" in source
    assert not re.search(r"<td class=\"text\"><span class=\"kind kind-measured", source), "nothing was measured there"
    assert said(capsys, path, "--leave-out", "-o", page, status=2).count("\n") == 1


def test_what_makes_no_sense_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = sweep(tmp_path, lambda params: 1.0)
    for words in (["--leave-out", "--to", "local"], ["--to", "nowhere.json"], ["--to", "nowhere"], ["--at", "data"]):
        assert said(capsys, path, *words, status=2).count("\n") == 1
