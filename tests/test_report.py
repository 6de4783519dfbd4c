"""The page says what was measured, hides nothing that was not, trusts no text in it, and stands alone."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html
import io
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from saih import cli, site, store, sweep
from saih.analysis import numbers
from saih.core import Axis, Params, Rung
from saih.errors import SaihError
from saih.files import read_json, write_json
from saih.report import asked, contention, figures, page, results, roofline, trade, trends
from saih.report.grid import layout, spread
from saih.site import Peak
from tests import browser
from tests.synthetic import CEILINGS, DATA, MACHINE, MODEL, SITE, Outcome, Scenario, ladder, make

LABELS: dict[str, list[Any]] = {"data": ["16", "32"], "gpus": ["1", "2"]}
HOSTILE = "<script>alert('x')</script> & \"quotes\""
MEASURE_OVERFLOW = """<!DOCTYPE html><title>?</title>
<iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement
  document.title = "overflow " + (root.scrollWidth - root.clientWidth)
}}</script>"""


def gathered(folder: Path, scenario: Scenario) -> Path:
    return store.gather(make(folder / "jobs", scenario), folder / "results", mixed=True)


def written(folder: Path, scenario: Scenario) -> str:
    return page.write(gathered(folder, scenario), folder / "page.html").read_text()


def text_of(source: str) -> str:
    """What a reader sees: tags out, entities resolved, white space narrowed."""
    body = re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def csv_of(source: str, table: str) -> pd.DataFrame:
    """The table carried in the page, unpacked and its parts put together."""
    links = re.findall(rf'download="[^"]*\.{table}[^"]*\.csv(?:\.gz)?" href="data:(\S+?);base64,([^"]*)"', source)
    assert links
    parts = [(kind, base64.b64decode(link)) for kind, link in links]
    return pd.concat(
        pd.read_csv(io.BytesIO(gzip.decompress(part) if kind == "application/gzip" else part)) for kind, part in parts
    )


def step_of_grid(params: Params) -> float:
    """1e8 FLOP in these times is 10, 20, 40 and 80 % of 1 GFLOP/s."""
    return {(16, 4): 1.0, (16, 8): 0.5, (32, 4): 0.25, (32, 8): 0.125}[int(params["mesh"]), int(params["width"])]


GPUS = Axis("gpus", "per node", tuple(Rung(str(n), {"gpus": n}, n) for n in (1, 2, 4)))
NOMINAL = SITE.model_copy(update={"peak": Peak(flop_per_s={"fp32": 2e9}, source="nominal: 1 core x 2 GHz")})


def slower_together(params: Params) -> float:
    """Every doubling of the ranks makes a step longer by a quarter."""
    return step_of_grid(params) * {1: 1.0, 2: 1.25, 4: 1.6}[int(params["gpus"])]


def failing(point: Any) -> Outcome:
    return {
        "16w4": Outcome("failed", "out-of-memory", HOSTILE, f"Traceback\n{HOSTILE}"),
        "16w8": Outcome("pruned", "memory", "needs 99 GiB a rank; 8 GiB there"),
        "32w4": Outcome("missing"),
    }.get(point.labels["data"] + point.labels["model"], Outcome())


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("grid"), Scenario(step_s=step_of_grid))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("troubled"), Scenario(outcome=failing))


def test_headline_is_the_range_over_all_cells_against_both_denominators(grid: str) -> None:
    text = text_of(grid)
    assert "10.0 % → 80.0 % of measured ceiling" in text
    assert "5.00 % → 40.0 % of data sheet" in text
    assert "Lowest at data=16 model=w4 , highest at data=32 model=w8" in text
    assert "measured ceiling, fp32: 1.00 GFLOP/s a device (gemm of size 1024)" in text
    assert "data sheet, fp32: 2.00 GFLOP/s a device (test data sheet)" in text
    assert "4 cells measured 0 cells failed 0 cells pruned 0 cells missing" in text


def test_headline_for_the_terminal(tmp_path: Path) -> None:
    first, second = page.headline(gathered(tmp_path, Scenario(step_s=step_of_grid))).splitlines()
    assert first == "10.0 % -> 80.0 % of measured ceiling, 5.00 % -> 40.0 % of data sheet, on testbed (Test CPU)"
    assert second == "lowest at data=16 model=w4, highest at data=32 model=w8"


ABLATION = Axis(
    "ablation", "", tuple(Rung(part, {"ablation": part}, at) for at, part in enumerate(("none", "compute"))), named=True
)
READERS = Axis("load_readers", "", tuple(Rung(str(count), {"load_readers": count}, count) for count in (0, 2)))


def disturbed(params: Params) -> float:
    """Nothing to compute: a thousand times as fast; two readers beside: half as fast."""
    return (
        step_of_grid(params) * (1e-3 if params["ablation"] != "none" else 1.0) * (1 + float(params["load_readers"]) / 2)
    )


def test_what_was_disturbed_on_purpose_is_not_taken_for_performance(tmp_path: Path) -> None:
    axes = (DATA, MODEL, ABLATION, READERS)
    results = gathered(tmp_path, Scenario(axes=axes, step_s=disturbed, workload="cosmoflow", repeat=3, jitter=0.001))
    first, second = page.headline(results).splitlines()
    assert first == "10.0 % -> 80.0 % of measured ceiling, 5.00 % -> 40.0 % of data sheet, on testbed (Test CPU)"
    assert second == "lowest at data=16 model=w4, highest at data=32 model=w8"
    source = page.write(results, tmp_path / "page.html").read_text()
    assert re.findall(r"<b>([\d.]+)</b><small>", source) == ["10.0", "40.0", "20.0", "80.0"]
    assert "16 cells measured" in text_of(source)
    assert source.count("<figcaption><strong>ablation") == 0
    cells = csv_of(source, "cells")
    assert cells.loc[cells["label_ablation"] != "none", "percent_of_peak"].isna().all()
    claims = {claim["name"]: claim for claim in cli._claims_of([results])}
    assert claims["percent-of-peak-rises-with-data"]["measured"] == pytest.approx(4.0, rel=0.01)
    assert claims["percent-of-peak-rises-with-data"]["pairs"] == 2


def test_contention_is_drawn_and_says_what_storage_delivered(tmp_path: Path) -> None:
    scenario = Scenario(axes=(DATA, READERS), step_s=lambda params: 1 + 0.25 * float(params["load_readers"]))
    path = gathered(tmp_path, scenario)
    source = page.write(path, tmp_path / "page.html").read_text()
    assert "Step time beside readers, over that without: data=16 1 to 1.5 times; data=32 1 to 1.5 times" in source
    found = results.read(path)
    group = contention.figure(found)
    assert group is not None
    [panel] = group.panels
    drawn = [(line.label, line.x, line.y) for line in panel.lines]
    assert drawn == [(f"data={size}", [0.0, 2.0], pytest.approx([1.0, 1.5])) for size in (16, 32)]
    cells = found.cells.assign(storage_read_bytes=2e6, file_read_bytes=1e6)
    told = contention.rows(dataclasses.replace(found, cells=cells))
    assert [row["read"] for row in told] == ["2.00 MB of 1.00 MB"] * 4
    assert contention.figure(results.read(gathered(tmp_path / "none", Scenario()))) is None


SHARED = {
    "rates": {"fp32": 1e9, "copy": 1e15, "allreduce-torch": 1e15},
    "together": {"fp32": {"2": 0.6}, "copy": {"2": 1.0}},
    "sources": {},
    "machine": MACHINE,
}


def on_a_shared_core(params: Params) -> float:
    """Of a step of a second, 0.8 computes, at 0.6 of its speed beside another rank."""
    return 0.2 + 0.8 / (0.6 if params["gpus"] == 2 else 1.0)


def test_twice_the_ranks_is_predicted_and_compared_where_it_was_tried(tmp_path: Path) -> None:
    ranks = Axis("gpus", "per node", GPUS.rungs[:2])
    scenario = Scenario(axes=(DATA, ranks), workload="cosmoflow", ceilings=SHARED, repeat=3, step_s=on_a_shared_core)
    scenario = dataclasses.replace(scenario, shares={"input": 0.2, "compute": 0.8})
    source = page.write(gathered(tmp_path, scenario), tmp_path / "page.html").read_text()
    gain = 2 / (0.2 + 0.8 / 0.6)
    cells = r'predicted">([\d.]+) x</td><td class="measured-value">([\d.]+) x [^<]+</td><td>([^<]+) %'
    found = [tuple(map(float, row)) for row in re.findall(cells, source)]
    assert found == [pytest.approx((gain, gain, 0.0), abs=0.01)] * 2
    reading = dataclasses.replace(scenario, shares={"input": 0.8, "compute": 0.2})
    assert "Twice the ranks" not in page.write(gathered(tmp_path / "reading", reading), tmp_path / "r.html").read_text()
    alone = dataclasses.replace(scenario, axes=(DATA,))
    source = page.write(gathered(tmp_path / "alone", alone), tmp_path / "alone.html").read_text()
    assert source.count(f'predicted">{gain:.2f} x</td><td class="measured-value">{numbers.ABSENT}') == 2


def test_headline_keeps_growth_apart_from_ranks(tmp_path: Path) -> None:
    results = gathered(tmp_path, Scenario(axes=(DATA, MODEL, GPUS), step_s=slower_together))
    first, second, third = page.headline(results).splitlines()
    assert (
        first == "10.0 % -> 80.0 % of measured ceiling, 5.00 % -> 40.0 % of data sheet, on testbed (Test CPU), 1 rank"
    )
    assert second == "6.25 % -> 50.0 % of measured ceiling, 3.12 % -> 25.0 % of data sheet, on 4 ranks"
    assert third == "lowest at data=16 model=w4 gpus=1, highest at data=32 model=w8 gpus=1"
    text = text_of(page.write(results, tmp_path / "page.html").read_text())
    assert "10.0 % → 80.0 % of measured ceiling, on 1 rank" in text
    assert "6.25 % → 50.0 % of measured ceiling, on 4 ranks" in text
    assert "highest at data=32 model=w8 gpus=1 , over all measured cells on 1 rank." in text


def test_headline_tells_how_certain_it_is(tmp_path: Path) -> None:
    results = gathered(tmp_path, Scenario(step_s=step_of_grid, repeat=2, jitter=0.002))
    text = text_of(page.write(results, tmp_path / "page.html").read_text())
    told = re.search(
        r"95 % intervals ([\d.]+) to ([\d.]+) % and ([\d.]+) to ([\d.]+) %, between repeats, 2 repeats", text
    )
    assert told
    low, low_high, high, high_high = map(float, told.groups())
    assert (low, low_high, high, high_high) == pytest.approx((9.75, 10.25, 78.0, 82.0), rel=0.005)
    alone = text_of(written(tmp_path / "alone", Scenario(step_s=step_of_grid)))
    assert "95 % intervals 10.0 to 10.0 % and 80.0 to 80.0 %, within one run, 1 repeat" in alone


def test_a_nominal_peak_is_not_called_a_data_sheet(tmp_path: Path) -> None:
    results = gathered(tmp_path, Scenario(step_s=step_of_grid, site=NOMINAL))
    source = page.write(results, tmp_path / "page.html").read_text()
    assert "data sheet" not in source
    assert "nominal peak, fp32: 2.00 GFLOP/s a device (nominal: 1 core x 2 GHz)" in text_of(source)
    assert "% of nominal peak</text>" in source, "the figure's axis"
    assert "% of nominal peak over data</title>" in source
    assert "<small>nominal peak</small>" in source
    assert "5.00 % -> 40.0 % of nominal peak" in page.headline(results)


def test_without_ceilings_a_nominal_peak_is_called_so_too(tmp_path: Path) -> None:
    source = written(tmp_path, Scenario(step_s=step_of_grid, site=NOMINAL, ceilings=None))
    assert "percentages of the nominal peak alone" in source
    assert "data sheet" not in source


def test_ceilings_are_point_estimates_and_their_intervals_are_told(grid: str, tmp_path: Path) -> None:
    assert "do not include the uncertainty of the ceiling." in text_of(grid)
    known = dict(CEILINGS) | {"intervals": {"fp32": [0.97e9, 1.02e9], "copy": None}}
    text = text_of(written(tmp_path, Scenario(ceilings=known)))
    assert "whose own 95 % interval is 0.970 to 1.02 GFLOP/s (fp32)." in text


def test_conventions_say_that_nothing_overlaps_between_steps(grid: str) -> None:
    assert "the ranks are lined up before each step" in text_of(grid)
    assert "prefetches" in text_of(grid)


def test_memory_is_called_what_it_is(grid: str, tmp_path: Path) -> None:
    assert "resident memory whole process, largest rank" in text_of(grid)
    assert "1.00 GB" in text_of(grid)
    assert "host_peak_bytes" in csv_of(grid, "cells")
    folder = make(tmp_path / "jobs", Scenario(site=SITE.model_copy(update={"device": "cuda"})))
    for path in folder.points.glob("*/measurement.json"):
        told = read_json(path)
        write_json(path, told | {"per_rank": told["per_rank"] | {"device_peak_bytes": [7e6]}}, durable=False)
    source = page.write(store.gather(folder, tmp_path / "results"), tmp_path / "page.html").read_text()
    assert "peak memory allocated on the device, largest rank" in text_of(source)
    assert "7.00 MB" in text_of(source)
    assert "1.00 GB" not in text_of(source)
    assert "esident" not in text_of(source)


def test_a_page_from_a_study_file_can_be_asked_again(tmp_path: Path) -> None:
    there = SITE.model_copy(update={"nodes": 1})
    scenario = Scenario(command=("saih", "sweep", "my study.yaml"), params={"precision": "bf16"}, repeat=2, site=there)
    source = written(tmp_path, scenario)
    text = text_of(source)
    assert "saih sweep 'my study.yaml'" in text
    assert (
        "saih sweep synthetic --axis data=16,32 --axis model=w4,w8 --set precision=bf16 "
        "--repeat 2 --seed 0 --site testbed" in text
    )
    assert "data voxels 16 (mesh=16) , 32 (mesh=32)" in text
    assert "seed 0; 2 repeats of each cell; set: precision=bf16" in text
    same = text[text.index("every point has:") :]
    same = same[: same.index("Site testbed")]
    assert "nodes=1" in same
    assert "precision=bf16" in same
    assert "mesh=" not in same
    told = re.search(r"<code>sites/testbed.yaml</code></summary><pre>(.*?)</pre>", source, re.DOTALL)
    assert told
    (tmp_path / "testbed.yaml").write_text(html.unescape(told[1]))
    assert site.load(str(tmp_path / "testbed.yaml")) == there


def test_the_full_command_is_understood() -> None:
    described = {
        "workload": "cosmoflow",
        "axes": [{"name": name, "rungs": [{"label": a} for a in labels]} for name, labels in LABELS.items()],
        "overrides": {"precision": "bf16", "seconds": 0.5},
        "repeat": 3,
        "seed": 7,
        "site": {"name": "local"},
        "time_budget_s": 600.0,
    }
    given = cli._parser().parse_args(shlex.split(asked.in_full(described))[1:])
    assert (given.workload, given.repeat, given.seed, given.site) == ("cosmoflow", 3, 7, "local")
    assert sweep.parse_axes(given.axis) == LABELS
    assert sweep.parse_settings(given.set) == {"precision": "bf16", "seconds": "0.5"}
    assert sweep.parse_duration(given.time_budget) == 600


def test_heat_map_has_both_percentages_of_every_cell(grid: str) -> None:
    shown = re.findall(r"<b>([\d.]+)</b><small>\(([\d.]+)\)</small>", grid)
    assert shown == [("10.0", "5.00"), ("40.0", "20.0"), ("20.0", "10.0"), ("80.0", "40.0")]


def test_table_tells_measured_from_predicted(grid: str) -> None:
    assert '<span class="measured-value">125 ms</span>' in grid
    assert re.search(r'<td class="predicted">62\.5 ms<small class="under">measured: 2\.00', grid)
    assert "800 M" in text_of(grid)


def test_reads_from_memory_are_not_called_storage(tmp_path: Path) -> None:
    assert ">page cache<" in written(tmp_path / "cached", Scenario(storage_read_bytes=10.0))
    assert ">page cache<" not in written(tmp_path / "cold", Scenario(storage_read_bytes=1e6))


def test_what_is_not_measured_is_shown_with_its_reason(troubled: str) -> None:
    text = text_of(troubled)
    assert "1 cell measured 1 cell failed 1 cell pruned 1 cell missing" in text
    assert "needs 99 GiB a rank; 8 GiB there" in text
    assert "not run yet" in text
    assert "end of the log Traceback" in text
    assert re.search(r'<td class="failed"[^>]*>failed<br>out-of-memory</td>', troubled)
    assert re.search(r'<td class="pruned" title="needs 99 GiB[^>]*>pruned<br>memory</td>', troubled)
    assert '<td class="missing" title="not run yet">missing</td>' in troubled


def test_hostile_text_stays_text(troubled: str, tmp_path: Path) -> None:
    axis = Axis(HOSTILE, HOSTILE, (Rung(HOSTILE, {"mesh": 1}, 1), Rung("$x_1$", {"mesh": 2}, 2)))
    peak = Peak(flop_per_s={"fp32": 2e9}, source=HOSTILE)
    place = SITE.model_copy(update={"description": HOSTILE, "peak": peak, "setup": (HOSTILE,)})
    scenario = Scenario(
        axes=(axis, MODEL),
        site=place,
        params={"note": HOSTILE},
        environment=lambda point: {"host": HOSTILE},
        command=(HOSTILE,),
    )
    for page_of in (troubled, written(tmp_path, scenario)):
        source, own = page_of.split("\n<script>\n")
        assert "<script" not in source + own
        assert not re.search(r"\son\w+=", re.sub(r"&#?\w+;", "", source))
        assert HOSTILE in text_of(source)


def test_page_needs_nothing_from_elsewhere(grid: str) -> None:
    targets = re.findall(r'(?:src|href|action|data)="([^"]*)"', grid) + re.findall(r"url\(([^)]*)\)", grid)
    assert targets
    assert {target[:1] for target in targets if not target.startswith(("data:text/csv", "data:application/gzip"))} == {
        "#"
    }
    assert "@import" not in grid
    ids = re.findall(r'\sid="([^"]*)"', grid)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in targets if target.startswith("#")} <= set(ids)


def test_downloads_hold_the_tables(tmp_path: Path) -> None:
    results = gathered(tmp_path, Scenario(step_s=step_of_grid, repeat=2, outcome=failing, jitter=0.1))
    source = page.write(results, tmp_path / "page.html").read_text()
    points, samples, cells = (csv_of(source, table) for table in ("points", "samples", "cells"))
    assert points["id"].tolist() == store.load(results)["id"].tolist()
    assert points["status"].tolist() == store.load(results)["status"].tolist()
    assert samples["step_s"].to_numpy() == pytest.approx(store.load_samples(results)["step_s"].to_numpy())
    assert len(cells) == 4
    assert cells["percent_of_peak"].dropna().to_numpy() == pytest.approx([80], rel=0.01)


def test_large_tables_come_packed_in_parts_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saih.report.downloads.PLAIN_BYTES", 100)
    packed = written(tmp_path / "packed", Scenario())
    assert len(csv_of(packed, "samples")) == 24
    assert packed.count('.samples.csv.gz"') == 1
    assert written(tmp_path / "again", Scenario()) == packed, "the same results make the same page"
    monkeypatch.setattr("saih.report.downloads.PART_BYTES", 300)
    parts = written(tmp_path / "parts", Scenario())
    assert len(csv_of(parts, "samples")) == 24
    assert len(re.findall(r'download="[^"]*samples', parts)) > 1
    monkeypatch.setattr("saih.report.downloads.LIMIT_BYTES", 300)
    assert "too large to carry in this page" in written(tmp_path / "none", Scenario())


def test_without_ceilings_the_data_sheet_stands_alone_and_says_so(tmp_path: Path) -> None:
    text = text_of(written(tmp_path, Scenario(step_s=step_of_grid, ceilings=None)))
    assert "5.00 % → 40.0 % of data sheet" in text
    assert "no measured ceiling" in text


def test_without_flop_the_work_stands_in(tmp_path: Path) -> None:
    text = text_of(written(tmp_path, Scenario(step_s=step_of_grid, flop=lambda params: 0.0)))
    assert "2.00 → 16.0 units of work/s" in text
    assert "counts no FLOP" in text


def test_nothing_measured_is_a_page_too(tmp_path: Path) -> None:
    scenario = Scenario(workload="cosmoflow", outcome=lambda point: Outcome("failed", "error", "broken"))
    results = gathered(tmp_path, scenario)
    text = text_of(page.write(results, tmp_path / "page.html").read_text())
    assert "Nothing was measured" in text
    assert "no measured point has percent_of_peak" in text
    assert page.headline(results) == "nothing measured on testbed (Test CPU)"


def test_scaling_names_its_base_and_kind(tmp_path: Path) -> None:
    scenario = Scenario(
        axes=(GPUS,), step_s=lambda params: {1: 1.0, 2: 1.25, 4: 1.6}[int(params["gpus"])], params={"scaling": "weak"}
    )
    source = written(tmp_path, scenario)
    assert "4 4 1 5.00 2.50 – 4.00 62.5 –" in spaced(source), "one repeat gives no interval"  # noqa: RUF001
    assert "Weak scaling." in text_of(source)
    assert 'id="scaling-speed-up-title"' in source


def test_efficiency_has_its_interval(tmp_path: Path) -> None:
    slower = {(1, 0): 1.0, (1, 1): 1.0, (2, 0): 1.25, (2, 1): 1.6}
    folders = [
        make(
            tmp_path / str(repeat),
            Scenario(axes=(GPUS,), repeat=2, step_s=lambda p, r=repeat: slower.get((int(p["gpus"]), r), 2.0)),
        )
        for repeat in (0, 1)
    ]
    for path in folders[1].points.glob("*r1*"):
        shutil.copytree(path, folders[0].points / path.name, dirs_exist_ok=True)
    source = page.write(store.gather(folders[0], tmp_path / "results"), tmp_path / "page.html").read_text()
    ratios = np.log([0.8, 0.625])
    low, high = (100 * np.exp(ratios.mean() + sign * 12.706 * ratios.std(ddof=1) / 2**0.5) for sign in (-1, 1))
    assert f"70.7 {numbers.three(low)} to {numbers.three(high)}" in spaced(source)


def spaced(source: str) -> str:
    """The text of the scaling table."""
    section = source[source.index('aria-label="Scaling"') :]
    return text_of(section[: section.index("</table>")])


def test_many_series_over_ranks_are_split_by_the_first_other_axis(tmp_path: Path) -> None:
    axes = (GPUS, ladder("data", 8, "mesh"), ladder("model", 7, "width"))
    source = written(tmp_path / "many", Scenario(axes=axes, steps=2))
    drawn = re.findall(r'<title id="(scaling-[^"]*)-title"', source)
    assert drawn == [f"scaling-{n}-{name}" for n in range(6) for name in ("speed-up", "efficiency")]
    assert re.search(r"<strong>data=1</strong>\. [^<]*6 of 7 lines shown", source)
    assert "2 more data figures left out here" in text_of(source)
    few = written(tmp_path / "few", Scenario(axes=(GPUS, DATA, MODEL), step_s=slower_together))
    assert re.findall(r'<title id="(scaling-[^"]*)-title"', few) == ["scaling-speed-up", "scaling-efficiency"]


MEMORY_CEILINGS = {**CEILINGS, "rates": {"fp32": 1e9, "copy": 4e9}}


def test_the_roofline_holds_every_cell_under_what_was_measured(tmp_path: Path) -> None:
    path = gathered(tmp_path, Scenario(ceilings=MEMORY_CEILINGS, repeat=2))
    group = roofline.rooflines(results.read(path))
    assert group is not None
    [panel] = group.panels
    assert sum(len(line.x) for line in panel.lines) == 4
    assert {x for line in panel.lines for x in line.x} == {100.0}, "1e8 FLOP over 1e6 bytes"
    [(x, y)] = panel.ideals
    assert (x[1], y[1], y[2]) == (0.25, 1.0, 1.0), "the corner: 1 GFLOP/s over 4 GB/s"
    assert y[0] == pytest.approx(4 * x[0])
    assert 'id="roofline"' in page.write(path, tmp_path / "page.html").read_text()
    assert roofline.rooflines(results.read(gathered(tmp_path / "none", Scenario(ceilings=None)))) is None


def test_a_curve_along_each_axis_has_range_knee_and_saturation(tmp_path: Path) -> None:
    """% of peak is FLOP/s over 1 GFLOP/s, so 10 % for each unit of rate; it levels off over data at every width."""
    data = Axis("data", "", tuple(Rung(str(n), {"mesh": n}, n) for n in (8, 16, 32, 64, 128)))
    rates = {8: 1.0, 16: 4.0, 32: 7.8, 64: 7.9, 128: 8.0}
    scenario = Scenario(axes=(data, MODEL), step_s=lambda params: 1 / rates[int(params["mesh"])])
    rows = trends.shapes(results.read(gathered(tmp_path, scenario)))
    assert [(row["axis"], row["series"]) for row in rows] == [("data", "model=w4"), ("data", "model=w8")]
    for row in rows:
        assert (row["range"], row["knee"], row["saturation"]) == ("10.0 to 80.0 %", "32", "32")


def test_ranks_are_spread_and_the_last_one_is_named(tmp_path: Path) -> None:
    [told] = [text_of(written(tmp_path, Scenario(axes=(DATA.pick(["16"]),), params={"gpus": 2}, repeat=2)))]
    assert "Distribution over ranks" in told
    assert re.search(r"rank [01] on n1", told)


def test_data_that_fits_into_memory_is_called_so(tmp_path: Path) -> None:
    assert "below 5 times (the rule of MLPerf Storage)" in text_of(written(tmp_path, Scenario()))
    assert "rule of MLPerf" not in text_of(written(tmp_path / "none", Scenario(file_read_bytes=0.0)))


def test_claims_are_judged_on_the_page(tmp_path: Path) -> None:
    scenario = Scenario(workload="cosmoflow", step_s=step_of_grid, repeat=3, jitter=0.001)
    source = written(tmp_path, scenario)
    assert re.search(r"percent-of-peak-rises-with-data.*?verdict-holds", source, re.DOTALL)
    assert re.search(r"two-ranks-efficiency.*?verdict-not-measurable", source, re.DOTALL)
    assert "All intervals are between repeats." in text_of(source)
    assert re.search(r"percent-of-peak-rises-with-data at model=", source), "each series by itself"


def test_numbers_of_checks_are_shown_cell_by_cell(tmp_path: Path) -> None:
    text = text_of(written(tmp_path, Scenario(axes=(DATA,))))
    assert "What the checks found" in text
    assert "relative error" in text
    assert "1e-06" in text


VARIANT = Axis(
    "variant",
    "",
    tuple(Rung(name, {"variant": name}, at) for at, name in enumerate(("none", "fewer-steps", "mixcache"))),
    named=True,
)
SPEEDUP = Axis("speedup", "x", tuple(Rung(f"{gain:g}", {"speedup": gain}, gain) for gain in (1.5, 2.0)))


def traded(params: Params) -> dict[str, float]:
    """Quality falls with speed-up, slower with MixCache; what is uncached has none."""
    gain, better = float(params["speedup"]), params["variant"] == "mixcache"
    if params["variant"] == "none":
        return {"work_gain": 1.0, "iso_gain": 1.0}
    return {"work_gain": gain, "psnr_db": 60 - 10 * gain + 5 * better, "iso_gain": 1 + 0.25 * better}


TRADED = Scenario(
    workload="mixcache",
    axes=(VARIANT, SPEEDUP),
    step_s=lambda params: 6.0 if params["variant"] == "none" else 6.0 / float(params["speedup"]) ** 2,
    check=traded,
)


def test_quality_is_drawn_over_speed_with_its_numbers_beside(tmp_path: Path) -> None:
    source = written(tmp_path, TRADED)
    text = text_of(source)
    assert re.findall(r'<title id="(trade-[^"]*)-title"', source) == ["trade-check-work-gain", "trade-speedup"]
    best = text[text.index("Most gain over fewer-steps") :]
    assert "speedup 1.5: variant=mixcache, 1.25 times" in best
    assert "speedup 2: variant=mixcache, 1.25 times" in best
    rows = text[text.index("gain over fewer-steps") : text.index("% of peak over")]
    assert "fewer-steps 1.5 1.50 2.25 2.25 to 2.25 45.0 1.00" in rows
    assert "mixcache 2 2.00 4.00 4.00 to 4.00 45.0 1.25" in rows
    assert "none 1.5" not in rows


def test_the_reference_is_a_dotted_line_and_no_series_of_its_own(tmp_path: Path) -> None:
    read = results.read(gathered(tmp_path, TRADED))
    found = trade.section(read)
    assert found is not None
    counted, measured = found.group.panels
    assert [line.label for line in counted.lines] == ["mixcache"]
    assert counted.lines[0].x == [1.5, 2.0]
    assert counted.lines[0].y == [50.0, 45.0]
    assert measured.lines[0].x == pytest.approx([2.25, 4.0])
    assert counted.ideals == [([1.5, 2.0], [45.0, 40.0])]
    assert counted.ideals_are == "fewer-steps"
    assert counted.y_bottom < 40 < 50 < (counted.y_top or 0)


def test_a_trade_off_is_drawn_without_its_baseline_but_not_without_quality(tmp_path: Path) -> None:
    alone = Axis("penalty", "", tuple(Rung(str(size), {"penalty": size}, size) for size in (1.0, 1.4)))
    scenario = dataclasses.replace(TRADED, axes=(alone, SPEEDUP), params={"variant": "mixcache"})
    found = trade.section(results.read(gathered(tmp_path / "some", scenario)))
    assert found is not None
    (panel,) = found.group.panels
    assert [line.label for line in panel.lines] == ["penalty=1.0", "penalty=1.4"]
    assert {row.measured for row in found.rows} == {numbers.ABSENT}
    silent = dataclasses.replace(TRADED, check=lambda params: {"work_gain": 1.0})
    assert trade.section(results.read(gathered(tmp_path / "none", silent))) is None
    assert trade.section(results.read(gathered(tmp_path / "other", Scenario()))) is None


def test_ceilings_have_a_page_of_rates(tmp_path: Path) -> None:
    rungs = tuple(Rung(name, {"kernel": name}, at) for at, name in enumerate(("gemm", "copy")))
    kernels = Axis("kernel", "", rungs, named=True)
    scenario = Scenario(
        axes=(kernels, ladder("size", 3)),
        workload="ceilings",
        ceilings=None,
        flop=lambda params: 0.0 if params["kernel"] == "copy" else 1e9,
        step_s=lambda params: 1 / int(params["size"]),
    )
    text = text_of(written(tmp_path, scenario))
    assert "3.00 GFLOP/s sustained in fp32 (gemm of size 3)" in text
    assert "What this machine sustains" in text


def test_all_parts_of_the_ceilings_have_one_page(tmp_path: Path) -> None:
    messages = Axis("message", "bytes", tuple(Rung(str(n), {"message_bytes": n}, n) for n in (8, 64)))
    asked = {"kernel": "gemm", "size": 1024, "transport": "torch", "message_bytes": 8}
    alone = Scenario(axes=(ladder("size", 2),), workload="ceilings", ceilings=None, params=asked)
    between = Scenario(
        axes=(messages, GPUS), workload="ceilings", ceilings=None, params=asked | {"kernel": "allreduce"}
    )
    parts = {
        "kernels": gathered(tmp_path / "kernels", alone),
        "collectives": gathered(tmp_path / "collectives", dataclasses.replace(between, flop=lambda params: 0.0)),
    }
    known = {"rates": {"fp32": 1e9, "allreduce-torch": 2e9}, "sources": {"fp32": "gemm", "allreduce-torch": "64 B"}}
    ceilings = known | {"together": {"fp32": {"2": 0.625}}}
    source = page.write_ceilings(parts, tmp_path / "page.html", ceilings).read_text()
    text = text_of(source)
    assert "fp32 1.00 GFLOP/s" in text
    assert "allreduce-torch 2.00 GB/s" in text
    assert "fp32 2 62.5" in text
    for name, path in parts.items():
        assert f"Rates by kernel and size: {name}" in text
        assert f"saih report results/{path.name}" in text
    names = re.findall(r'id="([^"]+)"', source)
    assert len(names) == len(set(names)), "figures of different parts have different names"


def test_many_cells_are_bounded_and_say_so(tmp_path: Path) -> None:
    axes = (ladder("data", 30, "mesh"), ladder("model", 20, "width"))
    text = text_of(written(tmp_path, Scenario(axes=axes, steps=2, outcome=lambda point: _some(point.labels))))
    assert "12 of 20 lines shown" in text
    assert "First 500 of 600 cells" in text
    assert "First 200 of 260" in text
    assert "280 of 600 cells shown" in text


def _some(labels: Mapping[str, str]) -> Outcome:
    return Outcome("pruned", "memory", "too large") if int(labels["data"]) * int(labels["model"]) > 150 else Outcome()


def test_further_axes_make_figures_of_their_own(tmp_path: Path) -> None:
    source = written(tmp_path, Scenario(axes=(DATA, MODEL, ladder("batch", 8))))
    assert source.count('<table class="heat">') == 6
    assert "2 more maps left out here" in text_of(source)
    assert "<strong>batch=1</strong>" in source


def test_page_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match="no such results file"):
        page.write(tmp_path / "none.h5", tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_figures_follow_the_theme() -> None:
    scale = figures.Scale("x", [(1.0, "one")], True, False)
    line = figures.Line("a & b", [1.0, 2.0], [10.0, float("nan")], [9.0, float("nan")], [11.0, float("nan")])
    drawn = figures.draw(figures.Panel("p", "title <&>", "description", [line], scale, "y"))
    assert drawn.startswith("<svg")
    assert "var(--series-0)" in drawn
    assert "#0000" not in drawn
    assert '<title id="p-title">title &lt;&amp;&gt;</title>' in drawn
    assert "a &amp; b" in drawn


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.0, "1.00"), (9.996, "10.0"), (123.4, "123"), (1234.0, "1230"), (0.0123, "0.0123"), (-5.0, "-5.00")],
)
def test_three_digits(value: float, shown: str) -> None:
    assert numbers.three(value) == shown


def test_prefixes() -> None:
    assert numbers.si(68.86e9, "FLOP") == "68.9 GFLOP"
    assert numbers.si(999.9) == "1.00 k"
    assert numbers.si(2.5e-3, "s") == "2.50 ms"
    assert numbers.si(float("nan"), "s") == numbers.ABSENT
    assert numbers.span(3.1e-3, 3.22e-3, "s") == "3.10 to 3.22 ms"


def test_layout_puts_sizes_across_and_keeps_the_ends() -> None:
    gpus, kinds = ladder("gpus", 2), Axis("kind", "", (Rung("a", {}, 0), Rung("b", {}, 1)), named=True)
    plan = layout((gpus, kinds, DATA))
    assert (plan.across, plan.lines, plan.others) == (DATA, gpus, (kinds,))
    assert kinds.named
    assert spread(list(range(100)), 3) == [0, 50, 99]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_the_page(grid: str, scheme: str, require: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(grid)
    picture = tmp_path / "page.png"
    wanted = browser.LIGHT if scheme == "light" else browser.DARK
    browser.run(
        require("chromium"), tmp_path / "page.html", wanted, "--window-size=1200,2000", f"--screenshot={picture}"
    )
    assert (imread(picture)[..., :3].mean() > 0.5) == (scheme == "light")


def test_browser_does_not_scroll_a_phone_sideways(
    grid: str, troubled: str, require: Callable[[str], str], tmp_path: Path
) -> None:
    for source in (grid, troubled):
        framed = MEASURE_OVERFLOW.format(width=400, page=html.escape(source))
        (tmp_path / "page.html").write_text(framed)
        assert (
            "<title>overflow 0</title>" in browser.run(require("chromium"), tmp_path / "page.html", "--dump-dom").stdout
        )
