"""Make reports/reference/ from results/reference/, with pictures for the README: make reference-reports.

Chromium takes the pictures; without it, the pages are made all the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from saih.report import page

ROOT = Path(__file__).parent.parent
RESULTS, REPORTS = ROOT / "results" / "reference", ROOT / "reports" / "reference"
PAGES = {"all": "*.h5", "cosmoflow-cpu": "cosmoflow-cpu.h5"}
"""Page -> the results it is made of."""
PICTURES = {
    "front-page": ("all", "", (1280, 1500), False),
    "front-page-dark": ("cosmoflow-cpu", "", (1280, 1500), True),
    "bottlenecks": ("cosmoflow-cpu", "bottlenecks", (1280, 1050), False),
    "trends": ("cosmoflow-cpu", "trends", (1280, 1250), False),
}
"""Picture -> page, the part it begins with, width and height, whether it is dark."""


def main() -> None:
    """Print the path of every file that is made."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    for name, pattern in PAGES.items():
        print(page.write(sorted(RESULTS.glob(pattern)), REPORTS / f"{name}.html").relative_to(ROOT))
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("chromium is not installed: the pictures stay as they are")
    for name, (source, part, size, dark) in PICTURES.items():
        picture = REPORTS / f"{name}.png"
        _photograph(chromium, REPORTS / f"{source}.html", part, size, dark, picture)
        print(picture.relative_to(ROOT))


def _photograph(chromium: str, source: Path, part: str, size: tuple[int, int], dark: bool, picture: Path) -> None:
    """The page from the top of `part` on: a copy in which all that stands before it is taken out."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, source.name)
        hidden = f"section.part:not([id='{part}']), .sheet > header, main > *:not(#workloads), .workload > *:not(.part)"
        rule = f"{hidden} {{ display: none }} .part {{ margin-top: .5rem }}</style>" if part else "</style>"
        copy.write_text(source.read_text().replace("</style>", rule, 1))
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", scheme]
        place = [f"--user-data-dir={scratch}/profile", f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}"]
        subprocess.run([chromium, *options, *place, copy.as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
