"""Keeps single images from taking a machine's memory or time, and tells a lack of memory from a damaged image."""

import mmap
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from errno import EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC
from threading import RLock

from funmatch.errors import InputError, is_out_of_memory

MAX_PIXELS = 178_956_970  # above this, Pillow suspects a decompression bomb
MAX_SCANS = 100  # libtiff's limit, too; ordinary progressive JPEGs have 10
LARGE = 32_000_000  # pixels above which images are decoded one at a time
PEAK = 18  # bytes a pixel: what decoding a transparent 16-bit PNG takes, the most that was measured
MACHINE_ERRORS = {ENOSPC, EDQUOT, EMFILE, ENFILE, EIO, ENOMEM}
"""Errors of the machine, which say nothing about an image: it must not be recorded as unreadable."""
ALONE = RLock()
"""Held while a large image is decoded: a few at once, one per thread, would need their memory all together."""


class OutOfMemory(InputError):
    """There was too little memory to read an image, which says nothing about the image."""


@dataclass(frozen=True)
class Limits:
    """What an image may be at most; it is checked before pixels are decoded.

    Attributes:
        pixels: larger images are rejected as decompression bombs.
        scans: JPEGs of more scans are rejected, since each scan takes the time of a whole image. 0 checks nothing.
    """

    pixels: int = MAX_PIXELS
    scans: int = MAX_SCANS

    def check(self, encoded: bytes, kind: str | None, size: tuple[int, int]) -> None:
        """Raises `ValueError` if an image is beyond the limits.

        Args:
            encoded: the file's bytes.
            kind: Pillow's name of its format.
            size: width and height in its header, pixels.
        """
        width, height = size
        # By the header: when the pixels are there, it is too late.
        if width * height > self.pixels:
            raise ValueError(f"{width:,} × {height:,} pixels are more than --max-pixels {self.pixels:,}")
        if kind not in ("JPEG", "MPO") or not self.scans:
            return
        # The quick count also counts markers in thumbnails and in what follows the image, such as a video.
        if encoded.count(b"\xff\xda") > self.scans and (found := count_scans(encoded, self.scans)) > self.scans:
            raise ValueError(f"a JPEG of {found} scans or more, which is more than --max-scans {self.scans}")


DEFAULT_LIMITS = Limits()


def count_scans(encoded: bytes, enough: int) -> int:
    """Counts the scans of a JPEG's first image, up to one more than `enough`."""
    scans, at = 0, 2  # behind the start-of-image marker
    while scans <= enough and (at := encoded.find(b"\xff", at)) >= 0 and at + 4 <= len(encoded):
        marker = encoded[at + 1]
        if marker == 0xD9:  # end of the image
            break
        if marker == 0xDA:
            scans += 1
        # Fill bytes, stuffed zeros and restart markers have no length.
        at += 1 if marker == 0xFF else 2
        if marker not in (0x00, 0x01, 0xFF) and not 0xD0 <= marker <= 0xD8:
            at += int.from_bytes(encoded[at : at + 2], "big")
    return scans


def is_of_machine(error: Exception) -> bool:
    """Returns whether an error is the machine's, and says nothing about the image."""
    of_memory = isinstance(error, OutOfMemory) or is_out_of_memory(error)
    return of_memory or (isinstance(error, OSError) and error.errno in MACHINE_ERRORS)


@contextmanager
def decoding(size: tuple[int, int]) -> Generator[None]:
    """Holds `ALONE` while the block decodes a large image, and tells whether an error in it is a lack of memory.

    Args:
        size: of the image, pixels.

    Raises:
        OutOfMemory: the block failed, and there was too little memory for it.
    """
    pixels = size[0] * size[1]
    with ALONE if pixels > LARGE else nullcontext():
        try:
            yield
        except Exception as error:
            # Pillow words it as an OSError; libjpeg reports it as damage, so that only a trial tells.
            of_memory = is_out_of_memory(error) or "out of memory" in str(error) or getattr(error, "errno", 0) == ENOMEM
            if of_memory or not has_memory(pixels):
                raise OutOfMemory(
                    f"too little memory to decode {size[0]:,} × {size[1]:,} pixels, which take up to "
                    f"{PEAK * pixels / 1e9:.2g} GB; free memory or raise its limit (ulimit -v), and start the command "
                    "again, or reject such images with a smaller --max-pixels"
                ) from None
            raise


def has_memory(pixels: int) -> bool:
    """Returns whether the system grants the memory that decoding so many pixels takes."""
    try:
        # Reserved and given back untouched, which takes microseconds.
        mmap.mmap(-1, max(1, PEAK * pixels)).close()
    except (OSError, MemoryError, OverflowError):
        return False
    return True
