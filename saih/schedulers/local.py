"""No scheduler: jobs run on this machine, one at a time, and outlive the saih that started them.

A job's id is its folder. It runs as long as somebody holds the lock on its `running` file: the script inherits the
lock when it starts and the kernel lets go when it dies, so neither a killed saih nor a reused pid can mislead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from saih.schedulers import State, Symptom

TEMPLATE = "local.sh.j2"
SUBMIT: tuple[str, ...] = ()
COMMANDS = ("bash", "flock", "timeout")
QUESTION: tuple[str, ...] = ()
SYMPTOMS: tuple[Symptom, ...] = ()
WAITS: dict[str, str] = {}
AGENTS = ""  # it has one node
MAX_QUEUED = 1
SHORTEST_PAUSE_S = LONGEST_PAUSE_S = 0.1
CANCEL_ON_INTERRUPT = True
GRACE_S = 10.0


def submit(script: Path) -> str:
    """Start the script in a session of its own, its output in log.txt."""
    folder = script.parent
    with open(folder / "running", "a") as lock, open(folder / "log.txt", "ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = subprocess.Popen(
            ["bash", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    (folder / "pid").write_text(str(child.pid))
    return str(folder)


def find(home: Path) -> str | None:
    """A job's id is its folder."""
    return str(home)


def states(ids: Sequence[str]) -> dict[str, State]:
    """Running while the lock is held, ended otherwise."""
    _reap()
    return {folder: State("running" if _is_running(Path(folder)) else "ended") for folder in ids}


def cancel(ids: Sequence[str]) -> None:
    """Ask the jobs' process groups to stop, then make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [Path(folder) for folder in ids if _is_running(Path(folder))]
        for folder in running:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
                os.killpg(int((folder / "pid").read_text()), number)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(_is_running(folder) for folder in running):
            _reap()
            time.sleep(0.05)


def _is_running(folder: Path) -> bool:
    try:
        with open(folder / "running") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _reap() -> None:
    """Collect children that have ended, so that none stays a zombie."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
