"""Schedulers: one module each, found by name. A module grants nodes: it submits scripts, tells states and cancels.

A scheduler module defines

- `TEMPLATE`: file name of its job script's Jinja2 template in saih/templates, or in ./templates to override it;
- `MAX_QUEUED`: how many jobs of one sweep it is handed at a time;
- `submit(job, script) -> str`: hand the script in; returns an id;
- `states(ids) -> dict[str, State]`: the state of many ids in one call; an id it does not know is "ended";
- `cancel(ids)`: stop them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from saih.core import Job
from saih.errors import unknown


@dataclass(frozen=True)
class State:
    """What a scheduler says of a job. "ended" says nothing about success: a point is done when it is measured."""

    phase: Literal["queued", "running", "ended"]
    detail: str = ""


class Scheduler(Protocol):
    """What a scheduler module defines."""

    TEMPLATE: str
    MAX_QUEUED: int

    def submit(self, job: Job, script: Path) -> str: ...

    def states(self, ids: Sequence[str]) -> dict[str, State]: ...

    def cancel(self, ids: Sequence[str]) -> None: ...


def names() -> list[str]:
    """Names of all schedulers."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Scheduler:
    """The scheduler of that name; SaihError lists the others."""
    if name not in names():
        raise unknown("scheduler", name, names())
    return cast(Scheduler, importlib.import_module(f"{__name__}.{name}"))
