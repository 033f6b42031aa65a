"""What is freed between two steps, and needed again in the next one."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Of glibc's mallopt, as its malloc.h numbers them."""
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
USUAL = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10}


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Has the C library keep what is freed while the block runs, if the CPU computes.

    A step needs the same gigabytes as the one before. Given back each time, they come back page by page, each of them
    cleared by the system. (glibc alone can be told so; others do as they do.)
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    _told(library, KEPT)
    try:
        yield
    finally:
        _told(library, USUAL)
        library.malloc_trim(0)


def _told(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        library.mallopt(option, value)
