"""Changes of a volume that leave its cosmology as it is: the 48 symmetries of the cube and, in periodic boxes, shifts.

The laws that make a universe know no direction and no place, so a label stays true under all of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

AXES = (1, 2, 3)
"""x, y, z of a batch [B, N, N, N, C]."""


@dataclass(frozen=True)
class Symmetry:
    """A shift, then mirrors, then axes in another order: axis i of the new volume is axis `order[i]` of the old one."""

    order: tuple[int, int, int]
    mirrored: tuple[bool, bool, bool] = (False, False, False)
    shift: tuple[int, int, int] = (0, 0, 0)
    """Periodic, along each axis."""

    def apply(self, volumes: Tensor) -> Tensor:
        """[B, N, N, N, C] -> a contiguous copy of the same shape; one symmetry for the whole batch."""
        if any(self.shift):
            volumes = volumes.roll(self.shift, AXES)
        volumes = volumes.flip([axis for axis, mirrored in zip(AXES, self.mirrored, strict=True) if mirrored])
        return volumes.permute(0, *(AXES[axis] for axis in self.order), 4).contiguous()


CUBE = tuple(
    Symmetry(order, mirrored)  # type: ignore[arg-type]
    for order in itertools.permutations(range(3))
    for mirrored in itertools.product((False, True), repeat=3)
)
"""The 48 rotations and reflections of a cube."""


def draw(seed: int, step: int, rank: int, mesh: int, periodic: bool) -> Symmetry:
    """A random symmetry, the same for the same seed, step and rank; shifts are for periodic boxes alone."""
    random = np.random.default_rng([abs(seed), step, rank])
    cube = CUBE[random.integers(len(CUBE))]
    shift = tuple(random.integers(mesh, size=3).tolist()) if periodic else (0, 0, 0)
    return Symmetry(cube.order, cube.mirrored, shift)
