"""Opens shards as they are or decompressed: GZIP and ZLIB, the two that TensorFlow calls `compression_type`."""

import gzip
import zlib
from collections.abc import Callable
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from funmatch.data.formats.crc32c import masked_crc32c

GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 16  # bytes that are read at a time
MAX_EXPANSION, EXPANDS_FREELY = 100, 1 << 30
"""Times its own size, and bytes, above both of which a compressed shard or an archive may not expand."""
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
"""Raised while a compressed shard is read that is damaged or cut off."""


def compression_of(path: Path) -> str:
    """Returns how a shard is compressed: `GZIP`, `ZLIB`, or an empty string. Names say nothing about it."""
    with open(path, "rb") as file:
        head = file.read(12)
    # First the checksum of a plain shard's first length: such a length may begin as compressed files do.
    if len(head) == 12 and masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little"):
        return ""
    if head[:2] == GZIP_MAGIC:
        return "GZIP"
    # ZLIB has no magic number: method 8, a window of at most 2¹⁵ bytes, no dictionary, and a sum divisible by 31.
    zlib_like = len(head) > 2 and head[0] & 15 == 8 and head[0] >> 4 < 8 and not head[1] & 32
    return "ZLIB" if zlib_like and int.from_bytes(head[:2], "big") % 31 == 0 else ""


def largest_content(size: int) -> int:
    """Returns the bytes that a compressed file of a size may expand to."""
    return max(MAX_EXPANSION * size, EXPANDS_FREELY)


def open_shard(path: Path, compression: str) -> BinaryIO | Any:
    """Opens the decompressed content of a shard; reading it raises one of `DAMAGED` where that is impossible."""
    openers: dict[str, Callable[[Path], Any]] = {"GZIP": gzip.open, "ZLIB": _open_zlib}
    return openers[compression](path) if compression else open(path, "rb")


def _open_zlib(path: Path) -> BufferedReader:
    return BufferedReader(_ZlibStream(path), CHUNK)


class _ZlibStream(RawIOBase):
    """Decompressed content of a ZLIB file, for which the standard library has no file object."""

    def __init__(self, path: Path) -> None:
        self._file, self._stream = open(path, "rb"), zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        # At most as many bytes as asked for: a megabyte may expand to a gigabyte. What does not fit is kept back.
        found = self._stream.decompress(self._stream.unconsumed_tail, len(buffer))
        while not found and not self._stream.eof:
            packed = self._file.read(CHUNK)
            if not packed:
                raise EOFError("it is cut off")
            found = self._stream.decompress(self._stream.unconsumed_tail + packed, len(buffer))
        if not found and (self._stream.unused_data or self._file.read(1)):
            raise zlib.error("other bytes follow it")
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()
