"""Runs inside a job, one process a rank: sets up, checks, times and stores the points of a pack, one after the other.

Needs torch, numpy and the standard library alone. Rank 0 writes; a point is done when its measurement.json exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import hashlib
import io
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from saih import energy, environment, last_words, launchers, workload
from saih.core import FORMAT, PHASES, WHOLE, Check, Context, Place, Point
from saih.errors import SaihError
from saih.files import blamed_on, digest, read_record, write_atomic, write_json, write_json_once
from saih.lifeline import die_with_the_parent
from saih.load import background
from saih.timing import Samples, StepClock, run_steps

BESIDE_SIZE = {"cpu": {"gemm": 1024, "conv3d": 2048}, "cuda": {"gemm": 8192, "conv3d": 8192}}
"""Kernels of the workload `ceilings` that are timed beside a point that asks for it.

Large enough for what a kernel sustains, small enough to take some hundredths of a second.
"""
BESIDE_STEPS = 3
HOST_BYTES = 64
MEETING = datetime.timedelta(minutes=5)
"""For all ranks to find each other: one that never starts is not waited for as long as a slow step is."""
COLLECTIVE = datetime.timedelta(minutes=30)
"""For a rank to wait in a collective: another may have a data set to make first."""


class CheckFailedError(Exception):
    """A workload's own correctness check said no; nothing was timed."""

    def __init__(self, check: Check) -> None:
        super().__init__(check.why or "the correctness check failed")
        self.check = check


@dataclass(frozen=True)
class Pack:
    """What a launch was given: pack.json, read."""

    folder: Path
    points: tuple[Point, ...]
    points_folder: Path
    ranks: int
    threads: int
    device: str
    data_folder: str
    rank_memory_bytes: float | None
    version: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Pack:
        value = read_record(path, FORMAT, ("name", *(each.name for each in fields(cls) if each.name != "folder")))
        with blamed_on(path):
            points = tuple(Point.from_json(point) for point in value.pop("points"))
            del value["format"], value["name"]
            return cls(path.parent, points, Path(value.pop("points_folder")), **value)


def main(arguments: Sequence[str]) -> int:
    """`python -m saih.worker PACK.json`, started by a launcher; 0 when every point was dealt with."""
    die_with_the_parent()
    pack = Pack.read(Path(arguments[0]))
    place = launchers.place()
    if place.world != pack.ranks:
        raise SaihError(f"this is rank {place.rank} of {place.world}, but the job was given {pack.ranks} ranks")
    if place.world > 1:
        last_words.allow()
    torch.set_num_threads(pack.threads)
    _strict_fp32()
    device = f"cuda:{place.local_rank}" if pack.device == "cuda" else "cpu"
    _limit_memory(pack)
    with _process_group(place, device):
        seen = environment.capture(device, pack.version)
        _refuse_mixed_ranks(seen, device)
        _be_patient()
        gc.freeze()  # what is imported stays: collecting between points would visit all of torch, for 0.1 s
        for point in _unmeasured(pack, device):
            Launch(pack, place, device, seen).run(point)
    return 0


class Launch:
    """One launch of a worker: runs points on this rank."""

    def __init__(self, pack: Pack, place: Place, device: str, seen: dict[str, Any]) -> None:
        self.pack, self.place, self.device, self.environment = pack, place, device, seen

    def run(self, point: Point) -> None:
        """Measure a point, or record why it could not be; with several ranks a failure ends the launch."""
        folder = self.pack.points_folder / point.folder
        if self.place.rank == 0:
            (folder / "failure.json").unlink(missing_ok=True)  # of an earlier try
        self._line_up()
        self._tell("started", point)
        try:
            self._measure(point, folder)
        except Exception as error:
            self._record_failure(folder, point, error)
            if self.place.world > 1:
                _take_the_others_along()
        finally:
            _release_memory(self.device)

    def _measure(self, point: Point, folder: Path) -> None:
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        torch.manual_seed(point.seed)
        clock = StepClock(self.device)
        start_s = time.perf_counter()
        context = Context(self.place, self.device, self.pack.data_folder, str(folder / "kept"))
        bench = workload.bench(point.workload).setup(point, context)
        try:
            ready_s = time.perf_counter()
            check = self._unanimous(bench.check())
            checked_s = time.perf_counter()
            part = point.params.get("ablation", WHOLE)
            if part != WHOLE:
                bench.ablate(part)  # type: ignore[attr-defined]  # held by the contract test
            ceilings = self._ceilings(point) if point.params.get("beside") else None
            before = ceilings.time() if ceilings else {}
            with self._load(point), self._meters() as metering:
                warm = run_steps(bench, clock, int(point.params["warmup"]), self._line_up)
                steps = self._agree_on_steps(point, warm)
                _reset_peak_memory(self.device)
                io_before = _io_counters()
                metering.begin()
                timed = run_steps(bench, clock, steps, self._line_up_and(metering.look))
                drawn = metering.end()
                io_after = _io_counters()
            after = ceilings.time() if ceilings else {}
        finally:
            bench.close()
        per_rank = {
            "setup_s": ready_s - start_s,
            "check_s": checked_s - ready_s,
            "device_peak_bytes": _device_peak(self.device),
            "host_peak_bytes": _host_peak(),
            "storage_read_bytes": io_after[0] - io_before[0],
            "file_read_bytes": io_after[1] - io_before[1],
        }
        arrays = {name: self._gather(array) for name, array in _arrays(warm, timed).items()}
        ranks = dict(zip(per_rank, self._gather(np.array(list(per_rank.values()))).T.tolist(), strict=True))
        hosts = [bytes(row).rstrip(b"\0").decode() for row in self._gather(_host_name()).astype(np.uint8)]
        used = self._total_energy(drawn)
        beside = {name: float(self._gather(np.array([*before[name], *after[name]])).mean()) for name in before}
        if self.place.rank == 0:
            told = {"timed": metering.timed, "energy": used, "beside_flop_per_s": beside}
            _store(folder, point, began, check, arrays, _without_nan(ranks), hosts, told, self.environment)
            self._tell("measured", point)

    def _load(self, point: Point) -> contextlib.AbstractContextManager[None]:
        """The background load of a node, started by the first of its ranks."""
        if self.place.local_rank > 0:
            return contextlib.nullcontext()
        counts = int(point.params["load_readers"]), int(point.params["load_hogs"])
        return background(*counts, Path(self.pack.data_folder) / f"load-of-{socket.gethostname()}-{self.place.rank}")

    def _meters(self) -> energy.Metering:
        """The GPU's own by each rank, those of a node by the first of its ranks."""
        cuda = self.device.startswith("cuda")
        gpu = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}" if cuda else None
        return energy.Metering(energy.meters(gpu, self.place.local_rank == 0))

    def _total_energy(self, drawn: list[energy.Energy]) -> dict[str, Any]:
        """What the job drew in the timed steps, by source; on the first rank."""
        gathered = self._gather(np.array([float(self.place.local_rank), *energy.as_numbers(drawn)])).tolist()
        return energy.total(drawn, [row[1:] for row in gathered], [int(row[0]) for row in gathered])

    def _ceilings(self, point: Point) -> Beside:
        return Beside(str(point.params.get("precision", "fp32")), self.device, self._line_up)

    def _unanimous(self, check: Check) -> Check:
        """A check passes when it passes on every rank."""
        passed = bool(self._gather(np.array([float(check.passed)])).min())
        if not passed:
            raise CheckFailedError(check if not check.passed else Check(False, check.numbers, "failed on another rank"))
        return check

    def _agree_on_steps(self, point: Point, warm: Samples) -> int:
        """Rank 0's last warm-up step decides how many steps are timed; without one, as few as may be."""
        last_s = sum(warm.phase_s[-1]) if warm.phase_s else float("inf")
        return int(self._gather(np.array([float(point.timed_steps(last_s))]))[0, 0])

    def _line_up(self) -> None:
        """All ranks are here: a rank that is late does not make another one's next step look long."""
        if self.place.world > 1:
            dist.barrier()

    def _line_up_and(self, look: Callable[[], None]) -> Callable[[], None]:
        def line_up() -> None:
            look()
            self._line_up()

        return line_up

    def _gather(self, array: np.ndarray) -> np.ndarray:
        """`array` of every rank, stacked: [ranks, ...]. Tensors, never pickles."""
        if self.place.world == 1:
            return array[None]
        mine = torch.as_tensor(array, dtype=torch.float64, device=self.device)
        theirs = [torch.empty_like(mine) for _ in range(self.place.world)]
        dist.all_gather(theirs, mine)
        return torch.stack(theirs).cpu().numpy()

    def _record_failure(self, folder: Path, point: Point, error: Exception) -> None:
        """The first rank to fail tells why; the others only lost their peer."""
        numbers = dict(error.check.numbers) if isinstance(error, CheckFailedError) else {}
        failure = {
            "format": FORMAT,
            "point": point.to_json(),
            "kind": _kind(error),
            "reason": f"{type(error).__name__}: {error}".splitlines()[0][:500],
            "rank": self.place.rank,
            "check": {name: value for name, value in numbers.items() if np.isfinite(value)},
            "log_tail": "".join(traceback.format_exception(error))[-4000:],
            "environment": self.environment,
        }
        traceback.print_exception(error)
        if write_json_once(folder / "failure.json", failure):
            _append_event(self.pack.folder, "failed", point)

    def _tell(self, event: str, point: Point) -> None:
        if self.place.rank == 0:
            _append_event(self.pack.folder, event, point)


class Beside:
    """The kernels that a point is compared with, timed when it is timed: a processor's clock moves by the minute."""

    def __init__(self, precision: str, device: str, line_up: Callable[[], None]) -> None:
        self.line_up, self.clock = line_up, StepClock(device)
        family = workload.spec("ceilings")
        params = {name: parameter.default for name, parameter in workload.parameters(family).items()}
        params["precision"] = precision
        context = Context(Place(0, 0, 1), device, "")
        points = {
            name: Point("ceilings", params | {"kernel": name, "size": size})
            for name, size in BESIDE_SIZE[self.clock.kind].items()
        }
        self.kernels = {name: workload.bench("ceilings").setup(each, context) for name, each in points.items()}

    def time(self) -> dict[str, list[float]]:
        """FLOP/s of each kernel in each of a few calls, after one that does not count."""
        rates = {}
        for name, kernel in self.kernels.items():
            samples = run_steps(kernel, self.clock, BESIDE_STEPS + 1, self.line_up)
            timed = list(zip(samples.work, samples.phase_s, strict=True))[1:]
            rates[name] = [work.flop / sum(phases) for work, phases in timed]
        return rates


def _arrays(warm: Samples, timed: Samples) -> dict[str, np.ndarray]:
    """Raw samples of one rank as float64 arrays; the first dimension counts steps."""
    return {
        "warmup_phase_s": np.array(warm.phase_s, dtype=np.float64).reshape(-1, len(PHASES)),
        "phase_s": np.array(timed.phase_s, dtype=np.float64),
        "units": np.array([work.units for work in timed.work], dtype=np.float64),
        "flop": np.array([work.flop for work in timed.work], dtype=np.float64),
        "moved_bytes": np.array([work.moved_bytes for work in timed.work], dtype=np.float64),
    }


def _store(
    folder: Path,
    point: Point,
    began: str,
    check: Check,
    arrays: dict[str, np.ndarray],
    per_rank: dict[str, list[float | None]],
    hosts: list[str],
    told: dict[str, Any],
    seen: dict[str, Any],
) -> None:
    """Samples first, the measurement that vouches for them last: a crash in between leaves the point not done."""
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    content = packed.getvalue()
    measurement = {
        "format": FORMAT,
        "point": point.to_json(),
        "began": began,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "check": dict(check.numbers),
        "notes": list(check.notes),
        **told,
        "ranks": len(hosts),
        "hosts": hosts,
        "per_rank": per_rank,
        "samples_sha256": hashlib.sha256(content).hexdigest(),
        "environment": seen,
    }
    write_atomic(folder / "samples.npz", lambda file: file.write(content))
    write_json(folder / "measurement.json", measurement)
    (folder / "failure.json").unlink(missing_ok=True)


def _unmeasured(pack: Pack, device: str) -> list[Point]:
    """The points still to do, as rank 0 sees them: a requeued job skips what it has already measured."""
    todo = [not (pack.points_folder / point.folder / "measurement.json").exists() for point in pack.points]
    if dist.is_initialized():
        agreed = torch.tensor(todo, dtype=torch.uint8, device=device)
        dist.broadcast(agreed, 0)
        todo = [bool(flag) for flag in agreed.tolist()]
    return [point for point, wanted in zip(pack.points, todo, strict=True) if wanted]


@contextlib.contextmanager
def _process_group(place: Place, device: str) -> Iterator[None]:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if place.world == 1:
        yield
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=MEETING)
    yield
    dist.destroy_process_group()


def _be_patient() -> None:
    """The ranks have met in a first collective; from now on one may keep the others waiting for longer."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE)


def _take_the_others_along() -> NoReturn:
    """End this rank so that its launcher ends the others, who may wait for it: they all do that after a signal.

    After an exit status MPICH's mpiexec lets the others run on, unless the rank had called MPI_Init.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody outlives SIGKILL")


def _kind(error: Exception) -> str:
    if isinstance(error, CheckFailedError):
        return "check-failed"
    memory_words = ("can't allocate memory", "Cannot allocate memory", "out of memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in memory_words):
        return "out-of-memory"
    return "disk-full" if isinstance(error, OSError) and error.errno == 28 else "error"


def _append_event(folder: Path, event: str, point: Point) -> None:
    """One line to events.jsonl, for live progress; what is done is said by the measurement files."""
    line = json.dumps({"event": event, "point": point.id, "time": time.time()}) + "\n"
    with contextlib.suppress(OSError), open(folder / "events.jsonl", "a") as file:
        file.write(line)


def _refuse_mixed_ranks(seen: dict[str, Any], device: str) -> None:
    """The ranks of one job must be alike, for one of them is all that is written down."""
    if not dist.is_initialized():
        return
    own = int(digest({key: seen[key] for key in environment.MACHINE_KEYS})[:12], 16)
    highest = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if highest.tolist() != [own, -own]:
        raise SaihError(f"the ranks of this job run on different machines or versions; this one has {seen}")


def _strict_fp32() -> None:
    """fp32 means fp32: no TF32 on GPUs; and cuDNN may try all its kernels before the clock counts."""
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = True


def _limit_memory(pack: Pack) -> None:
    """On a CPU, a point that outgrows its share fails by itself instead of taking the node down."""
    if pack.rank_memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(pack.rank_memory_bytes), resource.RLIM_INFINITY))


def _release_memory(device: str) -> None:
    """Give freed memory back, so that the next point starts from the same floor."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_memory(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _device_peak(device: str) -> float:
    return float(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else float("nan")


def _host_peak() -> float:
    """High-water mark of resident memory since the last reset, in bytes; NaN where the kernel does not tell."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return float("nan")


def _io_counters() -> tuple[float, float]:
    """(bytes fetched from storage, bytes asked of the file system) so far, by this process and those that it started.

    What one of them read counts from its start on, and for as long as it lives.
    """
    counts = [dict(line.split(": ", 1) for line in _lines(f"/proc/{pid}/io")) for pid in _descendants("self")]
    own, *others = counts
    alive = [own, *(fields for fields in others if fields)]
    read, asked = (sum(float(fields.get(name, "nan")) for fields in alive) for name in ("read_bytes", "rchar"))
    return read, asked


def _descendants(pid: str) -> list[str]:
    """This process and all that it started, directly or not."""
    children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in _lines(str(task))]
    return [pid, *(each for line in children for child in line.split() for each in _descendants(child))]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _host_name() -> np.ndarray:
    name = socket.gethostname().encode()[:HOST_BYTES]
    return np.frombuffer(name.ljust(HOST_BYTES, b"\0"), dtype=np.uint8).astype(np.float64)


def _without_nan(columns: dict[str, list[float]]) -> dict[str, list[float | None]]:
    return {name: [value if np.isfinite(value) else None for value in values] for name, values in columns.items()}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception as error:
        print(f"saih worker: {error}" if isinstance(error, SaihError) else traceback.format_exc(), file=sys.stderr)
        found = launchers.find_place()
        if found and found.world > 1:
            _take_the_others_along()
        sys.exit(1)
