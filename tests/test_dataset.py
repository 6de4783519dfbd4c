"""Datasets on disk: whole files only, the same bytes whoever makes them, and damage found and named."""

import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih.errors import SaihError
from workloads.cosmology import dataset, power, storages
from workloads.cosmology.dataset import Dataset, generate, missing
from workloads.cosmology.loading.bench import storage_read_bytes
from workloads.cosmology.recipe import Recipe
from workloads.cosmology.storages import STORAGES

torch.set_num_threads(1)

SMALL = Recipe(mesh=8, channels=2, seed=3, samples=5)
PER_SHARD = 2
REPOSITORY = Path(__file__).parents[1]
SETUP = (
    "import os, signal, sys; from pathlib import Path\n"
    "from workloads.cosmology import storages\n"
    f"storages.SHARD_BYTES = {PER_SHARD * SMALL.sample_bytes}\n"
    "from workloads.cosmology.dataset import Dataset, generate\n"
    "from workloads.cosmology.recipe import Recipe\n"
    "small = Recipe(mesh=8, channels=2, seed=3, samples=5)\n"
)


@pytest.fixture(scope="module", autouse=True)
def two_universes_a_shard() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storages, "SHARD_BYTES", PER_SHARD * SMALL.sample_bytes)
        yield


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, require_package: Callable[[str, str], None]) -> str:
    if request.param == "hdf5-lz4":
        require_package("hdf5plugin", "pip install hdf5plugin")
    return str(request.param)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    generate(folder, SMALL)
    return folder


def folder(root: Path, storage: str = "hdf5") -> Path:
    return root / SMALL.folder_name(storage)


def contents(root: Path, storage: str = "hdf5") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder(root, storage).iterdir()}


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
    assert recipe.name == Recipe(mesh, channels, seed, samples + 1, box_mpc_h).name
    others = [
        Recipe(mesh + 1, channels, seed, samples, box_mpc_h),
        Recipe(mesh, channels % 4 + 1, seed, samples, box_mpc_h),
        Recipe(mesh, channels, seed + 1, samples, box_mpc_h),
        Recipe(mesh, channels, seed, samples, box_mpc_h + 1),
        Recipe(mesh, channels, seed, samples, box_mpc_h, "pm"),
        Recipe(mesh, channels, seed, samples, box_mpc_h, refine=2),
    ]
    assert recipe.name not in {other.name for other in others}


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": 1},
        {"channels": 0},
        {"channels": 5},
        {"samples": 0},
        {"box_mpc_h": -1.0},
        {"fidelity": "n-body"},
        {"refine": 0},
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Recipe(**{"mesh": 8, "channels": 1, "seed": 0, "samples": 1, **changes})


@given(mesh=st.integers(2, 512), channels=st.integers(1, 4), samples=st.integers(1, 5000))
def test_every_universe_is_in_one_shard(mesh: int, channels: int, samples: int) -> None:
    recipe = Recipe(mesh, channels, seed=0, samples=samples)
    shards = [recipe.shard(number) for number in range(recipe.shards)]
    assert [index for shard in shards for index in shard] == list(range(samples))
    assert all(len(shard) == recipe.per_shard for shard in shards[:-1])


def test_predicted_bytes_are_the_files_bytes(tmp_path: Path) -> None:
    recipe = Recipe(mesh=16, channels=4, seed=0, samples=8)
    for storage in ("npy", "hdf5"):
        generate(tmp_path, recipe, storage=storage)
        data = sum(path.stat().st_size for path in Dataset(tmp_path, recipe, storage).files(range(8)))
        assert 0 <= data - recipe.dataset_bytes < 2**15 * recipe.shards
    assert SMALL.dataset_bytes == 5 * 8**3 * 2 * 2


# Making


def test_bytes_do_not_depend_on_the_number_of_ranks(storage: str, tmp_path: Path) -> None:
    generate(tmp_path / "one", SMALL, storage=storage)
    for rank in (2, 0, 1):
        generate(tmp_path / "three", SMALL, rank, world=3, storage=storage)
    assert contents(tmp_path / "three", storage) == contents(tmp_path / "one", storage)


def test_a_rank_makes_its_share_and_only_what_is_missing(tmp_path: Path) -> None:
    assert generate(tmp_path, SMALL, rank=1, world=2) == 2
    assert sorted(contents(tmp_path)) == ["shard-000001-2-volumes.h5", "shard-000001.json"]
    assert missing(tmp_path, SMALL) == [0, 2]
    before = (folder(tmp_path) / "shard-000001-2-volumes.h5").stat().st_mtime_ns
    assert generate(tmp_path, SMALL) == 3
    assert generate(tmp_path, SMALL) == 0
    assert (folder(tmp_path) / "shard-000001-2-volumes.h5").stat().st_mtime_ns == before


def test_a_larger_dataset_takes_over_whole_shards_and_disturbs_no_reader(tmp_path: Path) -> None:
    generate(tmp_path, SMALL)
    smaller = Dataset(tmp_path, SMALL)
    before = smaller.read([4])
    larger = Recipe(mesh=8, channels=2, seed=3, samples=6)
    assert generate(tmp_path, larger) == 2
    assert torch.equal(smaller.read([4]), before)
    assert torch.equal(Dataset(tmp_path, larger).read([4]), before)
    assert torch.equal(Dataset(tmp_path, SMALL).read(range(5)), Dataset(tmp_path, larger).read(range(5)))


def test_a_manifest_says_what_each_universe_is(root: Path) -> None:
    told = json.loads((folder(root) / "shard-000001.json").read_text())
    assert told["recipe"] == {
        "mesh": 8,
        "channels": 2,
        "seed": 3,
        "box_mpc_h": 32.0,
        "fidelity": "lpt",
        "refine": 1,
        "generator_version": 2,
    }
    assert (told["data"], told["storage"]) == ("shard-000001-2-volumes.h5", "hdf5")
    for row, index in enumerate((2, 3)):
        cosmology = power.draw(3, index)
        about = told["volumes"][row]["about"]
        assert (about["omega_m"], about["noise_seed"]) == (cosmology.omega_m, dataset.noise_seed(3, index))
        voxels = dataset.make_universe(SMALL, index).numpy()
        assert told["volumes"][row]["crc32"] == zlib.crc32(voxels.tobytes())


def test_hdf5_has_the_names_of_mlperf_and_a_chunk_a_universe(root: Path) -> None:
    with h5py.File(folder(root) / "shard-000001-2-volumes.h5") as file:
        assert file["full"].chunks == (1, 8, 8, 8, 2)
        assert file["full"].dtype == np.dtype("<i2")
        np.testing.assert_array_equal(file["full"][1], dataset.make_universe(SMALL, 3).numpy())
        np.testing.assert_array_equal(file["unitPar"][1], power.targets(power.draw(3, 3)))
        assert file.attrs["seed"] == 3


def test_npy_is_an_array_whose_voxels_begin_at_a_page(tmp_path: Path) -> None:
    generate(tmp_path, SMALL, storage="npy")
    path = folder(tmp_path, "npy") / "shard-000001-2-volumes.npy"
    array = np.load(path, mmap_mode="r")
    assert (array.shape, array.dtype, array.offset) == ((2, 8, 8, 8, 2), np.dtype("<i2"), 4096)
    np.testing.assert_array_equal(array[1], dataset.make_universe(SMALL, 3).numpy())


def test_uncompressed_chunks_of_whole_pages_begin_at_pages(tmp_path: Path) -> None:
    recipe = Recipe(mesh=8, channels=4, seed=0, samples=2)
    generate(tmp_path, recipe)
    rows = [row for path in tmp_path.rglob("*.json") for row in json.loads(path.read_text())["volumes"]]
    assert [row["offset"] % 4096 for row in rows] == [0, 0]


def test_a_universe_too_large_for_a_chunk_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"8\.59 GB is larger than an HDF5 chunk can be, 4\.29 GB; use storage=npy"):
        generate(tmp_path, Recipe(mesh=1024, channels=4, seed=0, samples=1))


def test_an_unknown_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"unknown storage .zarr.; .*hdf5"):
        generate(tmp_path, SMALL, storage="zarr")


def test_without_h5py_npy_works_and_hdf5_says_what_it_needs(tmp_path: Path) -> None:
    code = SETUP + (
        "sys.modules['h5py'] = None\n"
        "from saih.errors import SaihError\n"
        "generate(Path(sys.argv[1]), small, storage='npy'); Dataset(Path(sys.argv[1]), small, 'npy').read(range(5))\n"
        "Dataset(Path(sys.argv[2]), small, 'hdf5').read(range(5))\n"
        "try: generate(Path(sys.argv[1]), small, storage='hdf5')\n"
        "except SaihError as error: print(error)"
    )
    generate(tmp_path / "there", SMALL)
    told, errors = run(code, tmp_path, tmp_path / "there").communicate(timeout=120)
    assert told == "storage=hdf5 needs h5py: pip install h5py, or choose storage=npy\n", errors


def test_a_rank_outside_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 to 1, not 2"):
        generate(tmp_path, SMALL, rank=2, world=2)


def test_universes_and_families_differ(root: Path, tmp_path: Path) -> None:
    other = Recipe(mesh=8, channels=2, seed=4, samples=5)
    generate(tmp_path, other)
    universes = [*Dataset(root, SMALL).read(range(5)), *Dataset(tmp_path, other).read(range(5))]
    assert len({each.numpy().tobytes() for each in universes}) == 10


def test_ranks_racing_for_the_same_universes_do_no_harm(root: Path, tmp_path: Path) -> None:
    code = SETUP + "generate(Path(sys.argv[1]), small)"
    racers = [run(code, tmp_path) for _ in range(2)]
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors
    assert contents(tmp_path) == contents(root)


def test_a_killed_process_leaves_no_half_universe(root: Path, tmp_path: Path) -> None:
    """Killed in the middle of writing, it leaves a temporary file, which reading and the next making ignore."""
    code = SETUP + (
        "from workloads.cosmology import shards\n"
        "def write(file, made, shape):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL); yield\n"
        "shards._write_npy = write\n"
        "generate(Path(sys.argv[1]), small, storage='npy')"
    )
    victim = run(code, tmp_path)
    victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL
    (leftover,) = folder(tmp_path, "npy").iterdir()
    assert leftover.name.startswith(".shard-000000")

    with pytest.raises(SaihError, match=r"shard-000000\.json is missing: generate"):
        Dataset(tmp_path, SMALL, "npy").read([0])
    assert generate(tmp_path, SMALL, storage="npy") == 5
    assert torch.equal(Dataset(tmp_path, SMALL, "npy").read(range(5)), Dataset(root, SMALL).read(range(5)))


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


def test_reading_returns_the_universes_in_the_asked_order(storage: str, tmp_path: Path) -> None:
    generate(tmp_path, SMALL, storage=storage)
    universes = Dataset(tmp_path, SMALL, storage).read([4, 0, 4])
    assert universes.dtype == torch.int16
    assert universes.shape == (3, 8, 8, 8, 2)
    for position, index in enumerate([4, 0, 4]):
        assert torch.equal(universes[position], dataset.make_universe(SMALL, index))


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
    code = SETUP + (
        "sys.modules['colossus'] = sys.modules['scipy'] = None\n"
        "data = Dataset(Path(sys.argv[1]), small); data.read([0, 1]); data.targets([0, 1])"
    )
    reader = run(code, root)
    _, errors = reader.communicate(timeout=120)
    assert reader.returncode == 0, errors


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:-5000], id="cut short"),
        pytest.param(lambda whole: whole[:60], id="cut in the header"),
        pytest.param(lambda whole: whole[:0], id="empty"),
        pytest.param(lambda whole: b"\0" * len(whole), id="zeros"),
        pytest.param(lambda whole: whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], id="one bit"),
    ],
)
def test_damage_is_found_and_named(storage: str, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    generate(tmp_path, SMALL, storage=storage)
    (path,) = folder(tmp_path, storage).glob("shard-000001-*")
    whole = path.read_bytes()
    if storage.startswith("hdf5"):  # its metadata may come last: damage where the last universe lies
        whole = whole[: _end_of_voxels(path)]
    path.write_bytes(damage(whole))
    data = Dataset(tmp_path, SMALL, storage)
    data.read([0, 1, 4])
    with pytest.raises(SaihError, match=r"shard-000001-2-volumes\..* is damaged: .*volume 1 of the 2 .*generate"):
        data.read([3])
    if len(damage(whole)) != len(whole):
        assert missing(tmp_path, SMALL, storage) == [1]
    path.unlink()
    assert generate(tmp_path, SMALL, storage=storage) == 2
    assert torch.equal(Dataset(tmp_path, SMALL, storage).read([3])[0], dataset.make_universe(SMALL, 3))


def _end_of_voxels(path: Path) -> int:
    with h5py.File(path) as file:
        chunk = file["full"].id.get_chunk_info_by_coord((1, 0, 0, 0, 0))
        return int(chunk.byte_offset + chunk.size)


def test_a_universe_is_held_against_its_checksum_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: counted.append(len(data)) or crc32(data))
    data = Dataset(root, SMALL)
    for _ in range(3):
        data.read([0, 1])
    assert counted == [SMALL.sample_bytes] * 2


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    generate(tmp_path, SMALL)
    path = folder(tmp_path) / "shard-000000.json"
    path.write_text(path.read_text().replace('"crc32"', '"crc"', 1))
    with pytest.raises(SaihError, match=r"shard-000000\.json: damaged \('crc32' missing\)"):
        Dataset(tmp_path, SMALL).read([0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"shard-000001\.json is missing: generate"):
        Dataset(tmp_path, SMALL).read([2])


def test_forgotten_files_are_read_from_storage_again(tmp_path: Path) -> None:
    recipe = Recipe(mesh=64, channels=4, seed=0, samples=1)
    generate(tmp_path, recipe)
    data = Dataset(tmp_path, recipe)
    before = storage_read_bytes()
    data.evict([0])
    data.read([0])
    if before != before or storage_read_bytes() == before:
        pytest.skip("this system does not count what it reads, or keeps its files in memory")
    assert storage_read_bytes() - before >= recipe.sample_bytes


@pytest.mark.parametrize("index", [-1, 5])
def test_a_universe_outside_the_recipe_is_refused(root: Path, index: int) -> None:
    data = Dataset(root, SMALL)
    with pytest.raises(IndexError, match=f"volume {index} is not among the 5"):
        data.read([index])
    with pytest.raises(IndexError, match=f"volume {index} is not among the 5"):
        data.targets([index])
