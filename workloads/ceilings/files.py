"""What storage gives to one process that waits for each block: reads and writes of a file, and opening small ones.

One file, one block after the other, as a training step without prefetch reads its samples; fio's psync engine at queue
depth 1 does the same.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saih.core import Params
from saih.errors import SaihError
from workloads.ceilings import spec

CACHED = 0.5
"""A cold read of which less than this comes from storage was none."""


class FileTransfer:
    """A file, and the blocks of it that one call moves."""

    phase = "input"

    def __init__(self, path: Path, params: Params, seed: int) -> None:
        self.path, self.cache = path, str(params["cache"])
        self.length, self.random = int(params["file_bytes"]), params["pattern"] == "random"
        self.block_bytes = spec.RANDOM_BLOCK_BYTES if self.random else spec.SEQUENTIAL_BLOCK_BYTES
        self.dice = random.Random(seed)  # noqa: S311
        content = np.random.default_rng(seed).bytes(self.length)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.content = np.frombuffer(content, dtype=np.uint8)
        self.buffer = mmap.mmap(-1, self.block_bytes)  # page-aligned, as O_DIRECT wants
        self.file = self._open()
        os.fsync(self.file)
        if self.random:  # no reading ahead of what is not asked for
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)

    def prepare(self) -> None:
        """Before a call, on nobody's account: a cold file leaves the page cache, in so far as the kernel obeys."""
        if self.cache == "cold":
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file and remove it."""
        os.close(self.file)
        self.path.unlink(missing_ok=True)

    def _places(self) -> Iterator[int]:
        """Where the blocks of a call begin."""
        count = self.length // self.block_bytes
        chosen = self.dice.sample(range(count), spec.RANDOM_BLOCKS) if self.random else range(count)
        return (place * self.block_bytes for place in chosen)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | (os.O_DIRECT if self.cache == "direct" else 0))
        except OSError as error:
            self.path.unlink()
            raise SaihError(
                f"{self.path.parent}: its file system has no O_DIRECT ({error.strerror}); leave cache=direct out"
            ) from None


class Read(FileTransfer):
    """Blocks of a file, into one buffer."""

    def call(self) -> None:
        for place in self._places():
            os.preadv(self.file, [self.buffer], place)

    def error(self) -> float:
        """0, or infinity where a block is not what was written, or a cold read came out of the page cache."""
        before, moved = _storage_bytes(), 0
        self.prepare()
        for place in self._places():
            moved += os.preadv(self.file, [self.buffer], place)
            read = np.frombuffer(self.buffer, dtype=np.uint8)
            if not np.array_equal(read, self.content[place : place + self.block_bytes]):
                return float("inf")
        if self.cache == "cold" and _storage_bytes() - before < CACHED * moved:
            raise SaihError(f"{self.path.parent}: the page cache keeps files, so nothing there can be cold")
        return 0.0


class Write(FileTransfer):
    """Blocks of a file that is there; cold and direct ones until storage has them."""

    def call(self) -> None:
        for place in self._places():
            os.pwritev(self.file, [self.buffer], place)
        if self.cache != "warm":
            os.fdatasync(self.file)

    def error(self) -> float:
        """0, or infinity where the file does not hold, block by block, what was written over it."""
        written = self.content[::-1][: self.block_bytes].tobytes()
        self.buffer[:] = written
        before = self.dice.getstate()
        self.call()
        self.dice.setstate(before)
        expected = self.content.copy()
        for place in self._places():
            expected[place : place + self.block_bytes] = np.frombuffer(written, dtype=np.uint8)
        return 0.0 if np.array_equal(np.fromfile(self.path, dtype=np.uint8), expected) else float("inf")


class Opens:
    """Small files: open, read, close, each for itself."""

    phase = "input"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{number}.bin" for number in range(spec.OPENED_FILES)]
        for number, path in enumerate(self.paths):
            path.write_bytes(number.to_bytes(2) * (spec.OPENED_BYTES // 2))

    def prepare(self) -> None:
        """Nothing: names and contents are in memory, so this is what the file system itself costs."""

    def call(self) -> list[bytes]:
        found = []
        for path in self.paths:
            file = os.open(path, os.O_RDONLY)
            found.append(os.read(file, spec.OPENED_BYTES))
            os.close(file)
        return found

    def error(self) -> float:
        whole = all(read == number.to_bytes(2) * (spec.OPENED_BYTES // 2) for number, read in enumerate(self.call()))
        return 0.0 if whole else float("inf")

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder)


def _storage_bytes() -> int:
    """Bytes this process has fetched from storage so far, as the kernel counts them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])
