"""The ceilings beside other people's tools on the same machine: torch's timer, STREAM's triad in C, fio."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from tests.planted_faults import measure

ROUNDS = 5
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
            for kernel in ("read", "write"):
                _beside(
                    f"storage {kernel}, O_DIRECT, B/s",
                    10,
                    lambda kernel=kernel: _fio(root, kernel),  # type: ignore[misc]
                    lambda kernel=kernel: (
                        FILE_BYTES  # type: ignore[misc]
                        / _fastest_s(root, {"kernel": kernel, "cache": "direct", "file_bytes": FILE_BYTES})
                    ),
                )


def _beside(what: str, target: int, theirs: Callable[[], float], ours: Callable[[], float]) -> None:
    """The best of each: what a machine can do is what it did when nothing disturbed it."""
    rounds = [(theirs(), ours()) for _ in range(ROUNDS)]
    best, own = (max(rates) for rates in zip(*rounds, strict=True))
    print(
        f"{what}: theirs {best:.4g}, saih {own:.4g}, {100 * (own / best - 1):+.1f} % (target: within {target} %)",
        flush=True,
    )


def _fastest_s(root: Path, settings: dict[str, bool | int | float | str]) -> float:
    """Of the timed calls of one run of `ceilings`."""
    kernel = str(settings.pop("kernel"))
    with tempfile.TemporaryDirectory(dir=root) as folder:
        run = measure(Path(folder), "ceilings", {"kernel": [kernel]}, settings | {"steps": 10}, 1)
    timed = run.samples[run.samples["warmup"] == 0]
    return float((timed["step_s"] - timed["other_s"]).min() if kernel in ("read", "write") else timed["step_s"].min())


def _fio(root: Path, kernel: str) -> float:
    """Bytes/s of one process that waits for each block of 1 MiB, past the page cache."""
    told = _output(
        *("fio", "--name=one", f"--filename={root / 'fio.bin'}", f"--rw={kernel}", "--bs=1M", f"--size={FILE_BYTES}"),
        *("--ioengine=psync", "--direct=1", "--numjobs=1", "--loops=5", "--output-format=json"),
        *(("--end_fsync=1",) if kernel == "write" else ()),
    )
    return float(json.loads(told)["jobs"][0][kernel]["bw_bytes"])


def _output(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
