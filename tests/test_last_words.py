"""A rank that is told to end: it may still speak, it does end, and what it forks ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SPEAKS = """
    Path("said").write_text("rank 1 was lost")
"""
BLOCKED = """
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""
FORKS = """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        time.sleep(60)
    os.read(reading, 1)
    os.kill(child, signal.SIGTERM)
    Path("said").write_text(str(os.WTERMSIG(os.waitpid(child, 0)[1])))
"""


@pytest.mark.parametrize(
    ("last", "grace_s", "said", "status"),
    [
        pytest.param(SPEAKS, 600, "rank 1 was lost", 0, id="speaks"),
        pytest.param(BLOCKED, 0.1, None, -signal.SIGKILL, id="blocked"),
        pytest.param(FORKS, 0.1, str(int(signal.SIGTERM)), 0, id="forks"),
    ],
)
def test_a_rank_told_to_end_has_a_moment(
    tmp_path: Path, last: str, grace_s: float, said: str | None, status: int
) -> None:
    told = "" if last is FORKS else "os.kill(os.getpid(), signal.SIGTERM)"
    code = f"""
    import ctypes, os, signal, time
    from pathlib import Path
    from saih import last_words
    last_words.allow({grace_s})
    {told}
    {last.strip()}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == status
    assert (tmp_path / "said").read_text() == said if said else not (tmp_path / "said").exists()
