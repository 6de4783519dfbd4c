"""What runs beside timed steps: it is at work while they are timed, and ends with them or with the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saih import load


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "FILE_BYTES", 4 * load.READ_BYTES)


def children() -> list[int]:
    """Processes that this one started and that live."""
    return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def cpu_ticks(process: int) -> int:
    words = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return int(words[11]) + int(words[12])


def bytes_read(process: int) -> int:
    lines = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
    return int(lines["rchar"])


def grows(count: object, process: int) -> bool:
    before, deadline = count(process), time.monotonic() + 20  # type: ignore[operator]
    while time.monotonic() < deadline:
        if count(process) > before:  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_a_load_works_inside_its_block_and_is_gone_after_it(tmp_path: Path) -> None:
    known = children()
    with load.background(1, 1, tmp_path):
        reader, hog = [process for process in children() if process not in known]
        assert grows(bytes_read, reader)
        assert grows(cpu_ticks, hog)
    assert children() == known
    assert [file.name for file in tmp_path.iterdir()] == ["0.bin"]


def test_a_load_is_gone_after_an_error_too(tmp_path: Path) -> None:
    known = children()
    with pytest.raises(ZeroDivisionError), load.background(0, 1, tmp_path):
        _ = 1 / 0
    assert children() == known


def test_steps_whose_load_ended_early_are_not_believed(tmp_path: Path) -> None:
    known = children()

    def kill_the_hog() -> None:
        [hog] = [process for process in children() if process not in known]
        os.kill(hog, signal.SIGKILL)
        while Path(f"/proc/{hog}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.01)

    with pytest.raises(OSError, match="ended before"), load.background(0, 1, tmp_path):
        kill_the_hog()


def test_a_killed_worker_leaves_no_load_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom saih import load\n"
        "with load.background(0, 1, Path(sys.argv[1])):\n    print('loaded', flush=True)\n    time.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"loaded\n"
    [hog] = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    worker.kill()
    worker.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{hog}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
