"""What is freed between two steps, and needed again in the next one."""

import ctypes
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Of glibc's mallopt, as its malloc.h numbers them."""
KEEP_SETTINGS = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
DEFAULT_SETTINGS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10}
OVERRIDE_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""Where people say it otherwise."""
_lock, _keepers = Lock(), 0


@contextmanager
def keep_freed_memory(device: torch.device) -> Generator[None]:
    """Has the C library keep what is freed while the block runs, if the CPU computes.

    A step needs the same gigabytes as the one before. Given back each time, they come back page by page, each of them
    cleared by the system. (glibc alone can be told so; others do as they do, and so does one that was told otherwise.)
    """
    if (
        device.type != "cpu"
        or platform.libc_ver()[0] != "glibc"
        or any(name in os.environ for name in OVERRIDE_VARIABLES)
    ):
        yield
        return
    library = ctypes.CDLL(None)
    _count(library, 1)
    try:
        yield
    finally:
        _count(library, -1)


def _count(library: ctypes.CDLL, more: int) -> None:
    """Counts the blocks that run, and tells the library when the first begins and the last ends."""
    global _keepers
    with _lock:
        _keepers += more
        if _keepers == max(more, 0):
            for option, value in (KEEP_SETTINGS if more > 0 else DEFAULT_SETTINGS).items():
                library.mallopt(option, value)
            if more < 0:
                library.malloc_trim(0)
