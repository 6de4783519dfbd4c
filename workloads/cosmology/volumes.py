"""What training reads: numbered int16 volumes with their targets, whatever layout they lie on disk in."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saih.errors import SaihError

Voxels = NDArray[np.int16]

VOXEL = np.dtype("<i2")

BLOCK_BYTES = 2**16
"""Asked of the system at a time. While one block is copied the system reads on by itself, which it does not when it is
asked for a whole volume at once: 64 KiB gave 1.8 GB/s where 2 MiB gave 1.0, with half of the CPU time."""


class Volumes(ABC):
    """Volumes 0 to len - 1, each int16 [N, N, N, C] in C order, with four targets.

    Reading is plain read() calls rather than a memory map, so that the system accounts for the bytes, and may be done
    by several threads at once.
    """

    shape: tuple[int, int, int, int]
    """Of one volume: x, y, z, channel."""
    periodic: bool
    """Whether opposite faces of a volume are neighbours; they are not in a piece cut from a larger universe."""
    mean_count: float
    """Particles a voxel holds in the mean."""
    per_file: int = 1
    """Volumes that lie one after the other in a file; the last file may hold fewer."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_into(self, index: int, target: Voxels) -> None:
        """Fill `target` with one volume. Raises SaihError if its file is missing or damaged, naming file and volume."""

    @abstractmethod
    def targets(self, indices: Sequence[int]) -> Tensor:
        """The parameters to be learnt: float32 [len(indices), 4], all within [-1, 1]."""

    @abstractmethod
    def files(self, indices: Sequence[int]) -> list[Path]:
        """The files that hold these volumes."""

    @property
    def sample_bytes(self) -> int:
        """Bytes of one volume's voxels."""
        return int(np.prod(self.shape)) * VOXEL.itemsize

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read volumes into a new tensor: int16 [len(indices), N, N, N, C]. Raises as `read_into` and IndexError."""
        volumes = torch.empty(len(indices), *self.shape, dtype=torch.int16)
        for target, index in zip(volumes.numpy(), indices, strict=True):
            self.read_into(index, target)
        return volumes

    def evict(self, indices: Sequence[int]) -> None:
        """Have the system forget the files of these volumes, so that the next reading comes from the disk.

        Pages that some process has mapped stay: whoever times cold reading checks what was really read.
        """
        for path in self.files(indices):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages not yet written cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def _check(self, indices: Sequence[int], where: object) -> None:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"volume {index} is not among the {len(self)} of {where}")


def read_at(path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` (bytes) from `offset` on. Raises SaihError if the file is missing or ends early."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise SaihError(f"{path} is missing") from None
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while target:
            count = os.preadv(descriptor, [target[:BLOCK_BYTES]], offset)
            if not count:
                raise SaihError(f"{path} is damaged: it ends {len(target)} bytes early")
            target, offset = target[count:], offset + count
    finally:
        os.close(descriptor)
