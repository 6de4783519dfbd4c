"""Volumes whose reading is held back: at a rate that stands for a slower storage, or by forgetting what was read."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from workloads.cosmology.volumes import Volumes, Voxels


class _Wrapped(Volumes):
    """Volumes read as others are."""

    def __init__(self, volumes: Volumes) -> None:
        self.volumes = volumes
        self.shape, self.periodic, self.mean_count = volumes.shape, volumes.periodic, volumes.mean_count
        self.per_file = volumes.per_file

    def __len__(self) -> int:
        return len(self.volumes)

    def read_into(self, index: int, target: Voxels) -> None:
        self.volumes.read_into(index, target)

    def targets(self, indices: Sequence[int]) -> Tensor:
        return self.volumes.targets(indices)

    def files(self, indices: Sequence[int]) -> list[Path]:
        return self.volumes.files(indices)


class Throttled(_Wrapped):
    """Emulated: all threads of a rank together get so many bytes a second, and no more."""

    def __init__(self, volumes: Volumes, bytes_per_s: float) -> None:
        super().__init__(volumes)
        self.volume_s = volumes.sample_bytes / bytes_per_s
        self.lock, self.free_at_s = threading.Lock(), 0.0

    def read_into(self, index: int, target: Voxels) -> None:
        with self.lock:
            self.free_at_s = max(self.free_at_s, time.monotonic()) + self.volume_s
            ready_s = self.free_at_s
        super().read_into(index, target)
        time.sleep(max(0.0, ready_s - time.monotonic()))


class Cold(_Wrapped):
    """The system forgets a volume's file before it is read, as in a data set that is larger than memory."""

    def read_into(self, index: int, target: Voxels) -> None:
        self.evict([index])
        super().read_into(index, target)
