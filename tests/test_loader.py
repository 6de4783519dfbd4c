"""The order of volumes and the loader: every volume once an epoch, ranks disjoint, and the bytes that are there."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saih.errors import SaihError
from workloads.cosmology.loader import WINDOW_FILES, InMemory, Loader, Order
from workloads.cosmology.volumes import Volumes, Voxels, read_at


class Numbered(Volumes):
    """Every voxel of volume i is i; some take long to read, one cannot be read."""

    shape = (4, 4, 4, 2)
    periodic, mean_count = True, 1.0

    def __init__(self, samples: int, broken: int = -1) -> None:
        self.samples, self.broken = samples, broken
        self.reads: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.samples

    def read_into(self, index: int, target: Voxels) -> None:
        self.reads.append(index)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.002 * (index % 3))
        if index == self.broken:
            raise SaihError(f"volume {index} is damaged")
        target[...] = index

    def targets(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 4) / 100

    def files(self, indices: Sequence[int]) -> list[Path]:
        return []


@given(
    samples=st.integers(1, 50),
    batch=st.integers(1, 7),
    world=st.integers(1, 5),
    per_file=st.integers(1, 9),
    seed=st.integers(-3, 3),
)
def test_every_epoch_has_every_volume_once(samples: int, batch: int, world: int, per_file: int, seed: int) -> None:
    row = [
        index
        for step in range(-(-3 * samples // (batch * world)))
        for rank in range(world)
        for index in Order(samples, batch, seed, rank, world, per_file).indices(step)
    ]
    for epoch in range(3):
        assert sorted(row[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_one_rank_or_many_see_the_same_steps() -> None:
    alone = Order(100, 8, seed=1)
    four = [Order(100, 2, seed=1, rank=rank, world=4) for rank in range(4)]
    for step in range(30):
        assert alone.indices(step) == [index for each in four for index in each.indices(step)]
        assert four[0].indices(step, rank=3) == four[3].indices(step)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epochs(seed: int) -> list[list[int]]:
        return [Order(40, 40, seed).indices(step) for step in range(3)]

    assert epochs(1) == epochs(1)
    assert len({tuple(order) for seed in (1, 2) for order in epochs(seed)}) == 6


def test_volumes_of_a_file_come_within_its_window() -> None:
    per_file, files = 3, 5 * WINDOW_FILES
    window = WINDOW_FILES * per_file
    order = Order(files * per_file, files * per_file, seed=0, per_file=per_file).indices(0)
    for first in range(0, len(order), window):
        held = {index // per_file for index in order[first : first + window]}
        assert len(held) == WINDOW_FILES
    assert sorted(order[:window]) != order[:window]
    assert set(order[:window]) != set(range(window))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_with_their_targets(threads: int) -> None:
    volumes, order = Numbered(20), Order(20, 3, seed=0)
    loader = Loader(volumes, order.steps(), threads)
    for step in range(30):
        counts, targets = next(loader)
        assert (counts.dtype, counts.shape) == (torch.int16, (3, 4, 4, 4, 2))
        expected = torch.tensor(order.indices(step))
        assert torch.equal(counts, expected.to(torch.int16)[:, None, None, None, None].expand_as(counts))
        torch.testing.assert_close(targets[:, 2], expected / 100)
    loader.close()
    assert len(volumes.threads) == threads
    assert "MainThread" not in volumes.threads


def test_reading_runs_ahead_but_not_far() -> None:
    volumes = Numbered(100)
    loader = Loader(volumes, Order(100, 2, seed=0).steps(), threads=2, ahead=3)
    for _ in range(5):
        next(loader)
    time.sleep(0.2)
    assert len(volumes.reads) == 2 * (5 + 3)
    loader.close()


def test_memory_is_used_again() -> None:
    loader = Loader(Numbered(100), Order(100, 2, seed=0).steps(), threads=2, ahead=3)
    places = {next(loader)[0].data_ptr() for _ in range(40)}
    loader.close()
    assert len(places) <= 5


def test_it_ends_with_its_batches_even_of_unequal_size() -> None:
    loader = Loader(Numbered(10), [[0, 1, 2], [3, 4, 5], [6]], threads=2, ahead=2)
    assert [counts[:, 0, 0, 0, 0].tolist() for counts, _ in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_what_goes_wrong_in_a_thread_is_told_with_its_batch() -> None:
    loader = Loader(Numbered(10, broken=4), [[0, 1], [2, 3], [4, 5]], threads=2)
    next(loader)
    next(loader)
    with pytest.raises(SaihError, match="volume 4 is damaged"):
        next(loader)
    loader.close()


def test_in_memory_reads_once_and_is_equal() -> None:
    volumes = Numbered(6)
    held = InMemory(volumes)
    assert volumes.reads == list(range(6))
    assert torch.equal(held.read([4, 1]), volumes.read([4, 1]))
    assert torch.equal(held.targets([4, 1]), volumes.targets([4, 1]))
    assert (len(held), held.sample_bytes) == (6, 256)


def test_reading_at_an_offset(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "file").write_bytes(content)
    target = bytearray(200_000)
    read_at(tmp_path / "file", 1234, memoryview(target))
    assert bytes(target) == content[1234:201_234]
    with pytest.raises(SaihError, match="file is damaged: it ends 1 bytes early"):
        read_at(tmp_path / "file", 100_001, memoryview(target))
    with pytest.raises(SaihError, match="nowhere is missing"):
        read_at(tmp_path / "nowhere", 0, memoryview(target))
