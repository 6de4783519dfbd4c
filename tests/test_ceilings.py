"""The ceilings: kernels that are checked before they are timed, and rates picked from what was measured."""

from __future__ import annotations

import socket
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from saih import probe, store, workload
from saih.analysis.ceilings import find_ceilings, merged, mismatch, unit
from saih.core import Context, Place, Point, Value
from saih.errors import SaihError
from saih.report import results
from saih.report.summary import plain, summarize
from saih.sweep import make_sweep, points
from saih.timing import StepClock, run_steps
from tests.sites import cpu_site
from tests.synthetic import ENVIRONMENT, Scenario, make
from workloads.ceilings import bench, files, spec
from workloads.ceilings.collectives import AllReduce, PingPong

DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
HERE = Context(Place(0, 0, 1), "cpu", "unused")
KERNELS = [(kernel, precision) for kernel in ("gemm", "conv3d", "copy", "triad") for precision in ("fp32", "bf16")]


def ceiling(**changes: Value) -> bench.Ceiling:
    torch.set_num_threads(1)
    return bench.setup(Point("ceilings", DEFAULTS | {"size": 256} | changes), HERE)


@pytest.mark.parametrize(("kernel", "precision"), KERNELS)
def test_every_kernel_passes_its_check_and_does_what_it_says(kernel: str, precision: str) -> None:
    ready = ceiling(kernel=kernel, precision=precision)
    check = ready.check()
    assert check.passed, check.why
    with FlopCounterMode(display=False) as counter:
        (work,) = run_steps(ready, StepClock("cpu"), 1).work
    assert counter.get_total_flops() == work.flop
    assert work.moved_bytes > 0


@pytest.mark.parametrize(("kernel", "precision"), KERNELS)
def test_a_kernel_that_computes_something_else_fails(
    kernel: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = ceiling(kernel=kernel, precision=precision)
    honest = ready.kernel.call

    def one_number_off() -> object:
        result = honest()
        assert isinstance(result, torch.Tensor)
        result[(0,) * result.ndim] += 100.0 * result.abs().max()
        return result

    monkeypatch.setattr(ready.kernel, "call", one_number_off)
    assert not ready.check().passed


@pytest.mark.parametrize("kernel", ["gemm", "copy", "triad"])
def test_a_kernel_that_writes_nothing_fails(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = ceiling(kernel=kernel)
    ready.kernel.call()
    monkeypatch.setattr(ready.kernel, "call", lambda: None)
    assert not ready.check().passed


FILE_KERNELS = [
    (kernel, pattern, cache)
    for kernel in spec.FILES
    for pattern in ("sequential", "random")
    for cache in ("cold", "warm", "direct")
]


def on_files(folder: Path, **changes: Value) -> bench.Ceiling:
    """A ceiling with files in `folder`, which must be on a disk: not all file systems can do all of this."""
    settings = DEFAULTS | {"file_bytes": 2**22} | changes
    return bench.setup(Point("ceilings", settings), Context(Place(0, 0, 1), "cpu", str(folder)))


@pytest.mark.parametrize(("kernel", "pattern", "cache"), FILE_KERNELS)
def test_files_are_moved_whole_and_left_nowhere(kernel: str, pattern: str, cache: str, tmp_path: Path) -> None:
    ready = on_files(tmp_path, kernel=kernel, pattern=pattern, cache=cache)
    check = ready.check()
    assert check.passed, check.why
    before = files._storage_bytes()
    samples = run_steps(ready, StepClock("cpu"), 2)
    moved = spec.transferred_bytes(DEFAULTS | {"file_bytes": 2**22, "pattern": pattern})
    assert {work.moved_bytes for work in samples.work} == {float(moved)}
    fetched = files._storage_bytes() - before
    if kernel == "read":
        assert (fetched >= 2 * moved) == (cache != "warm"), "only a warm file is in memory"
    ready.close()
    assert list(tmp_path.iterdir()) == []


def test_ceilings_of_another_machine_are_left_out_and_said_so(tmp_path: Path) -> None:
    """On a scheduler, which machine a job runs on is known when it has run."""
    elsewhere = Scenario(environment=lambda point: ENVIRONMENT | {"processor": "Other CPU"})
    path = store.gather(make(tmp_path / "jobs", elsewhere), tmp_path / "results", mixed=True)
    found = results.read(path)
    assert found.cells["percent_of_peak"].isna().all()
    assert found.cells["percent_of_datasheet"].notna().all()
    told = "ceilings of another machine are not used (processor is 'Other CPU', not 'Test CPU')"
    assert told in plain(summarize(found))
    here = results.read(store.gather(make(tmp_path / "own", Scenario()), tmp_path / "results", mixed=True))
    assert here.cells["percent_of_peak"].notna().all()


def test_blocks_that_are_not_what_was_written_fail(tmp_path: Path) -> None:
    ready = on_files(tmp_path, kernel="read", cache="warm")
    with open(ready.kernel.path, "r+b") as file:  # type: ignore[attr-defined]
        file.seek(2**21)
        file.write(b"other")
    assert not ready.check().passed
    ready = on_files(tmp_path, kernel="write", cache="warm")
    ready.kernel.call = lambda: None  # type: ignore[method-assign]
    assert not ready.check().passed


@pytest.mark.parametrize("kernel", ["open", "launch"])
def test_small_things_are_counted(kernel: str, tmp_path: Path) -> None:
    ready = on_files(tmp_path, kernel=kernel)
    assert ready.check().passed
    (work,) = run_steps(ready, StepClock("cpu"), 1).work
    assert work.units == {"open": spec.OPENED_FILES, "launch": spec.LAUNCHES}[kernel]
    ready.close()
    assert list(tmp_path.iterdir()) == []


def test_a_host_link_wants_a_gpu() -> None:
    with pytest.raises(SaihError, match="kernel=upload copies between a host and a GPU; this job has none"):
        ceiling(kernel="upload")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kernel": "pingpong"}, "several ranks: --set gpus=2"),
        ({"kernel": "pingpong", "gpus": 4}, "between two ranks, not 4"),
        ({"kernel": "pingpong", "gpus": 2, "transport": "mpi"}, "goes over torch"),
        ({"kernel": "read", "precision": "bf16"}, "read has no precision"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Value], told: str) -> None:
    with pytest.raises(SaihError, match=told):
        spec.cost(DEFAULTS | changes)


def _ping(rank: int, port: int) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    context = Context(Place(rank, rank, 2), "cpu", "unused")
    ready = bench.setup(Point("ceilings", DEFAULTS | {"kernel": "pingpong", "gpus": 2, "message_bytes": 64}), context)
    assert ready.check().passed
    run_steps(ready, StepClock("cpu"), 2)
    kernel = ready.kernel
    assert isinstance(kernel, PingPong)
    kernel.call = lambda: None  # type: ignore[method-assign]
    assert ready.check().passed == (rank == 0), "rank 1 gets nothing"
    torch.distributed.destroy_process_group()


def test_a_ping_pong_comes_back_as_it_went() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_ping, (port,), nprocs=2)


def test_rates_have_names_units_and_no_time_before_the_call() -> None:
    rows = [
        ("triad", 1e9, 1.0, 0.1, 0.0),
        ("read", 1e8, 1.0, 0.5, 0.5),  # half of it is making the file cold
        ("open", 1e6, 256.0, 0.01, 0.0),
        ("launch", 8e3, 1000.0, 0.002, 0.0),
        ("pingpong", 16.0, 1.0, 2e-5, 0.0),
        ("pingpong", 2e6, 1.0, 1e-3, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["param_kernel", "moved_bytes", "units", "step_s", "share_other"])
    table = table.assign(status="measured", flop=0.0, precision="fp32", param_pattern="random", param_cache="cold")
    table["param_message_bytes"], table["ranks"] = table["moved_bytes"] / 2, 1
    table = table.assign(step_s_low=table["step_s"] / 2, step_s_high=table["step_s"] * 2)
    found = find_ceilings(table, {})
    assert found["rates"] == pytest.approx(
        {
            "triad": 1e10,
            "read-random-cold": 4e8,
            "opens_per_s": 25600,
            "launch_s": 2e-6,
            "pingpong": 2e9,
            "pingpong_s": 1e-5,
        }
    )
    assert found["intervals"]["launch_s"] == pytest.approx([1e-6, 4e-6])
    units = {"triad": "B/s", "read-random-cold": "B/s", "opens_per_s": "/s", "launch_s": "s", "fp32": "FLOP/s"}
    assert {name: unit(name) for name in units} == units


def test_a_site_is_probed_for_what_it_has() -> None:
    site = cpu_site()
    assert "host link" not in probe.parts(site)
    assert set(probe.parts(site.model_copy(update={"gpus_per_node": 1, "nodes": 1}))) == {
        "kernels",
        "storage",
        "launch and open",
    }
    clustered = probe.parts(site.model_copy(update={"gpus_per_node": 1, "nodes": 4}))
    assert clustered["collectives over nodes"].axes["nodes"] == [2, 4]
    assert clustered["point to point over nodes"].settings["nodes"] == 2
    assert not {"kernels at once", "collectives"} & set(clustered), "a rank has a node for itself"
    both = probe.parts(site.model_copy(update={"gpus_per_node": 6, "nodes": 3}))
    assert both["collectives"].axes["gpus"] == [2, 4, 6]
    over_nodes = both["collectives over nodes"]
    assert (over_nodes.axes["nodes"], over_nodes.settings["gpus"]) == ([2, 3], 6)
    two = both["point to point over nodes"].settings
    assert (two["nodes"], two["gpus"]) == (2, 1)
    assert next(iter(probe.parts(site))) == "kernels at once", "its rates give way to those over all sizes"
    gpu = probe.parts(site.model_copy(update={"device": "cuda"}))
    assert "host link" in gpu
    assert gpu["kernels"].axes["precision"] == ("fp32", "tf32", "bf16", "fp16")
    for part in (*clustered.values(), *both.values(), *probe.parts(site).values()):
        asked = make_sweep(probe.WORKLOAD, part.axes, part.settings)
        for point in points(asked, {}):
            assert spec.cost(point.params).operations


@pytest.mark.parametrize(
    ("changes", "here", "launcher"),
    [
        ({}, "mpiexec", "mpiexec"),
        ({}, "", None),
        ({"launcher": "openmpi"}, "mpiexec", "openmpi"),
        ({"scheduler": "slurm", "launcher": "srun"}, "mpiexec", None),
        ({"scheduler": "slurm", "launcher": "srun", "mpi": "pmi2"}, "mpiexec", "srun"),
    ],
)
def test_collectives_go_over_mpi_where_there_is_one(
    changes: dict[str, str], here: str, launcher: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "find_mpi", lambda: here)
    found = probe.parts(cpu_site(**changes)).get("collectives over MPI")
    assert (found.launcher if found else None) == launcher
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    assert "collectives over MPI" not in probe.parts(cpu_site(**changes))


def cells() -> pd.DataFrame:
    rows = [
        ("gemm", 512, "fp32", 2e9, 1e6, 0.02),
        ("gemm", 1024, "fp32", 8e9, 4e6, 0.05),  # 160 GFLOP/s
        ("conv3d", 512, "fp32", 2e9, 1e6, 0.01),  # 200 GFLOP/s: the best fp32
        ("gemm", 512, "bf16", 3e9, 1e6, 0.01),
        ("copy", 512, "fp32", 0.0, 1e6, 1e-5),  # 100 GB/s out of a cache
        ("copy", 4096, "fp32", 0.0, 1e9, 0.05),  # 20 GB/s: the largest
        ("gemm", 8192, "fp32", 1e15, 1e9, 1.0),
    ]
    table = pd.DataFrame(rows, columns=["param_kernel", "param_size", "precision", "flop", "moved_bytes", "step_s"])
    table = table.assign(status=["measured"] * 6 + ["failed"], ranks=1)
    return table.assign(step_s_low=table["step_s"], step_s_high=table["step_s"])


def test_the_best_sustained_rates_are_taken_and_the_largest_copy() -> None:
    here = {"processor": "P", "gpu": "", "torch": "2.13.0", "threads": 1, "host": "h"}
    found = find_ceilings(cells(), here)
    assert found["rates"] == pytest.approx({"fp32": 200e9, "bf16": 300e9, "copy": 20e9})
    assert found["sources"]["fp32"] == "conv3d of size 512"
    assert mismatch(found, here) == ""
    assert mismatch(found, here | {"host": "another"}) == ""
    assert "processor is 'Q', not 'P'" in mismatch(found, here | {"processor": "Q"})


def test_several_ranks_at_once_have_a_share_of_the_ceiling_and_do_not_raise_it() -> None:
    """Two ranks do twice the FLOP of a cell in more time; what counts is the time, of the same kernel and size."""
    alone, both = cells(), cells().assign(ranks=2)
    both[["flop", "moved_bytes"]] *= 2
    both["step_s"] = [
        0.02,
        0.05,
        0.02,
        0.0125,
        1e-5,
        0.2,
        1.0,
    ]  # fp32 takes twice as long, bf16 a quarter more
    found = find_ceilings(pd.concat([alone, both], ignore_index=True), {})
    assert found["rates"] == pytest.approx({"fp32": 200e9, "bf16": 300e9, "copy": 20e9})
    assert found["together"]["fp32"] == pytest.approx({"2": 0.5})
    assert found["together"]["bf16"] == pytest.approx({"2": 0.8})
    assert found["together"]["copy"] == pytest.approx({"2": 0.25})
    assert find_ceilings(both, {})["rates"]["copy"] == pytest.approx(5e9), "of one of the ranks"
    kept = merged([found, find_ceilings(alone, {}) | {"rates": {"fp32": 1.0}}])
    assert kept["together"] == found["together"]
    assert kept["rates"]["fp32"] == 1.0


def test_the_largest_all_reduce_of_each_transport_counts() -> None:
    rows = [
        ("torch", 8.0, 1e-6),  # 8 MB/s
        ("torch", 1e6, 1e-3),  # 1 GB/s: the largest
        ("mpi", 8.0, 1e-9),
        ("mpi", 1e6, 5e-4),
    ]
    table = pd.DataFrame(rows, columns=["param_transport", "param_message_bytes", "step_s"])
    table = table.assign(
        param_kernel="allreduce", precision="fp32", flop=0.0, moved_bytes=1.0, ranks=2, status="measured"
    )
    table = table.assign(step_s_low=table["step_s"], step_s_high=table["step_s"])
    found = find_ceilings(table, {})
    assert found["rates"] == pytest.approx({"allreduce-torch": 1e9, "allreduce-mpi": 2e9})
    assert found["sources"]["allreduce-mpi"] == "1 MB on 2 ranks"


def test_an_all_reduce_wants_several_ranks_and_numbers_mpi_knows() -> None:
    for build in (ceiling, lambda **changes: spec.cost(DEFAULTS | changes)):
        with pytest.raises(SaihError, match="several ranks: --set gpus=2"):
            build(kernel="allreduce")
    assert spec.cost(DEFAULTS | {"kernel": "allreduce", "nodes": 2}).message_bytes == 2**20
    with pytest.raises(SaihError, match="MPI has no bf16"):
        spec.cost(DEFAULTS | {"kernel": "allreduce", "gpus": 2, "transport": "mpi", "precision": "bf16"})


def test_a_sum_that_misses_a_rank_is_caught() -> None:
    for dtype, world, count in [
        (torch.float32, 2, 2),
        (torch.float32, 60, 2),
        (torch.bfloat16, 16, 4),
        (torch.bfloat16, 144, 4),
        (torch.bfloat16, 200, 100),
    ]:
        others = [_brings(rank, world, count, dtype) for rank in range(1, world)]
        assert _error(world, count, dtype, others) == 0.0
        assert _error(world, count, dtype, others[:-1]) > 0, "one is missing"
        assert _error(world, count, dtype, [*others[:-1], _brings(0, world, count, dtype)]) > 0, (
            "one is there twice, another one not"
        )


def _brings(rank: int, world: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank adds in the check."""
    x_N, seen = torch.zeros(count, dtype=dtype), []
    AllReduce(x_N, Place(rank, rank, world), lambda: seen.append(x_N.clone())).error()
    return seen[0]


def _error(world: int, count: int, dtype: torch.dtype, others: list[torch.Tensor]) -> float:
    """Rank 0's, when these come to its own, one after the other, as a ring adds them."""
    x_N = torch.zeros(count, dtype=dtype)

    def call() -> None:
        for each in others:
            x_N.add_(each)

    return AllReduce(x_N, Place(0, 0, world), call).error()


def test_ceilings_of_another_machine_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = cpu_site()
    assert probe.load(tmp_path, site) == (None, f"site {site.name} has not been probed")
    monkeypatch.setattr(probe, "cpu_name", lambda: "P")
    machine = {"processor": "P", "gpu": "", "torch": torch.__version__, "threads": site.threads_per_rank}
    probe.save(tmp_path, site, {"rates": {"fp32": 1.0}, "sources": {}, "machine": machine}, [tmp_path / "x.h5"])
    ceilings, why = probe.load(tmp_path, site)
    assert ceilings is not None, why
    assert ceilings["results"] == ["x.h5"]
    for changed in ({"processor": "Q"}, {"torch": "1.0"}, {"threads": 64}):
        probe.save(tmp_path, site, {"rates": {}, "sources": {}, "machine": machine | changed}, [tmp_path / "x.h5"])
        ceilings, why = probe.load(tmp_path, site)
        assert ceilings is None
        assert next(iter(changed)) in why
