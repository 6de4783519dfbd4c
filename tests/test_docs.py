"""What is documented runs: the example workload, the commands of the README, and help for every verb."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saih import cli, site, store, sweep
from tests.cluster.slurm import Cluster

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "workloads/README.md",
        "workloads/llm/README.md",
        "workloads/cosmology/README.md",
        "workloads/llm/energonai/README.md",
        "workloads/llm/generation/README.md",
        "workloads/video/README.md",
        "results/README.md",
        "jobs/README.md",
    )
]


def example(folder: Path) -> list[Path]:
    """The files of the example in workloads/README.md, written below `folder`."""
    text = (ROOT / "workloads" / "README.md").read_text()
    written = []
    for name, code in re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        written.append(path)
    return written


def test_the_documented_example_is_a_workload_that_sweeps(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("saih", "workloads"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert [path.name for path in example(copy / "workloads")] == ["spec.py", "bench.py"]
    words = ["sweep", "triad", "--axis", "data,variant", "--set", "seconds=0", "--repeat", "2", "--no-probe"]
    answer = subprocess.run(
        [sys.executable, "-m", "saih.cli", *words],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    (results,) = (copy / "results").glob("triad-*.h5")
    points = store.load(results)
    assert (points["status"] == "measured").all()
    assert len(points) == 3 * 2 * 2
    judged = subprocess.run(
        [sys.executable, "-m", "saih.cli", "claims", str(results)],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "triad fusing-pays: measured" in judged.stdout


CHEAP = ("list", "claims", "report", "status")
"""Verbs that only read."""


def commands() -> list[str]:
    """Those in blocks of shell, and those after a prompt in blocks that show what comes of them."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            starts = ("$ saih ", "saih ") if language in ("console", "bash", "sh") else ("$ saih ",)
            found += [line.removeprefix("$ ") for line in block.splitlines() if line.startswith(starts)]
    return sorted(set(found))


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


def cheap_commands() -> list[str]:
    """Those documented that only read; `saih status` by its section, which needs no block."""
    return sorted({command for command in commands() if words_of(command)[0] in CHEAP} | {"saih status"})


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_is_one_the_command_line_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed by the real parser; sweeps are also planned by the sweep language, so axes and rungs exist."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "sites").mkdir()
    for name, launcher in {"cluster": "srun", "cluster-mpi": "mpiexec"}.items():  # what make cluster writes
        (tmp_path / "sites" / f"{name}.yaml").write_text(Cluster(tmp_path).site(launcher))
    monkeypatch.chdir(tmp_path)
    options = cli._parser().parse_args(words_of(command))
    if options.verb is cli.sweep:
        _, sweeps = cli._asked(options)
        assert all(sweep.points(asked, {}) for asked in sweeps)


def expanded(word: str, folder: Path) -> list[str]:
    """As a shell in `folder` does it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else []
    return names or [word]


@pytest.mark.parametrize("command", cheap_commands())
def test_documented_commands_that_only_read_really_run(command: str, tmp_path: Path) -> None:
    """Where the files that the pages name are, and what is written goes to a folder of its own."""
    shutil.copytree(ROOT / "results" / "reference", tmp_path / "results" / "reference")
    shutil.copytree(ROOT / "jobs" / "studies", tmp_path / "jobs" / "studies")
    words = [each for word in words_of(command) for each in expanded(word, tmp_path)]
    answer = subprocess.run(
        [sys.executable, "-m", "saih.cli", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.strip()
    assert "BROKEN" not in answer.stdout
    if "--json" in words:
        assert json.loads(answer.stdout)
    if words[0] == "report":
        page = tmp_path / answer.stdout.splitlines()[0]
        assert page.read_text().rstrip().endswith("</html>")


def test_a_command_of_every_verb_that_only_reads_is_run() -> None:
    assert {words_of(command)[0] for command in cheap_commands()} == set(CHEAP)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_only_files_that_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:saih|workloads|tests|jobs|results|reports)/[\w./-]+\.(?:py|yaml|md|j2|h5|html))`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_study_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    studies = sorted((ROOT / "jobs" / "studies").glob("*.yaml"))
    assert studies
    for study in studies:
        _, sweeps = cli._asked(cli._parser().parse_args(["sweep", str(study)]))
        assert all(sweep.points(asked, {}) for asked in sweeps)


def test_documented_sites_are_site_files(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"site{number}.yaml"
        path.write_text(block)
        assert site.load(str(path)).name == f"site{number}"
