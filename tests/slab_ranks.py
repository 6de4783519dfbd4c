"""What the ranks of the slab tests run: python -m tests.slab_ranks FOLDER RANK WORLD; rank 0 writes to FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from workloads.cosmology import particles, universe
from workloads.cosmology.dataset import make_universe
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.noise import white_noise
from workloads.cosmology.recipe import Recipe

SIDE = 16
RECIPES = {
    "lpt": Recipe(mesh=SIDE, channels=2, seed=3, samples=1, box_mpc_h=32.0),
    "pm": Recipe(mesh=SIDE, channels=2, seed=3, samples=1, box_mpc_h=64.0, fidelity="pm"),
    "refined": Recipe(mesh=SIDE, channels=1, seed=3, samples=1, refine=2),
}


def scattered(count: int = 5000) -> torch.Tensor:
    """Particles all over the box and far outside of it: every rank sends to every other."""
    return 40 * torch.randn(3, count, generator=torch.Generator().manual_seed(1))


def findings(mesh: Mesh) -> dict[str, torch.Tensor | None]:
    """All that slabs must have in common with the whole, joined on rank 0."""
    noise_k = white_noise(mesh, 5)
    field = mesh.inverse(noise_k.clone())
    psi = universe.displacements(mesh, noise_k)
    share = scattered().tensor_split(mesh.world, dim=1)[mesh.rank]
    found = {
        "field": mesh.gather(field),
        "round_trip": mesh.gather(mesh.inverse(mesh.forward(field))),
        "psi": mesh.gather(psi.permute(2, 0, 1, 3, 4)),
        "painted": mesh.gather(particles.paint(mesh, [share])),
        "read": mesh.gather(particles.read(mesh, psi[0], share).t().contiguous()),
    }
    for name, recipe in RECIPES.items():
        found[name] = mesh.gather(make_universe(recipe, 0, spread=mesh.spread))
    return found


def main(folder: Path, rank: int, world: int) -> None:
    """Join the others, find, and write on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    found = findings(Mesh(SIDE, spread=True))
    if rank == 0:
        np.savez(folder / "found.npz", **{name: value.numpy() for name, value in found.items() if value is not None})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
