"""Make universes, one a step, or a part of one, or a whole data set; first show that they are what theory says."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from saih.core import Check, Clock, Context, Point, Work
from workloads.cosmology import power, universe
from workloads.cosmology.dataset import Make, generate, make_universe, noise_seed
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.noise import white_noise
from workloads.cosmology.recipe import REDSHIFTS, Recipe
from workloads.cosmology.universes import peers, spec

DTYPE = {"fp32": torch.float32, "fp64": torch.float64}
CHECKED_SIDE = 32
"""Voxels a side of the universe that is checked, where the one that is timed is larger."""
LEAST_CORRELATION = 0.9
"""Of the first redshift that is made with linear theory on the longest waves."""


def setup(point: Point, context: Context) -> Universes:
    """Nothing is made yet."""
    kinds = {"noise": NoiseAlone, "transforms": Transforms, "displacements": Displacements, "painting": Painting}
    if point.params["output"] == "folder":
        return DataSet(point, context)
    return kinds.get(str(point.params["part"]), Universes)(point, context)


class Universes:
    """A step makes a universe that no other step or rank makes, or this rank's slab of it."""

    def __init__(self, point: Point, context: Context) -> None:
        params = point.params
        self.params, self.place, self.device = params, context.place, context.device
        self.spread = params["spread"] == "slabs" and context.place.world > 1
        self.recipe = spec.recipe(params, point.seed)
        self.cost = spec.cost(params)
        self.work = Work(self.cost.work, self.cost.flop, sum(each.moved_bytes for each in self.cost.operations))
        self.steps_done = 0

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self.make(self.next_index(), self.mesh(self.recipe.mesh))
        return self.work

    def next_index(self) -> int:
        """Of a universe that this rank has not made; of slabs all ranks make the same."""
        ranks, rank = (1, 0) if self.spread else (self.place.world, self.place.rank)
        self.steps_done += 1
        return (self.steps_done - 1) * ranks + rank

    def mesh(self, side: int) -> Mesh:
        return Mesh(side, self.device, DTYPE[str(self.params["precision"])], self.spread)

    def make(self, index: int, mesh: Mesh) -> Tensor:
        """int16 [X, N, N, C]; a mesh of another side has voxels of the same size."""
        recipe = self.recipe
        cosmology, box = power.draw(recipe.seed, index), recipe.box_mpc_h * mesh.side / recipe.mesh
        seed = noise_seed(recipe.seed, index)
        if self.params["engine"] != "saih":
            peer = {"pycola3": peers.pycola3, "powerbox": peers.powerbox}[str(self.params["engine"])]
            return peer(cosmology, mesh, box, seed)
        seen = REDSHIFTS[: recipe.channels]
        return universe.grow(cosmology, seen, mesh, box, seed, recipe.fidelity, recipe.refine)

    def check(self) -> Check:
        """A universe has the mean that counts have, and on its longest waves the structure of its linear field.

        powerbox has a noise of its own, so only its mean is known. In slabs the voxels are those of one rank too, but
        for roundings to the next whole particle.
        """
        side = min(self.recipe.mesh, math.lcm(CHECKED_SIDE, self.place.world) if self.spread else CHECKED_SIDE)
        mesh, alone = self.mesh(side), Mesh(side, self.device, self.mesh(side).dtype)
        counts = mesh.gather(self.make(0, mesh))
        if counts is None:
            return Check(True)
        mean = counts.double().mean().item() / universe.PARTICLES_PER_CELL
        numbers = {"mean_over_expected": mean}
        if self.params["engine"] != "powerbox":
            numbers["linear_correlation"] = self._correlation(counts[..., -1], alone)
        if self.spread:
            numbers["slab_difference"] = (counts.int() - self.make(0, alone).int()).abs().max().item()
        drawn = self.params["engine"] == "powerbox"  # a log-normal field of a finite box has a mean of its own
        passed = abs(mean - 1) < (0.2 if drawn else 0.02) and numbers.get("slab_difference", 0) <= 1
        passed = passed and numbers.get("linear_correlation", 1.0) > LEAST_CORRELATION
        return Check(passed, numbers, ", ".join(f"{name} = {value:.4g}" for name, value in numbers.items()))

    def _correlation(self, counts: Tensor, mesh: Mesh) -> float:
        """Of counts with the linear field of universe 0, over modes up to twice the box's longest."""
        cosmology, box = power.draw(self.recipe.seed, 0), self.recipe.box_mpc_h * mesh.side / self.recipe.mesh
        seed = noise_seed(self.recipe.seed, 0)
        linear = universe.linear_modes(partial(power.linear_power, cosmology), mesh, box, seed)
        x, y, z = (number.square() for number in mesh.mode_numbers())
        long = (x + y + z <= 4) & (x + y + z > 0)
        a, b = linear[long], mesh.forward(counts.to(mesh.dtype))[long]
        return float((a * b.conj()).real.sum() / (a.abs().square().sum() * b.abs().square().sum()).sqrt())

    def close(self) -> None:
        """Nothing is kept."""


class NoiseAlone(Universes):
    """A step draws the noise of a universe and colours it."""

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self.modes(self.next_index())
        return self.work

    def modes(self, index: int) -> Tensor:
        recipe, cosmology = self.recipe, power.draw(self.recipe.seed, index)
        lattice = self.mesh(recipe.mesh).refined(recipe.refine)
        seed = noise_seed(recipe.seed, index)
        return universe.linear_modes(partial(power.linear_power, cosmology), lattice, recipe.box_mpc_h, seed)


class Transforms(NoiseAlone):
    """A step makes as many Fourier transforms as the displacements need, and nothing else."""

    def __init__(self, point: Point, context: Context) -> None:
        super().__init__(point, context)
        self.lattice = self.mesh(self.recipe.mesh).refined(self.recipe.refine)
        self.noise_k = white_noise(self.lattice, 0)
        self.field = self.lattice.inverse(self.noise_k)

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        self.lattice.forward(self.field)
        for _ in range(spec.TRANSFORMS - 1):
            self.lattice.inverse(self.noise_k)
        return self.work


class Displacements(NoiseAlone):
    """A step makes the displacements of both orders of the same linear field."""

    def __init__(self, point: Point, context: Context) -> None:
        super().__init__(point, context)
        self.lattice = self.mesh(self.recipe.mesh).refined(self.recipe.refine)
        self.density_k = self.modes(0)

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        universe.displacements(self.lattice, self.density_k)
        return self.work


class Painting(Displacements):
    """A step counts the particles of the same displacements in voxels, at each redshift."""

    def __init__(self, point: Point, context: Context) -> None:
        super().__init__(point, context)
        self.psi = universe.displacements(self.lattice, self.density_k)

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        seen, refine = REDSHIFTS[: self.recipe.channels], self.recipe.refine
        universe.seen(power.draw(self.recipe.seed, 0), seen, self.mesh(self.recipe.mesh), self.psi, "lpt", refine)
        return self.work


class DataSet(Universes):
    """One step makes what is missing of a piece of a data set, shard by shard, each whole or absent."""

    def __init__(self, point: Point, context: Context) -> None:
        super().__init__(point, context)
        self.root, self.storage = Path(context.data_folder), str(point.params["storage"])
        self.share = spec.shares(point.params)[0 if self.spread else self.place.rank]

    def step(self, clock: Clock) -> Work:
        clock.enter("compute")
        made = self._together() if self.spread else self._generate(make_universe)
        return Work(float(made * self.recipe.sample_bytes) / (self.place.world if self.spread else 1))

    def _generate(self, make: Make) -> int:
        return generate(self.root, self.recipe, *self.share, self.device, self.storage, make)

    def _together(self) -> int:
        """Rank 0 looks for what is missing, says its number to the others, and writes what all have made."""
        if self.place.rank == 0:
            made = self._generate(self._lead)
            self._agree(-1)
            return self._agree(made)
        while (index := self._agree(-1)) >= 0:
            self._slab(index)
        return self._agree(0)

    def _lead(self, recipe: Recipe, index: int, device: torch.device | str) -> Tensor:
        self._agree(index)
        return cast(Tensor, self._slab(index))  # rank 0 has the whole

    def _slab(self, index: int) -> Tensor | None:
        return self.mesh(self.recipe.mesh).gather(make_universe(self.recipe, index, self.device, spread=True))

    def _agree(self, number: int) -> int:
        """Rank 0's number."""
        told = torch.tensor([number], device=self.device)
        dist.broadcast(told, 0)
        return int(told)
