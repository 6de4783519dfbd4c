"""Particles in a mesh: painted into its voxels, and reading its fields, each by the rank that has the plane below it.

Positions are [3, P] in voxels, of any size: the cube is periodic. F = fields; other shapes as in `mesh`. Cloud in cell
(Hockney & Eastwood 1988): a particle belongs to the eight voxels around it, linearly. Painting and reading are
collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from workloads.cosmology.mesh import Mesh

AT_ONCE = 1 << 16
"""Small enough for the temporaries to stay in a core's cache: 2^18 took 1.5 times as long to paint on 128^3."""

SENT_AT_ONCE = 1 << 20
"""Between ranks, where messages should be long."""


def on_lattice(mesh: Mesh, displacement: Tensor, first: int = 0) -> Tensor:
    """Add, in place, to displacements [3, planes, N, N] where their particles come from, a voxel each.

    Args:
        mesh: the lattice.
        displacement: of the particles of some planes.
        first: the first of these planes, counted from this rank's first.
    """
    along = torch.arange(mesh.side, dtype=mesh.dtype, device=mesh.device)
    planes = slice(mesh.first + first, mesh.first + first + displacement.shape[1])
    displacement[0] += along[planes].view(-1, 1, 1)
    displacement[1] += along.view(-1, 1)
    displacement[2] += along
    return displacement


def pieces(mesh: Mesh, positions: Tensor) -> Sequence[Tensor]:
    """[3, P] in pieces of a good size; equally many on every rank if it has equally many particles."""
    parts: Sequence[Tensor] = positions.split(SENT_AT_ONCE if mesh.spread else AT_ONCE, dim=1)
    return parts


def paint(mesh: Mesh, chunks: Iterable[Tensor]) -> Tensor:
    """Mass in each voxel of unit particles, given in pieces of [3, P], equally many on every rank: [X, N, N].

    The grid has one plane more at the end of each axis, folded onto the first, so no corner needs wrapping.
    """
    side, planes = mesh.side, mesh.planes
    grid = torch.zeros(planes + 1, side + 1, side + 1, dtype=mesh.dtype, device=mesh.device)
    for chunk in chunks:
        for own in _Route.of(mesh, chunk).send(chunk).split(AT_ONCE, dim=1):
            _scatter(grid, *_cells(mesh, own))
    grid[:, 0] += grid[:, side]
    grid[:, :, 0] += grid[:, :, side]
    grid[0] += mesh.from_neighbour(grid[planes], behind=True)
    return grid[:planes, :side, :side]


def read(mesh: Mesh, fields: Tensor, positions: Tensor) -> Tensor:
    """Fields [F, X, N, N] at the particles, by the weights they are painted with: [F, P]."""
    side, planes = mesh.side, mesh.planes
    grid = fields.new_empty(len(fields), planes + 1, side + 1, side + 1)
    grid[:, :planes, :side, :side] = fields
    grid[:, planes, :side, :side] = mesh.from_neighbour(fields[:, 0], behind=False)
    grid[:, :, side] = grid[:, :, 0]
    grid[:, :, :, side] = grid[:, :, :, 0]
    values = fields.new_empty(len(fields), positions.shape[1])
    for chunk, target in zip(pieces(mesh, positions), pieces(mesh, values), strict=True):
        route = _Route.of(mesh, chunk)
        own = route.send(chunk)
        found = fields.new_empty(len(fields), own.shape[1])
        for some, into in zip(own.split(AT_ONCE, dim=1), found.split(AT_ONCE, dim=1), strict=True):
            _gather(grid, *_cells(mesh, some), out=into)
        target.copy_(route.send_back(found))
    return values


@dataclass(frozen=True)
class _Route:
    """Which particles go to which rank, and how many come from each; on one device none goes anywhere."""

    order: Tensor | None
    sent: list[int]
    received: list[int]

    @classmethod
    def of(cls, mesh: Mesh, positions: Tensor) -> _Route:
        if not mesh.spread:
            return cls(None, [], [])
        owner = positions[0].floor().remainder_(mesh.side).div_(mesh.planes, rounding_mode="floor").long()
        sent = torch.bincount(owner, minlength=mesh.world)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return cls(owner.argsort(stable=True), sent.tolist(), received.tolist())

    def send(self, values: Tensor) -> Tensor:
        """[F, P] of this rank's particles to [F, P'] of those in its planes."""
        if self.order is None:
            return values
        out = values.new_empty(sum(self.received), len(values))
        dist.all_to_all_single(out, values.t()[self.order].contiguous(), self.received, self.sent)
        return out.t().contiguous()

    def send_back(self, values: Tensor) -> Tensor:
        """[F, P'] of the particles in its planes to [F, P] of this rank's."""
        if self.order is None:
            return values
        home = values.new_empty(sum(self.sent), len(values))
        dist.all_to_all_single(home, values.t().contiguous(), self.sent, self.received)
        out = torch.empty_like(home)
        out[self.order] = home
        return out.t()


def _cells(mesh: Mesh, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where particles of this rank's planes are in a grid that has one plane more an axis.

    Returns:
        Index into the flattened grid of each particle's lower corner, int64 [P], and the fraction of a voxel beyond
        it, [3, P].
    """
    whole = positions.floor()
    fraction = positions - whole
    whole.sub_((whole / mesh.side).floor_(), alpha=mesh.side)  # faster than remainder, exact for whole numbers
    small = (mesh.planes + 1) * (mesh.side + 1) ** 2 < 2**31
    x, y, z = whole.to(torch.int32 if small else torch.int64)  # half the bytes to pass over
    return x.sub_(mesh.first).mul_(mesh.side + 1).add_(y).mul_(mesh.side + 1).add_(z).long(), fraction


def _scatter(grid: Tensor, lower: Tensor, fraction: Tensor) -> None:
    """Add each particle's eight shares to the grid; the corners beyond `lower` are fixed offsets from it."""
    flat = grid.view(-1)
    for offset, share in _corners(fraction, grid.shape[-1]):
        flat[offset:].scatter_add_(0, lower, share)


def _gather(grid: Tensor, lower: Tensor, fraction: Tensor, out: Tensor) -> None:
    """The fields [F, ...] of a grid at each particle, weighted by its eight shares."""
    out.zero_()
    for offset, share in _corners(fraction, grid.shape[-1]):
        for field, value in zip(grid.flatten(1), out, strict=True):
            value.addcmul_(field[offset:].index_select(0, lower), share)


def _corners(fraction: Tensor, side: int) -> Iterator[tuple[int, Tensor]]:
    """Offset in a flattened grid of `side` points an axis, and the share of every particle, of each of the corners."""
    x, y, z = ((1 - along, along) for along in fraction)
    for i, x_share in enumerate(x):
        for j, y_share in enumerate(y):
            xy_share = x_share * y_share
            for k, z_share in enumerate(z):
                yield (i * side + j) * side + k, xy_share * z_share
