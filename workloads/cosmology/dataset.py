"""A folder of universes in shards: made in parallel, read by any number of threads.

Reading needs torch, numpy and the standard library (compressed HDF5: h5py). Making universes needs colossus as well,
and h5py for HDF5.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workloads.cosmology import power, universe
from workloads.cosmology.shards import Made, Manifest, write_shard
from workloads.cosmology.storages import DEFAULT_STORAGE, volumes_per_shard
from workloads.cosmology.volumes import VOXEL, Volumes, Voxels

REDSHIFTS = (0.0, 0.5, 1.5, 3.0)
"""Redshift of each channel, in order. MLPerf HPC CosmoFlow has four snapshots too; these values are our own choice."""

VOXEL_MPC_H = 4.0
"""Side of a voxel where a recipe does not give its box, so the box grows with the mesh."""

_GENERATOR_VERSION = 1  # part of the folder's name: raise it when the same recipe comes to give other bytes


@dataclass(frozen=True)
class Recipe:
    """All that decides the bytes of a dataset.

    Attributes:
        mesh: voxels along one side of a universe.
        channels: how many of `REDSHIFTS` each universe holds, from the first on.
        seed: the family of universes. Training and validation take different seeds.
        samples: number of universes.
        box_mpc_h: side of a universe in Mpc/h; 0, the default, becomes `VOXEL_MPC_H` a voxel.

    Raises:
        ValueError: a number is out of range.
    """

    mesh: int
    channels: int
    seed: int
    samples: int
    box_mpc_h: float = 0.0

    def __post_init__(self) -> None:
        if self.mesh < 2 or self.samples < 1 or self.box_mpc_h < 0:
            raise ValueError(f"a recipe needs mesh >= 2, samples >= 1, box_mpc_h >= 0: {self}")
        if not 1 <= self.channels <= len(REDSHIFTS):
            raise ValueError(f"channels must be 1 to {len(REDSHIFTS)}, one for each of z = {REDSHIFTS}: {self}")
        if self.box_mpc_h == 0:
            object.__setattr__(self, "box_mpc_h", VOXEL_MPC_H * self.mesh)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one universe: x, y, z, channel."""
        return (self.mesh, self.mesh, self.mesh, self.channels)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one universe's voxels."""
        return self.mesh**3 * self.channels * VOXEL.itemsize

    @property
    def dataset_bytes(self) -> int:
        """Bytes of all universes' voxels."""
        return self.samples * self.sample_bytes

    @property
    def name(self) -> str:
        """All that decides a universe's bytes besides its index."""
        return (
            f"universes-v{_GENERATOR_VERSION}-mesh{self.mesh}-channels{self.channels}"
            f"-box{self.box_mpc_h:g}-seed{self.seed}"
        )

    @property
    def per_shard(self) -> int:
        """Universes in a shard; the last one may hold fewer."""
        return volumes_per_shard(self.sample_bytes)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.per_shard)

    def shard(self, number: int) -> range:
        """Indices of the universes in a shard."""
        return range(number * self.per_shard, min(self.samples, (number + 1) * self.per_shard))


def generate(
    root: Path,
    recipe: Recipe,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    storage: str = DEFAULT_STORAGE,
) -> int:
    """Make the shards that are missing among this rank's share (shard % world == rank); return how many universes.

    The bytes do not depend on `rank` and `world`. They may on the processor, the version of torch and, in the order
    of a sum, on a GPU. A killed process leaves at most a temporary file; several ranks making one shard do no harm.
    On CPU, ranks of one thread each are the fastest and least disturbed by other work on the machine.

    Raises:
        ImportError: colossus is not installed.
        SaihError: the storage is unknown or needs a library that is not installed.
        ValueError: `rank` is not within `world`.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to {world - 1}, not {rank}")
    made = 0
    for shard in missing(root, recipe, storage):
        if shard % world != rank:
            continue
        indices = recipe.shard(shard)
        told = {**asdict(recipe), "generator_version": _GENERATOR_VERSION}
        del told["samples"]  # of the dataset that was asked for, not of this shard
        universes = (_made(recipe, index, device) for index in indices)
        write_shard(_path(root, recipe, storage, shard), storage, universes, (len(indices), *recipe.shape), told)
        made += len(indices)
    return made


def missing(root: Path, recipe: Recipe, storage: str = DEFAULT_STORAGE) -> list[int]:
    """Numbers of the shards that are not there, or hold too few universes."""

    def lacks(shard: int) -> bool:
        path = _path(root, recipe, storage, shard)
        return not (path.exists() and Manifest.read(path).is_whole(len(recipe.shard(shard))))

    return [shard for shard in range(recipe.shards) if lacks(shard)]


def make_universe(recipe: Recipe, index: int, device: torch.device | str = "cpu") -> Tensor:
    """Universe number `index` of a recipe: int16 [mesh, mesh, mesh, channels].

    Raises:
        ImportError: colossus is not installed.
    """
    cosmology = power.draw(recipe.seed, index)
    return universe.grow(
        partial(power.linear_power, cosmology),
        power.growth(cosmology, np.array(REDSHIFTS[: recipe.channels])),
        recipe.mesh,
        recipe.box_mpc_h,
        torch.Generator().manual_seed(noise_seed(recipe.seed, index)),
        device,
    )


def noise_seed(seed: int, index: int) -> int:
    """Seed of a universe's white noise: distinct for the first 2^32 universes of a family.

    torch's CPU generator uses the low 32 bits of its seed and drops the rest, so those must differ. Two families of n
    universes share a few noise fields with a probability of about 2 n / 2^32 (of other cosmologies, still).
    """
    family = int.from_bytes(hashlib.sha256(f"noise {seed}".encode()).digest()[:4], "little")
    return (family + index) % 2**32


class Dataset(Volumes):
    """The universes of a recipe under `root`, which `generate` has made: periodic boxes.

    A universe is held against its checksum the first time this object reads it.
    """

    periodic = True
    mean_count = float(universe.PARTICLES_PER_CELL)

    def __init__(self, root: Path, recipe: Recipe, storage: str = DEFAULT_STORAGE) -> None:
        self.root, self.recipe, self.storage = root, recipe, storage
        self.shape, self.per_file = recipe.shape, recipe.per_shard
        self._manifest = cache(lambda shard: Manifest.read(_path(root, recipe, storage, shard)))
        self._verified = bytearray(recipe.samples)

    def __len__(self) -> int:
        return self.recipe.samples

    def read_into(self, index: int, target: Voxels) -> None:
        self._check([index], self.root / folder_name(self.recipe, self.storage))
        shard, row = divmod(index, self.recipe.per_shard)
        self._manifest(shard).read_into(row, target, verify=not self._verified[index])
        self._verified[index] = True

    def targets(self, indices: Sequence[int]) -> Tensor:
        """Drawn again from the seed. Raises IndexError if there is no such universe in the recipe."""
        self._check(indices, self.root / folder_name(self.recipe, self.storage))
        scaled = [power.targets(power.draw(self.recipe.seed, index)) for index in indices]
        return torch.from_numpy(np.array(scaled, dtype=np.float32).reshape(len(indices), len(power.RANGES)))

    def files(self, indices: Sequence[int]) -> list[Path]:
        return [self._manifest(shard).data for shard in sorted({index // self.recipe.per_shard for index in indices})]


def folder_name(recipe: Recipe, storage: str) -> str:
    """Name of a dataset's folder; without `samples`, so a larger dataset takes over a smaller one's shards."""
    return f"{recipe.name}-{storage}"


def _path(root: Path, recipe: Recipe, storage: str, shard: int) -> Path:
    return root / folder_name(recipe, storage) / f"shard-{shard:06d}.json"


def _made(recipe: Recipe, index: int, device: torch.device | str) -> Made:
    cosmology = power.draw(recipe.seed, index)
    about = {**asdict(cosmology), "noise_seed": noise_seed(recipe.seed, index)}
    return Made(make_universe(recipe, index, device).cpu().numpy(), power.targets(cosmology), about)
