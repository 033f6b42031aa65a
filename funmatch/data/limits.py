"""Keeps single images from taking a machine's memory or time, and tells a lack of memory from a damaged image."""

import mmap
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC
from pathlib import Path
from threading import Condition, RLock

from funmatch.errors import InputError, is_out_of_memory

MAX_PIXELS = 178_956_970  # above this, Pillow suspects a decompression bomb
MAX_SCANS = 100  # libtiff's limit, too; ordinary progressive JPEGs have 10
LARGE = 32_000_000  # pixels above which images are decoded one at a time
PEAK = 18  # bytes a pixel: what decoding a transparent 16-bit PNG takes, the most that was measured
LEAST = 4  # bytes a pixel that decoding takes of any image: Pillow's own copy
AVAILABLE_SECONDS = 1.0
"""How long a look at the machine's memory is believed."""
MACHINE_ERRORS = {ENOSPC, EDQUOT, EMFILE, ENFILE, EIO, ENOMEM}
"""Errors of the machine, which say nothing about an image: it must not be recorded as unreadable."""
ALONE = RLock()
"""Held while a large image is decoded: a few at once, one per thread, would need their memory all together."""
CONTAINERS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
"""Where Linux says what the processes of this container may take; the second is of its earlier interface."""


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


class Room:
    """Lets so many images be decoded at a time as there is memory for half of, the others wait.

    Attributes:
        used: pixels of those that are being decoded.
    """

    def __init__(self) -> None:
        self.used, self.changed = 0, Condition()
        self.free: int | None = None
        self.looked = -AVAILABLE_SECONDS

    @contextmanager
    def taken(self, pixels: int) -> Generator[None]:
        """Waits until there is room for an image, at the latest until no other is being decoded."""
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + pixels <= self.most())
            self.used += pixels
        try:
            yield
        finally:
            with self.changed:
                self.used -= pixels
                self.changed.notify_all()

    def most(self) -> int:
        """Returns the pixels that may be decoded at a time."""
        if time.monotonic() > self.looked + AVAILABLE_SECONDS:
            self.free, self.looked = available_memory(), time.monotonic()
        # What is being decoded has taken part of its memory already, so that this errs on the small side.
        return LARGE if self.free is None else max(LARGE, self.free // (2 * PEAK))


ROOM = Room()


def available_memory() -> int | None:
    """Returns the bytes that this process may still take, of the machine's and its container's; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        for folder, most, used in zip(
            CONTAINERS,
            ("memory.max", "memory.limit_in_bytes"),
            ("memory.current", "memory.usage_in_bytes"),
            strict=True,
        ):
            if (folder / most).is_file() and (limit := (folder / most).read_text().strip()) != "max":
                # Its files in memory count too, though they give way: what is free is at least this.
                kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - int(kept.get("inactive_file", 0))
                found.append(int(limit) - taken)
    except (OSError, ValueError, IndexError):
        pass  # not Linux, or a kernel that says it otherwise
    return max(0, min(found)) if found else None


def check_memory(size: tuple[int, int]) -> None:
    """Raises `OutOfMemory` if the machine has too little memory for the pixels of a large image.

    Without this the system would grant the memory and end the process when it is used.
    """
    pixels = size[0] * size[1]
    if pixels > LARGE and (free := available_memory()) is not None and free < LEAST * pixels:
        raise _out_of_memory(size, f", and {free / 1e9:.2g} GB are available")


def _out_of_memory(size: tuple[int, int], available: str = "") -> OutOfMemory:
    return OutOfMemory(
        f"too little memory to decode {size[0]:,} × {size[1]:,} pixels, which take up to "
        f"{PEAK * size[0] * size[1] / 1e9:.2g} GB{available}; free memory or raise its limit (ulimit -v), and start "
        "the command again, or reject such images with a smaller --max-pixels"
    )


@contextmanager
def decoding(size: tuple[int, int]) -> Generator[None]:
    """Keeps large images apart and small ones few while the block decodes one; tells if an error is a lack of memory.

    Args:
        size: of the image, pixels.

    Raises:
        OutOfMemory: the block failed, and there was too little memory for it.
    """
    pixels = size[0] * size[1]
    with ExitStack() as stack:
        stack.enter_context(ALONE if pixels > LARGE else ROOM.taken(pixels))
        try:
            yield
        except OutOfMemory:
            raise
        except Exception as error:
            # Pillow words it as an OSError; libjpeg reports it as damage, so that only a trial tells.
            of_memory = is_out_of_memory(error) or "out of memory" in str(error) or getattr(error, "errno", 0) == ENOMEM
            if of_memory or not has_memory(pixels):
                raise _out_of_memory(size) from None
            raise


def has_memory(pixels: int) -> bool:
    """Returns whether the system grants the memory that decoding so many pixels takes."""
    try:
        # Reserved and given back untouched, which takes microseconds.
        mmap.mmap(-1, max(1, PEAK * pixels)).close()
    except (OSError, MemoryError, OverflowError):
        return False
    return True
