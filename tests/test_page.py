"""The page in a real browser: silent, sound for keyboard and screen reader, whole on paper, sorted and filtered."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saih import store
from saih.core import Axis, Params, Point, Rung
from saih.report import page
from tests import browser
from tests.conftest import package
from tests.synthetic import CEILINGS, ENVIRONMENT, Outcome, Scenario, ladder, make

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
DATA = Axis("data", "voxels", tuple(Rung(str(n), {"mesh": n}, n) for n in (8, 16, 32, 64, 128)))
GPUS = Axis("gpus", "per node", tuple(Rung(str(n), {"gpus": n}, n) for n in (1, 2, 4)))
PAPER_POINTS = {"A4": (595, 842), "letter": (612, 792)}


def step_of(params: Params) -> float:
    return 0.01 * int(params["mesh"]) ** 0.5 * (1 + 0.1 * int(params["gpus"]))


def outcome_of(point: Point) -> Outcome:
    if point.labels["data"] == "128":
        return Outcome("pruned", "time", "past the time budget")
    if point.labels["data"] == "8" and point.labels["gpus"] == "4":
        return Outcome("failed", "error", HOSTILE, f"Traceback\n{HOSTILE}")
    return Outcome()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part: two studies of a workload, trends, projections, ranks, failures, hostile names."""
    folder = tmp_path_factory.mktemp("whole")
    scenario = Scenario(
        axes=(DATA, GPUS),
        workload="cosmoflow",
        repeat=2,
        jitter=0.01,
        step_s=step_of,
        outcome=outcome_of,
        ceilings={**CEILINGS, "rates": {"fp32": 1e12, "copy": 4e9}},
        environment=lambda point: {**ENVIRONMENT, "host": HOSTILE},
    )
    other = Scenario(axes=(ladder("data", 4, "mesh"), ladder("model", 3, "width")), workload="cosmoflow", repeat=2)
    paths = [
        store.gather(make(folder / name / "jobs", each, name), folder / name, mixed=True)
        for name, each in (("first", scenario), ("second", other))
    ]
    return page.write(paths, folder / "page.html")


@pytest.fixture
def chromium(require: Callable[[str], str]) -> str:
    return require("chromium")


def test_it_opens_from_a_file_without_a_network_and_without_a_word_on_the_console(whole: Path, chromium: str) -> None:
    assert "default-src 'none'" in whole.read_text(), "whatever it asked for would be on the console"
    assert browser.console(chromium, whole) == []


def test_the_console_is_heard(whole: Path, chromium: str) -> None:
    copy = whole.with_name("loud.html")
    copy.write_text(whole.read_text().replace("<main>", '<main><img src="https://saih.example/x.png" alt="">'))
    assert browser.console(chromium, copy)


@pytest.mark.parametrize("scheme", [browser.LIGHT, browser.DARK], ids=["light", "dark"])
def test_axe_finds_nothing_serious(whole: Path, chromium: str, scheme: str) -> None:
    library = Path(str(package("axe_core_python").__file__)).with_name("axe.min.js").read_text()
    script = """
      const found = await axe.run(document, { resultTypes: ["violations"] })
      return found.violations.map(each => [each.impact, each.id, each.nodes.slice(0, 3).map(node => node.html)])"""
    found = browser.ask(chromium, whole, script, scheme, library=library)
    assert [each for each in found if each[0] in ("serious", "critical")] == []


@pytest.mark.parametrize("paper", PAPER_POINTS)
def test_every_figure_is_on_paper_and_none_is_cut(whole: Path, chromium: str, paper: str) -> None:
    """The caption stands above a figure, values and words of axes within: all on one page, or it was cut."""
    source = whole.read_text()
    drawn = re.findall(r"<figure[^>]*>(.*?)</figure>", source, re.DOTALL)
    numbers = sorted(int(number) for number in re.findall(r"<figcaption><b>Figure (\d+)\.</b>", source))
    assert numbers == list(range(1, len(numbers) + 1))
    reader = package("pypdf").PdfReader(browser.print_pdf(chromium, whole, paper))
    pages = [re.sub(r"\s+", " ", unicodedata.normalize("NFKC", each.extract_text())) for each in reader.pages]
    assert {tuple(sorted(map(round, each.mediabox[2:]))) for each in reader.pages} == {PAPER_POINTS[paper]}
    for number in numbers:
        assert sum(f"Figure {number}." in text for text in pages) == 1, f"figure {number}"
    assert len(drawn) >= 5
    for figure in drawn:
        number = re.search(r"Figure (\d+)\.", figure)
        assert number
        (text,) = (text for text in pages if f"Figure {number[1]}." in text)
        after = text[text.index(f"Figure {number[1]}.") :]
        for value in re.findall(r"<td[^>]*><b>([^<]+)</b>", figure):
            assert value in after, f"{value!r} of figure {number[1]} is on another page"
        for label in re.findall(r'<text [^>]*style="[^"]*text-anchor:middle[^"]*"[^>]*>([^<]+)</text>', figure):
            assert label in after, f"{label!r} of figure {number[1]} is on another page"


ROWS = """
  const table = document.querySelector('[aria-label="{table}"] table')
  const shown = () => [...table.tBodies[0].rows].filter(row => !row.hidden)
  const texts = column => shown().map(row => row.cells[column].innerText.split("\\n")[0])
"""


def ask_table(whole: Path, chromium: str, table: str, script: str) -> Any:
    return browser.ask(chromium, whole, ROWS.format(table=table) + script)


def test_a_click_on_a_head_sorts_by_value_and_another_turns_it_round(whole: Path, chromium: str) -> None:
    script = """
      const button = table.tHead.querySelectorAll("th")[5].querySelector("button")
      const seen = [texts(5)]
      for (let click = 0; click < 2; click++) { button.click(); seen.push(texts(5), button.parentElement.ariaSort) }
      return [seen, button.innerText]"""
    (before, up, rising, down, falling), head = ask_table(whole, chromium, "All cells", script)
    assert "step time" in head
    assert (rising, falling) == ("ascending", "descending")
    assert sorted(up) == sorted(before) == sorted(down)
    known = [_seconds(text) for text in up if text[0].isdigit()]
    assert known == sorted(known)
    assert len(set(known)) > 5
    assert [_seconds(text) for text in down if text[0].isdigit()] == known[::-1]


def _seconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]


def test_the_filter_keeps_the_rows_with_these_words(whole: Path, chromium: str) -> None:
    script = """
      const tools = table.closest(".scroll").previousElementSibling
      const input = tools.querySelector("input")
      const all = shown().length
      input.value = "PRUNED"
      input.dispatchEvent(new Event("input"))
      return [all, shown().map(row => row.innerText), tools.querySelector("[role=status]").textContent]"""
    total, rows, told = ask_table(whole, chromium, "All cells", script)
    assert total == 15
    assert len(rows) == 3
    assert all("pruned" in row for row in rows)
    assert told == "3 of 15 rows"


def test_long_tables_show_some_rows_first_and_all_when_asked(tmp_path: Path, chromium: str) -> None:
    scenario = Scenario(axes=(ladder("data", 13, "mesh"), ladder("model", 10, "width")), steps=2)
    path = page.write(store.gather(make(tmp_path / "jobs", scenario), tmp_path), tmp_path / "page.html")
    script = """
      const tools = table.closest(".scroll").previousElementSibling
      const first = shown().length
      tools.querySelector("button").click()
      return [first, shown().length]"""
    assert ask_table(path, chromium, "All cells", script) == [100, 130]


def test_without_the_script_nothing_is_missing(whole: Path, chromium: str) -> None:
    """Rows, figures and values under the pointer are in the page itself."""
    copy = whole.with_name("plain.html")
    copy.write_text(re.sub(r"<script>.*?</script>", "", whole.read_text(), flags=re.DOTALL))
    found = browser.run(chromium, copy, "--dump-dom").stdout
    assert not re.search(r"<tr[^>]* hidden", found)
    assert "<button" not in found
    assert re.search(r"<use [^>]*><title>[^<]*: [\d.]+ \([\d.]+ to [\d.]+\)</title></use>", found)
    assert found.count("<svg") == whole.read_text().count("<svg")


def test_hostile_names_and_errors_are_shown_as_text(whole: Path, chromium: str) -> None:
    script = """
      const reasons = document.querySelector(".troubles").innerText
      const machine = document.querySelector(".environment").innerText
      const ranks = document.querySelector(".ranks").innerText
      return [document.title, document.querySelectorAll("img").length, reasons, machine, ranks]"""
    title, images, *told = browser.ask(chromium, whole, script)
    assert title.endswith("saih report")
    assert images == 0
    assert all(HOSTILE in each for each in told)


def test_every_figure_has_its_numbers_its_samples_and_a_caption(whole: Path) -> None:
    source = whole.read_text()
    for figure in re.findall(r"<figure.*?</figure>", source, re.DOTALL):
        told = re.search(r"<figcaption><b>Figure (\d+)\.</b>\s*(.*?)</figcaption>", figure, re.DOTALL)
        assert told
        assert len(re.sub(r"<[^>]*>", "", told[2]).split()) > 10, "says what to see"
        assert "<table" in figure
        link = re.search(rf'href="#([^"]*samples)">Raw samples behind figure {told[1]}<', figure)
        assert link
        assert f'id="{link[1]}"' in source
    assert "projected" in source
