"""Try a site out: a tiny job by the very path a sweep takes, and in words what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saih import drive, jobs, plan, schedulers
from saih import sweep as language
from saih.core import FORMAT, Point
from saih.errors import SaihError
from saih.files import read_record
from saih.schedulers import Symptom
from saih.site import Site

WORKLOAD = "smoke"
SETTINGS: dict[str, language.Scalar] = {"seconds": 0.0, "steps": 2, "warmup": 1}
TAIL_LINES = 8
LONGER = "a larger --wait, or a part of the machine that is less busy"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is in order, a sentence, and what to try where it is not."""

    ok: bool
    text: str
    advice: str = ""
    log: Path | None = None
    tail: tuple[str, ...] = ()


SYMPTOMS = (
    Symptom(
        r"this is rank \d+ of 1, but",
        "every rank takes itself for the only one: the launcher ({launcher}) and what the ranks look to do not match",
        "another launcher (srun, torchrun), or the mpiexec of the MPI in use; with srun, mpi: pmi2 or pmix",
    ),
    Symptom(
        r"this is rank \d+ of \d+, but|no launcher told this process its rank",
        "the ranks are not as many as the job was given: launcher {launcher} is not told, or not understood",
        "another launcher: srun, torchrun, mpiexec, openmpi",
    ),
    Symptom(
        r"EADDRINUSE|[Aa]ddress already in use",
        "several ranks take themselves for the first one, or the port is taken",
        "another launcher; or set MASTER_PORT under environment",
    ),
    Symptom(r"No module named 'torch'|No module named torch", "the Python of the nodes has no torch", "set python"),
    Symptom(
        r"No module named '?saih|pack\.json: cannot be read",
        "the nodes do not see the folder this saih or its jobs are in",
        "run saih in a folder on a file system that login and compute nodes share",
    ),
    Symptom(
        r"line \d+: (?P<what>cd: .*)",
        "the nodes do not see the folder saih runs in: {what}",
        "run saih in a folder on a file system that login and compute nodes share",
    ),
    Symptom(
        r"line \d+: (?P<what>.*(?:command not found|No such file or directory))",
        "a line of setup, or the launcher, does not work on the nodes: {what}",
        "correct setup; test its lines in a job of your own",
    ),
    Symptom(
        r"not compiled with CUDA|No CUDA GPUs|NVIDIA driver|invalid device ordinal|CUDA error",
        "the ranks cannot use their GPUs",
        "a torch built for CUDA in that Python, the driver on the nodes, --nv for apptainer, submit.gres",
    ),
    Symptom(
        r"Name or service not known|name resolution|gai ?error",
        "the nodes cannot resolve the name of the first one",
        "set MASTER_ADDR under environment to an address that all nodes reach",
    ),
    Symptom(
        r"[Cc]onnection (refused|timed out)|[Tt]imed out|no route to host|has not ended",
        "the ranks do not reach each other",
        "name the network: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME under environment",
    ),
    Symptom(
        r"data folder cannot be written",
        "the data folder {data} cannot be written on the nodes",
        "set data_folder to a folder on a shared file system that is writable there",
    ),
    Symptom(
        r"data folder is not shared: (?P<what>.*)",
        "the data folder {data} is not shared: {what}",
        "set data_folder to a folder on a shared file system",
    ),
    Symptom(
        r"ranks run on (?P<what>.*asked for)",
        "the ranks are spread wrongly: ranks run on {what}",
        "another launcher, or one that knows the scheduler: mpiexec needs to be built for it",
    ),
    Symptom(
        r"ranks share \d+ GPUs",
        "several ranks have the same GPU",
        "no --gpus-per-task or gpu-bind in submit.extra; every rank must see all GPUs of its node",
    ),
    Symptom(
        r"a rank may use (?P<what>\d+ cores.*)",
        "the ranks are tied to too few cores: {what}",
        "a lower threads_per_rank; or a launcher that binds ranks less tightly",
    ),
    Symptom(r"clocks of the nodes differ by .*", "{matched}", "tell whoever runs the machine; file times mislead"),
    Symptom(r"sum over \d+ ranks is wrong.*", "{matched}", "torch and its network library do not fit together"),
    Symptom(
        r"before any point started",
        "the job ended before any rank began",
        "see its log; a line of setup that fails ends the job, silently if it says nothing itself",
    ),
)
"""Looked for in this order, after those of the scheduler: what comes first explains what comes later."""


class StillWaitingError(Exception):
    """Patience is at an end: the job waits in the queue, or hangs."""


def check(site: Site, root: Path, wait_s: float) -> Iterator[Finding]:
    """Findings one after the other, as they are made; stops at what makes the rest pointless.

    `root` is the folder of sweeps; jobs may wait `wait_s` in the queue each.
    """
    where = f"{site.scheduler}, {site.launcher}, {site.nodes} x {site.gpus_per_node} {site.device} ranks"
    yield Finding(True, f"site {site.name} loads: {where}")
    yield from _find_commands(site)
    token = secrets.token_hex(8)
    folder = Path(site.data_folder, f"{WORKLOAD}-{site.name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "login").write_text(token)
        yield Finding(True, f"data folder {Path(site.data_folder).absolute()} can be written here")
    except OSError as error:
        text = f"data folder {Path(site.data_folder).absolute()} cannot be written here ({error.strerror})"
        yield Finding(False, text, "set data_folder to a folder you may write in")
        return
    for shape in shapes(site):
        findings = list(_try(site, root, shape, folder, wait_s))
        yield from findings
        if not all(finding.ok for finding in findings):
            return
    shutil.rmtree(folder, ignore_errors=True)


def shapes(site: Site) -> list[str]:
    """One rank, then the largest cheap shape: two nodes with two ranks each, where the site has them."""
    largest = f"{min(2, site.nodes)}x{min(2, site.gpus_per_node)}"
    return list(dict.fromkeys(["1x1", largest]))


def _find_commands(site: Site) -> Iterator[Finding]:
    words = schedulers.load(site.scheduler).COMMANDS
    missing = [word for word in words if shutil.which(word) is None]
    if missing:
        advice = "run saih on a login node of the cluster, or load the module that has them"
        yield Finding(False, f"not on the PATH here: {', '.join(missing)}", advice)
    else:
        yield Finding(True, f"on the PATH here: {', '.join(words)}")


def _try(site: Site, root: Path, shape: str, folder: Path, wait_s: float) -> Iterator[Finding]:
    """One job of that shape, driven as any sweep is."""
    asked = language.make_sweep(WORKLOAD, {"shape": [shape]}, SETTINGS | {"folder": folder.name}, site=site.name)
    grid = language.points(asked, site.defaults)
    planned = plan.make_plan(asked, language.sweep_name(asked, grid), grid, site, None, Path(site.data_folder))
    if planned.pruned:
        yield Finding(False, f"a job of {shape} ranks does not fit the site: {planned.pruned[0].reason}", "correct it")
        return
    sweep = jobs.SweepFolder(root / planned.name)
    (point,) = grid
    with sweep.lock():
        scheduler = schedulers.load(site.scheduler)
        scheduler.cancel(list(drive.live_jobs(sweep, scheduler)))
        shutil.rmtree(sweep.points, ignore_errors=True)
        shutil.rmtree(sweep.jobs, ignore_errors=True)
        sweep = jobs.prepare(planned, root, ["saih", "site", "check", site.name], None)
        (job,) = plan.pack(planned.kept, site, sweep.jobs)
        patience = _Patience(wait_s, job.time_limit_s)
        began = time.monotonic()
        try:
            drive.run(sweep, planned, patience)
        except StillWaitingError as why:
            scheduler.cancel(list(drive.live_jobs(sweep, scheduler)))
            yield _explain(site, sweep, f"{_words(point)}: {why}")
            return
        except SaihError as refusal:
            yield _explain(site, sweep, f"{_words(point)}: {refusal}")
            return
    if not sweep.is_measured(point):
        yield _explain(site, sweep, f"{_words(point)}: {_failure(sweep)}")
        return
    measured = read_record(sweep.points / point.folder / "measurement.json", FORMAT, jobs.MEASUREMENT_KEYS)
    yield Finding(
        True, f"{_words(point)}: a job ran through, {time.monotonic() - began:.0f} s with its time in the queue"
    )
    yield from _judge(site, point, measured, folder)


class _Patience:
    """Watches a drive and raises StillWaitingError when its job waits, or runs, longer than it may."""

    def __init__(self, wait_s: float, run_s: float) -> None:
        self.wait_s, self.run_s, self.began, self.started = wait_s, run_s, time.monotonic(), 0.0

    def __call__(self, progress: drive.Progress) -> None:
        now = time.monotonic()
        states = list(progress.jobs.values())
        if not self.started and any(state.phase == "running" for state in states):
            self.started = now
        if not self.started and now - self.began > self.wait_s:
            detail = ", ".join(sorted({state.detail for state in states if state.detail})) or "no reason told"
            raise StillWaitingError(f"its job still waits in the queue after {self.wait_s:g} s ({detail}); cancelled")
        if self.started and now - self.started > self.run_s:
            raise StillWaitingError(f"its job has not ended {self.run_s:g} s after it began; cancelled")


def _judge(site: Site, point: Point, measured: dict[str, Any], folder: Path) -> Iterator[Finding]:
    """What the measurement says, beside what this machine says."""
    numbers = measured["check"]
    cores = f"{numbers['cores']:.0f} cores each"
    yield Finding(True, f"{_words(point)}: ranks where they should be, on {site.device}, {cores}; sums right")
    written = [rank for rank in range(point.ranks) if (folder / f"rank-{rank}-of-{point.ranks}").is_file()]
    if len(written) == point.ranks:
        yield Finding(True, f"{_words(point)}: the data folder is shared; clocks {numbers['clock_skew_s']:.2g} s apart")
    else:
        text = "the data folder is not shared: what the nodes wrote there is not seen here"
        yield Finding(False, f"{_words(point)}: {text}", "set data_folder to a folder on a shared file system")
    there = {"python": measured["environment"].get("python"), "torch": measured["environment"].get("torch")}
    here = {"python": platform.python_version(), "torch": _torch_here()}
    told = ", ".join(f"{name} {version}" for name, version in there.items())
    if there == here or site.python or site.container:
        same = "as here" if there == here else f"here {', '.join(f'{key} {value}' for key, value in here.items())}"
        yield Finding(True, f"{_words(point)}: {told}, {same}")
    else:
        text = f"the nodes have {told}, here it is {', '.join(f'{key} {value}' for key, value in here.items())}"
        yield Finding(False, f"{_words(point)}: {text}", "name the interpreter of the workers: python")


def _failure(sweep: jobs.SweepFolder) -> str:
    failures = sweep.failures()
    return " ".join(f"{failures[0]['kind']}: {failures[0]['reason']}".split()) if failures else "it was not measured"


def _explain(site: Site, sweep: jobs.SweepFolder, told: str) -> Finding:
    """A failure in words: the first symptom that its words, or its job's log, show."""
    homes = sweep.job_folders()
    log = homes[-1] / "log.txt" if homes else None
    tail = jobs.log_tail(homes[-1]) if homes else ""
    lines = tuple(line for line in tail.splitlines() if line.strip())[-TAIL_LINES:]
    head = told.split(": ", 1)[0]
    scheduler = schedulers.load(site.scheduler)
    if "still waits" in told:
        advice = next((each for pattern, each in scheduler.WAITS.items() if re.search(pattern, told)), LONGER)
        return Finding(False, told, advice, log, lines)
    program = (site.container or (site.python,))[0]
    if program and re.search(rf"{re.escape(program)}.*(No such file|not found|error)", tail + told):
        text = f"the nodes cannot start {program}"
        return Finding(False, f"{head}: {text}", "correct python, or container, of the site", log, lines)
    known = {
        "partition": site.submit.partition or "(the default)",
        "account": site.submit.account or "(your default)",
        "qos": site.submit.qos or "(your default)",
        "mpi": site.mpi,
        "launcher": site.launcher,
        "data": Path(site.data_folder).absolute(),
    }
    for symptom in (*scheduler.SYMPTOMS, *SYMPTOMS):
        match = re.search(symptom.pattern, tail) or re.search(symptom.pattern, told)
        if match:
            text = symptom.text.format(**known, matched=match[0], **match.groupdict())
            return Finding(False, f"{head}: {text}", symptom.advice, log, lines)
    if log is not None and not log.exists():
        return Finding(False, told, "the nodes may not see this folder: it wrote no log", log)
    return Finding(False, told, "see its log", log, lines)


def _words(point: Point) -> str:
    return f"{point.nodes} node{'s' if point.nodes > 1 else ''} x {point.gpus} rank{'s' if point.gpus > 1 else ''}"


def _torch_here() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"
