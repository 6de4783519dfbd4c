"""One universe: a Gaussian field grown by second-order Lagrangian perturbation theory (2LPT) and counted in voxels.

The displacement fields do not depend on redshift, so a redshift costs one painting and not one simulation.

Fields are periodic cubes of `mesh` voxels a side. Shapes: N = mesh, C = redshifts, [N, N, N] over x, y, z; a field in
Fourier space is torch.fft.rfftn of it, [N, N, N // 2 + 1]. Lengths below `grow` and `linear_modes` are in voxels.

Memory: the peak is about 45 bytes a voxel with four redshifts, on big meshes.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
Power = Callable[[FloatArray], FloatArray]

PARTICLES_PER_CELL = 64
"""Simulation particles that one lattice particle (one a voxel) stands for; this project's own choice."""

_PARTICLES_AT_ONCE = 1 << 16
"""Small enough for the allocator to keep the temporaries: 2^18 took 3.5 times as long to paint, in page faults."""


def grow(
    power: Power,
    growth: tuple[FloatArray, FloatArray],
    mesh: int,
    box_mpc_h: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Count the particles of a universe in voxels, at each redshift.

    Channels come last: MLPerf HPC CosmoFlow stores them so, and it is the memory order of torch.channels_last_3d.

    Args:
        power: linear power spectrum at z = 0: k in h/Mpc to (Mpc/h)^3.
        growth: first- and second-order growth (D1, D2), one number a redshift each.
        mesh: voxels along one side.
        box_mpc_h: side of the box in Mpc/h.
        generator: a CPU generator. The same state gives the same bytes on CPU; on a GPU the voxels are the same up to
            the order of summation.
        device: where to compute and return.

    Returns:
        int16 [N, N, N, C], PARTICLES_PER_CELL in the mean.
    """
    psi = displacements(linear_modes(power, mesh, box_mpc_h, generator, device))
    first, second = growth
    counts = torch.empty(mesh, mesh, mesh, len(first), dtype=torch.int16, device=device)
    for channel, (d1, d2) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        particles = paint_cic(psi, d1, d2).mul_(PARTICLES_PER_CELL)
        counts[..., channel] = particles.round_().clamp_(max=torch.iinfo(torch.int16).max)
    return counts


def linear_modes(
    power: Power, mesh: int, box_mpc_h: float, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian linear density contrast at z = 0 in Fourier space: complex64 [N, N, N // 2 + 1], its mean mode zero.

    Real white noise, coloured: that the result belongs to a real field needs no bookkeeping.
    """
    noise = torch.randn(mesh, mesh, mesh, generator=generator).to(device)
    amplitude = torch.from_numpy(_amplitude(power, mesh, box_mpc_h)).to(device)
    x, y, z = (number.int().square_() for number in _mode_numbers(mesh, device))
    squared = x + y + z
    noise_k: Tensor = torch.fft.rfftn(noise)
    return noise_k.mul_(amplitude.index_select(0, squared.flatten()).view(squared.shape))


def displacements(density_k: Tensor) -> Tensor:
    """Displacement in voxels of first and second order for growth factors of one: psi, float32 [2, 3, N, N, N].

    A particle of the lattice point q is at q + D1 psi1 + D2 psi2, with
    psi1 = -grad phi1, laplace phi1 = density;
    psi2 = +grad phi2, laplace phi2 = the sum of phi1_ii phi1_jj - phi1_ij^2 over pairs of axes
    (Bouchet et al. 1995, A&A 296, 575; Scoccimarro 1998, MNRAS 299, 1097, appendix D).
    """
    mesh = density_k.shape[0]
    potential_k = density_k * _inverse_laplacian(density_k)
    source_k = torch.fft.rfftn(_second_order_source(potential_k))
    psi = torch.empty(2, 3, mesh, mesh, mesh, device=density_k.device)
    _gradient(potential_k.neg_(), out=psi[0])
    _gradient(source_k.mul_(_inverse_laplacian(source_k)), out=psi[1])
    return psi


def paint_cic(psi: Tensor, d1: float, d2: float) -> Tensor:
    """Mass in each voxel of unit particles moved from every lattice point: float32 [N, N, N], its mean one.

    Cloud in cell (Hockney & Eastwood 1988): a particle shares its mass linearly among the eight voxels around it.
    The grid has one plane more at the end of each axis, folded onto the first, so no corner needs wrapping.

    Args:
        psi: displacement of first and second order in voxels, float32 [2, 3, N, N, N].
        d1: growth factor of the first order.
        d2: growth factor of the second order.
    """
    mesh = psi.shape[-1]
    grid = psi.new_zeros(mesh + 1, mesh + 1, mesh + 1)
    psi1, psi2 = psi.view(2, 3, mesh * mesh, mesh)
    step = max(1, _PARTICLES_AT_ONCE // mesh)
    for first_row in range(0, mesh * mesh, step):
        rows = slice(first_row, first_row + step)
        displacement = (d1 * psi1[:, rows]).add_(psi2[:, rows], alpha=d2)
        _scatter(grid.view(-1), *_cells(displacement, first_row))
    for axis in range(3):
        grid.select(axis, 0).add_(grid.select(axis, mesh))
    return grid[:mesh, :mesh, :mesh]


def _amplitude(power: Power, mesh: int, box_mpc_h: float) -> NDArray[np.float32]:
    """Square root of power per voxel volume, tabulated by squared mode number: the modes have few distinct lengths."""
    squared = np.arange(3 * (mesh // 2) ** 2 + 1)
    amplitude = np.zeros(len(squared), dtype=np.float32)
    amplitude[1:] = np.sqrt(power(2 * np.pi / box_mpc_h * np.sqrt(squared[1:])) / (box_mpc_h / mesh) ** 3)
    return amplitude


def _mode_numbers(mesh: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Signed whole periods a box along x, y, z, shaped to broadcast over a field in Fourier space."""
    full = torch.fft.fftfreq(mesh, 1 / mesh, device=device).round_()
    half = torch.fft.rfftfreq(mesh, 1 / mesh, device=device).round_()
    return full.view(-1, 1, 1), full.view(1, -1, 1), half.view(1, 1, -1)


def _wavenumbers(field_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Radians a voxel along x, y, z: the derivative without its i. Zero at Nyquist, whose derivative is not real."""
    mesh = field_k.shape[0]
    x, y, z = (
        number.where(2 * number.abs() != mesh, 0) * (2 * math.pi / mesh)
        for number in _mode_numbers(mesh, field_k.device)
    )
    return x, y, z


def _inverse_laplacian(field_k: Tensor) -> Tensor:
    """-1 / k^2 with k in radians a voxel, and 0 for the mean: float32 [N, N, N // 2 + 1]."""
    mesh = field_k.shape[0]
    x, y, z = (number.square() for number in _mode_numbers(mesh, field_k.device))
    inverse = (x + y + z).reciprocal_().mul_(-((mesh / (2 * math.pi)) ** 2))
    inverse[0, 0, 0] = 0
    return inverse


def _to_real(field_k: Tensor) -> Tensor:
    mesh = field_k.shape[0]
    field: Tensor = torch.fft.irfftn(field_k, s=(mesh, mesh, mesh))
    return field


def _gradient(potential_k: Tensor, out: Tensor) -> None:
    """Write the gradient of a potential, per voxel, to `out`: float32 [3, N, N, N]."""
    for axis, wavenumber in enumerate(_wavenumbers(potential_k)):
        out[axis] = _to_real(potential_k * (1j * wavenumber))


def _second_order_source(potential_k: Tensor) -> Tensor:
    """The sum of phi_ii phi_jj - phi_ij^2 over the three pairs of axes: float32 [N, N, N]."""
    x, y, z = _wavenumbers(potential_k)

    def derivative(first: Tensor, second: Tensor) -> Tensor:
        return _to_real(potential_k * (-first * second))

    xx, yy = derivative(x, x), derivative(y, y)
    source = xx * yy
    source.addcmul_(xx.add_(yy), derivative(z, z))
    for first, second in ((x, y), (x, z), (y, z)):
        source.sub_(derivative(first, second).square_())
    return source


def _cells(displacement: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Where the particles of some rows of the lattice are.

    Args:
        displacement: float32 [3, rows, N] in voxels; row r is at x = r // N, y = r % N and runs along z.
        first_row: number of the first of these rows.

    Returns:
        Index into the flattened grid of each particle's lower corner, int64 [particles], and the fraction of a voxel
        beyond it, float32 [3, rows, N].
    """
    _, rows, mesh = displacement.shape
    row = torch.arange(first_row, first_row + rows, device=displacement.device).view(-1, 1)
    whole = displacement.floor()
    fraction = displacement - whole
    for axis, lattice in enumerate((row // mesh, row % mesh, torch.arange(mesh, device=displacement.device))):
        whole[axis] += lattice
    whole.sub_((whole / mesh).floor_(), alpha=mesh)  # several times faster than remainder, and exact for whole numbers
    x, y, z = whole.long()
    return x.mul_(mesh + 1).add_(y).mul_(mesh + 1).add_(z).flatten(), fraction


def _scatter(grid: Tensor, lower: Tensor, fraction: Tensor) -> None:
    """Add each particle's eight shares to the flattened grid; the corners beyond `lower` are fixed offsets from it."""
    for offset, share in _corners(fraction, round(len(grid) ** (1 / 3))):
        grid[offset:].scatter_add_(0, lower, share)


def _corners(fraction: Tensor, side: int) -> Iterator[tuple[int, Tensor]]:
    """Offset in a flattened grid of `side` points an axis, and the share of every particle, of each of the corners."""
    x, y, z = ((1 - along, along) for along in fraction)
    for i, x_share in enumerate(x):
        for j, y_share in enumerate(y):
            xy_share = x_share * y_share
            for k, z_share in enumerate(z):
                yield (i * side + j) * side + k, (xy_share * z_share).flatten()
