"""What the timed steps of a point drew: energy counters read between steps, off the clock, on the node itself.

Read are the energy counter of the rank's own GPU (NVML; where there is none, the power that nvidia-smi samples) and the
RAPL counters of processors and their memory (/sys/class/powercap). What cannot be read is absent, never zero. Standard
library only; pynvml is used where it is installed.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
PERIOD_S = 1.0
"""Counters are read at most so often while steps are timed, and at both ends: often enough to see each wrap-around."""
SMI_PERIOD_S = 0.1
SOURCES = ("nvml", "nvidia_smi", "rapl")
"""Of `Energy` that a rank reads; gathering adds `slurm` and `meter`."""
FEWEST_SAMPLES = 2
"""Of power, within the window; with fewer it would be a guess."""


@dataclass(frozen=True)
class Energy:
    """Energy of one window, as one meter saw it."""

    source: str
    scope: str
    """What is inside: device, package, node, rack."""
    how: str
    joule: float
    window_s: float
    hz: float
    """Readings a second."""


class Meter(Protocol):
    """Follows one thing's energy from `begin` to `end`; `look` is called between steps."""

    def begin(self) -> None: ...

    def look(self) -> None: ...

    def end(self) -> Energy | None:
        """None where nothing came of it."""

    def close(self) -> None: ...


class Counters:
    """Energy counters that only grow, but for starting again at 0 past `span`; all of one scope, added up."""

    def __init__(self, source: str, scope: str, how: str, counters: Sequence[Counter]) -> None:
        self.source, self.scope, self.how, self.counters = source, scope, how, counters

    def begin(self) -> None:
        self.joule, self.readings, self.failed = 0.0, 1, False
        self.first_s = self.last_s = time.monotonic()
        self.last = self._read()

    def look(self) -> None:
        if time.monotonic() - self.last_s >= PERIOD_S:
            self._add()

    def end(self) -> Energy | None:
        self._add()
        window_s = self.last_s - self.first_s
        if self.failed or window_s <= 0:
            return None
        return Energy(self.source, self.scope, self.how, self.joule, window_s, self.readings / window_s)

    def close(self) -> None:
        """Nothing is held."""

    def _add(self) -> None:
        now = self._read()
        for counter, before, after in zip(self.counters, self.last, now, strict=True):
            self.joule += counter.joule_between(before, after)
        self.last, self.last_s = now, time.monotonic()
        self.readings += 1

    def _read(self) -> list[float]:
        try:
            return [counter.read() for counter in self.counters]
        except (OSError, ValueError):  # a counter that stops answering: the time measured is good all the same
            self.failed = True
            return [0.0] * len(self.counters)


@dataclass(frozen=True)
class Counter:
    """`read()` gives units of `joule` each, and starts again at 0 after `span` (None: never); else raises OSError or
    ValueError."""

    read: Callable[[], float]
    joule: float
    span: float | None = None

    def joule_between(self, before: float, after: float) -> float:
        """With one wrap-around at most in between."""
        return self.joule * (after - before + (self.span or 0.0) * (after < before))


class Smi:
    """The power of one GPU, which nvidia-smi writes ten times a second into a file; in a process of its own."""

    def __init__(self, tool: str, gpu: str) -> None:
        words = [tool, f"--id={gpu}", "--query-gpu=timestamp,power.draw", "--format=csv,noheader,nounits"]
        words.append(f"--loop-ms={SMI_PERIOD_S * 1e3:.0f}")
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self.process = subprocess.Popen(words, stdout=self.file, stderr=subprocess.DEVNULL)

    def begin(self) -> None:
        self.first_s = time.time()

    def look(self) -> None:
        """It looks by itself."""

    def end(self) -> Energy | None:
        last_s = time.time()
        self._stop()
        self.file.seek(0)
        lines = self.file.read().decode(errors="replace").splitlines()
        samples = [sample for line in lines if (sample := _smi_sample(line))]
        found = integrate(samples, self.first_s, last_s)
        if found is None:
            return None
        how = "power of the GPU, sampled by nvidia-smi"
        return Energy("nvidia_smi", "device", how, found[0], last_s - self.first_s, found[1])

    def close(self) -> None:
        self._stop()
        self.file.close()

    def _stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def meters(gpu: str | None, first_of_node: bool, powercap: Path = POWERCAP) -> list[Meter]:
    """The meters a rank can read: its own GPU's by its id ("GPU-..."), on one rank of a node the processors'."""
    found: list[Meter | None] = []
    if gpu is not None:
        found.append(nvml(gpu) or nvidia_smi(gpu))
    if first_of_node:
        found.append(rapl(powercap))
    return [meter for meter in found if meter is not None]


def rapl(powercap: Path = POWERCAP) -> Counters | None:
    """Processor packages, and memory where it is metered apart; None where the kernel has no such counters to read.

    `core` and `uncore` are inside their package, `psys` is the platform around it: adding them would count twice.
    """
    names, counters = [], []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's too; intel-rapl-mmio:* are the same once more
        with contextlib.suppress(OSError, ValueError):
            name = (zone / "name").read_text().strip()
            if not name.startswith("package") and name != "dram":
                continue
            energy = zone / "energy_uj"
            span = float((zone / "max_energy_range_uj").read_text())
            counter = Counter(lambda path=energy: float(path.read_text()), 1e-6, span)  # type: ignore[misc]
            counter.read()  # since 2020 for root alone, on most machines
            names.append(name)
            counters.append(counter)
    return Counters("rapl", "package", f"RAPL counters: {', '.join(names)}", counters) if counters else None


def nvml(gpu: str) -> Counters | None:
    """The GPU's own energy counter, in millijoules since its driver was loaded; None without pynvml or a counter."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    pynvml: Any = importlib.import_module("pynvml")

    def read() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from None

    counter = Counter(read, 1e-3)
    try:
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        counter.read()
    except (OSError, pynvml.NVMLError):
        return None
    return Counters("nvml", "device", "energy counter of the GPU (NVML)", [counter])


def nvidia_smi(gpu: str) -> Smi | None:
    """Power samples of the GPU; None where there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    return Smi(tool, gpu) if tool else None


class Metering:
    """All meters of a rank, open while a point warms up and is timed."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self.meters = meters
        self.timed = (float("nan"), float("nan"))
        """Begin and end of the timed steps, in seconds since 1970."""

    def __enter__(self) -> Metering:
        return self

    def __exit__(self, *error: object) -> None:
        for meter in self.meters:
            meter.close()

    def begin(self) -> None:
        """The timed steps begin now."""
        self.timed = (time.time(), float("nan"))
        for meter in self.meters:
            meter.begin()

    def look(self) -> None:
        """Between two timed steps."""
        for meter in self.meters:
            meter.look()

    def end(self) -> list[Energy]:
        """They have ended; what each meter saw."""
        found = [meter.end() for meter in self.meters]
        self.timed = (self.timed[0], time.time())
        return [energy for energy in found if energy is not None]


def as_numbers(found: Sequence[Energy]) -> list[float]:
    """(joule, window_s, hz) of each of SOURCES, NaN where a rank has none: what ranks can exchange."""
    by_source = {energy.source: energy for energy in found}
    absent = [float("nan")] * 3
    known = (by_source.get(source) for source in SOURCES)
    return [x for each in known for x in ([each.joule, each.window_s, each.hz] if each else absent)]


def total(own: Sequence[Energy], ranks: Sequence[Sequence[float]], local_ranks: Sequence[int]) -> dict[str, Any]:
    """Source -> what the whole job drew, from `as_numbers` of all ranks; `own` are those of the first rank.

    Absent where a rank that should have a reading has none: a sum over some of the GPUs or nodes is no sum.
    """
    told = {}
    for energy in own:
        place = 3 * SOURCES.index(energy.source)
        expected = [
            row for row, local in zip(ranks, local_ranks, strict=True) if energy.scope == "device" or local == 0
        ]
        joule, window_s, hz = ([row[place + offset] for row in expected] for offset in range(3))
        if not any(math.isnan(each) for each in joule):
            whole = replace(energy, joule=sum(joule), window_s=max(window_s), hz=min(hz))
            told[energy.source] = {name: value for name, value in asdict(whole).items() if name != "source"}
    return told


def integrate(samples: Sequence[tuple[float, float]], begin_s: float, end_s: float) -> tuple[float, float] | None:
    """(joule, samples a second) of a window from samples (time, watts), by the trapezoidal rule.

    None if they do not cover it: at least FEWEST_SAMPLES within, and no gap of more than three usual periods, neither
    between two of them nor at an end. Before the first and after the last sample power is taken to be theirs.
    """
    ordered = sorted(samples)
    inside = [time_s for time_s, _ in ordered if begin_s <= time_s <= end_s]
    if len(inside) < FEWEST_SAMPLES:
        return None
    period_s = (inside[-1] - inside[0]) / (len(inside) - 1)
    before = [sample for sample in ordered if sample[0] < begin_s]
    after = [sample for sample in ordered if sample[0] > end_s]
    around = [*before[-1:], *(sample for sample in ordered if begin_s <= sample[0] <= end_s), *after[:1]]
    edges = [min(begin_s, around[0][0]), *(time_s for time_s, _ in around), max(end_s, around[-1][0])]
    usual_s = sorted(b - a for a, b in pairwise(inside))[(len(inside) - 1) // 2]
    if period_s <= 0 or max(b - a for a, b in pairwise(edges)) > 3 * usual_s:
        return None
    corners = [begin_s, *inside, end_s]
    watts = [_power_at(time_s, around) for time_s in corners]
    sides = zip(pairwise(corners), pairwise(watts), strict=True)
    joule = sum((t1 - t0) * (w0 + w1) / 2 for (t0, t1), (w0, w1) in sides)
    return joule, 1 / period_s


def _power_at(time_s: float, samples: Sequence[tuple[float, float]]) -> float:
    """Linear between two samples; the nearest one's outside of all."""
    if time_s <= samples[0][0]:
        return samples[0][1]
    for (t0, w0), (t1, w1) in pairwise(samples):
        if time_s <= t1:
            return w0 + (w1 - w0) * (time_s - t0) / (t1 - t0) if t1 > t0 else w1
    return samples[-1][1]


def _smi_sample(line: str) -> tuple[float, float] | None:
    """(seconds since 1970, watts) of a line "2026/11/23 18:34:13.123, 85.12"; None of one that says something else."""
    stamp, _, watts = line.partition(",")
    try:
        return datetime.datetime.strptime(stamp.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(watts)
    except ValueError:
        return None
