"""Schedulers: one module each, found by name. A module grants nodes: it submits scripts, tells states and cancels.

A scheduler module defines

- `TEMPLATE`: file name of its job script's Jinja2 template in saih/templates, or in ./templates to override it;
- `SUBMIT`: the keys of a site's `submit` it has a notion of; a site that states another is refused;
- `COMMANDS`: the programs it needs on the PATH where saih runs;
- `QUESTION`: the words of a command that prints something where this scheduler is in charge; () if none does;
- `SYMPTOMS`: words of its refusals, what they mean and what to try, for `saih site check`;
- `WAITS`: words of a waiting job's `State.detail`, and what to try;
- `AGENTS`: the launcher by which torchrun starts its agent on each of several nodes;
- `MAX_QUEUED`: how many jobs of one sweep it is handed at a time, where the site does not say;
- `SHORTEST_PAUSE_S`, `LONGEST_PAUSE_S`: between two questions for states; the pause grows while nothing changes;
- `CANCEL_ON_INTERRUPT`: whether Ctrl-C stops the jobs too, or leaves them to run;
- `submit(script) -> str`: hand the script in; returns an id;
- `find(home) -> str | None`: the id of a job folder's job where nobody wrote it down, if it was submitted; SaihError
  where that cannot be known now;
- `states(ids) -> dict[str, State]`: the state of many ids in one call; an id nobody knows any more is "ended";
- `cancel(ids)`: stop them;
- `energies(ids) -> dict[str, (joule, seconds)]`, only where it counts energy: of those jobs it has counted.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from saih.errors import SaihError, unknown
from saih.files import digest

Cause = Literal["", "preempted", "node-fail", "boot-fail", "timeout", "out-of-memory", "cancelled"]


@dataclass(frozen=True)
class State:
    """What a scheduler says of a job. "ended" says nothing about success: a point is done when it is measured."""

    phase: Literal["queued", "running", "ended"]
    cause: Cause = ""
    """Why it ended, where the scheduler blames itself, a node, a limit or a person; empty for the job's own doing."""
    detail: str = ""
    """The scheduler's own word, for people."""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Symptom:
    """Words of a log or a refusal, what they mean, and what to try."""

    pattern: str
    text: str
    """With {partition}, {account}, {qos}, {mpi}, {launcher}, {data} of the site, and the groups of the pattern."""
    advice: str


class Scheduler(Protocol):
    """What a scheduler module defines."""

    TEMPLATE: str
    SUBMIT: tuple[str, ...]
    COMMANDS: tuple[str, ...]
    QUESTION: tuple[str, ...]
    SYMPTOMS: tuple[Symptom, ...]
    WAITS: Mapping[str, str]
    AGENTS: str
    MAX_QUEUED: int
    SHORTEST_PAUSE_S: float
    LONGEST_PAUSE_S: float
    CANCEL_ON_INTERRUPT: bool

    def submit(self, script: Path) -> str: ...

    def find(self, home: Path) -> str | None: ...

    def states(self, ids: Sequence[str]) -> dict[str, State]: ...

    def cancel(self, ids: Sequence[str]) -> None: ...


def job_name(home: Path) -> str:
    """What a job of folder jobs/<sweep>/jobs/<number> is called: "saih-<sweep>-<number>-<digest of the whole path>"."""
    return f"saih-{home.parent.parent.name}-{home.name}-{digest(str(home.absolute()))[:8]}"


def call(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What a scheduler's command answers; SaihError where it is not installed.

    It runs in `/`: schedulers note the folder they are called from, and some stumble over its name.
    """
    if shutil.which(words[0]) is None:
        raise SaihError(f"{words[0]} is not on this machine's PATH; run saih where the scheduler's commands are")
    return subprocess.run(words, cwd="/", capture_output=True, text=True, errors="replace", check=False)


def ask(words: Sequence[str]) -> str:
    """The output of a command that has to answer; SaihError where it does not."""
    answer = call(words)
    if answer.returncode != 0:
        raise SaihError(f"{words[0]} does not answer ({first_line(answer.stderr)}); nothing is lost, try again later")
    return answer.stdout


def first_line(text: str) -> str:
    """The first line of what a command complains of."""
    return next((line for line in text.splitlines() if line.strip()), "no reason given")


def job_id(number: str, name: str) -> str:
    """An id that another job cannot take over: a number alone comes again once a scheduler counts anew."""
    return f"{number} {name}"


def number_of(name: str) -> str:
    """The scheduler's own number in a `job_id`."""
    return name.split(" ", 1)[0]


def expand(nodes: str) -> tuple[str, ...]:
    """Host names of a Slurm or Flux node list: "n[1-2,04],m7" -> n1, n2, n04, m7; none of "(null)", "None assigned"."""
    if not nodes or nodes.startswith(("(", "None")):
        return ()
    found: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        found += _ranges(*match.groups()) if match else [part]
    return tuple(found)


def _ranges(prefix: str, ranges: str, suffix: str) -> list[str]:
    names = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        names += [f"{prefix}{n:0{len(first)}d}{suffix}" for n in range(int(first), int(last or first) + 1)]
    return names


def names() -> list[str]:
    """Names of all schedulers."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Scheduler:
    """The scheduler of that name; SaihError lists the others."""
    if name not in names():
        raise unknown("scheduler", name, names())
    return cast(Scheduler, importlib.import_module(f"{__name__}.{name}"))
