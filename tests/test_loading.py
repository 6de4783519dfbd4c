"""The loading workload: every way of reading brings the same bytes, and cold means read from storage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from saih import workload
from saih.core import Context, Place, Point, Value
from saih.errors import SaihError
from saih.timing import StepClock, run_steps
from workloads.cosmology.loading import bench, spec

DEFAULTS = {name: parameter.default for name, parameter in workload.parameters(spec).items()}
SMALL = {"mesh": 64, "shards": 1, "warmup": 1, "steps": 1, "max_steps": 1}


def params(**changes: Value) -> dict[str, Value]:
    return DEFAULTS | SMALL | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a disk: what lies in memory is never cold."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("data")


def loading(folder: Path, **changes: Value) -> bench.Loading:
    return bench.setup(Point("loading", params(**changes)), Context(Place(0, 0, 1), "cpu", str(folder)))


@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("variant", ["loader", "dataloader", "buffered", "direct"])
def test_every_way_brings_the_bytes_of_the_files(folder: Path, variant: str, cache: str) -> None:
    measured = loading(folder, variant=variant, cache=cache)
    check = measured.check()
    if cache == "cold" and "still warm" in check.why:
        pytest.skip(f"files cannot be made cold here: {check.why}")
    assert check.passed, check.why
    if variant != "direct":
        assert check.numbers["share_from_storage"] > 0.9 if cache == "cold" else True
    samples = run_steps(measured, StepClock("cpu"), 2)
    measured.close()
    expected = spec.step_volumes(measured.params) * 64**3 * 4 * 2
    assert [work.units for work in samples.work] == [expected] * 2


def test_a_second_reading_is_warm(folder: Path) -> None:
    measured = loading(folder, variant="buffered", cache="warm")
    measured.check()
    assert measured.check().numbers["share_from_storage"] < 0.1
    measured.close()


def test_cold_reading_that_stays_warm_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: None)
    measured = loading(folder, variant="buffered")
    check = measured.check()
    measured.close()
    assert not check.passed
    assert "still warm: 0% of the bytes came from storage" in check.why


def test_bytes_that_are_not_those_of_the_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = loading(folder, variant="loader", cache="warm")
    honest = measured.volumes.read_into

    def wrong(index: int, target: object) -> None:
        honest(index, target)  # type: ignore[arg-type]
        target[0, 0, 0, 0] += index == 3  # type: ignore[index]

    expected = measured.volumes
    measured.volumes = type("Wrong", (), {})()
    for name in ("shape", "targets", "per_file"):
        setattr(measured.volumes, name, getattr(expected, name))
    measured.volumes.read_into = wrong  # type: ignore[method-assign]
    measured.volumes.read = expected.read  # type: ignore[method-assign]
    measured.volumes.__class__.__len__ = lambda self: len(expected)  # type: ignore[method-assign, assignment]
    check = measured.check()
    assert not check.passed
    assert "the files hold" in check.why


def test_parts_have_files_of_their_own() -> None:
    chosen = params(mesh=32, channels=4, shards=2, warmup=2, steps=3, max_steps=5)
    assert spec.parts(chosen) == 7
    assert spec.step_volumes(chosen) == 2 * 2**25 // (32**3 * 4 * 2)
    assert spec.cost(chosen).disk_bytes == 7 * 2 * 2**25
    assert spec.step_volumes(params(mesh=512, shards=3)) == 3


def test_plain_reading_of_compressed_files_is_refused() -> None:
    with pytest.raises(SaihError, match="variant=direct reads volumes as they lie, so storage must be hdf5 or npy"):
        spec.cost(params(variant="direct", storage="hdf5-gzip"))


def test_batches_are_shuffled_within_their_part() -> None:
    parts = [range(10), range(10, 20)]
    batches = bench.shuffled_batches(parts, 4)
    turns = [[index for _ in range(3) for index in next(batches)] for _ in range(4)]
    assert [sorted(turn) for turn in turns] == [list(range(10)), list(range(10, 20))] * 2
    assert turns[0] != turns[2]
    assert turns[0] != list(range(10))
