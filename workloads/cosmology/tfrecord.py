"""TFRecord files of one tf.train.Example, as MLPerf HPC's CosmoFlow has them: framing, checksums and features.

Formats: tensorflow.org/tutorials/load_data/tfrecord (framing, masked CRC-32C), protobuf.dev/programming-guides/encoding
and TensorFlow's example.proto and feature.proto.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from saih.errors import SaihError

Words = NDArray[np.uint32]

CASTAGNOLI = 0x82F63B78
"""The polynomial of CRC-32C, lowest power in the highest bit (RFC 3720, appendix B.4)."""
MASK = 0xA282EAD8
LANE_BYTES = 256
LENGTH_DELIMITED, VARINT = 2, 0


def payload(content: bytes, verify: bool = True) -> memoryview:
    """The one record of a file, gzip'ed or not; `verify`: hold it against its checksum.

    Raises:
        SaihError: the file does not hold one whole record, or a checksum does not match.
    """
    if content[:2] == b"\x1f\x8b":
        try:
            content = zlib.decompress(content, wbits=31)
        except zlib.error as error:
            raise SaihError(f"not a whole gzip file ({error})") from None
    view = memoryview(content)
    if len(view) < 16:
        raise SaihError(f"{len(view)} bytes are no TFRecord")
    length = int.from_bytes(view[:8], "little")
    if masked_crc(view[:8]) != int.from_bytes(view[8:12], "little"):
        raise SaihError("not a TFRecord, or the checksum of its length does not match")
    if len(view) != length + 16:
        raise SaihError(f"it should be one record of {length} bytes, and {len(view) - 16} bytes follow")
    data = view[12:-4]
    if verify and masked_crc(data) != int.from_bytes(view[-4:], "little"):
        raise SaihError("the checksum of its record does not match")
    return data


def features(example: memoryview) -> dict[str, memoryview]:
    """The features of a serialized tf.train.Example by name, each as a serialized tf.train.Feature.

    Raises:
        SaihError: that is not what the bytes are.
    """
    try:
        found = {}
        for entry in _fields(_only(example, 1), 1):
            found[bytes(_only(entry, 1)).decode()] = _only(entry, 2)
        return found
    except (IndexError, ValueError, UnicodeDecodeError):
        raise SaihError("its record is not a tf.train.Example") from None


def bytes_value(feature: memoryview) -> memoryview:
    """The one value of a Feature with a BytesList. Raises SaihError if it is not that."""
    try:
        return _only(_only(feature, 1), 1)
    except (IndexError, ValueError):
        raise SaihError("a feature is not a list of one string of bytes") from None


def float_values(feature: memoryview) -> NDArray[np.float32]:
    """The values of a Feature with a FloatList, packed as writers do. Raises SaihError if it is not that."""
    try:
        return np.frombuffer(_only(_only(feature, 2), 1), "<f4")
    except (IndexError, ValueError):
        raise SaihError("a feature is not a packed list of floats") from None


def _only(message: memoryview, number: int) -> memoryview:
    (value,) = _fields(message, number)
    return value


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """The length-delimited fields of a protobuf message that have this number."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 != LENGTH_DELIMITED:
            raise ValueError("no field of these messages is of another kind")
        length, at = _varint(message, at)
        if at + length > len(message):
            raise ValueError("the message ends early")
        if key >> 3 == number:
            yield message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number in base 128, lowest digit first, and where it ends."""
    value, shift = 0, 0
    while True:
        digit = message[at]
        value |= (digit & 127) << shift
        at, shift = at + 1, shift + 7
        if digit < 128:
            return value, at


def masked_crc(data: bytes | memoryview) -> int:
    """CRC-32C, rotated and shifted: a record may hold checksums of its own."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK) % 2**32


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (RFC 3720) of at least four bytes, in NumPy: lanes of bytes side by side, then joined pair by pair.

    A CRC that starts at zero is linear and does not see leading zeros: so the usual start, all ones, is folded into
    the first four bytes, the front is filled up to a power of two of lanes, and crc(A B) = zeros(crc(A)) ^ crc(B),
    where `zeros` appends as many zero bytes as B has.
    """
    lanes = 1 << max(0, (len(data) - 1) // LANE_BYTES).bit_length()
    padded = np.zeros(lanes * LANE_BYTES, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[len(padded) - len(data) :][:4] ^= 0xFF
    crc = np.zeros(lanes, np.uint32)
    for column in padded.reshape(lanes, LANE_BYTES).T:
        crc = _table()[(crc ^ column) & 0xFF] ^ crc >> 8
    zeros = _zeros_of_a_lane()
    while len(crc) > 1:
        crc = _apply(zeros, crc[::2]) ^ crc[1::2]
        zeros = _apply(zeros, zeros)
    return int(crc[0]) ^ 0xFFFFFFFF


@cache
def _table() -> Words:
    """What a byte does to a CRC: [256]."""
    table: Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1 ^ (table & 1) * np.uint32(CASTAGNOLI)).astype(np.uint32)
    return table


@cache
def _zeros_of_a_lane() -> Words:
    """What LANE_BYTES zero bytes do to each bit of a CRC: [32]."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(LANE_BYTES):
        bits = _table()[bits & 0xFF] ^ bits >> 8
    return bits


def _apply(columns: Words, values: Words) -> Words:
    """A 32 x 32 matrix over GF(2), by its columns, times each of `values`."""
    result = np.zeros_like(values)
    for bit, column in enumerate(columns):
        result ^= (values >> np.uint32(bit) & 1) * column
    return result
