"""One universe: a Gaussian field, grown by second-order Lagrangian perturbation theory or a particle mesh, in voxels.

The displacement fields of perturbation theory do not depend on redshift, so there a redshift costs one painting and not
one simulation; `pm` starts from them.

Shapes are those of `mesh`, with C = redshifts. Lengths below `grow` and `linear_modes` are in voxels.

Memory: `lpt` holds 45 bytes a voxel at its peak with four redshifts, on big meshes; a slab as much for its voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workloads.cosmology import particlemesh, particles, power
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.noise import white_noise
from workloads.cosmology.power import Cosmology

FloatArray = NDArray[np.float64]
Power = Callable[[FloatArray], FloatArray]

PARTICLES_PER_CELL = 64
"""Simulation particles counted in a voxel in the mean, our own choice; a lattice particle stands for many."""


def grow(
    cosmology: Cosmology,
    redshifts: Sequence[float],
    mesh: Mesh,
    box_mpc_h: float,
    seed: int,
    fidelity: str = "lpt",
    refine: int = 1,
) -> Tensor:
    """Count the particles of a universe in voxels, at each redshift.

    Channels come last: MLPerf HPC CosmoFlow stores them so, and it is the memory order of torch.channels_last_3d.

    Args:
        cosmology: which universe.
        redshifts: one a channel.
        mesh: the voxels, and where they lie. A finer mesh in the same box has the same long waves, and shorter ones.
        box_mpc_h: side of the box in Mpc/h.
        seed: of the noise. The same seed gives the same bytes on one CPU with as many threads; with others, on a GPU or
            in slabs the voxels are the same up to the order of summation.
        fidelity: one of `recipe.FIDELITIES`; `pm` has forces between the particles, in `particlemesh.STEPS` steps.
        refine: lattice particles a voxel along each axis, their waves as short as their lattice allows.

    Returns:
        int16 [X, N, N, C], PARTICLES_PER_CELL in the mean.
    """
    lattice = mesh.refined(refine)
    psi = displacements(lattice, linear_modes(partial(power.linear_power, cosmology), lattice, box_mpc_h, seed))
    return seen(cosmology, redshifts, mesh, psi, fidelity, refine)


def seen(
    cosmology: Cosmology, redshifts: Sequence[float], mesh: Mesh, psi: Tensor, fidelity: str, refine: int
) -> Tensor:
    """What `grow` makes of the displacements of a refined lattice; `pm` makes use of their memory."""
    counts = torch.empty(*mesh.empty().shape, len(redshifts), dtype=torch.int16, device=mesh.device)
    for channel, positions in _snapshots(cosmology, redshifts, mesh.refined(refine), psi, fidelity):
        in_voxels = (each.div_(refine) for each in positions) if refine > 1 else positions
        counts[..., channel] = counted(particles.paint(mesh, in_voxels).div_(refine**3))
    return counts


def _snapshots(
    cosmology: Cosmology, redshifts: Sequence[float], lattice: Mesh, psi: Tensor, fidelity: str
) -> Iterator[tuple[int, Iterator[Tensor]]]:
    """The channel of each redshift, and where the particles are then, in pieces."""
    if fidelity == "lpt":
        for channel, (d1, d2) in enumerate(zip(*power.growth(cosmology, np.array(redshifts)), strict=True)):
            yield channel, moved(lattice, psi, float(d1), float(d2))
        return
    for channel, positions in particlemesh.evolve(cosmology, redshifts, lattice, psi):
        yield channel, (each.clone() for each in particles.pieces(lattice, positions))


def counted(density: Tensor) -> Tensor:
    """Whole particles in voxels of a density whose mean is one: int16, as many as it holds at the most."""
    counts = density.mul_(PARTICLES_PER_CELL).round_().clamp_(max=torch.iinfo(torch.int16).max)
    return counts.to(torch.int16)


def linear_modes(power_of: Power, mesh: Mesh, box_mpc_h: float, seed: int) -> Tensor:
    """Gaussian linear density contrast at z = 0 in Fourier space: [N, Y, N // 2 + 1], its mean mode zero.

    Args:
        power_of: linear power spectrum at z = 0: k in h/Mpc to (Mpc/h)^3.
        mesh: whose modes.
        box_mpc_h: side of the box in Mpc/h.
        seed: of the white noise that is coloured.
    """
    amplitude = torch.from_numpy(_amplitude(power_of, mesh.side, box_mpc_h)).to(mesh.device, mesh.dtype)
    x, y, z = (number.long().square_() for number in mesh.mode_numbers())
    squared = x + y + z
    return white_noise(mesh, seed).mul_(amplitude.index_select(0, squared.flatten()).view(squared.shape))


def displacements(mesh: Mesh, density_k: Tensor) -> Tensor:
    """Displacement in voxels of first and second order for growth factors of one: psi, [2, 3, X, N, N].

    A particle of the lattice point q is at q + D1 psi1 + D2 psi2, with
    psi1 = -grad phi1, laplace phi1 = density;
    psi2 = +grad phi2, laplace phi2 = the sum of phi1_ii phi1_jj - phi1_ij^2 over pairs of axes
    (Bouchet et al. 1995, A&A 296, 575; Scoccimarro 1998, MNRAS 299, 1097, appendix D).
    """
    potential_k = density_k * mesh.inverse_laplacian()
    source_k = mesh.forward(_second_order_source(mesh, potential_k))
    psi = torch.stack([mesh.empty(3), mesh.empty(3)])
    mesh.gradient(potential_k.neg_(), out=psi[0])
    mesh.gradient(source_k.mul_(mesh.inverse_laplacian()), out=psi[1])
    return psi


def moved(lattice: Mesh, psi: Tensor, d1: float, d2: float) -> Iterator[Tensor]:
    """Positions of the lattice's particles at growth factors D1 and D2, in pieces of [3, P]."""
    planes = max(1, (particles.SENT_AT_ONCE if lattice.spread else particles.AT_ONCE) // lattice.side**2)
    for first in range(0, lattice.planes, planes):
        some = slice(first, min(lattice.planes, first + planes))
        positions = torch.mul(psi[0, :, some], d1).add_(psi[1, :, some], alpha=d2)
        yield particles.on_lattice(lattice, positions, first).flatten(1)


def paint_cic(mesh: Mesh, psi: Tensor, d1: float, d2: float) -> Tensor:
    """Mass in each voxel of unit particles moved from every lattice point: [X, N, N], its mean one."""
    return particles.paint(mesh, moved(mesh, psi, d1, d2))


def _amplitude(power_of: Power, mesh: int, box_mpc_h: float) -> NDArray[np.float32]:
    """Square root of power per voxel volume, tabulated by squared mode number: the modes have few distinct lengths."""
    squared = np.arange(3 * (mesh // 2) ** 2 + 1)
    amplitude = np.zeros(len(squared), dtype=np.float32)
    amplitude[1:] = np.sqrt(power_of(2 * np.pi / box_mpc_h * np.sqrt(squared[1:])) / (box_mpc_h / mesh) ** 3)
    return amplitude


def _second_order_source(mesh: Mesh, potential_k: Tensor) -> Tensor:
    """The sum of phi_ii phi_jj - phi_ij^2 over the three pairs of axes: [X, N, N]."""
    x, y, z = mesh.wavenumbers()
    scratch = torch.empty_like(potential_k)

    def derivative(first: Tensor, second: Tensor) -> Tensor:
        return mesh.inverse(torch.mul(potential_k, -first * second, out=scratch))

    xx, yy = derivative(x, x), derivative(y, y)
    source = xx * yy
    source.addcmul_(xx.add_(yy), derivative(z, z))
    for first, second in ((x, y), (x, z), (y, z)):
        source.sub_(derivative(first, second).square_())
    return source
