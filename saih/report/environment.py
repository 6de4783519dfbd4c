"""What every page of saih shares: templates, style, script, and how a value is written."""

from __future__ import annotations

import base64
import hashlib
import itertools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from saih import __version__
from saih.analysis import kinds, numbers
from saih.files import write_atomic
from saih.report import figures

TEMPLATES = Path(__file__).parent.parent / "templates"


def environment() -> jinja2.Environment:
    """Of one page: figures are numbered from 1."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"three": _three, "plural": numbers.plural, "numbers": figures.numbers_of, "seconds": _seconds}
    style, script = ((TEMPLATES / "report" / name).read_text() for name in ("style.css", "script.js"))
    env.globals |= {
        "draw": lambda panel, prefix: Markup(figures.draw(panel, prefix)),  # noqa: S704 (it escapes what it writes)
        "next_figure": itertools.count(1).__next__,
        "kinds": kinds.KINDS,
        "version": __version__,
        "style": Markup(style),  # noqa: S704 (our own file, as the script is)
        "script": Markup(script),  # noqa: S704
        "script_hash": base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode(),
    }
    return env


def write_page(text: str, output: Path) -> Path:
    """Whole or not at all."""
    write_atomic(output, lambda file: file.write(text.encode()))
    return output


def _three(value: Any) -> str:
    return numbers.ABSENT if value is None else numbers.three(value)


def _seconds(value: float) -> str:
    return numbers.si(value, "s")
