"""MLPerf HPC's own files, written here by other means than the reader's: h5py, hand-made protobuf, a plain CRC-32C."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saih.errors import SaihError
from workloads.cosmology import tfrecord
from workloads.cosmology.mlperf import open_folder

MESH = 8


def plain_crc32c(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = plain_crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(x: bytes, y: list[float]) -> bytes:
    features = {
        "y": field(2, field(1, struct.pack(f"<{len(y)}f", *y))),  # FloatList, packed
        "x": field(1, field(1, x)),  # BytesList
    }
    entries = [field(1, field(1, name.encode()) + field(2, feature)) for name, feature in features.items()]
    return field(1, b"".join(entries))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def universe(seed: int, side: int = MESH) -> tuple[np.ndarray, list[float]]:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 3000, (side, side, side, 4)).astype("<i2")
    return counts, random.uniform(-1, 1, 4).astype(np.float32).tolist()


@pytest.fixture(params=["plain", "gzip"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for number in range(3):
        counts, parameters = universe(number)
        content = record(example(counts.tobytes(), parameters))
        folder = tmp_path / f"part-{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"univ_{number:03d}.tfrecord").write_bytes(
            content if request.param == "plain" else gzip.compress(content)
        )
    return tmp_path


@pytest.fixture
def universes(tmp_path: Path) -> Path:
    for number in range(2):
        counts, parameters = universe(number, 2 * MESH)
        with h5py.File(tmp_path / f"univ_{number}.hdf5", "w") as file:
            file["full"], file["unitPar"] = counts, np.array(parameters)
            file["namePar"] = [b"Om", b"s8", b"ns", b"H0"]
    return tmp_path


def test_crc32c_of_the_standard() -> None:
    """RFC 3720, appendix B.4."""
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA
    assert tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tfrecord.crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(min_size=4, max_size=3000))
def test_crc32c_is_that_of_the_definition(data: bytes) -> None:
    assert tfrecord.crc32c(data) == plain_crc32c(data)


FILED = (0, 2, 1)
"""Numbers of the records in order of their paths: part-0 holds 0 and 2, part-1 holds 1."""


def test_records_are_read_whole(records: Path) -> None:
    volumes = open_folder(records, MESH, 4, samples=3)
    assert (len(volumes), volumes.shape, volumes.periodic, volumes.mean_count) == (3, (8, 8, 8, 4), False, 1.0)
    read = volumes.read([2, 0, 1])
    for position, index in enumerate((2, 0, 1)):
        np.testing.assert_array_equal(read[position].numpy(), universe(FILED[index])[0])
    expected = torch.tensor([universe(number)[1] for number in FILED])
    assert torch.equal(volumes.targets([0, 1, 2]), expected)
    assert torch.equal(open_folder(records, MESH, 4, samples=3).targets([1]), expected[1:2])


def test_fewer_channels_are_the_first_ones(records: Path) -> None:
    read = open_folder(records, MESH, 2, samples=1).read([0])
    np.testing.assert_array_equal(read[0].numpy(), universe(0)[0][..., :2])


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda whole: whole[:-1], "should be one record of"),
        (lambda whole: whole + whole, "should be one record of"),
        (lambda whole: whole[:10], "10 bytes are no TFRecord"),
        (lambda whole: b"", "0 bytes are no TFRecord"),
        (lambda whole: flip(whole, 3), "checksum of its length"),
        (lambda whole: flip(whole, 2000), "checksum of its record"),
        (lambda whole: flip(whole, len(whole) - 1), "checksum of its record"),
        (lambda whole: gzip.compress(whole)[:-9], "not a whole gzip file"),
        (lambda whole: record(b"\x08\x01" * 4), "not a tf.train.Example"),
        (lambda whole: record(field(1, field(1, field(1, b"z") + field(2, b"")))), "'x' is missing"),
        (lambda whole: record(example(b"ab", [0.0] * 3)), "3 parameters, not 4"),
        (lambda whole: record(example(b"odd", [0.0] * 4)), "buffer size"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    counts, parameters = universe(0)
    (tmp_path / "univ.tfrecord").write_bytes(damage(record(example(counts.tobytes(), parameters))))
    with pytest.raises(SaihError, match=rf"univ\.tfrecord is damaged or of another layout: .*{words}"):
        open_folder(tmp_path, MESH, 4, samples=1).read([0])


def test_a_record_of_another_size_says_what_to_set(records: Path) -> None:
    with pytest.raises(SaihError, match="holds 2048 voxels, not 16 x 16 x 16 x 4: set mesh to the volumes' side"):
        open_folder(records, 16, 4, samples=1).read([0])


def test_universes_are_cut_as_numpy_splits_them(universes: Path) -> None:
    volumes = open_folder(universes, MESH, 4, samples=16)
    assert (len(volumes), volumes.periodic, volumes.per_file) == (16, False, 8)
    for number in range(2):
        counts, parameters = universe(number, 2 * MESH)
        pieces = [piece for x in np.split(counts, 2, 0) for xy in np.split(x, 2, 1) for piece in np.split(xy, 2, 2)]
        for place, piece in enumerate(pieces):
            index = 8 * number + place
            np.testing.assert_array_equal(volumes.read([index])[0].numpy(), piece)
            np.testing.assert_array_equal(volumes.targets([index])[0].numpy(), np.float32(parameters))


def test_a_whole_universe_is_periodic(universes: Path) -> None:
    volumes = open_folder(universes, 2 * MESH, 3, samples=2)
    assert volumes.periodic
    np.testing.assert_array_equal(volumes.read([1])[0].numpy(), universe(1, 2 * MESH)[0][..., :3])


@pytest.mark.parametrize(
    ("mesh", "samples", "words"),
    [(32, 1, "universes of 16\\^3 cannot be cut into pieces of 32\\^3"), (8, 17, "16 volumes of 8\\^3, fewer than")],
)
def test_what_the_folder_cannot_give_is_said(universes: Path, mesh: int, samples: int, words: str) -> None:
    with pytest.raises(SaihError, match=words):
        open_folder(universes, mesh, 4, samples)


def test_damaged_universes_are_named(universes: Path) -> None:
    with h5py.File(universes / "univ_1.hdf5", "r+") as file:
        del file["unitPar"]
    whole = (universes / "univ_0.hdf5").read_bytes()
    volumes = open_folder(universes, MESH, 4, samples=16)
    with pytest.raises(SaihError, match=r"univ_1\.hdf5 is damaged or of another layout: .*unitPar"):
        volumes.targets([8])
    (universes / "univ_0.hdf5").write_bytes(whole[:3000])
    with pytest.raises(SaihError, match=r"univ_0\.hdf5 is damaged or of another layout: .*truncated"):
        volumes.read([0])


def test_folders_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaihError, match=r"neither \*\.tfrecord nor \*\.hdf5"):
        open_folder(tmp_path, MESH, 4, 1)
    with pytest.raises(SaihError, match="nowhere is not a folder"):
        open_folder(tmp_path / "nowhere", MESH, 4, 1)
