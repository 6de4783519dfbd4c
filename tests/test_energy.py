"""Energy: fake counters that wrap, fake tools, files of power meters; what is absent stays absent."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from saih import energy, power, store
from saih.analysis.energy import per_cell
from saih.errors import SaihError
from saih.files import read_json, write_json
from saih.schedulers import slurm
from tests.commands import Commands
from tests.synthetic import SITE, Scenario, make

SPAN = 1000.0


def powercap(folder: Path, **zones: str) -> Path:
    """A powercap tree: zone (0, 0_1, ...) -> name; every counter at 900 of 1000 microjoules."""
    for zone, name in zones.items():
        home = folder / f"intel-rapl:{zone.strip('z').replace('_', ':')}"
        home.mkdir(parents=True)
        (home / "name").write_text(f"{name}\n")
        (home / "max_energy_range_uj").write_text(f"{SPAN:.0f}\n")
        (home / "energy_uj").write_text("900\n")
    return folder


def set_counter(folder: Path, zone: str, value: int) -> None:
    (folder / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{value}\n")


def test_packages_and_memory_are_added_and_parts_of_a_package_are_not(tmp_path: Path) -> None:
    tree = powercap(tmp_path, z0="package-0", z0_0="core", z0_1="dram", z1="package-1", z2="psys")
    (found,) = energy.meters(None, True, tree)
    assert isinstance(found, energy.Counters)
    assert (found.scope, found.how) == ("package", "RAPL counters: package-0, dram, package-1")
    found.begin()
    for zone, value in {"0": 950, "0:0": 999, "0:1": 20, "1": 900, "2": 999}.items():
        set_counter(tree, zone, value)  # the memory's has wrapped around
    told = found.end()
    assert told is not None
    assert told.joule == pytest.approx((50 + 120 + 0) * 1e-6)
    assert told.hz == pytest.approx(2 / told.window_s)


@given(st.lists(st.floats(0, SPAN - 1), min_size=1, max_size=30), st.floats(0, SPAN - 1))
def test_a_counter_that_wraps_counts_all_of_it(steps: list[float], start: float) -> None:
    """Whatever it starts at, as long as it is looked at before it has gone all the way round."""
    counter = energy.Counter(lambda: 0.0, 1.0, SPAN)
    total = np.concatenate([[start], start + np.cumsum(steps)])
    shown = total % SPAN
    seen = sum(counter.joule_between(a, b) for a, b in pairwise(shown))
    assert seen == pytest.approx(sum(steps), abs=1e-6)


def test_looking_between_steps_catches_what_both_ends_would_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(energy.time, "monotonic", lambda: now.s)
    tree = powercap(tmp_path, z0="package-0")
    meter = energy.rapl(tree)
    assert meter is not None
    meter.begin()
    for value in (400, 900, 400, 900):  # half a turn each
        now.s += energy.PERIOD_S
        set_counter(tree, "0", value)
        meter.look()
        meter.look()  # too soon: nothing is read
    told = meter.end()
    assert told is not None
    assert told.joule == pytest.approx(2000e-6)
    assert told.hz == pytest.approx((1 + 4 + 1) / 4.0)


def test_what_cannot_be_read_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert energy.meters(None, True, tmp_path / "none") == []
    tree = powercap(tmp_path / "tree", z0="package-0")
    (tree / "intel-rapl:0" / "energy_uj").write_text("no number\n")  # as unreadable: tests may run as root
    assert energy.rapl(tree) is None
    set_counter(tree, "0", 5)
    meter = energy.rapl(tree)
    assert meter is not None
    meter.begin()
    (tree / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.end() is None
    assert energy.meters(None, False, tree) == [], "one rank of a node reads it, or it would count twice"


class NVMLError(Exception):
    """As pynvml names it."""


def pynvml(millijoules: list[float], missing: str = "") -> ModuleType:
    """A stand-in: its counter shows these values one after the other; `missing` is a function that is not supported."""
    module = ModuleType("pynvml")

    def refuse(*_: object) -> None:
        raise NVMLError("Not Supported")

    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda gpu: gpu,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: millijoules.pop(0),
    }
    for name, function in functions.items():
        setattr(module, name, refuse if name == missing else function)
    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace(name="pynvml")  # type: ignore[assignment]
    return module


def test_a_gpu_has_a_counter_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", pynvml([0.0, 1_000.0, 43_000.0]))
    (meter,) = energy.meters("GPU-1", False)
    meter.begin()
    told = meter.end()
    assert told is not None
    assert (told.source, told.scope, told.joule) == ("nvml", "device", 42.0)


@pytest.mark.parametrize("missing", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_without_a_counter_is_sampled_by_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    commands = Commands(tmp_path / "bin")
    commands.add("nvidia-smi", "2026/01/02 03:04:05.000, 100\n2026/01/02 03:04:05.100, 100\nN/A, [N/A]\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setitem(sys.modules, "pynvml", pynvml([], missing))
    (meter,) = energy.meters("GPU-7", False)
    assert isinstance(meter, energy.Smi)
    meter.process.wait()
    (begin, _), (end, _) = (energy._smi_sample(f"2026/01/02 03:04:05.{ms}, 1") or (0.0, 0.0) for ms in ("000", "100"))
    clock = iter([begin, end])
    with monkeypatch.context() as patch:
        patch.setattr(energy.time, "time", lambda: next(clock))
        meter.begin()
        told = meter.end()
    meter.close()
    assert told is not None
    assert told.joule == pytest.approx(10.0, rel=1e-3)
    assert told.hz == pytest.approx(10.0, rel=1e-3)
    assert "--id=GPU-7" in commands.calls()[0]
    assert "--loop-ms=100" in commands.calls()[0]


def test_a_sum_over_some_of_the_gpus_is_none() -> None:
    own = [energy.Energy("nvml", "device", "a", 5.0, 1.0, 2.0), energy.Energy("rapl", "package", "b", 7.0, 1.0, 2.0)]
    first = energy.as_numbers(own)
    other = energy.as_numbers([energy.Energy("nvml", "device", "a", 6.0, 2.0, 1.0)])
    told = energy.total(own, [first, other], [0, 1])
    assert {source: one["joule"] for source, one in told.items()} == {"nvml": 11.0, "rapl": 7.0}
    assert (told["nvml"]["window_s"], told["nvml"]["hz"]) == (2.0, 1.0)
    assert set(energy.total(own, [first, energy.as_numbers([])], [0, 1])) == {"rapl"}
    assert set(energy.total(own, [first, other], [0, 0])) == {"nvml"}, "the second node has no reading of its own"


@given(st.integers(2, 40), st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.randoms())
def test_power_is_integrated_as_numpy_does_it(count: int, early: float, late: float, random: object) -> None:
    times = np.arange(count + 2, dtype=float)
    watts = np.array([random.uniform(50, 500) for _ in times])  # type: ignore[attr-defined]
    begin, end = 1 - early, count + late
    corners = np.concatenate([[begin], times[1:-1], [end]])
    found = energy.integrate(list(zip(times, watts, strict=True)), begin, end)
    assert found is not None
    assert found[0] == pytest.approx(trapezoid(np.interp(corners, times, watts), corners))
    assert found[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ([], "nothing"),
        ([5.0], "one sample"),
        ([0.0, 1.0, 20.0], "all outside"),
        ([2.0, 3.0, 4.0, 5.0], "ends too early"),
        ([4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], "begins too late"),
        ([2.0, 3.0, 8.0, 9.0, 10.0], "a hole"),
    ],
)
def test_a_window_that_is_not_covered_has_no_energy(times: list[float], why: str) -> None:
    begin = 0.0 if why == "begins too late" else 2.0
    assert energy.integrate([(each, 100.0) for each in times], begin, 10.0) is None, why


METER = "timestamp,watts\n"


def test_a_power_meter_is_read_by_its_column_names(tmp_path: Path) -> None:
    path = tmp_path / "pdu.csv"
    path.write_text("phase, Watts, Timestamp\nA, 5, 2026-01-02T03:04:05Z\nA, 7, 1767323046.5\n\n")
    log = power.read_log(path, "rack")
    assert log.samples == ((1767323045.0, 5.0), (1767323046.5, 7.0))
    found = log.of_window(1767323045.0, 1767323046.5)
    assert found is not None
    assert (found.joule, found.scope, found.source) == (9.0, "rack", "meter")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", ":1: no column timestamp"),
        ("time,watts\n", ":1: no column timestamp"),
        ("timestamp,W\n", ":1: no column watts"),
        (METER + "1,2\n1\n", ":3: '1' is no sample"),
        (METER + "1,2\nyesterday,3\n", ":3: 'yesterday,3' is no sample"),
        (METER + "1,nan\n", ":2: '1,nan' is no sample"),
        (METER + "1,-4\n", ":2: '1,-4' is no sample"),
        (METER + "inf,4\n", ":2: 'inf,4' is no sample"),
    ],
)
def test_a_bad_meter_file_is_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "pdu.csv"
    path.write_text(text)
    with pytest.raises(SaihError) as error:
        power.read_log(path, "node")
    assert str(error.value).startswith(f"{path}{complaint}")
    with pytest.raises(SaihError, match="unknown scope"):
        power.read_log(path, "building")


def test_slurm_tells_the_energy_of_a_step_and_never_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(tmp_path / "bin")
    answer = "1|0|100\n1.batch|5000|100\n1.extern|5000|100\n1.0|9000|90\n2|0|50\n2.batch|0|50\n3||\n"
    commands.add("sacct", answer)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert slurm.energies(["1 saih-a", "2 saih-b", "3 saih-c"]) == {"1 saih-a": (9000.0, 90.0)}
    assert slurm.energies([]) == {}
    assert len(commands.calls()) == 1
    broken = Commands(tmp_path / "other")
    broken.add("sacct", complaint="Slurm accounting storage is disabled", status=1)
    monkeypatch.setenv("PATH", f"{tmp_path / 'other'}:/usr/bin:/bin")
    assert slurm.energies(["1 saih-a"]) == {}


def test_energy_goes_from_the_job_to_joule_a_unit_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two repeats of four cells: what the ranks read, what Slurm counted and a meter's file, side by side."""
    monkeypatch.setattr(slurm, "energies", lambda ids: {ids[0]: (300.0, 60.0)})
    site = SITE.model_copy(update={"scheduler": "slurm"})
    folder = make(tmp_path / "jobs", Scenario(repeat=2, steps=5, units=2.0, site=site))
    homes = sorted(folder.points.iterdir())
    for number, home in enumerate(homes):
        told = read_json(home / "measurement.json")
        told["timed"] = [100.0 + 10 * number, 105.0 + 10 * number]
        rapl = {"scope": "package", "how": "RAPL counters: package-0", "joule": 50.0, "window_s": 5.0, "hz": 0.4}
        told["energy"] = {"rapl": rapl} if number != 3 else {}
        write_json(home / "measurement.json", told)
    metered = [f"{second},{20 if second < 140 else 'x'}" for second in range(100, 140)]
    (tmp_path / "meter.csv").write_text("\n".join(["timestamp,watts", *metered]))
    job = folder.jobs / "0"
    ids = [read_json(home / "measurement.json")["point"] for home in homes[:2]]
    keys = dict.fromkeys(power.PACK_KEYS, None) | {"points": ids, "format": 1}
    write_json(job / "pack.json", keys)
    write_json(job / "submitted.json", {"format": 1, "id": "7 saih-x"})
    results = store.gather(folder, tmp_path, log=power.read_log(tmp_path / "meter.csv", "rack"))
    points, samples = store.load(results), store.load_samples(results)
    assert int(points["energy_rapl_j"].isna().sum()) == 1, "absent is absent, not zero"
    assert points["energy_meter_j"].dropna().tolist() == pytest.approx([100.0] * 4)
    assert points["energy_slurm_j"].dropna().tolist() == pytest.approx([5.0 * 5.0] * 2)
    table = per_cell(points, samples).set_index(["source", "cell"])
    assert list(table.index.get_level_values(0).unique()) == ["meter", "slurm", "rapl"]
    assert table.loc["rapl", "joule_per_work"].tolist() == pytest.approx([50.0 / (5 * 2.0)] * 4)
    assert table.loc["rapl", "mean_power_w"].tolist() == pytest.approx([10.0] * 4)
    assert set(table.loc["meter", "scope"]) == {"rack"}
    assert set(table.loc["slurm", "how"]) == {
        "Slurm's counters: mean power of the whole job (60 s), of which this is one of 2 points"
    }
    assert sorted(table.loc["rapl", "repeats"]) == [1, 2, 2, 2]


def test_nothing_metered_is_an_empty_table(tmp_path: Path) -> None:
    results = store.gather(make(tmp_path / "jobs", Scenario()), tmp_path)
    points = store.load(results)
    assert not [name for name in points if name.startswith("energy_")]
    assert per_cell(points, store.load_samples(results)).empty
    assert json.loads(per_cell(points, store.load_samples(results)).to_json(orient="records")) == []
