"""Particles under each other's forces on a mesh: FastPM (Feng et al. 2016, MNRAS 463, 2273), from 2LPT on.

Kick, drift, kick, with the factors of FastPM (section 2.4): a linear wave grows as it should however long a step is.
Momentum is a^3 E dx/da in units of the Hubble constant, E the expansion rate over today's; force is -grad of the
potential whose Laplacian is the density contrast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from workloads.cosmology import particles, power
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.power import Cosmology

FIRST_SCALE_FACTOR = 0.1
STEPS = 10
"""Of equal scale factor from the first to today; a redshift that is looked at in between divides one."""


def evolve(
    cosmology: Cosmology, redshifts: Sequence[float], lattice: Mesh, psi: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """The channel of each redshift, from the earliest on, and where the particles are then: [3, P] in voxels.

    The positions change afterwards. `psi` is of 2LPT, [2, 3, X, N, N], and becomes positions and momenta.

    Raises:
        ValueError: a redshift is before the first step.
    """
    seen = {1 / (1 + redshift): channel for channel, redshift in enumerate(redshifts)}
    if min(seen) < FIRST_SCALE_FACTOR:
        raise ValueError(f"a particle mesh begins at z = {1 / FIRST_SCALE_FACTOR - 1:g}, after one of {redshifts}")
    a = FIRST_SCALE_FACTOR
    positions, momenta = _start(cosmology, a, lattice, psi)
    if a in seen:
        yield seen[a], positions
    forces = _forces(lattice, positions)
    for following in _scale_factors(seen):
        middle = (a + following) / 2
        (d0, _, d1), (g0, g_middle, g1) = _linear(cosmology, a, middle, following)
        momenta.add_(forces, alpha=(g_middle - g0) / d0)
        positions.add_(momenta, alpha=(d1 - d0) / g_middle)
        forces = _forces(lattice, positions)
        momenta.add_(forces, alpha=(g1 - g_middle) / d1)
        a = following
        if a in seen:
            yield seen[a], positions


def _scale_factors(seen: dict[float, int]) -> list[float]:
    """Ends of the steps: equal ones up to the last that is looked at, and those looked at."""
    equal = np.linspace(FIRST_SCALE_FACTOR, 1, STEPS + 1)[1:]
    return sorted({*(float(a) for a in equal if a < max(seen)), *seen} - {FIRST_SCALE_FACTOR})


def _start(cosmology: Cosmology, a: float, lattice: Mesh, psi: Tensor) -> tuple[Tensor, Tensor]:
    (d1, d2), (g1, g2) = (
        tuple(float(each[0]) for each in factors(cosmology, np.array([1 / a - 1])))
        for factors in (power.growth, power.momentum)
    )
    positions = particles.on_lattice(lattice, psi[0].mul(d1).add_(psi[1], alpha=d2)).flatten(1)
    return positions, psi[0].mul_(g1).add_(psi[1], alpha=g2).flatten(1)


def _linear(cosmology: Cosmology, *a: float) -> tuple[list[float], list[float]]:
    """D and a^3 E dD/da of first order at these scale factors."""
    redshifts = 1 / np.array(a) - 1
    return power.growth(cosmology, redshifts)[0].tolist(), power.momentum(cosmology, redshifts)[0].tolist()


def _forces(lattice: Mesh, positions: Tensor) -> Tensor:
    """Of all particles on each: [3, P]."""
    potential_k = lattice.forward(particles.paint(lattice, particles.pieces(lattice, positions)))
    fields = lattice.empty(3)
    lattice.gradient(potential_k.mul_(lattice.inverse_laplacian()).neg_(), out=fields)
    return particles.read(lattice, fields, positions)
