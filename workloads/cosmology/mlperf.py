"""MLPerf HPC's own CosmoFlow data in a local folder: universes in HDF5, or TFRecords of pieces of them.

Layouts as github.com/mlcommons/hpc cosmoflow/prepare.py reads and writes them:

    *.hdf5      `full` int16 [M, M, M, 4], `unitPar` [4]: cut here into pieces of N^3, in the order of np.split
    *.tfrecord  one tf.train.Example: x = the bytes of int16 [N, N, N, 4], y = 4 floats; gzip'ed or not
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saih.errors import SaihError
from workloads.cosmology import tfrecord
from workloads.cosmology.volumes import VOXEL, Volumes, Voxels

Targets = NDArray[np.float32]
Found = TypeVar("Found")

CHANNELS = 4
TARGETS = 4
MEAN_COUNT = 1.0
"""MLPerf HPC trains on log(1 + counts), without a unit."""

_ONE_AT_A_TIME = threading.Lock()


def open_folder(folder: Path, mesh: int, channels: int, samples: int) -> Volumes:
    """The first `samples` volumes of a folder, files in order of their names, subfolders included.

    Raises:
        SaihError: there is no such folder, no such files, or there are fewer volumes.
    """
    if not folder.is_dir():
        raise SaihError(f"dataset {folder} is not a folder on this machine")
    records = sorted([*folder.rglob("*.tfrecord"), *folder.rglob("*.tfrecord.gz")])
    universes = sorted(folder.rglob("*.hdf5"))
    if not records and not universes:
        raise SaihError(f"dataset {folder} holds neither *.tfrecord nor *.hdf5, the layouts of MLPerf HPC CosmoFlow")
    volumes: Records | Pieces = Records(records, mesh, channels) if records else Pieces(universes, mesh, channels)
    if len(volumes) < samples:
        raise SaihError(f"dataset {folder} holds {len(volumes)} volumes of {mesh}^3, fewer than samples={samples}")
    volumes.samples = samples
    return volumes


class Records(Volumes):
    """One volume a TFRecord file, held against its checksum the first time this object reads it."""

    periodic = False
    mean_count = MEAN_COUNT

    def __init__(self, paths: Sequence[Path], mesh: int, channels: int) -> None:
        self.paths, self.shape = paths, (mesh, mesh, mesh, channels)
        self.samples = len(paths)
        self._targets: dict[int, Targets] = {}

    def __len__(self) -> int:
        return self.samples

    def read_into(self, index: int, target: Voxels) -> None:
        self._check([index], self.paths[0].parent)
        counts, self._targets[index] = _blamed(self.paths[index], self._example, index)
        stored = (*self.shape[:3], CHANNELS)
        if counts.size != math.prod(stored):
            told = " x ".join(map(str, stored))
            raise SaihError(
                f"{self.paths[index]} holds {counts.size} voxels, not {told}: set mesh to the volumes' side"
            )
        target[...] = counts.reshape(stored)[..., : self.shape[3]]

    def targets(self, indices: Sequence[int]) -> Tensor:
        """Known once a volume has been read; of another one, the file is read."""
        self._check(indices, self.paths[0].parent)
        for index in indices:
            if index not in self._targets:
                _, self._targets[index] = _blamed(self.paths[index], self._example, index)
        return torch.from_numpy(np.array([self._targets[index] for index in indices], np.float32).reshape(-1, TARGETS))

    def files(self, indices: Sequence[int]) -> list[Path]:
        return [self.paths[index] for index in indices]

    def _example(self, index: int) -> tuple[Voxels, Targets]:
        record = tfrecord.payload(self.paths[index].read_bytes(), verify=index not in self._targets)
        found = tfrecord.features(record)
        return np.frombuffer(tfrecord.bytes_value(found["x"]), VOXEL), _targets(tfrecord.float_values(found["y"]))


class Pieces(Volumes):
    """Pieces of N^3 cut from larger universes, one universe after the other; a universe of N^3 is periodic."""

    mean_count = MEAN_COUNT

    def __init__(self, paths: Sequence[Path], mesh: int, channels: int) -> None:
        self.paths, self.shape = paths, (mesh, mesh, mesh, channels)
        side = _blamed(paths[0], self._side, paths[0])
        if side % mesh:
            raise SaihError(f"universes of {side}^3 cannot be cut into pieces of {mesh}^3: {paths[0]}")
        self.side, self.per_file = side, (side // mesh) ** 3
        self.periodic = side == mesh
        self.samples = len(paths) * self.per_file
        self._targets: dict[int, Targets] = {}

    def __len__(self) -> int:
        return self.samples

    def read_into(self, index: int, target: Voxels) -> None:
        self._check([index], self.paths[0].parent)
        path = self.paths[index // self.per_file]
        _blamed(path, self._read, path, index % self.per_file, target)

    def targets(self, indices: Sequence[int]) -> Tensor:
        self._check(indices, self.paths[0].parent)
        universes = [index // self.per_file for index in indices]
        for universe in universes:
            if universe not in self._targets:
                self._targets[universe] = _blamed(self.paths[universe], self._parameters, self.paths[universe])
        return torch.from_numpy(np.array([self._targets[each] for each in universes], np.float32).reshape(-1, TARGETS))

    def files(self, indices: Sequence[int]) -> list[Path]:
        return [self.paths[universe] for universe in sorted({index // self.per_file for index in indices})]

    def _side(self, path: Path) -> int:
        with _opened(path) as whole:
            return int(whole["full"].shape[0])

    def _parameters(self, path: Path) -> Targets:
        with _opened(path) as whole:
            return _targets(whole["unitPar"][:])

    def _read(self, path: Path, piece: int, target: Voxels) -> None:
        mesh, channels = self.shape[2:]
        corner = np.array(np.unravel_index(piece, (self.side // mesh,) * 3)) * mesh
        region = tuple(slice(start, start + mesh) for start in corner.tolist())
        with _opened(path) as whole:
            full = whole["full"]
            if full.shape != (self.side, self.side, self.side, CHANNELS) or full.dtype != VOXEL:
                raise SaihError(f"`full` is {full.dtype} {full.shape}, not {VOXEL} {(*(self.side,) * 3, CHANNELS)}")
            target[...] = full[(*region, slice(channels))]


def _targets(parameters: Any) -> Targets:
    if parameters.size != TARGETS:
        raise SaihError(f"it has {parameters.size} parameters, not {TARGETS}")
    return np.asarray(parameters, np.float32)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise SaihError("HDF5 universes need h5py: pip install h5py, or use TFRecords") from None
    with _ONE_AT_A_TIME, h5py.File(path, "r") as whole:
        yield whole


def _blamed(path: Path, read: Callable[..., Found], *arguments: Any) -> Found:
    """read(*arguments); what goes wrong names the file."""
    try:
        return read(*arguments)
    except (SaihError, OSError, LookupError, ValueError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise SaihError(f"{path} is damaged or of another layout: {what}") from None
