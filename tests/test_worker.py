"""The worker on this process: what it stores, in which order, and what it says of the machine."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saih import environment, launchers, load, worker, workload
from saih.core import FORMAT, PHASES, Check, Clock, Place, Point, Work
from saih.errors import SaihError
from saih.files import read_json, write_json

TOYS = Path(__file__).parent / "toys"


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOYS))
    workload.packages.cache_clear()
    yield
    workload.packages.cache_clear()


def point(**changes: Any) -> Point:
    known = workload.parameters(workload.spec("faulty"))
    quick = {"seconds": 0.0, "steps": 3, "warmup": 1}
    return Point("faulty", {name: each.default for name, each in known.items()} | quick | changes)


def launch(folder: Path, **changes: Any) -> worker.Launch:
    pack = worker.Pack(
        folder, (), folder / "points", 1, 1, "cpu", str(folder / "data"), None, {"saih": "0", "commit": ""}
    )
    return worker.Launch(pack, Place(0, 0, 1), "cpu", {"host": "here"})


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_measurement_holds_raw_samples_and_their_checksum(tmp_path: Path) -> None:
    wanted = point(step_ms=2.0, amount=7)
    launch(tmp_path).run(wanted)
    home = tmp_path / "points" / wanted.folder
    measurement = read_json(home / "measurement.json")
    assert measurement["format"] == FORMAT
    assert Point.from_json(measurement["point"]).id == wanted.id
    assert measurement["check"] == {"answer": 41.0}
    assert measurement["ranks"] == 1
    assert measurement["environment"] == {"host": "here"}
    content = (home / "samples.npz").read_bytes()
    assert hashlib.sha256(content).hexdigest() == measurement["samples_sha256"]
    with np.load(home / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["phase_s"].shape == (1, 3, len(PHASES))
        assert arrays["warmup_phase_s"].shape == (1, 1, len(PHASES))
        assert (arrays["phase_s"][..., PHASES.index("compute")] >= 0.002).all()
        assert (arrays["flop"] == 7e6).all()
        assert (arrays["units"] == 1).all()
    assert events(tmp_path) == ["started", "measured"]
    assert sorted(path.name for path in home.iterdir()) == ["measurement.json", "samples.npz"]


def test_a_failed_check_gives_no_timing(tmp_path: Path) -> None:
    wanted = point(fault="check-failed")
    launch(tmp_path).run(wanted)
    home = tmp_path / "points" / wanted.folder
    failure = read_json(home / "failure.json")
    assert failure["kind"] == "check-failed"
    assert failure["check"] == {"answer": 41.0}
    assert [path.name for path in home.iterdir()] == ["failure.json"]
    assert events(tmp_path) == ["started", "failed"]


def test_a_later_success_removes_the_old_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = point(fault="error")
    launch(tmp_path).run(wanted)
    monkeypatch.setenv("FAULTY_HEALED", "1")
    launch(tmp_path).run(wanted)
    home = tmp_path / "points" / wanted.folder
    assert sorted(path.name for path in home.iterdir()) == ["measurement.json", "samples.npz"]


class Spy:
    """A bench that writes down what is called, and how many processes run beside it that did not before."""

    def __init__(self, order: list[str]) -> None:
        self.order, self.others = order, self.children()
        self.beside: list[int] = []

    def check(self) -> Check:
        self.order.append("check")
        return Check(True)

    def ablate(self, part: str) -> None:
        self.order.append(f"without {part}")

    def step(self, clock: Clock) -> Work:
        self.order.append("step")
        self.beside.append(len(self.children() - self.others))
        return Work(1.0)

    def children(self) -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    def close(self) -> None:
        self.order.append("close")


def test_the_check_comes_before_the_first_timed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(workload.bench("faulty"), "setup", lambda point, context: order.append("setup") or Spy(order))
    launch(tmp_path).run(point(warmup=2, steps=3))
    assert order == ["setup", "check", *["step"] * 5, "close"]


def test_a_part_is_taken_out_after_the_check_and_before_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(workload.bench("faulty"), "setup", lambda point, context: Spy(order))
    launch(tmp_path).run(point(warmup=1, steps=2, ablation="input"))
    assert order == ["check", "without input", *["step"] * 3, "close"]


def test_a_load_runs_beside_warm_up_and_timed_steps_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy([])
    monkeypatch.setattr(load, "FILE_BYTES", load.READ_BYTES)
    monkeypatch.setattr(workload.bench("faulty"), "setup", lambda point, context: spy)
    wanted = point(warmup=1, steps=2, load_readers=1, load_hogs=1)
    launch(tmp_path).run(wanted)
    assert (tmp_path / "points" / wanted.folder / "measurement.json").exists()
    assert spy.beside == [2, 2, 2]
    launch(tmp_path).run(point())
    assert spy.beside[3:] == [0] * 4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out-of-memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out-of-memory"),
        (OSError(28, "No space left on device"), "disk-full"),
        (OSError(5, "Input/output error"), "error"),
        (worker.CheckFailedError(Check(False)), "check-failed"),
        (ValueError("x"), "error"),
    ],
)
def test_errors_are_sorted_into_kinds(error: Exception, kind: str) -> None:
    assert worker._kind(error) == kind


def test_a_requeued_job_skips_what_is_measured(tmp_path: Path) -> None:
    done, left = point(amount=1), point(amount=2)
    launch(tmp_path).run(done)
    pack = launch(tmp_path).pack
    again = worker.Pack(**{**pack.__dict__, "points": (done, left)})
    assert [each.id for each in worker._unmeasured(again, "cpu")] == [left.id]


def test_bytes_read_are_counted_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5_000_000)
    before = worker._io_counters()
    (tmp_path / "file").read_bytes()
    after = worker._io_counters()
    assert 5_000_000 <= after[1] - before[1] < 5_100_000


def test_bytes_read_by_what_a_process_starts_are_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5_000_000)
    code = "import sys; sys.stdin.read(1); open(sys.argv[1], 'rb').read(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        before = worker._io_counters()
        reader.stdin.write("x")
        reader.stdin.flush()
        reader.stdout.readline()
        after = worker._io_counters()
        reader.stdin.close()
    assert after[1] - before[1] >= 5_000_000


def test_peak_memory_is_that_of_the_point(tmp_path: Path) -> None:
    ballast = bytearray(200_000_000)
    for place in range(0, len(ballast), 4096):
        ballast[place] = 1
    high = worker._host_peak()
    del ballast
    worker._release_memory("cpu")
    worker._reset_peak_memory("cpu")
    assert worker._host_peak() < high - 150_000_000


def test_a_pack_survives_the_file(tmp_path: Path) -> None:
    written = {
        "format": FORMAT,
        "name": "000",
        "points": [point().to_json()],
        "points_folder": str(tmp_path / "points"),
        "ranks": 2,
        "threads": 1,
        "device": "cpu",
        "data_folder": "data",
        "rank_memory_bytes": None,
        "version": {},
    }
    write_json(tmp_path / "pack.json", written)
    pack = worker.Pack.read(tmp_path / "pack.json")
    assert pack.points[0].id == point().id
    assert (pack.ranks, pack.folder) == (2, tmp_path)


@pytest.mark.parametrize("content", [{}, None, {"format": 99}, {"format": FORMAT, "name": "000"}])
def test_a_damaged_pack_is_named(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "pack.json", content)
    with pytest.raises(SaihError, match=r"pack\.json: "):
        worker.Pack.read(tmp_path / "pack.json")


@pytest.mark.parametrize(("ranks", "status"), [(1, 1), (2, -signal.SIGKILL)])
def test_a_rank_that_cannot_begin_says_why_and_is_not_alone_in_its_end(ranks: int, status: int, tmp_path: Path) -> None:
    """By a signal where there are others: MPICH's mpiexec would leave them waiting after an exit status."""
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    done = subprocess.run(
        [sys.executable, "-m", "saih.worker", str(tmp_path / "pack.json")],
        env=os.environ | told,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert re.match(r"saih worker: .*pack\.json", done.stderr)


def test_ranks_that_never_come_are_not_waited_for_as_long_as_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(worker, "MEETING", datetime.timedelta(seconds=1))
    with pytest.raises(torch.distributed.DistStoreError), worker._process_group(Place(0, 0, 2), "cpu"):
        pass


def _late(rank: int, folder: str) -> None:
    worker.MEETING = datetime.timedelta(seconds=2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    with worker._process_group(Place(rank, rank, 2), "cpu"):
        worker._refuse_mixed_ranks(dict.fromkeys(environment.MACHINE_KEYS, "same"), "cpu")
        worker._be_patient()
        time.sleep(4 * rank)
        torch.distributed.barrier()


def test_ranks_that_have_met_wait_longer_for_each_other(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_late, (str(tmp_path),), nprocs=2)


def test_a_process_no_launcher_started_is_told_so() -> None:
    with pytest.raises(SaihError, match="no launcher told this process its rank"):
        launchers.place({})
    assert launchers.place({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == Place(3, 1, 4)


def test_the_digest_is_of_the_family_of_the_workload_and_of_saih(tmp_path: Path) -> None:
    (tmp_path / "family" / "system").mkdir(parents=True)
    (tmp_path / "family" / "shared.py").write_text("A = 1\n")
    before = environment.source_digest(tmp_path / "family")
    (tmp_path / "other.py").write_text("B = 1\n")
    assert environment.source_digest(tmp_path / "family") == before
    (tmp_path / "family" / "shared.py").write_text("A = 2\n")
    assert environment.source_digest(tmp_path / "family") != before
    assert workload.family_folder("cosmoflow").name == "cosmology"
    assert workload.family_folder("ceilings").name == "ceilings"


def test_the_environment_names_what_must_not_be_mixed() -> None:
    seen = environment.capture("cpu", environment.own_version(workload.family_folder("cosmoflow")))
    assert set(environment.MACHINE_KEYS) <= set(seen)
    assert seen["torch"] == torch.__version__
    assert seen["processor"]
    assert seen["host"] == os.uname().nodename
    json.dumps(seen, allow_nan=False)
