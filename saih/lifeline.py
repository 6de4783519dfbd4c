"""A process that does not outlive the one that started it, however that one ends."""

from __future__ import annotations

import contextlib
import ctypes
import signal

PR_SET_PDEATHSIG = 1


def die_with_the_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: nobody is left to use what it would do."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
