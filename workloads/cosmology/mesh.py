"""A periodic cube of voxels, whole on one device or in slabs on several: its Fourier transforms and derivatives.

Shapes: N = voxels a side, X = planes of this rank along x, Y = its rows along y. A field is [X, N, N] over x, y, z. In
Fourier space it is cut along y instead, [N, Y, N // 2 + 1]; on one rank that is torch.fft.rfftn. What transforms or
exchanges is a collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Mesh:
    """A cube of `side` voxels an edge, shared by the ranks of the default process group if `spread`.

    Raises:
        ValueError: the side cannot be shared out evenly, or there is no process group.
    """

    side: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    spread: bool = False

    def __post_init__(self) -> None:
        if self.spread and not dist.is_initialized():
            raise ValueError("a spread mesh needs torch.distributed")
        if self.side % self.world:
            raise ValueError(f"a mesh of {self.side} planes cannot be shared evenly by {self.world} ranks")

    @property
    def world(self) -> int:
        return dist.get_world_size() if self.spread else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.spread else 0

    @property
    def planes(self) -> int:
        """Planes of this rank, and rows of it in Fourier space."""
        return self.side // self.world

    @property
    def first(self) -> int:
        """The first of them."""
        return self.rank * self.planes

    def refined(self, factor: int) -> Mesh:
        """The same cube with `factor` times as many voxels an edge."""
        return Mesh(self.side * factor, self.device, self.dtype, self.spread)

    def empty(self, *leading: int) -> Tensor:
        """Room for fields: [*leading, X, N, N]."""
        return torch.empty(*leading, self.planes, self.side, self.side, dtype=self.dtype, device=self.device)

    def mode_numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Signed whole periods a cube along x, y, z, shaped to broadcast over a field in Fourier space."""
        full = torch.fft.fftfreq(self.side, 1 / self.side, dtype=self.dtype, device=self.device).round_()
        half = torch.fft.rfftfreq(self.side, 1 / self.side, dtype=self.dtype, device=self.device).round_()
        own = full[self.first : self.first + self.planes]
        return full.view(-1, 1, 1), own.view(1, -1, 1), half.view(1, 1, -1)

    def wavenumbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Radians a voxel: a derivative without its i. Zero at Nyquist, whose derivative is not real."""
        x, y, z = (
            number.where(2 * number.abs() != self.side, 0) * (2 * math.pi / self.side) for number in self.mode_numbers()
        )
        return x, y, z

    def forward(self, field: Tensor) -> Tensor:
        """A field into Fourier space: planes where they lie, then along x with this rank's rows of all planes."""
        modes: Tensor
        if not self.spread:
            modes = torch.fft.rfftn(field)
            return modes
        rows = torch.fft.rfft2(field).unflatten(1, (self.world, self.planes)).transpose(0, 1)
        modes = torch.fft.fft(_all_to_all(rows).flatten(0, 1), dim=0)
        return modes

    def inverse(self, modes: Tensor) -> Tensor:
        """A field out of Fourier space."""
        field: Tensor
        if not self.spread:
            field = torch.fft.irfftn(modes, s=(self.side,) * 3)
            return field
        columns = torch.fft.ifft(modes, dim=0).unflatten(0, (self.world, self.planes))
        planes = _all_to_all(columns).transpose(0, 1).flatten(1, 2)
        field = torch.fft.irfft2(planes, s=(self.side, self.side))
        return field

    def inverse_laplacian(self) -> Tensor:
        """-1 / k^2 with k in radians a voxel, and 0 for the mean: [N, Y, N // 2 + 1]."""
        x, y, z = (number.square() for number in self.mode_numbers())
        squared = x + y + z
        return squared.reciprocal().mul_(-((self.side / (2 * math.pi)) ** 2)).masked_fill_(squared == 0, 0)

    def gradient(self, potential_k: Tensor, out: Tensor) -> None:
        """Write the gradient of a potential, per voxel, to `out`: [3, X, N, N]."""
        scratch = torch.empty_like(potential_k)
        for axis, wavenumber in enumerate(self.wavenumbers()):
            out[axis] = self.inverse(torch.mul(potential_k, 1j * wavenumber, out=scratch))

    def gather(self, slabs: Tensor) -> Tensor | None:
        """[X, ...] of all ranks joined along x on rank 0, None on the others."""
        if not self.spread:
            return slabs
        own = slabs.contiguous().view(torch.uint8)  # gloo has no int16
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(own, parts)
        return torch.cat(parts).view(slabs.dtype) if parts else None

    def from_neighbour(self, plane: Tensor, behind: bool) -> Tensor:
        """The `plane` of the rank whose slab is `behind` (at smaller x), or else of the one ahead."""
        if self.world == 1:
            return plane
        step = 1 if behind else -1
        received, sent = torch.empty_like(plane, memory_format=torch.contiguous_format), plane.contiguous()
        swap = [
            dist.P2POp(dist.isend, sent, (self.rank + step) % self.world),
            dist.P2POp(dist.irecv, received, (self.rank - step) % self.world),
        ]
        for request in dist.batch_isend_irecv(swap):
            request.wait()
        return received


def _all_to_all(parts: Tensor) -> Tensor:
    """Part r of complex [ranks, ...] goes to rank r; what comes from rank r is part r."""
    given = torch.view_as_real(parts.contiguous())
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given)
    return torch.view_as_complex(taken)
