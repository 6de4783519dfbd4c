"""A shard: one file of several volumes, and the manifest beside it that says what they are and where each begins.

Layouts, by their name on the `storage` axis:

    hdf5       an HDF5 file: `full` int16 [n, N, N, N, C] with a chunk a volume, `unitPar` float32 [n, 4]; names as in
               MLPerf HPC's own universes
    hdf5-gzip  the same, chunks shuffled and deflated
    hdf5-lz4   the same, bitshuffled and LZ4 (needs hdf5plugin)
    npy        one .npy array int16 [n, N, N, N, C]

Where a chunk is stored as it is, it is read with one read() at the offset in the manifest: by any number of threads,
and without h5py. h5py is needed to write HDF5 and to read compressed chunks.
"""

from __future__ import annotations

import importlib
import math
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from saih.errors import SaihError, unknown
from saih.files import blamed_on, read_record, write_atomic, write_json
from workloads.cosmology.storages import LARGEST_CHUNK_BYTES, STORAGES
from workloads.cosmology.volumes import VOXEL, Voxels, read_at

FORMAT = 1
PAGE_BYTES = 4096
"""Uncompressed volumes begin at multiples of it, as reading past the page cache (O_DIRECT) wants."""

_ONE_AT_A_TIME = threading.Lock()
"""h5py lets one thread in at a time; one that waits here holds up nobody."""


@dataclass(frozen=True)
class Made:
    """A volume to be written."""

    voxels: Voxels
    targets: NDArray[np.float32]
    about: Mapping[str, Any]
    """What it is of: its cosmology and seed."""


@dataclass(frozen=True)
class Volume:
    """One row of a manifest."""

    offset: int | None
    """Byte where the voxels begin; None where they are compressed."""
    crc32: int
    """Of the voxels as they are in memory."""
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a shard holds."""

    data: Path
    data_bytes: int
    storage: str
    recipe: Mapping[str, Any]
    """What all volumes of the dataset have in common, the generator's version included."""
    volumes: tuple[Volume, ...]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises SaihError if the manifest is missing or damaged."""
        if not path.exists():
            raise SaihError(f"{path} is missing: generate the dataset first")
        value = read_record(path, FORMAT, ("data", "data_bytes", "storage", "recipe", "volumes"))
        with blamed_on(path):
            rows = tuple(Volume(row["offset"], int(row["crc32"]), row["about"]) for row in value["volumes"])
            data = path.parent / str(value["data"])
            return cls(data, int(value["data_bytes"]), str(value["storage"]), dict(value["recipe"]), rows)

    def write(self, path: Path) -> None:
        rows = [{"offset": row.offset, "crc32": row.crc32, "about": dict(row.about)} for row in self.volumes]
        told = {"data": self.data.name, "data_bytes": self.data_bytes, "storage": self.storage}
        write_json(path, {"format": FORMAT, **told, "recipe": dict(self.recipe), "volumes": rows})

    def is_whole(self, volumes: int) -> bool:
        """Whether there are this many, and the data file is as long as it was when it was written."""
        try:
            return len(self.volumes) >= volumes and self.data.stat().st_size == self.data_bytes
        except FileNotFoundError:
            return False

    def read_into(self, row: int, target: Voxels, verify: bool) -> None:
        """Fill `target` (contiguous) with the volume of a row; `verify`: hold it against its checksum.

        Raises:
            SaihError: the volume is not there or damaged; the message names the file and the row.
        """
        if row >= len(self.volumes):
            raise SaihError(f"{self.data} holds {len(self.volumes)} volumes, not {row + 1}: generate the dataset first")
        volume, content = self.volumes[row], target.data.cast("B")
        try:
            if volume.offset is None:
                _read_compressed(self.data, self.storage, row, target)
            else:
                read_at(self.data, volume.offset, content)
            if verify and zlib.crc32(content) != volume.crc32:
                raise SaihError(f"{self.data} is damaged: the voxels do not match their checksum")
        except SaihError as error:
            remedy = "delete the file and generate the dataset again"
            raise SaihError(f"{error}; volume {row} of the {len(self.volumes)} in this file; {remedy}") from None


def write_shard(
    path: Path, storage: str, made: Iterable[Made], shape: tuple[int, ...], recipe: Mapping[str, Any]
) -> None:
    """Write a shard, then its manifest `path`: each file is there whole or not at all, the manifest after the data.

    Args:
        path: of the manifest. The data lies beside it under a name with the number of volumes: whoever reads a
            smaller shard while a larger one takes its place goes on reading what its manifest speaks of.
        storage: one of STORAGES.
        made: the volumes; one at a time is held in memory.
        shape: of the whole shard: volumes, x, y, z, channels.
        recipe: what all volumes have in common; text and numbers.

    Raises:
        SaihError: the storage is unknown, needs a library that is not installed, or cannot hold volumes of that size.
    """
    if storage not in STORAGES:
        raise unknown("storage", storage, STORAGES)
    data = path.with_name(f"{path.stem}-{shape[0]}-volumes.{'npy' if storage == 'npy' else 'h5'}")
    rows: list[Volume] = []
    if storage == "npy":
        write_atomic(data, lambda file: rows.extend(_write_npy(file, made, shape)))
    else:
        _refuse_hdf5(storage, shape)
        write_atomic(data, lambda file: rows.extend(_write_hdf5(file, storage, made, shape, recipe)))
    Manifest(data, data.stat().st_size, storage, recipe, tuple(rows)).write(path)


def _write_npy(file: BinaryIO, made: Iterable[Made], shape: tuple[int, ...]) -> Iterator[Volume]:
    """A .npy file of version 1.0 whose header fills a page."""
    header = repr({"descr": VOXEL.str, "fortran_order": False, "shape": shape}).encode()
    magic = np.lib.format.magic(1, 0)
    room = PAGE_BYTES - len(magic) - 2
    file.write(magic + room.to_bytes(2, "little") + header.ljust(room - 1) + b"\n")
    for each in made:
        content = _bytes(each.voxels)
        yield Volume(file.tell(), zlib.crc32(content), each.about)
        file.write(content)


def _write_hdf5(
    file: BinaryIO, storage: str, made: Iterable[Made], shape: tuple[int, ...], recipe: Mapping[str, Any]
) -> Iterator[Volume]:
    h5py = _library("h5py", storage)
    with h5py.File(file, "w", alignment_threshold=PAGE_BYTES, alignment_interval=PAGE_BYTES) as whole:
        whole.attrs.update(recipe)
        full = whole.create_dataset("full", shape, VOXEL, chunks=(1, *shape[1:]), **_filters(storage))
        targets = whole.create_dataset("unitPar", (shape[0], 4), "<f4")
        for row, each in enumerate(made):
            full[row], targets[row] = each.voxels, each.targets
            chunk = full.id.get_chunk_info_by_coord((row, 0, 0, 0, 0)) if storage == "hdf5" else None
            yield Volume(chunk and int(chunk.byte_offset), zlib.crc32(_bytes(each.voxels)), each.about)


def _bytes(voxels: Voxels) -> memoryview:
    return np.ascontiguousarray(voxels, VOXEL).data.cast("B")


def _refuse_hdf5(storage: str, shape: tuple[int, ...]) -> None:
    """Say what is missing before a volume is made."""
    _library("h5py", storage)
    _filters(storage)
    if (chunk_bytes := math.prod(shape[1:]) * VOXEL.itemsize) > LARGEST_CHUNK_BYTES:
        raise SaihError(
            f"a volume of {chunk_bytes / 1e9:.3g} GB is larger than an HDF5 chunk can be, 4.29 GB; use storage=npy"
        )


def _filters(storage: str) -> dict[str, Any]:
    if storage == "hdf5-gzip":
        return {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    return dict(_library("hdf5plugin", storage).Bitshuffle(cname="lz4")) if storage == "hdf5-lz4" else {}


def _read_compressed(path: Path, storage: str, row: int, target: Voxels) -> None:
    h5py = _library("h5py", storage)
    _filters(storage)  # importing hdf5plugin makes its filter known
    try:
        with _ONE_AT_A_TIME, h5py.File(path, "r") as whole:
            whole["full"].read_direct(target, np.s_[row])
    except FileNotFoundError:
        raise SaihError(f"{path} is missing") from None
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SaihError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _library(name: str, storage: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SaihError(f"storage={storage} needs {name}: pip install {name}, or choose storage=npy") from None
