"""Pages in a real Chromium without a network or a driver: what they print, look like, say on the console, and do."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"
PROBE = """<pre id="outcome"></pre><script>
addEventListener("load", async () => {{
  const outcome = await (async () => {{ {script} }})()
  document.getElementById("outcome").textContent = JSON.stringify(outcome)
}})</script>"""


def run(chromium: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open `page` from its file."""
    profile = page.parent / "profile"
    command = [chromium, *CHROMIUM, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def console(chromium: str, page: Path) -> list[str]:
    """What the page, or the browser about it, wrote on the console."""
    logged = run(chromium, page, "--enable-logging=stderr", "--dump-dom").stderr
    return re.findall(r"CONSOLE.*", logged)


def ask(chromium: str, page: Path, script: str, *options: str, library: str = "") -> Any:
    """What `script`, the body of an async function, returns in a copy of the page that may be asked."""
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    probe = f"<script>{library}</script>" * bool(library) + PROBE.format(script=script)
    copy = page.with_name("asked.html")
    copy.write_text(source.replace("</body>", f"{probe}</body>"))
    found = run(chromium, copy, "--virtual-time-budget=60000", *options, "--dump-dom").stdout
    answer = re.search(r'<pre id="outcome">(.*?)</pre>', found, re.DOTALL)
    assert answer, "the page has no outcome"
    return json.loads(html.unescape(answer[1]))


def print_pdf(chromium: str, page: Path, paper: str) -> Path:
    """The page printed on `paper`, "A4" or "letter"."""
    copy, output = page.with_name(f"{paper}.html"), page.with_name(f"{paper}.pdf")
    rules = f"@page {{ size: {paper}; }} @page wide {{ size: {paper} landscape; }}</style>"
    copy.write_text(page.read_text().replace("</style>", rules, 1))
    run(chromium, copy, f"--print-to-pdf={output}", "--no-pdf-header-footer")
    return output
