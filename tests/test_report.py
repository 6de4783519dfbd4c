"""The page says what was measured, hides nothing that was not, trusts no text in it, and stands alone."""

from __future__ import annotations

import base64
import html
import io
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.image import imread

from saih import store
from saih.core import Axis, Params, Rung
from saih.errors import SaihError
from saih.report import figures, numbers, page
from saih.report.grid import is_sized, layout, spread
from tests.synthetic import DATA, MODEL, SITE, Outcome, Scenario, ladder, make

HOSTILE = "<script>alert('x')</script> & \"quotes\""
CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
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
    """The table carried in the page, its parts put together."""
    links = re.findall(
        rf'download="[^"]*\.{table}[^"]*\.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', source
    )
    assert links
    return pd.concat(pd.read_csv(io.BytesIO(base64.b64decode(link))) for link in links)


def step_of_grid(params: Params) -> float:
    """1e8 FLOP in these times is 10, 20, 40 and 80 % of 1 GFLOP/s."""
    return {(16, 4): 1.0, (16, 8): 0.5, (32, 4): 0.25, (32, 8): 0.125}[int(params["mesh"]), int(params["width"])]


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
    site = SITE.model_copy(update={"description": HOSTILE})
    scenario = Scenario(axes=(axis, MODEL), site=site, environment=lambda point: {"host": HOSTILE}, command=(HOSTILE,))
    for source in (troubled, written(tmp_path, scenario)):
        assert "<script" not in source
        assert not re.search(r"\son\w+=", re.sub(r"&#?\w+;", "", source))
        assert HOSTILE in text_of(source)


def test_page_needs_nothing_from_elsewhere(grid: str) -> None:
    targets = re.findall(r'(?:src|href|action|data)="([^"]*)"', grid) + re.findall(r"url\(([^)]*)\)", grid)
    assert targets
    assert {target[:1] for target in targets if not target.startswith("data:text/csv")} == {"#"}
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


def test_large_tables_come_in_parts_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saih.report.downloads.PART_BYTES", 300)
    assert len(csv_of(written(tmp_path / "parts", Scenario()), "samples")) == 24
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
    gpus = Axis("gpus", "per node", tuple(Rung(str(n), {"gpus": n}, n) for n in (1, 2, 4)))
    scenario = Scenario(
        axes=(gpus,), step_s=lambda params: {1: 1.0, 2: 1.25, 4: 1.6}[int(params["gpus"])], params={"scaling": "weak"}
    )
    source = written(tmp_path, scenario)
    row = r'<tr><th scope="row">4</th><td>4</td><td>1</td><td>5\.00</td><td class="measured-value">2\.50 ± 0</td>'
    assert re.search(row + r"<td>4\.00</td><td>62\.5</td></tr>", source)
    assert "Weak scaling." in text_of(source)
    assert 'id="scaling-speed-up-title"' in source


def test_claims_are_judged_on_the_page(tmp_path: Path) -> None:
    scenario = Scenario(workload="cosmoflow", step_s=step_of_grid, repeat=3, jitter=0.001)
    source = written(tmp_path, scenario)
    assert re.search(r"percent-of-peak-rises-with-data.*?verdict-holds", source, re.DOTALL)
    assert re.search(r"two-ranks-efficiency.*?verdict-not-measurable", source, re.DOTALL)
    assert "All intervals are between repeats." in text_of(source)


def test_ceilings_have_a_page_of_rates(tmp_path: Path) -> None:
    kernels = Axis("kernel", "", tuple(Rung(name, {"kernel": name}, at) for at, name in enumerate(("gemm", "copy"))))
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
    gpus, kinds = ladder("gpus", 2), Axis("kind", "", (Rung("a", {}, 0), Rung("b", {}, 1)))
    plan = layout((gpus, kinds, DATA))
    assert (plan.across, plan.lines, plan.others) == (DATA, gpus, (kinds,))
    assert not is_sized(kinds)
    assert spread(list(range(100)), 3) == [0, 50, 99]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_the_page(grid: str, scheme: str, require: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(grid)
    picture = tmp_path / "page.png"
    dark = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(require("chromium"), tmp_path, dark, "--window-size=1200,2000", f"--screenshot={picture}")
    assert (imread(picture)[..., :3].mean() > 0.5) == (scheme == "light")


def test_browser_does_not_scroll_a_phone_sideways(
    grid: str, troubled: str, require: Callable[[str], str], tmp_path: Path
) -> None:
    for source in (grid, troubled):
        framed = MEASURE_OVERFLOW.format(width=400, page=html.escape(source))
        (tmp_path / "page.html").write_text(framed)
        assert "<title>overflow 0</title>" in browse(require("chromium"), tmp_path, "--dump-dom")


def browse(chromium: str, folder: Path, *options: str) -> str:
    command = [chromium, *CHROMIUM, f"--user-data-dir={folder / 'profile'}", *options, (folder / "page.html").as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
