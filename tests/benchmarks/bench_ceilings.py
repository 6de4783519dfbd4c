"""The ceilings beside other people's tools on the same machine: torch's timer, STREAM's triad in C, fio."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from saih import workload
from saih.analysis.intervals import log_mean_interval
from saih.core import Params, Value
from tests.planted_faults import measure
from workloads.ceilings import spec
from workloads.ceilings.files import FileTransfer, Read, Write

ROUNDS, PASSES = 5, 10
FILE_ROUNDS = 16
FILE_PASSES = {"sequential": 3, "random": 30}
"""Short turns, many of them: what a shared disk gives changes within seconds. A second or less each."""
SIZE, ELEMENTS = 1024, 4096 * 4096
FILE_BYTES = 2**28
TRIAD_C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
/* STREAM's triad (McCalpin): a = b + s c on one core; prints the best bytes/s of so many passes. */
int main(int argc, char **argv) {
  long n = atol(argv[1]), passes = atol(argv[2]);
  float *a = malloc(n * 4), *b = malloc(n * 4), *c = malloc(n * 4);
  double best = 0;
  for (long i = 0; i < n; i++) { a[i] = 0; b[i] = i % 7; c[i] = i % 5; }
  for (long pass = 0; pass < passes; pass++) {
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (long i = 0; i < n; i++) a[i] = b[i] + 3.0f * c[i];
    clock_gettime(CLOCK_MONOTONIC, &to);
    double rate = 12.0 * n / ((to.tv_sec - from.tv_sec) + 1e-9 * (to.tv_nsec - from.tv_nsec));
    if (rate > best) best = rate;
  }
  printf("%.6g %g\n", best, a[n - 1]);
  return 0;
}
"""


def main() -> None:
    """Each pair is taken in turns, a few times over: a machine's speed moves by the minute."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        root = Path(name)
        gemm_a, gemm_b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
        timer = Timer("torch.mm(a, b, out=c)", globals={"torch": torch, "a": gemm_a, "b": gemm_b, "c": gemm_a.clone()})
        flop = 2.0 * SIZE**3
        _beside(
            "GEMM, FLOP/s",
            5,
            lambda: flop / min(timer.blocked_autorange(min_run_time=0.3).times),
            lambda: flop / _fastest_s(root, {"kernel": "gemm", "size": SIZE}),
        )
        if shutil.which("gcc"):
            (root / "triad.c").write_text(TRIAD_C)
            subprocess.run(["gcc", "-O3", "-march=native", "-o", root / "triad", root / "triad.c"], check=True)
            _beside(
                "triad, B/s",
                10,
                lambda: float(_output(root / "triad", str(ELEMENTS), "20").split()[0]),
                lambda: 12.0 * ELEMENTS / _fastest_s(root, {"kernel": "triad", "size": 4096}),
            )
        if shutil.which("fio"):
            for kernel, transfer in (("read", Read), ("write", Write)):
                for pattern in ("sequential", "random"):
                    _beside_fio(kernel, transfer, pattern, root / "one.bin")
        else:
            print("storage: fio is not installed (Debian: apt-get install fio)")


def _beside(
    what: str,
    target: int,
    theirs: Callable[[], float],
    ours: Callable[[], float],
) -> None:
    """The best of each: what a machine can do is what it did when nothing disturbed it."""
    rounds = [(theirs(), ours()) for _ in range(ROUNDS)]
    best, own = (max(rates) for rates in zip(*rounds, strict=True))
    print(
        f"{what}: theirs {best:.4g}, saih {own:.4g}, {100 * (own / best - 1):+.1f} % (target: within {target} %)",
        flush=True,
    )


def _fastest_s(root: Path, settings: Mapping[str, Value]) -> float:
    """Of the timed calls of one run of `ceilings`."""
    rest = {name: value for name, value in settings.items() if name != "kernel"}
    with tempfile.TemporaryDirectory(dir=root) as folder:
        run = measure(Path(folder), "ceilings", {"kernel": [settings["kernel"]]}, rest | {"steps": PASSES}, 1)
    return float(run.samples.loc[run.samples["warmup"] == 0, "step_s"].min())


def _beside_fio(kernel: str, kind: type[FileTransfer], pattern: str, path: Path) -> None:
    """Short turns of both on one file, in random order: the same blocks, one after the other, past the page cache.

    Both with the same kind of memory, new in every turn: a disk that is virtual gives more where pages lie together.
    Both write one buffer again and again: fio would change it in between, which takes a third of the time here.
    """
    defaults = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
    chosen: dict[str, Value] = {"kernel": kernel, "pattern": pattern, "cache": "direct", "file_bytes": FILE_BYTES}
    params = defaults | chosen
    turns = {"fio": lambda: _fio(path, kernel, pattern), "saih": lambda: _rate(kind(path, params, 0), params)}
    rounds: list[dict[str, float]] = []
    for fio_first in np.random.default_rng(0).random(FILE_ROUNDS) < 0.5:
        order = ("fio", "saih") if fio_first else ("saih", "fio")
        path.write_bytes(bytes(FILE_BYTES))  # each transfer of saih removes it
        rounds.append({who: turns[who]() for who in order})
    path.unlink(missing_ok=True)
    fio, saih = (np.array([each[who] for each in rounds]) for who in ("fio", "saih"))
    ratio, low, high = log_mean_interval(np.log(saih / fio))
    print(
        f"storage {kernel}, {pattern}, O_DIRECT, one file, {FILE_ROUNDS} turns each: fio {np.median(fio):.4g} B/s, "
        f"saih {np.median(saih):.4g}; saih over fio {ratio:.3f} [{low:.3f}, {high:.3f}] (target: 0.9 to 1.1)",
        flush=True,
    )


def _rate(transfer: FileTransfer, params: Params) -> float:
    """Mean bytes/s of a few calls."""
    passes = FILE_PASSES[str(params["pattern"])]
    began_s = time.perf_counter()
    for _ in range(passes):
        transfer.call()
    rate = passes * spec.transferred_bytes(params) / (time.perf_counter() - began_s)
    transfer.close()
    return rate


def _fio(path: Path, kernel: str, pattern: str) -> float:
    """Mean bytes/s of one process that waits for each block, past the page cache, and after a pass for all."""
    is_random = pattern == "random"
    block_bytes = spec.RANDOM_BLOCK_BYTES if is_random else spec.SEQUENTIAL_BLOCK_BYTES
    blocks = spec.RANDOM_BLOCKS if is_random else FILE_BYTES // block_bytes
    way = f"rand{kernel}" if is_random else kernel
    told = _output(
        *("fio", "--name=one", f"--filename={path}", f"--rw={way}", f"--bs={block_bytes}"),
        *(
            f"--size={FILE_BYTES}",
            f"--io_size={blocks * block_bytes}",
            f"--loops={FILE_PASSES[pattern]}",
            "--norandommap",
        ),
        *(
            "--ioengine=psync",
            "--mem=mmapshared",
            "--direct=1",
            "--scramble_buffers=0",
            "--numjobs=1",
            "--output-format=json",
        ),
        *((f"--fdatasync={blocks}", "--overwrite=1") if kernel == "write" else ()),
    )
    return float(json.loads(told)["jobs"][0][kernel]["bw_bytes"])


def _output(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
