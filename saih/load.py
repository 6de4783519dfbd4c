"""What else a node does while steps are timed: processes that read files, and processes that compute.

Run as `python -m saih.load read FILE` or `python -m saih.load compute`: standard library only, until it is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from saih.lifeline import die_with_the_parent

READ_BYTES = 1 << 20
FILE_BYTES = 1 << 28
"""Of each reader's own file: as large as what a rank reads in a few seconds."""
HOGGED_BYTES = 1 << 20


@contextlib.contextmanager
def background(readers: int, hogs: int, folder: Path) -> Iterator[None]:
    """So many processes of each kind, all at work from here to the end of the block; a file in `folder` each reader.

    Raises OSError where a reader's file cannot be written, and where one of the processes ended early.
    """
    files = [folder / f"{number}.bin" for number in range(readers)]
    for file in files:
        _write(file)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for words in [("read", str(file)) for file in files] + [("compute",)] * hogs:
            command = [sys.executable, "-m", "saih.load", *words]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in running:
            if process.stdout is not None:
                process.stdout.readline()  # it is at work, or it has ended
        yield
        if any(process.poll() is not None for process in running):
            raise OSError("the background load ended before the timed steps did")
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def _write(file: Path) -> None:
    """Random bytes, written aside and renamed."""
    if file.exists() and file.stat().st_size == FILE_BYTES:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    with open(aside, "wb") as target:
        for _ in range(FILE_BYTES // READ_BYTES):
            target.write(os.urandom(READ_BYTES))
        target.flush()
        os.fsync(target.fileno())
    aside.rename(file)


def read_for_ever(file: Path) -> None:
    """Blocks in random order, dropped from the page cache, so that every one comes from storage."""
    places = [place * READ_BYTES for place in range(FILE_BYTES // READ_BYTES)]
    with open(file, "rb", buffering=0) as source:
        while True:
            random.shuffle(places)
            for place in places:
                os.pread(source.fileno(), READ_BYTES, place)
                os.posix_fadvise(source.fileno(), place, READ_BYTES, os.POSIX_FADV_DONTNEED)


def compute_for_ever() -> None:
    """One core, in C."""
    content = bytes(HOGGED_BYTES)
    while True:
        hashlib.sha256(content).digest()


if __name__ == "__main__":
    die_with_the_parent()
    print("at work", flush=True)
    if sys.argv[1] == "read":
        read_for_ever(Path(sys.argv[2]))
    compute_for_ever()
