"""`saih generate`: a data set alone, goes on after a kill, refused where it does not fit, shared by ranks and jobs."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from saih import cli, dataset, site, workload
from saih import plan as planning
from saih.core import Context, Place, Point
from saih.errors import SaihError
from saih.site import Site
from saih.timing import Unclocked
from workloads.cosmology import storages
from workloads.cosmology.dataset import Dataset, generate
from workloads.cosmology.mesh import Mesh
from workloads.cosmology.recipe import Recipe
from workloads.cosmology.storages import DEFAULT_STORAGE
from workloads.cosmology.universes import bench, spec

ROOT = Path(__file__).parent.parent
WORDS = ["generate", "--set", "mesh=128,channels=2,samples=10", "--seed", "3"]
RECIPE = Recipe(mesh=128, channels=2, seed=3, samples=10)
"""Three shards."""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "sites").mkdir(exist_ok=True)
    lines = "scheduler: local\nlauncher: torchrun\ndevice: cpu\ngpus_per_node: 2\nthreads_per_rank: 1\n"
    (folder / "sites" / "two.yaml").write_text(lines)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "saih.cli", *words, "--site", "two"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def files(root: Path) -> dict[str, str]:
    """Name and content of all files of the data set that are whole."""
    paths = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes, of one thread as the ranks are."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generate(folder, RECIPE)
    finally:
        torch.set_num_threads(threads)
    return files(folder)


def test_a_data_set_is_made_by_two_ranks_and_goes_on_after_a_kill(tmp_path: Path, expected: dict[str, str]) -> None:
    """saih and its ranks are killed as soon as a shard is there; the same command makes the rest and no more."""
    victim = start(tmp_path, *WORDS)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "data").rglob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    for job in tmp_path.glob("jobs/*/jobs/*"):
        for process in Path("/proc").glob("[0-9]*"):
            words = process.joinpath("cmdline").read_bytes() if process.joinpath("cmdline").exists() else b""
            if str(job / "pack.json").encode() in words:
                os.kill(int(process.name), signal.SIGKILL)
    # The manifest is written last: data without one is of a shard that was being made, and is made again.
    manifests = list((tmp_path / "data").rglob("shard-*.json"))
    early = {path: path.stat().st_mtime_ns for one in manifests for path in one.parent.glob(f"{one.stem}*")}
    assert early
    again = start(tmp_path, *WORDS)
    told, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    assert "1 piece x 2 ranks on two" in told
    assert files(tmp_path / "data") == expected
    assert all(path.stat().st_mtime_ns == made for path, made in early.items())


def volumes(root: Path, recipe: Recipe, storage: str) -> torch.Tensor:
    data, held = Dataset(root, recipe, storage), torch.empty((recipe.samples, *recipe.shape), dtype=torch.int16)
    for index in range(recipe.samples):
        data.read_into(index, held[index].numpy())
    return held


def test_ranks_that_share_universes_make_those_of_one_rank(tmp_path: Path) -> None:
    recipe = Recipe(mesh=32, channels=2, seed=3, samples=3)
    words = ["generate", "--set", "mesh=32,channels=2,samples=3,spread=slabs,storage=npy", "--seed", "3"]
    running = start(tmp_path, *words)
    told, errors = running.communicate(timeout=200)
    assert running.returncode == 0, told + errors
    generate(tmp_path / "alone", recipe, storage="npy")
    whole, slabs = volumes(tmp_path / "alone", recipe, "npy"), volumes(tmp_path / "data", recipe, "npy")
    assert (whole.int() - slabs.int()).abs().max() <= 1, "but for roundings to the next whole particle"
    assert (whole != slabs).float().mean() < 1e-3


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 50e6)
    assert cli.main(WORDS) == 2
    told = capsys.readouterr()
    assert "0.0839 GB of 0.0839 GB are still to be made, and 0.05 GB are free in" in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def two_ranks(**changes: object) -> Site:
    known = {"name": "toy", "device": "cpu", "gpus_per_node": 2, "threads_per_rank": 1}
    return Site.model_validate(known | {"node_memory_gib": 64, "device_memory_gib": 32} | changes)


@pytest.mark.parametrize("storage", ["hdf5", "hdf5-gzip", "npy"])
def test_what_is_there_needs_no_room(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 60e3)
    monkeypatch.setattr(storages, "SHARD_BYTES", 3 * 16384)
    asked, here = (
        {"mesh": "16", "channels": "2", "samples": "6", "storage": storage},
        two_ranks(data_folder=str(tmp_path)),
    )
    with pytest.raises(SaihError, match="still to be made"):
        dataset.plan("universes", asked, 3, here)
    generate(tmp_path, Recipe(mesh=16, channels=2, seed=3, samples=4), storage=storage)
    data, plan = dataset.plan("universes", asked, 3, here)
    assert data.path == tmp_path / Recipe(16, 2, 3, 6).folder_name(storage)
    assert data.there_bytes() == data.whole_bytes / 2  # the second shard is to be larger
    assert [item.point.ranks for item in plan.kept] == [2]
    generate(tmp_path, Recipe(mesh=16, channels=2, seed=3, samples=6), storage=storage)
    assert data.there_bytes() == data.whole_bytes
    assert dataset.plan("universes", asked | {"samples": "5"}, 3, here)[0].there_bytes() == 5 * 16384


def test_a_long_making_is_shared_by_jobs_that_are_short_enough(tmp_path: Path) -> None:
    """Each piece is a job of its own, and together they are the data set."""
    here = two_ranks(data_folder=str(tmp_path), job_minutes=2.0)
    _, plan = dataset.plan("universes", {"mesh": "64", "samples": "4000"}, 0, here)
    assert len(plan.kept) > 1
    assert all(item.point_s <= 60 for item in plan.kept)
    assert len(planning.pack(plan.kept, here, tmp_path)) == len(plan.kept)
    assert sum(item.cost.disk_bytes for item in plan.kept) == 4000 * 64**3 * 8


def test_realisations_grow_to_more_than_a_disk_holds_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 12 universes to 786432 of 64^3 voxels, int16 at 4 redshifts: 25 MB to 1.65 TB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 300e6)
    assert cli.main(["sweep", "universes", "--axis", "realisations", "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for rung, size in ((192, "0.403"), (786432, "1.65e+03")):
        assert f"pruned realisations={rung} disk: needs {size} GB of data" in told, told
    assert "pruned realisations=48" not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "ceilings"], "ceilings makes no data set by itself; those that do: universes"),
        (["generate", "--set", "mesh=4096,storage=npy"], "memory: needs"),
        (["generate", "--set", "mesj=64"], "did you mean mesh"),
        (["generate", "--set", "spread=slabs,mesh=65,gpus=2"], "cannot be shared evenly by 2 ranks"),
        (["generate", "--set", "precision=fp64"], "made in fp32"),
        (["generate", "--set", "mesh=1024"], "a universe of 8.59 GB is larger than an HDF5 chunk"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 1e15)
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("samples", "pieces", "piece", "gpus"), [(5, 1, 0, 2), (9, 2, 1, 2), (4, 1, 0, 3)])
def test_the_plan_counts_the_universes_of_the_busiest_rank(
    samples: int, pieces: int, piece: int, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two universes a shard; ranks take shards, so some have more to do."""
    monkeypatch.setattr(storages, "SHARD_BYTES", 2 * 8**3 * 2)
    asked = {"samples": samples, "pieces": pieces, "piece": piece, "gpus": gpus}
    params = point(mesh=8, channels=1, **spec.GENERATE, **asked).params
    recipe = spec.recipe(params, 0)
    empty = torch.zeros(recipe.shape, dtype=torch.int16)
    made = [generate(tmp_path, recipe, *share, make=lambda *which: empty) for share in spec.shares(params)]
    assert spec.cost(params).work == max(made) * recipe.sample_bytes
    assert spec.cost(params).disk_bytes == sum(made) * recipe.sample_bytes


def test_the_plan_knows_the_folder_that_is_filled() -> None:
    params = {each.name: each.default for each in spec.PARAMETERS}
    assert spec.data_folder(params, 5) == Recipe(mesh=64, channels=4, seed=5, samples=1).folder_name(DEFAULT_STORAGE)
    changed = params | {"fidelity": "pm", "particles": 8, "box_mpc_h": 100.0, "storage": "npy"}
    recipe = Recipe(mesh=64, channels=4, seed=5, samples=1, box_mpc_h=100.0, fidelity="pm", refine=2)
    assert spec.data_folder(changed, 5) == recipe.folder_name("npy")


def point(**changes: object) -> Point:
    known = {name: each.default for name, each in workload.parameters(workload.spec("universes")).items()}
    return Point("universes", known | {"mesh": 16} | changes)


def context(folder: Path) -> Context:
    return Context(Place(0, 0, 1), "cpu", str(folder))


@pytest.mark.parametrize("part", ["all", "noise", "transforms", "displacements", "painting"])
def test_every_part_runs_and_a_universe_passes_its_check(part: str, tmp_path: Path) -> None:
    made = bench.setup(point(part=part), context(tmp_path))
    check = made.check()
    assert check.passed, check.why
    assert check.numbers["linear_correlation"] > 0.97
    assert made.step(Unclocked()).units > 0


@pytest.mark.parametrize("changes", [{"fidelity": "pm"}, {"particles": 8}, {"precision": "fp64"}, {"channels": 1}])
def test_every_way_of_making_passes_its_check(changes: dict[str, object], tmp_path: Path) -> None:
    check = bench.setup(point(**changes), context(tmp_path)).check()
    assert check.passed, check.why


def test_a_universe_of_another_cosmology_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench.setup(point(), context(tmp_path))
    honest = made.make
    monkeypatch.setattr(made, "make", lambda index, mesh: honest(index + 1, mesh))
    assert not made.check().passed


def test_fp64_agrees_with_fp32_but_for_rounding(tmp_path: Path) -> None:
    single, double = (
        bench.setup(point(precision=precision), context(tmp_path)).make(0, Mesh(16, dtype=bench.DTYPE[precision]))
        for precision in ("fp32", "fp64")
    )
    assert (single.int() - double.int()).abs().max() <= 1
    assert np.mean((single != double).numpy()) < 1e-3


@pytest.mark.parametrize(("engine", "fidelity"), [("pycola3", "pm"), ("powerbox", "lpt")])
def test_peers_pass_the_check_where_they_are_installed(engine: str, fidelity: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    made = bench.setup(point(engine=engine, fidelity=fidelity, channels=1, mesh=32), context(tmp_path))
    check = made.check()
    assert check.passed, check.why


def test_a_peer_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "powerbox", None)
    made = bench.setup(point(engine="powerbox", channels=1), context(tmp_path))
    with pytest.raises(SaihError, match=r"pip install 'saih\[generators\]'"):
        made.check()


def test_the_local_site_is_one_to_generate_on() -> None:
    assert site.load("local").data_folder == "data"
