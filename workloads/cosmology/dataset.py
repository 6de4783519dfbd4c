"""A folder of universes, one .npy file each: made in parallel, read with plain read() calls.

Reading needs torch, numpy and the standard library. Making universes needs colossus as well.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workloads.cosmology import power, universe
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.naming import VOXEL_MPC_H, folder_name

Voxels = NDArray[np.int16]

REDSHIFTS = (0.0, 0.5, 1.5, 3.0)
"""Redshift of each channel, in order. MLPerf HPC CosmoFlow has four snapshots too; these values are our own choice."""

_DTYPE = np.dtype("<i2")


@dataclass(frozen=True)
class Recipe:
    """All that decides the bytes of a dataset.

    Attributes:
        mesh: voxels along one side of a universe.
        channels: how many of `REDSHIFTS` each universe holds, from the first on.
        seed: the family of universes. Training and validation take different seeds.
        samples: number of universes.
        box_mpc_h: side of a universe in Mpc/h; 0, the default, becomes `VOXEL_MPC_H` a voxel.
        fidelity: one of `universe.FIDELITIES`.
        refine: lattice particles a voxel along each axis.

    Raises:
        ValueError: a number is out of range.
    """

    mesh: int
    channels: int
    seed: int
    samples: int
    box_mpc_h: float = 0.0
    fidelity: str = "lpt"
    refine: int = 1

    def __post_init__(self) -> None:
        if self.mesh < 2 or self.samples < 1 or self.box_mpc_h < 0:
            raise ValueError(f"a recipe needs mesh >= 2, samples >= 1, box_mpc_h >= 0: {self}")
        if not 1 <= self.channels <= len(REDSHIFTS):
            raise ValueError(f"channels must be 1 to {len(REDSHIFTS)}, one for each of z = {REDSHIFTS}: {self}")
        if self.fidelity not in universe.FIDELITIES or self.refine < 1:
            raise ValueError(f"a recipe needs a fidelity of {', '.join(universe.FIDELITIES)} and refine >= 1: {self}")
        if self.box_mpc_h == 0:
            object.__setattr__(self, "box_mpc_h", VOXEL_MPC_H * self.mesh)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one universe: x, y, z, channel."""
        return (self.mesh, self.mesh, self.mesh, self.channels)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one universe's voxels; its file is a header of 128 bytes longer."""
        return self.mesh**3 * self.channels * _DTYPE.itemsize

    @property
    def dataset_bytes(self) -> int:
        """Bytes of all universes' voxels."""
        return self.samples * self.sample_bytes

    @property
    def folder_name(self) -> str:
        """Name of the dataset's folder; without `samples`, so a larger dataset takes over a smaller one's universes."""
        return folder_name(self.mesh, self.channels, self.box_mpc_h, self.seed, self.fidelity, self.refine)


def generate(
    root: Path,
    recipe: Recipe,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    make: Callable[[Recipe, int, torch.device | str], Tensor] | None = None,
) -> int:
    """Make the universes that are missing among this rank's share (index % world == rank); return how many.

    The bytes do not depend on `rank` and `world`. They may on the processor, the version of torch and, in the order
    of a sum, on a GPU. A killed process leaves at most a temporary file; several ranks making one universe do no harm.
    On CPU, ranks of one thread each are the fastest and least disturbed by other work on the machine. `make` takes the
    place of `make_universe`: the ranks behind it may be many.

    Raises:
        ImportError: colossus is not installed.
        ValueError: `rank` is not within `world`.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to {world - 1}, not {rank}")
    folder = root / recipe.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [index for index in range(rank, recipe.samples, world) if not _path(folder, index).exists()]
    for index in missing:
        _write(_path(folder, index), (make or make_universe)(recipe, index, device).cpu().numpy())
    return len(missing)


def make_universe(recipe: Recipe, index: int, device: torch.device | str = "cpu", spread: bool = False) -> Tensor:
    """Universe number `index` of a recipe: int16 [mesh, mesh, mesh, channels], or a rank's slab if it is `spread`.

    Raises:
        ImportError: colossus is not installed.
    """
    return universe.grow(
        power.draw(recipe.seed, index),
        REDSHIFTS[: recipe.channels],
        Mesh(recipe.mesh, device, spread=spread),
        recipe.box_mpc_h,
        noise_seed(recipe.seed, index),
        recipe.fidelity,
        recipe.refine,
    )


def noise_seed(seed: int, index: int) -> int:
    """Seed of a universe's white noise, 32 bits: distinct for the first 2^32 universes of a family.

    Two families of n universes share a few noise fields with a probability of about 2 n / 2^32 (of other cosmologies,
    still).
    """
    family = int.from_bytes(hashlib.sha256(f"noise {seed}".encode()).digest()[:4], "little")
    return (family + index) % 2**32


class Dataset:
    """The universes of a recipe under `root`, which `generate` has made."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.folder = root / recipe.folder_name
        self.recipe = recipe

    def __len__(self) -> int:
        return self.recipe.samples

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read universes into a new tensor: int16 [len(indices), mesh, mesh, mesh, channels].

        Unbuffered read() calls rather than a memory map, so the system accounts for the bytes.

        Raises:
            IndexError: there is no such universe in the recipe.
            ValueError: a universe's file is missing or damaged; the message names it.
        """
        self._check(indices)
        universes = torch.empty(len(indices), *self.recipe.shape, dtype=torch.int16)
        for target, index in zip(universes.numpy(), indices, strict=True):
            _read(_path(self.folder, index), target)
        return universes

    def targets(self, indices: Sequence[int]) -> Tensor:
        """The parameters to be learnt, each in [-1, 1], drawn again from the seed: float32 [len(indices), 4].

        Raises:
            IndexError: there is no such universe in the recipe.
        """
        self._check(indices)
        scaled = [power.targets(power.draw(self.recipe.seed, index)) for index in indices]
        return torch.from_numpy(np.array(scaled, dtype=np.float32).reshape(len(indices), len(power.RANGES)))

    def _check(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < self.recipe.samples:
                raise IndexError(f"universe {index} is not among the {self.recipe.samples} of {self.folder}")


def _path(folder: Path, index: int) -> Path:
    return folder / f"universe-{index:06d}.npy"


def _write(path: Path, voxels: Voxels) -> None:
    """Write a .npy file that is there whole or not at all, even if the machine stops."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            np.save(file, voxels.astype(_DTYPE, copy=False))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, target: Voxels) -> None:
    """Fill `target` (contiguous) from a .npy file, which must hold just that shape and type."""
    try:
        with path.open("rb", buffering=0) as file:
            _check_header(file, target)
            buffer = memoryview(target.data).cast("B")
            expected = file.tell() + len(buffer)
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise ValueError(f"it has {size} bytes and should have {expected}")
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise ValueError(f"it ended {len(buffer)} bytes early")
                buffer = buffer[count:]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: generate the dataset first") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and generate the dataset again") from error


def _check_header(file: FileIO, target: Voxels) -> None:
    """Read a .npy header, leaving the file where its voxels begin."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not a .npy file of version 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if (shape, fortran_order, dtype) != (target.shape, False, _DTYPE):
        raise ValueError(f"it holds {dtype} {shape}, not {_DTYPE} {target.shape}")
