"""One step reads a part of the files, cold or warm, by the loader of training or by one of its peers."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from saih.core import Check, Clock, Context, Point, Work
from saih.errors import SaihError
from workloads.cosmology.dataset import Dataset, generate
from workloads.cosmology.loader import Loader
from workloads.cosmology.loading import spec
from workloads.cosmology.recipe import Recipe

BLOCK_BYTES = 2**21
"""What plain reading asks for at a time: with this, O_DIRECT keeps the disk busy."""
AHEAD = 4
"""Batches that each way of loading may hold ready."""
COLD = 0.9
"""Share of the bytes that must come from storage for reading to count as cold."""


class Reader(Protocol):
    """A way to read the parts of a dataset, one after the other and round again."""

    def part(self) -> Iterator[Tensor]:
        """What the next part consists of, piece by piece; a piece is valid until the next one."""

    def expected(self, part: Sequence[int]) -> Iterator[Tensor]:
        """The same bytes in any order and pieces, read plainly."""

    def close(self) -> None:
        """Let go of threads, processes and files."""


def setup(point: Point, context: Context) -> Loading:
    """Make the volumes where they are missing, and hold each against its checksum."""
    params = point.params
    samples = spec.parts(params) * spec.step_volumes(params)
    recipe = Recipe(int(params["mesh"]), int(params["channels"]), point.seed, samples)
    generate(Path(context.data_folder), recipe, context.place.rank, context.place.world, storage=str(params["storage"]))
    if context.place.world > 1:
        dist.barrier()
    return Loading(point, Dataset(Path(context.data_folder), recipe, str(params["storage"])))


class Loading:
    """A dataset, its parts, and the way they are read."""

    def __init__(self, point: Point, volumes: Dataset) -> None:
        self.params, self.volumes = point.params, volumes
        self.cold = point.params["cache"] == "cold"
        each = spec.step_volumes(point.params)
        self.parts = [range(part * each, (part + 1) * each) for part in range(spec.parts(point.params))]
        cost = spec.cost(point.params)
        self.work = Work(cost.work, moved_bytes=cost.operations[0].moved_bytes)
        self.reader: Reader | None = None
        for index in range(len(volumes)):  # what is timed is reading in any epoch but the first, which verifies
            volumes.read([index])

    def check(self) -> Check:
        """What arrives is what the files hold; where reading is to be cold, it comes from storage."""
        if self.cold:
            self.volumes.evict(range(len(self.volumes)))
        reader = self._start()
        try:
            before = storage_read_bytes()
            arrived = _sums(reader.part())
            from_storage = storage_read_bytes() - before
        finally:
            reader.close()
        expected = _sums(reader.expected(self.parts[0]))
        numbers = {"bytes": float(arrived[0]), "share_from_storage": min(1.0, from_storage / arrived[0])}
        if self.cold:
            self.volumes.evict(range(len(self.volumes)))
        wrongs = {
            f"{arrived[0]} bytes arrived that add up to {arrived[1]}; "
            f"the files hold {expected[0]} that add up to {expected[1]}": arrived != expected,
            f"still warm: {numbers['share_from_storage']:.0%} of the bytes came from storage, and cache=cold wants "
            f"{COLD:.0%}; another process may hold the files, or they lie in memory": self.cold
            and not numbers["share_from_storage"] >= COLD,
        }
        why = "; ".join(text for text, is_wrong in wrongs.items() if is_wrong)
        return Check(not why, numbers, why)

    def step(self, clock: Clock) -> Work:
        if self.reader is None:
            self.reader = self._start()
        clock.enter("input")
        for _ in self.reader.part():
            pass
        return self.work

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    def _start(self) -> Reader:
        batch, readers = int(self.params["batch"]), int(self.params["readers"])
        if self.params["variant"] == "loader":
            return Threads(self.volumes, self.parts, batch, readers)
        if self.params["variant"] == "dataloader":
            return Processes(self.volumes, self.parts, batch, readers)
        return EndToEnd(self.volumes, self.parts, direct=self.params["variant"] == "direct")


def shuffled_batches(parts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Batches of each part in an order of its own, the parts one after the other and round again, without end."""
    for turn in count():
        part = parts[turn % len(parts)]
        order = np.random.default_rng(turn).permutation(part).tolist()
        yield from (order[first : first + batch] for first in range(0, len(order), batch))


class Threads:
    """The loader that training reads with."""

    def __init__(self, volumes: Dataset, parts: Sequence[Sequence[int]], batch: int, readers: int) -> None:
        self.volumes, self.batches_per_part = volumes, -(-len(parts[0]) // batch)
        self.loader = Loader(volumes, shuffled_batches(parts, batch), readers, AHEAD)

    def part(self) -> Iterator[Tensor]:
        return (counts for counts, _ in islice(self.loader, self.batches_per_part))

    def expected(self, part: Sequence[int]) -> Iterator[Tensor]:
        return (self.volumes.read([index]) for index in part)

    def close(self) -> None:
        self.loader.close()


class Processes:
    """torch's DataLoader with as many workers, each AHEAD batches deep; int16 as they lie on disk, no transform."""

    def __init__(self, volumes: Dataset, parts: Sequence[Sequence[int]], batch: int, readers: int) -> None:
        self.volumes, self.batches_per_part = volumes, -(-len(parts[0]) // batch)
        loader = DataLoader(
            OneByOne(volumes),
            batch_sampler=shuffled_batches(parts, batch),
            num_workers=readers,
            prefetch_factor=AHEAD,
        )
        self.batches: Iterator[Tensor] = iter(loader)

    def part(self) -> Iterator[Tensor]:
        return islice(self.batches, self.batches_per_part)

    def expected(self, part: Sequence[int]) -> Iterator[Tensor]:
        return (self.volumes.read([index]) for index in part)

    def close(self) -> None:
        del self.batches  # its workers end with it


class OneByOne(MapDataset[Tensor]):
    """Volumes as torch's DataLoader wants them."""

    def __init__(self, volumes: Dataset) -> None:
        self.volumes = volumes

    def __getitem__(self, index: int) -> Tensor:
        return self.volumes.read([index])[0]


class EndToEnd:
    """The files of each part from their first byte to their last, in blocks into one buffer."""

    def __init__(self, volumes: Dataset, parts: Sequence[Sequence[int]], direct: bool) -> None:
        self.volumes, self.parts, self.direct = volumes, parts, direct
        self.turn = 0
        self.buffer = mmap.mmap(-1, BLOCK_BYTES)  # page-aligned, as O_DIRECT wants

    def part(self) -> Iterator[Tensor]:
        files = self.volumes.files(self.parts[self.turn % len(self.parts)])
        self.turn += 1
        block = torch.frombuffer(self.buffer, dtype=torch.uint8)
        for path in files:
            descriptor = self._open(path)
            try:
                offset = 0
                while got := os.preadv(descriptor, [self.buffer], offset):
                    offset += got
                    yield block[:got]
            finally:
                os.close(descriptor)

    def expected(self, part: Sequence[int]) -> Iterator[Tensor]:
        return (torch.from_numpy(np.fromfile(path, np.uint8)) for path in self.volumes.files(part))

    def close(self) -> None:
        """The buffer goes with this object."""

    def _open(self, path: Path) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            raise SaihError(f"{path} cannot be read past the page cache: {error.strerror}") from None
        if not self.direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return descriptor


def _sums(pieces: Iterator[Tensor]) -> tuple[int, int]:
    """How many bytes, and what they add up to."""
    number = total = 0
    for piece in pieces:
        octets = piece.contiguous().view(torch.uint8)
        number, total = number + octets.numel(), total + int(octets.sum(dtype=torch.int64))
    return number, total


def storage_read_bytes() -> float:
    """Bytes fetched from storage so far by this process and its workers; NaN where the system does not count them."""
    workers = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
    try:
        return float(sum(_read_bytes(Path("/proc", process, "io")) for process in ("self", *workers)))
    except OSError:
        return float("nan")


def _read_bytes(path: Path) -> int:
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("read_bytes:"))
    return int(line.split()[1])
