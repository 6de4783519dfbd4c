"""Clips of structure formation, each with a prompt, for video models: python -m workloads.cosmology.clips FILE.npz

A clip is a slab of one growing universe, projected and seen at several epochs. Its prompt is one word for each of
`ATTRIBUTES`: the cosmology, what is looked at, and a structure that was planted in the middle.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saih.files import write_atomic
from workloads.cosmology import power, universe
from workloads.cosmology.dataset import noise_seed
from workloads.cosmology.mesh import Mesh

FRAMES = 8
MESH = 24

ATTRIBUTES = {
    "matter": ("low-matter", "mid-matter", "high-matter"),
    "contrast": ("calm", "moderate", "clumpy"),
    "grain": ("coarse", "even", "fine"),
    "scale": ("near", "far"),
    "slab": ("thin", "thick"),
    "epoch": ("young", "old"),
    "structure": ("plain", "halo", "void", "horizontal-filament", "vertical-filament"),
}
"""Words by attribute. The first three are the thirds of omega_m, sigma_8 and n_s within `power.RANGES`."""

BOX_MPC_H = {"near": 36.0, "far": 72.0}
SLAB_VOXELS = {"thin": 4, "thick": 10}
SCALE_FACTORS = {"young": (0.15, 0.5), "old": (0.35, 1.0)}
"""Scale factor 1 / (1 + z) of the first and the last frame."""
PLANTED_CONTRAST = {"plain": 0.0, "halo": 6.0, "void": -6.0, "horizontal-filament": 4.0, "vertical-filament": 4.0}
"""Linear density contrast at z = 0 in the middle of what is planted, on top of the random field."""
PLANTED_RADIUS = 3.0
"""Its standard deviation in voxels; a filament runs through the whole box."""


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [FRAMES, MESH, MESH], periodic in space. prompt: a word for each of `ATTRIBUTES`, in order."""

    frames: NDArray[np.uint8]
    prompt: str


def make_clip(seed: int, index: int) -> Clip:
    """Clip number `index` of the family `seed`; the same bytes on every machine with the same torch.

    Raises:
        ImportError: colossus is not installed.
    """
    cosmology = power.draw(seed, index)
    generator = torch.Generator().manual_seed(noise_seed(seed, index))
    words = _words(cosmology, generator)
    box_mpc_h = BOX_MPC_H[words["scale"]]
    mesh = Mesh(MESH)
    modes_k = universe.linear_modes(partial(power.linear_power, cosmology), mesh, box_mpc_h, noise_seed(seed, index))
    psi = universe.displacements(mesh, modes_k + mesh.forward(_planted(words["structure"])))
    epochs = np.linspace(*SCALE_FACTORS[words["epoch"]], FRAMES)
    first = MESH // 2 - SLAB_VOXELS[words["slab"]] // 2
    slab = slice(first, first + SLAB_VOXELS[words["slab"]])
    frames = [
        universe.paint_cic(mesh, psi, d1, d2)[..., slab].mean(-1)
        for d1, d2 in zip(*(growth.tolist() for growth in power.growth(cosmology, 1 / epochs - 1)), strict=True)
    ]
    return Clip(_pixels(torch.stack(frames)), " ".join(words.values()))


def _words(cosmology: power.Cosmology, generator: torch.Generator) -> dict[str, str]:
    """The word of each attribute: thirds of the cosmology's ranges, the rest drawn."""
    drawn = zip(power.RANGES.items(), ("matter", "contrast", "grain"), strict=False)
    told = {}
    for (name, (low, high)), attribute in drawn:
        told[attribute] = ATTRIBUTES[attribute][min(2, int(3 * (getattr(cosmology, name) - low) / (high - low)))]
    for attribute, words in list(ATTRIBUTES.items())[3:]:
        told[attribute] = words[int(torch.randint(len(words), (), generator=generator))]
    return told


def _planted(structure: str) -> Tensor:
    """The mean linear density contrast at z = 0: float32 [MESH, MESH, MESH]; rows run along x, columns along y."""
    bell = torch.exp(-0.5 * ((torch.arange(MESH) - MESH // 2) / PLANTED_RADIUS) ** 2)
    ones = torch.ones(MESH)
    x, y = (ones if structure == f"{run}-filament" else bell for run in ("vertical", "horizontal"))
    return PLANTED_CONTRAST[structure] * torch.einsum("x,y,z->xyz", x, y, bell)


def _pixels(density: Tensor) -> NDArray[np.uint8]:
    """Mean density 1 becomes middle grey; tanh(log) has full contrast in voids and halos alike."""
    squared = density.square()
    return ((squared / (squared + 1)) * 255).round().to(torch.uint8).numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make clips and write them with their prompts to one .npz file."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    clips = [make_clip(options.seed, index) for index in range(options.clips)]
    frames, prompts = np.stack([clip.frames for clip in clips]), np.array([clip.prompt for clip in clips])
    attributes = np.array([" ".join(words) for words in ATTRIBUTES.values()])
    write_atomic(
        options.file,
        lambda file: np.savez_compressed(file, frames=frames, prompts=prompts, attributes=attributes),
    )
    print(f"{options.file}: {len(clips)} clips of {FRAMES} x {MESH} x {MESH}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads.cosmology.clips", description=__doc__)
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--clips", type=int, default=1024, help="how many (1024); about 0.1 s each")
    parser.add_argument("--seed", type=int, default=0, help="the family of universes (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
