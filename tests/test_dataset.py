"""Datasets on disk: whole files only, the same bytes whoever makes them, and damage found and named."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workloads.cosmology import dataset, power
from workloads.cosmology.dataset import Dataset, Recipe, generate

torch.set_num_threads(1)

SMALL = Recipe(mesh=8, channels=2, seed=3, samples=5)
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    generate(folder, SMALL)
    return folder


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / SMALL.folder_name).iterdir()}


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Recipes


def test_box_grows_with_the_mesh_unless_given() -> None:
    assert Recipe(mesh=64, channels=4, seed=0, samples=1).box_mpc_h == 256
    assert Recipe(mesh=128, channels=4, seed=0, samples=1).box_mpc_h == 512
    assert Recipe(mesh=64, channels=4, seed=0, samples=1, box_mpc_h=256) == Recipe(64, 4, 0, 1)
    assert Recipe(mesh=128, channels=4, seed=0, samples=1, box_mpc_h=256).box_mpc_h == 256


@given(
    mesh=st.integers(2, 2048),
    channels=st.integers(1, 4),
    seed=st.integers(0),
    samples=st.integers(1),
    box_mpc_h=st.integers(1, 4096),
)
def test_all_that_changes_a_universe_is_in_the_folder_name(
    mesh: int, channels: int, seed: int, samples: int, box_mpc_h: int
) -> None:
    recipe = Recipe(mesh, channels, seed, samples, box_mpc_h)
    assert recipe.folder_name == Recipe(mesh, channels, seed, samples + 1, box_mpc_h).folder_name
    others = [
        Recipe(mesh + 1, channels, seed, samples, box_mpc_h),
        Recipe(mesh, channels % 4 + 1, seed, samples, box_mpc_h),
        Recipe(mesh, channels, seed + 1, samples, box_mpc_h),
        Recipe(mesh, channels, seed, samples, box_mpc_h + 1),
    ]
    assert recipe.folder_name not in {other.folder_name for other in others}


@pytest.mark.parametrize(
    "changes", [{"mesh": 1}, {"channels": 0}, {"channels": 5}, {"samples": 0}, {"box_mpc_h": -1.0}]
)
def test_impossible_recipes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Recipe(**{"mesh": 8, "channels": 1, "seed": 0, "samples": 1, **changes})


def test_predicted_bytes_are_the_files_bytes(root: Path) -> None:
    sizes = [path.stat().st_size for path in (root / SMALL.folder_name).iterdir()]
    assert sizes == [128 + SMALL.sample_bytes] * SMALL.samples
    assert SMALL.dataset_bytes == 5 * 8**3 * 2 * 2


# Making


def test_bytes_do_not_depend_on_the_number_of_ranks(root: Path, tmp_path: Path) -> None:
    for rank in (2, 0, 1):
        generate(tmp_path, SMALL, rank, world=3)
    assert contents(tmp_path) == contents(root)


def test_a_rank_makes_its_share_and_only_what_is_missing(tmp_path: Path) -> None:
    assert generate(tmp_path, SMALL, rank=1, world=2) == 2
    assert sorted(contents(tmp_path)) == ["universe-000001.npy", "universe-000003.npy"]
    before = (tmp_path / SMALL.folder_name / "universe-000001.npy").stat().st_mtime_ns
    assert generate(tmp_path, SMALL) == 3
    assert generate(tmp_path, SMALL) == 0
    assert (tmp_path / SMALL.folder_name / "universe-000001.npy").stat().st_mtime_ns == before


def test_a_rank_outside_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 to 1, not 2"):
        generate(tmp_path, SMALL, rank=2, world=2)


def test_universes_and_families_differ(root: Path, tmp_path: Path) -> None:
    generate(tmp_path, Recipe(mesh=8, channels=2, seed=4, samples=5))
    other = {path.read_bytes() for path in tmp_path.rglob("*.npy")}
    assert len(other | set(contents(root).values())) == 10


def test_ranks_racing_for_the_same_universes_do_no_harm(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from workloads.cosmology.dataset import Recipe, generate\n"
        "generate(Path(sys.argv[1]), Recipe(mesh=8, channels=2, seed=3, samples=5))"
    )
    racers = [run(code, tmp_path) for _ in range(2)]
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors
    assert contents(tmp_path) == contents(root)


def test_a_killed_process_leaves_no_half_universe(root: Path, tmp_path: Path) -> None:
    """Killed in the middle of writing, it leaves a temporary file, which reading and the next making ignore."""
    code = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from workloads.cosmology.dataset import Recipe, generate\n"
        "def save(file, voxels):\n"
        "    file.write(voxels.tobytes()[:100]); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "np.save = save\n"
        "generate(Path(sys.argv[1]), Recipe(mesh=8, channels=2, seed=3, samples=5))"
    )
    victim = run(code, tmp_path)
    victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / SMALL.folder_name).iterdir()
    assert leftover.suffix == ".tmp"

    with pytest.raises(ValueError, match=r"universe-000000\.npy is missing"):
        Dataset(tmp_path, SMALL).read([0])
    assert generate(tmp_path, SMALL) == 5
    assert torch.equal(Dataset(tmp_path, SMALL).read(range(5)), Dataset(root, SMALL).read(range(5)))


def test_a_failed_write_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        generate(tmp_path, SMALL)
    assert contents(tmp_path) == {}


@given(seed=st.integers(), start=st.integers(0, 2**20))
def test_noise_seeds_differ_in_the_bits_torch_uses(seed: int, start: int) -> None:
    seeds = {dataset.noise_seed(seed, index) % 2**32 for index in range(start, start + 50)}
    assert len(seeds) == 50


# Reading


def test_reading_returns_the_universes_in_the_asked_order(root: Path) -> None:
    universes = Dataset(root, SMALL).read([4, 0, 4])
    assert universes.dtype == torch.int16
    assert universes.shape == (3, 8, 8, 8, 2)
    for position, index in enumerate([4, 0, 4]):
        stored = np.load(root / SMALL.folder_name / f"universe-{index:06d}.npy")
        np.testing.assert_array_equal(universes[position].numpy(), stored)
        np.testing.assert_array_equal(universes[position].numpy(), dataset.make_universe(SMALL, index).numpy())


def test_targets_are_those_of_the_universes(root: Path) -> None:
    targets = Dataset(root, SMALL).targets([2, 0])
    assert targets.dtype == torch.float32
    expected = np.stack([power.targets(power.draw(SMALL.seed, index)) for index in (2, 0)])
    np.testing.assert_array_equal(targets.numpy(), expected)
    assert Dataset(root, SMALL).targets([]).shape == (0, 4)


def test_reading_is_counted_by_the_system(tmp_path: Path) -> None:
    """The process's rchar grows by the bytes read, headers and its own two looks at the counter included."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count a process's reads")
    recipe = Recipe(mesh=64, channels=4, seed=0, samples=1)
    generate(tmp_path, recipe)
    data = Dataset(tmp_path, recipe)
    before = int(counter.read_text().split()[1])
    data.read([0, 0])
    counted = int(counter.read_text().split()[1]) - before
    assert 0 <= counted - 2 * recipe.sample_bytes < 4096


def test_reading_needs_no_colossus(root: Path) -> None:
    code = (
        "import sys; sys.modules['colossus'] = sys.modules['scipy'] = None\n"
        "from pathlib import Path; from workloads.cosmology.dataset import Dataset, Recipe\n"
        "data = Dataset(Path(sys.argv[1]), Recipe(mesh=8, channels=2, seed=3, samples=5))\n"
        "data.read([0, 1]); data.targets([0, 1])"
    )
    reader = run(code, root)
    _, errors = reader.communicate(timeout=120)
    assert reader.returncode == 0, errors


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:-1], id="a byte short"),
        pytest.param(lambda whole: whole + b"\0", id="a byte long"),
        pytest.param(lambda whole: whole[:60], id="cut in the header"),
        pytest.param(lambda whole: whole[:0], id="empty"),
        pytest.param(lambda whole: b"\0" * len(whole), id="zeros"),
        pytest.param(lambda whole: whole.replace(b"<i2", b"<u2", 1), id="another type"),
        pytest.param(lambda whole: whole.replace(b"(8, 8, 8, 2)", b"(8, 8, 2, 8)", 1), id="another shape"),
    ],
)
def test_a_damaged_file_is_named(root: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / SMALL.folder_name
    folder.mkdir()
    for name, whole in contents(root).items():
        (folder / name).write_bytes(damage(whole) if name == "universe-000003.npy" else whole)
    data = Dataset(tmp_path, SMALL)
    data.read([0, 1, 2, 4])
    with pytest.raises(ValueError, match=r"universe-000003\.npy is damaged: .*generate"):
        data.read([0, 3])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"universe-000002\.npy is missing: generate"):
        Dataset(tmp_path, SMALL).read([2])


@pytest.mark.parametrize("index", [-1, 5])
def test_a_universe_outside_the_recipe_is_refused(root: Path, index: int) -> None:
    data = Dataset(root, SMALL)
    with pytest.raises(IndexError, match=f"universe {index} is not among the 5"):
        data.read([index])
    with pytest.raises(IndexError, match=f"universe {index} is not among the 5"):
        data.targets([index])
