"""The volumes a point trains on and is validated on: universes made where they are missing, or files that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Context, Params
from saih.errors import SaihError
from workloads.cosmology.cosmoflow.model import from_counts
from workloads.cosmology.dataset import Dataset, generate
from workloads.cosmology.loader import InMemory
from workloads.cosmology.mlperf import open_folder
from workloads.cosmology.recipe import Recipe
from workloads.cosmology.volumes import Volumes, Voxels

VALIDATION_SEED = 1 << 20
"""Added to a point's seed: validation is on universes that training never saw."""
DESCRIBED_BYTES = 2**26
"""As many voxels as this are looked at for their mean and scatter."""


def training_volumes(params: Params, seed: int, context: Context) -> Volumes:
    """Volumes to train on: forgotten by the system, or read into memory, as `input` says.

    Raises:
        SaihError: the folder in `dataset` holds too few volumes, or others than the parameters say.
    """
    volumes = _volumes(params, "train", seed, int(params["samples"]), context)
    if params["labels"] == "shuffled":
        volumes = Shuffled(volumes, seed)
    if params["input"] == "memory":
        return InMemory(volumes)
    volumes.evict(range(len(volumes)))
    return volumes


def validation_volumes(params: Params, seed: int, context: Context) -> Volumes:
    """Volumes of other universes. Raises as `training_volumes`."""
    return _volumes(params, "validation", seed + VALIDATION_SEED, int(params["validation"]), context)


def _volumes(params: Params, subset: str, seed: int, samples: int, context: Context) -> Volumes:
    mesh, channels = int(params["mesh"]), int(params["channels"])
    if folder := str(params["dataset"]):
        return open_folder(Path(folder, subset), mesh, channels, samples)
    recipe, storage = Recipe(mesh, channels, seed, samples), str(params["storage"])
    generate(Path(context.data_folder), recipe, context.place.rank, context.place.world, storage=storage)
    if context.place.world > 1:
        dist.barrier()
    return Dataset(Path(context.data_folder), recipe, storage)


class Shuffled(Volumes):
    """Volumes with the targets of others: nothing can be learnt from them but the targets' mean."""

    def __init__(self, volumes: Volumes, seed: int) -> None:
        self.volumes = volumes
        self.shape, self.periodic, self.mean_count = volumes.shape, volumes.periodic, volumes.mean_count
        self.per_file = volumes.per_file
        self.other = np.random.default_rng([seed, len(volumes)]).permutation(len(volumes)).tolist()

    def __len__(self) -> int:
        return len(self.volumes)

    def read_into(self, index: int, target: Voxels) -> None:
        self.volumes.read_into(index, target)

    def targets(self, indices: Sequence[int]) -> Tensor:
        return self.volumes.targets([self.other[index] for index in indices])

    def files(self, indices: Sequence[int]) -> list[Path]:
        return self.volumes.files(indices)


class Standard:
    """Counts -> what a network likes: log density with mean zero and scatter one in every channel."""

    def __init__(self, volumes: Volumes, device: str) -> None:
        """Measured on the first volumes."""
        self.mean_count = volumes.mean_count
        described = max(1, min(len(volumes), DESCRIBED_BYTES // volumes.sample_bytes))
        logs_BCDHW = from_counts(volumes.read(range(described)), self.mean_count)
        scatter, mean = torch.std_mean(logs_BCDHW, dim=(0, 2, 3, 4), keepdim=True)
        if not scatter.all():
            raise SaihError("the volumes are empty: every voxel of a channel holds the same count")
        self.mean, self.scatter = mean.to(device), scatter.to(device)

    def __call__(self, counts_BDHWC: Tensor) -> Tensor:
        """int16 [B, D, H, W, C] -> float32 [B, C, D, H, W] in channels-last memory."""
        return from_counts(counts_BDHWC, self.mean_count).sub_(self.mean).div_(self.scatter)
