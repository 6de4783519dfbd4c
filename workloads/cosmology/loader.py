"""Batches of volumes for one rank: which come next, and threads that read them ahead of the training step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workloads.cosmology.volumes import Volumes, Voxels

WINDOW_FILES = 16


@dataclass(frozen=True)
class Order:
    """An endless row of batches: every epoch holds all volumes once, in an order of its own.

    Files come in random order, and volumes in random order within a window of WINDOW_FILES of them: what the system
    reads ahead in a file is then used while it still remembers it.

    Step s gives rank r the batch at (s * world + r) * batch of that row, so the ranks' batches are disjoint, and which
    volumes a step sees together depends on `world * batch` alone.
    """

    samples: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1
    per_file: int = 1

    def indices(self, step: int, rank: int | None = None) -> list[int]:
        """The volumes of one step of this rank, or of another."""
        first = (step * self.world + (self.rank if rank is None else rank)) * self.batch
        places = (divmod(place, self.samples) for place in range(first, first + self.batch))
        return [int(_shuffled(self.samples, self.per_file, self.seed, epoch)[place]) for epoch, place in places]

    def steps(self, first: int = 0) -> Iterator[list[int]]:
        return (self.indices(step) for step in count(first))


@lru_cache(maxsize=4)
def _shuffled(samples: int, per_file: int, seed: int, epoch: int) -> NDArray[np.int64]:
    random = np.random.default_rng([abs(seed), epoch])
    files = [np.arange(first, min(samples, first + per_file)) for first in range(0, samples, per_file)]
    order = random.permutation(len(files))
    windows = [order[first : first + WINDOW_FILES] for first in range(0, len(files), WINDOW_FILES)]
    return np.concatenate([random.permutation(np.concatenate([files[each] for each in window])) for window in windows])


class Loader:
    """Reads batches ahead: `threads` read single volumes, up to `ahead` batches before they are asked for.

    Threads, because read() lets Python run meanwhile, and a batch read by a thread is already where it is needed; a
    worker process would have to send it over. The memory of a batch is used again after the next one is taken, which
    saves the system from clearing fresh pages for every batch.
    """

    def __init__(
        self, volumes: Volumes, batches: Iterable[list[int]], threads: int = 2, ahead: int = 4, pinned: bool = False
    ) -> None:
        """`pinned`: page-locked memory, from which a GPU is filled fastest."""
        self._volumes, self._batches, self._pinned = volumes, iter(batches), pinned
        self._pool = ThreadPoolExecutor(threads, "loader")
        self._coming: deque[tuple[list[int], Tensor, list[Future[None]]]] = deque()
        self._spare: list[Tensor] = []
        self._taken: Tensor | None = None
        for indices in islice(self._batches, ahead):
            self._order(indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """int16 [B, N, N, N, C] and float32 [B, 4], valid until the next call. Raises SaihError as reading does."""
        if self._taken is not None:
            self._spare.append(self._taken)
            self._taken = None
        for indices in islice(self._batches, 1):
            self._order(indices)
        if not self._coming:
            raise StopIteration
        indices, counts, parts = self._coming.popleft()
        for part in parts:
            part.result()
        self._taken = counts
        return counts, self._volumes.targets(indices)

    def close(self) -> None:
        """Stop reading; batches not taken are lost."""
        self._pool.shutdown(cancel_futures=True)

    def _order(self, indices: list[int]) -> None:
        fits = (each for each in range(len(self._spare)) if len(self._spare[each]) == len(indices))
        place = next(fits, None)
        counts = self._memory(len(indices)) if place is None else self._spare.pop(place)
        parts = [
            self._pool.submit(self._volumes.read_into, index, target)
            for index, target in zip(indices, counts.numpy(), strict=True)
        ]
        self._coming.append((indices, counts, parts))

    def _memory(self, batch: int) -> Tensor:
        return torch.empty(batch, *self._volumes.shape, dtype=torch.int16, pin_memory=self._pinned)


class InMemory(Volumes):
    """Volumes read once and kept: what training is like when input costs nothing but a copy."""

    def __init__(self, volumes: Volumes) -> None:
        everything = range(len(volumes))
        self.shape, self.periodic, self.mean_count = volumes.shape, volumes.periodic, volumes.mean_count
        self.per_file = volumes.per_file
        self._counts, self._targets = volumes.read(everything).numpy(), volumes.targets(everything)

    def __len__(self) -> int:
        return len(self._counts)

    def read_into(self, index: int, target: Voxels) -> None:
        target[...] = self._counts[index]

    def targets(self, indices: Iterable[int]) -> Tensor:
        return self._targets[list(indices)]

    def files(self, indices: Iterable[int]) -> list[Path]:
        return []
