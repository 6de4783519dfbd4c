"""How fast universes are made: megabytes of voxels per second with two processes of one thread each.

Run: python -m tests.benchmarks.bench_universe

Each repeat has both processes make their share of a dataset, once in memory only and once to files with fsync. The
figure to beat is the 10 MB/s that a user of MLPerf Storage got from its CosmoFlow data generator with eight processes
on another machine (github.com/mlcommons/storage/issues/199).
"""

import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from workloads.cosmology.dataset import generate, make_universe
from workloads.cosmology.recipe import Recipe

PROCESSES = 2
REPEATS = 7
RECIPE = Recipe(mesh=64, channels=4, seed=0, samples=60)
MLPERF_STORAGE_MB_S = 10.0
MLPERF_STORAGE_PROCESSES = 8


def main() -> None:
    """Measure and print."""
    print(f"{platform.machine()}, {os.cpu_count()} logical CPUs, torch {torch.__version__}, {PROCESSES} processes")
    print(f"{RECIPE.samples} universes of {RECIPE.mesh}^3 x {RECIPE.channels} redshifts, int16, {REPEATS} repeats")
    print(f"{'MB/s':18}{'min':>8}{'median':>8}{'max':>8}{'a core':>8}{'to issue 199':>14}{'a process':>11}")
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(PROCESSES, context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        rates: dict[str, list[float]] = {"in memory": [], "to files": []}
        together(pool, make_in_memory)  # start the processes, import, fill the allocator
        for repeat in range(REPEATS):
            rates["in memory"].append(together(pool, make_in_memory))
            rates["to files"].append(together(pool, partial(make_files, Path(folder) / str(repeat))))
    for name, values in rates.items():
        report(name, values)


def make_in_memory(rank: int) -> None:
    """Make one process's share and drop it."""
    for index in range(rank, RECIPE.samples, PROCESSES):
        make_universe(RECIPE, index)


def make_files(root: Path, rank: int) -> None:
    """Make one process's share as files."""
    generate(root, RECIPE, rank, PROCESSES)


def together(pool: ProcessPoolExecutor, work: Callable[[int], None]) -> float:
    """MB/s of voxels from the start of the first process to the end of the last."""
    start_s = time.perf_counter()
    list(pool.map(work, range(PROCESSES)))
    return RECIPE.dataset_bytes / 1e6 / (time.perf_counter() - start_s)


def report(name: str, rates_mb_s: list[float]) -> None:
    """Print one line: the spread, the median per core, and the median against issue 199 in all and per process."""
    median = statistics.median(rates_mb_s)
    total = median / MLPERF_STORAGE_MB_S
    per_process = total * MLPERF_STORAGE_PROCESSES / PROCESSES
    print(
        f"{name:18}{min(rates_mb_s):8.1f}{median:8.1f}{max(rates_mb_s):8.1f}{median / PROCESSES:8.1f}"
        f"{total:13.1f}x{per_process:10.1f}x"
    )


if __name__ == "__main__":
    main()
