"""Make a data set in parallel, each rank its own universes: mpiexec -n 8 python -m workloads.cosmology.generate data"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from saih import mpi
from saih.errors import SaihError
from workloads.cosmology.dataset import generate
from workloads.cosmology.recipe import REDSHIFTS, Recipe
from workloads.cosmology.storages import DEFAULT_STORAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate what is missing; rank 0 says how much that was, and how fast."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    communicator = mpi.communicator()
    start_s = time.perf_counter()
    try:
        recipe = Recipe(options.mesh, options.channels, options.seed, options.samples)
        made = generate(options.folder, recipe, communicator.rank, communicator.size)
    except Exception as error:
        told = f"generate: {error}\n" if isinstance(error, (SaihError, ValueError, OSError)) else traceback.format_exc()
        print(told, end="", file=sys.stderr, flush=True)
        communicator.Abort(2)  # the other ranks would wait for this one
    own = np.array([made, time.perf_counter() - start_s])
    every_rank = np.empty((communicator.size, 2)) if communicator.rank == 0 else None
    communicator.Gather(own, every_rank)
    if every_rank is not None:
        print(_summary(recipe, options.folder, every_rank))
    return 0


def _summary(recipe: Recipe, folder: Path, made_and_s: np.ndarray) -> str:
    """made_and_s: universes made and seconds taken, [ranks, 2]."""
    made, longest_s = int(made_and_s[:, 0].sum()), float(made_and_s[:, 1].max())
    volume = f"{recipe.mesh}^3 x {recipe.channels}"
    rate = f" in {longest_s:.2f} s, {made * recipe.sample_bytes / longest_s / 1e6:.1f} MB/s" if made else ""
    return (
        f"{folder / recipe.folder_name(DEFAULT_STORAGE)}: {recipe.samples} volumes of {volume}; "
        f"{made} made by {len(made_and_s)} rank{'s' if len(made_and_s) > 1 else ''}{rate}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads.cosmology.generate", description=__doc__)
    parser.add_argument("folder", type=Path, help="where data sets are kept; sites name theirs data_folder")
    parser.add_argument("--mesh", type=int, default=64, help="voxels per side (64)")
    parser.add_argument("--channels", type=int, default=len(REDSHIFTS), help="redshifts (4)")
    parser.add_argument("--samples", type=int, default=8, help="volumes (8)")
    parser.add_argument("--seed", type=int, default=0, help="the family of universes (0)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SaihError as mistake:
        sys.exit(f"generate: {mistake}")
