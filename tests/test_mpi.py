"""MPI: ranks that MPI and the launcher agree on, data sets made in parallel, the all-reduce ladder, every launcher."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from saih import launchers, store
from saih.core import COMMON, Job, Place, Point
from workloads.cosmology.recipe import Recipe
from workloads.cosmology.storages import DEFAULT_STORAGE

ROOT = Path(__file__).parent.parent
TOYS = ROOT / "tests" / "toys"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SHARD_OF_ONE = """
import sys
from workloads.cosmology import generate, storages

storages.SHARD_BYTES = 1
sys.exit(generate.main(sys.argv[1:]))
"""
GENERATE = [sys.executable, "-c", SHARD_OF_ONE]


def mpiexec(of_open_mpi: bool = False) -> str:
    program = launchers._mpiexec(of_open_mpi)
    if not Path(program).is_absolute():
        name = "Open MPI" if of_open_mpi else "MPICH"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI must not skip this test")
        pytest.skip(f"{name} is not installed")
    return program


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PMI"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | AS_ROOT | variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_two_ranks_make_the_bytes_that_one_makes(tmp_path: Path) -> None:
    recipe = ["--mesh", "16", "--samples", "5", "--seed", "3"]
    both = run([mpiexec(), "-n", "2", *GENERATE, "both", *recipe], tmp_path)
    alone = run([*GENERATE, "alone", *recipe], tmp_path)
    assert (both.returncode, alone.returncode) == (0, 0), both.stderr + alone.stderr
    assert "5 made by 2 ranks" in both.stdout
    assert "5 made by 1 rank" in alone.stdout
    assert digests(tmp_path / "both") == digests(tmp_path / "alone")
    assert len(digests(tmp_path / "both")) == 5 * 2  # shards and their manifests


def test_each_rank_makes_its_own_universes_once(tmp_path: Path) -> None:
    command = [mpiexec(), "-n", "2", *GENERATE, "data", "--mesh", "8", "--samples", "4"]
    run(command, tmp_path)
    first = tmp_path / "data" / Recipe(8, 4, 0, 4).folder_name(DEFAULT_STORAGE) / "shard-000001.json"
    first.unlink()
    assert "1 made by 2 ranks" in run(command, tmp_path).stdout


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    done = run([mpiexec(), "-n", "2", *GENERATE, "data", "--mesh", "8"], tmp_path)
    assert done.returncode == 2
    assert "generate: [Errno 20] Not a directory: 'data/" in done.stderr


FAILS_ON_RANK_1 = """
import sys
from workloads.cosmology import generate

honest = generate.generate

def broken(folder, recipe, rank, ranks):
    if rank == 1:
        raise MemoryError("no room for this universe")
    return honest(folder, recipe, rank, ranks)

generate.generate = broken
sys.exit(generate.main(["data", "--mesh", "8", "--samples", "2"]))
"""


def test_whatever_fails_on_one_rank_takes_the_others_along(tmp_path: Path) -> None:
    """Without an end to them, they wait for it until `run` loses its patience."""
    done = run([mpiexec(), "-n", "2", sys.executable, "-c", FAILS_ON_RANK_1], tmp_path)
    assert done.returncode == 2
    assert "MemoryError: no room for this universe" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_singletons_under_a_launcher_are_refused(rank: str, tmp_path: Path) -> None:
    """Slurm says rank ... of 2; MPI, started without PMI, believes to be alone."""
    told = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    done = run([*GENERATE, "data"], tmp_path, **told)
    assert done.returncode != 0
    assert f"MPI calls rank {rank} of 2 rank 0 of 1" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_batch_script_is_no_rank(tmp_path: Path) -> None:
    """There, Slurm has a rank and the ranks of the job, but none of a step."""
    told = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    done = run([*GENERATE, "data", "--mesh", "8", "--samples", "1"], tmp_path, **told)
    assert done.returncode == 0, done.stderr
    assert "1 made by 1 rank" in done.stdout


@pytest.mark.parametrize(
    ("told", "place"),
    [
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, Place(3, 1, 4)),
        ({"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}, Place(3, 1, 4)),
        ({"PMI_RANK": "5", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PMI_SIZE": "8"}, Place(5, 1, 8)),  # PALS
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, None),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}, Place(3, 1, 4)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, None),
        ({}, None),
    ],
)
def test_each_launcher_tells_the_ranks_where_they_stand(told: dict[str, str], place: Place | None) -> None:
    assert launchers.find_place(told) == place


QUICK = "--set=gpus=2,seconds=0,steps=2,warmup=1"


def sweep(folder: Path, launcher: str, *words: str, workload: str = "ceilings") -> pd.DataFrame:
    lines = ["scheduler: local", f"launcher: {launcher}", "device: cpu", "gpus_per_node: 2"]
    lines += ["environment:", *(f'  {key}: "{value}"' for key, value in AS_ROOT.items())]
    (folder / "sites").mkdir(exist_ok=True)
    (folder / "sites" / "two.yaml").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "saih.cli", "sweep", workload, "--site=two", "--no-probe", "--repeat=1", *words]
    done = run(command, folder, PYTHONPATH=f"{TOYS}:{ROOT}")
    assert done.returncode in (0, 1), done.stderr
    (results,) = (folder / "results").glob("*.h5")
    return store.load(results)


def test_the_ladder_is_measured_over_torch_and_over_mpi(tmp_path: Path) -> None:
    mpiexec()
    points = sweep(tmp_path, "mpiexec", "--axis=transport=torch,mpi", "--axis=message=8,1Mi", QUICK)
    assert list(points["status"]) == ["measured"] * 4
    assert set(points["ranks"]) == {2}
    assert set(points["check_relative_error"]) == {0.0}


def test_mpi_under_a_launcher_it_does_not_know_is_refused(tmp_path: Path) -> None:
    points = sweep(tmp_path, "torchrun", "--axis=transport=mpi", "--axis=message=8", QUICK)
    assert list(points["status"]) == ["failed"]
    assert re.search(r"MPI calls rank . of 2 rank 0 of 1", points["reason"][0])


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec", "openmpi"])
def test_every_launcher_on_one_machine_gives_the_same_measurements(launcher: str, tmp_path: Path) -> None:
    if launcher != "torchrun":
        mpiexec(of_open_mpi=launcher == "openmpi")
    points = sweep(tmp_path, launcher, "--axis=transport=torch", "--axis=message=8,1Ki", QUICK)
    assert list(points["label_message"]) == ["8", "1Ki"]
    assert set(points["status"]) == {"measured"}
    assert set(points["ranks"]) == {2}


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec", "openmpi", "horovodrun"])
def test_one_rank_that_fails_ends_the_others_where_they_are(
    launcher: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The other one is in a step of ten minutes, where no network tells it that its peer is gone."""
    if launcher in ("mpiexec", "openmpi"):
        mpiexec(of_open_mpi=launcher == "openmpi")
    elif launcher == "horovodrun":
        request.getfixturevalue("horovod")
    words = ["--axis=fault=error-on-last-rank", "--set=gpus=2,seconds=0,steps=1,warmup=0,step_ms=600000"]
    points = sweep(tmp_path, launcher, *words, workload="faulty")
    assert list(points["status"]) == ["failed"]
    assert list(points["kind"]) == ["error"]
    assert list(points["reason"]) == ["ValueError: this point is <b>broken</b>"]


@pytest.mark.parametrize(
    ("answer", "is_open_mpi"),
    [
        ("mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n", True),
        ("mpirun (Open MPI) 5.0.11\n", True),
        ("HYDRA build details:\n    Version: 5.0.2\n", False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9\n", False),
    ],
)
def test_an_mpiexec_says_what_it_is(answer: str, is_open_mpi: bool, tmp_path: Path) -> None:
    program = tmp_path / "mpiexec"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}END\n")
    program.chmod(0o755)
    assert launchers._is_open_mpi(str(program)) is is_open_mpi


def test_an_mpiexec_that_does_not_answer_is_none_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mpiexec"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(launchers, "ASK_S", 0.1)
    assert launchers._is_open_mpi(str(program)) is None
    program.write_text("#!/there/is/no/such/shell\n")
    assert launchers._is_open_mpi(str(program)) is None


def job(nodes: int) -> Job:
    params = {each.name: each.default for each in COMMON} | {"nodes": nodes, "gpus": 2}
    return Job("000", "000", (Point("toy", params),), nodes, 2, 60.0)


@pytest.mark.parametrize("launcher", ["mpiexec", "openmpi"])
def test_a_site_says_which_mpiexec_the_nodes_have(launcher: str) -> None:
    words = launchers.command(launcher, job(1), "", ["python"], ["worker.py"], mpiexec="/opt/cray/mpiexec")
    assert words[0] == "/opt/cray/mpiexec"
    assert words[1:] == launchers.command(launcher, job(1), "", ["python"], ["worker.py"])[1:]
    agents = launchers.command("torchrun", job(2), "", ["python"], ["worker.py"], launcher, "mpiexec")
    assert agents[:3] == ["mpiexec", "-n", "2"]
    assert launchers.command("srun", job(1), "", ["python"], ["worker.py"], mpiexec="mpiexec")[0] == "srun"


def test_horovodrun_is_that_of_the_ranks_python() -> None:
    words = launchers.command("horovodrun", job(1), "", ["apptainer", "exec", "x.sif", "/there/python"], ["worker.py"])
    assert words[:6] == ["apptainer", "exec", "x.sif", "/there/python", "-m", "horovod.runner.launch"]
    assert words[-2:] == ["/there/python", "worker.py"]
