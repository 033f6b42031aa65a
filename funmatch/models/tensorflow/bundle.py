"""Reads TensorFlow's tensor bundles: a sorted table of tensors, and shards with their values.

`<prefix>.index` is a table in LevelDB's format. Its last 48 bytes give the position of the index block, which gives
those of the data blocks. A block is a row of entries, each the lengths of what its key shares with the last key, of the
rest of the key, and of the value; then the positions where sharing restarts. After a block come its compression (1
byte) and a masked CRC-32C of both (4 bytes). The key "" holds a `BundleHeaderProto`, each other key a
`BundleEntryProto`: kind, shape, shard, offset, size and masked CRC-32C of a tensor in
`<prefix>.data-<shard>-of-<shards>`.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from funmatch.data.formats import protobuf
from funmatch.data.formats.crc32c import crc32c, mask, masked_crc32c
from funmatch.data.formats.protobuf import Damaged
from funmatch.errors import InputError

FOOTER = 48  # bytes
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
PLAIN, SNAPPY = 0, 1  # compressions of a block
BIG_ENDIAN = 1
VERSION = 1  # of the format
PIECE = 16 << 20  # bytes read and checked at once
MAX_AXIS = 1 << 40
MAX_SHARDS = 100_000

STRING, BFLOAT16 = 7, 14
DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    BFLOAT16: np.dtype("<u2"),  # numpy has no such type; these are the upper halves of float32
    17: np.dtype("<u2"),
    19: np.dtype("<f2"),
    22: np.dtype("<u4"),
    23: np.dtype("<u8"),
}
"""TensorFlow's numbers for kinds of tensors, and the type of their values in a file."""

NOT_FLOATS = {STRING} | {kind for kind, dtype in DTYPES.items() if dtype.kind != "f" and kind != BFLOAT16}


@dataclass(frozen=True)
class Entry:
    """Entry of a tensor in the index.

    Attributes:
        kind: TensorFlow's number, see `DTYPES`.
        shape: of the tensor.
        shard, offset, size: file, and position of its bytes there.
        checksum: masked CRC-32C of these bytes.
    """

    kind: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int

    @property
    def is_weight(self) -> bool:
        """Whether it may be a weight: counters and sums of metrics are not floats, or single ones."""
        return bool(self.shape) and self.kind not in NOT_FLOATS


@dataclass(frozen=True)
class Bundle:
    """Tensors by name, not read yet.

    Attributes:
        entries: by name of the tensor.
        shards: files with their values.
    """

    entries: dict[str, Entry]
    shards: list[Path]


def open_bundle(prefix: Path) -> Bundle:
    """Reads the index of a bundle, and verifies every checksum.

    Args:
        prefix: of its files' names, such as `variables/variables`.

    Raises:
        InputError: a file is missing, cut off, damaged, or of an unsupported format.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        content = index.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {index} ({error.strerror}), the list of the model's variables") from None
    try:
        rows = dict(_rows(content))
        count = _shards(rows.pop(b"", b""), index)
        entries = {key.decode(errors="replace"): _entry(key, value, index) for key, value in rows.items()}
    except Damaged as error:
        raise InputError(f"{index} is damaged, or not an index of TensorFlow: {error}; copy it again") from None
    shards = [prefix.with_name(f"{prefix.name}.data-{i:05}-of-{count:05}") for i in range(count)]
    _check_positions(entries, shards)
    return Bundle(entries, shards)


def _rows(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a table."""
    footer = content[-FOOTER:]
    if len(footer) < FOOTER or not footer.endswith(MAGIC):
        raise Damaged("it lacks the end of a table, and may be cut off")
    meta, at = _position(footer, 0)
    index, _ = _position(footer, at)
    _block(content, *meta)  # not needed, but its checksum covers a part of the file
    for _, value in _block_rows(_block(content, *index)):
        position, _ = _position(value, 0)
        yield from _block_rows(_block(content, *position))


def _position(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Reads offset and size of a block; returns them and the position after them."""
    offset, at = protobuf.varint(data, at, len(data))
    size, at = protobuf.varint(data, at, len(data))
    return (offset, size), at


def _block(content: bytes, offset: int, size: int) -> bytes:
    """Returns a block without its trailer, whose checksum is verified."""
    end = offset + size
    if end + 5 > len(content):
        raise Damaged("it ends in the middle of a block")
    if masked_crc32c(content[offset : end + 1]) != int.from_bytes(content[end + 1 : end + 5], "little"):
        raise Damaged(f"the checksum of the block at byte {offset} is wrong")
    compression = content[end]
    if compression != PLAIN:
        name = "Snappy" if compression == SNAPPY else f"method {compression}"
        raise Damaged(f"its blocks are compressed with {name}; expected plain ones, as TensorFlow itself writes them")
    return content[offset:end]


def _block_rows(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the entries of a block with their full keys."""
    restarts = int.from_bytes(block[-4:], "little")  # skipped: rows are read in order, none is looked up
    stop = len(block) - 4 * (restarts + 1)
    if stop < 0:
        raise Damaged("a block is too short")
    key, at = b"", 0
    while at < stop:
        shared, at = protobuf.varint(block, at, stop)
        rest, at = protobuf.varint(block, at, stop)
        length, at = protobuf.varint(block, at, stop)
        if shared > len(key) or at + rest + length > stop:
            raise Damaged("an entry extends beyond its block")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _shards(header: bytes, index: Path) -> int:
    """Returns the number of files with values."""
    fields = protobuf.parse(header)
    if protobuf.number(fields, 2) == BIG_ENDIAN:
        raise InputError(f"{index} was written on a big-endian machine; load and save the model on another one")
    version = protobuf.parse(b"".join(protobuf.messages(fields, 3)))
    if protobuf.number(version, 2) > VERSION:  # the oldest reader that understands it
        raise InputError(f"{index} is of a newer format than {VERSION}; save the model with an older TensorFlow")
    count = protobuf.number(fields, 1)
    if not 0 < count < MAX_SHARDS:
        raise Damaged(f"it lists {count} files of values")
    return count


def _entry(key: bytes, value: bytes, index: Path) -> Entry:
    fields = protobuf.parse(value)
    if protobuf.messages(fields, 7):  # slices of a partitioned variable
        name = key.decode(errors="replace")
        raise InputError(
            f"{index}: {name} is stored in slices; load the model and save it without partitions and without "
            "a sharding callback such as MaxShardSizePolicy"
        )
    shape = []
    for axis in protobuf.messages(protobuf.parse(b"".join(protobuf.messages(fields, 2))), 2):
        shape.append(protobuf.number(protobuf.parse(axis), 1))
    # Bounds, because sizes are computed from it: a damaged shape must not ask for terabytes.
    if len(shape) > 32 or max(shape, default=0) > MAX_AXIS:
        raise Damaged(f"{key.decode(errors='replace')} has an impossible shape")
    kind, shard, offset, size, checksum = (protobuf.number(fields, field) for field in (1, 3, 4, 5, 6))
    return Entry(kind, tuple(shape), shard, offset, size, checksum)


def _check_positions(entries: dict[str, Entry], shards: list[Path]) -> None:
    """Raises `InputError` unless all shards exist and are long enough, and sizes match the shapes."""
    # All at once and before anything is read: a folder of which a file was not copied is a common mistake.
    sizes = []
    for path in shards:
        if not path.is_file():
            raise InputError(f"{path} is missing; copy the folder again, with all of its files")
        sizes.append(path.stat().st_size)
    for name, entry in entries.items():
        if entry.shard >= len(shards):
            raise InputError(
                f"{shards[0].parent}: {name} is in file {entry.shard} of {len(shards)}; save the model again"
            )
        if entry.offset + entry.size > sizes[entry.shard]:
            raise InputError(
                f"{shards[entry.shard]} has {sizes[entry.shard]:,} bytes, {name} ends at byte "
                f"{entry.offset + entry.size:,}; the file is cut off: copy it again"
            )
        dtype = DTYPES.get(entry.kind)
        if dtype and math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise InputError(
                f"{shards[entry.shard]}: {name} has {entry.size:,} bytes, which does not match {entry.shape} {dtype}"
            )


def read(bundle: Bundle, name: str) -> np.ndarray:
    """Reads a tensor of numbers, and verifies its checksum. bfloat16 becomes float32, other types stay.

    Raises:
        InputError: it is damaged, or not of numbers.
    """
    entry = bundle.entries[name]
    path = bundle.shards[entry.shard]
    dtype = DTYPES.get(entry.kind)
    if dtype is None:
        raise InputError(f"{path}: {name} is of TensorFlow's kind {entry.kind}; expected numbers")
    raw = np.empty(entry.size, np.uint8)
    _check(_read_into(path, entry, raw), entry, path, name)
    array = raw.view(dtype).reshape(entry.shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if entry.kind == BFLOAT16 else array


def _read_into(path: Path, entry: Entry, into: np.ndarray) -> int:
    """Reads the bytes of a tensor, and returns their masked checksum."""
    # In pieces that are small against the tensor: read at once, it would be in memory twice.
    crc = 0
    try:
        with open(path, "rb") as file:
            file.seek(entry.offset)
            for start in range(0, entry.size, PIECE):
                piece = file.read(min(PIECE, entry.size - start))
                into[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
                crc = crc32c(piece, crc)  # here, or a large tensor would be read from memory once more
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    return mask(crc)


def _check(checksum: int, entry: Entry, path: Path, name: str) -> None:
    if checksum != entry.checksum:
        raise InputError(f"{path}: the checksum of {name} is wrong, the file is damaged; copy it again")


def read_strings(bundle: Bundle, name: str) -> list[bytes]:
    """Reads a tensor of strings, and verifies its checksums.

    First come the lengths as varints, then the masked CRC-32C of the lengths as fixed-width numbers, then the strings.
    The tensor's checksum covers these numbers, that checksum and the strings.

    Raises:
        InputError: it is damaged, or not of strings.
    """
    entry = bundle.entries[name]
    path = bundle.shards[entry.shard]
    if entry.kind != STRING:
        raise InputError(f"{path}: {name} is of TensorFlow's kind {entry.kind}; expected strings")
    raw = np.empty(entry.size, np.uint8)
    _read_into(path, entry, raw)
    content = raw.tobytes()
    try:
        lengths, at = [], 0
        for _ in range(math.prod(entry.shape)):
            length, at = protobuf.varint(content, at, len(content))
            lengths.append(length)
    except Damaged as error:
        raise InputError(f"{path}: {name} is damaged: {error}; copy it again") from None
    # The checksum of the lengths is over 4 bytes each, 8 for lengths beyond 32 bits, not over the varints in the file.
    crc = 0
    for length in lengths:
        crc = crc32c(struct.pack("<I" if length < 1 << 32 else "<Q", length), crc)
    if len(content) != at + 4 + sum(lengths) or content[at : at + 4] != struct.pack("<I", mask(crc)):
        raise InputError(f"{path}: the checksum of the lengths of {name} is wrong, the file is damaged; copy it again")
    _check(mask(crc32c(content[at:], crc)), entry, path, name)
    strings = []
    at += 4
    for length in lengths:
        strings.append(content[at : at + length])
        at += length
    return strings
