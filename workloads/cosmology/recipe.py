"""What a dataset of universes is: all that decides its bytes, its folder, and its shards. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workloads.cosmology.storages import VOXEL_BYTES, volumes_per_shard

REDSHIFTS = (0.0, 0.5, 1.5, 3.0)
"""Redshift of each channel, in order. MLPerf HPC CosmoFlow has four snapshots too; these values are our own choice."""

FIDELITIES = ("lpt", "pm")
"""Second-order Lagrangian perturbation theory; a particle mesh that starts from it."""

VOXEL_MPC_H = 4.0
"""Side of a voxel where a recipe does not give its box, so the box grows with the mesh."""

GENERATOR_VERSION = 2
"""Part of the folder's name: raise it when the same recipe comes to give other bytes."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the bytes of a dataset.

    Attributes:
        mesh: voxels along one side of a universe.
        channels: how many of `REDSHIFTS` each universe holds, from the first on.
        seed: the family of universes. Training and validation take different seeds.
        samples: number of universes.
        box_mpc_h: side of a universe in Mpc/h; 0, the default, becomes `VOXEL_MPC_H` a voxel.
        fidelity: one of `FIDELITIES`.
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
        if self.fidelity not in FIDELITIES or self.refine < 1:
            raise ValueError(f"a recipe needs a fidelity of {', '.join(FIDELITIES)} and refine >= 1: {self}")
        if self.box_mpc_h == 0:
            object.__setattr__(self, "box_mpc_h", VOXEL_MPC_H * self.mesh)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one universe: x, y, z, channel."""
        return (self.mesh, self.mesh, self.mesh, self.channels)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one universe's voxels."""
        return self.mesh**3 * self.channels * VOXEL_BYTES

    @property
    def dataset_bytes(self) -> int:
        """Bytes of all universes' voxels."""
        return self.samples * self.sample_bytes

    @property
    def name(self) -> str:
        """All that decides a universe's bytes besides its index."""
        what = f"mesh{self.mesh}-channels{self.channels}-box{self.box_mpc_h:.17g}-seed{self.seed}"
        how = (f"-{self.fidelity}" if self.fidelity != "lpt" else "") + (f"-refine{self.refine}" * (self.refine != 1))
        return f"universes-v{GENERATOR_VERSION}-{what}{how}"

    def folder_name(self, storage: str) -> str:
        """Name of the dataset's folder; without `samples`, so a larger dataset takes over a smaller one's shards."""
        return f"{self.name}-{storage}"

    @property
    def per_shard(self) -> int:
        """Universes in a shard; the last one may hold fewer."""
        return volumes_per_shard(self.sample_bytes)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.per_shard)

    def shard(self, number: int) -> range:
        """Indices of the universes in a shard."""
        return range(number * self.per_shard, min(self.samples, (number + 1) * self.per_shard))

    def share(self, rank: int, world: int) -> range:
        """Numbers of the shards that one of several ranks makes. Raises ValueError if `rank` is not within `world`."""
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to {world - 1}, not {rank}")
        return range(rank, self.shards, world)

    def there_bytes(self, root: Path, storage: str) -> int:
        """Bytes of the universes that lie in whole shards under `root`, going by the names of the files."""
        folder = root / self.folder_name(storage)
        told = {path.stem for path in folder.glob("shard-*.json")}
        held: dict[str, int] = {}
        for path in folder.glob("shard-*-volumes.*"):
            name, volumes, _ = path.name.rsplit("-", 2)
            held[name] = max(int(volumes), held.get(name, 0))
        asked = {shard_name(number): len(self.shard(number)) for number in range(self.shards)}
        whole = (volumes for name, volumes in asked.items() if name in told and held.get(name, 0) >= volumes)
        return sum(whole) * self.sample_bytes


def shard_name(number: int) -> str:
    """Name of a shard's manifest, and what its data's name begins with."""
    return f"shard-{number:06d}"
