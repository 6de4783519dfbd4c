"""A folder of universes in shards: made in parallel, read by any number of threads.

Reading needs torch, numpy and the standard library (compressed HDF5: h5py). Making universes needs colossus as well,
and h5py for HDF5.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workloads.cosmology import power, universe
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.recipe import GENERATOR_VERSION, REDSHIFTS, Recipe, shard_name
from workloads.cosmology.shards import Made, Manifest, write_shard
from workloads.cosmology.storages import DEFAULT_STORAGE
from workloads.cosmology.volumes import Volumes, Voxels

Make = Callable[[Recipe, int, torch.device | str], Tensor]
"""Makes a universe, given a recipe and the universe's number: int16 [mesh, mesh, mesh, channels]."""


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


def generate(
    root: Path,
    recipe: Recipe,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    storage: str = DEFAULT_STORAGE,
    make: Make = make_universe,
) -> int:
    """Make the shards that are missing among this rank's share (shard % world == rank); return how many universes.

    The bytes do not depend on `rank` and `world`. They may on the processor, the version of torch, the number of
    threads and, in the order of a sum, on a GPU. A killed process leaves at most a temporary file, or data without its
    manifest, which is made again; several ranks making one shard do no harm. On CPU, ranks of one thread each are the
    fastest and least disturbed by other work on the machine. `make` takes the place of `make_universe`: the ranks
    behind it may be many.

    Raises:
        ImportError: colossus is not installed.
        SaihError: the storage is unknown or needs a library that is not installed.
        ValueError: `rank` is not within `world`.
    """
    told = {**asdict(recipe), "generator_version": GENERATOR_VERSION}
    del told["samples"]  # of the dataset that was asked for, not of one shard
    made = 0
    for shard in _lacking(root, recipe, storage, recipe.share(rank, world)):
        indices = recipe.shard(shard)
        universes = (_made(recipe, index, make(recipe, index, device)) for index in indices)
        write_shard(_path(root, recipe, storage, shard), storage, universes, (len(indices), *recipe.shape), told)
        made += len(indices)
    return made


def missing(root: Path, recipe: Recipe, storage: str = DEFAULT_STORAGE) -> list[int]:
    """Numbers of the shards that are not there, or hold too few universes."""
    return _lacking(root, recipe, storage, range(recipe.shards))


def noise_seed(seed: int, index: int) -> int:
    """Seed of a universe's white noise, 32 bits: distinct for the first 2^32 universes of a family.

    Two families of n universes share a few noise fields with a probability of about 2 n / 2^32 (of other cosmologies,
    still).
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
        self._check([index], self.root / self.recipe.folder_name(self.storage))
        shard, row = divmod(index, self.recipe.per_shard)
        self._manifest(shard).read_into(row, target, verify=not self._verified[index])
        self._verified[index] = True

    def targets(self, indices: Sequence[int]) -> Tensor:
        """Drawn again from the seed. Raises IndexError if there is no such universe in the recipe."""
        self._check(indices, self.root / self.recipe.folder_name(self.storage))
        scaled = [power.targets(power.draw(self.recipe.seed, index)) for index in indices]
        return torch.from_numpy(np.array(scaled, dtype=np.float32).reshape(len(indices), len(power.RANGES)))

    def files(self, indices: Sequence[int]) -> list[Path]:
        return [self._manifest(shard).data for shard in sorted({index // self.recipe.per_shard for index in indices})]


def _lacking(root: Path, recipe: Recipe, storage: str, shards: Sequence[int]) -> list[int]:
    def lacks(shard: int) -> bool:
        path = _path(root, recipe, storage, shard)
        return not (path.exists() and Manifest.read(path).is_whole(len(recipe.shard(shard))))

    return [shard for shard in shards if lacks(shard)]


def _path(root: Path, recipe: Recipe, storage: str, shard: int) -> Path:
    return root / recipe.folder_name(storage) / f"{shard_name(shard)}.json"


def _made(recipe: Recipe, index: int, voxels: Tensor) -> Made:
    cosmology = power.draw(recipe.seed, index)
    about = {**asdict(cosmology), "noise_seed": noise_seed(recipe.seed, index)}
    return Made(voxels.cpu().numpy(), power.targets(cosmology), about)
