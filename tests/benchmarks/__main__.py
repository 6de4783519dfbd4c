"""`make bench`: the speed of saih itself, each figure beside its target. Nothing here passes or fails."""

from __future__ import annotations

from tests.benchmarks import bench_ceilings, bench_cli, bench_engine, bench_report, bench_universe, bench_verdicts

for benchmark in (bench_cli, bench_engine, bench_report, bench_universe, bench_ceilings, bench_verdicts):
    print(f"== {benchmark.__doc__}", flush=True)
    benchmark.main()
