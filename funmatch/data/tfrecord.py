"""TFRecord shards, byte by byte: framing, checksums, and the `tf.train.Example` inside. Nobody else knows these.

A shard is a row of records, each: length (8 bytes, little endian), masked CRC-32C of the length (4), payload, masked
CRC-32C of the payload (4). A payload is a `tf.train.Example`, a protocol buffer: field 1 is `Features`, whose field 1
is a map entry of name (1) and `Feature` (2), which is one of a list of bytes (1), floats (2) or integers (3).
"""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

BLOCK = 256  # bytes that the table takes a lane at a time
POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
MASK_DELTA = 0xA282EAD8
GZIP_MAGIC = b"\x1f\x8b"
LONGEST = 1 << 31  # a protocol buffer is at most 2 GiB

Span = tuple[int, int]
Features = dict[str, list[Span] | list[int] | None]
"""Features by name: where each value of a list of bytes begins and ends, integers, or None for floats."""


class DamagedRecord(ValueError):
    """A record that is not what its checksums or its format say."""


def _table() -> np.ndarray:
    """CRC-32C of every byte, (256,) uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return table


TABLE = _table()


def crc32c_by_table(data: bytes) -> int:
    """CRC-32C without a library: numpy walks many lanes of the data side by side, then joins their remainders."""
    crc = 0xFFFFFFFF
    lanes = len(data) // BLOCK
    if lanes > 1:
        block = np.frombuffer(data, np.uint8, lanes * BLOCK).reshape(lanes, BLOCK)
        remainders = np.zeros(lanes, np.uint32)
        remainders[0] = crc
        for column in block.T:
            remainders = TABLE[(remainders ^ column) & 0xFF] ^ (remainders >> 8)
        crc = _joined(remainders)
        data = data[lanes * BLOCK :]
    for byte in data:
        crc = int(TABLE[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _joined(remainders: np.ndarray) -> int:
    """The remainder of consecutive blocks together: two neighbours at a time, the first moved past the second."""
    shift = _shift_of_a_block()
    while len(remainders) > 1:
        if len(remainders) % 2:  # a block of zeros in front changes nothing
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        remainders = _moved(shift, remainders[0::2]) ^ remainders[1::2]
        shift = _moved(shift, shift)
    return int(remainders[0])


def _shift_of_a_block() -> np.ndarray:
    """What a block of zeros does to each bit of a remainder, (32,) uint32: the move is linear over bits."""
    moved = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(BLOCK):
        moved = TABLE[moved & 0xFF] ^ (moved >> 8)
    return moved


def _moved(shift: np.ndarray, remainders: np.ndarray) -> np.ndarray:
    bits = (remainders[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits, shift, np.uint32(0)), axis=1)


def _fastest_crc32c() -> Callable[[bytes], int]:
    try:
        import google_crc32c

        if google_crc32c.implementation == "c":
            return lambda data: google_crc32c.value(data)
    except ImportError:
        pass
    try:
        from crc32c import crc32c  # pyrefly: ignore[missing-import]
    except ImportError:
        return crc32c_by_table
    return crc32c


crc32c: Callable[[bytes], int] = _fastest_crc32c()


def masked_crc32c(data: bytes) -> int:
    """The checksum as it stands in a shard: turned and shifted, so that a checksum of checksums is safe."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def records(path: Path) -> Iterator[tuple[int, bytes]]:
    """The records of a shard, plain or GZIP, every checksum verified.

    Yields:
        where the payload begins (in the plain or unpacked shard), and the payload.

    Raises:
        DamagedRecord: naming the record, counted from 0.
    """
    with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
        number, at = 0, 0
        while True:
            try:
                payload = _next_record(file)
            except DamagedRecord as error:
                raise DamagedRecord(f"record {number}: {error}") from None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DamagedRecord(f"record {number}: the GZIP stream is damaged ({error})") from None
            if payload is None:
                return
            yield at + 12, payload
            at += 16 + len(payload)
            number += 1


def _next_record(file: BinaryIO | gzip.GzipFile) -> bytes | None:
    head = file.read(12)
    if not head:
        return None
    if len(head) < 12:
        raise DamagedRecord("the shard ends in the middle of a record's length")
    length, check = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != check:
        raise DamagedRecord("the checksum of its length is wrong")
    if length > LONGEST:
        raise DamagedRecord(f"its length of {length:,} bytes cannot be")
    payload = file.read(length)
    tail = file.read(4)
    if len(payload) < length or len(tail) < 4:
        raise DamagedRecord("the shard ends in the middle of it")
    if masked_crc32c(payload) != struct.unpack("<I", tail)[0]:
        raise DamagedRecord("the checksum of its payload is wrong")
    return payload


def framed(payload: bytes) -> bytes:
    """A payload as a record."""
    head = struct.pack("<Q", len(payload))
    return head + struct.pack("<I", masked_crc32c(head)) + payload + struct.pack("<I", masked_crc32c(payload))


def parse_example(payload: bytes) -> Features:
    """The features of a `tf.train.Example`, in whichever order they stand.

    Raises:
        DamagedRecord: it is none.
    """
    features: Features = {}
    for field, start, stop in _fields(payload, 0, len(payload)):
        if field != 1:
            continue
        for inner, entry_start, entry_stop in _fields(payload, start, stop):
            if inner != 1:
                continue
            entry = {number: (a, b) for number, a, b in _fields(payload, entry_start, entry_stop)}
            if 1 not in entry:
                raise DamagedRecord("it is no tf.train.Example: a feature has no name")
            a, b = entry[1]
            features[payload[a:b].decode(errors="replace")] = _values(payload, *entry.get(2, (0, 0)))
    if not features:
        raise DamagedRecord("it is no tf.train.Example: no feature is there")
    return features


def _values(payload: bytes, start: int, stop: int) -> list[Span] | list[int] | None:
    """The values of a `Feature`."""
    spans: list[Span] = []
    numbers: list[int] = []
    kind = 0
    for kind, a, b in _fields(payload, start, stop):
        if kind == 1:
            spans += [(c, d) for _, c, d in _fields(payload, a, b)]
        elif kind == 3:
            numbers += _integers(payload, a, b)
    return spans if kind == 1 else numbers if kind == 3 else None


def _integers(payload: bytes, start: int, stop: int) -> list[int]:
    """An `Int64List`, packed or not."""
    found = []
    while start < stop:
        key, start = _varint(payload, start, stop)
        if key == 0x0A:
            length, start = _varint(payload, start, stop)
            end = start + length
            if end > stop:
                raise DamagedRecord("it is no tf.train.Example: a list of numbers is cut off")
            while start < end:
                value, start = _varint(payload, start, end)
                found.append(value)
        elif key == 0x08:
            value, start = _varint(payload, start, stop)
            found.append(value)
        else:
            raise DamagedRecord("it is no tf.train.Example: a list of numbers holds something else")
    return [value - (1 << 64) if value >= 1 << 63 else value for value in found]


def _fields(payload: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a protocol buffer message as (number, start, stop), numbers and fixed-width ones passed over."""
    while start < stop:
        key, start = _varint(payload, start, stop)
        wire = key & 7
        if wire == 2:
            length, start = _varint(payload, start, stop)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        elif wire == 0:
            _, start = _varint(payload, start, stop)
            length = 0
        else:
            raise DamagedRecord("it is no tf.train.Example: unknown wire type")
        if start + length > stop:
            raise DamagedRecord("it is no tf.train.Example: a field is cut off")
        if wire == 2:
            yield key >> 3, start, start + length
        start += length


def _varint(payload: bytes, start: int, stop: int) -> tuple[int, int]:
    value, shift = 0, 0
    while start < stop and shift < 70:
        byte = payload[start]
        value |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return value, start
    raise DamagedRecord("it is no tf.train.Example: a number is cut off")


def example(image: bytes, label: int | None) -> bytes:
    """A `tf.train.Example` of `image` (bytes) and `class` (int64), the earlier project's form."""
    entries = [_message(1, _message(1, b"image") + _message(2, _message(1, _message(1, image))))]
    if label is not None:
        numbers = _message(3, _message(1, _encoded_varint(label)))
        entries.append(_message(1, _message(1, b"class") + _message(2, numbers)))
    return _message(1, b"".join(entries))


def _message(field: int, content: bytes) -> bytes:
    return _encoded_varint(field << 3 | 2) + _encoded_varint(len(content)) + content


def _encoded_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
