"""A rank that is told to end has a moment to say what it knows.

Where a rank is lost, its launcher tells the others to end while they are finding out which one it was.
"""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE_S = 5.0
"""From SIGTERM to the end: less than torchrun and Slurm wait before SIGKILL (30 s)."""


def allow(grace_s: float = GRACE_S) -> None:
    """From now on SIGTERM ends this process only after `grace_s`, whatever it waits for; forked children as ever.

    Called by the main thread, once.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.siginterrupt(signal.SIGTERM, False)
    signal.set_wakeup_fd(writing)  # Python's own handler has to wait for the main thread, which may be in a collective
    os.register_at_fork(after_in_child=_as_ever)
    threading.Thread(target=_end, args=(reading, grace_s), daemon=True).start()


def _end(reading: int, grace_s: float) -> None:
    while os.read(reading, 1) != bytes([signal.SIGTERM]):
        pass
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _as_ever() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
