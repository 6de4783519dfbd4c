"""Slurm: sbatch, one squeue for all states, sacct for what squeue has forgotten, scancel.

Without accounting nobody knows how such a job ended: squeue and scontrol forget it at the same time, after MinJobAge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saih.errors import SaihError
from saih.schedulers import Cause, State, Symptom, ask, call, expand, first_line, job_id, job_name, number_of

TEMPLATE = "slurm.sh.j2"
SUBMIT = ("account", "partition", "qos", "constraint", "reservation", "gres", "dependency", "exclusive", "extra")
COMMANDS = ("sbatch", "squeue", "scancel", "srun")
QUESTION = ("sinfo", "--noheader")
AGENTS = "srun"
MAX_QUEUED = 20
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
CANCEL_ON_INTERRUPT = False

QUEUED = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
    "SUSPENDED",
}
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"}
CAUSES: dict[str, Cause] = {
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node-fail",
    "BOOT_FAIL": "boot-fail",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "out-of-memory",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}
"""All other ends (COMPLETED, FAILED) are the job's own doing."""
HELD = "launch failed requeued held"
"""Why a job waits that its node could not start: for somebody to release it, so for ever."""
SYMPTOMS = (
    Symptom(
        r"[Ii]nvalid partition",
        "the scheduler knows no partition {partition}",
        "sinfo lists them; name one in submit.partition",
    ),
    Symptom(
        r"[Ii]nvalid account",
        "the scheduler does not let you use account {account} in partition {partition}",
        "sacctmgr show associations user=$USER lists yours; name one in submit.account",
    ),
    Symptom(r"[Ii]nvalid qos", "the scheduler does not let you use QOS {qos}", "set submit.qos to one you may use"),
    Symptom(
        r"[Ii]nvalid generic resource",
        "the scheduler does not have the GPUs asked for under that name",
        "sinfo -o '%P %G' shows them; set submit.gres, or gpus_per_node",
    ),
    Symptom(
        r"time limit is invalid|PartitionTimeLimit|exceeds? .*time limit",
        "the job asks for more time than it may have",
        "lower job_minutes",
    ),
    Symptom(
        r"[Nn]ode count|More processors requested|[Rr]equested node configuration|PartitionNodeLimit",
        "the job asks for more than the partition's nodes have, or for more nodes",
        "compare nodes, gpus_per_node x threads_per_rank and submit with: scontrol show partition",
    ),
    Symptom(
        r"specified plugin name for mpi|Invalid MPI type",
        "srun does not offer the PMI that the site names: mpi: {mpi}",
        "srun --mpi=list shows what it offers; set mpi: to one of these, or leave it out",
    ),
)
WAITS = {
    r"Limit": "a limit of partition, account or QOS holds it back: ask for less, or use another",
    r"Down|Inactive|NotAvail|Drain": "the partition or its nodes are not available: sinfo -R says why",
    r"Priority|Resources": "the machine is busy: a larger --wait, a debug partition or QOS",
    r"Held|Hold": "it is held: scontrol show job says by whom",
}


def submit(script: Path) -> str:
    """`sbatch`. The script opens its log itself: in a path of Slurm's own, some characters mean something or fail."""
    home = script.parent.absolute()
    words = ["sbatch", "--parsable", f"--job-name={job_name(home)}", "--chdir=/", "--output=/dev/null"]
    answer = call([*words, str(home / script.name)])
    if answer.returncode != 0:
        raise SaihError(f"sbatch refused {script}: {first_line(answer.stderr)}")
    return job_id(answer.stdout.strip().split(";")[0], job_name(home))


def find(home: Path) -> str | None:
    """By the job's name, which no other folder's job has."""
    chosen = ["--me", "--states=all", f"--name={job_name(home)}"]
    numbers = ask(["squeue", "--noheader", *chosen, "--format=%A"]).split()
    return job_id(max(numbers, key=int), job_name(home)) if numbers else None


def states(ids: Sequence[str]) -> dict[str, State]:
    """One squeue for all; sacct, where there is accounting, for those it has forgotten.

    While the controller does not answer, a job is "queued": nothing is known to have happened to it.
    """
    if not ids:
        return {}
    numbers = [number_of(name) for name in ids]
    answer = call(["squeue", "--noheader", "--states=all", f"--jobs={','.join(numbers)}", "--format=%A|%j|%T|%N|%r"])
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        return {name: State("queued", detail="the controller does not answer") for name in ids}
    known = _parse(answer.stdout)
    forgotten = [number_of(name) for name in ids if name not in known]
    if forgotten:
        known |= _parse(_remembered(forgotten))
    return {name: known.get(name, State("ended", detail="forgotten by the scheduler")) for name in ids}


def cancel(ids: Sequence[str]) -> None:
    """`scancel` of all."""
    if ids:
        call(["scancel", *(number_of(name) for name in ids)])


def _remembered(numbers: Sequence[str]) -> str:
    """Lines "number|name|STATE|nodes" of accounting, none where there is no accounting. An id's last line counts."""
    fields = "--format=JobIDRaw,JobName,State,NodeList"
    chosen = f"--jobs={','.join(numbers)}"
    answer = call(["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", chosen, fields])
    return answer.stdout if answer.returncode == 0 else ""


def energies(ids: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(joule, seconds) of those jobs whose energy Slurm has counted; none without accounting or an energy plugin.

    Every step counts all of its nodes: of a job the step that counted most stands for it, or nodes would count twice.
    """
    if not ids:
        return {}
    names = {number_of(name): name for name in ids}
    fields = "--format=JobIDRaw,ConsumedEnergyRaw,ElapsedRaw"
    answer = call(["sacct", "--noheader", "--parsable2", f"--jobs={','.join(names)}", fields])
    found: dict[str, tuple[float, float]] = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        job, joule, seconds = [*line.split("|"), "", ""][:3]
        name = names.get(job.split(".")[0])
        if name and joule.isdecimal() and seconds.isdecimal() and int(seconds) > 0 and int(joule) > 0:
            found[name] = max(found.get(name, (0.0, 1.0)), (float(joule), float(seconds)))
    return found


def _parse(lines: str) -> dict[str, State]:
    found = {}
    for line in lines.splitlines():
        fields = line.split("|")
        if len(fields) in (4, 5) and fields[0].isdigit() and fields[2]:
            found[job_id(fields[0], fields[1])] = state_of(*fields[2:])
    return found


def state_of(word: str, nodes: str, reason: str = "") -> State:
    """A State from Slurm's word ("CANCELLED by 1000" from sacct), node list ("n[1-2,4]") and why it waits."""
    key = word.split()[0].rstrip("+")
    where = expand(nodes)
    if key in QUEUED:
        detail = f"{key} ({reason})" if reason not in ("", "None") else key
        return State("ended", "boot-fail", detail) if reason == HELD else State("queued", detail=detail)
    if key in RUNNING:
        return State("running", detail=key, nodes=where)
    return State("ended", CAUSES.get(key, ""), key, where)
