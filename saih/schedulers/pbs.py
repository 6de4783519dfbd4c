"""PBS Professional and OpenPBS: qsub, one qstat for all states, qselect to find a lost job, qdel.

PBS cannot leave out nodes by name, so a job is not kept off those that failed before. It has no quality of service, and
its reservations are queues: `partition` names them.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from saih.errors import SaihError
from saih.schedulers import Cause, State, Symptom, ask, call, first_line, job_id, job_name, number_of

TEMPLATE = "pbs.sh.j2"
SUBMIT = ("account", "partition", "constraint", "gres", "dependency", "exclusive", "extra")
COMMANDS = ("qsub", "qstat", "qselect", "qdel")
QUESTION = ("qstat", "-Q")
SYMPTOMS = (
    Symptom(
        r"[Uu]nknown queue",
        "the scheduler knows no queue {partition}",
        "qstat -Q lists them; name one in submit.partition",
    ),
    Symptom(
        r"violates queue and/or server resource limits",
        "the job asks for more, or for less, than queue {partition} gives one job",
        "compare nodes, gpus_per_node x threads_per_rank and job_minutes with: qstat -Qf",
    ),
)
WAITS = {
    r"Can Never Run": "it asks for what the machine does not have: compare nodes and gpus_per_node with pbsnodes -a",
    r"Insufficient amount|Not enough": "the machine is busy: a larger --wait, or a debug queue",
    r"\(H\)": "it is held: qstat -f says by whom",
}
AGENTS = "mpiexec"
MAX_QUEUED = 20
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
CANCEL_ON_INTERRUPT = False

RUNNING = {"R": "running", "E": "exiting", "B": "array has begun"}
ENDED = {"F": "finished", "X": "finished"}
"""All other states wait: queued, held, waiting for its time, in transit, moved to another server, suspended."""
TERMINATED = "91"
"""The substate of a job that somebody or something deleted."""
CAUSES: dict[str, Cause] = {
    "-4": "node-fail",  # its MoM was started anew
    "-20": "node-fail",  # no contact with its first node
    "-30": "node-fail",  # another node did not join
    "-3": "boot-fail",  # could not start, and might elsewhere
    "-26": "out-of-memory",  # more virtual memory than asked for
    "-27": "out-of-memory",  # more memory than asked for
    "-29": "timeout",  # more time than asked for
}
"""By Exit_status: the JOB_EXEC codes below zero of OpenPBS's job.h that are not the job's own doing."""


def submit(script: Path) -> str:
    """`qsub`. The directives' prefix is named, for a variable of the user's could have changed it."""
    home = script.parent.absolute()
    answer = call(["qsub", "-C", "#PBS", "-N", job_name(home), str(home / script.name)])
    number = answer.stdout.strip()
    if answer.returncode != 0 or not re.fullmatch(r"\d+\.\S+", number):
        raise SaihError(f"qsub refused {script}: {first_line(answer.stderr or number)}")
    return job_id(number, job_name(home))


def find(home: Path) -> str | None:
    """By the job's name, which no other folder's job has; jobs that have ended too, where PBS keeps a record."""
    chosen = ["-u", getpass.getuser(), "-N", job_name(home)]
    numbers = call(["qselect", "-x", *chosen]).stdout.split() or ask(["qselect", *chosen]).split()
    return job_id(max(numbers, key=_serial), job_name(home)) if numbers else None


def states(ids: Sequence[str]) -> dict[str, State]:
    """One qstat for all, and a second where PBS keeps no record of jobs that have ended.

    A job is unknown where qstat says so by its number. While it says nothing, a job is "queued": nothing is known to
    have happened to it.
    """
    if not ids:
        return {}
    numbers = [number_of(name) for name in ids]
    answer = call(["qstat", "-x", "-f", *numbers])
    if "not configured to maintain job history" in answer.stderr:
        answer = call(["qstat", "-f", *numbers])
    known = _parse(answer.stdout)
    return {name: known.get(name) or _unheard_of(name, answer.stdout, answer.stderr) for name in ids}


def cancel(ids: Sequence[str]) -> None:
    """`qdel` of all."""
    if ids:
        call(["qdel", *(number_of(name) for name in ids)])


def _unheard_of(name: str, output: str, complaints: str) -> State:
    number = re.escape(number_of(name))
    if re.search(
        rf"(Unknown Job Id|illegally formed \w+:) {number}(\.\S*)?$|{number} Job has finished", complaints, re.M
    ):
        return State("ended", detail="forgotten by the scheduler")
    if re.search(rf"^Job Id: {number}$", output, re.M):
        return State("ended", detail="its number is another job's now")
    return State("queued", detail="the server does not answer")


def _parse(text: str) -> dict[str, State]:
    """The jobs in `qstat -f`. Its JSON is none in many versions where a value holds quotes (openpbs 2049, 2541)."""
    found = {}
    for block in re.split(r"^Job Id: ", text.replace("\n\t", ""), flags=re.M)[1:]:
        number, *lines = block.splitlines()
        pairs = (line.strip().partition(" = ") for line in reversed(lines))  # of a name that comes again, the first
        job = {name: value for name, _, value in pairs}
        if "Job_Name" in job and "job_state" in job:
            found[job_id(number.strip(), job["Job_Name"])] = state_of(job)
    return found


def state_of(job: Mapping[str, str]) -> State:
    """A State from the attributes of a job, as `qstat -f` names them."""
    state, comment = job["job_state"], job.get("comment", "").strip()
    where = tuple(dict.fromkeys(part.split("/")[0] for part in job.get("exec_host", "").split("+") if part))
    if state in RUNNING:
        return State("running", detail=RUNNING[state], nodes=where)
    if state not in ENDED:
        return State("queued", detail=comment or state)
    status = job.get("Exit_status", "")
    return State("ended", _cause(job, status, comment), f"exit status {status or 'none'}: {comment}", where)


def _cause(job: Mapping[str, str], status: str, comment: str) -> Cause:
    if status in CAUSES:
        return CAUSES[status]
    if job.get("substate") == TERMINATED:
        return "preempted" if "terminated by Scheduler@" in comment else "cancelled"
    asked, used = (_seconds(job.get(name, "")) for name in ("Resource_List.walltime", "resources_used.walltime"))
    killed = int(status or 0) > 128  # what older versions leave of a job that was past its time
    return "timeout" if killed and 0 < asked <= used else ""


def _seconds(walltime: str) -> int:
    """Of "01:30:00"; 0 where none is stated."""
    seconds = 0
    for part in walltime.split(":"):
        seconds = 60 * seconds + int(part or 0)
    return seconds


def _serial(number: str) -> int:
    return int(number.split(".")[0])
