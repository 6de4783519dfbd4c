"""White noise in Fourier space that belongs to a place and not to a mesh: a finer mesh has the same long waves.

Each row of modes along y is a random stream of its own, drawn outwards from the longest waves. A coarse mesh takes the
beginning of what a finer one takes, and a rank draws its own rows alone, whoever draws the others.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workloads.cosmology.mesh import Mesh

Indices = NDArray[np.int64]
Complex = NDArray[np.complex64]


def white_noise(mesh: Mesh, seed: int) -> Tensor:
    """What `mesh.forward` of Gaussian white noise of variance one would be: complex [N, Y, N // 2 + 1].

    Modes at the Nyquist frequency and the mean are zero. `seed` is of 0 to 2^64 - 1. The same on every device.
    """
    side, most = mesh.side, (mesh.side - 1) // 2
    order, row_order = _outwards(side, most), _outwards_in_a_row(most)
    noise = np.zeros((mesh.planes, side, side // 2 + 1), dtype=np.complex64)
    for plane, row in zip(noise, range(mesh.first, mesh.first + mesh.planes), strict=True):
        y = row if 2 * row < side else row - side
        if abs(y) <= most:
            plane.reshape(-1)[order] = _stream(seed, y, 0, len(order))
            plane[row_order, 0] = _real_field_row(_stream(seed, abs(y), 1, len(row_order)), y)
    precision = torch.complex128 if mesh.dtype == torch.float64 else torch.complex64
    modes = torch.from_numpy(noise).to(mesh.device).transpose(0, 1).to(precision, memory_format=torch.contiguous_format)
    return modes.contiguous().mul_(side**1.5)


def _stream(seed: int, y: int, kind: int, count: int) -> Complex:
    """The first `count` Gaussian numbers of variance one of the stream of a row of modes, or of its modes at z = 0."""
    name = np.array([seed, 4 * abs(y) + 2 * (y < 0) + kind], dtype=np.uint64)
    pairs = np.random.Generator(np.random.Philox(key=name)).standard_normal(2 * count, dtype=np.float32)
    return (pairs * np.float32(0.5**0.5)).view(np.complex64)


def _outwards(side: int, most: int) -> Indices:
    """Places in a flattened [N, N // 2 + 1] of the modes with z > 0, those of a smaller cube always first."""
    x, z = (each.ravel() for each in np.meshgrid(np.arange(-most, most + 1), np.arange(1, most + 1), indexing="ij"))
    ordered = np.lexsort((z, x, np.maximum(abs(x), z)))
    return np.asarray((x % side * (side // 2 + 1) + z)[ordered])


def _outwards_in_a_row(most: int) -> Indices:
    """0, 1, -1, 2, -2, ...: numbers along x."""
    return np.array([0, *(sign * number for number in range(1, most + 1) for sign in (1, -1))])


def _real_field_row(drawn: Complex, y: int) -> Complex:
    """Modes at z = 0 in the order of `_outwards_in_a_row`: what is at -k is the conjugate of what is at k."""
    mirrored = drawn.copy()
    mirrored[1::2], mirrored[2::2] = drawn[2::2], drawn[1::2]
    if y < 0:
        return mirrored.conj()
    if y == 0:
        drawn[2::2] = drawn[1::2].conj()
        drawn[0] = 0
    return drawn
