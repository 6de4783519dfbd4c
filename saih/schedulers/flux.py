"""Flux: flux batch, one flux jobs for all states, flux cancel. It does not requeue jobs and preempts none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saih.errors import SaihError
from saih.schedulers import Cause, State, Symptom, ask, call, expand, first_line, job_id, job_name, number_of

TEMPLATE = "flux.sh.j2"
SUBMIT = ("account", "partition", "constraint", "dependency", "exclusive", "extra")
COMMANDS = ("flux",)
QUESTION = ("flux", "resource", "list")
SYMPTOMS = (
    Symptom(
        r"is not a valid queue",
        "the scheduler knows no queue {partition}",
        "flux queue list names them; put one in submit.partition",
    ),
)
WAITS = {
    r"DEPEND": "it waits for another job: submit.dependency",
    r"SCHED": "the machine is busy: a larger --wait; flux queue list shows where else",
}
AGENTS = "flux"
MAX_QUEUED = 20
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
CANCEL_ON_INTERRUPT = False

RUNNING = {"RUN", "CLEANUP"}
ENDED = "INACTIVE"
"""The other states wait: NEW, DEPEND, PRIORITY, SCHED."""
CAUSES: dict[str, Cause] = {"TIMEOUT": "timeout", "CANCELED": "cancelled"}
"""By result; of FAILED the exception tells more, COMPLETED is the job's own doing."""
LOST_NODE = re.compile(r"node failure on (\S+)")


def submit(script: Path) -> str:
    """`flux batch`. Of the environment a job gets the way to Flux's commands and who it is, as a login gives it."""
    home = script.parent.absolute()
    path = f"{Path(shutil.which('flux') or '').parent}:/usr/local/bin:/usr/bin:/bin"
    environment = ["--env-remove=*", f"--env=PATH={path}", *(f"--env={name}" for name in ("HOME", "USER", "LOGNAME"))]
    words = ["flux", "batch", f"--job-name={job_name(home)}", "--cwd=/", "--output=/dev/null", *environment]
    answer = call([*words, str(home / script.name)])
    if answer.returncode != 0:
        raise SaihError(f"flux batch refused {script}: {first_line(answer.stderr)}")
    number = call(["flux", "job", "id", "--to=dec", answer.stdout.strip()]).stdout.strip()
    if not number.isdigit():
        raise SaihError(f"flux batch answered {first_line(answer.stdout)} for {script}, which is no job id")
    return job_id(number, job_name(home))


def find(home: Path) -> str | None:
    """By the job's name, which no other folder's job has."""
    name = job_name(home)
    numbers = [job["id"] for job in _jobs(ask(["flux", "jobs", "-a", "--count=0", "--json", f"--name={name}"]))]
    return job_id(str(max(numbers)), name) if numbers else None


def states(ids: Sequence[str]) -> dict[str, State]:
    """One flux jobs for all.

    A job is unknown where it says so by its number. While it says nothing, a job is "queued": nothing is known to
    have happened to it.
    """
    if not ids:
        return {}
    numbers = [number_of(name) for name in ids]
    answer = call(["flux", "jobs", "--json", *numbers])
    known = {job_id(str(job["id"]), str(job.get("name"))): job for job in _jobs(answer.stdout)}
    return {name: state_of(known[name]) if name in known else _unheard_of(name, known, answer.stderr) for name in ids}


def cancel(ids: Sequence[str]) -> None:
    """`flux cancel` of all."""
    if ids:
        call(["flux", "cancel", *(number_of(name) for name in ids)])


def _unheard_of(name: str, known: Mapping[str, Any], complaints: str) -> State:
    number = number_of(name)
    if f"JobID {number} unknown\n" in complaints:
        return State("ended", detail="forgotten by the scheduler")
    if number in map(number_of, known):
        return State("ended", detail="its number is another job's now")
    return State("queued", detail="the instance does not answer")


def _jobs(text: str) -> list[dict[str, Any]]:
    """The jobs in `flux jobs --json`, which leaves out the list around a single one; none where it says nothing."""
    try:
        answer = json.loads(text)
    except ValueError:
        return []
    return list(answer.get("jobs", [answer]))


def state_of(job: Mapping[str, Any]) -> State:
    """A State from a job of `flux jobs --json`. Of a lost node, the exception's note has the name."""
    where = expand(job.get("nodelist", ""))
    if job["state"] in RUNNING:
        return State("running", detail=job["state"], nodes=where)
    if job["state"] != ENDED:
        return State("queued", detail=job["state"])
    result, exception = job["result"], job["exception"]
    why = f"{exception['type']}: {exception['note']}".rstrip(": ") if exception["occurred"] else ""
    detail = f"{result} ({why})" if why else result
    if result == "FAILED" and (lost := LOST_NODE.search(why)):
        return State("ended", "node-fail", detail, (lost[1],))
    return State("ended", "boot-fail" if why.startswith("prolog") else CAUSES.get(result, ""), detail, where)
