"""Reads and writes TFRecord shards: framing, checksums, and the `tf.train.Example` inside.

A shard is a row of records, each: length (8 bytes, little endian), masked CRC-32C of the length (4), payload, masked
CRC-32C of the payload (4). A payload is a `tf.train.Example`, a protocol buffer: field 1 is `Features`, whose field 1
is a map entry of name (1) and `Feature` (2), which is one of a list of bytes (1), floats (2) or integers (3).
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from funmatch.data.formats.compressed import DAMAGED, MAX_EXPANSION, compression_of, largest_content, open_shard
from funmatch.data.formats.crc32c import masked_crc32c
from funmatch.data.formats.protobuf import BYTES, FIXED32, Damaged, fields, parts, varint, write_fields, write_varint

MAX_LENGTH = 1 << 31  # a protocol buffer is at most 2 GiB
MAX_UNPACKED_RECORD = 1 << 28
"""Bytes of a record in a compressed shard, at most: it may take a thousandth of that in the file."""
PLAIN = "if that is right, write the shard without compression"

Span = tuple[int, int]
Features = dict[str, list[Span] | list[int] | np.ndarray]
"""Features by name: bounds of each value of a list of bytes, integers, or floats as an array."""


class DamagedRecord(ValueError):
    """Raised for a record that contradicts its checksums or its format."""


def records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Reads the records of a shard, plain, GZIP or ZLIB, and verifies every checksum.

    Yields:
        the offset of the payload in the decompressed shard, and the payload.

    Raises:
        DamagedRecord: names the record, counted from 0.
    """
    # By content: shards are compressed under the same names as plain ones.
    packed, size = compression_of(path), path.stat().st_size
    largest = largest_content(size)
    with open_shard(path, packed) as file:
        number, at = 0, 0
        while True:
            try:
                payload = _next_record(file, None if packed else size - at)
            except DamagedRecord as error:
                raise DamagedRecord(f"record {number}: {error}") from None
            except DAMAGED as error:
                raise DamagedRecord(f"record {number}: the {packed} stream is damaged ({error})") from None
            if payload is None:
                return
            yield at + 12, payload  # behind the length and its checksum
            at += 16 + len(payload)  # 12 bytes before the payload, 4 behind it
            number += 1
            if packed and at > largest:
                raise DamagedRecord(
                    f"record {number}: the shard expands to more than {MAX_EXPANSION} times its {size:,} bytes; {PLAIN}"
                )


def _next_record(file: BinaryIO, left: int | None) -> bytes | None:
    """Reads a record; None at the end.

    Args:
        file: the shard.
        left: bytes to its end; None in a compressed one, whose end is unknown.
    """
    head = file.read(12)
    if not head:
        return None
    if len(head) < 12:
        raise DamagedRecord("the shard ends in the middle of a record's length")
    length, check = struct.unpack("<QI", head)
    # The length's own checksum comes first: a damaged length would make us read gigabytes.
    if masked_crc32c(head[:8]) != check:
        raise DamagedRecord("the checksum of its length is wrong")
    # A checksum may be right by chance, or on purpose.
    if length > MAX_LENGTH:
        raise DamagedRecord(f"its length of {length:,} bytes is impossible")
    # Before it is read: two compressed megabytes can hold two gigabytes of zeros.
    if left is None and length > MAX_UNPACKED_RECORD:
        raise DamagedRecord(
            f"its length of {length:,} bytes is more than the {MAX_UNPACKED_RECORD:,} that a record in a compressed "
            f"shard may have; {PLAIN}"
        )
    # Python takes memory for all of it, whether or not the file has as much.
    if left is not None and length > left:
        raise DamagedRecord("the shard ends in the middle of it")
    payload = file.read(length)
    tail = file.read(4)
    if len(payload) < length or len(tail) < 4:
        raise DamagedRecord("the shard ends in the middle of it")
    if masked_crc32c(payload) != struct.unpack("<I", tail)[0]:
        raise DamagedRecord("the checksum of its payload is wrong")
    return payload


def frame(payload: bytes) -> bytes:
    """Encodes a payload as a record."""
    head = struct.pack("<Q", len(payload))
    return head + struct.pack("<I", masked_crc32c(head)) + payload + struct.pack("<I", masked_crc32c(payload))


def parse_example(payload: bytes) -> Features:
    """Reads the features of a `tf.train.Example`, in any order.

    Raises:
        DamagedRecord: the payload is something else.
    """
    try:
        return _features(payload)
    except Damaged as error:
        raise DamagedRecord(f"it is not a tf.train.Example: {error}") from None


def _features(payload: bytes) -> Features:
    features: Features = {}
    for field, start, stop in parts(payload, 0, len(payload)):
        if field != 1:
            continue
        for inner, entry_start, entry_stop in parts(payload, start, stop):
            if inner != 1:
                continue
            # Of a field that is repeated the last one counts, as the format says.
            entry = {number: (a, b) for number, a, b in parts(payload, entry_start, entry_stop)}
            if 1 not in entry:
                raise Damaged("a feature has no name")
            a, b = entry[1]
            features[payload[a:b].decode(errors="replace")] = _values(payload, *entry.get(2, (0, 0)))
    # Unknown fields are skipped, so that many other bytes get here without an error.
    if not features:
        raise Damaged("it has no features")
    return features


def _values(payload: bytes, start: int, stop: int) -> list[Span] | list[int] | np.ndarray:
    """Reads the values of a `Feature`."""
    # Bounds of byte strings instead of copies: images are read in place later.
    spans: list[Span] = []
    numbers: list[int] = []
    floats: list[np.ndarray] = []
    kind = 0
    # A `Feature` is of one kind; of several the last one counts, as the format says.
    for kind, a, b in parts(payload, start, stop):
        if kind == 1:
            spans += [(c, d) for _, c, d in parts(payload, a, b)]
        elif kind == 3:
            numbers += _integers(payload, a, b)
        elif kind == 2:
            floats += _floats(payload, a, b)
    if kind == 2:
        return np.concatenate(floats) if floats else np.zeros(0, "<f4")
    return numbers if kind == 3 else spans


def _integers(payload: bytes, start: int, stop: int) -> list[int]:
    """Reads an `Int64List`."""
    # TensorFlow packs the numbers into one field, other writers may repeat the field.
    numbers = []
    while start < stop:
        key, start = varint(payload, start, stop)
        if key == 0x0A:  # field 1, a string of packed numbers
            length, start = varint(payload, start, stop)
            end = start + length
            if end > stop:
                raise Damaged("a list of numbers is cut off")
            while start < end:
                value, start = varint(payload, start, end)
                numbers.append(value)
        elif key == 0x08:  # field 1, a single number
            value, start = varint(payload, start, stop)
            numbers.append(value)
        else:
            raise Damaged("a list of numbers holds something else")
    # Two's complement: -1, "no label", is written as 2⁶⁴ − 1.
    return [value - (1 << 64) if value >= 1 << 63 else value for value in numbers]


def _floats(payload: bytes, start: int, stop: int) -> Iterator[np.ndarray]:
    """Reads a `FloatList`."""
    # TensorFlow packs the numbers into one field, other writers may repeat the field; both are four bytes a number.
    for number, wire, a, b in fields(payload, start, stop):
        if number != 1 or wire not in (BYTES, FIXED32) or (b - a) % 4:
            raise Damaged("a list of floats holds something else")
        yield np.frombuffer(payload, "<f4", (b - a) // 4, a)


def example(image: bytes, labels: Sequence[int] | None) -> bytes:
    """Encodes a `tf.train.Example` of `image` (bytes) and `class` (int64s), the format of the earlier project.

    Args:
        image: encoded.
        labels: any number; None leaves out the feature, which an empty list does not.
    """
    entries = [write_fields(1, write_fields(1, b"image") + write_fields(2, write_fields(1, write_fields(1, image))))]
    if labels is not None:
        # Packed, and nothing in a list of none, as TensorFlow writes them.
        packed = b"".join(map(write_varint, labels))
        numbers = write_fields(3, write_fields(1, packed) if packed else b"")
        entries.append(write_fields(1, write_fields(1, b"class") + write_fields(2, numbers)))
    return write_fields(1, b"".join(entries))
