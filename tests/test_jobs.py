"""Whatever happens to a sweep, finished measurements stay and the same command runs the rest: on real processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from saih import store
from saih.files import read_json, write_json

TOYS = Path(__file__).parent / "toys"
SITE = "scheduler: local\ndevice: cpu\ngpus_per_node: 2\nthreads_per_rank: 1\nnode_memory_gib: 8\n"
QUICK = "--set=seconds=0,steps=3,warmup=1"


class Workplace:
    """A folder with a site of its own, and `saih` run in it as people run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sites").mkdir(parents=True)
        (folder / "sites" / "small.yaml").write_text(SITE)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return subprocess.Popen(
            [sys.executable, "-m", "saih.cli", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": paths} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored in the background
        )

    def saih(self, *words: str, status: int = 0, **environment: str) -> str:
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status, output
        return output

    def sweep(self, *words: str, status: int = 0, **environment: str) -> str:
        return self.saih("sweep", "faulty", "--site=small", "--no-probe", *words, status=status, **environment)

    @property
    def measured(self) -> dict[str, float]:
        """Folder name of each finished point -> when its measurement was written."""
        return {
            path.parent.name: path.stat().st_mtime_ns for path in self.folder.glob("jobs/*/points/*/measurement.json")
        }

    def wait_for_measured(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.measured) < count:
            assert time.monotonic() < deadline, "the sweep does not get on"
            time.sleep(0.02)

    @property
    def table(self) -> pd.DataFrame:
        (path,) = self.folder.glob("results/faulty-*.h5")
        return store.load(path)

    @property
    def jobs_started(self) -> int:
        return len(list(self.folder.glob("jobs/*/jobs/*/submitted.json")))


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "a 'strange' $folder\nname")


def test_refining_starts_coarse_and_says_what_it_left_out(workplace: Workplace) -> None:
    refused = workplace.sweep("--axis=size", "--refine=60s", "--time-budget=9s", status=2)
    assert "--refine TIME is a time budget" in refused
    output = workplace.sweep("--axis=size", "--repeat=2", QUICK, "--refine=20s")
    assert "refine: " in output
    assert "of 20 s, 5 cells, 10 points" in output, "1, 3, 5, 7 and the other end first"
    table = workplace.table
    assert {"1", "3", "5", "7", "8"} <= set(table.loc[table["status"] == "measured", "label_size"])
    left = table[table["status"] == "pruned"]
    assert set(left["kind"]) <= {"refine"}
    assert set(table["label_size"]) == {str(n) for n in range(1, 9)}, "nothing that was asked for is missing"


def test_every_kind_of_failure_is_recorded_and_only_the_failed_points_run_again(workplace: Workplace) -> None:
    faults = "none,error,out-of-memory,check-failed,killed,exit"
    sweep = (f"--axis=fault={faults}", "--axis=size=1,2", "--repeat=1", QUICK)
    output = workplace.sweep(*sweep, status=1)
    assert "2 measured, 10 failed" in output
    table = workplace.table.set_index("label_fault")
    kinds = table.groupby(level=0)["kind"].agg(set).to_dict()
    assert kinds == {
        "none": {""},
        "error": {"error"},
        "out-of-memory": {"out-of-memory"},
        "check-failed": {"check-failed"},
        "killed": {"died"},
        "exit": {"died"},
    }
    reasons = table["reason"].to_dict()
    assert "ValueError: this point is <b>broken</b>" in reasons["error"]
    assert "signal 9" in reasons["killed"]
    assert "41 is not 42" in reasons["check-failed"]
    assert "can't allocate memory" in table["log_tail"].to_dict()["out-of-memory"]
    samples = store.load_samples(next(workplace.folder.glob("results/*.h5")))
    assert set(samples["point"]) == {row for row, status in enumerate(table["status"]) if status == "measured"}

    before = workplace.measured
    assert "12 measured" in workplace.sweep(*sweep, FAULTY_HEALED="1")
    after = workplace.measured
    assert len(after) == 12
    assert {name: after[name] for name in before} == before
    assert (workplace.table["status"] == "measured").all()


def test_one_rank_that_fails_ends_its_point_and_no_other(workplace: Workplace) -> None:
    output = workplace.sweep(
        "--axis=fault=none,error-on-last-rank", "--axis=gpus=2", "--axis=size=1,2", QUICK, status=1
    )
    assert "2 measured, 2 failed" in output
    table = workplace.table
    failed = table[table["status"] == "failed"]
    assert set(failed["label_fault"]) == {"error-on-last-rank"}
    assert set(failed["reason"]) == {"ValueError: this point is <b>broken</b>"}  # not that the other rank lost its peer
    assert set(table.loc[table["status"] == "measured", "ranks"]) == {2}
    samples = store.load_samples(next(workplace.folder.glob("results/*.h5")))
    assert set(samples["rank"]) == {0, 1}


def test_a_saih_killed_in_the_middle_loses_nothing_and_runs_nothing_twice(workplace: Workplace) -> None:
    sweep = ("--axis=size", "--set=step_ms=60", "--repeat=2", QUICK)
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", *sweep)
    workplace.wait_for_measured(3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = workplace.measured
    assert "16 measured" in workplace.sweep(*sweep)
    after = workplace.measured
    assert {name: after[name] for name in before} == before
    assert workplace.jobs_started == 1  # the job outlived saih and was waited for

    undisturbed = Workplace(workplace.folder / "undisturbed")
    undisturbed.sweep(*sweep)
    assert set(undisturbed.table["id"]) == set(workplace.table["id"])


def test_everything_killed_at_once_goes_on_where_it_stopped(workplace: Workplace) -> None:
    sweep = ("--axis=size", "--set=step_ms=300", "--repeat=1", QUICK)
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", *sweep)
    workplace.wait_for_measured(2)
    (agent,) = (int(path.read_text()) for path in workplace.folder.glob("jobs/*/jobs/*/pid"))
    os.kill(first.pid, signal.SIGKILL)
    os.killpg(agent, signal.SIGKILL)  # the launcher; the kernel then kills its ranks
    first.wait()
    before = workplace.measured
    assert len(before) < 8
    assert "8 measured" in workplace.sweep(*sweep)
    after = workplace.measured
    assert {name: after[name] for name in before} == before
    assert workplace.jobs_started == 2


def test_ctrl_c_stops_the_job_and_the_same_command_goes_on(workplace: Workplace) -> None:
    sweep = ("--axis=size", "--set=step_ms=300", "--repeat=1", QUICK)
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", *sweep)
    workplace.wait_for_measured(2)
    os.kill(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the same command goes on" in output
    stopped = len(workplace.measured)
    time.sleep(1)
    assert len(workplace.measured) == stopped
    assert "8 measured" in workplace.sweep(*sweep)


def test_a_second_saih_on_the_same_sweep_is_refused(workplace: Workplace) -> None:
    sweep = ("--axis=size", "--set=step_ms=300", "--repeat=1", QUICK)
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", *sweep)
    workplace.wait_for_measured(1)
    output = workplace.sweep(*sweep, status=2)
    assert "another saih is running" in output
    assert output.count("\n") <= 2
    assert "running" in workplace.saih("status")
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_fresh_sets_earlier_measurements_aside(workplace: Workplace) -> None:
    sweep = ("--axis=size=1,2", "--repeat=1", QUICK)
    workplace.sweep(*sweep)
    before = workplace.measured
    workplace.sweep(*sweep, "--fresh")
    after = workplace.measured
    assert set(before) == set(after)
    assert all(after[name] > before[name] for name in before)
    assert len(list(workplace.folder.glob("jobs/*/points-*/*/measurement.json"))) == 2


def test_starting_over_stops_the_job_of_a_saih_that_was_killed(workplace: Workplace) -> None:
    sweep = ("--axis=size=1,2,3", "--set=step_ms=900", "--repeat=1", QUICK)
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", *sweep)
    workplace.wait_for_measured(1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    began_ns = time.time_ns()
    assert "3 measured" in workplace.sweep(*sweep, "--fresh")
    assert all(written > began_ns for written in workplace.measured.values())
    assert workplace.jobs_started == 2
    assert len(list(workplace.folder.glob("jobs/*/points-*/*/measurement.json"))) < 3


def test_asking_for_less_loses_nothing_that_is_measured(workplace: Workplace) -> None:
    sweep = ("--axis=size=1,2", QUICK)
    workplace.sweep(*sweep, "--repeat=2")
    before = workplace.measured
    assert "4 measured" in workplace.sweep(*sweep, "--repeat=1", "--time-budget=0")
    assert workplace.measured == before
    assert (workplace.table["status"] == "measured").all()
    assert "6 measured" in workplace.sweep(*sweep, "--repeat=3")


def test_other_code_is_refused_before_anything_runs(workplace: Workplace) -> None:
    sweep = ("--axis=size=1,2", "--repeat=1", QUICK)
    workplace.sweep(*sweep)
    victim, other = workplace.folder.glob("jobs/*/points/*/measurement.json")
    told = read_json(victim)
    write_json(victim, told | {"environment": told["environment"] | {"source": "0123456789abcdef"}})
    other.unlink()
    output = workplace.sweep(*sweep, status=2)
    assert "the code that measures has changed since (0123456789abcdef to " in output
    assert len(workplace.measured) == 1
    assert "2 measured" in workplace.sweep(*sweep, "--mixed")


def test_two_sweeps_take_turns_on_one_machine(workplace: Workplace) -> None:
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", "--axis=size", "--set=step_ms=60", QUICK)
    workplace.wait_for_measured(1)
    second = workplace.start("sweep", "faulty", "--site=small", "--no-probe", "--axis=amount=91,92", QUICK)
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    began, ended = ({}, {})
    for path in workplace.folder.glob("jobs/*/jobs/*/events.jsonl"):
        times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
        began[path.parts[-4]], ended[path.parts[-4]] = min(times), max(times)
    (sizes,), (amounts,) = ([name for name in began if f"-{axis}-" in name] for axis in ("size", "amount"))
    assert began[amounts] > ended[sizes]
    (log,) = workplace.folder.glob(f"jobs/{amounts}/jobs/*/log.txt")
    assert "waiting for another saih job on this machine" in log.read_text()


def test_a_job_past_its_limit_is_ended_and_says_so(workplace: Workplace) -> None:
    site = workplace.folder / "sites" / "small.yaml"
    site.write_text(site.read_text() + "job_minutes: 0.2\n")
    output = workplace.sweep("--axis=fault=slow", "--repeat=1", "--set=seconds=0,steps=1,warmup=0", status=1)
    assert "1 failed" in output
    assert workplace.table["kind"].tolist() == ["timeout"]
    assert "past the site's longest job" in workplace.table["reason"][0]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("needs root to mount a small file system")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this kernel lets nobody mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


def test_a_full_disk_costs_the_points_that_did_not_fit_and_no_other(tiny_disk: Path) -> None:
    workplace = Workplace(tiny_disk / "here")
    sweep = ("--axis=size", "--set=step_ms=60", "--repeat=1", QUICK)
    first = workplace.start("sweep", "faulty", "--site=small", "--no-probe", *sweep)
    workplace.wait_for_measured(2)
    ballast = tiny_disk / "ballast"
    fill(ballast)
    output, _ = first.communicate(timeout=60)
    assert first.returncode in (1, 2), output
    assert "Traceback" not in output
    before = workplace.measured
    assert 2 <= len(before) < 8
    ballast.unlink()
    assert "8 measured" in workplace.sweep(*sweep)
    after = workplace.measured
    assert {name: after[name] for name in before} == before


def test_a_job_given_fewer_ranks_than_it_asked_for_refuses_to_measure(workplace: Workplace) -> None:
    workplace.saih("sweep", "faulty", "--site=small", "--axis=gpus=2", QUICK, "--dry-run")
    (pack,) = workplace.folder.glob("jobs/*/dry-run/*/pack.json")
    assert read_json(pack)["ranks"] == 2
    answer = subprocess.run(
        [sys.executable, "-m", "saih.worker", str(pack)],
        env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(TOYS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert "rank 0 of 1, but the job was given 2 ranks" in answer.stderr
    assert not workplace.measured
